"""Training runs: against themselves after a kill, what they leave, and two workers of Ray."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from tests.engine_cluster import ROOT
from tests.toy_training import TINY, make_toy, options
from xaibatch.cli import main
from xaibatch.cli.train import options_from
from xaibatch.data.dataset import open_dataset
from xaibatch.errors import ConfigError, DataError, ModelError, RunFolderError, UnknownNameError
from xaibatch.models.load import load_model
from xaibatch.training.alone import train_alone
from xaibatch.training.fit import Place, fit
from xaibatch.training.model import Averaged, starting_model, with_kept_patches


@pytest.fixture
def toy(tmp_path):
    """60 noisy squares, bright in the upper left for class b; patients and splits in a manifest."""
    return make_toy(tmp_path / "toy")


class KilledError(Exception):
    pass


def test_a_killed_run_ends_as_if_it_had_not_been_killed(toy, tmp_path):
    whole, broken = options(toy, tmp_path), options(toy, tmp_path, output=str(tmp_path / "broken"))
    fit(whole, Place(), report=lambda _: None)

    def kill(row):
        if row["epoch"] == 2:
            raise KilledError

    with pytest.raises(KilledError):
        fit(broken, Place(), report=kill)
    lines = []
    fit(broken, Place(), report=lambda _: None, say=lines.append)
    assert any("resuming after epoch 2 of 3" in line for line in lines)
    states = [torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("run", "broken")]
    for name, value in states[0]["averaged"].items():
        torch.testing.assert_close(states[1]["averaged"][name], value, rtol=0, atol=0)
    a, b = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("run", "broken"))
    assert a == b
    with pytest.raises(RunFolderError, match=r"learning_rate was 0\.002, now 0\.001"):
        fit(options(toy, tmp_path, learning_rate=1e-3), Place(), report=lambda _: None)


def test_a_run_learns_and_leaves_what_the_evaluation_takes(toy, tmp_path):
    run = options(toy, tmp_path, epochs=8)
    train_alone(run)
    results = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert results["test"]["balanced_accuracy"] >= 0.9
    assert results["val"]["num_images"] == 12
    with Image.open(tmp_path / "run" / "learning_curve.png") as picture:
        assert picture.size[0] > 500
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in history] == list(range(1, len(history) + 1))
    model = load_model(TINY, checkpoint=str(tmp_path / "run" / "model.safetensors"))
    assert model.class_names == ("a", "b")
    assert model.preprocessing.image_size == (32, 32)
    assert model.preprocessing.resize_short == 36
    with safe_open(tmp_path / "run" / "model.safetensors", "pt") as file:
        assert {"classes", "mean", "std", "input_size", "preprocessing", "options"} <= set(file.metadata())
    # The evaluation's own reader and loader reach the recorded accuracy.
    from xaibatch.data.load import load_shard
    from xaibatch.types import Shard

    records = open_dataset(str(toy), split="test").records
    batch, _ = load_shard(Shard(index=0, records=records), model.preprocessing, model.class_names)
    logits = model(torch.from_numpy(batch.images_BCHW))
    assert (logits.argmax(1).numpy() == batch.labels_B).mean() == pytest.approx(results["test"]["accuracy"])


def test_patience_and_clock_end_a_run(toy, tmp_path):
    train_alone(options(toy, tmp_path, epochs=30, learning_rate=1e-9, warmup_epochs=0, patience=2))
    assert len((tmp_path / "run" / "history.jsonl").read_text().splitlines()) == 3
    other = options(toy, tmp_path, output=str(tmp_path / "clock"), epochs=30, max_minutes=1e-4)
    train_alone(other)
    assert len((tmp_path / "clock" / "history.jsonl").read_text().splitlines()) == 1


def test_start_weights_come_from_a_file_and_the_head_anew(toy, tmp_path):
    train_alone(options(toy, tmp_path, epochs=1))
    path = str(tmp_path / "run" / "model.safetensors")
    again = options(toy, tmp_path, checkpoint=path, output=str(tmp_path / "next"))
    model, words = starting_model(again, ("x", "y", "z"))
    assert "head.bias, head.weight anew" in words
    with safe_open(path, "pt") as file:
        torch.testing.assert_close(model.state_dict()["cls_token"], file.get_tensor("cls_token"))
    with pytest.raises(ModelError, match="does not fit"):
        starting_model(options(toy, tmp_path, model="vit_tiny_patch16_224", checkpoint=path), ("x", "y"))
    with pytest.raises(UnknownNameError):
        starting_model(options(toy, tmp_path, model="vit_tiny_patch61"), ("x", "y"))


def test_patch_dropping_keeps_the_class_token_and_ends_with_the_context(toy, tmp_path):
    model, _ = starting_model(options(toy, tmp_path, drop_path=0.0), ("x", "y"))
    seen = []
    model.blocks[0].register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].shape[1]))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model.train()
    num_patches = model.patch_embed.num_patches
    with with_kept_patches(model, 0.5):
        model(images)
    model(images)
    assert seen == [model.num_prefix_tokens + round(num_patches / 2), model.num_prefix_tokens + num_patches]


def test_averaged_weights_by_hand():
    layer = torch.nn.Linear(1, 1, bias=False)
    averaged = Averaged(layer, decay=0.5)
    expected = layer.weight.item()
    for step in range(1, 6):
        layer.weight.data.fill_(float(step))
        averaged.update(layer)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert averaged.model.weight.item() == pytest.approx(expected, rel=1e-6)


def test_flags_and_files_become_options(tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text("data: here\noutput: there\nepochs: 5\n")
    made = options_from(file, {"epochs": 7}, ["augmentation.mirror_probability=0.5"])
    assert (made.data, made.epochs, made.augmentation.mirror_probability) == ("here", 7, 0.5)
    with pytest.raises(ConfigError, match="Did you mean 'learning_rate'"):
        options_from(file, {}, ["learning_rat=1"])
    with pytest.raises(ConfigError, match="needs --data"):
        options_from(None, {"output": "there"}, [])


@pytest.mark.parametrize("wrong", ["zoom=[2, 1]", "gamma=[0, 0]", "erase_side=[0.9, 2]", "contrast=[1, .inf]"])
def test_a_range_that_cannot_be_drawn_from_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"expected 0 < low <= high"):
        options_from(None, {"data": "here", "output": "there"}, [f"augmentation.{wrong}"])


@pytest.mark.parametrize("command", [["train", "--data", "x", "--address", "auto"], ["simulate", "--workers", "2"]])
def test_without_ray_a_cluster_s_flags_are_refused(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--no-ray", "-o", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert f"no use for {command[-2]}: leave out" in capsys.readouterr().err


def test_the_recipe_for_few_images_is_one_that_train_takes():
    from pathlib import Path

    from xaibatch.cli.train import options_from

    recipe = Path(__file__).parents[1] / "jobs" / "train-scratch.yaml"
    made = options_from(recipe, {"data": "here", "output": "there"}, [])
    assert made.initialisation == "mimetic"


@pytest.mark.filterwarnings("ignore:.*deprecated.*:DeprecationWarning")  # inside ray.data, which Ray Train imports
def test_ray_trains_with_two_workers(cluster, toy, tmp_path):
    from xaibatch.cluster.train import train_on_ray

    node = cluster.add_node(num_cpus=2)
    try:
        train_on_ray(options(toy, tmp_path, epochs=1, num_workers=2))
    finally:
        cluster.remove_node(node)
    assert len((tmp_path / "run" / "history.jsonl").read_text().splitlines()) == 1
    model = load_model(TINY, checkpoint=str(tmp_path / "run" / "model.safetensors"))
    assert model.class_names == ("a", "b")


def test_a_signal_ends_training_on_ray_cleanly(toy, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options(toy, tmp_path, epochs=1000).model_dump(mode="json")))
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "--config", str(tmp_path / "run.yaml")]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=clean)
    deadline = time.monotonic() + 180
    while not (history := tmp_path / "run" / "history.jsonl").exists() or not history.read_text():
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM, (tmp_path / "log").read_text()
    printed = (tmp_path / "log").read_text()
    assert printed.endswith("error: stopped by SIGTERM\n") and "Traceback" not in printed


def test_ray_is_not_started_for_data_that_leaks(tmp_path, monkeypatch):
    from xaibatch.cluster import train

    def start(engine):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(train, "connected", start)
    leaky = options(make_toy(tmp_path / "leaky", leak=True), tmp_path)
    with pytest.raises(DataError, match="more than one split"):
        train.train_on_ray(leaky)


def test_a_workers_own_error_is_found_inside_rays_wrappers():
    from ray.train import WorkerGroupError

    from xaibatch.cluster.train import _own_error

    mistake = DataError("training image cannot be used")
    assert _own_error(WorkerGroupError("a worker failed", {1: mistake})) is mistake
    assert _own_error(ValueError("anything else")) is None
