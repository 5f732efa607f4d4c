"""The report's page: complete in itself and honest about what it lacks."""

import base64
import html.parser
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.synthetic_run import Design, make_run
from xaibatch.cli import app
from xaibatch.errors import RunFolderError
from xaibatch.results.cube import MetricInfo
from xaibatch.results.frames import open_run
from xaibatch.results.parts import RunFolder
from xaibatch.results.report import write_report
from xaibatch.results.report_browser import script_json
from xaibatch.results.report_facts import notices
from xaibatch.results.report_figure import shown_metrics
from xaibatch.results.report_gallery import ReportOptions
from xaibatch.results.study import make_study


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


def test_a_run_of_the_random_map_alone_does_not_say_that_nothing_was_scored(tmp_path):
    make_run(tmp_path / "floor", Design(explainers=("random",), metrics=("pointing_game",)))
    text = Path(write_report(str(tmp_path / "floor"))).read_text("utf-8")
    assert "Random map" in text
    assert "nothing was scored" not in text


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
