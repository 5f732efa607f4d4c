"""Small image files for the tests of `xaibatch.data`: encoded, in a folder of two classes, damaged."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from xaibatch.data.dataset import DataSet
from xaibatch.data.preprocess import Preprocessing
from xaibatch.types import ImageRecord

SMALL = Preprocessing(image_size=(16, 16), resize_short=16, mean=(0.5,), std=(0.25,))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def write_grey(path: Path, seed: int = 0, size: tuple[int, int] = (16, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    Image.fromarray(values).save(path)
    return path


def image_folder(root: Path) -> Path:
    """Two images of class `a` and two of class `b`, one of these a folder deeper."""
    for index, name in enumerate(["b/1.png", "b/deep/2.png", "a/3.png", "a/1.jpg"]):
        write_grey(root / name, index)
    return root


def records_of(dataset: DataSet) -> dict[str, ImageRecord]:
    return {record.image_id: record for record in dataset.records}


def count_labels(dataset: DataSet) -> dict[str | None, int]:
    labels = [record.label for record in dataset.records]
    return {label: labels.count(label) for label in set(labels)}


def grey_image(mode: str = "L") -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (12, 10), np.uint8)).convert(mode)


def bad_files() -> dict[str, tuple[bytes, str]]:
    png = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)))
    header = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 1, 0, 0, 0, 0)
    bomb = png[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + png[33:]
    return {
        "zero bytes": (b"", "empty"),
        "text": (b"not an image, just words " * 20, "not an image that can be read"),
        "truncated": (png[: len(png) // 2], "truncated or damaged"),
        "header only": (png[:20], "not an image|header is damaged|truncated"),
        "one pixel": (encoded(Image.new("L", (1, 1))), "1x1 pixels; each side needs at least 8"),
        "narrow": (encoded(Image.new("L", (500, 3))), "500x3 pixels"),
        "bomb": (bomb, "more pixels than Pillow opens|more than the limit"),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n", "not an image that can be read"),
        "float": (encoded(Image.fromarray(np.full((9, 9), np.nan, np.float32)), "TIFF"), "not finite"),
        "32 bit": (encoded(Image.fromarray(np.full((9, 9), 1 << 20, np.int32)), "TIFF"), "32-bit values"),
    }
