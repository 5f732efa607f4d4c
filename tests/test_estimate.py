"""What a run is said to cost: the count equals what the run then does, and reads as a sentence."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.toy import Watch, toy_config, toy_images
from xaibatch.cli.estimating import described, estimate_lines
from xaibatch.pipeline.estimate import TRACE_WORTH, Estimate
from xaibatch.pipeline.local import run_local
from xaibatch.pipeline.run import evaluate

SETTINGS: dict[str, Any] = {
    "explainers": {"transformer_lrp": {}, "lime": {"num_samples": 24, "segmentation": "grid"}, "random": {}},
    "metrics": {
        "faithfulness_correlation": {"num_runs": 8, "subset_size": 100},
        "avg_sensitivity": {"num_samples": 2},
        "sparseness": {},
    },
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_images(tmp_path_factory.mktemp("images"), num_per_class=2)


@pytest.mark.parametrize("repeats", [1, 2])
def test_the_count_is_what_the_run_does(images: Path, tmp_path: Path, repeats: int) -> None:
    watch = Watch()
    evaluate(toy_config(images, tmp_path / "run", **SETTINGS, repeats=repeats), run_local, watch)
    expected = watch.expected
    explanation = 1 + 1 + 24  # prediction, trace, LIME's samples
    assert expected.by_label == {
        "prediction and trace": 6 * 2,
        "lime": 6 * 24 * repeats,
        "avg_sensitivity": 6 * repeats * 2 * explanation,
        "faithfulness_correlation": 6 * repeats * 8,
    }
    assert expected.num_forward_passes == sum(expected.by_label.values())
    assert expected.num_forward_passes == sum(report.num_forward_passes for report in watch.reports)
    num_traces = 6 + 6 * repeats * 2
    assert expected.worth == expected.num_forward_passes + num_traces * (TRACE_WORTH - 1)


def test_the_estimate_reads_as_a_sentence(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes per label, a time and what it rests on, and what calls the model itself; nothing is written."""
    settings = SETTINGS | {"metrics": {"quantus:Sparseness": {}, "avg_sensitivity": {"num_samples": 2}}}
    config = toy_config(images, tmp_path / "run", **settings)
    text = "\n".join(estimate_lines(config))
    assert "6 images" in text and "468 forward passes" in text and "Estimate(" not in text
    assert "  lime                            144   31%" in text
    assert "for one model replica, at the" in text and "measured on this machine" in text
    assert "in part: quantus:Sparseness, which call the model themselves" in text
    assert "the cluster's devices" not in text
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "the cluster's devices may be faster or slower" in "\n".join(estimate_lines(config))


def test_a_gpu_of_the_cluster_is_not_measured_here(images: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    config = toy_config(images, tmp_path / "run", **SETTINGS, engine__device="cuda")
    text = "\n".join(estimate_lines(config))
    assert "on this machine's CPU" in text and "the cluster's devices may be faster or slower" in text


def test_a_finished_run_costs_nothing_more(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without loading the model; what is left of an unfinished run is reckoned at this machine's rate, not at that of
    the one that began it."""
    config = toy_config(images, tmp_path / "run", **SETTINGS)
    outcome = evaluate(config, run_local, Watch())
    with monkeypatch.context() as patch:
        patch.setattr("xaibatch.pipeline.facts.load_model", lambda *_, **__: pytest.fail("loaded"))
        assert estimate_lines(config) == ["everything is done: nothing to run"]
    next((tmp_path / "run" / "scores").rglob("*.parquet")).unlink()
    outcome.folder.write_json(
        outcome.record | {"model": outcome.record["model"] | {"forward_passes_per_second": 1e-6}}, "run.json"
    )
    (text,) = [line for line in estimate_lines(config) if "just measured on this machine" in line]
    assert " 0 forward passes a second" not in text


def test_hours_are_hours() -> None:
    expected = Estimate(
        num_images=144, num_cells=72, num_forward_passes=400_000, worth=420_000, seconds=17_533.29, by_label={"a": 1}
    )
    text = "\n".join(described(expected, "cuda", remote=False))
    assert "about 4 h 52 min" in text and "24 forward passes a second" in text and "one of this machine's GPUs" in text
