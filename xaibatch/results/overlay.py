"""A radiograph and an attribution map in, a picture out in which both can be read: colour by value, opacity by
strength.

The radiograph stays grey and shows through wherever the map says little. Positive maps use a perceptually uniform
sequential colour map, signed maps a diverging one whose two arms grow equally light (blue: against the class, orange:
for it); both keep their order for colour-blind readers and in grey print.

Shape letters: H W pixels of the radiograph, h w the map's own sides.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pydantic import Field

from xaibatch.maps import upsample
from xaibatch.options import Options

OUTLINE = "#7CFC00"
"""Colour of a mask's outline: in neither colour map, and visible on lung and bone."""

KEY_ENDS: Mapping[bool, tuple[str, str]] = {
    False: ("none", "the map’s own maximum"),
    True: ("against the class", "for it (signed maps)"),
}
"""What stands at both ends of a colour key, for positive and for signed maps."""

_AGAINST_FOR = ("#5cb0ff", "#3a86e0", "#2a62b8", "#505050", "#b4540f", "#e8842a", "#ffb04d")
_MID_GREY = 0.45


class OverlayOptions(Options):
    """How a map is laid over a radiograph."""

    colours: str = "plasma"
    """Matplotlib's name of the colour map for positive maps."""

    max_opacity: float = Field(default=0.75, gt=0, le=1)
    """Opacity of the strongest value."""

    opacity_power: float = Field(default=0.8, gt=0)
    """Opacity is strength to this power; strength is |value| over the map's own largest."""

    upsampling: Literal["bilinear", "nearest"] = "bilinear"
    """From the token grid to pixels: as for scoring; `nearest` for means over patches of finer maps."""


def is_signed(map_hw: NDArray[np.floating]) -> bool:
    """Whether the map has negative values."""
    return bool(np.nanmin(map_hw) < 0) if np.isfinite(map_hw).any() else False


def strength(map_hw: NDArray[np.floating]) -> tuple[NDArray[np.float64] | None, str]:
    """The map over its own largest magnitude (in [-1, 1]), or None and the reason why it cannot be shown."""
    values = np.asarray(map_hw, np.float64)
    if not np.isfinite(values).all():
        return None, "the map has undefined values"
    peak = np.abs(values).max(initial=0.0)
    return (values / peak, "") if peak > 0 else (None, "the map is zero everywhere")


def colour_map(signed: bool, options: OverlayOptions) -> Colormap:
    """Colours over [-1, 1] for signed maps, over [0, 1] for positive ones."""
    if signed:
        return LinearSegmentedColormap.from_list("against-for", _AGAINST_FOR)
    return mpl.colormaps[options.colours]


def key_colours(signed: bool, number: int, options: OverlayOptions | None = None) -> NDArray[np.float64]:
    """(number,3) RGB in [0, 1]: the colours of [-1, 1] or [0, 1] as they look over mid-grey at their opacity, so that a
    key shows what the pictures show."""
    options = options or OverlayOptions()
    values = np.linspace(-1 if signed else 0, 1, number)
    opacity = (options.max_opacity * np.abs(values) ** options.opacity_power)[:, None]
    mixed: NDArray[np.float64] = colour_map(signed, options)((values + 1) / 2 if signed else values)[:, :3] * opacity
    return mixed + _MID_GREY * (1 - opacity)


def composite(
    image_HW: NDArray[np.floating],
    map_hw: NDArray[np.floating],
    *,
    signed: bool | None = None,
    options: OverlayOptions | None = None,
) -> NDArray[np.uint8]:
    """Return the overlay as RGB (H,W,3). `image_HW` is grey in [0, 1]; a map that cannot be shown leaves it as it is.

    signed: as the explainer declares; None looks at the map. An explainer that declares positive maps has negative
    values shown as zero, which is what they mean there.
    """
    options = options or OverlayOptions()
    signed = is_signed(map_hw) if signed is None else signed
    grey_HW3 = np.repeat(np.clip(image_HW, 0, 1)[..., None], 3, axis=-1)
    relative, _ = strength(map_hw)
    if relative is None:
        return np.round(grey_HW3 * 255).astype(np.uint8)
    value_HW = upsample(relative, (image_HW.shape[0], image_HW.shape[1]), options.upsampling)
    if not signed:
        value_HW = np.maximum(value_HW, 0)
    colour_HW3 = colour_map(signed, options)((value_HW + 1) / 2 if signed else value_HW)[..., :3]
    opacity_HW1 = (options.max_opacity * np.minimum(np.abs(value_HW), 1) ** options.opacity_power)[..., None]
    mixed = grey_HW3 * (1 - opacity_HW1) + colour_HW3 * opacity_HW1
    return np.round(np.clip(mixed, 0, 1) * 255).astype(np.uint8)


