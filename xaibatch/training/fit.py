"""Options and one worker's place come in; epochs are trained, evaluated and saved; no Ray here.

Shape letters: B images of a batch on this worker, N images of a split, K classes.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from xaibatch.data.dataset import open_dataset
from xaibatch.seeding import keyed_generator
from xaibatch.training.augment import augmented, centre_crop
from xaibatch.training.images import ImageStore
from xaibatch.training.metrics import describe
from xaibatch.training.model import Averaged, starting_model, with_kept_patches
from xaibatch.training.options import TrainOptions
from xaibatch.training.schedule import warmup_cosine
from xaibatch.training.splits import Splits, class_weights, splits_of
from xaibatch.training.state import RunState

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this worker stands among the workers, and on which device."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"


LOG_NAME = "train.log"


def fit(options: TrainOptions, place: Place, *, report: Report, say: Callable[[str], None] | None = None) -> None:
    """Train until the epochs, the clock or the patience run out; leave everything in `options.output`.

    report: called on every worker after each epoch with a flat record of numbers. say: gets the lines of `train.log`
    too (rank 0). Every epoch ends with a state on disk from which the same call goes on. With `place.world` > 1,
    torch.distributed must be initialised.
    """

    def write(line: str) -> None:
        if place.rank == 0:
            with (Path(options.output) / LOG_NAME).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            if say:
                say(line)

    Run(options, place, report, write).to_the_end()


class Run:
    """One worker's run: data, model, optimiser and the counters that a resume brings back."""

    def __init__(self, options: TrainOptions, place: Place, report: Report, say: Callable[[str], None]) -> None:
        self.options, self.place, self._report, self._say = options, place, report, say
        self.state = RunState(Path(options.output), options)
        self.splits = splits_of(open_dataset(options.data, layout=options.layout))
        self.train, self.val, self.test = (self._store(name) for name in ("train", "val", "test"))
        self.mean, self.std = self.train.mean_and_std()
        model, start_note = starting_model(options, self.splits.class_names)
        self.model = model.to(place.device)
        self.averaged = Averaged(self.model, options.average_decay)
        self.optimiser = _optimiser(self.model, options)
        self.precision = _precision(options, place.device)
        self.scaler = torch.amp.GradScaler(enabled=self.precision == torch.float16)
        self._parallel = self._wrapped()
        weights = class_weights(self.train.labels_N, len(self.splits.class_names))
        self._class_weights = torch.tensor(weights, dtype=torch.float32, device=place.device)
        if options.class_weights == "none":
            self._class_weights.fill_(1)
        self._seconds_before = 0.0
        self._started = time.monotonic()
        say(_introduction(self.splits, options, start_note, self.precision))

    def to_the_end(self) -> None:
        first = self._resume()
        self._started = time.monotonic()
        for epoch in range(first, self.options.epochs + 1):
            if self.state.is_over(self.options, self._elapsed()):
                break
            loss, num_images, seconds = self._train_epoch(epoch)
            val = self.evaluate(self.val)
            better = self.state.add(
                {"epoch": epoch, "train_loss": loss, "val": val, "seconds": round(self._elapsed(), 1)}
            )
            if self.place.rank == 0:
                self.state.save(
                    self.options, self.model, self.averaged, self.optimiser, self.scaler, self.splits.class_names,
                    self.preprocessing(), better=better,
                )  # fmt: skip
            self._say(_line(epoch, self.options, loss, val, better, num_images / max(seconds, 1e-9), self._elapsed()))
            self._report(_flat(epoch, loss, val))
        self._finish()

    def evaluate(self, store: ImageStore) -> dict[str, Any]:
        """Metrics of the averaged weights on a split, shared among the workers."""
        net = self.averaged.model.eval()
        mine = list(range(len(store)))[self.place.rank :: self.place.world]
        probabilities = np.zeros((len(store), len(self.splits.class_names)))
        size = self.options.image_size
        with torch.inference_mode(), self._autocast():
            for start in range(0, len(mine), 64):
                part = mine[start : start + 64]
                logits = net(self._input(centre_crop(store.images(part), size)))
                probabilities[part] = logits.float().softmax(1).cpu().numpy()
        if self.place.world > 1:
            together = torch.from_numpy(probabilities).to(self.place.device)
            distributed.all_reduce(together)
            probabilities = together.cpu().numpy()
        return describe(probabilities, store.labels_N, self.splits.class_names)

    def preprocessing(self) -> Any:
        from xaibatch.data.preprocess import Preprocessing

        size = self.options.image_size
        return Preprocessing(
            image_size=(size, size),
            resize_short=self.options.resize_short,
            mean=(self.mean,),
            std=(self.std,),
            grey=True,
        )

    def _train_epoch(self, epoch: int) -> tuple[float, int, float]:
        options, begun = self.options, time.monotonic()
        self._parallel.train()
        total, count = torch.zeros(()), 0
        steps = list(self._batches(epoch))
        for number, positions in enumerate(steps):
            progress = self._progress(epoch - 1 + number / len(steps))
            warmup = options.warmup_epochs / options.epochs
            for group in self.optimiser.param_groups:
                group["lr"] = options.learning_rate * warmup_cosine(progress, warmup, options.final_rate)
            ids = [self.train.ids[position] for position in positions]
            images = augmented(
                self.train.images(positions), ids, options.augmentation,
                size=options.image_size, seed=options.seed, epoch=epoch,
            )  # fmt: skip
            labels = self.train.labels(positions).to(self.place.device)
            first, last = options.kept_share
            draws = keyed_generator(options.seed, f"rank-{self.place.rank}", "train.step", epoch, number)
            with self._autocast(), _seeded(int(draws.integers(2**62)), self.place.device):
                with with_kept_patches(self.model, first + (last - first) * progress):
                    logits = self._parallel(self._input(images)).float()
                # Weights average 1 over the set; torch divides by their sum in each batch, which would undo them there.
                losses = functional.cross_entropy(
                    logits, labels, label_smoothing=options.label_smoothing, reduction="none"
                )
                loss = (self._class_weights[labels] * losses).mean()
            self.optimiser.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            self.scaler.unscale_(self.optimiser)
            nn.utils.clip_grad_norm_(self.model.parameters(), options.clip_norm)
            self.scaler.step(self.optimiser)
            self.scaler.update()
            self.averaged.update(self.model)
            total += loss.detach().cpu() * len(positions)
            count += len(positions)
        sums = torch.tensor([total.item(), float(count)], device=self.place.device)
        if self.place.world > 1:
            distributed.all_reduce(sums)
        return sums[0].item() / max(sums[1].item(), 1), int(sums[1].item()), time.monotonic() - begun

    def _batches(self, epoch: int) -> Iterator[list[int]]:
        """This worker's positions of each step; the last, incomplete step of an epoch is left out."""
        options = self.options
        order = keyed_generator(options.seed, "order", "train.order", epoch).permutation(len(self.train))
        size = min(options.batch_size, len(order) // self.place.world * self.place.world)
        for start in range(0, len(order) - size + 1, size):
            yield [int(k) for k in order[start + self.place.rank : start + size : self.place.world]]

    def _progress(self, epochs_done: float) -> float:
        share = epochs_done / self.options.epochs
        if self.options.max_minutes is not None:
            share = max(share, self._elapsed() / (60 * self.options.max_minutes))
        return min(1.0, self._agreed(share))

    def _agreed(self, value: float) -> float:
        """Rank 0's value on every worker: clocks differ."""
        if self.place.world == 1 or self.options.max_minutes is None:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.place.device)
        distributed.broadcast(shared, 0)
        return float(shared.item())

    def _elapsed(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def _resume(self) -> int:
        stored = self.state.load(self.options)
        if stored is None:
            return 1
        self.model.load_state_dict(stored["model"])
        self.averaged.model.load_state_dict(stored["averaged"])
        self.averaged.num_updates = stored["num_updates"]
        self.optimiser.load_state_dict(stored["optimiser"])
        self.scaler.load_state_dict(stored["scaler"])
        self._seconds_before = self.state.history[-1]["seconds"]
        self._say(f"resuming after epoch {len(self.state.history)} of {self.options.epochs}")
        return len(self.state.history) + 1

    def _finish(self) -> None:
        """Evaluate the best weights on val and test, write metrics and the picture."""
        if self.place.world > 1:
            distributed.barrier()
        self.state.load_best(self.averaged.model)
        results = {"val": self.evaluate(self.val)}
        if len(self.test):
            results["test"] = self.evaluate(self.test)
        if self.place.rank == 0:
            best = self.state.write_results(results)
            for name, numbers in results.items():
                self._say(_table(name, numbers, best))
            self._say(f"model: {self.state.model_path}   learning curve: {self.state.curve_path}")

    def _store(self, name: str) -> ImageStore:
        records = getattr(self.splits, name)
        share = len(records) / max(1, sum(len(getattr(self.splits, n)) for n in ("train", "val", "test")))
        cache = int(self.options.cache_mib * 2**20 * share)
        return ImageStore(records, self.splits.class_names, side=self.options.resize_short, cache_bytes=cache)

    def _input(self, images_B1HW: Tensor) -> Tensor:
        normalised = (images_B1HW.to(self.place.device, non_blocking=True) - self.mean) / self.std
        return normalised.expand(-1, 3, -1, -1)

    def _wrapped(self) -> nn.Module:
        if self.place.world == 1:
            return self.model
        devices = [self.place.device] if self.place.device != "cpu" else None
        return nn.parallel.DistributedDataParallel(self.model, device_ids=devices)

    def _autocast(self) -> Any:
        if self.precision == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(torch.device(self.place.device).type, self.precision)


@contextlib.contextmanager
def _seeded(seed: int, device: str) -> Iterator[None]:
    """Drop path and dropout draw from torch's global generator: seed it for one step, then put it back."""
    devices = [torch.device(device)] if device != "cpu" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _optimiser(model: nn.Module, options: TrainOptions) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) without decay of biases, norms, tokens and position embeddings."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_plain = parameter.ndim < 2 or name.endswith(("pos_embed", "cls_token", "reg_token"))
        (plain if is_plain else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.learning_rate)


