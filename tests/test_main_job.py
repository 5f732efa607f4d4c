"""The main job as a user types it: rows, resume, SIGKILL, one clear line for every bad input, exit codes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from safetensors.torch import save_file

from tests.toy import CLASSES, MODEL, toy_images
from xaibatch.cli import main
from xaibatch.cli.evaluate import FIRST_RUN, config_path
from xaibatch.config import load_config
from xaibatch.models.load import load_model
from xaibatch.results.parts import RunFolder

JOB = Path(__file__).resolve().parents[1] / "jobs" / "evaluate.py"
KEY = ["image_id", "explainer", "metric", "repeat"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return toy_images(tmp_path / "data", num_per_class=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy checkpoint as the training job writes it: weights, classes and preprocessing in the metadata."""
    model = load_model(MODEL["model.name"], class_names=CLASSES, model_options=MODEL["model.options"])
    path = tmp_path_factory.mktemp("model") / "toy.safetensors"
    metadata = {"classes": ",".join(CLASSES), "mean": "0.5", "std": "0.25"}
    save_file(model.backbone.state_dict(), path, metadata=metadata)
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration file small enough for a test."""
    content = {
        "model": {"options": {"depth": 2, "embed_dim": 48, "num_heads": 3, "patch_size": 8}},
        "explainers": {"transformer_lrp": {}, "random": {}},
        "metrics": {"faithfulness_correlation": {"num_runs": 6, "subset_size": 50}, "sparseness": {}},
        "engine": {"shard_size": 2, "batch_size": 16},
    }
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def arguments(data: Path, checkpoint: Path, config: Path, output: Path) -> list[str]:
    named = ["--model", "vit_tiny_patch16_224", "--checkpoint", str(checkpoint), "--config", str(config)]
    return [*named, "--data", str(data), "--output", str(output), "--no-report"]


def run(*args: str) -> int:
    """Exit code of `xaibatch evaluate --no-ray ...` in this process."""
    with pytest.raises(SystemExit) as exit_:
        main(["evaluate", "--no-ray", *args])
    return int(exit_.value.code or 0)


def scores(output: Path) -> pd.DataFrame:
    return RunFolder(str(output)).read("scores").to_pandas().set_index(KEY).sort_index()


def test_rows_and_second_run(
    data: Path, checkpoint: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--limit 3` of six images takes one of each class; every key once; the second run does nothing and says so."""
    args = [*arguments(data, checkpoint, config, tmp_path / "run"), "--limit", "3"]
    assert run(*args) == 0
    first = scores(tmp_path / "run")
    assert len(first) == 3 * 2 * 2
    assert first.index.is_unique
    assert first.reset_index().drop_duplicates("image_id").label.value_counts().to_dict() == dict.fromkeys(CLASSES, 1)
    capsys.readouterr()
    assert run(*args) == 0
    assert "everything is done" in capsys.readouterr().out
    pd.testing.assert_frame_equal(scores(tmp_path / "run"), first)


