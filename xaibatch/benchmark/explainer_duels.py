"""Every built-in explainer and what it is held against: a package's implementation or the usual loop over images.

Shape letters: C channels, H W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from xaibatch.benchmark import stock_sampling as stock
from xaibatch.benchmark.explainer_bench import ExplainerBench
from xaibatch.benchmark.stock_gradients import LOOPS
from xaibatch.benchmark.stock_relevance import reference_lrp
from xaibatch.explainers.base import EXPLAINERS, Explainer
from xaibatch.models.token_grid import token_grid_of

WINDOW = 32
"""Side of occlusion's window in pixels, moved by half of it."""

UNMEASURED = ("attention_rollout", "random")
"""An alias, and a map without a model."""


@dataclass(frozen=True, kw_only=True)
class Duel:
    """One of our explainers and what it is held against: `stock` explains one image; `package` must be installed."""

    name: str
    explainer: Explainer
    stock: Callable[[int], object] | None = None
    stock_name: str = ""
    package: str = "torch"
    given_segments: bool = False
    """Superpixels are made beforehand for both."""

    @property
    def heavy(self) -> bool:
        """Whether an image costs many forward passes."""
        return is_heavy(self.explainer)


def is_heavy(explainer: Explainer) -> bool:
    return explainer.num_forward_passes() > 0


def duels_of(name: str, bench: ExplainerBench) -> list[Duel]:
    """The lines of one explainer on these images."""
    num = bench.setting.options.num_samples
    model, images, targets = bench.setting.model, bench.images_BCHW, bench.targets
    kind = EXPLAINERS[name]
    if name == "transformer_lrp":

        def eight_products(row: int) -> Tensor:
            return reference_lrp(model, images[row : row + 1], targets[row])

        return [Duel(name=name, explainer=kind(), stock=eight_products, stock_name="eight products, autograd")]
    if name in LOOPS:

        def loop(row: int) -> Tensor:
            return LOOPS[name](model, images[row : row + 1], targets[row])

        return [Duel(name=name, explainer=kind(), stock=loop, stock_name="hooks and autograd")]
    if name == "lime":
        return _lime(kind, bench, num)
    if name == "kernel_shap":
        shap = kind(num_samples=num, segmentation=bench.setting.segmentation, baseline=0.0)
        return [_on_superpixels(f"{name}, superpixels given", shap, "KernelShap", bench, num)]
    if name == "rise":

        def script(row: int) -> Tensor:
            return stock.rise_script(model, images[row], targets[row], num_masks=num)

        return [Duel(name=name, explainer=kind(num_masks=num), stock=script, stock_name="authors' loop")]
    if name.startswith("occlusion"):
        return [_occlusion(name, kind, bench)]
    return [Duel(name=name, explainer=kind())]


def _lime(kind: type[Explainer], bench: ExplainerBench, num: int) -> list[Duel]:
    explainer = kind(num_samples=num, segmentation=bench.setting.segmentation, hide=0.0)

    def package(row: int) -> object:
        return stock.lime_package(bench.setting.model, bench.images_BCHW[row], bench.targets[row], num_samples=num)

    return [
        Duel(name="lime", explainer=explainer, stock=package, stock_name="lime explain_instance", package="lime"),
        _on_superpixels("lime, superpixels given", explainer, "Lime", bench, num),
    ]


def _on_superpixels(name: str, explainer: Explainer, captum: str, bench: ExplainerBench, num: int) -> Duel:
    def attribute(row: int) -> Tensor:
        return stock.captum_on_superpixels(
            captum,
            bench.setting.model,
            bench.images_BCHW[row],
            bench.targets[row],
            bench.segments[row],
            num_samples=num,
            batch=bench.copies_batch,
        )

    return Duel(
        name=name,
        explainer=explainer,
        stock=attribute,
        stock_name=f"captum {captum}, {bench.copies_batch} copies a batch",
        package="captum",
        given_segments=True,
    )


def _occlusion(name: str, kind: type[Explainer], bench: ExplainerBench) -> Duel:
    side = int(bench.images_BCHW.shape[-1])
    patch = token_grid_of(bench.setting.model, (side, side)).side
    window = patch if name == "occlusion_patch" else min(WINDOW, side)
    stride = patch if name == "occlusion_patch" else window // 2
    explainer = kind() if name == "occlusion_patch" else kind(window=window, stride=stride)

    def slide(row: int) -> Tensor:
        return stock.captum_occlusion(
            bench.setting.model,
            bench.images_BCHW[row],
            bench.targets[row],
            window=window,
            stride=stride,
            batch=bench.copies_batch,
        )

    stock_name = f"captum Occlusion, {bench.copies_batch} copies a batch"
    return Duel(name=name, explainer=explainer, stock=slide, stock_name=stock_name, package="captum")
