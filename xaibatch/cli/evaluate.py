"""`xaibatch evaluate`: flags in, a run in the folder, the study's table on the screen; exit code 1 for failures."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from xaibatch.cli.estimating import estimate_lines
from xaibatch.cli.output import check_kept, check_without_ray
from xaibatch.config import RunConfig, load_config, parse_setting, select
from xaibatch.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from xaibatch.pipeline.job import Job
    from xaibatch.pipeline.run import Calibrate, Engine
    from xaibatch.pipeline.work import FailedCell, Progress, ShardWork
    from xaibatch.types import Shard

Option = typer.Option

FIRST_RUN: dict[str, Any] = {
    "data.limit": 12,
    "explainers.lime.num_samples": 50,
    "explainers.lime.segmentation": "slic",
    "explainers.lime.segmentation_options": {"n_segments": 30},
    "metrics.faithfulness_correlation.num_runs": 50,
    "metrics.avg_sensitivity.num_samples": 2,
}
"""What makes the run without arguments short: about 2,900 forward passes."""

FIRST_RUN_NOTE = (
    "no --data: a short look at 12 of the 48 shipped radiographs (synthetic, not for clinical use) with a small LIME; "
    "all of it: --config embedded"
)

ONLY_RAY: Final = ("engine.address", "engine.replicas", "engine.gpus_per_replica", "engine.shards_in_flight")
"""What a run without Ray has no use for."""


def add_to(app: typer.Typer) -> None:
    app.command("evaluate")(evaluate)


def evaluate(
    model: Annotated[str | None, Option(help="timm model name, e.g. vit_tiny_patch16_224")] = None,
    checkpoint: Annotated[str | None, Option(help="local path or URL of .safetensors or weights-only .pth")] = None,
    data: Annotated[
        str | None, Option(help="folder with one sub-folder a class, or a CSV/Parquet manifest; any URL")
    ] = None,
    layout: Annotated[str | None, Option(help="layout of --data where it is not found out: see jobs/README.md")] = None,
    split: Annotated[str | None, Option(help="only this split of a manifest")] = None,
    limit: Annotated[int | None, Option(min=1, help="seeded, class-balanced sample of this many images")] = None,
    output: Annotated[
        str | None, Option("--output", "-o", help="run folder, local or any URL; the same again resumes")
    ] = None,
    config: Annotated[str | None, Option("--config", "-c", help="default, paper, embedded, or a YAML file")] = None,
    explainers: Annotated[str | None, Option(help="comma-separated labels (xaibatch list explainers)")] = None,
    metrics: Annotated[str | None, Option(help="comma-separated labels (xaibatch list metrics)")] = None,
    set_: Annotated[
        list[str] | None, Option("--set", help="any key of the configuration: explainers.lime.num_samples=200")
    ] = None,
    target: Annotated[str | None, Option(help="explained class: predicted or label")] = None,
    repeats: Annotated[int | None, Option(min=1, help="independent repetitions of every random draw")] = None,
    seed: Annotated[int | None, Option(help="seed of every random draw")] = None,
    precision: Annotated[str | None, Option(help="auto, float32, float64 or bfloat16")] = None,
    address: Annotated[str | None, Option(help="Ray cluster to join: auto, or host:6379 of its head")] = None,
    replicas: Annotated[int | None, Option(min=1, help="model replicas")] = None,
    gpus_per_replica: Annotated[float | None, Option(help="whole GPUs or a fraction that a replica reserves")] = None,
    batch_size: Annotated[int | None, Option(min=1, help="perturbed copies in one forward pass")] = None,
    shard_size: Annotated[int | None, Option(min=1, help="images a shard")] = None,
    no_ray: Annotated[bool, Option("--no-ray", help="run in this process, one shard after another")] = False,
    estimate_only: Annotated[bool, Option("--estimate", help="say what the run would cost and stop")] = False,
    accept_failures: Annotated[
        bool, Option("--accept-failures", help="exit code 0 for a complete run although some images failed")
    ] = False,
    report: Annotated[bool, Option(help="write the HTML report at the end")] = True,
) -> None:
    """Explain a ViT's predictions, score every explanation, and leave the table, the report and Parquet."""
    flags = {
        "model.name": model,
        "model.checkpoint": checkpoint,
        "data.path": data,
        "data.layout": layout,
        "data.split": split,
        "data.limit": limit,
        "output": output,
        "target": target,
        "repeats": repeats,
        "seed": seed,
        "precision.default": precision,
        "engine.address": address,
        "engine.replicas": replicas,
        "engine.gpus_per_replica": gpus_per_replica,
        "engine.batch_size": batch_size,
        "engine.shard_size": shard_size,
    }
    settings = dict(parse_setting(text) for text in set_ or [])
    if no_ray:
        _check_in_use(flags, settings)
    settings |= {key: value for key, value in flags.items() if value is not None}
    if data is None and model is None and config is None and "data.path" not in settings:
        print(FIRST_RUN_NOTE)
        path, settings = config_path("embedded"), FIRST_RUN | settings
        base = load_config(path, FIRST_RUN)
    else:
        path = config_path(config or "default")
        base = load_config(path)
    run_config = load_config(path, settings)
    run_config.model.check_weights()
    chosen = {"explainers": _names("--explainers", explainers), "metrics": _names("--metrics", metrics)}
    run_config = select(run_config, base, **chosen)
    if estimate_only:
        print("\n".join(estimate_lines(run_config)))
        return
    check_kept(run_config.output)
    raise SystemExit(run(run_config, no_ray=no_ray, accept_failures=accept_failures, write_report=report))


