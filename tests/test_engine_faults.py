"""What goes wrong in the middle of a run: errors, crashes, full disks, no memory. The rest of the run does not suffer,
it is said what was given up, and the same command mends it once the cause is gone."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.cluster_utils import Cluster

from tests.engine_cluster import assert_same_rows, tables
from tests.toy import Watch, toy_config
from xaibatch.cluster.driver import run_on_ray
from xaibatch.data.sampling import shards
from xaibatch.errors import EngineError, RunFolderError
from xaibatch.pipeline import local
from xaibatch.pipeline.local import run_local
from xaibatch.pipeline.record import job_of
from xaibatch.pipeline.run import Outcome, choose_images, evaluate
from xaibatch.pipeline.session import Session
from xaibatch.results import parts
from xaibatch.results.parts import RunFolder
from xaibatch.results.retrying import Retries

SETTINGS: dict[str, Any] = {
    "explainers": {"tests.engine_faults:brightness": {}, "random": {}},
    "metrics": {"tests.engine_faults:Peak": {}, "tests.engine_faults:Refusing": {}, "effective_complexity": {}},
    "engine__threads": 1,
    "engine__max_attempts": 1,
}


@pytest.fixture(scope="module")
def plain(images: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The run without faults, in this process."""
    return run(images, tmp_path_factory.mktemp("plain") / "run", engine=run_local).folder


def run(images: Path, output: Path, engine: Any = run_on_ray, **settings: Any) -> Outcome:
    return evaluate(toy_config(images, output, **SETTINGS | settings), engine, Watch())


def test_errors_and_crashes_are_given_up_alone(
    cluster: Cluster, faults: Path, images: Path, tmp_path: Path, plain: RunFolder
) -> None:
    """One image ends the process of whatever replica explains it, and one metric cannot make plans. Only the cells of
    that image's shard and of that metric are given up, after a bounded number of attempts; its neighbours, two shards
    that were on the same replica when it died, are complete. Without the faults, the same call does what is
    missing."""
    (faults / "crash").write_text("normal/0.png")
    (faults / "no_plan").touch()
    outcome = run(images, tmp_path / "run", engine__shards_in_flight=3)
    given_up = sorted((cell.shard, cell.stage.partition(":")[0]) for cell in outcome.failed)
    crashed = ["effective_complexity+tests.engine_f", "explain", "tests.engine_f"]
    assert not outcome.ok
    assert {shard for shard, _ in given_up} == {"shard-00000", "shard-00001", "shard-00002"}
    lost = [cell for cell in outcome.failed if cell.shard == "shard-00001"]
    assert len(lost) == 3 and all("Actor" in cell.error for cell in lost), crashed
    kept = [cell for cell in outcome.failed if cell.shard != "shard-00001"]
    assert len(kept) == 2 and all(cell.error == "ArithmeticError: no plan today" for cell in kept)
    # first with its neighbours, then alone; each time once more by Ray itself
    assert 2 <= len((faults / "crashes").read_text()) <= 4
    assert set(tables(outcome.folder)["predictions"].index.str.partition("/").get_level_values(0)) == {
        "covid", "pneumonia",
    }  # fmt: skip

    (faults / "crash").unlink()
    (faults / "no_plan").unlink()
    again = run(images, tmp_path / "run")
    assert again.ok and again.num_cells_run == len(outcome.failed)
    assert_same_rows(again.folder, plain)


def test_an_explainer_s_error_is_a_row(
    cluster: Cluster, faults: Path, images: Path, tmp_path: Path, plain: RunFolder
) -> None:
    """An explainer that fails on one image costs that image's map and the scores of that map, each with its reason."""
    (faults / "refuse").write_text("covid/2.png")
    outcome = run(images, tmp_path / "run")
    assert not outcome.failed and outcome.num_image_failures == 1
    found, wanted = tables(outcome.folder), tables(plain)
    refused = found["scores"]["status"].ne(wanted["scores"]["status"])
    assert set(refused[refused].index.droplevel(["metric", "repeat"])) == {
        ("covid/2.png", "tests.engine_faults:brightness")
    }
    assert (found["scores"][refused]["reason"] == "ValueError: not this one").all()
    assert found["scores"][~refused].equals(wanted["scores"][~refused])


