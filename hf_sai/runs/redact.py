"""Keeps access tokens out of records, cards, logs and error messages."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from typing import Any

__all__ = ["REDACTED", "known_secrets", "redact", "redact_text"]

REDACTED = "<redacted>"

#: Variables and settings whose value is a secret, whatever it looks like. ``tokenizer`` and ``num_tokens`` are none.
_SECRET_NAME = re.compile(r"(?:^|[_-])(?:token|secret|password|passwd|api_?key|credentials?)$", re.IGNORECASE)
#: Secrets that are known by their shape: Hugging Face, Weights & Biases (v1), GitHub, OpenAI-like, AWS, URL logins.
_SECRET_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|sk-[A-Za-z0-9_-]{20,}|wandb_v1_\w{16,}|AKIA[0-9A-Z]{16})\b"
)
_URL_LOGIN = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
_OPTION = re.compile(
    r"(--?[\w-]*?(?:token|secret|password|passwd|api[_-]?key|credentials?)(?:=|\s+))(\"[^\"]*\"|'[^']*'|[^\s-]\S*)",
    re.IGNORECASE,
)
_SHORTEST_SECRET = 8


def known_secrets(more: Iterable[str | None] = ()) -> frozenset[str]:
    """The secrets of this process: its environment's, huggingface_hub's stored token, and the ones given.

    Args:
        more: Further secrets, such as ``args.hub_token``; None and very short strings are left out.

    Returns:
        Strings that must not appear in anything that is written or shown.
    """
    found = {value for name, value in os.environ.items() if _SECRET_NAME.search(name)}
    found.update(value for value in more if value)
    hub = sys.modules.get("huggingface_hub")
    stored = hub.get_token() if hub is not None else None
    if stored:
        found.add(stored)
    return frozenset(value for value in found if len(value) >= _SHORTEST_SECRET)


def redact_text(text: str, secrets: Iterable[str] = ()) -> str:
    """Replace every secret in a text: the ones given, the process's own, and all that have a secret's shape.

    Args:
        text: Anything that is to be written or shown.
        secrets: Secrets beside those of ``known_secrets()``.

    Returns:
        The text with ``<redacted>`` in their place.

    Example:
        >>> redact_text("train.py --hub_token abc123 --lr 1 with hf_abcdefghijklmnopqrst")
        'train.py --hub_token <redacted> --lr 1 with <redacted>'
    """
    return _clean(text, known_secrets(secrets))


def redact(value: Any, secrets: Iterable[str] = ()) -> Any:
    """Redact every string of a JSON-like value, and whatever stands under a key such as ``hub_token``.

    Args:
        value: Dicts, lists, strings, numbers.
        secrets: As for ``redact_text``.

    Returns:
        A copy without secrets.

    Example:
        >>> redact({"hub_token": "x", "tokens": 3, "note": ["hf_abcdefghijklmnopqrst"]})
        {'hub_token': '<redacted>', 'tokens': 3, 'note': ['<redacted>']}
    """
    return _redact(value, known_secrets(secrets))


def _redact(value: Any, secrets: frozenset[str]) -> Any:
    if isinstance(value, str):
        return _clean(value, secrets)
    if isinstance(value, dict):
        return {
            _clean(str(key), secrets): (
                REDACTED if isinstance(item, str) and item and _SECRET_NAME.search(str(key)) else _redact(item, secrets)
            )
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redact(item, secrets) for item in value]
    return value


def _clean(text: str, secrets: frozenset[str]) -> str:
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, REDACTED)
    text = _SECRET_SHAPES.sub(REDACTED, text)
    text = _URL_LOGIN.sub(REDACTED, text)
    return _OPTION.sub(rf"\g<1>{REDACTED}", text)
