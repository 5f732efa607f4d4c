"""Keyed random numbers: a generator for (run seed, image id, purpose, repeat, ...), equal on every worker."""

import hashlib
from dataclasses import dataclass, replace

import numpy as np


def keyed_generator(seed: int, image_id: str, purpose: str, repeat: int = 0, *extra: int | str) -> np.random.Generator:
    """Return NumPy's Philox generator keyed by a hash of all arguments (DESIGN rule 4).

    Two calls with equal arguments give identical draws in any process; a change of any argument gives an independent
    stream (SHA-256 of the length-delimited fields, of which Philox takes 128 bits).

    >>> a, b = (keyed_generator(0, "a.png", "lime").random() for _ in range(2))
    >>> a == b != keyed_generator(0, "a.png", "lime", 1).random()
    True
    """
    fields = (str(int(seed)), image_id, purpose, str(int(repeat)), *map(str, extra))
    digest = hashlib.sha256(b"".join(f"{len(f.encode())}:".encode() + f.encode() for f in fields)).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawKey:
    """The identity that random numbers hang on: one image, one repeat, and which variant of the image.

    `variant` is empty for the image itself; a noisy copy explained with fresh draws carries its name (rule 8).
    """

    seed: int
    image_id: str
    repeat: int = 0
    variant: str = ""

    def generator(self, purpose: str) -> np.random.Generator:
        """The generator for one purpose (`lime`, `faithfulness_correlation`, ...) of this image and repeat."""
        return keyed_generator(self.seed, self.image_id, purpose, self.repeat, self.variant)

    def of_variant(self, variant: str) -> "DrawKey":
        return replace(self, variant=variant)
