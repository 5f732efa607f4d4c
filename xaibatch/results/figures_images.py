"""Chosen images in, the figure of overlays as a Matplotlib figure out, for print: rows explainers, columns images by
class."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from xaibatch.results.report_choice import Choice
from xaibatch.results.report_figure import (
    Material,
    head_lines,
    overlay_rgb,
    radiograph_rgb,
    score_lines,
    shown_metrics,
    twin_rgb,
)

_SIDE, _GAP, _LINE, _LEFT = 1.25, 0.06, 0.1, 0.3
"""Inches: a picture's side, the space between two, a line of small print, the row titles' margin. Placed by hand:
Matplotlib takes most of a minute to lay out fifty panels by itself."""


def picture_figure(choice: Choice, material: Material, *, max_metrics: int = 4) -> Figure:
    """The same rows and columns as the report's figure, scores under each overlay, a legend of their letters below."""
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
    width, height = _LEFT + columns * (_SIDE + _GAP), top + sum(heights) + 2 * _LINE
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
    legend = "   ".join(f"{metric.letter} {metric.title}" for metric in shown)
    figure.text(_LEFT / width, _LINE / height, legend, fontsize=6.5)
    return figure


def _show(axes: Axes, picture: NDArray[np.uint8] | None, lines: tuple[str, ...]) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if picture is not None:
        axes.imshow(picture, interpolation="antialiased")
        axes.set_xlabel("\n".join(lines), fontsize=5.5, labelpad=2)
