"""Training options come in; `fit` runs in this process on its best device, without Ray."""

import torch

from xaibatch.errors import UsageError
from xaibatch.training.fit import Place, fit
from xaibatch.training.options import TrainOptions


def train_alone(options: TrainOptions) -> None:
    """Train and print progress. Raises UsageError for more than one worker, which takes Ray Train."""
    if options.num_workers > 1:
        raise UsageError(f"num_workers is {options.num_workers}: more than one process needs Ray (leave out --no-ray)")
    use_gpu = torch.cuda.is_available() if options.use_gpu is None else options.use_gpu
    before = torch.get_num_threads()
    torch.set_num_threads(options.cpus_per_worker)
    try:
        place = Place(device="cuda:0" if use_gpu else "cpu")
        fit(options, place, report=lambda _: None, say=lambda line: print(line, flush=True))
    finally:
        torch.set_num_threads(before)
