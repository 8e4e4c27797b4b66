"""Reads and writes a card's metadata as the Hub does, by YAML 1.2: ``no`` and ``on`` are words, and 1.10 stays 1.10."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

__all__ = ["dump_metadata", "load_metadata"]

_NULL = re.compile(r"(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_DATE = re.compile(r"\d{4}-\d\d?-\d\d?(?:[Tt ][\d:.Zz +-]*)?$")
_FIRST = "-+.0123456789"


class _Written(float):
    """A number that is written again as it was: 1.10 may be a version."""

    text: str
    tag: str

    def __str__(self) -> str:
        return self.text


class _Date(str):
    """A date, of which YAML 1.2 knows nothing and the Hub does; written again without quotes."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]


class _Dumper(yaml.SafeDumper):
    """Puts quotes around what either version of YAML would take for something else than a word."""


def load_metadata(block: str) -> dict[str, Any]:
    """The metadata block of a card.

    Raises:
        ValueError: It is no mapping.
        yaml.YAMLError: It is no YAML.
    """
    content = yaml.load(block, Loader=_Loader)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError("the metadata block should be a dict")
    return content


def dump_metadata(content: dict[str, Any]) -> str:
    """The metadata as a block of YAML that versions 1.1 and 1.2 read alike."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True).strip()


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    text = node.value
    if _INT.match(text):
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        value: Any = int(text[2:] if base != 10 else text, base)
    else:
        value = float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
    if repr(value) == text or (isinstance(value, int) and abs(value) > 2**53):
        return value
    written = _Written(value)
    written.text, written.tag = text, node.tag
    return written


def _date(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    return _Date(node.value)


for _tag, _pattern, _characters in (
    ("null", _NULL, ["~", "n", "N", ""]),
    ("bool", _BOOL, list("tTfF")),
    ("int", _INT, list(_FIRST)),
    ("float", _FLOAT, list(_FIRST)),
    ("timestamp", _DATE, list(_FIRST)),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _characters)
for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _number)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", _date)
_Dumper.add_representer(_Written, lambda dumper, value: dumper.represent_scalar(value.tag, value.text))
_Dumper.add_representer(_Date, lambda dumper, value: dumper.represent_scalar("tag:yaml.org,2002:timestamp", str(value)))