def outlined(
    rgb_HW3: NDArray[np.uint8], mask_HW: NDArray[np.bool_], *, colour: str = OUTLINE, width: int = 1
) -> NDArray[np.uint8]:
    """Draw the inner edge of a mask, `width` pixels wide, into a picture."""
    inner = mask_HW.copy()
    for _ in range(width):
        padded = np.pad(inner, 1, constant_values=False)
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    drawn = rgb_HW3.copy()
    drawn[mask_HW & ~inner] = [round(255 * part) for part in mpl.colors.to_rgb(colour)]
    return drawn


def overlay_figure(
    image_HW: NDArray[np.floating],
    map_hw: NDArray[np.floating],
    *,
    title: str,
    subtitle: str = "",
    signed: bool | None = None,
    mask_HW: NDArray[np.bool_] | None = None,
    options: OverlayOptions | None = None,
) -> Figure:
    """The radiograph alone, the overlay beside it, and a colour bar; the class and its probability belong into
    `title`."""
    options = options or OverlayOptions()
    signed = is_signed(map_hw) if signed is None else signed
    rows, columns = image_HW.shape
    height = 3.6
    figure = Figure(figsize=(2 * height * columns / rows + 1.3, height + 0.75), layout="constrained")
    FigureCanvasAgg(figure)
    plain, laid = figure.subplots(1, 2)
    rgb = composite(image_HW, map_hw, signed=signed, options=options)
    grey = np.repeat(np.round(np.clip(image_HW, 0, 1) * 255).astype(np.uint8)[..., None], 3, axis=-1)
    if mask_HW is not None:
        rgb, grey = outlined(rgb, mask_HW), outlined(grey, mask_HW)
    _show(plain, grey, "radiograph" + (", mask outlined" if mask_HW is not None else ""))
    relative, problem = strength(map_hw)
    _show(laid, rgb, subtitle if relative is not None else f"{subtitle}: {problem}".lstrip(": "))
    if relative is not None:
        _colour_bar(figure, laid, signed, options)
    figure.suptitle(title, fontsize=12)
    return figure


def write_overlay(
    path: str | Path,
    *,
    image_HW: NDArray[np.floating],
    map_hw: NDArray[np.floating],
    title: str,
    subtitle: str = "",
    signed: bool | None = None,
    mask_HW: NDArray[np.bool_] | None = None,
    options: OverlayOptions | None = None,
    dots_per_inch: int = 200,
) -> Path:
    """Write `overlay_figure` to a `.png`, `.pdf` or `.svg` file, folders made as needed; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = overlay_figure(
        image_HW, map_hw, title=title, subtitle=subtitle, signed=signed, mask_HW=mask_HW, options=options
    )
    figure.savefig(path, dpi=dots_per_inch)
    return path


def grey_image(image_CHW: NDArray[np.floating], mean: Sequence[float], std: Sequence[float]) -> NDArray[np.float64]:
    """The model's normalised input (C,H,W) back as grey (H,W) in [0, 1]: mean over channels."""
    channels = np.asarray(image_CHW, np.float64)
    scale, shift = (np.broadcast_to(np.asarray(v, np.float64), len(channels))[:, None, None] for v in (std, mean))
    grey: NDArray[np.float64] = np.clip((channels * scale + shift).mean(0), 0, 1)
    return grey


def _show(axes: Axes, rgb_HW3: NDArray[np.uint8], caption: str) -> None:
    axes.imshow(rgb_HW3, interpolation="antialiased")
    axes.set_axis_off()
    axes.set_title(caption, fontsize=9, color="#444444", y=-0.02, va="top")


def _colour_bar(figure: Figure, axes: Axes, signed: bool, options: OverlayOptions) -> None:
    low = -1.0 if signed else 0.0
    shown = LinearSegmentedColormap.from_list("key", key_colours(signed, 256, options))
    mappable = ScalarMappable(Normalize(low, 1.0), shown)
    bar = figure.colorbar(mappable, ax=axes, fraction=0.05, pad=0.03)
    bar.set_ticks([-1, 0, 1] if signed else [0, 0.5, 1])
    bar.set_ticklabels(["against", "0", "for"] if signed else ["0", "½", "max"])
    bar.ax.tick_params(labelsize=8)
    bar.set_label("relevance for the class, of the map's own maximum", fontsize=8)
    bar.outline.set_linewidth(0.5)
