"""The report: complete in itself, honest about what it lacks, and working in a browser; the overlays in it pixel by
pixel."""

import base64
import html.parser
import io
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image
from typer.testing import CliRunner

from tests.synthetic_run import CLASSES, EXPLAINERS, Design, make_run
from xaibatch.cli import app
from xaibatch.data.dataset import open_dataset
from xaibatch.data.findings import FindingOptions
from xaibatch.errors import RunFolderError
from xaibatch.maps import upsample
from xaibatch.results import overlay
from xaibatch.results.cube import MetricInfo, score_cube
from xaibatch.results.figures import svg
from xaibatch.results.frames import open_run
from xaibatch.results.parts import RunFolder
from xaibatch.results.report import write_report
from xaibatch.results.report_browser import script_json
from xaibatch.results.report_choice import best_and_worst, disagreements, typical
from xaibatch.results.report_facts import notices
from xaibatch.results.report_figure import averaged_note, overlay_rgb, score_lines, shown_metrics
from xaibatch.results.report_gallery import ReportOptions, chosen_images, make_gallery
from xaibatch.results.report_images import load_maps, load_pictures
from xaibatch.results.study import make_study
from xaibatch.results.summary import column_digits

NASTY = "</script><script>window.broken=1</script><img src=x onerror=alert(1)>.png".replace("/", "∕")
"""A file name that must come out as text everywhere."""


@pytest.fixture(scope="module")
def run_url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    names = {i: f"{i:05d}{NASTY}" for i in range(0, 42, 4)}
    design = Design(num_images=42, images_per_patient=2, repeats=2, pixels=str(folder / "images"), names=names)
    make_run(folder / "run", design)
    return str(folder / "run")


@pytest.fixture(scope="module")
def page(run_url):
    return Path(write_report(run_url)).read_text("utf-8")


# -- overlays


def test_opacity_and_colour_follow_the_value():
    image = np.full((4, 4), 0.5)
    grid = np.zeros((4, 4))
    grid[1, 2], grid[3, 3] = 1.0, 0.5
    rgb = overlay.composite(image, grid) / 255
    options = overlay.OverlayOptions()
    np.testing.assert_allclose(rgb[0, 0], 0.5, atol=0.003)
    for place, value in (((1, 2), 1.0), ((3, 3), 0.5)):
        opacity = options.max_opacity * value**options.opacity_power
        expected = 0.5 * (1 - opacity) + np.array(colormaps["plasma"](value)[:3]) * opacity
        np.testing.assert_allclose(rgb[place], expected, atol=0.003)


def test_signed_maps_show_both_signs_and_positive_ones_no_negative():
    image, grid = np.full((2, 2), 0.5), np.array([[1.0, -1.0], [0.0, 0.0]])
    signed = overlay.composite(image, grid, signed=True).astype(int)
    assert signed[0, 0, 0] > signed[0, 0, 2] + 50  # orange: for the class
    assert signed[0, 1, 2] > signed[0, 1, 0] + 50  # blue: against it
    positive = overlay.composite(image, grid, signed=False)
    assert (positive[0, 1] == positive[1, 1]).all()


def test_the_overlay_upsamples_as_the_metrics_do():
    draws = np.random.default_rng(0)
    grid = draws.random((7, 7))
    image = np.zeros((28, 28))
    blended = overlay.composite(image, grid, options=overlay.OverlayOptions(max_opacity=1.0, opacity_power=1e-9))
    value = upsample(grid / grid.max(), (28, 28), "bilinear")
    np.testing.assert_allclose(blended / 255, colormaps["plasma"](value)[..., :3], atol=0.003)


@pytest.mark.parametrize("grid", [np.zeros((3, 3)), np.full((3, 3), np.nan)])
def test_a_map_that_cannot_be_shown_leaves_the_radiograph_alone_and_is_named(grid, tmp_path):
    image = np.linspace(0, 1, 81).reshape(9, 9)
    rgb = overlay.composite(image, grid)
    assert (rgb == np.round(image * 255)[..., None].astype(np.uint8)).all()
    figure = overlay.overlay_figure(image, grid, title="Normal (p = 0.9)", subtitle="LIME")
    captions = [axes.get_title() for axes in figure.axes]
    assert any("zero everywhere" in text or "undefined" in text for text in captions)
    assert len(figure.axes) == 2  # and no colour bar


