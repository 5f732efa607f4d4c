"""The pictures of a report: which images are chosen, their pixels and maps, what stands below them."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.synthetic_run import CLASSES, Design, make_run
from xaibatch.data.dataset import open_dataset
from xaibatch.data.findings import FindingOptions
from xaibatch.results import overlay
from xaibatch.results.cube import score_cube
from xaibatch.results.frames import open_run
from xaibatch.results.parts import RunFolder
from xaibatch.results.report_choice import best_and_worst, disagreements, typical
from xaibatch.results.report_figure import averaged_note, overlay_rgb, score_lines, shown_metrics
from xaibatch.results.report_gallery import ReportOptions, chosen_images, make_gallery
from xaibatch.results.report_images import load_maps, load_pictures
from xaibatch.results.study import make_study
from xaibatch.results.summary import column_digits

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
