"""The run record: one JSON file that says how a checkpoint was trained, and what was measured on the way."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_sai.runs.files import atomic_write, read_text
from hf_sai.runs.paths import hide_paths, is_local_path, short_path
from hf_sai.runs.redact import redact

__all__ = ["RECORD_FILE", "RECORD_VERSION", "RunRecord", "first_problem", "is_number", "to_json"]

#: The record's name in a run's directory and in a repository on the Hub.
RECORD_FILE = "run_record.json"
#: Raised when a reader of the older form would go wrong. New optional fields do not raise it.
RECORD_VERSION = 1
#: A record of 10,000 parameters and 100,000 log entries has about 25 MB.
MAX_RECORD_BYTES = 64 * 2**20
#: Deeper than any settings are, and far from what Python's own recursion allows.
MAX_DEPTH = 50

Point = tuple[int, float]


@dataclass
class RunRecord:
    """How a run was made and what it measured.

    Attributes:
        run: ``name``, ``status`` (running, finished), ``created`` and ``updated`` (UTC, ISO 8601), ``steps``;
            ``sessions``: one entry per process that trained it, with its ``command`` and the step it began at;
            ``card``: what only its author knows, for the model card.
        versions: Package to version.
        hardware: See :func:`hf_sai.runs.environment.hardware`.
        settings: The training arguments.
        model: ``class``, ``type``, ``base_model``, ``library``, ``adapter``, ``parameters``, ``trainable`` (elements).
        optimizer: ``name``, ``options``, ``groups``, ``state_bytes`` (of the main process, measured).
        gsnr: ``parameters`` (name, group, shape, gsnr, ratio; None while unmeasured) and ``roles`` (their summary).
        timing: ``steps``, ``step_seconds``, ``optimizer_seconds``, ``record_seconds`` (sums over the timed steps).
        history: What was logged, as Trainer logs it: ``step`` and values. None stands for inf and NaN.
        data: One entry per source: ``name``, ``role``, ``license``, and what else is known.
        results: Final figures by name.
        samples: ``title`` and ``text`` of generated samples.
        images: ``title`` and ``file`` (relative to the record) of pictures the run made.
        twins: :meth:`summary` of runs to compare with.
    """

    run: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    gsnr: dict[str, Any] = field(default_factory=dict)
    timing: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    data: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    images: list[dict[str, Any]] = field(default_factory=list)
    twins: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.run.get("name", "run"))

    @property
    def state_bytes(self) -> int | None:
        """Bytes of optimizer state in the main process, as measured; None before the first step."""
        return self.optimizer.get("state_bytes")

    @property
    def optimizer_share(self) -> float | None:
        """The part of the step's time that the optimizer takes (0 to 1); None before the first step."""
        total, optimizer = self.timing.get("step_seconds"), self.timing.get("optimizer_seconds")
        return optimizer / total if total and optimizer is not None else None

    @property
    def overhead(self) -> float | None:
        """What measuring and writing this record took, as a part of the steps' time; None before the first step."""
        total, own = self.timing.get("step_seconds"), self.timing.get("record_seconds")
        return own / total if total and own is not None else None

    def curve(self, key: str) -> list[Point]:
        """The finite values logged under ``key``, each with its step, in order.

        Args:
            key: Such as ``loss``, ``eval_loss``, ``sai/update_ratio/base/decay``.
        """
        points = [(entry["step"], entry[key]) for entry in self.history if is_number(entry.get(key))]
        return sorted(points, key=lambda point: point[0])

    def keys(self, prefix: str = "") -> list[str]:
        """The names that were logged, in order of their first appearance, those beginning with ``prefix``."""
        return list(dict.fromkeys(key for entry in self.history for key in entry if key.startswith(prefix)))

    def metrics(self) -> dict[str, float]:
        """The last value of each evaluation metric, without ``eval_``, and the final figures among ``results``."""
        found: dict[str, float] = {}
        for entry in self.history:
            found.update({key.removeprefix("eval_"): value for key, value in entry.items() if key.startswith("eval_")})
        found.update({key.removeprefix("eval_"): value for key, value in self.results.items()})
        no_scores = re.compile(r"(^|_)(runtime|(samples|steps|tokens)_per_second|preparation_time|num_tokens|epoch)$")
        return {key: value for key, value in found.items() if is_number(value) and not no_scores.search(key)}

    def summary(self) -> dict[str, Any]:
        """What a comparison of runs needs: name, optimizer, rate, metrics, bytes of state, seconds per step."""
        steps, seconds = self.timing.get("steps"), self.timing.get("step_seconds")
        lr = self.optimizer.get("options", {}).get("lr")
        return {
            "name": self.name,
            "optimizer": self.optimizer.get("name", "?"),
            "lr": lr if is_number(lr) else None,
            "steps": self.run.get("steps", 0),
            "metrics": self.metrics(),
            "state_bytes": self.state_bytes,
            "step_seconds": seconds / steps if steps and seconds else None,
            "optimizer_share": self.optimizer_share,
        }

    def save(self, path: str | Path, secrets: Iterable[str] = ()) -> Path:
        """Write the record, atomically and without secrets.

        Args:
            path: The file, or the directory to write ``run_record.json`` in.
            secrets: Strings to leave out beside those :func:`hf_sai.runs.redact.known_secrets` finds.

        Returns:
            The file.

        Raises:
            OSError: It cannot be written; an older record is unchanged.
        """
        return atomic_write(_record_file(path), self.to_text(secrets))

    def to_text(self, secrets: Iterable[str] = ()) -> str:
        """The record as :meth:`save` writes it: JSON without secrets and without paths of this machine."""
        content = redact(_without_paths(to_json(asdict(self))), secrets)
        return json.dumps({"format": "hf-sai run record", "version": RECORD_VERSION, **content}, indent=1) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> RunRecord:
        """Read a record, also one made by a stranger: it is checked and nothing in it is executed.

        Args:
            path: The file, or a directory that holds a ``run_record.json``.

        Returns:
            The record.

        Raises:
            ValueError: There is none, it is too large, not JSON, not a run record, of a newer version, or a field
                has the wrong type.
        """
        path = _record_file(path)
        if not path.exists():
            raise ValueError(
                f"cannot read {path}: No such file. A run leaves it while it trains: Trainer(..., "
                "callbacks=[RunRecordCallback()]), or for any script hf-sai run --record script.py ..."
            )
        text = read_text(path, MAX_RECORD_BYTES)
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {type(error).__name__} {error}") from None
        if not isinstance(content, dict) or content.pop("format", None) != "hf-sai run record":
            raise ValueError(f"{path} is not a run record: its 'format' must be 'hf-sai run record'")
        version = content.pop("version", None)
        if type(version) is not int or not 1 <= version <= RECORD_VERSION:
            raise ValueError(
                f"{path} has version {version!r}, but this hf-sai reads versions 1 to {RECORD_VERSION}; upgrade hf-sai"
            )
        known = {name: content[name] for name in cls.__dataclass_fields__ if name in content}
        problem = first_problem(known) if _is_flat(known) else f"it is nested more than {MAX_DEPTH} levels deep"
        if problem:
            raise ValueError(f"{path} is not a valid run record: {problem}")
        return cls(**known)


