"""Models that register tensor hooks inside forward: stock Quantus fails on them, the adapter does not."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.adapter_bench import SMALL, outcomes_of
from tests.metrics_oracle import Bench, near
from xaibatch.metrics import resolve_metric
from xaibatch.metrics.quantus_gradients import gradients_allowed
from xaibatch.types import OK


class Hooked(nn.Module):
    """Keeps the gradient of its features, as relevance and attention-gradient models do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Bench(num=1).model

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        features = self.net.patches(images_BCHW.double())
        features.register_hook(lambda gradient: None)
        hidden = torch.nn.functional.gelu(features).flatten(1)
        return self.net.head(torch.tanh(self.net.hidden(hidden))) * 3


def test_a_model_with_hooks_fails_in_stock_quantus_and_not_with_gradients_allowed() -> None:
    bench = Bench(num=2)
    plain = bench.quantus("FaithfulnessEstimate", features_in_step=128)
    bench.model = Hooked().eval()  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="cannot register a hook"):
        bench.quantus("FaithfulnessEstimate", features_in_step=128)
    bench.model = gradients_allowed(bench.model)  # type: ignore[assignment]
    near(bench.quantus("FaithfulnessEstimate", features_in_step=128), plain, 1e-9)


@pytest.mark.parametrize("name", ["MPRT", "EfficientMPRT", "RelativeRepresentationStability"])
def test_metrics_that_load_a_model_with_hooks_run_through_the_adapter(name: str) -> None:
    bench = Bench(num=1).explained()
    metric = resolve_metric(f"quantus:{name}")(**SMALL.get(name, {}))
    (plain,) = outcomes_of(metric, bench)
    bench.model = Hooked().eval()  # type: ignore[assignment]
    (hooked,) = outcomes_of(metric, bench)
    assert hooked.status == OK
    near(hooked.value, plain.value, 1e-6)


def test_hooks_on_layers_see_readable_outputs_and_stay_as_they_were() -> None:
    """A hook that needs the graph keeps it; one that makes an array of the output gets it detached."""
    model = Hooked().eval()
    seen: dict[str, Any] = {}
    model.net.hidden.register_forward_hook(lambda _, inputs, output: seen.update(graph=output.requires_grad))
    model.net.head.register_forward_hook(lambda _, inputs, output: seen.update(array=output.numpy()))
    hooks = [dict(module._forward_hooks) for module in model.modules()]
    with torch.no_grad():
        gradients_allowed(model)(torch.zeros(1, 3, 32, 32))
    assert seen["graph"] is True and seen["array"].shape == (1, 3)
    assert [dict(module._forward_hooks) for module in model.modules()] == hooks

    def failing(_: Any, inputs: Any, output: Any) -> None:
        raise RuntimeError("mine")

    model.net.head.register_forward_hook(failing)
    with pytest.raises(RuntimeError, match="mine"):
        gradients_allowed(model)(torch.zeros(1, 3, 32, 32))


def test_allowing_gradients_leaves_the_model_as_it_was() -> None:
    model = Hooked().eval()
    allowed = gradients_allowed(model)
    assert type(model) is Hooked
    assert isinstance(allowed, Hooked)
    assert [name for name, _ in allowed.named_modules()] == [name for name, _ in model.named_modules()]
    assert allowed.state_dict()["net.head.bias"].data_ptr() == model.state_dict()["net.head.bias"].data_ptr()
    randomised = copy.deepcopy(allowed)
    randomised.net.head.reset_parameters()
    with torch.no_grad():
        x = torch.zeros(1, 3, 32, 32)
        assert not torch.equal(randomised(x), allowed(x))
        with pytest.raises(RuntimeError, match="cannot register a hook"):
            model(x)
