"""The engine's settings in, a connection to a Ray cluster out: one of this machine's own, a given one, or the
surrounding job's.

A cluster of this machine's own lives in a private temporary folder, asks for a token that only this process and its
children know, and ends with this process. With `--address` (or
inside `ray job submit`, which sets RAY_ADDRESS) the existing cluster is joined and left as it is. Where that cluster
asks for a token, Ray reads it from RAY_AUTH_TOKEN, or from the file RAY_AUTH_TOKEN_PATH (else ~/.ray/auth_token).
"""

import fcntl
import logging
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import ray
import ray.exceptions

from xaibatch.config import EngineConfig
from xaibatch.errors import EngineError, UsageError
from xaibatch.pipeline.stopping import Interrupted, handlers_kept

ONE_THREAD: Final = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
"""Environment of everything that is not a replica: parallelism comes from tasks, not from threads inside them."""

HOST_MEMORY_RETRIES: Final = 15
"""Times that a CPU task is run again which Ray ended because its machine's memory was full (mostly others' doing); then
it counts as lost. Ray itself has no limit there, whatever `max_retries` says. RAY_task_oom_retries overrides it."""

SYSTEM_CONFIG: Final = {"prestart_worker_first_driver": False}
"""Of a cluster of our own. A machine's first driver would wait until Ray has started a worker for each CPU, for ever if
one of them ends before it has reported (ray issue 40131)."""

_MEMORY_SETTING: Final = "RAY_task_oom_retries"
_QUIET: Final = "RAY_IGNORE_UNHANDLED_ERRORS"
"""Else Ray prints the errors of steps whose outcome nobody fetches: here those behind an error that is reported."""

_PREFIX: Final = "xaibatch-cluster-"
_MAX_PLACE: Final = 24
_TOKEN_SETTINGS: Final = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@contextmanager
def connected(engine: EngineConfig) -> Iterator[None]:
    """Connect for the time of the block. A connection that the process has already is used and left open.

    Raises EngineError where the cluster cannot be reached or refuses the token, UsageError for an address of Ray Client
    (`ray://`), whose connection a run of hours would depend on.
    """
    address = engine.address or os.environ.get("RAY_ADDRESS") or None
    if address and address.startswith("ray://"):
        raise UsageError(
            f"{address!r} is a Ray Client address, whose connection would have to last as long as the run: use "
            "`ray job submit --address http://host:8265 --working-dir . -- python jobs/evaluate.py ...`, or --address "
            "auto on one of the cluster's machines"
        )
    settings = {
        _QUIET: "1",
        _MEMORY_SETTING: os.environ.get(_MEMORY_SETTING, str(HOST_MEMORY_RETRIES)),
    }
    with _environment(settings):
        if ray.is_initialized():
            yield
        else:
            with _joined(address) if address else _own_cluster():
                yield


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Environment variables that Ray reads, for the time of the block; afterwards they are as they were."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _joined(address: str) -> Iterator[None]:
    try:
        _init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise EngineError(
            f"cannot join the Ray cluster at {address!r}: {error}. Start one with `ray start --head` and give "
            "--address auto on one of its machines, or leave --address out"
        ) from None
    try:
        yield
    finally:
        with handlers_kept():
            ray.shutdown()


@contextmanager
def _own_cluster() -> Iterator[None]:
    """A cluster that nothing outside this process can be surprised by: own ports, own folder, no dashboard."""
    settings = {"RAY_USAGE_STATS_ENABLED": os.environ.get("RAY_USAGE_STATS_ENABLED", "0")}
    if not any(name in os.environ for name in _TOKEN_SETTINGS):  # else Ray writes one into the home folder
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # stays: Ray never forgets the first that a process reads
    _remove_orphans()
    with _environment(settings), _private_folder() as folder:
        try:
            _start(folder)
            yield
        finally:
            with handlers_kept():
                ray.shutdown()


def _start(folder: str) -> None:
    try:
        _init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=folder,
            _system_config=SYSTEM_CONFIG,
        )
    except Exception as error:
        raise EngineError(
            f"Ray did not start on this machine ({error}). A busy machine may need another try; --no-ray does without"
        ) from error


def _init(**options: Any) -> None:
    """`ray.init`, whose own handlers of SIGTERM exit meanwhile; raises Interrupted then."""
    with handlers_kept():
        try:
            ray.init(**options)
        except SystemExit:
            raise Interrupted(signal.SIGTERM) from None


def _place() -> str:
    """The temporary folder, unless it is so deep that Ray's sockets in it would have too long a name."""
    usual = tempfile.gettempdir()
    return usual if len(usual) <= _MAX_PLACE or not os.access("/tmp", os.W_OK) else "/tmp"


@contextmanager
def _private_folder() -> Iterator[str]:
    """A folder that is locked as long as this process lives, and removed after the block. The lock is the kernel's, so
    that processes of other containers which share the temporary folder see it too."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_place()))
        with suppress(FileNotFoundError):
            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
            if folder.exists():
                break
            os.close(handle)  # taken for an orphan before it was locked
    try:
        yield str(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _remove_orphans() -> None:
    """Folders of clusters whose process was killed: those that nobody has locked."""
    for folder in Path(_place()).glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another user's, or gone
            handle = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)
