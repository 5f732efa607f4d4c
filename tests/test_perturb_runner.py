"""The runner packs every request's copies into full batches, counts, and survives lost memory."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.perturb_oracle import CHANNELS, HEIGHT, WIDTH, image_and_generator, make_plans, perturbed_numpy
from xaibatch.errors import XaibatchError
from xaibatch.perturb.plans import SubsetPlan
from xaibatch.perturb.runner import PlanRunner, is_out_of_memory


class Recorder(nn.Module):
    """A fixed linear classifier that notes its batch sizes and runs out of memory above `capacity` images."""

    def __init__(self, capacity=None, error=None):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(CHANNELS * HEIGHT * WIDTH, 4, generator=generator).double())
        self.capacity, self.batches = capacity, []
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def forward(self, images):
        self.batches.append(len(images))
        if self.capacity is not None and len(images) > self.capacity:
            raise self.error
        assert not torch.is_grad_enabled()
        return torch.tanh(images.flatten(1).to(self.weight.dtype) @ self.weight)


def make_requests():
    generator = np.random.default_rng(5)
    images = torch.from_numpy(generator.normal(size=(3, CHANNELS, HEIGHT, WIDTH)))
    plans = make_plans(generator, "black")
    return images, [(i % 3, plan) for i, plan in enumerate(plans)]


def expected_logits(images, requests):
    model = Recorder()
    weight = model.weight.detach().numpy()
    return [
        np.tanh(perturbed_numpy(plan, images[row].numpy()).reshape(plan.num_samples, -1) @ weight)
        for row, plan in requests
    ]


@pytest.mark.parametrize("batch_size", [1, 7, 16, 1000])
def test_runner_packs_all_requests_into_full_batches(batch_size):
    images, requests = make_requests()
    model = Recorder()
    runner = PlanRunner(model=model, batch_size=batch_size)
    outputs = runner.run(images, requests)
    total = sum(plan.num_samples for _, plan in requests)
    assert model.batches == [batch_size] * (total // batch_size) + [total % batch_size] * (total % batch_size > 0)
    assert runner.num_forward_passes == total
    for got, want in zip(outputs, expected_logits(images, requests), strict=True):
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_runner_gives_the_same_bits_again():
    images, requests = make_requests()
    first = PlanRunner(model=Recorder(), batch_size=16).run(images, requests)
    again = PlanRunner(model=Recorder(), batch_size=16).run(images, requests)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("HIP out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 12 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_out_of_memory_halves_the_batch_and_repeats_only_what_failed(error):
    images, requests = make_requests()
    model = Recorder(capacity=5, error=error)
    runner = PlanRunner(model=model, batch_size=16)
    outputs = runner.run(images, requests)
    total = sum(plan.num_samples for _, plan in requests)
    assert model.batches[:3] == [16, 8, 4]
    assert sum(model.batches[2:]) == total == runner.num_forward_passes
    assert runner.batch_size == 4
    for got, want in zip(outputs, expected_logits(images, requests), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
    runner.forward(images)
    assert model.batches[-1] == 3, "the smaller batch is remembered"


def test_out_of_memory_in_the_middle_keeps_earlier_batches():
    images, requests = make_requests()

    class Once(Recorder):
        def forward(self, images):
            self.capacity = 4 if len(self.batches) == 2 else None
            return super().forward(images)

    model = Once()
    runner = PlanRunner(model=model, batch_size=8)
    outputs = runner.run(images, requests)
    assert model.batches[:4] == [8, 8, 8, 4]
    assert sum(model.batches) - 8 == runner.num_forward_passes
    for got, want in zip(outputs, expected_logits(images, requests), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_out_of_memory_with_one_image_is_a_clear_error():
    images, requests = make_requests()
    with pytest.raises(XaibatchError, match="out of memory on cpu with a single image"):
        PlanRunner(model=Recorder(capacity=0), batch_size=4).run(images, requests)


def test_other_errors_pass_through():
    images, requests = make_requests()
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert not is_out_of_memory(error)
    with pytest.raises(RuntimeError, match="shapes cannot"):
        PlanRunner(model=Recorder(capacity=0, error=error), batch_size=4).run(images, requests)


def test_forward_equals_the_model_and_keeps_float32():
    images = torch.randn(5, CHANNELS, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))
    model = Recorder().float()
    logits = PlanRunner(model=model, batch_size=2).forward(images)
    assert logits.dtype == torch.float32
    assert model.batches == [2, 2, 1]
    with torch.no_grad():
        torch.testing.assert_close(logits, model(images), rtol=0, atol=1e-5)


def test_autocast_returns_float32_of_reduced_precision():
    images = torch.randn(5, CHANNELS, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))
    model = Recorder().float()
    exact = PlanRunner(model=model, batch_size=5).forward(images)
    rough = PlanRunner(model=model, batch_size=5, autocast=torch.bfloat16).forward(images)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.3


def test_no_requests_and_empty_plans():
    images, _ = image_and_generator()
    images = torch.from_numpy(images)[None]
    assert PlanRunner(model=Recorder(), batch_size=4).run(images, []) == []
    empty = SubsetPlan(index_SK=np.empty((0, 3), np.int32), entries="pixel", baseline=0.0)
    one = SubsetPlan(index_SK=np.array([[0]], np.int32), entries="pixel", baseline=0.0)
    outputs = PlanRunner(model=Recorder(), batch_size=4).run(images, [(0, empty), (0, one), (0, empty)])
    assert [len(output) for output in outputs] == [0, 1, 0]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_any_batch_size_gives_the_same_logits(batch_size, sizes):
    generator = np.random.default_rng(0)
    images = torch.from_numpy(generator.normal(size=(2, CHANNELS, HEIGHT, WIDTH)))
    requests = [
        (i % 2, SubsetPlan(index_SK=generator.integers(0, 99, (size, 3), np.int32), entries="pixel", baseline="mean"))
        for i, size in enumerate(sizes)
    ]
    outputs = PlanRunner(model=Recorder(), batch_size=batch_size).run(images, requests)
    whole = PlanRunner(model=Recorder(), batch_size=1000).run(images, requests)
    for got, want in zip(outputs, whole, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