def test_a_full_disk_is_waited_for(
    cluster: Cluster, faults: Path, images: Path, tmp_path: Path, plain: RunFolder
) -> None:
    """Space is made while the run waits: nothing is lost, nothing is given up."""
    (faults / "disk_full").touch()

    def make_space() -> None:
        while not (faults / "disk_full_hits").exists() or len((faults / "disk_full_hits").read_text()) < 2:
            time.sleep(0.05)
        (faults / "disk_full").unlink()

    person = threading.Thread(target=make_space, daemon=True)
    person.start()
    outcome = run(images, tmp_path / "run")
    person.join()
    assert outcome.ok
    assert_same_rows(outcome.folder, plain)


def test_a_disk_that_stays_full_ends_the_run(
    cluster: Cluster, faults: Path, images: Path, tmp_path: Path, plain: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a limit: the run ends, says why and how to go on, leaves no half-written part, and goes on later."""
    monkeypatch.setattr(parts, "Retries", lambda attempts=2: Retries(attempts=attempts, first_pause_s=0.01))
    (faults / "disk_full").touch()
    with pytest.raises(EngineError, match=r"cannot be kept.*No space left.*run the same command again"):
        run(images, tmp_path / "run")
    folder = RunFolder(str(tmp_path / "run"))
    assert not any(folder.problems(table) for table in ("scores", "maps", "predictions", "failures"))
    (faults / "disk_full").unlink()
    assert run(images, tmp_path / "run").ok
    assert_same_rows(folder, plain)


def test_without_ray_a_disk_that_stays_full_ends_the_run(
    images: Path, tmp_path: Path, plain: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `max_attempts` attempts at the first part that cannot be written, not at every one."""
    tried: list[str] = []

    def full(folder: RunFolder, table: str, part: str, rows: Any, **_: Any) -> None:
        tried.append(f"{table}/{part}")
        raise RunFolderError("cannot write: No space left on device. Run the same command again")

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_part", full)
        with pytest.raises(EngineError, match=r"cannot be kept.*No space left"):
            run(images, tmp_path / "run", engine=run_local, engine__max_attempts=2)
    assert tried == ["failures/shard-00000"] * 2
    outcome = run(images, tmp_path / "run", engine=run_local)
    assert outcome.ok
    assert_same_rows(outcome.folder, plain)


def test_without_ray_too_a_cell_has_its_attempts(
    faults: Path, images: Path, tmp_path: Path, plain: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A metric that makes plans again at the second attempt loses nothing; one that does not is given up alone."""
    (faults / "no_plan").touch()
    outcome = run(images, tmp_path / "given up", engine=run_local)
    assert {cell.error for cell in outcome.failed} == {"ArithmeticError: no plan today"} and len(outcome.failed) == 3
    group = local.run_group

    def mended(*arguments: Any) -> None:
        try:
            group(*arguments)
        except ArithmeticError:
            (faults / "no_plan").unlink()
            raise

    monkeypatch.setattr(local, "run_group", mended)
    outcome = run(images, tmp_path / "run", engine=run_local, engine__max_attempts=2)
    assert outcome.ok and not (faults / "no_plan").exists()
    assert_same_rows(outcome.folder, plain)


@pytest.mark.parametrize("engine", [run_local, run_on_ray])
def test_out_of_memory_halves_the_batch_and_remembers(
    cluster: Cluster, faults: Path, images: Path, tmp_path: Path, plain: RunFolder, engine: Any
) -> None:
    """Four images do not fit, two do: that is found out once, and the rows are those of an undisturbed run."""
    (faults / "out_of_memory").touch()
    outcome = run(images, tmp_path / "run", engine=engine)
    assert outcome.ok and (faults / "out_of_memory_hits").read_text() == "x"
    assert_same_rows(outcome.folder, plain)


def test_shards_held_make_room_for_the_next(
    images: Path, tmp_path: Path, plain: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device has room for one shard's images: those of the others go, and are read again when they are asked for.
    With no other to let go it is an error of its own."""
    config = toy_config(images, tmp_path / "run", **SETTINGS)
    session = Session(job_of(plain.read_json("run.json"), config, plain))
    first, second, _ = shards(choose_images(config).records, 4)
    batches = {shard.name: session.job.read(shard) for shard in (first, second)}
    tensor, room = torch.tensor, [1]

    def full(*arguments: Any, **keywords: Any) -> torch.Tensor:
        if len(session._held) >= room[0]:
            raise torch.OutOfMemoryError("out of memory (injected)")
        return tensor(*arguments, **keywords)

    monkeypatch.setattr(torch, "tensor", full)
    for shard in (first, second):
        session.keep(shard, *batches[shard.name])
        assert list(session._held) == [shard.name]
    assert session.hold(first).batch.ids == batches[first.name][0].ids
    room[0] = 0
    with pytest.raises(torch.OutOfMemoryError):
        session.keep(second, *batches[second.name])
