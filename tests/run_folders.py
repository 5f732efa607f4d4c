"""A small run in this process that the tests of run folders copy, damage and take up again: its fixtures and places.

Tests of other kinds load this module too, as a plugin: it imports torch where it uses it.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.toy import CLASSES, MODEL, Watch, toy_config, toy_images
from xaibatch.config import RunConfig
from xaibatch.pipeline.run import Outcome, evaluate

SETTINGS: dict[str, Any] = {
    "explainers": {"random": {}},
    "metrics": {"effective_complexity": {"eps": 0.1}, "sparseness": {}},
    "engine__shard_size": 3,
}
GROUP = "effective_complexity+sparseness"
SHARDS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "toy.safetensors"
    save_weights(path, seed=0)
    return path


def save_weights(path: Path, seed: int) -> None:
    import timm
    import torch
    from safetensors.torch import save_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(str(MODEL["model.name"]), num_classes=len(CLASSES), **MODEL["model.options"])
    save_file(model.state_dict(), path, metadata={"classes": ",".join(CLASSES)})


@pytest.fixture(scope="module")
def finished(data: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests work on copies of it."""
    return Path(run(config(data, weights, tmp_path_factory.mktemp("finished") / "run")).folder.url)


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def config(data: Path, weights: Path, output: Path | str, **settings: Any) -> RunConfig:
    made = toy_config(data, Path("unused"), **SETTINGS | {"model__checkpoint": str(weights)} | settings)
    return made.model_copy(update={"output": str(output)})


def run(config: RunConfig, watch: Watch | None = None) -> Outcome:
    from xaibatch.pipeline.local import run_local

    return evaluate(config, run_local, watch or Watch())


def part(run: Path, table: str, shard: int) -> Path:
    return run / table / (GROUP if table == "scores" else "") / f"shard-{shard:05d}.parquet"
