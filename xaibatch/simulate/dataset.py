"""A seed, a number and options come in; a folder of films, twins, masks and a manifest goes out, resumable."""

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xaibatch.errors import RunFolderError, UsageError
from xaibatch.simulate.options import NORMAL, SimulationOptions
from xaibatch.simulate.radiograph import Radiograph, RadiographSimulator, class_of, split_of
from xaibatch.simulate.volume import load_volume

COLUMNS: Final = ("image_id", "path", "label", "patient", "split", "mask_lesion", "mask_lung", "mask_shortcut", "twin")
RECORD_NAME: Final = "simulation.json"
MANIFEST_NAME: Final = "manifest.csv"
NOTICE_TEXT: Final = (
    "Synthetic radiographs, not for clinical use. Rendered from a chest CT of LIDC-IDRI (The Cancer Imaging Archive, "
    "CC BY 3.0, doi 10.7937/K9/TCIA.2015.LO9QL9SX) with TotalSegmentator labels; opacities are simulated.\n"
)


def prepare_output(output: Path, seed: int, options: SimulationOptions) -> None:
    """Make the folder and record what it holds; raise RunFolderError if it holds another seed's or option's images."""
    record = json.dumps({"seed": seed, "options": options.model_dump(mode="json")}, indent=2, sort_keys=True) + "\n"
    path = output / RECORD_NAME
    if path.is_file():
        if path.read_text() != record:
            raise RunFolderError(
                f"{output} was made with another seed or other options (see {path}): "
                "give another --output, or the same options"
            )
        return
    if output.exists() and not output.is_dir():
        raise RunFolderError(f"{output} is a file; --output wants a folder")
    output.mkdir(parents=True, exist_ok=True)
    _write(output / "NOTICE.txt", NOTICE_TEXT.encode())
    _write(path, record.encode())


def missing_indices(output: Path, num: int) -> list[int]:
    """Indices below `num` whose film is not in the folder yet."""
    return [index for index in range(num) if not (output / "images" / f"{image_id(index)}.png").is_file()]


def image_id(index: int) -> str:
    return f"sim-{index:06d}"


def write_radiograph(output: Path, film: Radiograph) -> None:
    """Write twin and masks, then the film itself: where the film is, all of it is."""
    name = f"{image_id(film.index)}.png"
    if film.label != NORMAL:
        _write(output / "twins" / name, _png(film.twin_HW))
        _write(output / "masks" / "lesion" / name, _png(film.lesion_HW))
    _write(output / "masks" / "lung" / name, _png(film.lung_HW))
    if film.shortcut_HW is not None:
        _write(output / "masks" / "shortcut" / name, _png(film.shortcut_HW))
    _write(output / "images" / name, _png(film.image_HW))


def write_manifest(output: Path, seed: int, options: SimulationOptions, num: int) -> Path:
    """Write `manifest.csv`, one line an image in order of index, paths relative to the folder.

    A normal film has no lesion mask and no twin: its cells are empty. `patient` is the pose, one for each image.
    """
    rows = io.StringIO()
    table = csv.writer(rows, lineterminator="\n")
    table.writerow(COLUMNS)
    for index in range(num):
        name, label = f"{image_id(index)}.png", class_of(options, index)
        lesion = [f"masks/lesion/{name}", f"twins/{name}"] if label != NORMAL else ["", ""]
        shortcut = f"masks/shortcut/{name}" if (output / "masks" / "shortcut" / name).is_file() else ""
        table.writerow(
            [image_id(index), f"images/{name}", label, f"pose-{index:06d}", split_of(options, seed, index), lesion[0],
             f"masks/lung/{name}", shortcut, lesion[1]]
        )  # fmt: skip
    path = output / MANIFEST_NAME
    _write(path, rows.getvalue().encode())
    return path


def simulate(
    output: Path,
    num: int,
    seed: int,
    options: SimulationOptions,
    report: Callable[[int, int], None] | None = None,
    cache: Path | None = None,
) -> Path:
    """Make what is missing of a set of `num` films in this process; return the manifest.

    report: called with (films there, films wanted) after each film. cache: see `volume.load_volume`.
    """
    check_number(num)
    prepare_output(output, seed, options)
    missing = missing_indices(output, num)
    if missing:
        simulator = RadiographSimulator(load_volume(cache), options, seed)
        for done, _ in enumerate(make_films(output, simulator, missing), start=1):
            if report:
                report(num - len(missing) + done, num)
    return write_manifest(output, seed, options, num)


def make_films(output: Path, simulator: RadiographSimulator, indices: Sequence[int]) -> Iterable[int]:
    """Render and write each index; yields it when its files are there."""
    for index in indices:
        write_radiograph(output, simulator.radiograph(index))
        yield index


def check_number(num: int) -> None:
    if num < 1:
        raise UsageError(f"--num must be at least 1, not {num}")


def _png(values_HW: NDArray[np.uint8] | NDArray[np.bool_]) -> bytes:
    stream = io.BytesIO()
    image = Image.fromarray(values_HW.astype(np.uint8) * 255).convert("1") if values_HW.dtype == np.bool_ else None
    (image or Image.fromarray(values_HW)).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _write(path: Path, content: bytes) -> None:
    """Write to a temporary name beside the target, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)
