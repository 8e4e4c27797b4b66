"""Writes files whole or not at all, and reads text from strangers with a limit on its size."""

from __future__ import annotations

import contextlib
import glob
import os
import stat
import time
from pathlib import Path

__all__ = ["atomic_write", "read_text"]

#: Nobody takes so many seconds to write a file: a part that is older was left by a process that was killed.
_OLD_PART = 60


def atomic_write(path: str | Path, content: str | bytes) -> Path:
    """Write a file so that a reader finds the old content or the new one, never a part.

    Args:
        path: The file; its folder is made where missing.
        content: Text (written as UTF-8) or bytes.

    Returns:
        The path.

    Raises:
        OSError: It cannot be written (disk full, no permission). The old file is as it was and nothing is left over.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     atomic_write(folder + "/a/b.txt", "text").read_text()
        'text'
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
            with contextlib.suppress(OSError):  # another process may clear it at the same time
                if time.time() - old.stat().st_mtime > _OLD_PART:
                    old.unlink()
        with open(part, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # a file stands where the folder was to be
            part.unlink(missing_ok=True)
        raise OSError(
            error.errno, f"could not write {path} ({error.strerror}); what was there before is unchanged"
        ) from error
    return path


def read_text(path: str | Path, limit: int) -> str:
    """Read a UTF-8 text file of at most ``limit`` bytes.

    Args:
        path: The file.
        limit: Largest size that is read (bytes).

    Returns:
        Its text.

    Raises:
        ValueError: There is no such file, it is larger than ``limit``, it is not UTF-8, or it is a device or a pipe, at
            which reading could wait for ever.
    """
    path = Path(path)
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError(f"cannot read {path}: it is a pipe or a device, and no regular file")
            content = file.read(limit + 1)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    if len(content) > limit:
        raise ValueError(f"{path} is larger than {limit:,} bytes, the most that is read of such a file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None


def _open_at_once(path: str, flags: int) -> int:
    """Open a file without waiting for whoever writes into it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
