"""A resume is bit-identical, a finished run does no work, repeats are independent (DESIGN rule 4).

That scores do not depend on how the work was cut is tested for every metric in test_invariance_metrics.py.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests.toy import Watch, toy_config, toy_images
from xaibatch.pipeline.local import run_local
from xaibatch.pipeline.run import evaluate
from xaibatch.results.parts import RunFolder

KEY = ["image_id", "explainer", "metric", "repeat"]
METRICS: dict[str, Any] = {
    "faithfulness_correlation": {"num_runs": 8, "subset_size": 100},
    "patch_faithfulness": {"use": "faithfulness_correlation", "entries": "patch", "num_runs": 8},
    "pixel_flipping": {"features_in_step": 128},
    "avg_sensitivity": {"num_samples": 2},
    "max_sensitivity": {"num_samples": 2},
    "effective_complexity": {"eps": 0.1},
    "sparseness": {},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return toy_images(tmp_path_factory.mktemp("toy"), num_per_class=4)


def scores(images: Path, output: Path, **settings: Any) -> pd.DataFrame:
    """A run's scores by key, sorted; every key once."""
    outcome = evaluate(toy_config(images, output, metrics=METRICS, repeats=2, **settings), run_local, Watch())
    assert outcome.ok
    table = outcome.folder.read("scores").to_pandas().set_index(KEY).sort_index()
    assert table.index.is_unique
    return table


def test_resume_is_bit_identical(images: Path, tmp_path: Path) -> None:
    """Parts removed from a finished run come back bit for bit, whichever cells they belong to."""
    first = scores(images, tmp_path / "run")
    parts = sorted((tmp_path / "run" / "scores").rglob("*.parquet"))
    for part in [*parts[::2], tmp_path / "run" / "maps" / "shard-00001.parquet"]:
        part.unlink()
    again = scores(images, tmp_path / "run")
    pd.testing.assert_frame_equal(again, first, check_exact=True)


def test_finished_run_does_no_work(images: Path, tmp_path: Path) -> None:
    config = toy_config(images, tmp_path / "run")
    first = evaluate(config, run_local, Watch())
    watch = Watch()
    second = evaluate(config, run_local, watch)
    assert first.num_cells_run == 3 * 4 and second.num_cells_run == 0
    assert watch.reports == [] and second.record["status"] == "finished"


def test_repeats_are_independent_and_deterministic_maps_are_kept(images: Path, tmp_path: Path) -> None:
    """A second repeat draws anew where something is random; complexity of a map without draws stays as it is."""
    table = scores(images, tmp_path / "run")["score"].unstack("repeat")
    same = table[0] == table[1]
    assert same.xs("sparseness", level="metric").xs("transformer_lrp", level="explainer").all()
    assert not same.xs("sparseness", level="metric").xs("random", level="explainer").any()
    assert not same.xs("avg_sensitivity", level="metric").any()
    assert not same.xs("faithfulness_correlation", level="metric").any()


def test_agreement_of_repeats_is_recorded(images: Path, tmp_path: Path) -> None:
    """LIME's and the random map's repeats: the stored agreement is the correlation of the two stored maps."""
    evaluate(toy_config(images, tmp_path / "run", repeats=2, metrics={"sparseness": {}}), run_local, Watch())
    maps = RunFolder(str(tmp_path / "run")).read("maps").to_pandas()
    for (_, explainer), pair in maps.groupby(["image_id", "explainer"], observed=True):
        recorded = [dict(extras).get("repeat_agreement") for extras in pair.extras]
        if explainer in ("lime", "random"):
            a, b = (np.asarray(map_, np.float64) for map_ in pair["map"])
            assert recorded == [recorded[0]] * 2
            assert recorded[0] == pytest.approx(np.corrcoef(a, b)[0, 1], abs=2e-3)  # float16 maps
        else:
            assert recorded == [None]
