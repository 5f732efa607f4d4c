"""A user's own explainer, as jobs/README.md tells it: a file in the current folder, named on the command line."""

import re
import sys
from pathlib import Path

import pytest

from tests.engine_chaos import write_config
from tests.engine_cluster import ROOT
from tests.toy import toy_config, toy_images
from xaibatch.cli import main
from xaibatch.explainers import plugin
from xaibatch.results.parts import RunFolder


@pytest.fixture
def saliency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The documented lines as `saliency.py` in the current folder, which is not on the Python path."""
    section = (ROOT / "jobs" / "README.md").read_text().partition("## Your own explainer")[2]
    lines = re.search(r"```python\n(.*?)```", section, re.S)
    assert lines is not None
    (tmp_path / "saliency.py").write_text(lines[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "saliency", raising=False)
    return lines[1]


def test_the_documented_lines_score_in_a_run(saliency: str, tmp_path: Path) -> None:
    config = toy_config(
        toy_images(tmp_path / "data", 1), tmp_path / "run", explainers={"random": {}}, metrics={"sparseness": {}}
    )
    with pytest.raises(SystemExit) as ended:
        main([
            "evaluate", "--no-ray", "--no-report", "--config", str(write_config(config, tmp_path / "run.yaml")),
            "--explainers", "saliency:mean_gradient,random", "--set", "explainers.saliency:mean_gradient.power=2",
        ])  # fmt: skip
    assert ended.value.code == 0
    folder = RunFolder(str(tmp_path / "run"))
    scores = folder.read("scores").to_pandas()
    assert scores.groupby("explainer", observed=True).score.count().to_dict() == {
        "random": 3,
        "saliency:mean_gradient": 3,
    }
    assert folder.read_json("run.json")["explainers"]["saliency:mean_gradient"]["options"] == {"power": 2.0}


def test_the_two_places_that_show_it_agree(saliency: str) -> None:
    """jobs/README.md and the module that reads such functions."""
    code = [line for line in saliency.splitlines() if line and not line.lstrip().startswith(('"""', "import"))]
    shown = [line[4:] for line in (plugin.__doc__ or "").splitlines() if line.startswith((">>> ", "... "))]
    assert [line for line in shown if "'''" not in line][: len(code)] == code


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("def f(:", "mine:f", "'mine' fails on import: SyntaxError"),
        ("raise KeyError('x')", "mine:f", "'mine' fails on import: KeyError"),
        ("import torch\ndef maps(model, images, targets): ...", "mine:map", "Did you mean 'maps'? Known: maps\n"),
    ],
)
@pytest.mark.parametrize("kind", ["--explainers", "--metrics"])
def test_a_mistake_in_the_file_is_one_line(
    text: str, names: str, message: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    config = toy_config(toy_images(tmp_path / "data", 1), tmp_path / "run", explainers={"random": {}})
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--no-ray", "--config", str(write_config(config, tmp_path / "run.yaml")), kind, names])
    said = capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    assert ended.value.code == 2 and said.count("\n") == 1
    assert kind == "--metrics" or message in said
