"""Files of a local folder or any fsspec URL in: sorted listings and bytes out, with retries of transient errors."""

import errno
import os
import posixpath
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, TypeVar

import fsspec
from fsspec import AbstractFileSystem
from pydantic import Field

from xaibatch.errors import DataError
from xaibatch.options import Options

T = TypeVar("T")

_BLOCK_BYTES = 16 << 20

_AWAY: Final = frozenset(
    (
        errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.EAGAIN, errno.EBUSY,
        errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE,
        errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ESHUTDOWN,
        errno.EMFILE, errno.ENFILE, errno.ENOMEM,
    )
)  # fmt: skip
"""Error numbers of local files that speak of the disk, the network share or the machine, not of the file."""


class ReadOptions(Options):
    """How a file is read."""

    num_attempts: int = Field(default=6, ge=1)
    """Attempts at a read that fails for a reason that may pass (a timeout, a reset connection)."""

    first_wait_s: float = Field(default=0.5, ge=0)
    """Seconds before the second attempt; doubled for each further one."""

    max_bytes: int = Field(default=1 << 30, gt=0)
    """Largest file that is read, in bytes; a larger one is refused unread."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """One file of a listing: POSIX path relative to the listed folder, full path or URL, size in bytes (-1 unknown)."""

    relative: str
    path: str
    size: int


def is_remote(path: str) -> bool:
    """True for a URL of any fsspec protocol but `file` (`s3://...`, `memory://...`)."""
    return "://" in path and not path.startswith(("file://", "local://"))


def absolute(path: str) -> str:
    """The path as every worker can open it: an absolute local path with `..` resolved, or the URL without a slash at
    its end."""
    if is_remote(path):
        return path.rstrip("/")
    return os.path.abspath(os.path.expanduser(path.removeprefix("file://").removeprefix("local://")))  # noqa: PTH100, PTH111


def join(root: str, relative: str) -> str:
    """`root/relative` for a local folder or URL; `..` in `relative` is resolved and may lead out of `root`."""
    if is_remote(root):
        protocol, _, rest = root.partition("://")
        return f"{protocol}://{posixpath.normpath(posixpath.join(rest, relative)).lstrip('/')}"
    return os.path.normpath(os.path.join(root, relative))  # noqa: PTH118


def parent(path: str) -> str:
    """The folder that holds `path`."""
    return path.rpartition("/")[0] if is_remote(path) else str(Path(path).parent)


def is_folder(path: str) -> bool:
    """True where `path` is a folder (for an object store: where something lies under it)."""
    if not is_remote(path):
        return Path(path).is_dir()
    return bool(_asked(path, lambda system, inner: system.isdir(inner)))


def is_file(path: str) -> bool:
    """True where `path` is a file or an object."""
    if not is_remote(path):
        return Path(path).is_file()
    return bool(_asked(path, lambda system, inner: system.isfile(inner)))


def local_size(path: str) -> int:
    """Size in bytes of a local file; -1 for a URL (asking for each would take one request a file) and where there is
    none."""
    try:
        return -1 if is_remote(path) else os.stat(path).st_size  # noqa: PTH116
    except OSError:
        return -1


def is_away(path: str) -> bool:
    """True where a local path does not exist, or is an empty folder: what is left of a share that is not mounted."""
    if not os.path.isdir(path):  # noqa: PTH112
        return not os.path.exists(path)  # noqa: PTH110
    try:
        with os.scandir(path) as items:
            return next(items, None) is None
    except PermissionError:
        return False
    except OSError:
        return True


def filesystem(path: str) -> tuple[AbstractFileSystem, str]:
    """The fsspec file system of a URL and the path inside it; raises DataError for a protocol that is not installed."""
    try:
        system, inner = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise DataError(f"cannot open {path!r}: {one_line(error)}") from None
    return system, str(inner)


def list_files(root: str) -> tuple[FileEntry, ...]:
    """Every file under `root`, sorted by relative path. Hidden files and folders are left out.

    Local links are followed (a link that leads back to a folder above it is not entered again). Raises DataError
    where `root` is no folder.
    """
    if not is_folder(root):
        raise DataError(f"no folder at {root!r}: give an existing folder, a manifest (.csv, .parquet) or an fsspec URL")
    entries = _remote_entries(root) if is_remote(root) else _asked_locally(root, lambda: list(_local_entries(root)))
    return tuple(sorted(entries, key=lambda entry: entry.relative))


def subfolders(root: str) -> tuple[str, ...]:
    """Names of the folders directly under `root`, sorted, hidden ones left out.

    Empty ones count too, where the store has such. Raises DataError where `root` cannot be listed.
    """
    if is_remote(root):
        listed = _asked(root, lambda system, inner: system.ls(inner, detail=True))
        paths = [str(info["name"]).rstrip("/") for info in listed if info.get("type") == "directory"]
        names = [path.rpartition("/")[2] for path in paths]
    else:
        names = _asked_locally(root, lambda: [item.name for item in os.scandir(root) if item.is_dir()])
    return tuple(sorted(name for name in names if not _hidden(name)))


def read_bytes(path: str, options: ReadOptions | None = None, roots: Sequence[str] = ()) -> bytes:
    """The whole file. A read that fails for a reason that may pass is tried again; so is a file that does not exist
    while one of `roots` is away.

    Raises OSError for a file that cannot be read; StoreError where a remote store, a network share or a disk failed
    every time, or a remote store denies access; DataError for an unknown protocol.
    """
    options = options or ReadOptions()
    for attempt in range(1, options.num_attempts + 1):
        try:
            return _read_once(path, options.max_bytes)
        except (IsADirectoryError, FileTooLargeError):
            raise
        except OSError as error:
            if isinstance(error, FileNotFoundError | NotADirectoryError):
                if not any(map(is_away, roots)):
                    raise
            elif not is_remote(path) and error.errno not in _AWAY:
                raise
            if attempt == options.num_attempts or isinstance(error, PermissionError):
                raise StoreError(f"{path!r} could not be read ({attempt} attempts): {one_line(error)}") from None
            time.sleep(options.first_wait_s * 2 ** (attempt - 1))
    raise AssertionError("unreachable: num_attempts is at least one")


class FileTooLargeError(OSError):
    """A file larger than `ReadOptions.max_bytes`."""


class StoreError(OSError):
    """A store (remote, a network share, a disk) that failed at every attempt or is not there: no fault of the file,
    which may be read another time."""


def one_line(error: BaseException) -> str:
    """The error's text on one line, or its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def _read_once(path: str, max_bytes: int) -> bytes:
    if not is_remote(path):
        with open(path, "rb") as stream:
            return _whole(stream, max_bytes)
    system, inner = filesystem(path)
    try:
        with system.open(inner, "rb") as stream:
            return _whole(stream, max_bytes)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # stores raise whatever their client libraries raise
        raise OSError(f"{type(error).__name__}: {one_line(error)}") from None


