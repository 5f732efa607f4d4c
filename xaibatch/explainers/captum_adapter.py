"""A Captum attribution class in, an explainer class out: baselines, targets, batching and seeds are handed over.

`captum:IntegratedGradients` explains as captum.attr.IntegratedGradients does; with `noise_samples` it is wrapped in
captum.attr.NoiseTunnel (SmoothGrad and its kin) with noise from the image's key. Classes that draw random numbers
themselves are run one image at a time on global streams that are seeded from the image's key for the call and put back
afterwards, because Captum takes no generator.

Shape letters: B images, C channels, H W pixels, h w a map's own sides, D features of a token, N tokens.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from math import prod
from typing import Any, ClassVar, Literal

import captum.attr
import numpy as np
import torch
from captum.attr import NoiseTunnel
from pydantic import Field
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from xaibatch.errors import ConfigError, ModelError, UnknownNameError, UsageError
from xaibatch.explainers.base import NOMINAL, Attribution, Explainer, ExplainInput, InputShape
from xaibatch.explainers.hooked_model import ready_for_hooks
from xaibatch.explainers.superpixels import SuperpixelOptions, superpixels
from xaibatch.models.token_grid import token_grid_of
from xaibatch.perturb.expand import expand, resolve_baseline
from xaibatch.perturb.plans import Baseline, GaussianNoisePlan
from xaibatch.perturb.runner import is_out_of_memory
from xaibatch.perturb.segmentation import Segmentation
from xaibatch.seeding import DrawKey

NoiseType = Literal["smoothgrad", "smoothgrad_sq", "vargrad"]
"""Mean, mean square or variance of the attributions of noisy copies (captum.attr.NoiseTunnel)."""

RANDOM_CLASSES = frozenset({"GradientShap", "KernelShap", "LayerGradientShap", "Lime", "ShapleyValueSampling"})
"""Captum classes that draw random numbers themselves."""

_ACROSS_IMAGES = "it permutes features between the images of a batch, so a map would depend on its neighbours"
_NO_LRP_RULES = "it has no rules for the layers of timm's models: use transformer_lrp, attn_lrp or zennit:<composite>"

REFUSED = {
    "DataLoaderAttribution": "it explains a data loader, not an image",
    "FeaturePermutation": _ACROSS_IMAGES,
    "LRP": _NO_LRP_RULES,
    "LayerActivation": "it does not look at the target class",
    "LayerFeatureAblation": "it asks the model once for every single unit of the layer",
    "LayerFeaturePermutation": _ACROSS_IMAGES,
    "LayerLRP": _NO_LRP_RULES,
    "LimeBase": "it needs functions of your own: wrap it in a function of your own (package.module:function)",
    "NoiseTunnel": "it wraps another attribution: use e.g. captum:Saliency with the option noise_samples",
    "ShapleyValues": "it takes every order of the superpixels: use captum:ShapleyValueSampling or kernel_shap",
}
"""Captum classes that cannot give one map per image and target, and why; Neuron* and LLM* classes are refused too."""

RELU_CLASSES = frozenset({"Deconvolution", "GuidedBackprop", "GuidedGradCam"})
"""They change the gradient of nn.ReLU modules; on a model without any they would silently be the plain gradient."""

DEEP_LIFT_CLASSES = frozenset({"DeepLift", "DeepLiftShap", "LayerDeepLift", "LayerDeepLiftShap"})
"""They know pointwise non-linearities and pooling, not attention and LayerNorm."""

_HANDED_OVER = frozenset(
    {"inputs", "target", "baselines", "internal_batch_size", "perturbations_per_eval", "feature_mask",
     "return_convergence_delta", "additional_forward_args", "show_progress", "return_input_shape", "kwargs"}
)  # fmt: skip


class CaptumOptions(SuperpixelOptions):
    """What every Captum attribution may be told; anything special to a class goes into `arguments`."""

    segmentation: Segmentation = "grid"
    """Superpixels for classes that take a feature mask (Lime, KernelShap, FeatureAblation, ShapleyValueSampling)."""

    baseline: Baseline = 0.0
    """The baseline image, for classes that take one; 0 is mid-grey in normalised units, `black` the image's minimum."""

    internal_batch_size: int = Field(default=32, ge=1)
    """Images or copies in one forward (and backward) pass at most; halved for a call that runs out of memory."""

    channels: Literal["sum", "abs_sum"] = "sum"
    """How the channels of a pixel (or the features of a token) become one number."""

    layer: str | None = None
    """Name of the module that a Layer* class looks at, e.g. `blocks.11.norm1` or `layer4`."""

    noise_samples: int = Field(default=0, ge=0)
    """Noisy copies per image for NoiseTunnel; 0: none."""

    noise_stdev: float = Field(default=0.5, gt=0)
    """Standard deviation of the noise in normalised units."""

    noise_type: NoiseType = "smoothgrad"

    arguments: Mapping[str, Any] = Field(default_factory=dict)
    """Further arguments of the class's `attribute` method, e.g. {"n_steps": 20}; lists are handed over as tuples."""


