"""A film and a random generator come in; leads, side markers, collimation and shortcut cues go on it.

Shape letters: H W film pixels.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from xaibatch.simulate.options import MarkOptions

_WHITE, _BLACK = 250.0, 6.0
_GLYPHS = {
    "L": ("1000", "1000", "1000", "1000", "1111"),
    "R": ("1110", "1001", "1110", "1010", "1001"),
    "P": ("111111", "100001", "101111", "101011", "101111", "101001", "101001", "100001", "111111"),
}


def leads(size: int, options: MarkOptions, rng: np.random.Generator) -> NDArray[np.float32]:
    """Attenuation (H,W) of ECG leads with their electrodes: cubic curves that enter from above or below."""
    cover = np.zeros((size, size), np.float32)
    if rng.random() < options.lead_probability:
        rows, columns = np.ogrid[:size, :size]
        t = np.linspace(0, 1, 4 * size)[:, None]
        for _ in range(rng.integers(1, 4)):
            knots = rng.uniform(0.05, 0.95, (4, 2))
            knots[0, 1] = rng.choice([-0.1, 1.1])
            weights = np.concatenate([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3], 1)
            path = (weights @ knots * size).astype(int)
            path = path[((path >= 0) & (path < size)).all(1)]
            cover[path[:, 0], path[:, 1]] = rng.uniform(0.5, 0.9)
            end = knots[3] * size
            cover[(rows - end[0]) ** 2 + (columns - end[1]) ** 2 < (0.014 * size) ** 2] = 1.2
    return np.asarray(ndimage.gaussian_filter(cover, 0.6), np.float32)


class Marks:
    """Side marker and collimation of one film, drawn once so that an image and its twin get the same."""

    def __init__(self, size: int, options: MarkOptions, rng: np.random.Generator) -> None:
        self.size = size
        self.letter = str(rng.choice(["L", "R"])) if rng.random() < options.side_marker_probability else ""
        self.scale = int(rng.integers(3, 5))
        self.row, self.column = int(rng.integers(8, size // 6)), int(rng.integers(6, 22))
        self.border = int(rng.integers(3, 9)) if rng.random() < options.collimation_probability else 0

    def put(self, film_HW: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return a copy of the film (H,W), grey in [0, 255], with the marks on it."""
        out = film_HW.copy()
        if self.letter:
            glyph = _glyph(self.letter, self.scale)
            column = self.column if self.letter == "R" else self.size - self.column - glyph.shape[1]
            out = np.where(_placed(glyph, self.size, self.row, column), _WHITE, out)
        if self.border:
            out[: self.border] = out[-self.border :] = _BLACK
        return out


def shortcut_marker(size: int) -> NDArray[np.bool_]:
    """Pixels (H,W) of the boxed P that stands in the lower right corner of the film when a shortcut is on."""
    glyph = _glyph("P", max(2, size // 75))
    margin = size // 18
    return _placed(glyph, size, size - margin - glyph.shape[0], size - margin - glyph.shape[1])


def with_marker(film_HW: NDArray[np.float64], marker_HW: NDArray[np.bool_]) -> NDArray[np.float64]:
    return np.where(marker_HW, _WHITE, film_HW)


def brightened(film_HW: NDArray[np.float64], levels: float) -> NDArray[np.float64]:
    """Raise mid-tones by `levels` grey levels, black and white by none: another exposure of the same film."""
    share = film_HW / _WHITE
    return np.asarray((film_HW + levels * 4 * share * (1 - share)).clip(0, _WHITE))


def _glyph(name: str, scale: int) -> NDArray[np.bool_]:
    cells = np.array([[int(cell) for cell in row] for row in _GLYPHS[name]])
    return np.kron(cells, np.ones((scale, scale))) > 0


def _placed(glyph: NDArray[np.bool_], size: int, row: int, column: int) -> NDArray[np.bool_]:
    out = np.zeros((size, size), np.bool_)
    out[row : row + glyph.shape[0], column : column + glyph.shape[1]] = glyph
    return out
