"""cluster.yaml passes Ray's own checks, the RayJob manifest has the shape KubeRay asks for, and both start commands
that this version understands."""

import re
import shlex
from itertools import pairwise
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.engine_cluster import ROOT
from xaibatch.cli import app


def load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return content


def test_cluster_yaml_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's `prepare_config` and `validate_config`, as `ray up` calls them; without credentials or network."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    prepared = prepare_config(load("cluster.yaml"))
    validate_config(prepared)
    kinds = prepared["available_node_types"]
    assert kinds[prepared["head_node_type"]]["resources"]["CPU"] == 0
    assert kinds["gpu_spot"]["resources"]["GPU"] == 1
    for kind in ("gpu_spot", "cpu_spot"):
        assert kinds[kind]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert kinds[kind]["min_workers"] == 0 < kinds[kind]["max_workers"]
    assert sum(kind["max_workers"] for kind in kinds.values()) <= prepared["max_workers"]
    assert "--num-cpus=0" in " ".join(prepared["head_start_ray_commands"])
    assert set(prepared["file_mounts"].values()) == {"."}


def test_rayjob_has_kuberay_s_shape() -> None:
    """What the RayJob resource requires, quantities that Kubernetes can read, and worker groups that can grow."""
    job = load("jobs/rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    cluster = job["spec"]["rayClusterSpec"]
    head = cluster["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    groups = cluster["workerGroupSpecs"]
    assert len({group["groupName"] for group in groups}) == len(groups)
    for group in groups:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in [head, *groups]:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        (container,) = group["template"]["spec"]["containers"]
        assert container["name"] and container["image"] and container["envFrom"]
        for quantities in container["resources"].values():
            for what, quantity in quantities.items():
                assert re.fullmatch(r"\d+(\.\d+)?(m|Ki|Mi|Gi)?", quantity), (what, quantity)
    gpu = next(group for group in groups if group["groupName"] == "gpu")
    limits = gpu["template"]["spec"]["containers"][0]["resources"]["limits"]
    replicas = int(arguments(job["spec"]["entrypoint"])["--replicas"])
    assert limits["nvidia.com/gpu"] == "1" and replicas <= gpu["maxReplicas"]


def arguments(command: str) -> dict[str, str]:
    """Options of a command line, each with its value."""
    words = shlex.split(command)
    return {word: value for word, value in pairwise(words) if word.startswith("--")}


@pytest.mark.parametrize("source", ["jobs/rayjob.yaml", "jobs/README.md"])
def test_documented_options_exist(source: str) -> None:
    """Every option that the manifest and the page on clusters give to `evaluate` is one of its options."""
    text = (ROOT / source).read_text()
    shown = re.sub(
        r"\x1b\[[0-9;]*m", "", CliRunner().invoke(app, ["evaluate", "--help"], env={"COLUMNS": "200"}).output
    )
    if source.endswith(".yaml"):
        commands = [yaml.safe_load(text)["spec"]["entrypoint"]]
    else:
        page = text[text.index("## Clusters") :]
        blocks = re.findall(r"^((?: {4}|```).*?)(?=^\S|\Z)", page, re.MULTILINE | re.DOTALL)
        commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if "evaluate" in line]
        commands = [line.partition(" -- ")[2] or line for line in commands]
    assert commands
    for command in commands:
        for option in arguments(command):
            assert option in shown, f"{source}: {option} of {command!r}"
