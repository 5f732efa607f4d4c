"""Plans expanded on a device equal their slow NumPy definition; the runner packs, counts, and survives lost memory."""

import subprocess
import sys
from functools import singledispatch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from torch import nn

from xaibatch.errors import ConfigError, UnknownNameError, XaibatchError
from xaibatch.perturb.expand import expand, prepare, resolve_baseline, soft_masks
from xaibatch.perturb.plans import (
    OrderPlan,
    SoftMaskPlan,
    SubsetPlan,
    SuperpixelPlan,
    UniformNoisePlan,
    WindowPlan,
)
from xaibatch.perturb.runner import PlanRunner, is_out_of_memory
from xaibatch.perturb.segmentation import patch_grid, segment, segmentation_spec
from xaibatch.seeding import DrawKey

CHANNELS, HEIGHT, WIDTH = 3, 12, 10
KEY = DrawKey(seed=7, image_id="image")


# -- the slow oracle: loops over copies and pixels, float64


def baseline_numpy(image, baseline):
    if baseline == "blur":
        sigma = min(image.shape[1:]) / 16
        return np.stack([gaussian_filter(channel, sigma, mode="reflect", truncate=4.0) for channel in image])
    named = {"black": image.min, "white": image.max, "mean": image.mean}
    return np.full(image.shape, named[baseline]() if baseline in named else float(baseline))


@singledispatch
def perturbed_numpy(plan, image):
    raise NotImplementedError


@perturbed_numpy.register
def _(plan: SubsetPlan, image):
    base, copies = baseline_numpy(image, plan.baseline), []
    for indices in plan.index_SK:
        copy = image.copy()
        for i in indices:
            replace_entry(copy, base, i, plan.entries)
        copies.append(copy)
    return np.stack(copies)


@perturbed_numpy.register
def _(plan: OrderPlan, image):
    base, copies = baseline_numpy(image, plan.baseline), []
    for count in plan.counts_S:
        if plan.direction == "delete":
            copy, source = image.copy(), base
        else:
            copy, source = base.copy(), image
        for i in plan.order_N[:count]:
            replace_entry(copy, source, i, plan.entries)
        copies.append(copy)
    return np.stack(copies)


@perturbed_numpy.register
def _(plan: SuperpixelPlan, image):
    base = segment_mean_numpy(plan, image) if plan.baseline == "segment_mean" else baseline_numpy(image, plan.baseline)
    copies = []
    for keep in plan.keep_SM:
        copy = image.copy()
        for m in range(len(keep)):
            if not keep[m]:
                copy[:, plan.segments_HW == m] = base[:, plan.segments_HW == m]
        copies.append(copy)
    return np.stack(copies)


@perturbed_numpy.register
def _(plan: UniformNoisePlan, image):
    return np.stack([image + plan.noise_CHW(s, image.shape) for s in range(plan.num_samples)])


@perturbed_numpy.register
def _(plan: SoftMaskPlan, image):
    base = baseline_numpy(image, plan.baseline)
    masks = [soft_mask_numpy(g, s, image.shape[1:]) for g, s in zip(plan.grid_Sgg, plan.shift_S2, strict=True)]
    return np.stack([image * mask + base * (1 - mask) for mask in masks])


@perturbed_numpy.register
def _(plan: WindowPlan, image):
    base, copies = baseline_numpy(image, plan.baseline), []
    for top, left in plan.corner_S2:
        copy = image.copy()
        for row in range(max(top, 0), min(top + plan.height, image.shape[1])):
            for column in range(max(left, 0), min(left + plan.width, image.shape[2])):
                copy[:, row, column] = base[:, row, column]
        copies.append(copy)
    return np.stack(copies)


def replace_entry(copy, source, i, entries):
    if entries == "channel":
        copy.reshape(-1)[i] = source.reshape(-1)[i]
    else:
        row, column = divmod(int(i), copy.shape[2])
        copy[:, row, column] = source[:, row, column]


def segment_mean_numpy(plan, image):
    base = np.zeros_like(image)
    for m in np.unique(plan.segments_HW):
        inside = plan.segments_HW == m
        for channel in range(len(image)):
            base[channel, inside] = image[channel, inside].mean()
    return base


def soft_mask_numpy(grid, shift, size):
    """torch's own bilinear upsampling of the whole plane, then the crop."""
    cells = grid.shape[0]
    up = tuple((cells + 1) * int(np.ceil(side / cells)) for side in size)
    plane = nn.functional.interpolate(torch.from_numpy(grid).double()[None, None], up, mode="bilinear")[0, 0].numpy()
    return plane[shift[0] : shift[0] + size[0], shift[1] : shift[1] + size[1]]


def image_and_generator(seed=0, dtype=np.float64):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(CHANNELS, HEIGHT, WIDTH)).astype(dtype), generator