def test_an_overlay_file_says_class_probability_and_explainer(tmp_path):
    image, grid = np.random.default_rng(0).random((32, 32)), np.random.default_rng(1).normal(size=(4, 4))
    mask = np.zeros((32, 32), bool)
    mask[8:20, 8:20] = True
    for suffix in ("png", "pdf", "svg"):
        path = overlay.write_overlay(
            tmp_path / "deep" / f"a.{suffix}",
            image_HW=image,
            map_hw=grid,
            title="COVID-19 (p = 0.97)",
            subtitle="AttnLRP",
            mask_HW=mask,
        )
        assert path.stat().st_size > 3000
    figure = overlay.overlay_figure(image, grid, title="COVID-19 (p = 0.97)", subtitle="AttnLRP", mask_HW=mask)
    text = svg(figure)
    for expected in ("COVID-19 (p = 0.97)", "AttnLRP", "against", "mask outlined"):
        assert expected in text
    with Image.open(tmp_path / "deep" / "a.png") as picture:
        assert picture.size[0] > 800


def test_a_mask_s_outline_is_its_inner_edge():
    mask = np.zeros((9, 9), bool)
    mask[2:7, 2:7] = True
    drawn = overlay.outlined(np.zeros((9, 9, 3), np.uint8), mask)
    touched = drawn.any(-1)
    inner = np.zeros_like(mask)
    inner[3:6, 3:6] = True
    assert (touched == (mask & ~inner)).all()


def test_grey_comes_back_from_the_model_s_input():
    grey = np.random.default_rng(0).random((5, 5))
    normalised = (np.repeat(grey[None], 3, 0) - np.array([0.4, 0.5, 0.6])[:, None, None]) / 0.25
    np.testing.assert_allclose(overlay.grey_image(normalised, (0.4, 0.5, 0.6), (0.25,)), grey, atol=1e-12)


# -- which images are shown


def test_typical_images_are_right_and_of_all_classes(run_url):
    run = open_run(run_url)
    cube = score_cube(run.scores.arrow(), run.record)
    choice = typical(cube, 6, "random")
    rows = [cube.image_ids.index(i) for i in choice.image_ids]
    assert [cube.labels_I[r] for r in rows] == [name for name in CLASSES for _ in range(2)]
    assert all(cube.labels_I[r] == cube.predicted_I[r] for r in rows)


def test_the_rule_says_which_classes_no_image_was_predicted_of(run_url):
    run = open_run(run_url)
    cube = score_cube(run.scores.arrow(), run.record)
    assert "wrongly" not in typical(cube, 6, "random").rule
    never = replace(cube, predicted_I=np.where(cube.labels_I == "Pneumonia", "Normal", cube.labels_I))
    choice = typical(never, 6, "random")
    assert choice.rule.endswith(
        "; as no image of Pneumonia is predicted rightly, those shown are wrongly predicted ones"
    )
    assert sum(never.labels_I[cube.image_ids.index(i)] == "Pneumonia" for i in choice.image_ids) == 2
    unlabelled = typical(replace(cube, labels_I=np.full(cube.num_images, None)), 6, "random")
    assert len(unlabelled.image_ids) == 6
    assert "class" not in unlabelled.rule
    assert "rightly" not in unlabelled.rule


def test_best_and_worst_lie_at_the_ends(run_url):
    run = open_run(run_url)
    cube = score_cube(run.scores.arrow(), run.record)
    choice = best_and_worst(cube, 3, "random")
    values = cube.image_means()[:-1, 0]  # faithfulness, all but the random map
    standing = ((values - values.mean(1, keepdims=True)) / values.std(1, keepdims=True)).mean(0)
    order = [cube.image_ids[k] for k in np.argsort(-standing)]
    assert choice.image_ids == (*order[:3], *order[::-1][:3])
    assert choice.remarks == ("best",) * 3 + ("worst",) * 3


