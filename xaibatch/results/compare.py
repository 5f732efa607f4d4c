"""Two runs in, what differs out: settings first, then the paired differences of the scores of the same images.

For two checkpoints, two data preparations or two versions of a library. Explainers and metrics are matched by their
labels, images by their ids; what only one run has is counted and left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from xaibatch.errors import RunFolderError
from xaibatch.results.cube import MetricInfo, ScoreCube, metric_info, not_independent, score_cube, unfinished
from xaibatch.results.frames import Run, open_run
from xaibatch.results.report_tables import WORDS, more_text, number, p_text
from xaibatch.results.statistics_paired import Comparison
from xaibatch.results.statistics_paired import compare as compare_columns
from xaibatch.results.study import too_many_tests

_COMPARED = ("config", "model", "data", "explainers", "metrics", "precision", "versions", "code")
_PLACES = frozenset({"config.output", "data.root"})
"""Entries that only say where something lies."""

_NOT_SETTINGS = frozenset({"forward_passes_per_second", "across_images"})


@dataclass(frozen=True, kw_only=True)
class RunComparison:
    """`scores`: (explainer, metric) -> second run minus first, verdict of the second run, one family for Holm.

    metrics: what both runs say of a metric; no direction where options turned it round in one of them.
    first, second: the runs' names. settings: dotted key of `run.json` -> values in the first and the second run.
    num_shared, num_only_first, num_only_second: images with scores. num_patients: as in the first run's cube.
    num_changed: shared images whose predicted class differs; num_relabelled: those whose label does.
    accuracy: of both runs on the shared images that both label alike; None without these and for models of one output,
    which predict no class. unfinished: what is to be said of runs that are. unmatched: labels of explainers and metrics
    that only one of the runs has.
    """

    first: str
    second: str
    settings: Mapping[str, tuple[Any, Any]]
    metrics: Mapping[str, MetricInfo]
    scores: Mapping[tuple[str, str], Comparison]
    num_shared: int
    num_only_first: int
    num_only_second: int
    num_patients: int
    num_changed: int
    num_relabelled: int
    unfinished: tuple[str, ...]
    accuracy: tuple[float, float] | None
    unmatched: tuple[str, ...]


def compare_runs(first_url: str, second_url: str) -> RunComparison:
    """Compare two runs; raises RunFolderError where they share no image, explainer or metric.

    Patients are those of the first run. Where the runs' configurations name the same explainer label for different
    options, the settings show it and the scores are compared all the same: that may be what the comparison is about.
    """
    runs = open_run(first_url), open_run(second_url)
    cubes = tuple(_cube(run) for run in runs)
    first, second = cubes
    images = [i for i in first.image_ids if i in set(second.image_ids)]
    explainers = [e for e in first.explainers if e in second.explainers]
    names = [[metric.label for metric in cube.metrics] for cube in cubes]
    metrics = [m for m in names[0] if m in names[1]]
    for what, shared in (("image", images), ("explainer", explainers), ("metric", metrics)):
        if not shared:
            raise RunFolderError(
                f"the runs {runs[0].name!r} and {runs[1].name!r} share no {what}: there is nothing to compare"
            )
    rows = [_places(cube.image_ids, images) for cube in cubes]
    values = [
        cube.image_means()[np.ix_(_places(cube.explainers, explainers), _places(n, metrics), row)]
        for cube, n, row in zip(cubes, names, rows, strict=True)
    ]
    differences_IK = (values[1] - values[0]).reshape(-1, len(images)).T
    infos = {m: _in_both(metric_info(m, runs[0].record), metric_info(m, runs[1].record)) for m in metrics}
    judged = [infos[m] for _ in explainers for m in metrics]
    found = compare_columns(
        differences_IK,
        first.clusters_I[rows[0]],
        [m.sign for m in judged],
        seed=int(runs[0].config.get("seed", 0)),
        bounds_K=[m.bounds for m in judged],
        dependent_K=[m.across_images for m in judged],
    )
    predicted = [cube.predicted_I[row] for cube, row in zip(cubes, rows, strict=True)]
    labels, others = (cube.labels_I[row] for cube, row in zip(cubes, rows, strict=True))
    alike = labels == others
    known = np.array([None not in names for names in zip(labels, *predicted, strict=True)], bool) & alike
    run_names = _names(*runs)
    return RunComparison(
        first=run_names[0],
        second=run_names[1],
        settings=setting_differences(runs[0].record, runs[1].record),
        metrics=infos,
        scores=dict(zip([(e, m) for e in explainers for m in metrics], found, strict=True)),
        num_shared=len(images),
        num_only_first=first.num_images - len(images),
        num_only_second=second.num_images - len(images),
        num_patients=first.num_patients,
        num_changed=int((predicted[0] != predicted[1]).sum()),
        num_relabelled=int((~alike).sum()),
        unfinished=tuple(
            f"{name}: {line}"
            for name, run, cube in zip(run_names, runs, cubes, strict=True)
            for line in unfinished(run.record, cube)
        ),
        accuracy=(float((predicted[0] == labels)[known].mean()), float((predicted[1] == labels)[known].mean()))
        if known.any()
        else None,
        unmatched=tuple(sorted({*first.explainers} ^ {*second.explainers}) + sorted({*names[0]} ^ {*names[1]})),
    )


def setting_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys of two run records whose values differ, without times, places and speeds.

    >>> setting_differences({"config": {"seed": 0, "output": "a"}}, {"config": {"seed": 1, "output": "b"}})
    {'config.seed': (0, 1)}
    """
    flat = [dict(_leaves({key: record.get(key) for key in _COMPARED})) for record in (first, second)]
    keys = [key for key in {**flat[0], **flat[1]} if key not in _PLACES and key.rpartition(".")[2] not in _NOT_SETTINGS]
    return {key: (flat[0].get(key), flat[1].get(key)) for key in keys if flat[0].get(key) != flat[1].get(key)}


