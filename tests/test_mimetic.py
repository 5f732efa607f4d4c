"""Mimetic initialisation: the products of weights that the paper prescribes, and attention that starts out local."""

import pytest
import timm
import torch
from torch import Tensor

from xaibatch.errors import ModelError
from xaibatch.training.mimetic import sinusoidal, start_mimetic
from xaibatch.training.model import starting_model
from xaibatch.training.options import TrainOptions

MODEL = "vit_tiny_patch16_224"


def options(**changes: object) -> TrainOptions:
    return TrainOptions.model_validate({"data": "here", "output": "there", "drop_path": 0.0, **changes})


@pytest.fixture(scope="module")
def vit() -> torch.nn.Module:
    model, note = starting_model(options(initialisation="mimetic"), ("a", "b"))
    assert note == "from scratch, mimetic"
    return model.eval()


def test_products_of_weights(vit: torch.nn.Module) -> None:
    """The value-projection product is 0.4 (Z - 1) exactly; a head's query-key product is the best approximation of
    0.7 (Z + 1) with the head's rank, so its singular values are the largest ones of such a matrix."""
    attention = vit.blocks[3].attn
    weight, width, head = attention.qkv.weight.detach().double(), 192, 64
    product_DD = weight[2 * width :].T @ attention.proj.weight.detach().double().T
    noise_DD = product_DD / 0.4 + torch.eye(width)
    assert noise_DD.mean().abs() < 0.002
    assert noise_DD.std() == pytest.approx(width**-0.5, rel=0.02)
    assert torch.diagonal(product_DD).mean() == pytest.approx(-0.4, abs=0.02)
    for number in range(3):
        rows = slice(number * head, (number + 1) * head)
        values = torch.linalg.svdvals(weight[:width][rows].T @ weight[width : 2 * width][rows])
        assert values[head:].max() < 1e-6 * values[0]
        drawn = torch.randn(width, width, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        expected = torch.linalg.svdvals(0.7 * drawn / width**0.5 + 0.7 * torch.eye(width))
        torch.testing.assert_close(values[:head], expected[:head], rtol=0.1, atol=0)


def test_position_embeddings(vit: torch.nn.Module) -> None:
    """The class token has none; a patch's own is closest to its neighbours' in both directions."""
    position_ND = vit.pos_embed.detach()[0]
    assert not position_ND[0].any()
    near_NN = position_ND[1:] @ position_ND[1:].T
    here = 5 * 14 + 6
    for step in (1, 14):
        assert near_NN[here, here] > near_NN[here, here + step] > near_NN[here, here + 3 * step]
    torch.testing.assert_close(sinusoidal(14, 14, 192), position_ND[1:])
    first_D, second_D = sinusoidal(1, 2, 8)
    torch.testing.assert_close(first_D, torch.tensor([0.0, 0, 1, 1, 0, 0, 1, 1]))
    torch.testing.assert_close(second_D[:4], torch.tensor([1.0, 0.01, 1.0, 0.01]).sin().where(
        torch.tensor([True, True, False, False]), torch.tensor([1.0, 0.01, 1.0, 0.01]).cos()
    ))  # fmt: skip


def local_share(model: torch.nn.Module) -> float:
    """Share of the first block's patch attention that stays within one patch of the query."""
    seen: list[Tensor] = []
    attention = model.blocks[0].attn
    handle = attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        model(torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)))
        handle.remove()
        batch, tokens, _ = seen[0].shape
        qkv = attention.qkv(seen[0]).reshape(batch, tokens, 3, 3, -1).permute(2, 0, 3, 1, 4)
        weights_NN = ((qkv[0] @ qkv[1].transpose(2, 3)) * attention.scale).softmax(-1).mean((0, 1))[1:, 1:]
    rows, columns = torch.meshgrid(torch.arange(14), torch.arange(14), indexing="ij")
    far_NN = torch.maximum(*((a.flatten()[:, None] - a.flatten()).abs() for a in (rows, columns)))
    return float((weights_NN * (far_NN <= 1)).sum() / weights_NN.sum())


def test_attention_starts_out_local(vit: torch.nn.Module) -> None:
    plain, _ = starting_model(options(), ("a", "b"))
    assert local_share(vit) > 2 * local_share(plain.eval())


def test_weights_hang_on_the_seed_only() -> None:
    before = torch.get_rng_state()
    one, two, other = (
        starting_model(options(initialisation="mimetic", seed=seed), ("a", "b"))[0].blocks[0].attn.qkv.weight
        for seed in (4, 4, 5)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_models_are_refused() -> None:
    with pytest.raises(ModelError, match="position embeddings"):
        start_mimetic(timm.create_model("test_resnet"), torch.Generator())