def test_disputed_images_have_the_least_alike_maps(run_url):
    run = open_run(run_url)
    cube = score_cube(run.scores.arrow(), run.record)
    maps = dict(load_maps(run, cube.image_ids))
    flipped = cube.image_ids[5]
    for explainer in ("lime", "rollout"):
        stored = maps[flipped, explainer]
        maps[flipped, explainer] = type(stored)(grid_hw=-stored.grid_hw, target=stored.target, status=stored.status)
    choice = disagreements(cube, maps, 2, "random")
    assert choice.image_ids[0] == flipped
    assert choice.remarks[0].startswith("ρ = −")


def test_long_lists_are_sampled_but_keep_what_is_shown():
    ids = [f"{i:04d}" for i in range(500)]
    chosen = chosen_images(ids, ["0499", "0007"], 50, 0)
    assert len(chosen) == 50
    assert {"0499", "0007"} < set(chosen)
    assert chosen == sorted(chosen) == chosen_images(ids, ["0499", "0007"], 50, 0)


# -- pixels


def test_maps_come_back_with_their_scale(run_url):
    run = open_run(run_url)
    frame = run.maps.pandas()
    maps = load_maps(run, set(frame["image_id"]))
    row = frame[(frame.explainer == "attn_lrp") & (frame.repeat == 0)].iloc[3]
    expected = np.asarray(row["map"], np.float64).reshape(14, 14) * row["scale"]
    np.testing.assert_allclose(maps[row["image_id"], "attn_lrp"].grid_hw, expected)


def test_pictures_are_the_files_with_masks_and_twins(run_url):
    run = open_run(run_url)
    ids = list(run.predictions.arrow()["image_id"].to_pylist()[:20])
    pictures = load_pictures(run, ids)
    assert pictures.notes == ()
    first = pictures.found[ids[0]]
    assert first.grey_HW.shape == (96, 96)
    assert first.masks["lesion"].sum() > 100
    assert first.twin_HW[first.masks["lesion"]].mean() < first.grey_HW[first.masks["lesion"]].mean()


NIH_ENTRIES = """Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position
0.png,Pneumonia,0,1,58,M,PA
1.png,Pneumonia|Mass,0,2,58,M,PA
2.png,No Finding,0,3,81,F,AP
3.png,No Finding,0,4,40,F,AP
4.png,Mass,0,5,40,F,PA
5.png,Edema,0,6,40,F,PA
"""


def test_pictures_are_found_with_the_findings_that_the_run_chose(tmp_path):
    # by default image 1 has two findings and is left out; filed under Pneumonia, the run has images 0 to 3
    (tmp_path / "images").mkdir()
    (tmp_path / "Data_Entry_2017.csv").write_text(NIH_ENTRIES)
    for number in range(6):
        Image.fromarray(np.full((96, 96), 40 * number, np.uint8)).save(tmp_path / "images" / f"{number}.png")
    findings = {"classes": ["Pneumonia", "No Finding"], "several": "first"}
    dataset = open_dataset(str(tmp_path), findings=FindingOptions.model_validate(findings))
    ids = [record.image_id for record in dataset.records]
    assert len(ids) == 4
    make_run(tmp_path / "run", Design(num_images=4))
    folder = RunFolder(str(tmp_path / "run"))
    record = folder.read_json("run.json")
    record["data"] |= {"path": str(tmp_path), "root": dataset.root, "layout": "nih"}
    record["config"]["data"] = {"path": str(tmp_path), "findings": findings}
    folder.write_json(record, "run.json")
    pictures = load_pictures(open_run(str(tmp_path / "run")), ids)
    assert pictures.notes == ()
    for number, image_id in enumerate(ids):
        np.testing.assert_allclose(pictures.found[image_id].grey_HW, 40 * number / 255, atol=1e-6)


# -- the pictures


@pytest.fixture(scope="module")
def material(run_url):
    run = open_run(run_url)
    return make_gallery(run, make_study(run), ReportOptions(max_pixels=0)).material


