"""Printed table, exported files and the comparison of two runs, against the statistics that they show."""

import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from tests.synthetic_run import Design, make_run
from xaibatch.cli import app
from xaibatch.errors import RunFolderError, UsageError
from xaibatch.results.compare import compare_runs, print_comparison
from xaibatch.results.cube import score_cube
from xaibatch.results.export import charts, export, latex, latex_pairs, latex_scores
from xaibatch.results.figures_images import picture_figure
from xaibatch.results.frames import open_run
from xaibatch.results.parts import RunFolder
from xaibatch.results.report import write_report
from xaibatch.results.report_gallery import ReportOptions, make_gallery
from xaibatch.results.study import make_study
from xaibatch.results.summary import print_summary, summary_table


@pytest.fixture(scope="module")
def run_url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    make_run(folder / "run", Design(num_images=48, repeats=2, pixels=str(folder / "images")))
    return str(folder / "run")


def printed(run, width=140, encoding="utf-8"):
    console = Console(width=width, record=True, file=open("/dev/null", "w", encoding=encoding), color_system=None)  # noqa: SIM115
    print_summary(run, console)
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


def test_rows_that_are_there_twice_are_refused(run_url):
    run = open_run(run_url)
    scores = run.scores.arrow()
    with pytest.raises(RunFolderError, match="5 rows of `scores` are there twice"):
        score_cube(pa.concat_tables([scores, scores.slice(7, 5)]), run.record)


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
    printed(run)  # imports

    def seconds():
        start = time.process_time()
        printed(run)
        return time.process_time() - start

    assert any(seconds() < 2 for _ in range(3)), "others may keep the machine busy, but not each time"


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


def test_exported_pictures_say_how_to_read_them(run_url):
    run = open_run(run_url)
    made = make_study(run)
    gallery = make_gallery(run, made, ReportOptions(max_pixels=0))
    for choice in gallery.choices:
        figure = picture_figure(choice, gallery.material)
        text = re.sub(r"\s+", " ", " ".join(t.get_text() for t in figure.texts))
        for expected in (
            choice.rule, "F Faithfulness correlation ↑, S", "drawn as squares",
            "explains the class that the model predicts", "the map’s own maximum", "against the class",
        ):  # fmt: skip
            assert expected in text, expected
        with_masks = any(not image_id.startswith("Normal") for image_id in choice.image_ids)
        assert ("green outline: lesion mask" in text) == with_masks
    drawn = {name: draw() for name, draw in charts(made).items()}
    captions = {name: figure.get_supxlabel().replace("\n", " ") for name, figure in drawn.items()}
    assert "weaker than the paired tests" in captions["critical_differences"]
    assert "† not distinguishable from the random map" in captions["intervals"]
    assert "Grey band and open circle: the random map" in captions["intervals"]
    assert all(captions.values())


def test_the_key_below_one_narrow_column_fits(tmp_path):
    make_run(tmp_path / "run", Design(num_images=4))
    run = open_run(str(tmp_path / "run"))
    gallery = make_gallery(run, make_study(run), ReportOptions(num_typical=1))
    choice = gallery.choices[0]
    one = replace(choice, image_ids=choice.image_ids[:1], remarks=choice.remarks[:1])
    figure = picture_figure(one, gallery.material)
    renderer = figure.canvas.get_renderer()
    for text in figure.texts:
        box = text.get_window_extent(renderer)
        assert box.x1 <= figure.bbox.x1, text.get_text()
        assert box.y0 >= 0, text.get_text()


def test_latex_explains_every_mark_that_it_prints_and_the_pairs(exported, run_url, tmp_path):
    few = Design(num_images=14, explainers=("lime", "rollout", "random"), shifts={("lime", "average_sensitivity"): 2.0})
    make_run(tmp_path / "run", few)
    files = {path.name: path for path in export(str(tmp_path / "run"), tmp_path / "files", dots_per_inch=20)}
    for tex in (files["table.tex"].read_text("utf-8"), exported["table.tex"].read_text("utf-8")):
        comments, _, body = tex.partition("\\begin")
        for mark, note in (
            ("$^\\dagger$", "not distinguishable"), ("$^\\ddagger$", "worse than"), ("?", "too few"),
            ("$^\\circ$", "nearly all scores are equal"),
        ):  # fmt: skip
            assert (mark in body) == (f"% {mark} {note}" in comments), mark
    assert "$^\\ddagger$" in files["table.tex"].read_text("utf-8")
    made = make_study(open_run(run_url))
    comments, _, body = exported["pairs.tex"].read_text("utf-8").partition("\\begin")
    assert f"(comparisons of all images: {next(iter(made.pairs['all images'].values())).num_tests})" in comments
    assert "sign flips of whole patients" in comments
    assert "Average sensitivity $\\downarrow$ &" in body
    assert not re.search(r"(?<![\w$])-\d", body)  # one kind of minus


def test_latex_has_the_screen_s_numbers(run_url):
    made = make_study(open_run(run_url))
    key = "lime", "faithfulness_correlation"
    nearly = replace(made.summaries["all images"][key], mean=-0.0004)
    summaries = {**made.summaries, "all images": {**made.summaries["all images"], key: nearly}}
    tex = latex_scores(replace(made, summaries=summaries))
    assert re.search(r"LIME & 0\.000\S* \[", tex)  # not −0.000
    complexity = made.summaries["all images"]["lime", "effective_complexity"].mean
    assert f" {complexity:,.0f} [" in tex


