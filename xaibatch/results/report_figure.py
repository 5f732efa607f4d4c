"""Chosen images in, the tiles of a figure out: a column an image, a row the radiograph, its twin, and each explainer's
overlay.

Shape letters: H W pixels.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xaibatch.results.cube import ScoreCube
from xaibatch.results.overlay import composite, outlined, strength
from xaibatch.results.report_choice import Choice
from xaibatch.results.report_images import Picture, StoredMap
from xaibatch.results.report_tables import number

PREFERRED_MASKS = ("lesion", "infection", "lung")
"""Which mask is outlined where an image has several: the first of these, else the first by name."""

_BLANK = 0.12
"""Grey under a map whose radiograph cannot be had."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """One picture (a data URL), a text for those who do not see it, and the lines below it."""

    source: str
    alt: str
    lines: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class TileRow:
    """`title` names the row; one tile or None (nothing to show) a column."""

    title: str
    tiles: tuple[Tile | None, ...]


@dataclass(frozen=True, kw_only=True)
class TileGrid:
    """A figure: columns have heads (lines of text), rows have titles."""

    title: str
    rule: str
    heads: tuple[tuple[str, ...], ...]
    rows: tuple[TileRow, ...]
    legend: str


@dataclass(frozen=True, kw_only=True)
class Material:
    """Everything that tiles are made of; `probabilities` is the predicted class's, by image id."""

    cube: ScoreCube
    pictures: Mapping[str, Picture]
    maps: Mapping[tuple[str, str], StoredMap]
    probabilities: Mapping[str, float]
    titles: Mapping[str, str]
    signed: Mapping[str, bool]


def tile_grid(choice: Choice, material: Material, *, max_metrics: int = 4) -> TileGrid:
    """Lay out the chosen images; the scores of the first `max_metrics` metrics stand under each overlay by their
    letters."""
    letters = metric_letters([m.title for m in material.cube.metrics])[:max_metrics]
    rows = [
        TileRow(title="radiograph", tiles=tuple(_radiograph(i, material) for i in choice.image_ids)),
        TileRow(title="lesion-free twin", tiles=tuple(_twin(i, material) for i in choice.image_ids)),
    ]
    for explainer in material.cube.explainers:
        tiles = tuple(_overlay(i, explainer, material, letters) for i in choice.image_ids)
        rows.append(TileRow(title=material.titles[explainer], tiles=tiles))
    shown = material.cube.metrics[: len(letters)]
    legend = ", ".join(f"{letter} {m.title} {m.arrow}".strip() for letter, m in zip(letters, shown, strict=True))
    outlines = {_mask_name(material.pictures[i]) for i in choice.image_ids if i in material.pictures} - {None}
    if outlines:
        legend += f"; green outline: {', '.join(sorted(str(name) for name in outlines))} mask"
    return TileGrid(
        title=choice.title,
        rule=choice.rule,
        heads=tuple(_head(i, remark, material) for i, remark in zip(choice.image_ids, choice.remarks, strict=True)),
        rows=tuple(row for row in rows if any(row.tiles)),
        legend=legend,
    )


def metric_letters(titles: Sequence[str]) -> list[str]:
    """The shortest capitals that tell metrics apart: initials, lengthened where two are alike.

    >>> metric_letters(["Faithfulness correlation", "Average sensitivity", "Effective complexity", "Max sensitivity"])
    ['F', 'A', 'E', 'M']
    >>> metric_letters(["Pixel flipping", "Pointing game", "Complexity"])
    ['PF', 'PG', 'C']
    """
    letters = [title[0].upper() for title in titles]
    for i, title in enumerate(titles):
        if sum(other[0].upper() == title[0].upper() for other in titles) > 1:
            letters[i] = "".join(word[0].upper() for word in title.split())
    return [
        f"{letter}{letters[:i].count(letter) + 1}" if letters.count(letter) > 1 else letter
        for i, letter in enumerate(letters)
    ]