def _without_paths(content: dict[str, Any]) -> dict[str, Any]:
    """The content without folders of this machine; what a model wrote and how its parameters are called stays."""
    kept = {name: content[name] for name in ("samples", "gsnr")}
    shown = {name: _hide(value) for name, value in content.items() if name not in kept}
    card, model = shown["run"].get("card"), shown["model"]
    places = [(model, "base_model"), *((source, "id") for source in shown["data"])]
    if isinstance(card, dict):
        places += [(card, "base_model"), (card, "datasets")]
    for where, key in places:
        if key in where:
            where[key] = _marked(where[key])
    return {name: kept.get(name, shown.get(name)) for name in content}


def _hide(value: Any) -> Any:
    if isinstance(value, str):
        return short_path(value) if "/" in value or "\\" in value else value
    if isinstance(value, dict):
        return {hide_paths(key): _hide(item) for key, item in value.items()}
    return [_hide(item) for item in value] if isinstance(value, list) else value


def _marked(name: Any) -> Any:
    """A name that could be a repository's on the Hub but is a folder here, with "./", so that nobody mistakes it."""
    if isinstance(name, list):
        return [_marked(item) for item in name]
    is_plain = isinstance(name, str) and name and not name.startswith((".", "/", "~", "file:"))
    return f"./{name}" if is_plain and is_local_path(name) else name


def to_json(value: Any) -> Any:
    """A copy of ``value`` that JSON can hold: inf and NaN become None, other unknown objects their ``str``."""
    if value is None or isinstance(value, bool | str | int):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(to_json, value), key=str)  # a set's own order differs from process to process
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if hasattr(value, "item") and getattr(value, "size", None) is not None and _elements(value) == 1:
        return to_json(value.item())  # a number from numpy or torch
    return str(value)


def _elements(value: Any) -> int:
    return value.numel() if hasattr(value, "numel") else int(value.size)


