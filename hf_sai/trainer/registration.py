"""Makes ``sgd_sai`` and its low-bit kin optimizer names of Trainer; the only file that touches its private seams."""

from __future__ import annotations

import functools
import logging
from typing import Any

from transformers import Trainer, TrainingArguments, modelcard
from transformers.training_args import OptimizerNames

from hf_sai.groups.param_groups import param_groups
from hf_sai.optim.sgd_sai import SGDSaI
from hf_sai.runs.describe import optimizer_line
from hf_sai.runs.meters import unwrap_optimizer
from hf_sai.trainer.optim_args import parse_optim_args

__all__ = ["OPTIMIZER_NAMES", "add_scalars_to_trainer_logs", "register"]

logger = logging.getLogger(__name__)

#: Name of an optimizer for Trainer -> the options of ``SGDSaI`` that it stands for.
OPTIMIZER_NAMES: dict[str, dict[str, Any]] = {
    "sgd_sai": {},
    "sgd_sai_8bit": {"momentum_dtype": "8bit"},
    "sgd_sai_4bit": {"momentum_dtype": "4bit"},
}


def register() -> None:
    """Register our names with transformers (>= 4.56 and 5.x). Importing ``hf_sai`` does this; again does nothing.

    They are ``sgd_sai``, and ``sgd_sai_8bit`` and ``sgd_sai_4bit`` for a quantised momentum. Afterwards
    ``TrainingArguments(optim="sgd_sai")``, ``--optim sgd_sai``, ``set_optimizer`` and every subclass
    (Seq2SeqTrainingArguments, TRL's configs) take these names, and Trainer builds ``SGDSaI`` from named groups.
    """
    for name in OPTIMIZER_NAMES:
        if name not in OptimizerNames._value2member_map_:
            _add_member(OptimizerNames, name)
    _register_handler()
    _wrap_trainer()
    _wrap_model_card()


def add_scalars_to_trainer_logs() -> None:
    """Let callbacks that have a ``scalars()`` add to Trainer's training logs; again does nothing.

    A callback cannot do it by itself: those that write to ``report_to`` come before it and have no word of it.
    """
    original = Trainer.log
    if getattr(original, "_hf_sai", False):
        return

    @functools.wraps(original)
    def log(self: Trainer, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:  # a training log, no evaluation and no summary
            for callback in self.callback_handler.callbacks:
                if hasattr(callback, "scalars"):
                    logs.update(callback.scalars())
        original(self, logs, *args, **kwargs)

    log._hf_sai = True  # type: ignore[attr-defined]
    Trainer.log = log  # type: ignore[method-assign]


def optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[type[SGDSaI], dict[str, Any]]:
    """What Trainer needs to build the optimizer: its class and its keyword arguments, parameter groups included.

    Args:
        args: ``learning_rate``, ``weight_decay`` and ``optim_args`` (see :func:`parse_optim_args`) are read.
        model: The model to train. Without one the caller groups the parameters.

    Returns:
        ``SGDSaI`` and its arguments.

    Raises:
        ValueError: ``optim_args`` is wrong, or needs a model to group.
    """
    options = parse_optim_args(args.optim_args)
    name = str(getattr(args.optim, "value", args.optim))
    implied = OPTIMIZER_NAMES[name]
    for key in implied.keys() & options.keys():
        raise ValueError(f"optim_args: {key}={options[key]} contradicts --optim {name}; use --optim sgd_sai.")
    options |= implied
    grouping = {key: options.pop(key) for key in ("lr_ratios", "freeze") if key in options}
    if options.get("gradient_release"):
        _refuse_what_excludes_gradient_release(args)
    if not options.get("normalize_gradient"):
        _warn_of_default_learning_rate(args)
    kwargs = {"lr": args.learning_rate, "weight_decay": args.weight_decay, **options}
    if model is not None:
        kwargs["params"] = param_groups(model, lr=args.learning_rate, weight_decay=args.weight_decay, **grouping)
    elif grouping:
        raise ValueError(f"optim_args {', '.join(grouping)} need the model, but get_optimizer_cls_and_kwargs got none.")
    return SGDSaI, kwargs


def _add_member(enum: Any, value: str) -> None:
    """Add a member to a closed string enum, so that iterating it (as HfArgumentParser does) shows the new name."""
    member = str.__new__(enum, value)
    member._name_ = value.upper()
    member._value_ = value
    member._sort_order_ = len(enum._member_names_)
    member.__objclass__ = enum
    # A pickled TrainingArguments must load where hf_sai is not imported, and in spawned workers: pickle a plain string.
    member.__reduce_ex__ = lambda protocol: (str, (value,))
    enum._member_names_.append(member._name_)
    enum._member_map_[member._name_] = member
    enum._value2member_map_[value] = member


def _register_handler() -> None:
    """Enter the table of optimizers that transformers has from 5.2 on."""
    try:
        from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
    except ImportError:
        return
    for name in OPTIMIZER_NAMES:
        _OPTIMIZER_HANDLERS[name] = lambda context: optimizer_cls_and_kwargs(context.args, context.model)


def _wrap_trainer() -> None:
    """Take our names out of ``Trainer.get_optimizer_cls_and_kwargs`` before it is looked at there.

    Before transformers 5.2 this is the only seam. From 5.2 on it stands in front of the table, because transformers
    splits ``optim_args`` before any handler runs and fails on a wrong item without naming it.
    """
    original = Trainer.get_optimizer_cls_and_kwargs
    if getattr(original, "_hf_sai", False):
        return

    @functools.wraps(original)
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:
        if args.optim in OPTIMIZER_NAMES:
            return optimizer_cls_and_kwargs(args, model)
        return original(args, model)

    get_optimizer_cls_and_kwargs._hf_sai = True  # type: ignore[attr-defined]
    Trainer.get_optimizer_cls_and_kwargs = staticmethod(get_optimizer_cls_and_kwargs)  # type: ignore[method-assign]


def _wrap_model_card() -> None:
    """Give Trainer's automatic model card the optimizer as it was: by itself it knows ``optim_args`` and no more."""
    original = modelcard.extract_hyperparameters_from_trainer
    if getattr(original, "_hf_sai", False):
        return

    @functools.wraps(original)
    def extract_hyperparameters_from_trainer(trainer: Trainer) -> dict[str, Any]:
        hyperparameters = original(trainer)
        optimizer = unwrap_optimizer(trainer.optimizer)
        if isinstance(optimizer, SGDSaI):
            hyperparameters["optimizer"] = optimizer_line(optimizer, max_grad_norm=trainer.args.max_grad_norm)
        return hyperparameters

    extract_hyperparameters_from_trainer._hf_sai = True  # type: ignore[attr-defined]
    modelcard.extract_hyperparameters_from_trainer = extract_hyperparameters_from_trainer


def _refuse_what_excludes_gradient_release(args: TrainingArguments) -> None:
    excluded = {
        "gradient_accumulation_steps": (args.gradient_accumulation_steps > 1, "1"),
        "max_grad_norm": (bool(args.max_grad_norm), "0"),
        "fp16": (args.fp16, "false (bf16 works)"),
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


def _warn_of_default_learning_rate(args: TrainingArguments) -> None:
    default = type(args).__dataclass_fields__["learning_rate"].default
    if args.learning_rate == default:
        _warn_once(
            f"learning_rate is {default:g}, the default of {type(args).__name__}, which is meant for AdamW. SGD-SaI "
            "needs a larger one and will hardly learn: try --learning_rate 1e-2, then a third and three times that."
        )