class CaptumExplainer(Explainer):
    """One of Captum's attribution classes (Kokhlikyan et al. 2020)."""

    paper = "Kokhlikyan et al. 2020, arXiv:2009.07896"
    signed = True
    granularity = "pixel"
    needs = "gradients"
    Options = CaptumOptions
    options: CaptumOptions
    method: ClassVar[type[Any]]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        known = self._known_arguments()
        for key in self.options.arguments:
            if key not in known:
                raise ConfigError(str(UnknownNameError(f"argument of {self.name}", key, known)))
        required = [key for key in known if self._parameters()[key].default is inspect.Parameter.empty]
        if missing := [key for key in required if key not in self.options.arguments]:
            raise ConfigError(
                f"{self.name} needs {', '.join(missing)} among its `arguments`, on the command line --set "
                f"{self.name}.arguments.{missing[0]}=... (see captum.attr.{self.method.__name__}.attribute)"
            )
        takes_layer = "layer" in inspect.signature(self.method).parameters
        if takes_layer and self.options.layer is None:
            raise ConfigError(
                f"{self.name} needs the option `layer`, a module's name: on the command line --set "
                f"{self.name}.layer=blocks.11.norm1 for a ViT of twelve blocks, layer4 for a ResNet"
            )
        if self.options.layer is not None and not takes_layer:
            raise ConfigError(f"{self.name} looks at the input, not at a layer: leave out the option `layer`")
        self.random = type(self).random or self.options.noise_samples > 0
        is_positive = self.method.__name__ == "Saliency" and self.options.arguments.get("abs", True)
        is_rectified = bool(self.options.arguments.get("relu_attributions", False))
        is_squared = self.options.noise_samples > 0 and self.options.noise_type != "smoothgrad"
        self.signed = not (is_positive or is_rectified or is_squared or self.options.channels == "abs_sum")

    def explain(self, inputs: ExplainInput) -> Attribution:
        """Return maps (B,H,W), or a layer's own grid for Layer* classes; ModelError for an activation that is no
        grid."""
        size = self.options.internal_batch_size
        while True:
            try:
                return self._explain(inputs, size)
            except (AssertionError, TypeError, ValueError) as error:
                if not self.options.arguments:
                    raise
                raise UsageError(
                    f"{self.name} refuses its arguments {dict(self.options.arguments)}: {type(error).__name__}: {error}"
                ) from error
            except RuntimeError as error:
                if not is_out_of_memory(error) or size == 1:
                    raise
            size //= 2
            if inputs.images_BCHW.device.type == "cuda":
                torch.cuda.empty_cache()

    def _explain(self, inputs: ExplainInput, size: int) -> Attribution:
        one_by_one = self.random or "perturbations_per_eval" in self._parameters()
        step = 1 if one_by_one else size
        masks = superpixels(inputs, self.options) if "feature_mask" in self._parameters() else None
        _check_model(self.method.__name__, inputs.model)
        maps = []
        with ready_for_hooks(inputs.model):
            for start in range(0, len(inputs.images_BCHW), step):
                images_bCHW = inputs.images_BCHW[start : start + step].detach().clone().requires_grad_()
                mask = None if masks is None else torch.as_tensor(masks[start], device=images_bCHW.device).long()
                targets_b, key = inputs.targets_B[start : start + step], inputs.keys[start]
                with _seeded(key, images_bCHW.device) if type(self).random else nullcontext():
                    attribution = self._attribute(inputs.model, images_bCHW, targets_b, mask, key, size)
                maps.append(self._maps(attribution, inputs))
        return Attribution(maps_Bhw=torch.cat(maps).to(inputs.images_BCHW.dtype))

    def _attribute(
        self,
        model: nn.Module,
        images_bCHW: Tensor,
        targets_b: Tensor,
        mask_HW: Tensor | None,
        key: DrawKey,
        size: int,
    ) -> Any:
        options = self.options
        method = self.method(model, *([_submodule(model, options.layer)] if options.layer else []))
        arguments = {key: _as_tuple(value) for key, value in options.arguments.items()}
        for name, value in (
            ("baselines", lambda: _baselines(images_bCHW.detach(), options.baseline)),
            ("internal_batch_size", lambda: max(size, len(images_bCHW))),
            ("perturbations_per_eval", lambda: size),
            ("feature_mask", lambda: mask_HW[None, None] if mask_HW is not None else None),
        ):
            if name in self._parameters():
                arguments[name] = value()
        if not options.noise_samples:
            return method.attribute(images_bCHW, target=targets_b, **arguments)
        copies_at_once = 1 if "internal_batch_size" in self._parameters() else size
        tunnel = KeyedNoiseTunnel(method, key)
        attribution = tunnel.attribute(
            images_bCHW,
            nt_type=options.noise_type,
            nt_samples=options.noise_samples,
            nt_samples_batch_size=min(copies_at_once, options.noise_samples),
            stdevs=options.noise_stdev,
            target=targets_b,
            **arguments,
        )
        if tunnel.num_drawn != options.noise_samples:
            raise UsageError(
                f"{self.name}: captum {captum.__version__} does not draw noise where this version expects it"
            )
        return attribution

    def _maps(self, attribution: Any, inputs: ExplainInput) -> Tensor:
        """One number per pixel or token: (b,C,h,w) and (b,N,D) become (b,h,w)."""
        values = attribution[0] if isinstance(attribution, tuple) else attribution
        values = values.detach()
        values = values.abs() if self.options.channels == "abs_sum" else values
        if values.ndim == 4:
            return values.sum(1)
        backbone: Any = getattr(inputs.model, "backbone", inputs.model)
        grid = token_grid_of(backbone, (inputs.images_BCHW.shape[2], inputs.images_BCHW.shape[3])).shape
        prefix = int(getattr(backbone, "num_prefix_tokens", 0))
        if values.ndim == 3 and values.shape[1] == prefix + grid[0] * grid[1]:
            return values[:, prefix:].sum(2).reshape(len(values), *grid)
        raise ModelError(
            f"{self.name}: layer {self.options.layer!r} gives an attribution of shape {tuple(values.shape)}; expected "
            "(B,C,h,w), or (B,tokens,D) of a ViT"
        )

    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.method.attribute).parameters

    def _known_arguments(self) -> list[str]:
        return [key for key in self._parameters() if key != "self" and key not in _HANDED_OVER]

    def _default(self, argument: str) -> int:
        """The value of a counting argument such as `n_steps`: the user's, else Captum's default, else 1."""
        if argument in self.options.arguments:
            return int(self.options.arguments[argument])
        parameter = self._parameters().get(argument)
        return 1 if parameter is None else int(parameter.default)

    def num_forward_passes(self, shape: InputShape = NOMINAL) -> int:
        passes = self._default("n_steps") * self._default("n_samples") * max(self.options.noise_samples, 1)
        per_superpixel = self.method.__name__ in ("FeatureAblation", "ShapleyValueSampling")
        return passes * prod(shape.grid) if per_superpixel else passes

    def cost(self) -> str:
        if self.method.__name__ == "Occlusion":
            return "one forward per window"
        return f"{self.num_forward_passes()} forward" + (" + backward" if self.needs == "gradients" else "")

    @property
    def segmentation(self) -> str | None:
        return self.options.spec if "feature_mask" in self._parameters() else None


