"""The engine's settings in, the device to compute on out; an error in, whether the device is past use or the image at
fault out."""

from typing import Final

import torch

from xaibatch.config import EngineConfig
from xaibatch.errors import EngineError, StoppedError
from xaibatch.perturb.runner import is_out_of_memory

_LOST_SIGNS: Final = (
    "CUDA error",
    "CUDA driver error",
    "HIP error",
    "No CUDA GPUs are available",
    "CUDNN_STATUS_EXECUTION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR",
)


def device_here(engine: EngineConfig) -> str:
    """The device of a process that has the machine to itself: `auto` is CUDA where PyTorch finds it. EngineError where
    CUDA is asked for and not there."""
    if engine.device == "cpu" or (engine.device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise EngineError(
            "engine.device is 'cuda' but PyTorch finds no CUDA device here: mend the driver, install PyTorch with "
            "CUDA, or compute on the CPU with --set engine.device=cpu"
        )
    return "cuda"


def is_device_lost(error: BaseException) -> bool:
    """Whether the device reports an error that outlives the call, until its process ends (out of memory does not)."""
    if is_out_of_memory(error) or not isinstance(error, RuntimeError):
        return False
    lost = getattr(torch, "AcceleratorError", ())
    return isinstance(error, lost) or any(sign in str(error) for sign in _LOST_SIGNS)


def is_no_fault_of_the_image(error: BaseException) -> bool:
    """Whether an error in the middle of an image's work says nothing about that image."""
    return isinstance(error, StoppedError) or is_out_of_memory(error) or is_device_lost(error)