def make_plans(generator, baseline=0.25):
    num = {"pixel": HEIGHT * WIDTH, "channel": CHANNELS * HEIGHT * WIDTH}
    plans = []
    for entries in ("pixel", "channel"):
        index = np.stack([generator.permutation(num[entries])[:17] for _ in range(5)]).astype(np.int32)
        plans.append(SubsetPlan(index_SK=index, entries=entries, baseline=baseline))
        for direction in ("delete", "insert"):
            order = generator.permutation(num[entries]).astype(np.int32)[: num[entries] - 9]
            counts = np.array([0, 1, 30, len(order)], np.int32)
            plans.append(
                OrderPlan(order_N=order, counts_S=counts, entries=entries, baseline=baseline, direction=direction)
            )
    segments = patch_grid((HEIGHT, WIDTH), patch_size=4)
    keep = generator.random((6, segments.max() + 1)) < 0.5
    plans.append(SuperpixelPlan(segments_HW=segments, keep_SM=keep, baseline=baseline))
    plans.append(SuperpixelPlan(segments_HW=segments, keep_SM=keep, baseline="segment_mean"))
    plans.append(UniformNoisePlan(key=KEY, num_samples=4, low=-0.2, high=0.3))
    grid = (generator.random((5, 4, 4)) < 0.5).astype(np.float32)
    shift = np.array([[0, 0], [2, 2], [1, 0], [2, 1], [0, 2]], np.int32)
    plans.append(SoftMaskPlan(grid_Sgg=grid, shift_S2=shift, baseline=baseline))
    corners = np.array([[0, 0], [-2, 3], [10, 9], [4, 4], [HEIGHT, WIDTH]], np.int32)
    plans.append(WindowPlan(corner_S2=corners, height=5, width=3, baseline=baseline))
    return plans


PLAN_NAMES = [
    "subset_pixel", "delete_pixel", "insert_pixel", "subset_channel", "delete_channel", "insert_channel",
    "superpixel", "segment_mean", "noise", "soft_mask", "window",
]  # fmt: skip


@pytest.mark.parametrize("baseline", [0.25, "black", "white", "mean", "blur"])
@pytest.mark.parametrize("which", range(len(PLAN_NAMES)), ids=PLAN_NAMES)
def test_expand_equals_slow_definition(which, baseline):
    image, generator = image_and_generator()
    plan = make_plans(generator, baseline)[which]
    expected = perturbed_numpy(plan, image)
    copies = expand(plan, torch.from_numpy(image), 0, plan.num_samples).numpy()
    # exact but for the last bits of sums (means, blur, bilinear weights)
    np.testing.assert_allclose(copies, expected, rtol=0, atol=1e-14)
    for start, stop in ((0, 1), (1, 3), (plan.num_samples - 1, plan.num_samples)):
        np.testing.assert_array_equal(expand(plan, torch.from_numpy(image), start, stop).numpy(), copies[start:stop])


@pytest.mark.parametrize("which", range(len(PLAN_NAMES)), ids=PLAN_NAMES)
def test_expand_in_float32_is_the_cast_definition(which):
    image, generator = image_and_generator(dtype=np.float32)
    plan = make_plans(generator, "mean")[which]
    expected = perturbed_numpy(plan, image.astype(np.float64)).astype(np.float32)
    copies = expand(plan, torch.from_numpy(image), 0, plan.num_samples)
    assert copies.dtype == torch.float32
    # only the soft mask multiplies after its cast to float32
    np.testing.assert_allclose(copies.numpy(), expected, rtol=0, atol=5e-7 if PLAN_NAMES[which] == "soft_mask" else 0)


def test_superpixel_copies_equal_lime_package_copies():
    """LimeImageExplainer.data_labels makes the copies; the classifier only looks at them."""
    from lime.lime_image import LimeImageExplainer

    image, _ = image_and_generator()
    segments = patch_grid((HEIGHT, WIDTH), patch_size=4)
    seen = []

    def classifier(images):
        seen.extend(images)
        return np.zeros((len(images), 2))

    explainer = LimeImageExplainer(random_state=3)
    image_hwc = np.ascontiguousarray(image.transpose(1, 2, 0))
    data, _ = explainer.data_labels(image_hwc, np.full_like(image_hwc, 0.5), segments, classifier, 20)
    plan = SuperpixelPlan(segments_HW=segments, keep_SM=data.astype(bool), baseline=0.5)
    copies = expand(plan, torch.from_numpy(image), 0, 20).numpy()
    np.testing.assert_array_equal(copies, np.stack(seen).transpose(0, 3, 1, 2))


def test_noise_depends_on_the_key_and_sample_only():
    image, _ = image_and_generator()
    plan = UniformNoisePlan(key=KEY, num_samples=6, low=-1.0, high=1.0)
    longer = UniformNoisePlan(key=KEY, num_samples=60, low=-1.0, high=1.0)
    other = UniformNoisePlan(key=DrawKey(seed=7, image_id="other"), num_samples=6, low=-1.0, high=1.0)
    copies = expand(plan, torch.from_numpy(image), 4, 6)
    assert torch.equal(copies, expand(longer, torch.from_numpy(image), 4, 6))
    assert not torch.equal(copies, expand(other, torch.from_numpy(image), 4, 6))
    assert not torch.equal(copies[0], copies[1])


