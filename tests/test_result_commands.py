"""`query`, `report`, `export`, `summary` and `compare` as typed: text is shown as it is, unfinished runs are called so,
and a place that cannot be written is one line."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from tests.synthetic_run import Design, make_run
from xaibatch.cli import main
from xaibatch.results.compare import compare_runs
from xaibatch.results.frames import open_run
from xaibatch.results.parts import RunFolder
from xaibatch.results.report import has_report, report_url, write_report
from xaibatch.results.schema import SCORES

SMALL = Design(num_images=12, shard_size=4, explainers=("lime", "random"), metrics=("pointing_game",))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make_run(tmp_path / "a run[bold]", SMALL)
    return tmp_path / "a run[bold]"


def typed(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


def change_record(run: Path, **changes: object) -> None:
    path = run / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_square_brackets_are_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed("query", run, "SELECT '[/red]' AS \"a[b]\", 'x[bold]' AS c FROM scores LIMIT 1") == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("[/red]", "a[b]", "x[bold]"))


def test_a_report_from_before_the_end_is_not_taken_for_the_run_s(run: Path) -> None:
    change_record(run, status="running", finished=None)
    write_report(str(run))
    assert has_report(open_run(run))
    change_record(run, status="finished", finished="2026-01-02T03:04:05+00:00")
    assert not has_report(open_run(run))
    write_report(str(run))
    assert has_report(open_run(run))


def test_a_report_in_a_store_is_named_by_its_url() -> None:
    assert report_url(RunFolder("memory://bucket/run/")) == "memory://bucket/run/report.html"


def test_an_unfinished_run_is_called_so_wherever_it_is_shown(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((run / "run.json").read_text())
    change_record(run, status="running", data={**record.get("data", {}), "num_images": 40})
    for words in (("summary", run), ("compare", run, run)):
        assert typed(*words) == 0
        shown = capsys.readouterr().out
        assert "the run is not finished" in shown and "12 of the run's 40 images have scores" in shown
    assert typed("export", run, "-o", tmp_path / "paper") == 0
    for name in ("table", "pairs"):
        assert "% the run is not finished" in (tmp_path / "paper" / f"{name}.tex").read_text()
    change_record(run, status="finished", data={**record.get("data", {}), "num_images": 12})
    capsys.readouterr()
    assert typed("summary", run) == 0
    assert "not finished" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "place"),
    [("export", "there"), ("export", "there/below"), ("report", "folder"), ("report", "there/below")],
)
def test_an_output_that_cannot_be_written_is_one_line(
    run: Path, tmp_path: Path, command: str, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").write_text("mine")
    (tmp_path / "folder").mkdir()
    assert typed(command, run, "-o", tmp_path / place) == 2
    message = capsys.readouterr().err
    assert "cannot write" in message and "choose another --output" in message and message.count("\n") == 1
    assert (tmp_path / "there").read_text() == "mine"


def test_accuracies_are_compared_on_images_that_both_runs_label_alike(run: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "other", SMALL)
    both = compare_runs(str(run), str(tmp_path / "other"))
    assert both.num_relabelled == 0
    scores = open_run(tmp_path / "other").scores.arrow()
    rows = scores.to_pylist()
    relabelled = {row["image_id"] for row in rows[:3]}
    rows = [{**row, "label": "another"} if row["image_id"] in relabelled else row for row in rows]
    shutil.rmtree(tmp_path / "other" / "scores")
    RunFolder(str(tmp_path / "other")).write_part(
        "scores", "all/shard-00000", pa.Table.from_pylist([{k: row[k] for k in SCORES.names} for row in rows], SCORES)
    )
    found = compare_runs(str(run), str(tmp_path / "other"))
    assert found.num_relabelled == len(relabelled) > 0
    alike = [p for p in open_run(run).predictions.arrow().to_pylist() if p["image_id"] not in relabelled]
    assert found.accuracy is not None
    assert found.accuracy[0] == pytest.approx(sum(p["label"] == p["predicted"] for p in alike) / len(alike))


def test_runs_of_one_name_are_told_apart_by_their_folders(run: Path, tmp_path: Path) -> None:
    same = [shutil.copytree(run, tmp_path / folder / "run") for folder in ("may", "june")]
    found = compare_runs(*map(str, same))
    assert (found.first, found.second) == ("may/run", "june/run")
    other = shutil.copytree(run, tmp_path / "other")
    found = compare_runs(str(same[0]), str(other))
    assert (found.first, found.second) == ("run", "other")
    assert compare_runs(str(run), str(run)).second == str(run)
