"""Every image's facts, scores and maps in, one JSON text out that the report's browser of images reads.

Maps travel as their token grids in one byte a value (a map is drawn relative to its own maximum, in steps of 1/255),
pixels as small grey WebP pictures; the page itself lays one over the other. So a thousand images with ten maps each
stay below a few megabytes.
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
    material: Material, image_ids: Sequence[str], pixel_ids: Sequence[str], *, side: int = 160, floor: str | None = None
) -> str:
    """The browser's data. `pixel_ids` get a thumbnail of at most `side` pixels, where their pixels are at hand."""
    cube = material.cube
    means_EMI = cube.image_means()
    place = {image_id: row for row, image_id in enumerate(cube.image_ids)}
    with_pixels = {i for i in pixel_ids if i in material.pictures}
    images = []
    for image_id in image_ids:
        row = place[image_id]
        p = material.probabilities.get(image_id)
        images.append(
            {
                "id": image_id,
                "label": cube.labels_I[row],
                "predicted": cube.predicted_I[row],
                "p": None if p is None else round(p, 4),
                "scores": [[_rounded(v) for v in means_EMI[e, :, row]] for e in range(len(cube.explainers))],
                "maps": [_packed(material.maps.get((image_id, e)), material.signed[e]) for e in cube.explainers],
                "pixels": data_url(_three(thumbnail(material.pictures[image_id].grey_HW, side)), quality=72)
                if image_id in with_pixels
                else None,
            }
        )
    options = OverlayOptions()
    content = {
        "explainers": [
            {"title": material.titles[e], "signed": material.signed[e], "floor": e == floor} for e in cube.explainers
        ],
        "metrics": [{"title": m.title, "arrow": m.arrow, "sign": m.sign} for m in cube.metrics],
        "colours": {"positive": _colours(False, options), "signed": _colours(True, options)},
        "opacity": {"max": options.max_opacity, "power": options.opacity_power},
        "images": images,
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


def _rounded(value: float) -> float | None:
    """Six significant digits are more than a screen shows."""
    return float(f"{value:.6g}") if np.isfinite(value) else None


def _three(grey_HW: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(grey_HW[..., None], 3, axis=-1)
