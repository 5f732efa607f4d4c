"""Loading classifiers: every form a checkpoint comes in, what it records, and what is refused."""

import argparse
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from xaibatch.data.decode import DecodedImage
from xaibatch.data.preprocess import Preprocessing
from xaibatch.errors import ConfigError, ModelError, UnknownNameError
from xaibatch.models.checkpoint import class_names_of, read_checkpoint
from xaibatch.models.load import load_model

NAME = "test_vit"
"""timm's own small ViT: images of 160 pixels, 0.4 million parameters."""


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return dict(load_model(NAME, class_names=("a", "b", "c"), seed=3).backbone.state_dict())


def saved(path: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    safetensors.torch.save_file(state, path, metadata)
    return str(path)


def same_weights(model: torch.nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, state[key]) for key, value in model.backbone.state_dict().items())


def test_safetensors_with_metadata(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = saved(tmp_path / "m.safetensors", state, {"classes": "COVID-19, Normal,Other", "mean": "0.5", "std": "0.2"})
    model = load_model(NAME, checkpoint=path)
    assert same_weights(model, state)
    assert model.class_names == ("COVID-19", "Normal", "Other")
    assert model.preprocessing == Preprocessing(
        image_size=(160, 160), resize_short=182, mean=(0.5,), std=(0.2,), grey=True, source="checkpoint metadata"
    )
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert (model.name, model.source.kind, model.source.checkpoint) == (NAME, "checkpoint", path)
    assert model.source.classes_from == "the checkpoint"
    assert model(torch.zeros(2, 3, 160, 160)).shape == (2, 3)


def test_the_real_checkpoint_gives_the_golden_logits(shared: Path) -> None:
    golden = np.load(shared / "golden" / "tiny_others.npz")
    images = np.load(shared / "golden" / "tiny_lrp.npz")["x"][:4]
    path = str(shared / "models" / "vit_tiny_cxr3.safetensors")
    model = load_model("vit_tiny_patch16_224", checkpoint=path)
    assert model.class_names == ("COVID-19", "Pneumonia", "Normal")
    assert next(model.parameters()).dtype == torch.float32
    np.testing.assert_allclose(model(torch.from_numpy(images)).numpy(), golden["logits_f32"][:4], atol=2e-6)
    double = load_model("vit_tiny_patch16_224", checkpoint=path, dtype=torch.float64)
    logits = double(torch.from_numpy(images).double()).numpy()
    np.testing.assert_allclose(logits, golden["logits_f64"][:4], atol=1e-12)
    # The recorded mean and deviation are those of SOURCES.md before rounding to four digits.
    assert model.preprocessing.mean == pytest.approx((0.5509,), abs=5e-5)
    assert model.preprocessing.std == pytest.approx((0.2387,), abs=5e-5)
    assert (model.preprocessing.resize_short, model.preprocessing.image_size) == (256, (224, 224))


@pytest.mark.parametrize(
    ("nest", "key"),
    [
        (lambda state: state, ""),
        (lambda state: {"state_dict": state, "epoch": 3}, "state_dict"),
        (lambda state: {"model": state, "optimizer": {"lr": 0.1}, "args": argparse.Namespace(lr=1)}, "model"),
        (lambda state: {"model_state_dict": state}, "model_state_dict"),
        (lambda state: {"best": torch.ones(1), "model_ema": state}, "model_ema"),
        (lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}}, "state_dict"),
        (lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()}, ""),
        (lambda state: {f"backbone.{k}": v for k, v in state.items()}, ""),
        (lambda state: {"state_dict": {f"model.{k}": v for k, v in state.items()}}, "state_dict"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_weights_only_files_of_every_nesting(
    tmp_path: Path, state: dict[str, Tensor], nest: Callable[[dict[str, Tensor]], Any], key: str, suffix: str
) -> None:
    torch.save(nest(state), tmp_path / f"m{suffix}")
    model = load_model(NAME, checkpoint=str(tmp_path / f"m{suffix}"), class_names=("x", "y", "z"))
    assert same_weights(model, state)
    assert (model.source.nested_under, model.class_names) == (key, ("x", "y", "z"))


def test_half_precision_weights_are_cast(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = saved(tmp_path / "m.safetensors", {key: value.half() for key, value in state.items()})
    for dtype in (torch.float32, torch.float64):
        model = load_model(NAME, checkpoint=path, dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert torch.equal(model.backbone.head.weight, state["head.weight"].half().to(dtype))


def test_a_remote_checkpoint_and_its_json(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = saved(tmp_path / "m.safetensors", state)
    memory = fsspec.filesystem("memory")
    memory.pipe("/models/m.safetensors", Path(path).read_bytes())
    memory.pipe("/models/m.json", b'{"classes": ["a", "b", "c"]}')
    remote, local = load_model(NAME, checkpoint="memory://models/m.safetensors"), load_model(NAME, checkpoint=path)
    assert same_weights(remote, state)
    assert remote.source.sha256 == local.source.sha256
    assert (remote.class_names, local.class_names) == (("a", "b", "c"), ("0", "1", "2"))
    assert remote.source.classes_from == "the checkpoint or m.json beside it"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("m.safetensors.json", ["a", "b", "c"], ("a", "b", "c")),
        ("m.json", {"classes": "x,y,z"}, ("x", "y", "z")),
        ("classes.json", {"0": "a", "2": "c", "1": "b"}, ("a", "b", "c")),
        ("classes.json", {"c": 2, "a": 0, "b": 1}, ("a", "b", "c")),
        ("config.json", {"architecture": NAME, "label_names": ["q", "r", "s"]}, ("q", "r", "s")),
        ("config.json", {"id2label": {"0": "a", "1": "b", "2": "c"}}, ("a", "b", "c")),
    ],
)
def test_class_names_from_a_json_beside(
    tmp_path: Path, state: dict[str, Tensor], name: str, content: Any, expected: tuple[str, ...]
) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    path = saved(tmp_path / "m.safetensors", state)
    assert load_model(NAME, checkpoint=path, data_class_names=("0", "1", "2")).class_names == expected
    # What the file itself records wins, and what the caller names wins over both.
    path = saved(tmp_path / "m.safetensors", state, {"classes": "i,j,k"})
    assert load_model(NAME, checkpoint=path).class_names == ("i", "j", "k")
    assert load_model(NAME, checkpoint=path, class_names=("1", "2", "3")).class_names == ("1", "2", "3")


def test_class_names_from_the_data_and_wrong_numbers(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = saved(tmp_path / "m.safetensors", state)
    model = load_model(NAME, checkpoint=path, data_class_names=("a", "b", "c"))
    assert (model.class_names, model.source.classes_from) == (("a", "b", "c"), "the data")
    with pytest.raises(ModelError, match=r"has 3 classes but the data names 2 \(a, b\)"):
        load_model(NAME, checkpoint=path, data_class_names=("a", "b"))
    with pytest.raises(ModelError, match=r"has 3 classes but the caller names 4"):
        load_model(NAME, checkpoint=path, class_names=("a", "b", "c", "d"))
    with pytest.raises(ModelError, match="a class name twice"):
        load_model(NAME, checkpoint=path, class_names=("a", "b", "a"))
    assert class_names_of({"class_names": '["a, b", "c"]'}) == ("a, b", "c")
    (tmp_path / "classes.json").write_text("{not json")
    with pytest.raises(ModelError, match=r"classes\.json beside the checkpoint is not JSON"):
        load_model(NAME, checkpoint=path)


# -- refused


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("evil-was-here"),))


def test_a_pickle_that_wants_to_run_code_is_refused(
    tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": state, "hook": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"model": Evil()}))
    torch.save(load_model(NAME), tmp_path / "whole.pt")
    for name in ("evil.pth", "plain.pth", "whole.pt"):
        with pytest.raises(
            ModelError, match=r"is refused: .* holds Python objects .*could run code .*save_file"
        ) as caught:
            load_model(NAME, checkpoint=str(tmp_path / name))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "evil-was-here").exists()


def test_files_that_are_no_checkpoint(tmp_path: Path, state: dict[str, Tensor]) -> None:
    good = Path(saved(tmp_path / "good.safetensors", state)).read_bytes()
    torch.save(state, tmp_path / "good.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    files = {
        "cut.safetensors": (good[: len(good) // 2], "truncated or no safetensors"),
        "header.safetensors": (good[:50], "truncated or no safetensors"),
        "zero.safetensors": (b"", "truncated or no safetensors"),
        "text.safetensors": (b"hello" * 100, "truncated or no safetensors"),
        "cut.pth": ((tmp_path / "good.pth").read_bytes()[:5000], "truncated or no PyTorch file"),
        "zero.pth": (b"", "truncated or no PyTorch file"),
        "text.pth": (b"hello" * 100, "truncated or no PyTorch file"),
        "m.onnx": (b"", "expected a file ending in .safetensors"),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError, match=message) as caught:
            load_model(NAME, checkpoint=str(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="holds no weights at its top level nor under state_dict"):
        load_model(NAME, checkpoint=str(tmp_path / "empty.pth"))
    with pytest.raises(ModelError, match="no checkpoint at"):
        load_model(NAME, checkpoint=str(tmp_path / "missing.safetensors"))
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ModelError, match="cannot be read"):
        load_model(NAME, checkpoint=str(tmp_path / "folder.safetensors"))


def test_a_checkpoint_that_does_not_fit_names_the_keys(tmp_path: Path, state: dict[str, Tensor]) -> None:
    odd = {key: value for key, value in state.items() if key != "norm.bias"}
    odd |= {f"extra.{index}": torch.zeros(1) for index in range(6)}
    odd["blocks.0.mlp.fc1.bias"] = torch.zeros(5)
    with pytest.raises(ModelError) as caught:
        load_model(NAME, checkpoint=saved(tmp_path / "m.safetensors", odd))
    text = str(caught.value)
    assert (
        "does not fit 'test_vit': 1 missing (norm.bias); 6 unexpected (extra.0, extra.1, extra.2, extra.3 and 2 more)"
        in text
    )
    assert (
        f"1 of another shape (blocks.0.mlp.fc1.bias is (5,), expected {tuple(state['blocks.0.mlp.fc1.bias'].shape)})"
        in text
    )
    headless = {key: value for key, value in state.items() if not key.startswith("head")}
    with pytest.raises(ModelError, match="no classification layer"):
        load_model(NAME, checkpoint=saved(tmp_path / "m.safetensors", headless))
    broken = {**state, "norm.bias": torch.full_like(state["norm.bias"], torch.nan)}
    with pytest.raises(ModelError, match=r"'norm.bias' holds values that are not finite"):
        load_model(NAME, checkpoint=saved(tmp_path / "m.safetensors", broken))
    twice = {**state, "module.norm.bias": state["norm.bias"].clone()}
    with pytest.raises(ModelError, match="'norm\\.bias' more than once"):
        read_checkpoint(saved(tmp_path / "m.safetensors", twice))


def test_names_and_arguments_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean 'vit_tiny_patch16_224'\?") as caught:
        load_model("vit_tinny_patch16_224")
    assert len(str(caught.value)) < 500
    with pytest.raises(ModelError, match="not both"):
        load_model(NAME, checkpoint="x.safetensors", pretrained=True)
    with pytest.raises(ModelError, match="cannot load timm's 'test_resnet'"):
        load_model("test_resnet", model_options={"embed_dim": 3})
    with pytest.raises(ConfigError, match=r"unknown option 'resize'. Did you mean 'resize_short'"):
        load_model(NAME, preprocessing={"resize": 256})


# -- image size, channels, preprocessing


def test_the_image_size_follows_from_the_position_embedding(tmp_path: Path) -> None:
    small = load_model(NAME, class_names=("a", "b"), model_options={"img_size": 96, "in_chans": 1})
    path = saved(tmp_path / "m.safetensors", dict(small.backbone.state_dict()))
    model = load_model(NAME, checkpoint=path)
    assert same_weights(model, small.backbone.state_dict())
    assert model.preprocessing.image_size == (96, 96)
    assert model.preprocessing.channels == 1
    images = torch.rand(2, 1, 96, 96)
    assert torch.equal(model(images), small(images))
    with pytest.raises(ModelError, match=r"is for images of 96 pixels, the model is built for 128: set img_size to 96"):
        load_model(NAME, checkpoint=path, model_options={"img_size": 128})


def test_a_position_embedding_without_square_grid_is_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    odd = {**state, "pos_embed": torch.zeros(1, 95, 64)}
    with pytest.raises(ModelError, match=r"pos_embed is \(1, 95, 64\), expected \(1, 101, 64\)"):
        load_model(NAME, checkpoint=saved(tmp_path / "m.safetensors", odd))


@pytest.mark.parametrize(
    "name", ["test_vit", "test_vit2", "test_resnet", "test_convnext", "deit_tiny_distilled_patch16_224"]
)
def test_other_timm_models_load_their_own_checkpoints(tmp_path: Path, name: str) -> None:
    first = load_model(name, class_names=("a", "b"), seed=5)
    model = load_model(name, checkpoint=saved(tmp_path / "m.safetensors", dict(first.backbone.state_dict())))
    assert same_weights(model, first.backbone.state_dict())
    images = torch.rand(1, 3, *model.preprocessing.image_size)
    assert torch.equal(model(images), first(images))
    assert model(images).shape == (1, 2)


def test_preprocessing_of_timm_and_changes_by_the_caller() -> None:
    model = load_model("vit_tiny_patch16_224", class_names=("a", "b"))
    config = timm.get_pretrained_cfg("vit_tiny_patch16_224")
    assert model.preprocessing.source == "timm configuration"
    assert model.preprocessing.mean == config.mean
    assert model.preprocessing.interpolation == config.interpolation
    assert model.preprocessing.resize_short == int(224 / config.crop_pct)
    changed = load_model("vit_tiny_patch16_224", preprocessing={"resize_short": 224, "value_range": "min_max"})
    assert changed.preprocessing.resize_short == 224
    assert changed.preprocessing.source == "timm configuration, changed by the caller"


def test_a_checkpoint_can_record_its_whole_preprocessing(tmp_path: Path, state: dict[str, Tensor]) -> None:
    whole = Preprocessing(
        image_size=(160, 160),
        resize_short=200,
        mean=(0.4,),
        std=(0.3,),
        value_range="min_max",
        source="checkpoint metadata",
    )
    path = saved(tmp_path / "m.safetensors", state, {"preprocessing": whole.model_dump_json()})
    assert load_model(NAME, checkpoint=path).preprocessing == whole
    with pytest.raises(
        ModelError, match=r"images of 3 channels and \(96, 96\) pixels, the model takes 3 .*\(224, 224\)"
    ):
        load_model("vit_tiny_patch16_224", preprocessing={"image_size": (96, 96)})
    with pytest.raises(ModelError, match="images of 1 channels"):
        load_model(NAME, preprocessing={"channels": 1, "mean": [0.5], "std": [0.5]})
    path = saved(tmp_path / "m.safetensors", state, {"mean": "0.1", "std": "0"})
    with pytest.raises(ModelError, match=r"preprocessing cannot be used: .*std must be positive"):
        load_model(NAME, checkpoint=path)


# -- determinism


def test_initial_weights_depend_on_the_seed_only_and_touch_no_global_state() -> None:
    before = torch.random.get_rng_state()
    one, two, other = (load_model(NAME, class_names=("a", "b"), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert same_weights(one, dict(two.backbone.state_dict()))
    assert not same_weights(one, dict(other.backbone.state_dict()))
    assert one.source.kind == "untrained"


def test_a_classifier_is_pickled_with_everything_it_knows() -> None:
    model = load_model(NAME, class_names=("a", "b"))
    copy = pickle.loads(pickle.dumps(model))
    assert (copy.class_names, copy.preprocessing, copy.source) == (model.class_names, model.preprocessing, model.source)
    image = DecodedImage(values=np.full((200, 220), 7, np.uint8), full_range=255.0)
    batch = torch.from_numpy(copy.preprocessing.apply(image))[None]
    assert torch.equal(copy(batch), model(batch))
