"""Images and (row, plan) requests in, one array of logits per request out: copies of many plans packed into full
batches.

Shape letters: B images, C channels, H W pixels, S samples of a plan, K classes, N rows of one batch.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import xaibatch.perturb.expand_imputation  # noqa: F401  registers its plan kinds
from xaibatch.errors import XaibatchError
from xaibatch.perturb.expand import Expander, prepare
from xaibatch.perturb.plans import PerturbationPlan

_OUT_OF_MEMORY_SIGNS = ("out of memory", "DefaultCPUAllocator: can't allocate", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device or the host has no memory left (a smaller batch may help)."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY_SIGNS)


class PlanRunner:
    """Runs plain batches and perturbation plans through one model, `batch_size` images at a time.

    model:      images_BCHW -> logits_BK, in eval mode, on the images' device and (without autocast) in their dtype.
    batch_size: images per forward pass at most; halved for good whenever memory runs out.
    autocast:   run the forward passes under torch.autocast with this dtype; None leaves the model's own precision.

    How copies are packed depends on the requests and the batch size only, so a retry gives bit-identical results.
    `num_forward_passes` counts the images that went through the model. `before_batch` is called before each batch; what
    it raises ends the run.
    """

    def __init__(self, *, model: nn.Module, batch_size: int, autocast: torch.dtype | None = None) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, received {batch_size}")
        self.model = model
        self.batch_size = batch_size
        self.autocast = autocast
        self.num_forward_passes = 0
        self.before_batch: Callable[[], None] = lambda: None

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the logits (B,K) of plain images, on their device: float64 for float64 images, else float32."""
        return self._run(len(images_BCHW), lambda start, stop: images_BCHW[start:stop], images_BCHW)

    def run(self, images_BCHW: Tensor, requests: Sequence[tuple[int, PerturbationPlan]]) -> list[NDArray[np.floating]]:
        """Return one logits array (S,K) per (row of the batch, plan), in the requests' order.

        The copies of all requests are taken in order and cut into batches of exactly `batch_size`; only the last is
        smaller. Logits are float64 for float64 images, else float32.
        """
        ends = list(accumulate(plan.num_samples for _, plan in requests))
        packer = _Packer(images_BCHW, requests, ends)
        logits = self._run(ends[-1] if ends else 0, packer.copies, images_BCHW).cpu().numpy()
        return [logits[end - plan.num_samples : end] for (_, plan), end in zip(requests, ends, strict=True)]

    def _run(self, total: int, copies: Callable[[int, int], Tensor], like: Tensor) -> Tensor:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        outputs: list[Tensor] = []
        position = 0
        while position < total:
            stop = min(position + self.batch_size, total)
            self.before_batch()
            logits_NK = self._attempt(copies, position, stop, like.device)
            if logits_NK is None:
                self._shrink(like.device)
                continue
            outputs.append(logits_NK.to(dtype))
            self.num_forward_passes += stop - position
            position = stop
        return torch.cat(outputs) if outputs else torch.empty((0, 0), dtype=dtype)

    def _attempt(
        self, copies: Callable[[int, int], Tensor], start: int, stop: int, device: torch.device
    ) -> Tensor | None:
        """The logits of one batch, or None if it did not fit (everything it had allocated is released on return)."""
        try:
            with torch.inference_mode(), self._precision(device):
                logits_NK: Tensor = self.model(copies(start, stop))
                return logits_NK
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _precision(self, device: torch.device) -> AbstractContextManager[None]:
        return nullcontext() if self.autocast is None else torch.autocast(device.type, dtype=self.autocast)

    def _shrink(self, device: torch.device) -> None:
        if self.batch_size == 1:
            raise XaibatchError(
                f"out of memory on {device} with a single image in the batch: use a smaller model or image size, "
                "or free memory that other processes hold"
            )
        self.batch_size //= 2
        if device.type == "cuda":
            torch.cuda.empty_cache()


class _Packer:
    """Cuts the concatenated copies of all requests into ranges; keeps what was prepared for plans that a range cut."""

    def __init__(
        self, images_BCHW: Tensor, requests: Sequence[tuple[int, PerturbationPlan]], ends: Sequence[int]
    ) -> None:
        self._images_BCHW = images_BCHW
        self._requests = requests
        self._ends = ends
        self._first = 0
        self._prepared: dict[int, Expander] = {}

    def copies(self, start: int, stop: int) -> Tensor:
        """The copies start..stop-1, counted over all requests. `start` never decreases from call to call."""
        while self._ends[self._first] <= start:
            self._prepared.pop(self._first, None)
            self._first += 1
        pieces: list[Tensor] = []
        request = self._first
        while start < stop:
            row, plan = self._requests[request]
            offset = self._ends[request] - plan.num_samples
            piece_stop = min(stop, self._ends[request])
            if piece_stop > start:
                if request not in self._prepared:
                    self._prepared[request] = prepare(plan, self._images_BCHW[row])
                pieces.append(self._prepared[request](start - offset, piece_stop - offset))
                start = piece_stop
            request += 1
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
