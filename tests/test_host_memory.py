"""Freed memory that the process keeps: the next block of the same size costs no page faults."""

import subprocess
import sys

import pytest

CODE = """
import resource, sys, torch
from xaibatch.pipeline.host_memory import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else True
def step():
    a = torch.ones(40 * 2**18)  # 40 MiB, more than glibc ever keeps by itself
    b = a + 1
    return float(b[0])
for _ in range(12):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True)
    kept, count = done.stdout.split()
    if kept == "False":
        pytest.skip("the C library is not glibc")
    return int(count)


def test_steps_of_the_same_size_reuse_their_memory() -> None:
    assert faults("keep") < 0.1 * faults("do not")
