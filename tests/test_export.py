"""Printed table, exported files and the comparison of two runs, against the statistics that they show."""

import re
import shutil
import time

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rich.console import Console

from tests.synthetic_run import Design, make_run
from xaibatch.errors import RunFolderError
from xaibatch.results.compare import compare_runs, print_comparison
from xaibatch.results.cube import score_cube
from xaibatch.results.export import export, latex
from xaibatch.results.frames import open_run
from xaibatch.results.parts import RunFolder
from xaibatch.results.study import make_study
from xaibatch.results.summary import print_summary, summary_table


@pytest.fixture(scope="module")
def run_url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    make_run(folder / "run", Design(num_images=48, repeats=2, pixels=str(folder / "images")))
    return str(folder / "run")


def printed(run, width=140, encoding="utf-8"):
    console = Console(width=width, record=True, file=open("/dev/null", "w", encoding=encoding), color_system=None)  # noqa: SIM115
    print_summary(run, console, report_path="runs/a/report.html")
    console.file.close()
    return console.export_text()


# -- cube


def test_the_cube_has_every_score_in_its_place(run_url):
    run = open_run(run_url)
    cube = score_cube(run.scores.arrow(), run.record)
    frame = run.scores.pandas()
    assert cube.explainers == tuple(run.record["explainers"])
    for _, row in frame.sample(50, random_state=0).iterrows():
        m = [metric.label for metric in cube.metrics].index(row["metric"])
        place = cube.explainers.index(row["explainer"]), m, cube.image_ids.index(row["image_id"]), row["repeat"]
        np.testing.assert_equal(cube.values_EMIR[place], row["score"])
        assert cube.labels_I[place[2]] == row["label"]
    assert cube.statuses["lime", "pointing_game"] == {"ok": 64, "missing_mask": 32}
    groups = {group.title: int(group.rows_I.sum()) for group in cube.groups()}
    assert groups["true class: Normal"] == 16
    assert groups["prediction correct"] + groups["prediction wrong"] == groups["all images"] == 48


def test_rows_that_are_there_twice_are_refused(run_url, tmp_path):
    shutil.copytree(run_url, tmp_path / "run")
    part = tmp_path / "run" / "scores" / "pointing_game" / "shard-00000.parquet"
    shutil.copy(part, part.with_name("shard-00099.parquet"))
    run = open_run(tmp_path / "run")
    with pytest.raises(RunFolderError, match="there twice"):
        score_cube(run.scores.arrow(), run.record)


# -- printed table


def test_the_printed_table_shows_means_intervals_and_marks(run_url):
    run = open_run(run_url)
    text = printed(run)
    made = make_study(run)
    summary = made.summaries["all images"]["lime", "faithfulness_correlation"]
    shown = f"{summary.mean:.3f} [{summary.interval.low:.3f}, {summary.interval.high:.3f}]"
    assert re.search(rf"lime +{re.escape(shown)}", text)
    assert "32 scored, 16 not" in text
    assert "true class: Pneumonia" in text
    assert "Faithfulness correlation ↑" in re.sub(r"\s+", " ", text) or "correlation ↑" in text
    assert "report: runs/a/report.html" in text
    assert "missing_mask" in text
    assert "†" in text
    assert "random (floor)" in text


def test_a_narrow_and_an_ascii_console_lose_nothing(run_url):
    run = open_run(run_url)
    narrow = printed(run, width=72)
    assert max(map(len, narrow.splitlines())) <= 72
    made = make_study(run)
    for (explainer, metric), summary in made.summaries["all images"].items():
        if metric == "faithfulness_correlation":
            assert f"{summary.mean:.3f}" in narrow, explainer
    console = Console(width=140, record=True, file=open("/dev/null", "w"), color_system=None)  # noqa: SIM115
    console.print(summary_table(run.scores.arrow(), run.record, width=140, plain=True, encoding="ascii"))
    console.file.close()
    assert console.export_text().isascii()


def test_rendered_images_and_few_images_are_said(tmp_path):
    make_run(tmp_path / "few", Design(num_images=8, synthetic=True, explainers=("lime", "rollout")))
    text = printed(open_run(tmp_path / "few"))
    assert "speak of the generator" in text
    assert "no interval below 10 images" in text
    assert "no random map" in text
    assert "[0." not in text


def test_an_empty_run_prints_so(tmp_path):
    RunFolder(str(tmp_path / "new")).create()
    RunFolder(str(tmp_path / "new")).write_json({}, "run.json")
    assert "nothing was scored" in printed(open_run(tmp_path / "new"))