def _whole(stream: IO[bytes], max_bytes: int) -> bytes:
    content = bytearray()
    while block := stream.read(_BLOCK_BYTES):
        content += block
        if len(content) > max_bytes:
            raise FileTooLargeError(f"the file is larger than {max_bytes:,} bytes")
    return bytes(content)


def _asked(path: str, ask: Callable[[AbstractFileSystem, str], Any]) -> Any:
    """What a remote store answers about `path`; DataError where it cannot be asked (no credentials, no such host)."""
    system, inner = filesystem(path)
    try:
        return ask(system, inner)
    except MemoryError:
        raise
    except Exception as error:
        raise DataError(f"cannot read {path!r}: {type(error).__name__}: {one_line(error)}") from None


def _asked_locally(path: str, ask: Callable[[], T]) -> T:
    try:
        return ask()
    except OSError as error:
        raise DataError(f"cannot read {path!r}: {error.strerror or one_line(error)} ({error.filename})") from None


def _local_entries(root: str) -> Iterator[FileEntry]:
    def walk(folder: str, prefix: str, above: frozenset[str]) -> Iterator[FileEntry]:
        real = os.path.realpath(folder)
        if real in above:
            return
        with os.scandir(folder) as items:
            for item in items:
                if _hidden(item.name):
                    continue
                if item.is_dir():
                    yield from walk(item.path, f"{prefix}{item.name}/", above | {real})
                elif item.is_file():
                    yield FileEntry(relative=prefix + item.name, path=item.path, size=item.stat().st_size)

    return walk(root, "", frozenset())


def _remote_entries(root: str) -> Iterator[FileEntry]:
    protocol = root.partition("://")[0]
    start = filesystem(root)[1].rstrip("/") + "/"

    def find(system: AbstractFileSystem, inner: str) -> Any:
        system.invalidate_cache(inner)  # a listing that this process made earlier may be out of date
        return system.find(inner, detail=True)

    for name, info in _asked(root, find).items():
        relative = str(name).removeprefix(start)
        if not any(map(_hidden, relative.split("/"))):
            size = info.get("size")
            yield FileEntry(
                relative=relative, path=f"{protocol}://{name.lstrip('/')}", size=-1 if size is None else int(size)
            )


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
