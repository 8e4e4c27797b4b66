"""The one table of SGD-SaI's options: default, what is allowed, how text becomes a value, one line of help.

The constructor's defaults, the checks, ``--optim_args``, the upgrade of older states and the table in the docs are all
read from here. Where an option does not work, the layouts of :mod:`hf_sai.optim.layout` say it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_sai.optim.rules import RULES

__all__ = ["DEFAULTS", "OPTIONS", "Option", "check_options", "shown", "upgrade_group"]

#: What a momentum can be kept in, by the name that ``--optim_args`` uses; None is the parameter's own dtype.
MOMENTUM_DTYPES: dict[str, torch.dtype | str | None] = {
    "none": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
    "8bit": "8bit",
    "4bit": "4bit",
}


@dataclass(frozen=True)
class Option:
    """One option of :class:`hf_sai.SGDSaI`.

    Attributes:
        name: As the constructor, the parameter groups and ``--optim_args`` call it.
        default: What it is where nobody says otherwise.
        allowed: What it may be, in words.
        parse: Turns a value or its text into the value that the optimizer takes; raises ValueError or TypeError.
        help: One line.
        later: Whether the official code does not have it, so that a state saved by that code lacks it.
        per_group: Whether parameter groups may differ in it.
        of_trainer: The argument of ``TrainingArguments`` that sets it instead of ``--optim_args``.
    """

    name: str
    default: Any
    allowed: str
    parse: Callable[[Any], Any]
    help: str
    later: bool = True
    per_group: bool = True
    of_trainer: str | None = None

    def check(self, value: Any) -> None:
        """Raise ValueError unless this is a value the optimizer takes as it is (text that needs parsing is not)."""
        try:
            same = self.parse(value) is value or isinstance(value, (int, float, Tensor))
        except (ValueError, TypeError, OverflowError, RuntimeError):  # the last of a rate without a value (meta)
            same = False
        if not same:
            raise ValueError(f"{self.name} must be {self.allowed}, but is {shown(value)}.")


def shown(value: Any) -> str:
    """A value for a sentence: of an endless one its beginning."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write out integers of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:100]}... ({len(text)} characters)"


def _number(*, below: float) -> Callable[[Any], float]:
    def parse(value: Any) -> float:
        if isinstance(value, (bool, Tensor)) or not isinstance(value, (int, float, str)):
            raise TypeError
        number = float(value)
        if not 0.0 <= number < below:
            raise ValueError
        return value if isinstance(value, float) else number

    return parse


