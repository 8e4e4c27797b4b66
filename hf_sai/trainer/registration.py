"""Makes ``sgd_sai`` and its kin optimizer names of Trainer; the only file that touches its private seams.

It imports nothing of transformers: each part of it is prepared when somebody has imported it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hf_sai.imports import when_imported
from hf_sai.optim.sgd_sai import SGDSaI
from hf_sai.runs.describe import optimizer_line
from hf_sai.runs.meters import unwrap_optimizer
from hf_sai.trainer.building import OPTIMIZER_NAMES, add_new_parameters, optimizer_cls_and_kwargs

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

__all__ = ["OPTIMIZER_NAMES", "register"]

logger = logging.getLogger(__name__)


def register() -> None:
    """Register our names with transformers (>= 4.56 and 5.x). Importing ``hf_sai`` does this; again does nothing.

    They are the keys of :data:`OPTIMIZER_NAMES`. Afterwards ``TrainingArguments(optim="sgd_sai")``,
    ``--optim sgd_sai``, ``set_optimizer`` and every subclass (Seq2SeqTrainingArguments, TRL's configs) take these
    names, and Trainer builds ``SGDSaI`` from named groups. Parts of transformers that are not imported yet are
    prepared when they are.
    """
    for module, prepare, refused in (
        ("training_args", _add_names, "TrainingArguments.__post_init__"),
        ("trainer_optimizer", _enter_table, None),
        ("trainer", _wrap_trainer, "Trainer.__init__"),
        ("modelcard", _wrap_model_card, None),
        ("integrations.deepspeed", _wrap_deepspeed, None),
    ):
        when_imported(f"transformers.{module}", _guarded(prepare, refused))


def _guarded(prepare: Callable[[ModuleType], None], refused: str | None) -> Callable[[ModuleType], None]:
    """A preparation that, where transformers has changed, costs a warning now and an error when a name is used."""

    def call(module: ModuleType) -> None:
        try:
            prepare(module)
        except Exception as error:
            message = (
                f"{module.__name__} is not as hf-sai knows it ({type(error).__name__}: {error}), so that --optim "
                "sgd_sai does not work here. Build the optimizer yourself: "
                "Trainer(..., optimizers=(hf_sai.create_sgd_sai_optimizer(model, lr=1e-2), None))."
            )
            logger.warning(message)
            if refused is not None:
                _refuse_names(module, refused, message)

    return call


def _refuse_names(module: ModuleType, where: str, message: str) -> None:
    """Raise a clear error from a method as soon as one of our names comes to it."""
    owner, method = where.split(".")
    cls = getattr(module, owner, None)
    original = getattr(cls, method, None)
    if original is None:
        return

    @functools.wraps(original)
    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        for candidate in (self, *args, *kwargs.values()):
            name = getattr(candidate, "optim", None)
            if isinstance(name, str) and name in OPTIMIZER_NAMES:
                raise ValueError(message)
        return original(self, *args, **kwargs)

    setattr(cls, method, refuse)


def _add_names(training_args: ModuleType) -> None:
    for name in OPTIMIZER_NAMES:
        if name not in training_args.OptimizerNames._value2member_map_:
            _add_member(training_args.OptimizerNames, name)


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
    # From Python 3.12 on members are attributes of the class, which EnumType lets nobody set.
    type.__setattr__(enum, member._name_, member)


def _enter_table(trainer_optimizer: ModuleType) -> None:
    """Enter the table of optimizers that transformers has from 5.2 on."""
    for name in OPTIMIZER_NAMES:
        trainer_optimizer._OPTIMIZER_HANDLERS[name] = lambda context: optimizer_cls_and_kwargs(
            context.args, context.model
        )


def _wrap_trainer(trainer: ModuleType) -> None:
    """Take our names out of Trainer before it looks at them, and parameters that came later into our optimizer.

    Before transformers 5.2 this is the only seam. From 5.2 on it stands in front of the table, because transformers
    splits ``optim_args`` before any handler runs and fails on a wrong item without naming it.
    """
    cls = trainer.Trainer
    original, create = cls.get_optimizer_cls_and_kwargs, cls.create_optimizer
    if getattr(original, "_hf_sai", False):
        return

    @functools.wraps(original)
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:
        if args.optim in OPTIMIZER_NAMES:
            return optimizer_cls_and_kwargs(args, model)
        return original(args, model)

    @functools.wraps(create)
    def create_optimizer(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        created = self.optimizer is None
        optimizer = create(self, *args, **kwargs)
        if self.args.optim in OPTIMIZER_NAMES:
            add_new_parameters(self, created=created)
        from hf_sai.trainer.means import show_means_in  # which imports transformers

        show_means_in(self)
        return optimizer

    get_optimizer_cls_and_kwargs._hf_sai = True  # type: ignore[attr-defined]
    cls.get_optimizer_cls_and_kwargs = staticmethod(get_optimizer_cls_and_kwargs)
    cls.create_optimizer = create_optimizer


def _wrap_deepspeed(deepspeed: ModuleType) -> None:
    """Refuse a DeepSpeed config with an optimizer of its own: Trainer would train that one, at our learning rate."""
    original = deepspeed.deepspeed_optim_sched
    if getattr(original, "_hf_sai", False):
        return

    @functools.wraps(original)
    def deepspeed_optim_sched(trainer: Trainer, hf_deepspeed_config: Any, *args: Any, **kwargs: Any) -> Any:
        block = hf_deepspeed_config.config.get("optimizer")
        if block is not None and trainer.args.optim in OPTIMIZER_NAMES:
            raise ValueError(
                f"The DeepSpeed config has an optimizer block ({block.get('type', block)}), and --optim "
                f"{getattr(trainer.args.optim, 'value', trainer.args.optim)} was asked for. With such a block Trainer "
                "never asks for any other optimizer: remove it from the config, or the --optim."
            )
        return original(trainer, hf_deepspeed_config, *args, **kwargs)

    deepspeed_optim_sched._hf_sai = True  # type: ignore[attr-defined]
    deepspeed.deepspeed_optim_sched = deepspeed_optim_sched  # type: ignore[attr-defined]


def _wrap_model_card(modelcard: ModuleType) -> None:
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
    modelcard.extract_hyperparameters_from_trainer = extract_hyperparameters_from_trainer  # type: ignore[attr-defined]
