"""Results in JSON files: written whole or not at all, and read with one sentence where one is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_sai.runs.files import atomic_write
from recipes.common.recipe_input import InputError

__all__ = ["read_json", "write_json"]


def write_json(path: str | Path, content: Any) -> Path:
    """Write a JSON file whole or not at all.

    Example:
        >>> import tempfile
        >>> read_json(write_json(tempfile.mkdtemp() + "/results.json", {"eval_loss": 4.4}))
        {'eval_loss': 4.4}
    """
    return atomic_write(path, json.dumps(content, indent=2) + "\n")


def read_json(path: str | Path, kind: type = dict, keys: tuple[str, ...] = ()) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        kind: What it must hold, dict or list.
        keys: What a dict must have; ``"a.b"`` is the key b in the dict under a.

    Raises:
        InputError: It cannot be read, is no JSON or holds something else.
    """
    if Path(path).exists() and not Path(path).is_file():  # reading a pipe would wait for ever
        raise InputError(f"cannot read {path}: it is no regular file.")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: it is no JSON ({str(error)[:100]}).") from None
    if not isinstance(content, kind):
        raise InputError(f"{path} is damaged: it holds a {type(content).__name__} in the place of a {kind.__name__}.")
    for key in keys:
        part: Any = content
        for name in key.split("."):
            if not isinstance(part, dict) or name not in part:
                raise InputError(f"{path} is damaged, or of another version: it has no {key}.")
            part = part[name]
    return content
