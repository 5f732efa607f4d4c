"""The report in headless Chromium: no word in the console, tables sort, filters work, it fits a telephone."""

import base64
import html.parser
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.synthetic_run import EXPLAINERS
from xaibatch.results import overlay
from xaibatch.results.frames import open_run
from xaibatch.results.report_images import load_maps, load_pictures
from xaibatch.results.study import make_study

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
