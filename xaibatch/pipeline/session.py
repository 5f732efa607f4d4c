"""A model on a device, holding shards: explains images, answers plans and variants. What a replica does, without Ray.

Shape letters: B images of a shard, N images of one call, C channels, H W pixels, h w a map's own sides, K classes, S
samples.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xaibatch.config import method_of
from xaibatch.explainers.base import Explainer, ExplainInput
from xaibatch.explainers.resolve import resolve_explainer
from xaibatch.metrics.base import NoisyVariant, TargetVariant, TwinVariant, WeightsVariant
from xaibatch.models.classifier import Classifier
from xaibatch.models.randomise import randomised_in_turn
from xaibatch.perturb.runner import PlanRunner, is_out_of_memory
from xaibatch.pipeline.device import is_no_fault_of_the_image
from xaibatch.pipeline.facts import model_of
from xaibatch.pipeline.job import Answer, GroupPlan, Job, Question, ShardExplanations
from xaibatch.pipeline.outcome import Explained, Item, explainer_failure, stack
from xaibatch.pipeline.variant_image import changed_image
from xaibatch.seeding import DrawKey
from xaibatch.types import ExplanationBatch, Failure, ImageBatch, Shard

Segments = Mapping[str, Sequence[NDArray[np.int32]]]
"""Superpixels by segmentation name, one int (H,W) per image of a call."""

_SHARDS_HELD = 4
_DEFAULT_BATCH = {"cpu": 16, "cuda": 256}
_DEFAULT_EXPLAIN_BATCH = {"cpu": 8, "cuda": 64}


@dataclass(frozen=True, kw_only=True)
class _Held:
    batch: ImageBatch
    failures: tuple[Failure, ...]
    images_BCHW: Tensor


class Session:
    """Holds the model and the images of the last few shards on one device. Not safe for concurrent calls.

    Raises ChangedWeightsError where the job's checkpoint is no longer the one that its run began with.
    """

    def __init__(self, job: Job, *, device: str = "cpu", model: Classifier | None = None) -> None:
        self.job = job
        self.device = torch.device(device)
        self.dtype = torch.float64 if job.dtype == "float64" else torch.float32
        config = job.config
        model = model or model_of(job)
        self.model = model.to(device=self.device, dtype=self.dtype)
        self.explainers: dict[str, Explainer] = {}
        for label, options in config.explainers.items():
            name, keywords = method_of(label, options)
            self.explainers[label] = resolve_explainer(name)(**keywords)
        self.batch_size = config.engine.batch_size or _DEFAULT_BATCH[self.device.type]
        self.explain_batch_size = config.engine.explain_batch_size or _DEFAULT_EXPLAIN_BATCH[self.device.type]
        self._runners: dict[str, PlanRunner] = {}
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._num_traced = 0
        self._check: Callable[[], None] = _go_on

    # -- what a replica is asked

    def explain(self, shard: Shard, segments: Segments | None = None) -> ShardExplanations:
        """Predict and explain the shard's readable images with every explainer (every repeat of the random ones).

        `segments` holds superpixels that were made beside the model; missing ones are made here.
        """
        held = self.hold(shard)
        batch = held.batch
        failures = list(held.failures)
        logits_BK = self._forward(held.images_BCHW)
        maps: dict[tuple[str, int], ExplanationBatch] = {}
        missing: dict[tuple[str, int, str], str] = {}
        for repeat in range(self.job.config.repeats):
            labels = [label for label in self.explainers if repeat == 0 or label in self.job.random_explainers]
            items = [
                Item(image_CHW=image, key=self.job.key(image_id, repeat), target=self._target(int(batch.labels_B[b])))
                for b, (image_id, image) in enumerate(zip(batch.ids, held.images_BCHW, strict=True))
            ]
            explained = self._explain(items, labels, logits_BK, segments or {})
            for label in labels:
                maps[label, repeat] = stack(label, explained)
                for item, outcome in zip(items, explained, strict=True):
                    if label in outcome.errors:
                        missing[label, repeat, item.key.image_id] = outcome.errors[label]
                        failures.append(explainer_failure(item.key.image_id, label, outcome.errors[label]))
        return ShardExplanations(
            ids=batch.ids,
            labels_B=batch.labels_B,
            patients=batch.patients,
            shape_CHW=tuple(batch.images_BCHW.shape[1:]),
            logits_BK=logits_BK.astype(np.float64),
            maps=maps,
            missing=missing,
            failures=tuple(failures),
        )

    def answer(self, shard: Shard, plan: GroupPlan, label: str, segments: Segments | None = None) -> tuple[Answer, ...]:
        """Answer a metric group's questions, packed in their order into full batches; `label` names whose precision.

        `segments` holds superpixels of the questions' images (variants), one per question, made beside the model.
        """
        if not plan.questions:
            return ()
        if isinstance(plan.questions[0].ask, NoisyVariant | TargetVariant | WeightsVariant | TwinVariant):
            return self._answer_variants(shard, plan.questions, segments or {})
        requests = [(question.row, question.ask) for question in plan.questions]
        logits = self.runner(label).run(self.hold(shard).images_BCHW, requests)  # type: ignore[arg-type]
        return tuple(Answer(logits=logits_SK) for logits_SK in logits)

    def forward(self, images_BCHW: NDArray[np.floating]) -> NDArray[np.floating]:
        """Logits (B,K) of given images: what adapter metrics are answered with."""
        return self._forward(torch.tensor(images_BCHW, dtype=self.dtype, device=self.device))

    def explain_images(
        self, label: str, images_BCHW: NDArray[np.floating], targets_B: Sequence[int], keys: Sequence[DrawKey]
    ) -> list[NDArray[np.floating]]:
        """One explainer's native maps of given images and targets: the answer to an adapter's `explain_func`."""
        images = torch.tensor(images_BCHW, dtype=self.dtype, device=self.device)
        items = [
            Item(image_CHW=image, key=key, target=int(target))
            for image, key, target in zip(images, keys, targets_B, strict=True)
        ]
        explained = self._explain(items, [label], self._forward(images), {})
        for outcome in explained:
            if label in outcome.errors:
                raise RuntimeError(f"explainer {label!r} failed: {outcome.errors[label]}")
        return [outcome.maps[label] for outcome in explained]

    def hold(self, shard: Shard) -> _Held:
        """The shard's images on the device; read again by the shard's records where they are no longer held."""
        if shard.name not in self._held:
            self.keep(shard, *self.job.read(shard))
        self._held.move_to_end(shard.name)
        return self._held[shard.name]

    def keep(self, shard: Shard, batch: ImageBatch, failures: tuple[Failure, ...]) -> None:
        """Hold a shard's images that were read beside the model; the oldest shard held goes, and all others where the
        device has no room beside them."""
        while True:
            try:
                images_BCHW = torch.tensor(batch.images_BCHW, dtype=self.dtype, device=self.device)
                break
            except Exception as error:
                if not is_out_of_memory(error) or not self._held:
                    raise
            self._held.clear()
            self._free_cached()
        self._held[shard.name] = _Held(batch=batch, failures=failures, images_BCHW=images_BCHW)
        while len(self._held) > max(_SHARDS_HELD, self.job.config.engine.shards_in_flight):
            self._held.popitem(last=False)

    def runner(self, label: str) -> PlanRunner:
        """The plan runner in the precision chosen for an explainer or metric."""
        precision = self.job.precisions.get(label, self.job.dtype)
        if precision not in self._runners:
            autocast = torch.bfloat16 if precision == "bfloat16" else None
            runner = PlanRunner(model=self.model, batch_size=self.batch_size, autocast=autocast)
            runner.before_batch = lambda: self._check()
            self._runners[precision] = runner
        return self._runners[precision]

    @contextmanager
    def interrupted_by(self, check: Callable[[], None]) -> Iterator[None]:
        """Call `check` before each batch of the block; what it raises ends the call at hand."""
        self._check = check
        try:
            yield
        finally:
            self._check = _go_on

    @property
    def num_forward_passes(self) -> int:
        """Images that went through the model so far, each trace counted as one."""
        return self._num_traced + sum(runner.num_forward_passes for runner in self._runners.values())

    # -- inside

    def _forward(self, images_NCHW: Tensor) -> NDArray[np.floating]:
        if not len(images_NCHW):
            return np.empty((0, len(self.job.class_names)))
        logits_NK: NDArray[np.floating] = self.runner("").forward(images_NCHW).cpu().numpy()
        return logits_NK

    def _target(self, label: int) -> int:
        if self.job.config.target == "predicted":
            return -1
        return label

    def _explain(
        self, items: Sequence[Item], labels: Sequence[str], logits_NK: NDArray[np.floating], segments: Segments
    ) -> list[Explained]:
        """Explain in chunks of `explain_batch_size`; out of memory halves the chunk and remembers."""
        explained: list[Explained] = []
        while len(explained) < len(items):
            start = len(explained)
            stop = min(start + self.explain_batch_size, len(items))
            self._check()
            chunk = {name: maps[start:stop] for name, maps in segments.items()}
            try:
                explained += self._explain_chunk(items[start:stop], labels, logits_NK[start:stop], chunk)
            except Exception as error:
                if not is_out_of_memory(error) or self.explain_batch_size == 1:
                    raise
                self.explain_batch_size = max(1, self.explain_batch_size // 2)
                self._free_cached()
        return explained

    def _free_cached(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _explain_chunk(
        self, items: Sequence[Item], labels: Sequence[str], logits_NK: NDArray[np.floating], segments: Segments
    ) -> list[Explained]:
        targets = [item.target if item.target >= 0 else int(logits_NK[n].argmax()) for n, item in enumerate(items)]
        explained = [
            Explained(logits_K=logits_NK[n], target=target, maps={}, extras={}, errors={})
            for n, target in enumerate(targets)
        ]
        shared = self._inputs(items, targets, segments, "")
        for label in labels:
            explainer = self.explainers[label]
            inputs = shared if explainer.needs != "any" else self._inputs(items, targets, segments, label)
            try:
                attribution = explainer.explain(inputs)
                maps_Nhw = attribution.maps_Bhw.detach().cpu().numpy()
                for n, outcome in enumerate(explained):
                    outcome.maps[label] = maps_Nhw[n]
                    outcome.extras[label] = {name: float(values[n]) for name, values in attribution.extras.items()}
            except Exception as error:
                if is_no_fault_of_the_image(error):
                    raise
                self._one_by_one(items, targets, segments, label, explained, error)
        if "trace" in vars(shared):
            self._num_traced += len(items)
        return explained

    def _one_by_one(
        self,
        items: Sequence[Item],
        targets: Sequence[int],
        segments: Segments,
        label: str,
        explained: Sequence[Explained],
        error: Exception,
    ) -> None:
        """An explainer failed on a chunk: find the images that it fails on, so that the others keep their maps."""
        for n, item in enumerate(items):
            one = {name: maps[n : n + 1] for name, maps in segments.items()}
            try:
                if len(items) == 1:
                    raise error
                attribution = self.explainers[label].explain(self._inputs([item], targets[n : n + 1], one, label))
                explained[n].maps[label] = attribution.maps_Bhw[0].detach().cpu().numpy()
                explained[n].extras[label] = {name: float(v[0]) for name, v in attribution.extras.items()}
            except Exception as single:
                if is_no_fault_of_the_image(single):
                    raise
                explained[n].errors[label] = f"{type(single).__name__}: {single}"

    def _inputs(self, items: Sequence[Item], targets: Sequence[int], segments: Segments, label: str) -> ExplainInput:
        images_NCHW = torch.stack([item.image_CHW for item in items])
        runner = self.runner(label)
        return ExplainInput(
            model=self.model,
            images_BCHW=images_NCHW,
            targets_B=torch.as_tensor(targets, dtype=torch.int64, device=self.device),
            keys=tuple(item.key for item in items),
            run_plans=lambda requests: runner.run(images_NCHW, requests),
            segments=segments,
        )

    def _answer_variants(self, shard: Shard, questions: Sequence[Question], segments: Segments) -> tuple[Answer, ...]:
        """Explain changed images together in one packing, randomised models one model at a time."""
        answers: dict[int, Answer] = {}
        by_model: defaultdict[WeightsVariant | None, list[int]] = defaultdict(list)
        for index, question in enumerate(questions):
            ask = question.ask
            by_model[replace(ask, noisy=None) if isinstance(ask, WeightsVariant) else None].append(index)
        original = self.model
        changed = randomised_in_turn(original, [weights for weights in by_model if weights is not None])
        for weights, indices in by_model.items():
            items = [self._variant_item(shard, questions[index]) for index in indices]
            made = {name: [maps[index] for index in indices] for name, maps in segments.items()}
            try:
                if weights is not None:
                    self._use(next(changed))
                images_NCHW = torch.stack([item.image_CHW for item in items])
                explained = self._explain(items, list(self.explainers), self._forward(images_NCHW), made)
            finally:
                self._use(original)
            for index, outcome in zip(indices, explained, strict=True):
                maps: dict[str, Any] = {label: outcome.maps.get(label) for label in self.explainers}
                answers[index] = Answer(logits=outcome.logits_K, target=outcome.target, maps=maps)
        return tuple(answers[index] for index in range(len(questions)))

    def _use(self, model: Classifier) -> None:
        self.model = model
        for runner in self._runners.values():
            runner.model = model

    def _variant_item(self, shard: Shard, question: Question) -> Item:
        held, ask = self.hold(shard), question.ask
        changed_CHW = changed_image(held.batch, question)
        image_CHW = held.images_BCHW[question.row]
        if changed_CHW is not None:
            image_CHW = torch.tensor(changed_CHW, dtype=self.dtype, device=self.device)
        key = self.job.key(held.batch.ids[question.row], question.repeat)
        if isinstance(ask, WeightsVariant) and ask.noisy is not None:
            ask = ask.noisy
        if isinstance(ask, NoisyVariant) and ask.draws == "fresh":
            key = key.of_variant(f"noise:{ask.sample}")
        if isinstance(ask, TargetVariant):
            target = ask.target
        elif isinstance(ask, NoisyVariant) and ask.target == "as_configured":
            target = self._target(int(held.batch.labels_B[question.row]))
        else:
            target = self._original_target(shard, question.row)
        return Item(image_CHW=image_CHW, key=key, target=target)

    def _original_target(self, shard: Shard, row: int) -> int:
        """The class that is explained for the image itself."""
        held = self.hold(shard)
        target = self._target(int(held.batch.labels_B[row]))
        return target if target >= 0 else int(self._forward(held.images_BCHW[row : row + 1])[0].argmax())


def _go_on() -> None:
    pass