def test_nearly_equal_differences_are_marked_in_the_pairs(tmp_path):
    same = {(e, "pointing_game"): 9.0 for e in ("lime", "rollout")}  # both hit every lesion
    make_run(
        tmp_path / "run", Design(num_images=24, explainers=("lime", "rollout"), metrics=("pointing_game",), shifts=same)
    )
    tex = latex_pairs(make_study(open_run(str(tmp_path / "run"))))
    assert "]$^\\circ$ &" in tex
    assert "% $^\\circ$ nearly all" in tex


def test_every_row_is_there_as_csv_too(exported, run_url):
    scores = open_run(run_url).scores.pandas()
    read = pd.read_csv(exported["scores.csv"])
    assert list(read.columns) == list(scores.columns)
    np.testing.assert_array_equal(read["score"], scores["score"].astype(float))
    assert read["image_id"].tolist() == scores["image_id"].astype(str).tolist()


def test_medians_stand_in_print_and_in_latex(exported, run_url):
    run = open_run(run_url)
    summary = make_study(run).summaries["all images"]["lime", "faithfulness_correlation"]
    console = Console(width=140, record=True, file=open("/dev/null", "w"), color_system=None)  # noqa: SIM115
    print_summary(run, console, medians=True)
    console.file.close()
    lines = console.export_text().splitlines()
    below = lines[next(k for k, line in enumerate(lines) if line.lstrip().startswith("lime")) + 1].split()
    assert below[:2] == ["median", f"{summary.median:.3f}"]
    assert "median" not in exported["table.tex"].read_text("utf-8")
    tex = exported["table_medians.tex"].read_text("utf-8").splitlines()
    below = tex[next(k for k, line in enumerate(tex) if line.startswith("LIME")) + 1]
    assert below.startswith(f"\\quad median & {summary.median:.3f} &")


def test_pictures_are_named_for_what_they_show(tmp_path):
    # four images: too few for best and worst cases, so the disputed ones are the second choice
    make_run(tmp_path / "few", Design(num_images=4))
    names = {path.stem for path in export(str(tmp_path / "few"), tmp_path / "files", dots_per_inch=40)}
    assert {"figure", "disputed"} <= names
    assert "cases" not in names


def test_a_url_is_not_taken_for_a_local_folder(run_url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for output in ("s3://bucket/export", "memory://export"):
        with pytest.raises(UsageError, match="local folder"):
            export(run_url, output)
        with pytest.raises(UsageError, match="is a URL"):
            CliRunner().invoke(app, ["export", run_url, "-o", output], standalone_mode=False, catch_exceptions=False)
    assert list(tmp_path.iterdir()) == []


# -- marks


def test_marks_against_the_random_map_are_verdicts_of_the_pair_table(run_url):
    made = make_study(open_run(run_url))
    words = {"†": "undecided", "‡": "worse", "?": "too few", "": "better"}
    for group, marks in made.marks.items():
        assert marks
        for (explainer, metric), mark in marks.items():
            found = made.pairs[group][explainer, "random", metric]
            assert found.verdict == words[mark]
            assert found.num_tests == next(iter(made.pairs[group].values())).num_tests


def test_a_random_map_that_comes_first_is_compared_from_the_other_s_point_of_view(tmp_path):
    make_run(tmp_path / "run", Design(num_images=48, explainers=("random", "lime", "rollout")))
    record = RunFolder(str(tmp_path / "run")).read_json("run.json")
    assert next(iter(record["explainers"])) == "random"
    made = make_study(open_run(tmp_path / "run"))
    assert made.pairs["all images"]["random", "lime", "average_sensitivity"].verdict == "worse"
    assert made.marks["all images"]["lime", "average_sensitivity"] == ""


def test_nearly_equal_scores_are_marked_wherever_they_are_shown(tmp_path):
    design = Design(num_images=24, explainers=("lime", "random"), shifts={("lime", "faithfulness_correlation"): 5.0})
    make_run(tmp_path / "run", design)  # the metric ends at 1: so do all scores
    run = open_run(tmp_path / "run")
    text = printed(run)
    assert re.search(r"lime +1\.0+ \[0\.[67]\d*, 1\.0+\]°", text)
    assert "° nearly all scores are equal" in text
    tex = {path.name: path for path in export(str(tmp_path / "run"), tmp_path / "files", dots_per_inch=40)}["table.tex"]
    assert "1.00]$^\\circ$" in tex.read_text("utf-8")


# -- comparison of two runs


def test_a_family_too_large_for_its_images_is_said_below_the_table_and_in_the_report(run_url, tmp_path):
    # five explainers, three metrics scored for ten images: 30 comparisons, whose p-values are at least 2 / 2**10
    make_run(tmp_path / "run", Design(num_images=10))
    line = (
        "too many comparisons for a verdict, however large the differences: all images (30 comparisons, 10 images; 11"
    )
    assert line in printed(open_run(tmp_path / "run"))
    assert line[1:] in Path(write_report(tmp_path / "run")).read_text("utf-8")
    assert "too many comparisons" not in printed(open_run(run_url))


def test_a_known_change_is_found_and_nothing_else(run_url, tmp_path):
    shifted = Design(num_images=42, repeats=2, shifts={("lime", "faithfulness_correlation"): -0.1})
    make_run(tmp_path / "second", shifted)
    found = compare_runs(run_url, str(tmp_path / "second"))
    assert (found.num_shared, found.num_only_first, found.num_only_second, found.num_changed) == (42, 6, 0, 0)
    changed = {key: c for key, c in found.scores.items() if c.verdict != "undecided"}
    assert set(changed) == {("lime", "faithfulness_correlation")}
    only = changed["lime", "faithfulness_correlation"]
    assert only.verdict == "worse"
    assert only.interval.low < -0.1 < only.interval.high
    assert only.interval.high - only.interval.low < 0.03


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
