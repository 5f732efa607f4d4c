"""Nothing in, a description of this machine and its software out, as it stands in the JSON and above the tables."""

import os
import platform
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from xaibatch.pipeline.record import code_state, now, versions

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "sve", "bf16")
"""Processor features that decide how fast matrix products are."""


def describe(device: str, command: str) -> dict[str, Any]:
    """Date, command, processor, cores and threads, features, memory, load, GPU, versions and commit."""
    info = _cpu_info()
    described: dict[str, Any] = {
        "date": now(),
        "command": command,
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "cpu_family_model_stepping": "/".join(info.get(key, "?") for key in ("cpu family", "model", "stepping")),
        "cores_visible": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "environment": {key: os.environ[key] for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if key in os.environ},
        "flags": [flag for flag in FLAGS if flag in info.get("flags", info.get("Features", "")).split()],
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "load_average_at_start": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "gpu": None,
        "versions": versions(),
        "code": code_state(),
    }
    if device == "cuda":
        facts = torch.cuda.get_device_properties(0)
        described["gpu"] = {
            "name": facts.name,
            "memory_gib": round(facts.total_memory / 2**30, 1),
            "capability": f"{facts.major}.{facts.minor}",
            "cuda": torch.version.cuda,
        }
    return described


def summary(described: dict[str, Any]) -> str:
    """The description in a few lines for people."""
    known = described["versions"]
    names = ("python", "torch", "timm", "numpy", "quantus", "lime", "captum", "ray")
    flags = ", ".join(described["flags"]) or "none known"
    load = described["load_average_at_start"]
    lines = [
        f"{described['date']}, `{described['command']}`",
        f"{described['cpu']} (family/model/stepping {described['cpu_family_model_stepping']}), "
        f"{described['cores_usable']} cores, {described['torch_threads']} threads, {flags}; "
        f"{described['memory_gib']} GiB; load average before the start {load[0] if load else 'unknown'}",
        ", ".join(f"{name} {known[name]}" if name in known else f"{name} not installed" for name in names),
    ]
    if described["gpu"]:
        gpu = described["gpu"]
        lines.insert(2, f"{gpu['name']}, {gpu['memory_gib']} GiB, capability {gpu['capability']}, CUDA {gpu['cuda']}")
    return "\n".join(f"- {line}" for line in lines)


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    return find_spec(package) is not None


def _cpu_info() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo; empty elsewhere than Linux."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    entries: dict[str, str] = {}
    for line in path.read_text().splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() not in entries:
            entries[key.strip()] = value.strip()
    return entries


def _memory_bytes() -> int:
    names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
    if "SC_PHYS_PAGES" not in names:
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