class KeyedNoiseTunnel(NoiseTunnel):  # type: ignore[misc]
    """NoiseTunnel for one image whose noise comes from the image's key, copy by copy: the same on every device and
    however many copies are run at once."""

    def __init__(self, method: Any, key: DrawKey) -> None:
        super().__init__(method)
        self.key = key
        self.num_drawn = 0

    def _add_noise_to_input(self, input: Tensor, stdev: float, nt_samples_partition: int) -> Tensor:
        start, self.num_drawn = self.num_drawn, self.num_drawn + nt_samples_partition
        plan = GaussianNoisePlan(key=self.key, purpose="noise_tunnel", num_samples=self.num_drawn, mean=0.0, std=stdev)
        return expand(plan, input[0], start, self.num_drawn)


def captum_explainer(class_name: str) -> type[CaptumExplainer]:
    """Return the explainer class for `captum:<class_name>`; UnknownNameError or UsageError where there can be none."""
    if class_name in REFUSED:
        raise UsageError(f"captum:{class_name} cannot be used here: {REFUSED[class_name]}")
    known = [name for name in captum.attr.__all__ if _is_supported(getattr(captum.attr, name))]
    if class_name not in known:
        raise UnknownNameError("captum class", class_name, known)
    method = getattr(captum.attr, class_name)
    attributes: dict[str, Any] = {
        "name": f"captum:{class_name}",
        "title": f"{class_name} (Captum)",
        "random": class_name in RANDOM_CLASSES,
        "granularity": _granularity(class_name, method),
        "needs": "any" if "perturbations_per_eval" in inspect.signature(method.attribute).parameters else "gradients",
        "method": method,
        "__doc__": f"captum.attr.{class_name} as an explainer.",
    }
    return type(f"Captum{class_name}", (CaptumExplainer,), attributes)


