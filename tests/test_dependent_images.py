"""Metrics that compare the images of a shard: their means are shown, and nothing is inferred from images that are not
independent."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.csv as pacsv
import pytest
from rich.console import Console

from tests.synthetic_run import Design, make_run
from tests.toy import toy_config
from xaibatch.pipeline.record import describe_metrics
from xaibatch.results.compare import compare_runs, print_comparison, setting_differences
from xaibatch.results.cube import metric_info
from xaibatch.results.export import export, latex_pairs, latex_scores
from xaibatch.results.frames import open_run
from xaibatch.results.report import write_report
from xaibatch.results.report_choice import leading_metric
from xaibatch.results.statistics import summarise
from xaibatch.results.statistics_paired import compare
from xaibatch.results.study import make_study
from xaibatch.results.summary import print_summary

DEPENDENT = "faithfulness_correlation"
"""Marked in the record as a metric that compares images."""

LINE = "Faithfulness correlation: an image's score depends on the other images of its shard"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run whose record says of no metric whether it compares images."""
    folder = tmp_path_factory.mktemp("dependent") / "plain"
    make_run(folder, Design(repeats=2))
    return folder


@pytest.fixture(scope="module")
def run(plain):
    folder = plain.with_name("run")
    shutil.copytree(plain, folder)
    record = json.loads((folder / "run.json").read_text())
    record["metrics"][DEPENDENT]["across_images"] = True
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def printed(show) -> str:
    console = Console(file=io.StringIO(), width=200)
    show(console)
    return " ".join(console.file.getvalue().split())


def test_the_record_says_which_metrics_compare_images(tmp_path):
    metrics = {"quantus:SensitivityN": {}, "quantus:Sufficiency": {}, "quantus:Sparseness": {}, "sensitivity_n": {}}
    config = toy_config(tmp_path, tmp_path / "run", metrics=metrics)
    model = {
        "preprocessing": {"channels": 3, "image_size": (32, 32)},
        "token_grid": {"rows": 4, "columns": 4, "patch_height": 8, "patch_width": 8},
    }
    facts = describe_metrics(config, model)
    assert [facts[label]["across_images"] for label in metrics] == [True, True, False, False]
    assert metric_info("quantus:SensitivityN", {"metrics": facts}).across_images
    assert not metric_info("a", {"metrics": {"a": {"title": "of an earlier version"}}}).across_images


def test_one_number_a_shard_is_no_evidence(plain):
    # three shards of 32 images, one number each: sign flips of 96 images would give p = 0.0001
    values = np.repeat([0.31, 0.25, 0.28], 32)[:, None]
    found = compare(values, np.arange(96), [1], seed=0, dependent_K=[True])[0]
    assert (found.verdict, found.interval, found.p_value, found.p_holm, found.more_images) == ("dependent", *[None] * 4)
    assert np.isnan([found.effect_size, found.wins, found.detectable]).all()
    assert (found.alike, found.num_images) == (False, 96)
    np.testing.assert_allclose(found.mean_difference, 0.28)
    summary = summarise(values, np.arange(96), seed=0, dependent_K=[True])[0]
    assert (summary.interval, summary.alike, summary.independent) == (None, False, False)
    assert np.isnan(summary.standard_error)
    np.testing.assert_allclose(summary.mean, 0.28)


def test_other_comparisons_do_not_pay_for_what_is_not_tested():
    values = np.random.default_rng(0).normal(0.4, 1, (40, 3))
    alone = compare(values[:, :2], np.arange(40), [1, 1], seed=0)
    beside = compare(values, np.arange(40), [1, 1, 1], seed=0, dependent_K=[False, False, True])
    assert beside[:2] == alone


def test_nothing_is_inferred_anywhere_in_a_study(run, plain):
    made, before = make_study(open_run(run)), make_study(open_run(plain))
    for group in made.groups:
        for (explainer, metric), summary in made.summaries[group.title].items():
            known = before.summaries[group.title][explainer, metric]
            assert summary.mean == known.mean or np.isnan(known.mean)
            assert summary.independent == (metric != DEPENDENT)
            assert summary.interval == (None if metric == DEPENDENT else known.interval)
        assert not any(made.marks[group.title].get((e, DEPENDENT)) for e in made.cube.explainers)
        assert {c.verdict for (*_, m), c in made.pairs[group.title].items() if m == DEPENDENT} == {"dependent"}
    assert "better" in {c.verdict for (*_, m), c in before.pairs["all images"].items() if m == DEPENDENT}
    assert DEPENDENT not in {ranking.metric for ranking in made.rankings}
    assert len(made.rankings) == len(before.rankings) - 1
    assert DEPENDENT not in {metric for _, metric in made.noise}
    assert leading_metric(before.cube).label == DEPENDENT
    assert leading_metric(made.cube).label != DEPENDENT


def test_the_printed_table_and_the_report_say_why(run, plain):
    table = printed(lambda console: print_summary(open_run(run), console))
    assert LINE in table
    assert "no interval below" not in table
    page = Path(write_report(str(run))).read_text("utf-8")
    assert LINE.replace("'", "&#39;") in page
    assert "Faithfulness correlation ↑: TransformerLRP has the best mean" in page
    assert "; not tested, as the images are compared with each other." in page
    assert "nan" not in page.partition("<details><summary>run.json")[0].partition("</style>")[2].split()
    assert LINE not in printed(lambda console: print_summary(open_run(plain), console))


def test_the_export_says_why(run, tmp_path):
    export(str(run), tmp_path, dots_per_inch=30)
    made = make_study(open_run(run))
    assert f"% {LINE}" in latex_scores(made)
    assert "nan" not in latex_scores(made) + latex_pairs(made)
    rows = pacsv.read_csv(tmp_path / "summary.csv").to_pylist()
    assert {r["independent"] for r in rows if r["metric"] == DEPENDENT} == {False}
    assert {r["low"] for r in rows if r["metric"] == DEPENDENT} == {None}
    pairs = pacsv.read_csv(tmp_path / "pairs.csv").to_pylist()
    assert {(r["verdict"], r["p_holm"]) for r in pairs if r["metric"] == DEPENDENT} == {("dependent", None)}


def test_two_runs_are_compared_by_means_alone_if_either_record_says_so(run, plain):
    for pair in ((str(run), str(plain)), (str(plain), str(run))):
        found = compare_runs(*pair)
        assert {c.verdict for (_, m), c in found.scores.items() if m == DEPENDENT} == {"dependent"}
        assert {c.verdict for (_, m), c in found.scores.items() if m != DEPENDENT} == {"undecided"}
        assert LINE in printed(lambda console, pair=pair: print_comparison(*pair, console))
    assert not setting_differences(open_run(run).record, open_run(plain).record)  # a fact, not a setting
