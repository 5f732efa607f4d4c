"""Chosen images in, the tiles of a figure out: a column an image, a row the radiograph, its twin, and each explainer's
overlay.

Shape letters: H W pixels.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xaibatch.results.cube import MetricInfo, ScoreCube
from xaibatch.results.overlay import OverlayOptions, composite, outlined, strength
from xaibatch.results.report_choice import Choice
from xaibatch.results.report_images import Picture, StoredMap
from xaibatch.results.report_tables import number

PREFERRED_MASKS = ("lesion", "infection", "lung")
"""Which mask is outlined in all pictures: the first of these that any image has, else the first by name."""

FAMILY_LETTERS: Mapping[str, str] = {
    "faithfulness": "F",
    "robustness": "S",
    "complexity": "C",
    "localisation": "L",
    "randomisation": "R",
    "causal": "T",
}

Upsampling = Literal["bilinear", "nearest"]

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
    """A figure: columns have heads (lines of text), rows have titles; `legend` and `note` are for its caption."""

    title: str
    rule: str
    heads: tuple[tuple[str, ...], ...]
    rows: tuple[TileRow, ...]
    legend: str
    note: str


@dataclass(frozen=True, kw_only=True)
class Material:
    """Everything that tiles are made of.

    probabilities: the predicted class's, by image id.
    digits:        after the point, of a metric's scores by its label: as many as in the table.
    upsampling:    of an explainer's stored maps, by its label.
    averaged:      explainers whose stored maps are means over the model's patches of the finer maps that were scored.
    explained:     a sentence on which class the maps explain; may be empty.
    outline:       name of the mask that is outlined, None for none.
    """

    cube: ScoreCube
    pictures: Mapping[str, Picture]
    maps: Mapping[tuple[str, str], StoredMap]
    probabilities: Mapping[str, float]
    titles: Mapping[str, str]
    signed: Mapping[str, bool]
    digits: Mapping[str, int]
    upsampling: Mapping[str, Upsampling]
    averaged: frozenset[str] = frozenset()
    explained: str = ""
    outline: str | None = None


def tile_grid(choice: Choice, material: Material, *, max_metrics: int = 4) -> TileGrid:
    """Lay out the chosen images; the scores of the first `max_metrics` metrics stand under each overlay by their
    letters."""
    shown = shown_metrics(material.cube.metrics, max_metrics)
    rows = [
        TileRow(title="radiograph", tiles=tuple(_radiograph(i, material) for i in choice.image_ids)),
        TileRow(title="lesion-free twin", tiles=tuple(_twin(i, material) for i in choice.image_ids)),
    ]
    for explainer in material.cube.explainers:
        tiles = tuple(_overlay(i, explainer, material, shown) for i in choice.image_ids)
        rows.append(TileRow(title=material.titles[explainer], tiles=tiles))
    return TileGrid(
        title=choice.title,
        rule=choice.rule,
        heads=tuple(
            head_lines(i, remark, material) for i, remark in zip(choice.image_ids, choice.remarks, strict=True)
        ),
        rows=tuple(row for row in rows if any(row.tiles)),
        legend=legend(choice, material, shown),
        note=averaged_note(material),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownMetric:
    """A metric whose scores stand under the overlays: its label and place in the cube, its letter and its title with
    arrow."""

    label: str
    place: int
    letter: str
    title: str


def legend(choice: Choice, material: Material, shown: Sequence[ShownMetric]) -> str:
    """What the letters under the overlays mean, and the outline in them."""
    text = ", ".join(f"{metric.letter} {metric.title}" for metric in shown)
    if any(_has_outline(i, material) for i in choice.image_ids):
        text += f"; green outline: {material.outline} mask"
    return text


def averaged_note(material: Material) -> str:
    """A sentence on the explainers whose pictures are coarser than what was scored; empty where there is none."""
    titles = [material.titles[e] for e in material.cube.explainers if e in material.averaged]
    if not titles:
        return ""
    named = " and ".join([", ".join(titles[:-1]), titles[-1]] if len(titles) > 1 else titles)
    return (
        f"{named}: scores are of the full map (pixels or superpixels), pictures show what a run stores of it, the mean "
        "in each of the model's patches, drawn as squares."
    )


def shown_metrics(metrics: Sequence[MetricInfo], number: int) -> tuple[ShownMetric, ...]:
    """At most `number` metrics, the first of each family before a family's second, in the cube's order.

    The letter is the family's (F faithfulness, S sensitivity and other robustness, C complexity, ...), numbered where
    two metrics share it.
    """
    nth = [sum(m.family == metric.family for m in metrics[:place]) for place, metric in enumerate(metrics)]
    chosen = sorted(sorted(range(len(metrics)), key=lambda place: (nth[place], place))[:number])
    families = [metrics[place].family for place in chosen]
    shown = []
    for k, place in enumerate(chosen):
        metric = metrics[place]
        letter = FAMILY_LETTERS.get(metric.family, metric.title[:1].upper())
        if families.count(metric.family) > 1:
            letter += str(families[: k + 1].count(metric.family))
        shown.append(
            ShownMetric(
                label=metrics[place].label, place=place, letter=letter, title=f"{metric.title} {metric.arrow}".strip()
            )
        )
    return tuple(shown)


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


def head_lines(image_id: str, remark: str, material: Material) -> tuple[str, ...]:
    """What stands above an image's column: remark, true class, predicted class (a model of one output has none),
    probability, name."""
    cube = material.cube
    row = cube.image_ids.index(image_id)
    label, predicted = cube.labels_I[row], cube.predicted_I[row]
    p = material.probabilities.get(image_id)
    outcome = "" if label is None else " ✓" if label == predicted else " ✗"
    lines = [str(label) if label is not None else "no label"]
    lines += [f"predicted {predicted}{outcome}"] if predicted is not None else []
    lines += [f"p = {p:.2f}"] if p is not None else []
    lines.append(_short(image_id))
    return tuple([remark, *lines] if remark else lines)


def _short(image_id: str, length: int = 26) -> str:
    name = image_id.rsplit("/", 1)[-1]
    return name if len(name) <= length else f"{name[: length - 9]}…{name[-8:]}"


def radiograph_rgb(image_id: str, material: Material) -> NDArray[np.uint8] | None:
    """The radiograph, its mask outlined where it has one; None where its pixels cannot be had."""
    picture = material.pictures.get(image_id)
    return None if picture is None else _with_outline(_grey_rgb(picture.grey_HW), image_id, material)


def twin_rgb(image_id: str, material: Material) -> NDArray[np.uint8] | None:
    """The lesion-free twin, None where there is none."""
    picture = material.pictures.get(image_id)
    return None if picture is None or picture.twin_HW is None else _grey_rgb(picture.twin_HW)


def overlay_rgb(image_id: str, explainer: str, material: Material) -> NDArray[np.uint8] | None:
    """The explainer's map over the radiograph, or over black where its pixels cannot be had; None without a map."""
    stored = material.maps.get((image_id, explainer))
    if stored is None:
        return None
    picture = material.pictures.get(image_id)
    grey_HW = picture.grey_HW if picture else np.full((224, 224), _BLANK, np.float32)
    options = OverlayOptions(upsampling=material.upsampling[explainer])
    rgb = composite(grey_HW, stored.grid_hw, signed=material.signed[explainer], options=options)
    return _with_outline(rgb, image_id, material)


