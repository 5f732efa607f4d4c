"""What a checkpoint does not say about itself is told before anything is computed with it."""

from pathlib import Path

import pytest
from safetensors.torch import save_file

import xaibatch
from tests.toy import CLASSES, MODEL, Watch, toy_config, toy_images
from xaibatch.errors import ModelError
from xaibatch.pipeline.local import run_local
from xaibatch.pipeline.run import evaluate


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The toy model's weights without any metadata."""
    model = xaibatch.load_model(
        str(MODEL["model.name"]), class_names=CLASSES, model_options=MODEL["model.options"], seed=1
    )
    save_file(model.backbone.state_dict(), tmp_path / "bare.safetensors")
    return tmp_path / "bare.safetensors"


def test_guessed_classes_and_preprocessing_are_said(
    bare: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = {"explainers": {"random": {}}, "metrics": {"sparseness": {}}, "model__checkpoint": str(bare)}
    images = toy_images(tmp_path / "data", 1)
    assert evaluate(toy_config(images, tmp_path / "run", **few), run_local, Watch()).ok
    assert f"taken for {', '.join(sorted(CLASSES))}, in this order (from the data)" in caplog.text
    caplog.clear()
    named = few | {"model__class_names": list(CLASSES)}
    assert evaluate(toy_config(images, tmp_path / "named", **named), run_local, Watch()).ok
    assert "names no classes" not in caplog.text


def test_a_model_without_attention_is_told_which_explainers_fit(tmp_path: Path) -> None:
    config = toy_config(
        toy_images(tmp_path / "data", 1), tmp_path / "run", model__name="resnet18", model__options={},
        model__preprocessing={},
        explainers={"attention_rollout_max": {}}, metrics={"sparseness": {}},
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"explainer 'attention_rollout_max': .*every timm model: .*lime, .*rise"):
        evaluate(config, run_local, Watch())
