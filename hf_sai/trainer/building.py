"""What Trainer builds for each of our names: the options that a name stands for, the class, its arguments."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from hf_sai.groups.param_groups import param_groups
from hf_sai.optim.options import DEFAULTS
from hf_sai.optim.sgd_sai import SGDSaI
from hf_sai.runs.meters import unwrap_optimizer
from hf_sai.trainer.grouping import named_groups
from hf_sai.trainer.optim_args import parse_optim_args
from hf_sai.trainer.small_updates import watch_updates
from hf_sai.trainer.unfrozen import watch_frozen

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

__all__ = [
    "OPTIMIZER_NAMES",
    "add_new_parameters",
    "optimizer_cls_and_kwargs",
    "warn_of_late_arguments",
    "without_advice",
]

logger = logging.getLogger(__name__)

_RULES: dict[str, dict[str, Any]] = {
    "sgd_sai": {},
    "sgd_sai_factored": {"update": "factored", "momentum": 0.8},
    "sgd_sai_averaged": {"update": "averaged", "momentum": 0.8},
    "sgd_sai_orthogonal": {"update": "orthogonal"},
}
_MOMENTA: dict[str, dict[str, Any]] = {"": {}, "_8bit": {"momentum_dtype": "8bit"}, "_4bit": {"momentum_dtype": "4bit"}}

#: Name of an optimizer for Trainer -> the options of ``SGDSaI`` that it stands for.
OPTIMIZER_NAMES: dict[str, dict[str, Any]] = {
    rule + momentum: {**_RULES[rule], **_MOMENTA[momentum]}
    for rule in _RULES
    for momentum in _MOMENTA
    if not (momentum and rule == "sgd_sai_averaged")
}

# What a name says itself, and optim_args cannot change: which part of the name to leave out for that.
_SAID_BY_NAME = {"update": ("_factored", "_averaged", "_orthogonal"), "momentum_dtype": ("_8bit", "_4bit")}


def optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[type[SGDSaI], dict[str, Any]]:
    """What Trainer needs to build the optimizer: its class and its keyword arguments, without ``params``.

    Args:
        args: ``learning_rate``, ``weight_decay`` and ``optim_args`` (see :func:`parse_optim_args`) are read.
        model: The model to train. Without one the caller names the groups.

    Returns:
        ``SGDSaI`` and its arguments. With a model, a class that makes an ``SGDSaI`` of whatever groups Trainer, a
        subclass or a caller of its own has computed, with names and PEFT's roles added to them.

    Raises:
        ValueError: ``optim_args`` is wrong, or needs a model to group.
    """
    options = _options(args)
    grouping = _grouping(options)
    for key in _OF_GROUPING:
        options.pop(key, None)
    if options.get("gradient_release"):
        _refuse_what_excludes_gradient_release(args)
    update = options.get("update", DEFAULTS["update"])
    advises = _ADVISING.get() and args.process_index == 0
    if advises and update == "published":
        _warn_of_default_learning_rate(
            args,
            "SGD-SaI needs a larger one and will hardly learn: try --learning_rate 1e-2, then a third and three times "
            "that; or --optim sgd_sai_factored, which takes AdamW's.",
        )
    kwargs = {"lr": args.learning_rate, "weight_decay": args.weight_decay, **options}
    if model is not None:
        advice: dict[str, Callable[[SGDSaI], None]] = {
            "published": watch_updates,
            "orthogonal": functools.partial(_warn_of_orthogonal_rate, args),
        }
        return _class_for(model, grouping, advice.get(update) if advises else None), kwargs
    if grouping:
        needing = ", ".join(f"{key}={value}" for key, value in grouping.items())
        raise ValueError(f"{needing} needs the model, but get_optimizer_cls_and_kwargs got none.")
    return SGDSaI, kwargs


def add_new_parameters(trainer: Trainer, *, created: bool) -> None:
    """Give an optimizer that Trainer has built the parameters that became trainable since, such as a second adapter's.

    Trainer keeps its optimizer from one ``train()`` to the next and never looks at the model again. What was trainable
    at first and in no group stays out: somebody has left it out on purpose. So do optimizers that Trainer was given.

    Args:
        trainer: Whose ``optimizer`` and ``model`` to look at.
        created: Whether the optimizer has just been made.
    """
    optimizer: Any = unwrap_optimizer(trainer.optimizer)
    model = trainer.model
    if not isinstance(optimizer, SGDSaI) or model is None:
        return
    if not created:
        optimizer.zero_grad()  # an interrupted train() may have left a backward pass without its step
    held = {id(p) for group in optimizer.all_groups for p in group["params"]}
    outside = {id(p): name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held}
    if created:
        trainer._hf_sai_left_out = (weakref.ref(optimizer), set(outside))  # type: ignore[attr-defined]
        watch_frozen(optimizer, model)
        return
    known: Any
    known, left_out = getattr(trainer, "_hf_sai_left_out", (lambda: None, set()))
    new = {key: name for key, name in outside.items() if key not in left_out}
    if known() is not optimizer or not new:
        return
    if not optimizer.layout.whole:
        logger.warning("%d parameters became trainable since the optimizer was made, and it does not train them: %s, "
                       "... Make a new Trainer.", len(new), next(iter(new.values())))  # fmt: skip
        return
    args = trainer.args
    grouping = _grouping(
        {**OPTIMIZER_NAMES[str(getattr(args.optim, "value", args.optim))], **parse_optim_args(args.optim_args)}
    )
    for group in param_groups(model, lr=args.learning_rate, weight_decay=args.weight_decay, **grouping):
        params = [(name, p) for name, p in group["params"] if id(p) in new]
        if params:
            optimizer.add_param_group({**group, "params": params})


def warn_of_late_arguments(trainer: Trainer, *, created: bool) -> None:
    """One warning for arguments of the optimizer that were changed since Trainer has built it, and have no effect.

    Args:
        trainer: Whose ``optimizer`` and ``args`` to look at.
        created: Whether the optimizer has just been made.
    """
    optimizer: Any = unwrap_optimizer(trainer.optimizer)
    if optimizer is None:
        return
    asked = {name: getattr(trainer.args, name) for name in ("optim", *_IN_GROUPS, "optim_args")}
    asked["optim"] = str(getattr(asked["optim"], "value", asked["optim"]))
    if created:
        trainer._hf_sai_asked = (weakref.ref(optimizer), asked)  # type: ignore[attr-defined]
        return
    known, before = getattr(trainer, "_hf_sai_asked", (None, asked))
    if known is None or known() is not optimizer or not {before["optim"], asked["optim"]} & OPTIMIZER_NAMES.keys():
        return
    late = [
        f"{name}={value} (in force: {before[name]})"
        for name, value in asked.items()
        if value != before[name]
        and not (name in _IN_GROUPS and any(group.get(_IN_GROUPS[name]) == value for group in optimizer.param_groups))
    ]
    if late and trainer.is_world_process_zero():
        logger.warning(
            "Trainer keeps its optimizer from one train() to the next, so that what was changed since has no effect: "
            "%s. For a new one set trainer.optimizer and trainer.lr_scheduler to None, or make a new Trainer.",
            ", ".join(late),
        )


# Arguments of Trainer -> what the groups of an optimizer call them; somebody may have changed both.
_IN_GROUPS = {"learning_rate": "initial_lr", "weight_decay": "weight_decay"}


@contextlib.contextmanager
def without_advice() -> Iterator[None]:
    """Say nothing about learning rates within, where rates are tried on purpose."""
    token = _ADVISING.set(False)
    try:
        yield
    finally:
        _ADVISING.reset(token)


_ADVISING = contextvars.ContextVar("_ADVISING", default=True)


# What of optim_args is for the groups and not for the optimizer.
_OF_GROUPING = ("lr_ratios", "freeze", "matrices")


def _options(args: TrainingArguments) -> dict[str, Any]:
    """What the optimizer's name and ``optim_args`` stand for together."""
    given = parse_optim_args(args.optim_args)
    name = str(getattr(args.optim, "value", args.optim))
    _refuse_what_contradicts(name, given)
    return {**OPTIMIZER_NAMES[name], **given}