def test_thousands_of_rows_print_within_two_seconds(tmp_path):
    make_run(tmp_path / "large", Design(num_images=400))
    run = open_run(tmp_path / "large")
    assert run.scores.arrow().num_rows == 8000
    start = time.process_time()
    printed(run)
    assert time.process_time() - start < 2


# -- export


@pytest.fixture(scope="module")
def exported(run_url, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {path.name: path for path in export(run_url, folder, dots_per_inch=80)}


def test_exported_tables_hold_the_statistics(exported, run_url):
    made = make_study(open_run(run_url))
    for suffix, read in ((".csv", pd.read_csv), (".parquet", pd.read_parquet)):
        table = read(exported[f"summary{suffix}"]).query("group == 'all'").set_index(["explainer", "metric"])
        for key, summary in made.summaries["all images"].items():
            np.testing.assert_allclose(table.loc[key, "mean"], summary.mean)
            np.testing.assert_allclose(table.loc[key, "high"], summary.interval.high)
        pairs = read(exported[f"pairs{suffix}"]).query("group == 'all'")
        assert len(pairs) == len(made.pairs["all images"]) == 40
        assert set(pairs["verdict"]) <= {"better", "worse", "undecided"}
    assert len(pd.read_parquet(exported["scores.parquet"])) == 48 * 5 * 4 * 2


def test_latex_is_a_booktabs_table_with_balanced_columns(exported):
    for name in ("table.tex", "pairs.tex"):
        text = exported[name].read_text("utf-8")
        columns = len(re.search(r"\\begin\{tabular\}\{(\w+)\}", text)[1])
        rows = [line for line in text.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
        assert all(len(re.findall(r"(?<!\\)&", row)) == columns - 1 for row in rows)
        assert text.count(r"\toprule") == text.count(r"\bottomrule") == 1
        assert text.isascii()
    assert latex("a_b & 5% {x} ↑") == r"a\_b \& 5\% \{x\} $\uparrow$"


def test_figures_come_as_pdf_and_png(exported):
    for name in ("intervals", "distributions", "ranks", "critical_differences", "figure", "cases", "disputed"):
        assert exported[f"{name}.pdf"].read_bytes().startswith(b"%PDF")
        with Image.open(exported[f"{name}.png"]) as picture:
            assert np.asarray(picture.convert("L")).std() > 5


# -- comparison of two runs


def test_a_known_change_is_found_and_nothing_else(run_url, tmp_path):
    shifted = Design(num_images=42, repeats=2, shifts={("lime", "faithfulness_correlation"): -0.1})
    make_run(tmp_path / "second", shifted)
    found = compare_runs(run_url, str(tmp_path / "second"))
    assert (found.num_shared, found.num_only_first, found.num_only_second, found.num_changed) == (42, 6, 0, 0)
    changed = {key: c for key, c in found.scores.items() if c.verdict != "undecided"}
    assert set(changed) == {("lime", "faithfulness_correlation")}
    only = changed["lime", "faithfulness_correlation"]
    assert only.verdict == "worse"
    np.testing.assert_allclose(only.mean_difference, -0.1, atol=1e-9)


def test_settings_come_first(run_url, tmp_path):
    make_run(tmp_path / "second", Design(num_images=48, repeats=2, seed=3))
    record = RunFolder(str(tmp_path / "second")).read_json("run.json")
    record["versions"]["torch"] = "9.9"
    record["config"]["output"] = "elsewhere"
    RunFolder(str(tmp_path / "second")).write_json(record, "run.json")
    found = compare_runs(run_url, str(tmp_path / "second"))
    assert found.settings["config.seed"] == (0, 3)
    assert found.settings["versions.torch"] == ("2.15.0", "9.9")
    assert "config.output" not in found.settings
    console = Console(width=140, record=True, file=open("/dev/null", "w"), color_system=None)  # noqa: SIM115
    print_comparison(run_url, str(tmp_path / "second"), console)
    console.file.close()
    text = console.export_text()
    assert text.index("versions.torch") < text.index("faithfulness_correlation")
    assert "48 images in both runs" in text


def test_runs_that_share_nothing_are_refused(run_url, tmp_path):
    make_run(tmp_path / "other", Design(num_images=12, names={i: f"x{i}.png" for i in range(12)}))
    with pytest.raises(RunFolderError, match="share no image"):
        compare_runs(run_url, str(tmp_path / "other"))
