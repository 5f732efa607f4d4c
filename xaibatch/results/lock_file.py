"""The bytes of a lock in, whether they are in place out: one small file that several processes compete for.

What a lock needs is to create a file only where there is none, and to replace one only while it is what was read.
Local folders: `os.link` for the first, `flock` on a second file around read and replacement for the second. S3: the
conditional PUTs `If-None-Match` and `If-Match`. Other stores: creation where their fsspec implementation has it, and
no conditional replacement; there, and where a server ignores the conditions, the last writer wins, so whoever wrote
waits `settle_s` and reads again before believing it.
"""

import contextlib
import fcntl
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from xaibatch.results.parts import RunFolder

_GUARD: Final = ".guard"


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """The file as read; `tag` is what a conditional replacement names (empty where there is no such thing)."""

    content: bytes
    tag: str = ""


class LockFile:
    """The file `name` of a run folder. Methods raise OSError or RunFolderError where the file system fails."""

    def __init__(self, folder: RunFolder, name: str) -> None:
        self._folder, self._name = folder, name

    @property
    def needs_settling(self) -> bool:
        """Whether a successful write may yet be lost to another writer's."""
        return not self._folder.is_local

    def read(self) -> Version | None:
        """The file, None where there is none."""
        try:
            tag = self._folder.tag(self._name)  # before the content: a tag too old is refused, one too new is not
            return Version(content=self._folder.read_bytes(self._name), tag=tag)
        except FileNotFoundError:
            return None

    def create(self, content: bytes) -> bool:
        """Write the file where there is none; False where there is, or an answer was lost."""
        return self._folder.create_file(content, self._name)

    def replace(self, content: bytes, version: Version) -> bool:
        """Write the file while it is still `version`; False where it is not, or an answer was lost. Local callers are
        `guarded`."""
        if version.tag:
            return self._folder.replace_tagged(content, version.tag, self._name)
        self._folder.write_bytes(content, self._name)
        return True

    def remove(self) -> None:
        self._folder.remove(self._name)

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Exclusive among the processes that look at this file, where the file system has `flock`."""
        with contextlib.ExitStack() as stack:
            if self._folder.is_local:
                with contextlib.suppress(OSError):
                    guard: Any = stack.enter_context(open(self._folder.path(self._name + _GUARD), "a"))
                    fcntl.flock(guard, fcntl.LOCK_EX)
            yield
