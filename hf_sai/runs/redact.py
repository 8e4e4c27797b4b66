"""Keeps access tokens and passwords out of records, cards, logs and error messages."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

__all__ = [
    "REDACTED",
    "is_secret_name",
    "known_secrets",
    "named_values",
    "redact",
    "redact_text",
    "redact_words",
    "shaped_secrets",
]

REDACTED = "<redacted>"

#: Names of settings, flags and variables whose value is a secret, whatever it looks like.
_SECRET_NAME = re.compile(
    r"(?:^|[_.-])(?:secret|\w*password|passwd|passphrase|pwd|passcode|credentials?|authorization|auth|bearer|cookie"
    r"|(?:api|access|secret|private|storage|account|encryption|signing|service|master|license|ssh|auth|admin|client"
    r"|deploy|hub|hf|wandb|openai|anthropic|comet|neptune|azure|aws|gcp|google|s3)[_-]?key(?:[_-]id)?"
    r"|(?:db|database|user|admin|root|login|key|ssh|smtp|ftp|sql|mysql|redis|http|proxy|pg)[_-]?pass)$|^pass$",
    re.IGNORECASE,
)
#: Variables of the environment, where any key is one that opens something; PWD is the working directory.
_SECRET_VARIABLE = re.compile(
    r"(?:^|_)(?:KEY|PAT|SECRET|SECRETS|PASSWORD|PASSWD|PASS|PWD|PASSPHRASE|CREDENTIALS?|AUTH)$|^PG\w*PASS(?:WORD)?$"
    r"|(?:^|_)(?:API|ACCESS|SECRET|PRIVATE)_?KEY(?:_ID)?$|SECRET|PASSWORD|PASSPHRASE",
    re.IGNORECASE,
)
_HARMLESS_VARIABLES = ("PWD", "OLDPWD", "SSH_AUTH_SOCK", "KEY")
_TOKEN_NAME = re.compile(r"(?:^|[_.-])(?:(?P<kind>[A-Za-z0-9]+)[_-])?token$", re.IGNORECASE)
#: A token that lets somebody in, by the word before "token"; "token" alone is one, too.
_ACCESS = re.compile(
    r"hub|hf|huggingface|face|auth|access|api|secret|bearer|session|refresh|security|id|wandb|github|gh"
    r"|gitlab|bot|slack|openai|aws|azure|gcp|google|private|personal|deploy|jwt|oauth|oauth2|read|write"
    r"|service|account|user|login|admin|client|comet|neptune|clearml|kaggle|telegram|discord|npm|pypi|sas"
    r"|csrf"
)
#: A token of a tokenizer, of which a run has to be told.
_SPECIAL = re.compile(
    r"eos|bos|pad|unk|sep|cls|mask|image|img|video|audio|speech|vision|boi|eoi|bov|eov|boa|eoa|start|end"
    r"|begin|stop|special|placeholder|initializer|modifier|trigger|class|instance|concept|system|assistant"
    r"|think|response|instruction|fill|prefix|suffix|middle|decoder|encoder|bot|eot|next|last|first|max|min"
    r"|per|new|target|source|lang|language|forced|eom|sot|newline|cap"
)
_SPECIAL_VALUE = re.compile(r"<[^<>]{0,60}>|\[[^\[\]]{0,60}\]|<\|[^<>]{0,60}\|>|\{[^{}]{0,60}\}")
_NO_SECRETS = ("", "true", "false", "none", "null")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_WORD = re.compile(r"[A-Za-z]{1,15}")

#: Secrets that are known by their shape: Hugging Face, Weights & Biases, GitHub, GitLab, OpenAI and Anthropic, AWS,
#: Google, Slack, JSON web tokens.
_SECRET_SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|gl(?:pat|dt|ft|soat|rt|ptt)-[\w-]{20,}|sk-[A-Za-z0-9_-]{20,}|wandb_v1_\w{16,}|(?:AKIA|ASIA)[0-9A-Z]{16}"
    r"|AIza[\w-]{35}|GOCSPX-[\w-]{20,}|ya29\.[\w-]{20,}|xox[abposr]-[\w-]{10,}|npm_[A-Za-z0-9]{36}|pypi-[\w-]{50,}"
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*)(?![A-Za-z0-9])"
)
_URL_LOGIN = re.compile(
    r"(?<=://)(?:[^/\s:@\"'<>]*:[^/\s@\"'<>]+|(?=[^/\s@\"'<>]*\d)[^/\s:@\"'<>]{16,})(?=@)"  # name:password, or a token
)
#: A header as a whole, also without a scheme, and "Bearer" before what can be no word.
_HEADER = re.compile(
    r"(?P<head>Authorization\\?[\"']?\s*[:=]\s*\\?[\"']?(?:(?:Bearer|Basic|Token)\s+|(?=\S{8})(?=\S*\d))|\bBearer\s+(?=\S*\d|\S{16}))"
    r"(?P<secret>(?!<redacted>)[\w.~+/=-]+)",
    re.IGNORECASE,
)
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [A-Z0-9 ]*-----|\Z)", re.DOTALL
)
_VALUE = r"(?P<value>\\\"[^\"\\]*\\\"|\"[^\"]*\"|'[^']*'(?:\"'\"'[^']*')*|[^\s\"'&,;}\])][^\s\"'&,;}\]]*)"
#: ``--flag value``, ``--flag=value``, ``trainer.flag=value``, ``?flag=value``, ``NAME=value``.
_OPTION = re.compile(
    r"(?<![\w.-])(?P<head>(?P<name>-{1,2}[A-Za-z][\w.-]*)(?:=|\s+)|\+{0,2}(?P<key>[A-Za-z_][\w.-]*)=)" + _VALUE
)
#: ``"flag": "value"`` of JSON and Python, also escaped, and ``some_flag: value`` of YAML.
_ENTRY = re.compile(
    r"(?<![\w.-])(?P<head>(?P<quote>\\?[\"'])(?P<name>[A-Za-z_][\w.-]*)(?P=quote)\s*[:=]\s*"
    r"|(?P<key>[A-Za-z]+(?:[_-][A-Za-z]+)+):[ \t]+)" + _VALUE
)
#: What none of the above can do without; most strings of a record have none of it and are left at once.
_MAYBE = re.compile(
    r"hf_|api_org|gh[pousr]_|github_pat|gl\w+-|sk-|wandb_v1|AKIA|ASIA|AIza|GOCSPX|ya29|xox|npm_|pypi-|eyJ|://|PRIVATE"
    r"|token|secret|pass|pwd|key|credential|auth|bearer|basic|cookie|[A-Z]PAT=",
    re.IGNORECASE,
)
_SHORTEST_SECRET = 8


def is_secret_name(name: str, value: str | None = None) -> bool:
    """Whether what stands under a name is a secret. ``tokenizer``, ``num_tokens`` and a tokenizer's tokens are none.

    Args:
        name: Of a setting, a flag or a variable.
        value: What stands there, where that is known: it decides for tokens of an unknown kind.

    Example:
        >>> is_secret_name("hub_token"), is_secret_name("eos_token"), is_secret_name("WANDB_API_KEY")
        (True, False, True)
    """
    name = name.lstrip("-+")
    if not name.isupper():
        name = _CAMEL.sub("_", name)
    if name in _HARMLESS_VARIABLES:
        return False
    if _SECRET_NAME.search(name) or (name.isupper() and _SECRET_VARIABLE.search(name) and not _TOKEN_NAME.search(name)):
        return True
    token = _TOKEN_NAME.search(name)
    if token is None:
        return False
    kind = (token["kind"] or "").lower()
    if not kind or _ACCESS.fullmatch(kind):
        return True
    if _SPECIAL.fullmatch(kind):
        return False
    return value is None or not (_SPECIAL_VALUE.fullmatch(value) or _WORD.fullmatch(value))


def known_secrets(more: Iterable[str | None] = ()) -> frozenset[str]:
    """The secrets of this process: its environment's, huggingface_hub's stored token, and the ones given.

    Args:
        more: Further secrets, such as ``args.hub_token``; None and very short strings are left out.

    Returns:
        Strings that must not appear in anything that is written or shown. A variable's value that is a common word
        ("password") is none of them: it is in many texts and tells nothing; nor is the name of a file.
    """
    found = {value for name, value in os.environ.items() if _is_secret_variable(name, value) and _is_telling(value)}
    found.update(value for value in more if value)
    hub = sys.modules.get("huggingface_hub")
    stored = hub.get_token() if hub is not None else None
    if stored:
        found.add(stored)
    return frozenset(value for value in found if len(value) >= _SHORTEST_SECRET)


def redact_text(text: str, secrets: Iterable[str] = ()) -> str:
    """Replace every secret in a text: the ones given, the process's own, and all that a shape or a name gives away.

    Args:
        text: Anything that is to be written or shown.
        secrets: Secrets beside those of ``known_secrets()``.

    Returns:
        The text with ``<redacted>`` in their place.

    Example:
        >>> redact_text("train.py --hub_token abc123 --eos_token <|end|> with hf_abcdefghijklmnopqrst")
        'train.py --hub_token <redacted> --eos_token <|end|> with <redacted>'
    """
    return _clean(text, known_secrets(secrets))


def redact_words(words: Sequence[str]) -> list[str]:
    """The words of a command without what follows ``--hub_token`` and the like; blanks in a secret cannot hide it.

    Example:
        >>> redact_words(["train.py", "--password", "a b", "--lr", "1"])
        ['train.py', '--password', '<redacted>', '--lr', '1']
    """
    shown: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        name, equals, value = word.partition("=")
        if before.startswith("-") and "=" not in before and _names_secret(before, word) and not word.startswith("--"):
            shown.append(REDACTED)
        elif equals and value and re.fullmatch(r"[+-]*[A-Za-z_][\w.-]*", name) and _names_secret(name, value):
            shown.append(f"{name}={REDACTED}")
        else:
            shown.append(word)
    return shown


def shaped_secrets(text: str) -> Iterator[int]:
    """Where in a text a secret begins that its shape gives away, whatever stands around it."""
    for pattern in (_SECRET_SHAPES, _URL_LOGIN, _PRIVATE_KEY):
        yield from (match.start() for match in pattern.finditer(text) if REDACTED not in match.group())


def named_values(text: str) -> Iterator[tuple[int, str, str]]:
    """(position, name, value) of what stands in a text under the name of a secret, and of headers that carry one."""
    for pattern in (_OPTION, _ENTRY):
        for match in pattern.finditer(text):
            if _is_secret(match):
                yield match.start(), (match["name"] or match["key"]), match["value"].strip("\\\"'")
    yield from ((match.start(), "Authorization", match["secret"]) for match in _HEADER.finditer(text))


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
        return {_clean(str(key), secrets): _entry(str(key), item, secrets) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redact(item, secrets) for item in _items(value)]
    return value


def _entry(key: str, item: Any, secrets: frozenset[str]) -> Any:
    if isinstance(item, str) and item:
        return REDACTED if is_secret_name(key, item) else _clean(item, secrets)
    if isinstance(item, list | tuple):
        return [_entry(key, part, secrets) for part in _items(item)]
    # YAML reads a password of digits as a number; "pass" before a small one counts passes.
    if isinstance(item, int | float) and abs(item) >= 1000 and _SECRET_NAME.search(key):
        return REDACTED
    return _redact(item, secrets)


def _items(value: Sequence[Any]) -> Sequence[Any]:
    """A list of words may be a command's, where a flag's value follows it; what has blanks is a text."""
    are_words = all(isinstance(item, str) and " " not in item for item in value)
    return redact_words(value) if are_words else value


def _is_secret_variable(name: str, value: str) -> bool:
    return name not in _HARMLESS_VARIABLES and bool(_SECRET_VARIABLE.search(name) or is_secret_name(name, value))


def _is_telling(value: str) -> bool:
    return not _WORD.fullmatch(value) and not os.path.exists(value)


def _names_secret(name: str, value: str) -> bool:
    return value.lower() not in _NO_SECRETS and is_secret_name(name, value)


def _clean(text: str, secrets: frozenset[str]) -> str:
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, REDACTED)
    if not _MAYBE.search(text):
        return text
    text = _PRIVATE_KEY.sub(REDACTED, text)
    text = _URL_LOGIN.sub(REDACTED, text)
    text = _SECRET_SHAPES.sub(REDACTED, text)
    text = _OPTION.sub(_without_value, text)
    text = _ENTRY.sub(_without_value, text)
    return _HEADER.sub(rf"\g<head>{REDACTED}", text)


def _is_secret(match: re.Match[str]) -> bool:
    name, value = match["name"] or match["key"], match["value"]
    bare = value.strip("\\\"'")
    if bare.startswith(REDACTED) or bare.lower().rstrip(")") in _NO_SECRETS or not is_secret_name(name, bare):
        return False
    return not (bare == value and bare.isdigit() and _TOKEN_NAME.search(name))  # the number of a token


def _without_value(match: re.Match[str]) -> str:
    if not _is_secret(match):
        return match.group()
    value = match["value"]
    marks = value[: len(value) - len(value.lstrip("\\\"'"))] if value[0] in '\\"' else ""
    return f"{match['head']}{marks}{REDACTED}{marks}"
