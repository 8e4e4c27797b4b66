"""Reads ``--optim_args`` of a Trainer script into SGD-SaI options, strictly: nothing is guessed or ignored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hf_sai.optim.options import OPTIONS, shown
from hf_sai.optim.rules import RULES

__all__ = ["parse_optim_args"]


def parse_optim_args(optim_args: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Parse ``optim_args`` into keyword arguments of ``SGDSaI`` and ``param_groups``.

    Args:
        optim_args: ``"key=value,key=value"`` as on the command line, a mapping as in a YAML file, or None.
            Keys: the optimizer's options (``hf_sai.optim.options.OPTIONS``) but for those that Trainer has an argument
            of its own for, ``lr_ratios`` (``role:factor``, several joined by ``;``), ``freeze`` (roles, likewise) and
            ``matrices`` (``expression:true`` or ``:false``, likewise).

    Returns:
        The options given, each of its own type.

    Raises:
        ValueError: An unknown or repeated key, a missing ``=``, or a value that the option cannot be.

    Example:
        >>> parse_optim_args("momentum=0.95, update=factored, lr_ratios=lora_A:1;lora_B:4")
        {'momentum': 0.95, 'update': 'factored', 'lr_ratios': {'lora_A': 1.0, 'lora_B': 4.0}}
    """
    options: dict[str, Any] = {}
    for key, value in _pairs(optim_args):
        if key in _ELSEWHERE:
            raise ValueError(
                f"optim_args: {key} is set by --{_ELSEWHERE[key]}, not in optim_args (got {shown(value)})."
            )
        if key == "normalize_gradient":
            raise ValueError(_renamed(value))
        if key not in _KEYS:
            raise ValueError(
                f"optim_args: unknown key {shown(key)} (value {shown(value)}). Allowed: {', '.join(_KEYS)}."
            )
        if key in options:
            raise ValueError(f"optim_args: {key} is given twice; the second value is {shown(value)}.")
        parse, allowed = _KEYS[key]
        try:
            options[key] = parse(value)
        except (ValueError, TypeError, AttributeError, KeyError, OverflowError):
            raise ValueError(f"optim_args: {key} must be {allowed}, but is {shown(value)}.") from None
    return options


def _pairs(optim_args: str | Mapping[str, Any] | None) -> list[tuple[Any, Any]]:
    if optim_args is None or isinstance(optim_args, Mapping):
        return list((optim_args or {}).items())
    if not isinstance(optim_args, str):
        raise ValueError(f"optim_args must be a string 'key=value,key=value' or a mapping, but is {shown(optim_args)}.")
    pairs = []
    for item in optim_args.split(",") if optim_args.strip() else []:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not key or not value:
            raise ValueError(
                f"optim_args: {shown(item.strip())} in {shown(optim_args)} is not of the form key=value. "
                "Write for example momentum=0.95,eps=1e-8."
            )
        pairs.append((key, value))
    return pairs


def _renamed(value: Any) -> str:
    rule = "published" if value is None else str(value).lower().replace("none", "published")
    if rule in RULES:
        return f"optim_args: normalize_gradient is called update now; write update={rule} for {shown(value)}."
    return (
        f"optim_args: normalize_gradient is called update now, which must be {OPTIONS['update'].allowed}; "
        f"there is no {shown(value)}."
    )


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _roles(value: Any) -> tuple[str, ...]:
    parts = value.split(";") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) and part.strip() for part in parts):
        raise TypeError
    return tuple(part.strip() for part in parts)


def _ratios(value: Any) -> dict[str, float]:
    return {key: _number(ratio) for key, ratio in _by_name(value).items()}


def _flags(value: Any) -> dict[str, bool]:
    words = {"true": True, "false": False}
    return {key: words[str(flag).strip().lower()] for key, flag in _by_name(value).items()}


def _by_name(value: Any) -> dict[str, Any]:
    pairs = list(value.items() if isinstance(value, Mapping) else (item.rsplit(":", 1) for item in value.split(";")))
    named = {str(name).strip(): of_name for name, of_name in pairs}
    if len(named) < len(pairs):
        raise ValueError
    return named


_KEYS: dict[str, tuple[Callable[[Any], Any], str]] = {
    **{name: (option.parse, option.allowed) for name, option in OPTIONS.items() if option.of_trainer is None},
    "lr_ratios": (_ratios, "role:factor pairs joined by ';', such as lora_A:1;lora_B:4"),
    "freeze": (_roles, "roles joined by ';', such as lora_A"),
    "matrices": (_flags, "expression:true or expression:false joined by ';', such as router:false"),
}

# What TrainingArguments has an argument of its own for. Trainer would overwrite it group by group.
_ELSEWHERE = {
    **{name: option.of_trainer for name, option in OPTIONS.items() if option.of_trainer is not None},
    "learning_rate": "learning_rate",
}