def test_soft_mask_of_ones_shows_the_image():
    image, _ = image_and_generator()
    plan = SoftMaskPlan(grid_Sgg=np.ones((2, 4, 4), np.float32), shift_S2=np.zeros((2, 2), np.int32), baseline=9.0)
    np.testing.assert_allclose(soft_masks(plan, (HEIGHT, WIDTH), 0, 2).numpy(), 1.0, atol=1e-15)
    np.testing.assert_allclose(expand(plan, torch.from_numpy(image), 0, 1)[0].numpy(), image, atol=1e-14)


def test_blur_of_a_side_smaller_than_the_kernel_equals_scipy():
    image = np.random.default_rng(1).normal(size=(1, 3, 200))
    blurred = resolve_baseline(torch.from_numpy(image[:, :, :3].copy()), "blur").numpy()
    np.testing.assert_allclose(blurred, baseline_numpy(image[:, :, :3], "blur"), atol=1e-14)


@pytest.mark.parametrize(
    "plan",
    [
        SubsetPlan(index_SK=np.array([[0, HEIGHT * WIDTH]], np.int32), entries="pixel", baseline=0.0),
        SubsetPlan(index_SK=np.array([[-1]], np.int32), entries="channel", baseline=0.0),
        SuperpixelPlan(segments_HW=np.zeros((3, 3), np.int32), keep_SM=np.ones((1, 1), bool), baseline=0.0),
        SuperpixelPlan(segments_HW=np.ones((HEIGHT, WIDTH), np.int32), keep_SM=np.ones((1, 1), bool), baseline=0.0),
        SoftMaskPlan(
            grid_Sgg=np.ones((1, 4, 4), np.float32), shift_S2=np.full((1, 2), 99, np.int32), baseline=0.0
        ),
    ],
)  # fmt: skip
def test_a_plan_that_does_not_fit_is_refused(plan):
    image, _ = image_and_generator()
    with pytest.raises(ValueError, match=r"fit|allowed"):
        expand(plan, torch.from_numpy(image), 0, 1)


def test_unknown_plan_kind_is_named():
    with pytest.raises(TypeError, match="str"):
        prepare("no plan", torch.zeros(1, 2, 2))


# -- the runner


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


# -- superpixels


def test_segments_equal_golden(golden_small):
    golden = np.load(golden_small / "small_lime.npz")
    images = np.load(golden_small / "small_lrp.npz")["x"]
    for i in golden["images"]:
        np.testing.assert_array_equal(segment(images[i], "quickshift"), golden[f"{i}_segments"])
        np.testing.assert_array_equal(segment(images[i].astype(np.float64), "quickshift"), golden[f"{i}_segments"])


def test_segments_of_radiographs_equal_golden(shared):
    golden = np.load(shared / "golden/tiny_lime.npz")
    images = np.load(shared / "golden/tiny_lrp.npz")["x"]
    i = golden["images"][0]
    np.testing.assert_array_equal(segment(images[i], "quickshift"), golden[f"{i}_segments"])


@pytest.mark.parametrize(
    ("name", "options"),
    [("quickshift", {}), ("slic", {"n_segments": 12}), ("felzenszwalb", {"min_size": 30}), ("grid", {})],
)
def test_superpixels_are_dense_and_start_at_zero(name, options):
    ramp = np.linspace(-2, 2, 40)
    image = np.stack([ramp[:, None] + 0.3 * ramp * sign for sign in (-1, 0, 1)])
    labels = segment(image, name, options, patch_size=16)
    assert labels.dtype == np.int32
    assert labels.shape == (40, 40)
    assert np.array_equal(np.unique(labels), np.arange(labels.max() + 1))
    spec = segmentation_spec(name, options)
    assert np.array_equal(labels, segment(image, spec, patch_size=16))


def test_grid_is_row_major_with_smaller_pieces_at_the_border():
    assert patch_grid((4, 5), patch_size=2).tolist() == [[0, 0, 1, 1, 2]] * 2 + [[3, 3, 4, 4, 5]] * 2


def test_a_worker_makes_superpixels_without_torch():
    code = """
import sys
import numpy as np
from xaibatch.perturb.segmentation import segment
image = np.random.default_rng(0).normal(size=(3, 16, 16))
assert segment(image, "quickshift").shape == segment(image, "grid", patch_size=4).shape == (16, 16)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_segmentation_options_and_names_are_checked():
    image = np.zeros((3, 8, 8))
    with pytest.raises(UnknownNameError, match="quickshift"):
        segment(image, "quickshit")
    with pytest.raises(ConfigError, match="n_segmants"):
        segment(image, "slic", {"n_segmants": 3})