def data_url(rgb_HW3: NDArray[np.uint8], *, quality: int = 82) -> str:
    """The picture as a WebP data URL; `quality` 0 to 100."""
    target = io.BytesIO()
    Image.fromarray(rgb_HW3).save(target, "WEBP", quality=quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(target.getvalue()).decode()


def thumbnail(grey_HW: NDArray[np.floating], side: int) -> NDArray[np.uint8]:
    """The radiograph with its longer side at most `side` pixels, uint8 grey."""
    image = Image.fromarray(np.round(np.clip(grey_HW, 0, 1) * 255).astype(np.uint8))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image)


def _head(image_id: str, remark: str, material: Material) -> tuple[str, ...]:
    cube = material.cube
    row = cube.image_ids.index(image_id)
    label, predicted = cube.labels_I[row], cube.predicted_I[row]
    p = material.probabilities.get(image_id)
    said = f"{predicted}" + (f" (p = {p:.2f})" if p is not None else "")
    outcome = "" if label is None else " ✓" if label == predicted else " ✗"
    lines = [str(label) if label is not None else "no label", f"predicted {said}{outcome}", _short(image_id)]
    return tuple([remark, *lines] if remark else lines)


def _short(image_id: str, length: int = 26) -> str:
    name = image_id.rsplit("/", 1)[-1]
    return name if len(name) <= length else f"{name[: length - 9]}…{name[-8:]}"


def _radiograph(image_id: str, material: Material) -> Tile | None:
    picture = material.pictures.get(image_id)
    if picture is None:
        return None
    rgb = _grey_rgb(picture.grey_HW)
    name = _mask_name(picture)
    if name:
        rgb = outlined(rgb, picture.masks[name], width=_width(rgb))
    return Tile(source=data_url(rgb), alt=f"radiograph {image_id}" + (f", {name} mask outlined" if name else ""))


def _twin(image_id: str, material: Material) -> Tile | None:
    picture = material.pictures.get(image_id)
    if picture is None or picture.twin_HW is None:
        return None
    return Tile(source=data_url(_grey_rgb(picture.twin_HW)), alt=f"lesion-free twin of {image_id}")


def _overlay(image_id: str, explainer: str, material: Material, letters: Sequence[str]) -> Tile | None:
    stored = material.maps.get((image_id, explainer))
    if stored is None:
        return None
    picture = material.pictures.get(image_id)
    grey_HW = picture.grey_HW if picture else np.full((224, 224), _BLANK, np.float32)
    rgb = composite(grey_HW, stored.grid_hw, signed=material.signed[explainer])
    name = _mask_name(picture) if picture else None
    if picture and name:
        rgb = outlined(rgb, picture.masks[name], width=_width(rgb))
    problem = strength(stored.grid_hw)[1]
    lines = (problem,) if problem else ()
    alt = f"{material.titles[explainer]} for {stored.target} on {image_id}"
    return Tile(source=data_url(rgb), alt=alt, lines=(*lines, *_scores(image_id, explainer, material, letters)))


def _scores(image_id: str, explainer: str, material: Material, letters: Sequence[str]) -> tuple[str, ...]:
    """Two scores a line, each behind its metric's letter."""
    cube = material.cube
    means_EMI = cube.image_means()
    e, i = cube.explainers.index(explainer), cube.image_ids.index(image_id)
    texts = []
    for m, letter in enumerate(letters):
        value = float(means_EMI[e, m, i])
        spread = means_EMI[e, m][np.isfinite(means_EMI[e, m])]
        digits = 2 if not spread.size or spread.max() < 100 else 0
        texts.append(f"{letter} {number(value, digits)}")
    return tuple("  ".join(texts[k : k + 2]) for k in range(0, len(texts), 2))


def _mask_name(picture: Picture) -> str | None:
    return next((name for name in PREFERRED_MASKS if name in picture.masks), next(iter(sorted(picture.masks)), None))


def _grey_rgb(grey_HW: NDArray[np.floating]) -> NDArray[np.uint8]:
    return np.repeat(np.round(np.clip(grey_HW, 0, 1) * 255).astype(np.uint8)[..., None], 3, axis=-1)


def _width(rgb_HW3: NDArray[np.uint8]) -> int:
    """Outline width in pixels: one for each 160 of the picture's height."""
    return max(1, round(rgb_HW3.shape[0] / 160))