def _precision(options: TrainOptions, device: str) -> torch.dtype:
    if options.precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[options.precision]
    if device != "cpu":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def _introduction(splits: Splits, options: TrainOptions, start: str, precision: torch.dtype) -> str:
    counts = ", ".join(f"{name} {len(getattr(splits, name))}" for name in ("train", "val", "test"))
    return "\n".join(
        [
            f"{options.model}, {start}; {counts} images; classes {', '.join(splits.class_names)}; "
            f"{str(precision).removeprefix('torch.')}",
            *splits.notes,
        ]
    )


def _line(
    epoch: int, options: TrainOptions, loss: float, val: dict[str, Any], better: bool, rate: float, seconds: float
) -> str:
    recalls = " ".join(f"{name} {100 * (row['recall'] or 0):.0f}%" for name, row in val["per_class"].items())
    return (
        f"epoch {epoch:3d}/{options.epochs}  loss {loss:.3f}  val: balanced {100 * val['balanced_accuracy']:.1f}%"
        f"{' *' if better else '  '} accuracy {100 * val['accuracy']:.1f}%  nll {val['nll']:.3f}  ({recalls})  "
        f"{rate:.0f} images/s  {seconds / 60:.1f} min"
    )


def _flat(epoch: int, loss: float, val: dict[str, Any]) -> dict[str, Any]:
    names = ("balanced_accuracy", "accuracy", "auroc", "ece", "nll")
    return {"epoch": epoch, "train_loss": loss, **{f"val_{name}": val[name] for name in names}}


def _table(split: str, numbers: dict[str, Any], best_epoch: int) -> str:
    def text(value: float | None) -> str:
        return "    -" if value is None or math.isnan(value) else f"{value:5.3f}"

    head = (
        f"{split} (weights of epoch {best_epoch}, {numbers['num_images']} images): "
        f"accuracy {text(numbers['accuracy'])}, balanced accuracy {text(numbers['balanced_accuracy'])}, "
        f"AUROC {text(numbers['auroc'])}, calibration error {text(numbers['ece'])}"
    )
    width = max(len(name) for name in numbers["per_class"])
    rows = [
        f"  {name:{width}}  recall {text(row['recall'])}  precision {text(row['precision'])}"
        f"  AUROC {text(row['auroc'])}"
        f"  predicted as {json.dumps(dict(zip(numbers['per_class'], confused, strict=True)), ensure_ascii=False)}"
        for (name, row), confused in zip(numbers["per_class"].items(), numbers["confusion"], strict=True)
    ]
    return "\n".join([head, *rows])
