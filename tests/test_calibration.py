"""`precision: auto`: the error it states is the difference of two whole runs, the tolerance decides, and the choice is
kept with the run."""

from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from tests.toy import Watch, toy_config
from xaibatch.cluster.calibration import calibrate_on_ray
from xaibatch.pipeline import calibrate, run
from xaibatch.pipeline.job import Job
from xaibatch.pipeline.local import calibrate_local, run_local
from xaibatch.pipeline.run import Outcome, evaluate
from xaibatch.types import Shard

LIME = {"num_samples": 40, "segmentation": "grid"}
CORRELATION = {"num_runs": 8, "subset_size": 100}


FAST = calibrate.has_fast_bfloat16


@pytest.fixture(autouse=True)
def _worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small run calibrates too, and this machine counts as one whose bfloat16 is fast."""
    monkeypatch.setattr(run, "WORTH_IMAGES", 1)
    monkeypatch.setattr(calibrate, "has_fast_bfloat16", lambda device: True)


def calibrated(images: Path, output: Path, tolerance: float, **settings: Any) -> Outcome:
    """A run of one shard that calibrates on all of its twelve images."""
    asked = {
        "precision__default": "auto",
        "precision__tolerance": tolerance,
        "precision__num_images": 12,
        "engine__shard_size": 12,
    }
    outcome = evaluate(toy_config(images, output, **asked, **settings), run_local, Watch(), calibrate_local)
    assert outcome.ok
    return outcome


def mean_change(fine: Outcome, coarse: Outcome) -> dict[tuple[str, str], float]:
    """|difference of mean scores| of two runs by (explainer, metric)."""
    means = [
        outcome.folder.read("scores").to_pandas().groupby(["explainer", "metric"], observed=True)["score"].mean()
        for outcome in (fine, coarse)
    ]
    return dict((means[0] - means[1]).abs())


@pytest.mark.parametrize(
    ("label", "explainers", "metrics"),
    [
        (
            "faithfulness_correlation",
            {"transformer_lrp": {}, "random": {}},
            {"faithfulness_correlation": CORRELATION, "effective_complexity": {}},
        ),
        ("lime", {"lime": LIME, "random": {}}, {"effective_complexity": {"eps": 0.1}}),
    ],
    ids=["a metric's copies", "an explainer's copies"],
)
def test_the_stated_error_is_that_of_a_whole_run(
    images: Path, tmp_path: Path, label: str, explainers: dict[str, Any], metrics: dict[str, Any]
) -> None:
    """Under a tolerance that nothing meets all stays float32, under one that everything meets the label is computed in
    bfloat16; how far these two runs' means are apart is what the calibration had said in both."""
    settings = {"explainers": explainers, "metrics": metrics}
    fine = calibrated(images, tmp_path / "fine", 1e-12, **settings)
    coarse = calibrated(images, tmp_path / "coarse", 1e3, **settings)
    precisions = [outcome.folder.read_json("run.json")["precision"] for outcome in (fine, coarse)]
    assert set(precisions[0]["chosen"].values()) == {"float32"}
    assert {name for name, chosen in precisions[1]["chosen"].items() if chosen == "bfloat16"} == {label}
    (stated,) = precisions[0]["measured"]
    assert stated["worst_error"] == precisions[1]["measured"][0]["worst_error"] > 0
    change = mean_change(fine, coarse)
    assert max(change, key=lambda pair: change[pair]) == tuple(stated["worst_pair"])
    assert max(change.values()) == pytest.approx(stated["worst_error"], rel=1e-6)
    assert sorted(precisions[0]["sample"]) == sorted(set(fine.folder.read("predictions")["image_id"].to_pylist()))


def test_the_tolerance_lies_between(images: Path, tmp_path: Path) -> None:
    settings = {"explainers": {"lime": LIME}, "metrics": {"effective_complexity": {"eps": 0.1}}}
    first = calibrated(images, tmp_path / "first", 1e3, **settings).folder.read_json("run.json")["precision"]
    error = first["measured"][0]["worst_error"]
    for share, expected in ((1.01, "bfloat16"), (0.99, "float32")):
        folder = calibrated(images, tmp_path / expected, share * error, **settings).folder
        assert folder.read_json("run.json")["precision"]["chosen"]["lime"] == expected


