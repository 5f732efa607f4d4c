"""The C library's allocator, told to keep what PyTorch frees for the next step of the same size.

A step's activations are tens of MiB. By default glibc gives such blocks back to the system and gets them again, empty,
a page at a time: a tenth to a third of a step's time on a CPU.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST = 2**31 - 1
_LARGEST_OF_OLD_GLIBC = 32 * 2**20


def keep_freed_memory() -> bool:
    """Let this process keep freed memory up to 2 GiB a block until it ends; False where the C library is not glibc.

    For processes that are the package's own (replicas, jobs): a library must not decide this for its user.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    kept = mallopt(_M_MMAP_THRESHOLD, _LARGEST) or mallopt(_M_MMAP_THRESHOLD, _LARGEST_OF_OLD_GLIBC)
    return bool(kept and mallopt(_M_TRIM_THRESHOLD, _LARGEST))
