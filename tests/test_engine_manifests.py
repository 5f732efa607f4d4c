"""cluster.yaml passes Ray's own checks, the RayJob manifest has the shape KubeRay asks for, and both start commands
that this version understands."""

import json
import re
import shlex
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
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


def test_aws_machines_can_start_and_reach_the_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What Ray would ask AWS for (its own bootstrap, against moto): a role for every machine, since Ray gives one to
    the head alone, and a machine image that is not Ray's default of Ubuntu 18.04."""
    from moto import mock_aws
    from ray.autoscaler._private.aws import config as ray_on_aws
    from ray.autoscaler._private.util import prepare_config

    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes a key pair there
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL"):  # other tests have a store of their own
        monkeypatch.delenv(name, raising=False)
    with mock_aws():
        asked = ray_on_aws.bootstrap_aws(prepare_config(load("cluster.yaml")))
    machines = {name: kind["node_config"] for name, kind in asked["available_node_types"].items()}
    roles = {name: machine["IamInstanceProfile"]["Name"] for name, machine in machines.items()}
    assert roles == {"head": "xaibatch-head", "gpu_spot": "xaibatch-worker", "cpu_spot": "xaibatch-worker"}
    for machine in machines.values():
        assert machine["ImageId"] not in ray_on_aws.DEFAULT_AMI.values()
        assert machine["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] >= 100  # the image of torch and CUDA twice over


def test_the_documented_roles_are_those_of_the_machines() -> None:
    """The commands in cluster.yaml's head make the profiles that it names; the head may start workers under theirs."""
    text = (ROOT / "cluster.yaml").read_text()
    trust, policy = (json.loads(found) for found in re.findall(r"'(\{.*\})'", text))
    assert trust["Statement"][0]["Principal"] == {"Service": "ec2.amazonaws.com"}
    allowed = {statement["Action"]: statement["Resource"] for statement in policy["Statement"]}
    assert allowed == {
        "iam:PassRole": "arn:aws:iam::*:role/xaibatch-worker",
        "ssm:GetParameters": "arn:aws:ssm:*::parameter/aws/service/*",
    }
    assert "for role in xaibatch-head xaibatch-worker; do" in text


def test_images_have_the_python_and_the_ray_that_the_package_needs() -> None:
    """One version of Ray and of Python on all machines, both at least pyproject.toml's; GPU machines have CUDA."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ray = next(Requirement(line) for line in project["dependencies"] if line.startswith("ray["))
    cluster = load("cluster.yaml")
    images = [cluster["docker"]["image"], cluster["available_node_types"]["gpu_spot"]["docker"]["worker_image"]]
    images += re.findall(r"FROM (\S+?)`", (ROOT / "jobs/rayjob.yaml").read_text())
    found = [re.fullmatch(r"rayproject/ray:([\d.]+)-py(\d)(\d+)-(cpu|gpu)", image) for image in images]
    assert [match and match[4] for match in found] == ["cpu", "gpu", "gpu"]
    (version,) = {match[1] for match in found if match}
    (python,) = {f"{match[2]}.{match[3]}" for match in found if match}
    assert version in ray.specifier and python in SpecifierSet(project["requires-python"])
    assert load("jobs/rayjob.yaml")["spec"]["rayClusterSpec"]["rayVersion"] == version
    assert not any("--upgrade" in command for command in cluster["setup_commands"])


def test_rayjob_has_kuberay_s_shape() -> None:
    """What the RayJob resource requires, quantities that Kubernetes can read, and worker groups that can grow."""
    job = load("jobs/rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    cluster = job["spec"]["rayClusterSpec"]
    head = cluster["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert head["rayStartParams"].get("dashboard-host", "0.0.0.0") == "0.0.0.0"  # submitted from another pod
    assert job["spec"]["backoffLimit"] == 0 or "--accept-failures" in job["spec"]["entrypoint"]
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
