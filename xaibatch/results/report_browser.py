"""Every image's facts, scores and maps in, one JSON text out that the report's browser of images reads.

Maps travel as their token grids in one byte a value (a map is drawn relative to its own maximum, in steps of 1/255),
pixels as small grey WebP pictures; the page itself lays one over the other. Scores travel as one row of four-byte
numbers an explainer and metric. So the scores of a hundred thousand images, and the maps and pixels of some hundreds,
stay within what a browser opens at once.

Shape letters: M metrics, I images.
"""

import base64
import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from xaibatch.results.overlay import OverlayOptions, colour_map, strength
from xaibatch.results.report_figure import Material, data_url, thumbnail
from xaibatch.results.report_images import StoredMap


def browser_json(
    material: Material,
    with_maps: Sequence[str],
    with_pixels: Sequence[str],
    *,
    side: int = 160,
    floor: str | None = None,
) -> str:
    """The browser's data: every image with its scores, maps and thumbnails (at most `side` pixels) of those named,
    where they are at hand."""
    cube = material.cube
    classes = sorted({name for names_I in (cube.labels_I, cube.predicted_I) for name in names_I if name is not None})
    place = {name: number for number, name in enumerate(classes)}
    maps_of, pixels_of = set(with_maps), set(with_pixels)
    images: list[list[object]] = []
    maps, pixels = {}, {}
    for number, image_id in enumerate(cube.image_ids):
        p = material.probabilities.get(image_id)
        label, predicted = place.get(cube.labels_I[number]), place.get(cube.predicted_I[number])
        images.append([image_id, label, predicted, None if p is None else round(p, 4)])
        if image_id in maps_of:
            maps[number] = [_packed(material.maps.get((image_id, e)), material.signed[e]) for e in cube.explainers]
        if image_id in pixels_of and image_id in material.pictures:
            small_HW = thumbnail(material.pictures[image_id].grey_HW, side)
            pixels[number] = data_url(_three(small_HW), quality=72)
    options = OverlayOptions()
    content = {
        "explainers": [
            {
                "title": material.titles[e],
                "signed": material.signed[e],
                "nearest": material.upsampling[e] == "nearest",
                "floor": e == floor,
            }
            for e in cube.explainers
        ],
        "metrics": [
            {"title": m.title, "arrow": m.arrow, "sign": m.sign, "digits": material.digits[m.label]}
            for m in cube.metrics
        ],
        "colours": {"positive": _colours(False, options), "signed": _colours(True, options)},
        "opacity": {"max": options.max_opacity, "power": options.opacity_power},
        "classes": classes,
        "images": images,
        "scores": [[_floats(scores_I) for scores_I in scores_MI] for scores_MI in cube.image_means()],
        "maps": maps,
        "pixels": pixels,
    }
    return script_json(content)


def script_json(content: object) -> str:
    """JSON that may stand inside a `<script>` element whatever its strings hold.

    >>> script_json({"a": "</script><!--"})
    '{"a":"\\\\u003c/script\\\\u003e\\\\u003c!--"}'
    """
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _packed(stored: StoredMap | None, signed: bool) -> list[object] | None:
    """[rows, columns, base64 of one byte a value]; 0 to 255 for 0 to 1, or 1 to 255 for -1 to 1; None without a map to
    show."""
    if stored is None:
        return None
    relative, problem = strength(stored.grid_hw)
    if relative is None or problem:
        return None
    levels = np.round(128 + 127 * relative) if signed else np.round(255 * np.maximum(relative, 0))
    rows, columns = relative.shape
    return [rows, columns, base64.b64encode(levels.astype(np.uint8).tobytes()).decode()]


def _colours(signed: bool, options: OverlayOptions) -> str:
    """256 colours as base64 RGB bytes, over [-1, 1] or [0, 1]."""
    rgb = colour_map(signed, options)(np.linspace(0, 1, 256))[:, :3]
    return base64.b64encode(np.round(255 * rgb).astype(np.uint8).tobytes()).decode()


def _floats(scores_I: NDArray[np.float64]) -> str:
    """Base64 of little-endian float32, NaN where an image is not scored: seven digits are more than a screen shows."""
    return base64.b64encode(scores_I.astype("<f4").tobytes()).decode()


def _three(grey_HW: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(grey_HW[..., None], 3, axis=-1)