def _granularity(class_name: str, method: type[Any]) -> str:
    if "feature_mask" in inspect.signature(method.attribute).parameters:
        return "segment"
    return "token" if "layer" in inspect.signature(method).parameters and class_name != "GuidedGradCam" else "pixel"


def _is_supported(item: Any) -> bool:
    if not (isinstance(item, type) and issubclass(item, captum.attr.Attribution)):
        return False
    attribute = getattr(item, "attribute", None)  # the abstract classes have none, or one without a target
    if attribute is None or "target" not in inspect.signature(attribute).parameters:
        return False
    return item.__name__ not in REFUSED and not item.__name__.startswith(("Neuron", "LLM", "RemoteLLM"))


def _baselines(images_bCHW: Tensor, baseline: Baseline) -> Tensor:
    return torch.stack([resolve_baseline(image, baseline).expand_as(image) for image in images_bCHW])


def _submodule(model: nn.Module, name: str) -> nn.Module:
    modules = dict(getattr(model, "backbone", model).named_modules())
    if name not in modules:
        raise UnknownNameError("layer", name, [known for known in modules if known])
    return modules[name]


def _check_model(class_name: str, model: nn.Module) -> None:
    """Refuse a model for which Captum would give something else than the method's name says."""
    kind = type(getattr(model, "backbone", model)).__name__
    if class_name in RELU_CLASSES and not any(isinstance(module, nn.ReLU) for module in model.modules()):
        raise ModelError(f"captum:{class_name} changes the gradient of nn.ReLU modules, and {kind} has none")
    if class_name in DEEP_LIFT_CLASSES and isinstance(getattr(model, "backbone", model), VisionTransformer):
        raise ModelError(f"captum:{class_name} has no rules for the attention and LayerNorm of {kind}")


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list) else value


@contextmanager
def _seeded(key: DrawKey, device: torch.device) -> Iterator[None]:
    """Seed the global streams that Captum draws from by the image's key, and put them back afterwards."""
    before = np.random.get_state()  # noqa: NPY002
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        seed = int(key.generator("captum").integers(2**32))
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            yield
        finally:
            np.random.set_state(before)  # noqa: NPY002