def _grouping(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``param_groups`` among the options that a name and ``optim_args`` stand for."""
    grouping = {key: options[key] for key in _OF_GROUPING if key in options}
    if "matrices" in grouping or options.get("update") == "orthogonal":
        grouping["update"] = options.get("update", "published")
    return grouping


def _class_for(model: Any, grouping: dict[str, Any], advise: Callable[[SGDSaI], None] | None) -> type[SGDSaI]:
    # Trainer calls optimizer_cls(groups, **kwargs), and takes for a factory what is no subclass of Optimizer.
    class SGDSaIWithNames(SGDSaI):
        def __new__(cls, params: Any, **options: Any) -> SGDSaI:  # type: ignore[misc]
            lr, weight_decay = (options.get(key, DEFAULTS[key]) for key in ("lr", "weight_decay"))
            groups = named_groups(model, params, lr, weight_decay, **grouping)
            optimizer = SGDSaI(groups, **options)
            if advise is not None:
                advise(optimizer)
            return optimizer

    return SGDSaIWithNames


def _refuse_what_contradicts(name: str, given: dict[str, Any]) -> None:
    for key, parts in _SAID_BY_NAME.items():
        said = OPTIMIZER_NAMES[name].get(key)
        if said is not None and given.get(key, said) != said:
            other = name
            for part in parts:
                other = other.replace(part, "")
            raise ValueError(f"optim_args: {key}={given[key]} contradicts --optim {name}; use --optim {other}.")


def _refuse_what_excludes_gradient_release(args: TrainingArguments) -> None:
    excluded = {
        "gradient_accumulation_steps": (args.gradient_accumulation_steps > 1, "1"),
        "max_grad_norm": (bool(args.max_grad_norm), "0"),
        "fp16": (args.fp16, "false (bf16 works)"),
        # A backward pass that runs out of memory has already moved some of the weights.
        "auto_find_batch_size": (args.auto_find_batch_size, "false"),
    }
    for name, (given, cure) in excluded.items():
        if given:
            raise ValueError(
                f"optim_args: gradient_release=true and --{name} {getattr(args, name)} exclude each other, since the "
                f"gradients are applied and freed within the backward pass. Set --{name} to {cure}."
            )


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _warn_of_default_learning_rate(args: TrainingArguments, advice: str) -> None:
    default = type(args).__dataclass_fields__["learning_rate"].default
    if args.learning_rate == default:
        _warn_once(
            f"learning_rate is {default:g}, the default of {type(args).__name__}, which is meant for AdamW. {advice}"
        )


def _warn_of_orthogonal_rate(args: TrainingArguments, optimizer: SGDSaI) -> None:
    if any(group["update"] == "orthogonal" for group in optimizer.param_groups):  # not on adapters
        _warn_of_default_learning_rate(
            args,
            "From scratch sgd_sai_orthogonal needs a larger one and will hardly learn: try --learning_rate 8e-3, then "
            "half and twice that.",
        )
