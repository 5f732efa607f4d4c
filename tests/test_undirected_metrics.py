"""Metrics of which neither more nor less is better: no arrow, no rank, no finding, no mark of better or worse."""

import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests import synthetic_run
from tests.synthetic_run import METRICS, Design, make_run
from xaibatch.results.compare import compare_runs
from xaibatch.results.frames import open_run
from xaibatch.results.report import write_report
from xaibatch.results.report_choice import best_and_worst
from xaibatch.results.study import make_study
from xaibatch.results.summary import print_summary


@pytest.fixture(params=[("average_sensitivity",), tuple(METRICS)], ids=["one", "all"])
def undirected(request, tmp_path, monkeypatch):
    """The labels without a direction, and a run in which they have none."""
    known = {
        k: {**v, "higher_is_better": None if k in request.param else v["higher_is_better"]} for k, v in METRICS.items()
    }
    monkeypatch.setattr(synthetic_run, "METRICS", known)
    make_run(tmp_path / "run")
    return request.param, str(tmp_path / "run")


def test_a_metric_without_a_direction_is_compared_but_not_judged(undirected):
    labels, url = undirected
    study = make_study(open_run(url))
    verdicts = {metric: set() for metric in METRICS}
    for (_, _, metric), comparison in study.pairs["all images"].items():
        verdicts[metric].add(comparison.verdict)
    for metric, found in verdicts.items():
        assert ("better" in found or "worse" in found) == (metric not in labels)
        assert ("higher" in found or "lower" in found) == (metric in labels)
    assert {ranking.metric for ranking in study.rankings} == set(METRICS) - set(labels)
    assert not {m for (_, m), mark in study.marks["all images"].items() if mark == "‡"} & set(labels)
    choice = best_and_worst(study.cube, 2, study.floor)
    assert (choice is None) == (len(labels) == len(METRICS))


def test_report_and_table_say_that_there_is_no_direction(undirected):
    labels, url = undirected
    page = Path(write_report(url)).read_text("utf-8")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"<(script|style).*?</\1>", " ", page, flags=re.S)))
    assert "no arrow: neither is" in text
    assert "≠ they differ" in text
    assert not re.search(r"Average sensitivity [↑↓]", text)
    assert not re.search(r"[▲▼] (higher|lower)", text)
    findings = re.findall(r"(?:has|share) the best mean", text)
    assert bool(findings) == (len(labels) < len(METRICS))
    console = Console(width=200, record=True)
    print_summary(open_run(url), console=console)
    assert "no arrow: neither is" in console.export_text()


def test_a_run_whose_metrics_all_have_a_direction_needs_no_such_words(tmp_path):
    make_run(tmp_path / "run")
    page = Path(write_report(str(tmp_path / "run"))).read_text("utf-8")
    assert "no arrow" not in page
    assert "≠ they" not in page


def test_runs_that_turn_a_metric_round_are_not_judged_by_it(tmp_path, monkeypatch):
    """As `region_perturbation` with the least relevant region first in one of the two."""
    make_run(tmp_path / "first", Design(shifts={("lime", "average_sensitivity"): 0.4, ("lime", "pointing_game"): -9.0}))
    turned = METRICS["average_sensitivity"] | {"higher_is_better": True, "bounds": [None, 5.0]}
    monkeypatch.setattr(synthetic_run, "METRICS", {**METRICS, "average_sensitivity": turned})
    make_run(tmp_path / "second")
    found = compare_runs(str(tmp_path / "first"), str(tmp_path / "second"))
    assert found.scores["lime", "average_sensitivity"].verdict == "lower"
    assert found.scores["lime", "pointing_game"].verdict == "better"
    assert found.metrics["average_sensitivity"].bounds == (-np.inf, np.inf)