def test_job_on_ray_survives_sigkill(data: Path, checkpoint: Path, config: Path, tmp_path: Path) -> None:
    """The script on its own local Ray cluster, SIGKILLed once some parts exist, ends with an undisturbed run's rows."""
    args = arguments(data, checkpoint, config, tmp_path / "killed")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    job = subprocess.Popen([sys.executable, str(JOB), *args], env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240
    while not list((tmp_path / "killed").rglob("shard-*.parquet")) and time.monotonic() < deadline:
        assert job.poll() is None, job.stderr.read().decode() if job.stderr else ""
        time.sleep(0.02)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    again = subprocess.run([sys.executable, str(JOB), *args], env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert run(*arguments(data, checkpoint, config, tmp_path / "calm")) == 0
    killed, calm = (scores(tmp_path / name).drop(columns="run") for name in ("killed", "calm"))
    pd.testing.assert_frame_equal(killed, calm, check_exact=True)


def test_bad_images_become_rows(
    data: Path, checkpoint: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Zero-byte, truncated, foreign, one-pixel and bomb files: one failure each, all else scored, exit code 1."""
    good = data / "normal" / "0.png"
    bad = {
        "zero.png": b"",
        "truncated.png": good.read_bytes()[: len(good.read_bytes()) // 2],
        "text.png": b"not an image at all",
    }
    for name, content in bad.items():
        (data / "covid" / name).write_bytes(content)
    Image.new("L", (1, 1)).save(data / "covid" / "pixel.png")
    Image.new("1", (20_000, 20_000)).save(data / "covid" / "bomb.png")
    output = tmp_path / "a run"
    assert run(*arguments(data, checkpoint, config, output)) == 1
    printed = capsys.readouterr().out
    assert f"5 failures: xaibatch query '{output}'" in printed and "6 of the run's 11 images have scores" in printed
    failures = RunFolder(str(output)).read("failures").to_pandas()
    assert sorted(failures.image_id) == [f"covid/{n}" for n in sorted([*bad, "pixel.png", "bomb.png"])]
    assert failures.message.str.len().min() > 10
    table = scores(output)
    assert len(table) == 6 * 2 * 2
    assert (table.status == "ok").all()
    # everything that can be done is done: --accept-failures says so to whoever would start the command again
    assert run(*arguments(data, checkpoint, config, output), "--accept-failures") == 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (["--model", "vit_tiny_patch16_225"], "vit_tiny_patch16_224"),
        (["--model", "swin_tiny_patch4_window7_224"], "SwinTransformer"),
        (["--checkpoint", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--data", "nowhere"], "nowhere"),
        (["--explainers", "transformer_lpr"], "transformer_lrp"),
        (["--metrics", "faithfulness_corelation"], "faithfulness_correlation"),
        (["--metrics", "quantus:FaithfulnesCorrelation"], "FaithfulnessCorrelation"),
        (["--set", "engine.shardsize=3"], "shard_size"),
        (["--set", "explainers.lime.num_sample=3"], "num_samples"),
        (["--set", "metrics.sparseness.absolute=true"], "abs"),
        (["--set", "repeats"], "key.path=value"),
        (["--precision", "float16"], "bfloat16"),
        (["--config", "papre"], "paper"),
        (["--explainers", ","], "list explainers"),
        (["--set", "explainers={lime: 5}"], "explainers.lime"),
        (["--set", "metrics=3"], "metrics"),
        (["--set", "engine.shard_size.x=3", "--set", "engine.shard_size=2"], "shard_size"),
        (["--set", "model.pretrained=true"], "checkpoint and pretrained"),
        (["--gpus-per-replica", "2"], "--no-ray"),
        (["--output", "/proc/nowhere/run"], "--output"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_usage_errors(
    data: Path,
    checkpoint: Path,
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    expected: str,
) -> None:
    """One line that names what is wrong and what is known or to be done; exit code 2; nothing is left behind."""
    args = arguments(data, checkpoint, config, tmp_path / "run")
    if change[0] == "--model":
        args[args.index("--checkpoint") : args.index("--checkpoint") + 2] = [
            "--set",
            "model.options={}",
            "--set",
            "model.untrained=true",
        ]
    for flag in change[::2]:
        if flag in args and flag != "--set":
            del args[args.index(flag) : args.index(flag) + 2]
    assert run(*args, *change) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.glob("run/scores"))


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (["--replicas", "2"], "--replicas"),
        (["--gpus-per-replica", "0.5", "--address", "auto"], "--address, --gpus-per-replica"),
        (["--set", "engine.shards_in_flight=3", "--estimate"], "--set engine.shards_in_flight"),
        (["--set", "engine={replicas: 2}"], "--set engine.replicas"),
    ],
)
def test_without_ray_nothing_is_asked_of_a_cluster(
    asked: list[str],
    named: str,
    data: Path,
    checkpoint: Path,
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On the command line; a configuration file may serve both kinds of run."""
    assert run(*arguments(data, checkpoint, config, tmp_path / "run"), *asked) == 2
    message = capsys.readouterr().err
    assert f"no use for {named}: leave out" in message and message.count("\n") == 1
    config.write_text(config.read_text().replace("engine:", "engine:\n  replicas: 2", 1))
    if "--replicas" in asked:
        assert run(*arguments(data, checkpoint, config, tmp_path / "run")) == 0


def test_without_weights_nothing_is_explained(
    data: Path, checkpoint: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A forgotten --checkpoint is a usage error that names the ways out; random weights must be asked for by name."""
    args = arguments(data, checkpoint, config, tmp_path / "run")
    del args[args.index("--checkpoint") : args.index("--checkpoint") + 2]
    assert run(*args) == 2
    error = capsys.readouterr().err
    assert "--checkpoint" in error and "model.pretrained=true" in error and "model.untrained=true" in error
    assert not (tmp_path / "run").exists()
    assert run(*args, "--set", "model.untrained=true", "--set", "model.options.img_size=32", "--limit", "3") == 0
    assert RunFolder(str(tmp_path / "run")).read_json("run.json")["model"]["source"]["kind"] == "untrained"
    load_config(config_path("embedded"), FIRST_RUN).model.check_weights()  # the run without arguments has its own


def test_data_errors(
    data: Path, checkpoint: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A class folder without images, and a label that the model does not have, are named."""
    (data / "empty").mkdir()
    assert run(*arguments(data, checkpoint, config, tmp_path / "run")) == 2
    assert "empty" in capsys.readouterr().err
    (data / "normal" / "0.png").rename(data / "empty" / "0.png")
    assert run(*arguments(data, checkpoint, config, tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert "'empty'" in error
    assert "pneumonia" in error


def test_checkpoint_errors(
    data: Path, checkpoint: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A truncated checkpoint, and one of another model."""
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(checkpoint.read_bytes()[:1000])
    assert run(*arguments(data, broken, config, tmp_path / "run")) == 2
    assert "broken.safetensors" in capsys.readouterr().err
    args = arguments(data, checkpoint, config, tmp_path / "run")
    assert run(*args, "--set", "model.options.depth=3") == 2
    assert "blocks.2" in capsys.readouterr().err


def test_other_settings_need_another_folder(
    data: Path, checkpoint: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = arguments(data, checkpoint, config, tmp_path / "run")
    assert run(*args, "--metrics", "sparseness") == 0
    capsys.readouterr()
    assert run(*args, "--metrics", "sparseness", "--seed", "1") == 2
    error = capsys.readouterr().err
    assert "seed: 0 there, 1 now" in error
    assert "--output" in error


def test_results_are_not_left_where_ray_deletes_them(
    data: Path,
    checkpoint: Path,
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the copy of a working directory that `ray job submit` makes, an output inside the copy is refused."""
    copy = tmp_path / "working_dir_files" / "_ray_pkg_0123456789abcdef"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    args = arguments(data, checkpoint, config, Path("runs/first"))
    assert run(*args) == 2
    assert "--output runs/first" in capsys.readouterr().err
    del args[args.index("--output") : args.index("--output") + 2]
    assert run(*args) == 2
    assert "absolute path" in capsys.readouterr().err
    for command in (["simulate", "-o", "set"], ["train", "--data", str(data), "-o", "model"]):
        with pytest.raises(SystemExit) as exit_:
            main(command)
        assert exit_.value.code == 2 and "Ray deletes" in capsys.readouterr().err
    assert not list(copy.iterdir())


@pytest.mark.parametrize("command", [["simulate"], ["train", "--data", "xrays"], ["train", "--no-ray", "--data", "x"]])
def test_a_url_is_not_taken_for_a_folder(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--output", "s3://bucket/set"])
    assert exit_.value.code == 2
    assert "'s3://bucket/set' is a URL" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_truncated_part_is_made_again(data: Path, checkpoint: Path, config: Path, tmp_path: Path) -> None:
    """A part that something else cut short is noticed, and its cell done again."""
    args = arguments(data, checkpoint, config, tmp_path / "run")
    assert run(*args) == 0
    first = scores(tmp_path / "run")
    part = next((tmp_path / "run" / "scores").rglob("*.parquet"))
    part.write_bytes(part.read_bytes()[:100])
    run(*args)
    assert pq.read_table(part).num_rows
    pd.testing.assert_frame_equal(scores(tmp_path / "run"), first)