def test_pictures_of_maps_that_were_scored_finer_are_squares_and_say_so(material, page):
    image_id = next(iter(material.pictures))
    grey_HW = material.pictures[image_id].grey_HW
    unmarked = replace(material, outline=None)
    for label, how in (("lime", "nearest"), ("rollout", "bilinear")):
        grid = material.maps[image_id, label].grid_hw
        expected = overlay.composite(grey_HW, grid, signed=False, options=overlay.OverlayOptions(upsampling=how))
        np.testing.assert_array_equal(overlay_rgb(image_id, label, unmarked), expected)
    said = "LIME: scores are of the full map (pixels or superpixels), pictures show what a run stores of it"
    assert page.count(said) == 4  # three figures and the browser
    assert averaged_note(replace(material, averaged=frozenset())) == ""
    assert averaged_note(replace(material, averaged=frozenset({"lime", "rollout"}))).startswith("LIME and Attention")


def test_pictures_are_upsampled_as_the_run_configured(tmp_path):
    record = make_run(tmp_path / "run", Design(num_images=6, explainers=("rollout",)))
    record["config"]["maps"]["upsampling"] = "nearest"
    RunFolder(str(tmp_path / "run")).write_json(record, "run.json")
    run = open_run(str(tmp_path / "run"))
    found = make_gallery(run, make_study(run), ReportOptions()).material
    assert (found.upsampling, averaged_note(found)) == ({"rollout": "nearest"}, "")


def test_scores_below_pictures_have_as_many_digits_as_the_table(material, run_url):
    made = make_study(open_run(run_url))
    labels = [metric.label for metric in made.cube.metrics]
    assert material.digits == {
        m: column_digits([made.summaries["all images"][e, m] for e in made.cube.explainers]) for m in labels
    }
    small = made.cube.values_EMIR / 100  # of scores near 0.003 two decimals would show nothing
    finer = replace(material, cube=replace(made.cube, values_EMIR=small), digits=dict.fromkeys(labels, 5))
    shown = shown_metrics(made.cube.metrics, 4)
    score = finer.cube.image_means()[made.cube.explainers.index("rollout"), 0, 0]
    assert f"F {score:.5f}" in score_lines(made.cube.image_ids[0], "rollout", finer, shown)[0]


# -- the page


class Links(html.parser.HTMLParser):
    """Collects what a page would fetch, the text it shows, and ids."""

    def __init__(self):
        super().__init__()
        self.fetched, self.ids, self.anchors, self.images_without_text = [], [], [], 0

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        for key in ("src", "href", "data", "poster", "action"):
            target = found.get(key) or ""
            if target.startswith("#"):
                self.anchors.append(target[1:])
            elif target and not target.startswith("data:"):
                self.fetched.append(target)
        if tag == "img" and not found.get("alt"):
            self.images_without_text += 1


def test_the_page_loads_nothing_and_its_links_lead_somewhere(page):
    links = Links()
    links.feed(page)
    assert links.fetched == []
    without_record = re.sub(r"<pre>.*?</pre>", "", page, flags=re.S)
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org)", without_record)
    assert set(links.anchors) <= set(links.ids)
    assert links.images_without_text == 0
    assert 'lang="en"' in page


def test_the_page_says_what_was_run_and_what_was_found(page, run_url):
    text = re.sub(r"\s+", " ", page)
    made = make_study(open_run(run_url))
    summary = made.summaries["all images"]["transformer_lrp", "faithfulness_correlation"]
    assert f"<small>median {summary.median:.3f}</small>" in page  # visible, so also in print
    for expected in (
        "vit_tiny_patch16_224", "cd" * 32, "0.1.0", "42 images of 21 patients", "Attention rollout", "Holm",
        "missing_mask",
        f"{summary.mean:.3f}", "the file is empty", "Kendall", "lesion mask", "lesion-free twin", "critical difference",
    ):  # fmt: skip
        assert expected in text, expected
    assert "images are synthetic" not in text


