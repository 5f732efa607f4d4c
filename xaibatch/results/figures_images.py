"""Chosen images in, the figure of overlays as a Matplotlib figure out, for print: rows explainers, columns images by
class."""

import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from xaibatch.results.overlay import KEY_ENDS, key_colours
from xaibatch.results.report_choice import Choice
from xaibatch.results.report_figure import (
    Material,
    averaged_note,
    head_lines,
    legend,
    overlay_rgb,
    radiograph_rgb,
    score_lines,
    shown_metrics,
    twin_rgb,
)

_SIDE, _GAP, _LINE, _LEFT = 1.25, 0.06, 0.1, 0.3
"""Inches: a picture's side, the space between two, a line of small print, the row titles' margin. Placed by hand:
Matplotlib takes most of a minute to lay out fifty panels by itself."""

_MIN_WIDTH, _BAR, _END, _LETTERS = 3.6, 1.1, 0.95, 20
"""Inches: the narrowest figure that has room for a colour key, its bar, the text before it; letters an inch below the
pictures."""


def picture_figure(choice: Choice, material: Material, *, max_metrics: int = 4) -> Figure:
    """The same rows and columns as the report's figure, scores under each overlay; below, what the report says around
    it: the rule of choice, the letters, which class is explained, and the colour keys."""
    cube = material.cube
    shown = shown_metrics(cube.metrics, max_metrics)
    rows: list[tuple[str, list[NDArray[np.uint8] | None], list[tuple[str, ...]]]] = [
        ("radiograph", [radiograph_rgb(i, material) for i in choice.image_ids], []),
        ("lesion-free\ntwin", [twin_rgb(i, material) for i in choice.image_ids], []),
    ]
    for explainer in cube.explainers:
        pictures = [overlay_rgb(i, explainer, material) for i in choice.image_ids]
        lines = [score_lines(i, explainer, material, shown) for i in choice.image_ids]
        rows.append((material.titles[explainer], pictures, lines))
    rows = [row for row in rows if any(picture is not None for picture in row[1])]
    columns = len(choice.image_ids)
    heights = [_SIDE + _LINE * max((len(texts) for texts in lines), default=0) + _GAP for _, _, lines in rows]
    heads = [head_lines(i, remark, material) for i, remark in zip(choice.image_ids, choice.remarks, strict=True)]
    top = _LINE * max(map(len, heads)) + _GAP
    width = max(_LEFT + columns * (_SIDE + _GAP), _MIN_WIDTH)
    sentences = (
        f"{choice.title}: {choice.rule}.",
        f"Below each overlay: {legend(choice, material, shown)}.",
        averaged_note(material),
        material.explained,
    )
    caption = textwrap.wrap(" ".join(filter(None, sentences)), int(_LETTERS * (width - _LEFT)))
    kinds = sorted({material.signed[e] for e in cube.explainers})
    below = _LINE * (1.2 * len(caption) + 1.8 * len(kinds) + 2)
    height = top + sum(heights) + below
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    upper = height - top
    for (title, pictures, lines), row_height in zip(rows, heights, strict=True):
        for column, picture in enumerate(pictures):
            corner = (_LEFT + column * (_SIDE + _GAP)) / width, (upper - _SIDE) / height
            axes = figure.add_axes((*corner, _SIDE / width, _SIDE / height))
            _show(axes, picture, lines[column] if lines else ())
        middle = (upper - _SIDE / 2) / height
        figure.text(
            _LEFT / 2 / width, middle, title, rotation=90, ha="center", va="center", fontsize=6.5, weight="bold"
        )
        upper -= row_height
    for column, head in enumerate(heads):
        centre = (_LEFT + column * (_SIDE + _GAP) + _SIDE / 2) / width
        figure.text(centre, (height - top + _GAP) / height, "\n".join(head), ha="center", va="bottom", fontsize=5.5)
    figure.text(_LEFT / width, (below - _LINE) / height, "\n".join(caption), fontsize=6, va="top", linespacing=1.2)
    for place, kind in enumerate(reversed(kinds)):
        _colour_key(figure, kind, _LINE * (0.6 + 1.8 * place))
    return figure


def _colour_key(figure: Figure, signed: bool, bottom: float) -> None:
    """A bar with what its ends mean, `bottom` inches above the figure's lower edge."""
    width, height = figure.get_size_inches()
    low, high = KEY_ENDS[signed]
    middle = (bottom + _LINE / 2) / height
    axes = figure.add_axes(((_LEFT + _END) / width, bottom / height, _BAR / width, _LINE / height))
    axes.imshow(key_colours(signed, 256)[None], aspect="auto")
    axes.set_xticks([])
    axes.set_yticks([])
    figure.text((_LEFT + _END - _GAP) / width, middle, low, ha="right", va="center", fontsize=6)
    figure.text((_LEFT + _END + _BAR + _GAP) / width, middle, high, ha="left", va="center", fontsize=6)


def _show(axes: Axes, picture: NDArray[np.uint8] | None, lines: tuple[str, ...]) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if picture is not None:
        axes.imshow(picture, interpolation="antialiased")
        axes.set_xlabel("\n".join(lines), fontsize=5.5, labelpad=2)
