"""A function in, the most memory it held at once out, in bytes above what was held before.

On a GPU PyTorch's own count. On a CPU the kernel's high-water mark of resident memory (Linux: it can be reset for one's
own process), which also sees NumPy, scratch space of matrix products and whatever else a library allocates.
"""

import ctypes
import gc
from pathlib import Path

import torch

from xaibatch.benchmark.timing import Work

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_HIGH_WATER = "5"


def peak_bytes(work: Work, device: str) -> int | None:
    """Run once and measure; None where the system offers no way. Call the work once before: a first call also
    loads what it needs."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    if not _reset():
        return None
    before = _resident("VmRSS")
    work()
    return max(0, _resident("VmHWM") - before)


def _reset() -> bool:
    """Give freed memory back to the system and lower the high-water mark to what is held now."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _RESET.write_text(_RESET_HIGH_WATER)
    except (OSError, AttributeError, TypeError):
        return False
    return _STATUS.exists()


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")
