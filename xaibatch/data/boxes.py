"""Bounding boxes as masks: `box:WxH:x,y,w,h;x,y,w,h` in, a bool mask out.

Such a text stands where a mask's path would (`ImageRecord.masks`, a mask column of a manifest). W and H are the width
and height in pixels of the image in which the boxes were drawn; x and y are a box's left and top edge, w and h its
width and height, all in that image's pixels (fractions allowed). They are scaled to the size at which the image is
stored.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from xaibatch.errors import ImageError

PREFIX = "box:"

Box = tuple[float, float, float, float]
"""Left, top, width, height in pixels."""


def is_boxes(mask: str) -> bool:
    """True where a mask is given by boxes, not by a path."""
    return mask.startswith(PREFIX)


def boxes_text(width: int, height: int, boxes: Iterable[Box]) -> str:
    """Write boxes drawn in an image of `width` x `height` pixels as a mask's text.

    >>> boxes_text(1024, 1024, [(10, 20, 30.5, 40)])
    'box:1024x1024:10,20,30.5,40'
    """
    return f"{PREFIX}{width}x{height}:" + ";".join(",".join(f"{value:.10g}" for value in box) for box in boxes)


def boxes_mask(text: str, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the union of the boxes as bool (H,W) for an image stored at `size` (height, width).

    A pixel is inside where its centre is. Raises ImageError for a text of another form and for a box of no area.

    >>> boxes_mask("box:8x4:2,1,3,2", (4, 8)).astype(int).tolist()[1]
    [0, 0, 1, 1, 1, 0, 0, 0]
    """
    try:
        space, _, listed = text.removeprefix(PREFIX).partition(":")
        width, height = (float(side) for side in space.split("x"))
        boxes = [tuple(float(value) for value in item.split(",")) for item in listed.split(";")]
        well_formed = width > 0 and height > 0 and all(len(box) == 4 and min(box[2:]) > 0 for box in boxes)
    except ValueError:
        well_formed = False
    if not well_formed:
        raise ImageError(f"not a list of boxes: {text!r}; expected 'box:WxH:x,y,w,h;x,y,w,h' with positive sides")
    rows = (np.arange(size[0])[:, None] + 0.5) * height / size[0]
    columns = (np.arange(size[1])[None, :] + 0.5) * width / size[1]
    mask_HW = np.zeros(size, np.bool_)
    for left, top, box_width, box_height in boxes:
        mask_HW |= (rows >= top) & (rows < top + box_height) & (columns >= left) & (columns < left + box_width)
    return mask_HW