def _radiograph(image_id: str, material: Material) -> Tile | None:
    rgb = radiograph_rgb(image_id, material)
    if rgb is None:
        return None
    remark = f", {material.outline} mask outlined" if _has_outline(image_id, material) else ""
    return Tile(source=data_url(rgb), alt=f"radiograph {image_id}{remark}")


def _twin(image_id: str, material: Material) -> Tile | None:
    rgb = twin_rgb(image_id, material)
    return None if rgb is None else Tile(source=data_url(rgb), alt=f"lesion-free twin of {image_id}")


def _overlay(image_id: str, explainer: str, material: Material, shown: Sequence[ShownMetric]) -> Tile | None:
    rgb = overlay_rgb(image_id, explainer, material)
    if rgb is None:
        return None
    stored = material.maps[image_id, explainer]
    problem = strength(stored.grid_hw)[1]
    alt = f"{material.titles[explainer]} for {stored.target} on {image_id}"
    lines = ((problem,) if problem else ()) + score_lines(image_id, explainer, material, shown)
    return Tile(source=data_url(rgb), alt=alt, lines=lines)


def _has_outline(image_id: str, material: Material) -> bool:
    picture = material.pictures.get(image_id)
    return picture is not None and material.outline in picture.masks


def _with_outline(rgb_HW3: NDArray[np.uint8], image_id: str, material: Material) -> NDArray[np.uint8]:
    """The chosen mask outlined, one pixel wide for each 110 of the picture's height."""
    if material.outline is None or not _has_outline(image_id, material):
        return rgb_HW3
    mask_HW = material.pictures[image_id].masks[material.outline]
    return outlined(rgb_HW3, mask_HW, width=max(1, round(rgb_HW3.shape[0] / 110)))


def score_lines(image_id: str, explainer: str, material: Material, shown: Sequence[ShownMetric]) -> tuple[str, ...]:
    """Two scores a line, each behind its metric's letter."""
    cube = material.cube
    means_EMI = cube.image_means()
    e, i = cube.explainers.index(explainer), cube.image_ids.index(image_id)
    texts = []
    for metric in shown:
        score = float(means_EMI[e, metric.place, i])
        texts.append(f"{metric.letter} {number(score, material.digits[metric.label])}")
    return tuple("  ".join(texts[k : k + 2]) for k in range(0, len(texts), 2))


def outline_of(pictures: Iterable[Picture]) -> str | None:
    """Name of the mask to outline, None where no picture has any that is not empty."""
    names = {name for picture in pictures for name, mask_HW in picture.masks.items() if mask_HW.any()}
    return next((name for name in PREFERRED_MASKS if name in names), min(names, default=None))


def _grey_rgb(grey_HW: NDArray[np.floating]) -> NDArray[np.uint8]:
    return np.repeat(np.round(np.clip(grey_HW, 0, 1) * 255).astype(np.uint8)[..., None], 3, axis=-1)
