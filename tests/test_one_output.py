"""A run of a model with one output: its probability is the sigmoid, it predicts no class and claims no accuracy."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.toy import Watch, toy_config, toy_images
from xaibatch.metrics.reading import model_output
from xaibatch.pipeline.local import run_local
from xaibatch.pipeline.run import evaluate
from xaibatch.results.compare import compare_runs
from xaibatch.results.frames import open_run
from xaibatch.results.report import write_report
from xaibatch.results.schema import predicted_class, predictions_table
from xaibatch.results.study import make_study


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Six images, three of the model's class "covid" and three without label."""
    folder = tmp_path_factory.mktemp("one")
    data = toy_images(folder / "toy", num_per_class=3)
    files = [*sorted(data.glob("covid/*.png")), *sorted(data.glob("normal/*.png"))]
    lines = [f"{p.parent.name}/{p.name},{'covid' if p.parent.name == 'covid' else ''}" for p in files]
    (data / "manifest.csv").write_text("\n".join(["path,label", *lines]) + "\n")
    settings = {"explainers": {"raw_attention": {}, "random": {}}, "model__class_names": ["covid"]}
    config = toy_config(data / "manifest.csv", folder / "run", metrics={"sparseness": {}}, **settings)
    evaluate(config, run_local, Watch())
    return folder / "run"


def test_probabilities_are_those_that_metrics_read():
    logits = np.array([[-2.0], [0.5], [900.0], [-900.0]])
    keys = {"patients": [None] * 4, "paths": dict.fromkeys("abcd", "x"), "run": "r", "ids": "abcd"}
    rows = predictions_table(labels_B=np.array([0, 0, -1, 0]), logits_BK=logits, class_names=["x"], **keys).to_pylist()
    probabilities = [row["probabilities"] for row in rows]
    np.testing.assert_array_equal(probabilities, model_output(logits, "probability"))
    np.testing.assert_allclose(np.ravel(probabilities)[:2], 1 / (1 + np.exp([2.0, -0.5])), rtol=1e-12)
    assert [(row["predicted"], row["correct"]) for row in rows] == [(None, None)] * 4
    assert (predicted_class(np.array([1.0, 2.0]), "ab"), predicted_class(np.array([1.0]), "a")) == ("b", None)


def test_a_run_of_one_output_claims_no_accuracy(run):
    found = open_run(run)
    rows = found.predictions.arrow().to_pylist()
    assert {row["label"] for row in rows} == {"covid", None}
    assert {(row["predicted"], row["correct"]) for row in rows} == {(None, None)}
    expected = [1 / (1 + np.exp(-row["logits"][0])) for row in rows]
    np.testing.assert_allclose([row["probabilities"][0] for row in rows], expected, rtol=1e-12)
    assert set(found.scores.arrow()["predicted"].to_pylist()) == {None}
    assert [group.title for group in make_study(found).groups] == ["all images", "true class: covid"]
    again = run.with_name("again")
    if not again.exists():
        shutil.copytree(run, again)
    assert compare_runs(str(run), str(again)).accuracy is None


def test_the_report_shows_the_probability_and_no_predicted_class(run):
    page = Path(write_report(run)).read_text("utf-8")
    assert "The model has one output and so no predicted class: nothing can be said about its accuracy." in page
    assert "Accuracy" not in page
    assert "of each true class, the images whose scores" in page
    assert not re.search("wrongly predicted|predicted None|✓ ?<|✗ ?<", page)
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])
    probabilities = [row["probabilities"][0] for row in open_run(run).predictions.arrow().to_pylist()]
    assert sorted(image[3] for image in data["images"]) == sorted(round(p, 4) for p in probabilities)
    assert {image[2] for image in data["images"]} == {None}