def test_metrics_that_share_a_plan_share_its_precision(images: Path, tmp_path: Path) -> None:
    """The rank correlation moves more than Pearson's: at a tolerance between the two the common plan stays float32, and
    both labels say so, whichever comes first; above it both are computed in bfloat16."""
    metrics = {
        "a_pearson": {"use": "faithfulness_correlation", **CORRELATION},
        "b_spearman": {"use": "faithfulness_correlation", "similarity": "spearman", **CORRELATION},
    }
    alone = []
    for label, options in metrics.items():
        settings = {"explainers": {"random": {}}, "metrics": {label: options}}
        folder = calibrated(images, tmp_path / label, 1e3, **settings).folder
        alone.append(folder.read_json("run.json")["precision"]["measured"][0]["worst_error"])
    assert alone[0] != alone[1]
    for names in (list(metrics), list(reversed(metrics))):
        renamed = {f"{number}_{name[2:]}": metrics[name] for number, name in enumerate(names)}
        settings = {"explainers": {"random": {}}, "metrics": renamed}
        for tolerance, expected in ((sum(alone) / 2, "float32"), (1.01 * max(alone), "bfloat16")):
            folder = calibrated(images, tmp_path / f"{names[0]} {expected}", tolerance, **settings).folder
            precision = folder.read_json("run.json")["precision"]
            assert {name: precision["chosen"][name] for name in renamed} == dict.fromkeys(renamed, expected)
            assert [choice["label"] for choice in precision["measured"]] == sorted(renamed)
            assert {choice["worst_error"] for choice in precision["measured"]} == {max(alone)}


def test_explainers_that_call_the_model_themselves_stay_float32(images: Path, tmp_path: Path) -> None:
    """Captum's attributions never ask for a plan: bfloat16 would be written down and not used."""
    explainers = {
        "captum:IntegratedGradients": {"arguments": {"n_steps": 3}},
        "captum:KernelShap": {"arguments": {"n_samples": 20}},
        "lime": LIME,
    }
    settings = {"explainers": explainers, "metrics": {"sparseness": {}}}
    precision = calibrated(images, tmp_path / "run", 1e3, **settings).folder.read_json("run.json")["precision"]
    assert [choice["label"] for choice in precision["measured"]] == ["lime"]
    assert precision["chosen"] == dict.fromkeys([*explainers, "sparseness"], "float32") | {"lime": "bfloat16"}


def test_the_choice_is_made_once(images: Path, tmp_path: Path) -> None:
    """A run that is taken up again keeps its precisions and its record of them."""
    settings = {"explainers": {"lime": LIME, "random": {}}, "metrics": {"faithfulness_correlation": CORRELATION}}
    outcome = calibrated(images, tmp_path / "run", 1e3, **settings)
    rows = outcome.folder.read("scores").to_pandas()
    (part,) = (tmp_path / "run" / "scores").rglob("*.parquet")
    part.unlink()

    def again(job: Job, shard: Shard) -> dict[str, Any]:
        raise AssertionError("calibrated twice")

    resumed = evaluate(
        toy_config(
            images, tmp_path / "run", precision__default="auto", precision__tolerance=1e3, precision__num_images=12,
            engine__shard_size=12, **settings,
        ),
        run_local, Watch(), again,
    )  # fmt: skip
    assert resumed.num_cells_run == 1
    assert resumed.folder.read("scores").to_pandas().equals(rows)


def test_a_small_run_says_why_it_did_not_calibrate(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "WORTH_IMAGES", 2)
    outcome = calibrated(images, tmp_path / "run", 1e3)
    precision = outcome.folder.read_json("run.json")["precision"]
    assert "fewer than 2 x 12" in precision["why"]
    assert set(precision["chosen"].values()) == {"float32"}


def test_a_device_without_fast_bfloat16_stays_float32(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "has_fast_bfloat16", lambda device: False)
    precision = calibrated(images, tmp_path / "run", 1e3).folder.read_json("run.json")["precision"]
    assert precision["why"] == "cpu is not faster in bfloat16"
    assert set(precision["chosen"].values()) == {"float32"}


def test_a_replica_chooses_the_same(
    cluster: Cluster, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured on a replica of the cluster, with what this machine really can."""
    monkeypatch.setattr(calibrate, "has_fast_bfloat16", FAST)
    settings = {"explainers": {"lime": LIME}, "metrics": {"effective_complexity": {"eps": 0.1}}, "engine__threads": 1}
    chosen = []
    for calibration in (calibrate_local, calibrate_on_ray):
        output = tmp_path / calibration.__name__
        asked = {"precision__default": "auto", "precision__num_images": 6}
        outcome = evaluate(toy_config(images, output, **asked, **settings), run_local, Watch(), calibration)
        chosen.append(outcome.folder.read_json("run.json")["precision"])
    assert chosen[0] == chosen[1]
