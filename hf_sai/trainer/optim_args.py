"""Reads ``--optim_args`` of a Trainer script into SGD-SaI options, strictly: nothing is guessed or ignored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["parse_optim_args"]


def parse_optim_args(optim_args: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Parse ``optim_args`` into keyword arguments of ``SGDSaI`` and ``param_groups``.

    Ranges (momentum in [0, 1), ...) are checked by the optimizer itself.

    Args:
        optim_args: ``"key=value,key=value"`` as on the command line, a mapping as in a YAML file, or None.
            Keys: ``momentum``, ``eps`` (numbers), ``normalize``, ``stochastic_rounding``, ``gradient_release`` (true or
            false), ``normalize_gradient`` (rows, tensor, factored or none), ``momentum_dtype`` (float32, bfloat16,
            8bit, 4bit or none), ``foreach``, ``fused`` (true, false or none), ``lr_ratios`` (``role:factor``, several
            joined by ``;``), ``freeze`` (roles, likewise).

    Returns:
        The options given, each of its own type.

    Raises:
        ValueError: An unknown or repeated key, a missing ``=``, or a value of the wrong type.

    Example:
        >>> parse_optim_args("momentum=0.95, normalize=true, lr_ratios=lora_A:1;lora_B:4")
        {'momentum': 0.95, 'normalize': True, 'lr_ratios': {'lora_A': 1.0, 'lora_B': 4.0}}
    """
    options: dict[str, Any] = {}
    for key, value in _pairs(optim_args):
        if key in _ELSEWHERE:
            raise ValueError(f"optim_args: {key} is set by --{_ELSEWHERE[key]}, not in optim_args (got {value!r}).")
        if key not in _PARSERS:
            raise ValueError(f"optim_args: unknown key {key!r} (value {value!r}). Allowed: {', '.join(_PARSERS)}.")
        if key in options:
            raise ValueError(f"optim_args: {key} is given twice; the second value is {value!r}.")
        parse, allowed = _PARSERS[key]
        try:
            options[key] = parse(value)
        except (ValueError, TypeError, AttributeError):
            raise ValueError(f"optim_args: {key} must be {allowed}, but is {value!r}.") from None
    return options


def _pairs(optim_args: str | Mapping[str, Any] | None) -> list[tuple[str, Any]]:
    if optim_args is None or isinstance(optim_args, Mapping):
        return list((optim_args or {}).items())
    if not isinstance(optim_args, str):
        raise ValueError(f"optim_args must be a string 'key=value,key=value' or a mapping, but is {optim_args!r}.")
    pairs = []
    for item in optim_args.split(",") if optim_args.strip() else []:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not key or not value:
            raise ValueError(
                f"optim_args: {item.strip()!r} in {optim_args!r} is not of the form key=value. "
                "Write for example momentum=0.95,eps=1e-8."
            )
        pairs.append((key, value))
    return pairs


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _choice(**choices: Any) -> Callable[[Any], Any]:
    def parse(value: Any) -> Any:
        key = str(value).lower()
        if key not in choices:
            raise ValueError
        return choices[key]

    return parse


def _roles(value: Any) -> tuple[str, ...]:
    return tuple(role.strip() for role in value.split(";")) if isinstance(value, str) else tuple(value)


def _ratios(value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping):
        value = dict(item.split(":") for item in value.split(";"))
    return {str(role).strip(): _number(ratio) for role, ratio in value.items()}


_PARSERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "momentum": (_number, "a number in [0, 1)"),
    "eps": (_number, "a number >= 0"),
    "normalize": (_choice(true=True, false=False), "true or false"),
    "normalize_gradient": (
        _choice(rows="rows", tensor="tensor", factored="factored", none=None),
        "rows, tensor, factored or none",
    ),
    "momentum_dtype": (
        _choice(none=None, float32=torch.float32, bfloat16=torch.bfloat16, **{"8bit": "8bit", "4bit": "4bit"}),
        "float32, bfloat16, 8bit, 4bit or none",
    ),
    "stochastic_rounding": (_choice(true=True, false=False), "true or false"),
    "gradient_release": (_choice(true=True, false=False), "true or false"),
    "foreach": (_choice(true=True, false=False, none=None), "true, false or none"),
    "fused": (_choice(true=True, false=False, none=None), "true, false or none"),
    "lr_ratios": (_ratios, "role:factor pairs joined by ';', such as lora_A:1;lora_B:4"),
    "freeze": (_roles, "roles joined by ';', such as lora_A"),
}

# What TrainingArguments has an argument of its own for. Trainer would overwrite it group by group.
_ELSEWHERE = {"lr": "learning_rate", "learning_rate": "learning_rate", "weight_decay": "weight_decay"}
