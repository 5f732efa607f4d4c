"""`xaibatch simulate`: a number and a seed in, a folder of simulated radiographs with masks and twins out."""

import time
from typing import Annotated, Any

import typer

Option = typer.Option


def add_to(app: typer.Typer) -> None:
    app.command("simulate")(simulate)


def simulate(
    output: Annotated[str, Option("--output", "-o", help="folder of the set; the same call again resumes")],
    num: Annotated[int, Option(min=1, help="number of films; classes take turns")] = 300,
    seed: Annotated[int, Option(help="seed of every random draw; film i is the same in a set of any size")] = 0,
    size: Annotated[int, Option(min=32, help="side of the films in pixels")] = 224,
    shortcut: Annotated[
        str, Option(help="none, marker or exposure: a cue that goes with one class in train and val, not in test")
    ] = "none",
    shortcut_label: Annotated[str, Option(help="the class that the cue goes with")] = "pneumonia-like",
    set_: Annotated[
        list[str] | None, Option("--set", help="any option of the simulator: lesions.ground_glass.min_area_cm2=50")
    ] = None,
    workers: Annotated[int | None, Option(min=1, help="Ray workers; default: one a CPU")] = None,
    address: Annotated[str | None, Option(help="Ray cluster to join")] = None,
    no_ray: Annotated[bool, Option("--no-ray", help="render in this process")] = False,
) -> None:
    """Render radiographs with known truth; synthetic, not for clinical use. Needs the extra `simulate`."""
    from xaibatch.cli.output import check_without_ray, local_folder
    from xaibatch.simulate import dataset

    folder = local_folder(output)
    options = options_from(size, shortcut, shortcut_label, set_ or [])
    report = _Progress()
    if no_ray:
        given = {"--workers": workers, "--address": address}
        check_without_ray([flag for flag, value in given.items() if value is not None])
        manifest = dataset.simulate(folder, num, seed, options, report)
    else:
        from xaibatch.cluster.simulate import simulate_on_ray

        manifest = simulate_on_ray(folder, num, seed, options, report, address=address, num_workers=workers)
    print(f"{num} films (synthetic, not for clinical use): {manifest}")


def options_from(size: int, shortcut: str, shortcut_label: str, settings: list[str]) -> Any:
    """Flags to SimulationOptions; raises ConfigError for unknown keys and impossible values."""
    from xaibatch.config import parse_setting, set_value
    from xaibatch.options import validated
    from xaibatch.simulate.options import SimulationOptions

    values: dict[str, Any] = {"size": size, "shortcut": {"kind": shortcut, "label": shortcut_label}}
    for text in settings:
        set_value(values, *parse_setting(text))
    return validated(SimulationOptions, values, "simulation")


class _Progress:
    """A line every ten seconds."""

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()
        self._first: int | None = None

    def __call__(self, done: int, wanted: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = done - 1
        if now - self._last < 10 and done < wanted:
            return
        self._last = now
        rate = (done - self._first) / max(now - self._started, 1e-9)
        left = (wanted - done) / max(rate, 1e-9)
        print(f"{done} of {wanted} films  {rate:.2f}/s  about {left / 60:.0f} min left", flush=True)