def test_findings_name_all_who_share_the_best_mean(tmp_path):
    same = {(e, "pointing_game"): 9.0 for e in ("lime", "rollout")}  # both hit every lesion
    make_run(
        tmp_path / "run", Design(explainers=("attn_lrp", "lime", "rollout"), metrics=("pointing_game",), shifts=same)
    )
    text = Path(write_report(str(tmp_path / "run"))).read_text("utf-8")
    assert "Pointing game ↑: LIME and Attention rollout share the best mean, 1.00" in text


def test_sentences_about_scores_do_not_run_into_each_other(tmp_path):
    same = {("lime", "faithfulness_correlation"): 5.0}  # the metric ends at 1: so do all scores
    make_run(
        tmp_path / "run", Design(explainers=("lime", "random"), metrics=("faithfulness_correlation",), shifts=same)
    )
    text = Path(write_report(str(tmp_path / "run"))).read_text("utf-8")
    assert "without a range there is none. Every image was scored." in re.sub(r"\s+", " ", text)


def test_the_figure_says_which_class_its_maps_explain(page):
    assert "its map explains the class that the model predicts for that image" in page


def test_hostile_names_come_out_as_text(page):
    assert "<script>window.broken" not in page
    assert "&lt;script&gt;window.broken" in page
    assert json.loads(script_json({"a": "</script>&<!--"})) == {"a": "</script>&<!--"}


def test_a_report_does_not_depend_on_the_time_or_the_order_of_anything(run_url, page, tmp_path):
    again = Path(write_report(run_url, tmp_path / "again.html")).read_text("utf-8")
    assert again == page