def print_comparison(first_url: str, second_url: str, console: Console | None = None) -> None:
    """Print `compare_runs`: settings that differ, images, then one row an explainer and metric."""
    console = console or Console()
    found = compare_runs(first_url, second_url)
    console.print(_settings_table(found) if found.settings else Text("no setting differs"))
    for line in _image_lines(found):
        console.print(line, highlight=False, markup=False)
    console.print(_score_table(found))
    if text := too_many_tests({"shared images": found.scores}, found.num_patients):
        console.print(text, style="dim", highlight=False, markup=False)
    if text := not_independent(found.metrics.values()):
        console.print(text, style="dim", highlight=False, markup=False)
    console.print(
        "paired over the same images; p-values by sign flips of patients, corrected by Holm over all rows",
        style="dim",
        highlight=False,
    )


def _cube(run: Run) -> ScoreCube:
    scores = run.scores.arrow()
    if not scores.num_rows:
        raise RunFolderError(f"{run.folder.url!r} has no scores yet: finish the run first")
    return score_cube(scores, run.record)


def _names(first: Run, second: Run) -> tuple[str, str]:
    """The runs' names, with as many of the folders above them as tell the two apart."""
    folders = [run.folder.url.rstrip("/").split("/") for run in (first, second)]
    names = first.name, second.name
    for depth in range(2, max(map(len, folders)) + 1):
        if names[0] != names[1]:
            break
        names = "/".join(folders[0][-depth:]), "/".join(folders[1][-depth:])
    return names


def _places(names: Sequence[str], wanted: Sequence[str]) -> NDArray[np.int64]:
    place = {name: number for number, name in enumerate(names)}
    return np.array([place[name] for name in wanted], np.int64)


def _leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [leaf for key, inner in value.items() for leaf in _leaves(inner, f"{path}.{key}" if path else str(key))]
    return [(path, value)]


def _settings_table(found: RunComparison) -> Table:
    table = Table("setting", found.first, found.second, box=None, pad_edge=False, header_style="bold")
    for key, values in found.settings.items():
        table.add_row(key, *(Text("–" if value is None else str(value)) for value in values))
    return table


def _image_lines(found: RunComparison) -> list[str]:
    lines = [
        f"{found.num_shared} images in both runs, {found.num_only_first} only in {found.first}, "
        f"{found.num_only_second} only in {found.second}"
    ]
    line = f"{found.num_changed} of them are predicted differently"
    if found.accuracy:
        line += f"; accuracy {100 * found.accuracy[0]:.1f}% and {100 * found.accuracy[1]:.1f}%"
    lines.append(line)
    if found.num_relabelled:
        lines.append(f"{found.num_relabelled} of them are labelled differently, and left out of the accuracy")
    lines += found.unfinished
    if found.unmatched:
        lines.append(f"not in both runs: {', '.join(found.unmatched)}")
    return lines


def _in_both(first: MetricInfo, second: MetricInfo) -> MetricInfo:
    """The direction if they agree, and the range that holds both; images compared where one of them does."""
    return replace(
        first,
        across_images=first.across_images or second.across_images,
        higher_is_better=first.higher_is_better if first.higher_is_better == second.higher_is_better else None,
        bounds=(min(first.bounds[0], second.bounds[0]), max(first.bounds[1], second.bounds[1])),
    )


def _score_table(found: RunComparison) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("explainer", "metric"):
        table.add_column(name, overflow="fold")
    for name in ("second − first [95%]", "d", "p (Holm)", "second is", "to settle it", "images"):
        table.add_column(name, justify="right", no_wrap=True)
    for (explainer, metric), c in found.scores.items():
        digits = 3
        if c.interval and c.interval.high > c.interval.low:
            digits = int(np.clip(1 - np.floor(np.log10((c.interval.high - c.interval.low) / 2)), 0, 5))
        difference = number(c.mean_difference, digits)
        if c.interval:
            difference += f" [{number(c.interval.low, digits)}, {number(c.interval.high, digits)}]"
        table.add_row(
            *map(
                Text,
                (
                    explainer,
                    f"{metric} {found.metrics[metric].arrow}".strip(),
                    difference,
                    number(c.effect_size, 2),
                    p_text(c.p_holm),
                    WORDS[c.verdict],
                    more_text(c),
                    str(c.num_images),
                ),
            )
        )
    return table