def run(config: RunConfig, *, no_ray: bool, accept_failures: bool, write_report: bool) -> int:
    """Run, print the table, write the report; returns the exit code."""
    from xaibatch.pipeline.progress import ProgressWatcher
    from xaibatch.pipeline.run import evaluate as evaluate_run

    engine, calibrate = _engine(no_ray)
    outcome = evaluate_run(config, engine, ProgressWatcher(), calibrate)
    code = finish(outcome, write_report=write_report)
    return 0 if accept_failures and not outcome.failed else code


def finish(outcome: Any, *, write_report: bool) -> int:
    """What a person sees at the end: what was done, the table, what failed, where everything is."""
    from rich.console import Console

    from xaibatch.results.summary import print_summary

    console = Console(soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 200)
    url = outcome.folder.url
    typed = shlex.quote(url)
    if outcome.num_cells_run == 0 and not outcome.failed:
        console.print(f"everything is done: nothing to run in {url}", highlight=False, markup=False)
    finished = outcome.results
    print_summary(finished, console)
    if outcome.num_image_failures:
        console.print(
            f'{outcome.num_image_failures} failures: xaibatch query {typed} "SELECT * FROM failures"',
            highlight=False,
            markup=False,
        )
    for cell in outcome.failed[:10]:
        console.print(f"given up: {cell.shard} {cell.stage}: {cell.error}", highlight=False, markup=False)
    if len(outcome.failed) > 10:
        console.print(f"... and {len(outcome.failed) - 10} more cells given up")
    if write_report and not outcome.failed and finished.scores.arrow().num_rows:
        from xaibatch.results.report import has_report, report_url
        from xaibatch.results.report import write_report as write

        if outcome.num_cells_run or not has_report(finished):
            write(url)
        console.print(f"report: {report_url(outcome.folder)}", highlight=False, markup=False)
    console.print(f'results: {url}  (xaibatch query {typed} "SELECT ... FROM scores")', highlight=False, markup=False)
    return 0 if outcome.ok else 1


def config_path(name: str) -> Path:
    """A YAML file by path, or a named one that ships with the project (`default`, `paper`, ...)."""
    if Path(name).is_file():
        return Path(name)
    known = named_configs()
    if name not in known:
        raise ConfigError(f"no configuration {name!r}: give a YAML file or one of {', '.join(known)}")
    return known[name]


def named_configs() -> dict[str, Path]:
    """The configurations that `--config` takes by name: in `jobs/` of a checkout, else the copies in the package."""
    package = Path(__file__).resolve().parents[1]
    copies = sorted((package / "presets").glob("*.yaml"))
    originals = [package.parent / "jobs" / path.name for path in copies]
    return {path.stem: path for path in (originals if all(path.is_file() for path in originals) else copies)}


def _names(flag: str, text: str | None) -> list[str]:
    """Names between commas; none where the flag is not given. ConfigError where it is given without a name."""
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    if text is not None and not names:
        raise ConfigError(f"{flag} names none (received {text!r}): leave it out, or see xaibatch list {flag[2:]}")
    return names


def _check_in_use(flags: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise UsageError for what was asked of a cluster though there is to be none. Keys of a YAML file may stay."""
    names = [f"--{key.rpartition('.')[2].replace('_', '-')}" for key in ONLY_RAY if flags.get(key) is not None]
    engine = settings.get("engine")
    named = {*settings, *(f"engine.{key}" for key in engine)} if isinstance(engine, dict) else settings
    names += [f"--set {key}" for key in ONLY_RAY if key in named]
    check_without_ray(names)


def _engine(no_ray: bool) -> "tuple[Engine, Calibrate]":
    """The engine and where it calibrates; both load torch or Ray only when there is work to do."""
    if no_ray:
        return _run_here, _calibrate_here
    if find_spec("ray") is None:
        raise UsageError("ray is not installed: pip install 'ray[default]', or run in this process with --no-ray")
    return _run_on_ray, _calibrate_on_ray


def _run_here(job: "Job", work: "Sequence[ShardWork]", progress: "Progress") -> "list[FailedCell]":
    from xaibatch.pipeline.local import run_local

    return run_local(job, work, progress)


def _calibrate_here(job: "Job", shard: "Shard") -> dict[str, Any]:
    from xaibatch.pipeline.local import calibrate_local

    return calibrate_local(job, shard)


def _run_on_ray(job: "Job", work: "Sequence[ShardWork]", progress: "Progress") -> "list[FailedCell]":
    from xaibatch.cluster.driver import run_on_ray

    return run_on_ray(job, work, progress)


def _calibrate_on_ray(job: "Job", shard: "Shard") -> dict[str, Any]:
    from xaibatch.cluster.calibration import calibrate_on_ray

    return calibrate_on_ray(job, shard)