def _record_file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".json" else path / RECORD_FILE


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and no bool."""
    # JSON's integers have no end; what no float can hold is refused here, not where it is drawn.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_flat(content: Any) -> bool:
    level = [content]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for value in level
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
        ]
    return not level


# What readers rely on, as path -> test of the value; a list's items are checked one by one under "name[]".
_OPTIONAL_NUMBER = ("a finite number or null", lambda value: value is None or is_number(value))
_TEXT = ("a string", lambda value: isinstance(value, str))
_COUNT = ("an integer from 0 to 2**63 - 1", lambda value: type(value) is int and 0 <= value < 2**63)
_OPTIONAL_COUNT = ("an integer from 0 to 2**63 - 1, or null", lambda value: value is None or _COUNT[1](value))
_DICT = ("an object", lambda value: isinstance(value, dict))
_LIST = ("a list of objects", lambda value: isinstance(value, list) and all(isinstance(v, dict) for v in value))
_SHAPE = ("a list of integers", lambda value: isinstance(value, list) and all(_COUNT[1](v) for v in value))
_FIELDS: dict[str, dict[str, Any]] = {
    "run": {
        "name": _TEXT,
        "status": _TEXT,
        "created": _TEXT,
        "updated": _TEXT,
        "steps": _COUNT,
        "sessions": _LIST,
        "card": _DICT,
    },
    "run.sessions[]": {"command": _TEXT, "from_step": _COUNT},
    "hardware": {"accelerators": _LIST, "processes": _COUNT, "memory_bytes": _OPTIONAL_COUNT},
    "model": {"parameters": _COUNT, "trainable": _COUNT},
    "optimizer": {"name": _TEXT, "options": _DICT, "groups": _LIST, "state_bytes": _OPTIONAL_COUNT},
    "optimizer.groups[]": {
        "name": _TEXT,
        "tensors": _COUNT,
        "elements": _COUNT,
        "lr": _OPTIONAL_NUMBER,
        "lr_ratio": _OPTIONAL_NUMBER,
        "weight_decay": _OPTIONAL_NUMBER,
    },
    "gsnr": {"parameters": _LIST, "roles": _LIST},
    "gsnr.parameters[]": {
        "name": _TEXT,
        "group": _TEXT,
        "shape": _SHAPE,
        "gsnr": _OPTIONAL_NUMBER,
        "ratio": _OPTIONAL_NUMBER,
    },
    "gsnr.roles[]": {
        "group": _TEXT,
        "tensors": _COUNT,
        "measured": _COUNT,
        **dict.fromkeys(("min", "median", "max", "median_ratio"), _OPTIONAL_NUMBER),
    },
    "timing": {
        "steps": _COUNT,
        **dict.fromkeys(("step_seconds", "optimizer_seconds", "record_seconds"), _OPTIONAL_NUMBER),
    },
    "history[]": {"step": _COUNT},
    "data[]": {"name": _TEXT},
    "samples[]": {"title": _TEXT, "text": _TEXT},
    "images[]": {"title": _TEXT, "file": _TEXT},
    "twins[]": {
        "name": _TEXT,
        "optimizer": _TEXT,
        "steps": _COUNT,
        "metrics": _DICT,
        "state_bytes": _OPTIONAL_COUNT,
        **dict.fromkeys(("lr", "step_seconds", "optimizer_share"), _OPTIONAL_NUMBER),
    },
}
#: Fields that every item of a list must have; all others may be missing.
_REQUIRED = {
    "optimizer.groups[]": ("name",),
    "gsnr.parameters[]": ("name", "group", "shape"),
    "gsnr.roles[]": ("group", "tensors", "measured"),
    "history[]": ("step",),
    "data[]": ("name",),
    "samples[]": ("title", "text"),
    "images[]": ("title", "file"),
    "run.sessions[]": ("command", "from_step"),
    "twins[]": ("name", "optimizer", "metrics"),
}


def first_problem(content: dict[str, Any]) -> str | None:
    """What of a record's fields a reader would refuse, in words; None where all is right."""
    for name, value in content.items():
        is_list = RunRecord.__dataclass_fields__[name].default_factory is list
        allowed, test = _LIST if is_list else _DICT
        if not test(value):
            return f"{name!r} must be {allowed}"
    for place, fields in _FIELDS.items():
        for label, item in _items(content, place):
            for key in _REQUIRED.get(place, ()):
                if key not in item:
                    return f"{label} has no {key!r}"
            for key, (allowed, test) in fields.items():
                if key in item and not test(item[key]):
                    return f"{label}.{key} must be {allowed}, but is {str(item[key])[:50]!r}"
    return None


def _items(content: dict[str, Any], place: str) -> Iterable[tuple[str, dict[str, Any]]]:
    value: Any = content
    for part in place.removesuffix("[]").split("."):
        value = value.get(part, [] if place.endswith("[]") and place.removesuffix("[]").endswith(part) else {})
    if not place.endswith("[]"):
        return [(place, value)]
    return ((f"{place[:-2]}[{index}]", item) for index, item in enumerate(value))
