"""Random numbers that mean different things come from different streams."""

import ast
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import xaibatch
from xaibatch.metrics import METRICS
from xaibatch.metrics.base import ImageView, NoisyVariant
from xaibatch.seeding import DrawKey

SHAPE = (3, 16, 16)


def written(node: ast.expr) -> str | None:
    """A string as the code writes it, `{}` for what it fills in; None for what is no string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return None


def streams() -> dict[str, tuple[str, str | None]]:
    """File and line -> purpose and image id of every keyed generator that the package asks for by a purpose of its own.

    A plan of normal noise is told its purpose ("{}:{}" where it draws), so where the plan is made counts.
    """
    found = {}
    root = Path(xaibatch.__file__).parent
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            given = {str(keyword.arg): keyword.value for keyword in node.keywords}
            image_id: str | None = "{}"
            if name == "generator" and len(node.args) == 1:
                purpose = written(node.args[0])
            elif name == "keyed_generator":
                purpose, image_id = written(node.args[2]), written(node.args[1]) or "{}"
                image_id = "" if isinstance(node.args[1], ast.Constant) and not node.args[1].value else image_id
            elif name == "GaussianNoisePlan":
                purpose = f"{written(given['purpose'])}:{{}}"
            else:
                continue
            if purpose is not None and purpose != "{}:{}":
                found[f"{path.relative_to(root)}:{node.lineno}"] = (purpose, image_id)
    return found


def test_no_purpose_is_used_for_two_things() -> None:
    """Not even where the numbers that a purpose is filled with happen to agree."""
    found = streams()
    assert {purpose for purpose, _ in found.values()} >= {
        "lime", "rise", "noise:{}", "noise_tunnel:{}", "smooth_mprt:{}", "local_lipschitz_estimate:{}", "randomise",
    }  # fmt: skip
    for (here, first), (there, second) in itertools.permutations(found.items(), 2):
        may_meet = all(
            re.fullmatch(re.escape(pattern).replace(r"\{\}", ".*"), text.replace("{}", "0"))
            for pattern, text in zip(map(str, first), map(str, second), strict=True)
        )
        assert not may_meet, f"{here} and {there} draw the same numbers for {second[0]!r}"


@pytest.mark.parametrize("metric", ["local_lipschitz_estimate", "smooth_mprt", "avg_sensitivity"])
def test_a_metrics_noise_is_not_the_noise_inside_smoothgrad(metric: str) -> None:
    """Nor that of the explanation of a noisy copy with the image's own draws (`draws: paired`)."""
    import captum.attr

    from xaibatch.explainers.captum_adapter import KeyedNoiseTunnel

    key = DrawKey(seed=0, image_id="a.png")
    image_CHW = np.random.default_rng(0).random(SHAPE)
    view = ImageView(
        key=key, shape_CHW=SHAPE, label=0, predicted=0, logits_K=np.zeros(2), image_CHW=image_CHW, target=0
    )
    asks = [ask for ask in METRICS[metric](num_samples=4).variants(view) if isinstance(ask, NoisyVariant)]
    noise = [ask.plan.noise_CHW(ask.sample, SHAPE).ravel() for ask in asks]
    tunnel = KeyedNoiseTunnel(captum.attr.Saliency(nn.Identity()), key)
    inner = tunnel._add_noise_to_input(torch.zeros(1, *SHAPE, dtype=torch.float64), 0.5, 4).numpy().reshape(4, -1)
    correlations = np.corrcoef([*noise, *inner])[: len(noise), len(noise) :]
    assert np.abs(correlations).max() < 5 / np.sqrt(image_CHW.size)