def _rate(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError
        _number(below=math.inf)(value.item())
        return value
    return _number(below=math.inf)(value)


def _choice(choices: Mapping[str, Any]) -> Callable[[Any], Any]:
    def parse(value: Any) -> Any:
        if isinstance(value, str) and value.lower() in choices:
            chosen = choices[value.lower()]
            return value if chosen == value else chosen
        if any(value is choice for choice in choices.values() if not isinstance(choice, str)):
            return value
        raise ValueError

    return parse


_FLAG = _choice({"true": True, "false": False})
_FLAG_OR_AUTOMATIC = _choice({"true": True, "false": False, "none": None})

_TABLE = (
    Option(
        "lr", 1e-2, "a finite number >= 0 or a floating tensor of one element", _rate,
        "Learning rate. The published rule mostly wants 2.5 to 50 times AdamW's, orthogonal twice, others AdamW's.",
        later=False, of_trainer="learning_rate",
    ),
    Option(
        "momentum", 0.9, "a number in [0, 1)", _number(below=1.0),
        "How much of the momentum stays from step to step; with 0 no buffer is kept.", later=False,
    ),
    Option(
        "weight_decay", 1e-2, "a finite number >= 0", _number(below=math.inf),
        "Decoupled decay per unit of learning rate, not scaled by g-SNR.", later=False, of_trainer="weight_decay",
    ),
    Option(
        "eps", 1e-8, "a finite number >= 0", _number(below=math.inf),
        "Added to the gradient's standard deviation in g-SNR, at most 0.5 % of it.", later=False,
    ),
    Option(
        "update", "published", f"one of {', '.join(RULES)}", _choice({rule: rule for rule in RULES}),
        "The rule: the paper's; gradients of unit size by rows or factored, the latter also averaged; or orthogonal.",
    ),
    Option(
        "nesterov", False, "true or false", _FLAG,
        "Step along the momentum a step ahead. Hidden matrices under orthogonal always do; averaged cannot.",
    ),
    Option(
        "normalize", False, "true or false", _FLAG,
        "Divide every g-SNR by the largest, as the paper's Algorithm 1 does and its code does not (published only).",
    ),
    Option("maximize", False, "true or false", _FLAG, "Ascend instead of descend."),
    Option(
        "momentum_dtype", None, f"{', '.join(list(MOMENTUM_DTYPES)[1:])} or none", _choice(MOMENTUM_DTYPES),
        "What the momentum is kept in; none is the parameter's dtype. 8bit and 4bit are faster with the extra `quant`.",
    ),
    Option(
        "stochastic_rounding", False, "true or false", _FLAG,
        "Round bfloat16 parameters up or down at random, to train without float32 copies of them.",
    ),
    Option(
        "foreach", None, "true, false or none", _FLAG_OR_AUTOMATIC,
        "Use torch's multi-tensor operations; false is the plain loop, none chooses.",
    ),
    Option(
        "fused", None, "true, false or none", _FLAG_OR_AUTOMATIC,
        "Use compiled kernels: numba's on CPU (extra `speed`), Triton's or torch's on CUDA; none chooses, and Triton's "
        "only run when asked for with true.",
    ),
    Option(
        "gradient_release", False, "true or false", _FLAG,
        "Update each parameter within backward() and free its gradient at once.", per_group=False,
    ),
)  # fmt: skip

#: Name -> option, in the constructor's order.
OPTIONS: dict[str, Option] = {option.name: option for option in _TABLE}

#: Name -> default.
DEFAULTS: dict[str, Any] = {option.name: option.default for option in _TABLE}


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option out of range, and for options that contradict each other.

    Args:
        options: Every per-group option by its name; other keys are not looked at.
    """
    for name, option in OPTIONS.items():
        if name in options:
            option.check(options[name])
    if options["normalize"] and options["update"] != "published":
        raise ValueError(
            f"normalize=True and update={options['update']!r} are two ways of scaling updates; choose one of them."
        )
    if options["nesterov"] and options["momentum"] == 0:
        raise ValueError(
            "nesterov=True looks ahead along a momentum, and momentum is 0; raise it, or leave nesterov out."
        )
    if options["nesterov"] and options["update"] == "averaged":
        raise ValueError(
            "nesterov=True needs a momentum, and update='averaged' keeps a mean in its place; leave it out."
        )
    if options["foreach"] and options["fused"]:
        raise ValueError("foreach and fused are both True; choose one, or leave both at None.")


def upgrade_group(group: dict[str, Any], present: Mapping[str, Any] = DEFAULTS) -> dict[str, Any]:
    """A parameter group saved by the official code or by an older version of this one, with today's keys.

    Args:
        group: A group of a state dict. Up to 0.1.0's first form, ``update`` was called ``normalize_gradient``.
        present: Where options come from that the group does not have.
    """
    group = dict(group)
    if "normalize_gradient" in group:
        rule = group.pop("normalize_gradient") or "published"
        if rule not in RULES:
            raise ValueError(
                f"The state was saved with normalize_gradient={rule!r}, which is no longer there (it gained nothing). "
                f"Start a fresh state on the saved weights, with another update ({', '.join(RULES)})."
            )
        group["update"] = rule
    return {**{name: present[name] for name, option in OPTIONS.items() if option.later and option.per_group}, **group}
