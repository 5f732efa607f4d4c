"""A run with hostile file names and its report, shared by the tests of the report."""

from pathlib import Path

import pytest

from tests.synthetic_run import Design, make_run
from xaibatch.results.report import write_report

NASTY = "</script><script>window.broken=1</script><img src=x onerror=alert(1)>.png".replace("/", "∕")
"""A file name that must come out as text everywhere."""


@pytest.fixture(scope="session")
def run_url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    names = {i: f"{i:05d}{NASTY}" for i in range(0, 42, 4)}
    design = Design(num_images=42, images_per_patient=2, repeats=2, pixels=str(folder / "images"), names=names)
    make_run(folder / "run", design)
    return str(folder / "run")


@pytest.fixture(scope="session")
def page(run_url):
    return Path(write_report(run_url)).read_text("utf-8")
