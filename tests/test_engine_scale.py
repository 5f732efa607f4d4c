"""The driver at scale, in short: its cost per cell and its memory do not grow with the run
(jobs/simulate_driver.py)."""

import json
import subprocess
import sys
from typing import Any

from tests.engine_cluster import ROOT


def test_cost_per_cell_and_memory_are_flat() -> None:
    """Three times as many shards, all but eight of them waiting in the larger run: the processor time of a cell stays
    within half of the smaller run's, memory does not follow the number of cells, the listing is linear."""
    command = [sys.executable, str(ROOT / "jobs" / "simulate_driver.py")]
    command += ["--shards", "40", "120", "--parts", "250", "750", "--images", "50000", "--open-shards", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    small, large = found["runs"]
    assert (small["num_cells"], large["num_cells"]) == (200, 600)
    assert large["driver_cpu_ms_per_cell"] < 1.5 * small["driver_cpu_ms_per_cell"]
    assert large["memory_growth_mib"] < small["memory_growth_mib"] + 16
    few, many = found["listings"]
    assert many["cpu_us_per_part"] < 1.5 * few["cpu_us_per_part"]
    assert found["million_images"]["num_cells"] == 312_500
