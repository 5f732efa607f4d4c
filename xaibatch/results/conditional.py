"""An object store and a path in, a write that happens only on a condition out: that there is no such object yet, or
that it is still the one that was seen.

Filesystems are those of fsspec, without their asynchronous side.
"""

import inspect
from typing import Any


def create(filesystem: Any, content: bytes, target: str) -> bool:
    """Write an object that does not exist yet, False where it does: one conditional write where the store's
    implementation has it (some take the mode and ignore it), else a look before the write."""
    if _can_create(filesystem):
        try:
            filesystem.pipe_file(target, content, mode="create")
            return True
        except FileExistsError:
            return False
        except (TypeError, ValueError, NotImplementedError):
            pass  # the implementation knows the mode and not for this store
    filesystem.invalidate_cache()
    if filesystem.exists(target):
        return False
    filesystem.pipe_file(target, content)
    return True


def has_tags(filesystem: Any) -> bool:
    """Whether objects have ETags that a write can be bound to: S3 and its likes."""
    protocol = filesystem.protocol
    return "s3" in ((protocol,) if isinstance(protocol, str) else protocol)


def tag(filesystem: Any, target: str) -> str:
    """An object's ETag; raises FileNotFoundError where there is no such object."""
    return str(filesystem.info(target, refresh=True).get("ETag") or "")


def replace(filesystem: Any, content: bytes, seen: str, target: str) -> bool:
    """Write an object only while its ETag is `seen`; False where it is another, or the object is gone."""
    try:
        filesystem.pipe_file(target, content, IfMatch=seen)
    except FileNotFoundError:
        return False
    except OSError as error:
        if _is_refusal(error):
            return False
        raise
    return True


def _can_create(filesystem: Any) -> bool:
    """Whether `pipe_file` knows `mode`; where it does not, the mode is one keyword among others and may be dropped."""
    write = getattr(filesystem, "_pipe_file", None) or filesystem.pipe_file
    return "mode" in inspect.signature(write).parameters


def _is_refusal(error: OSError) -> bool:
    """Whether S3 answered that a condition does not hold."""
    answer = getattr(error.__cause__, "response", {})
    return isinstance(error, FileExistsError) or answer.get("Error", {}).get("Code") in ("PreconditionFailed", "412")