def test_without_the_images_the_page_says_so_and_shows_maps(run_url, tmp_path):
    shutil.copytree(run_url, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["data"] |= {"root": str(tmp_path / "gone"), "path": None, "synthetic": True}
    record["status"] = "running"
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    text = Path(write_report(str(tmp_path / "run"))).read_text("utf-8")
    assert "42 of 42 images could not be read again" in text or "could not be read again from" in text
    assert "The images are synthetic" in text
    assert "The run is not finished" in text
    assert "the maps of all and the pixels of 0;" in text
    assert "data:image/webp" in text


def test_sessions_of_different_versions_are_said(run_url, tmp_path):
    shutil.copytree(run_url, tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    record = json.loads(path.read_text())
    idle = {"num_cells": 0, "versions": {"torch": "2.9", "numpy": "1.0"}, "code": {}}
    record["sessions"] = [idle, *({"num_cells": 3, "versions": {"torch": v, "numpy": "2.0"}} for v in ("2.9", "2.10"))]
    path.write_text(json.dumps(record))
    assert "Sessions of this run used different versions (torch)" in Path(write_report(str(path.parent))).read_text()


def test_what_was_left_out_of_the_data_or_guessed_of_the_model_is_said(run_url, tmp_path):
    shutil.copytree(run_url, tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    record = json.loads(path.read_text())
    record["data"]["notes"] = ["3 files that are no images by their name were left out", "simulated: synthetic"]
    record["model"] |= {"source": {"kind": "checkpoint", "classes_from": "the data"}}
    record["model"]["preprocessing"]["source"] = "timm configuration"
    path.write_text(json.dumps(record))
    said = list(notices(open_run(str(path.parent)), make_study(open_run(run_url)).cube))
    assert "Data: 3 files that are no images by their name were left out." in said
    assert not any("simulated" in notice for notice in said)
    names = "class names were taken from the data in alphabetical order, COVID-19, Normal, Pneumonia"
    assert any(names in notice for notice in said)
    assert any("taken from timm's configuration" in notice for notice in said)
    record["model"] |= {"source": {"kind": "checkpoint", "classes_from": "the checkpoint"}}
    record["model"]["preprocessing"]["source"] = "checkpoint metadata"
    path.write_text(json.dumps(record))
    fewer = list(notices(open_run(str(path.parent)), make_study(open_run(run_url)).cube))
    assert [notice for notice in said if notice not in fewer] == [n for n in said if "The checkpoint" in n]


def browser_data(text):
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


def test_every_image_is_listed_with_its_scores_and_what_is_left_out_is_stated(run_url, tmp_path):
    options = ReportOptions(max_pixels=10, max_maps=20, num_disputed=1, num_extreme=1, num_typical=3)
    text = Path(write_report(run_url, tmp_path / "few.html", options)).read_text("utf-8")
    assert "All 42 images are listed with all their scores" in text
    assert "the maps of 20 images (those shown above and a random sample of the others) and the pixels of 10;" in text
    assert "among 20 of 42 images, drawn at random" in text
    data = browser_data(text)
    assert (len(data["images"]), len(data["maps"]), len(data["pixels"])) == (42, 20, 10)
    cube = make_study(open_run(run_url)).cube
    assert [row[0] for row in data["images"]] == list(cube.image_ids)
    for e, columns in enumerate(data["scores"]):
        for m, column in enumerate(columns):
            scores = np.frombuffer(base64.b64decode(column), "<f4")
            np.testing.assert_allclose(scores, cube.image_means()[e, m], rtol=1e-7)


def test_the_study_s_three_hundred_images_all_have_their_pixels(tmp_path):
    make_run(tmp_path / "run", Design(num_images=300, explainers=("lime", "random"), pixels=str(tmp_path / "images")))
    text = Path(write_report(str(tmp_path / "run"))).read_text("utf-8")
    assert "All 300 images are listed with all their scores, maps and pixels" in text
    assert len(browser_data(text)["pixels"]) == 300


def test_the_command_line_says_how_many_images_to_embed(run_url, tmp_path):
    target = tmp_path / "few.html"
    done = CliRunner().invoke(app, ["report", run_url, "-o", str(target), "--images", "8", "--maps", "9"])
    assert done.exit_code == 0, done.output
    data = browser_data(target.read_text("utf-8"))
    assert (len(data["images"]), len(data["maps"]), len(data["pixels"])) == (42, 9, 8)


def test_an_object_store_gets_its_report():
    make_run("memory://reports/run", Design(num_images=12))
    write_report("memory://reports/run")
    assert RunFolder("memory://reports/run").read_bytes("report.html").startswith(b"<!doctype html>")
    assert write_report("memory://reports/run", "memory://papers/a.html") == "memory://papers/a.html"
    assert RunFolder("memory://papers").read_bytes("a.html") == RunFolder("memory://reports/run").read_bytes(
        "report.html"
    )


def test_a_run_of_one_explainer_one_metric_and_few_images_has_a_report(tmp_path):
    make_run(tmp_path / "tiny", Design(num_images=5, explainers=("lime",), metrics=("pointing_game",)))
    text = Path(write_report(str(tmp_path / "tiny"))).read_text("utf-8")
    assert "no random map" in text
    assert "LIME" in text


def test_a_run_without_scores_is_refused(tmp_path):
    RunFolder(str(tmp_path / "new")).create()
    RunFolder(str(tmp_path / "new")).write_json({}, "run.json")
    with pytest.raises(RunFolderError, match="no scores yet"):
        write_report(str(tmp_path / "new"))


def test_letters_tell_many_metrics_apart():
    def metric(title, family):
        return MetricInfo(label=title, title=title, higher_is_better=True, bounds=(0, 1), family=family)

    metrics = [
        metric("a", "faithfulness"),
        metric("b", "faithfulness"),
        metric("c", "complexity"),
        metric("d", "robustness"),
    ]
    assert [m.letter for m in shown_metrics(metrics, 4)] == ["F1", "F2", "C", "S"]
    assert [m.letter for m in shown_metrics(metrics, 3)] == ["F", "C", "S"]
    assert [m.place for m in shown_metrics(metrics, 3)] == [0, 2, 3]


# -- in a browser

PROBE = (Path(__file__).parent / "report_probe.js").read_text("utf-8")
"""Clicks, sorts and filters inside the page, and leaves what it found in `#probe`."""


@pytest.fixture(scope="module")
def chromium():
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if found is None:
        missing = "needs Chromium (Debian: apt-get install chromium)"
        if os.environ.get("XAIBATCH_REQUIRE_CHROMIUM"):
            pytest.fail(missing)
        pytest.skip(missing)
    return found


def browse(chromium, folder, page, *options, width=1280):
    """Open a page headless; returns its final DOM and the console's lines."""
    (folder / "page.html").write_text(page, "utf-8")
    done = subprocess.run(
        [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
            "--enable-logging=stderr", f"--window-size={width},900", "--virtual-time-budget=20000", *options,
            "--dump-dom", str(folder / "page.html"),
        ],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def probed(chromium, page, tmp_path_factory):
    dom, console = browse(
        chromium, tmp_path_factory.mktemp("chromium"), page.replace("</body>", f"<script>{PROBE}</script></body>")
    )
    found = re.search(r'<pre id="probe">(.*?)</pre>', dom, re.S)
    assert found, dom[-2000:]
    return json.loads(html.unescape(found[1])) | {"console": console, "errors": "data-errors" in dom}


def test_the_page_opens_without_a_word_in_the_console(probed):
    assert probed["console"] == []
    assert not probed["errors"]
    assert probed.get("broken") is None


def test_tables_sort_by_keyboard_and_click(probed):
    assert probed["focused"]
    assert probed["up"] == sorted(probed["up"])
    assert probed["down"] == sorted(probed["up"], reverse=True)
    assert (probed["sortedUp"], probed["sortedDown"]) == ("ascending", "descending")
    assert probed["visible"] == ["1"]


def test_images_sort_and_filter_by_score(probed, run_url):
    cube = make_study(open_run(run_url)).cube
    first = cube.image_means()[0, 0]
    best = [cube.image_ids[k] for k in np.argsort(-first)]
    assert probed["all"] == "42 of 42 images, the first 24 shown"
    assert probed["best"] == best[:24]
    assert probed["worst"] == best[::-1][:24]
    normal = sorted(i for i, name in zip(cube.image_ids, cube.labels_I, strict=True) if name == "Normal")
    assert probed["normal"] == normal
    wrong = [i for i in normal if cube.predicted_I[cube.image_ids.index(i)] != "Normal"]
    assert probed["wrong"] == wrong
    hits = int((cube.image_means()[0, 3] >= 0.9).sum())
    assert probed["hits"].startswith(f"{hits} of 42 images")
    assert set(probed["named"]) == {i for i in cube.image_ids if "0001" in i}
    assert probed["more"] == 42
    assert probed["open"]
    assert probed["views"] == 1 + len(EXPLAINERS)


def test_the_browser_s_overlay_is_the_same_picture_as_in_python(probed, run_url):
    run = open_run(run_url)
    cube = make_study(run).cube
    hits = cube.image_means()[0, 3]
    image_id = sorted(cube.image_ids, key=lambda i: (-np.nan_to_num(hits[cube.image_ids.index(i)], nan=-1), i))[0]
    maps, picture = load_maps(run, [image_id]), load_pictures(run, [image_id]).found[image_id]
    for e, label in enumerate(cube.explainers):
        png = base64.b64decode(probed["canvas"][1 + e].partition(",")[2])
        drawn = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(float)
        expected, other = (
            overlay.composite(
                picture.grey_HW,
                maps[image_id, label].grid_hw,
                signed=EXPLAINERS[label]["signed"],
                options=overlay.OverlayOptions(upsampling=how),
            )
            # LIME's stored map is a mean over patches, drawn as squares
            for how in (("nearest", "bilinear") if label == "lime" else ("bilinear", "nearest"))
        )
        assert drawn.shape == expected.shape
        # the browser starts from a compressed thumbnail and one byte a value
        assert np.abs(drawn - expected).mean() < min(6, np.abs(drawn - other).mean()), label


def test_the_page_fits_a_telephone(chromium, page, tmp_path):
    probe = (
        "<script>addEventListener('load',()=>{document.title='w'+document.documentElement.scrollWidth})</script></body>"
    )
    dom, _ = browse(chromium, tmp_path, page.replace("</body>", probe), width=500)
    assert int(re.search(r"<title>w(\d+)</title>", dom)[1]) <= 500
