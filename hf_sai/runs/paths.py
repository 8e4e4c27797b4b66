"""Keeps what only this machine knows, its folders and its name, out of what is written."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from urllib.parse import unquote

__all__ = ["hide_paths", "is_local_path", "short_path"]

_END = r"[^\s\"'`<>|,;:=(){}\[\]\\]"
#: Paths within a text: of a file:// address, absolute with at least two parts, of Windows, and those that climb with
#: ``..``. What stands before must be no part of an address, of a relative path, or of a word.
_PATHS = re.compile(
    rf"file:/{{2,}}(?P<url>{_END}*)"
    rf"|(?<![\w./<~*+\-])(?P<absolute>/[\w.@+~\-]+(?:/{_END}*)+)"
    rf"|(?<![\w])(?P<windows>[A-Za-z]:\\[^\s\"'`<>|,;=]+)"
    rf"|(?<![\w./~])(?P<climbing>(?:\.\./)+{_END}*)"
    rf"|(?<![\w./])~(?P<other>[A-Za-z_][\w.\-]*)(?=/)"
)
#: Where systems keep people's own folders: the part after it is somebody's name.
_HOMES = re.compile(r"/(?:home|Users|var/home|export/home|usr/home)/[^/]+/?|/root/?")


def short_path(word: str) -> str:
    """A word of a command, or a path, without what only this machine knows.

    The working directory is left out, the home directory becomes ``~``, and of other absolute paths the last part is
    kept; a path that climbs out of the working directory with ``..`` is taken for the absolute one it means. What
    stands before a ``=`` is kept. The machine's name, with which TensorBoard's folders end, becomes ``HOST``.

    Example:
        >>> short_path("--data=/mnt/somebody/corpus.txt")
        '--data=/path/to/corpus.txt'
        >>> short_path("data.path=file:///mnt/somebody/corpus.txt")
        'data.path=file:///path/to/corpus.txt'
    """
    parts = re.fullmatch(r"(-[A-Za-z])((?:/|\.\./).*)|([+-]*[A-Za-z_][\w.@-]*=)?(.*)", word, re.DOTALL)
    head, value = (parts[1] or parts[3] or "", parts[2] or parts[4] or "") if parts else ("", word)
    # A path as a whole may have blanks in it, which nothing within a text can.
    if (os.path.isabs(value) or value.startswith("../")) and not re.search(r"[=,;:\"'\n]", value):
        value = _shortened(value)
    return _without_host(head + hide_paths(value))


def hide_paths(text: str) -> str:
    """A text with every path of this machine shortened as :func:`short_path` does.

    Example:
        >>> hide_paths('{"file": "/mnt/somebody/corpus.txt"} and https://host/a/b')
        '{"file": "/path/to/corpus.txt"} and https://host/a/b'
    """
    if "/" not in text and "\\" not in text:
        return text
    return _PATHS.sub(_hidden, text)


def is_local_path(name: str) -> bool:
    """Whether a name is a path, by its look or because something lies there; names on the Hub are none.

    Example:
        >>> is_local_path("./base"), is_local_path("me/base")
        (True, False)
    """
    looks = os.path.isabs(name) or re.match(r"\.{1,2}(/|$)|~|file:|[A-Za-z]:[\\/]", name) or "\\" in name
    return bool(looks) or name.count("/") > 1 or os.path.exists(name)


def _hidden(match: re.Match[str]) -> str:
    if match["url"] is not None:
        path = "/" + unquote(match["url"])
        if path.startswith("/localhost/"):
            path = path.removeprefix("/localhost")
        short = _shortened(path)
        return (
            f"file://{short}"
            if short.startswith("/")
            else "file:///path/to/" + short.rpartition("/")[2].replace("~", "home")
        )
    if match["absolute"] is not None:
        return _shortened(match["absolute"])
    if match["windows"] is not None:
        return "/path/to/" + re.split(r"[\\/]", match["windows"].rstrip("\\/"))[-1]
    if match["climbing"] is not None:
        return _shortened(match["climbing"])
    return "~"  # somebody else's home


def _shortened(value: str) -> str:
    path, here, home = Path(os.path.normpath(value)), _here(), _home()
    if not path.is_absolute():
        if here is None:
            return f"/path/to/{path.name}" if path.name != ".." else "/path/to"
        path = Path(os.path.normpath(here / path))
    if here is not None and here != Path("/") and path.is_relative_to(here):
        return str(path.relative_to(here))
    if home is not None and path.is_relative_to(home):
        return "~" if path == home else f"~/{path.relative_to(home)}"
    if _HOMES.fullmatch(str(path)):
        return "~"
    return f"/path/to/{path.name}" if path.name else "/"


def _here() -> Path | None:
    try:
        return Path.cwd()
    except OSError:  # the folder was removed
        return None


def _home() -> Path | None:
    try:
        home = Path.home()
    except RuntimeError:  # no HOME, and no such user
        return None
    return None if home == Path("/") else home


def _without_host(text: str) -> str:
    host = _host()
    return re.sub(rf"_{re.escape(host)}(?=$|/)", "_HOST", text) if host else text


def _host() -> str:
    return socket.gethostname()
