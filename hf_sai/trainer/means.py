"""Shows Trainer the means of ``update="averaged"`` when it saves and when it ends; evaluation it does by itself."""

from __future__ import annotations

import logging
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_sai.optim.rules import RULES
from hf_sai.optim.sgd_sai import SGDSaI
from hf_sai.runs.meters import unwrap_optimizer

__all__ = ["show_means_in"]

logger = logging.getLogger(__name__)

_CONSTANT = ("constant", "constant_with_warmup")


def show_means_in(trainer: Trainer) -> None:
    """Let a Trainer save the means, if its optimizer averages by the time; once is enough, again does nothing.

    A checkpoint that is loaded later may say that it does.
    """
    if not isinstance(unwrap_optimizer(trainer.optimizer), SGDSaI):
        return
    if not any(isinstance(callback, _MeansCallback) for callback in trainer.callback_handler.callbacks):
        trainer.add_callback(_MeansCallback())


class _MeansCallback(TrainerCallback):
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
        if _averages(optimizer) and schedule not in _CONSTANT and state.is_world_process_zero:
            logger.warning(
                "lr_scheduler_type is %s, and update='averaged' takes the mean in the place of a decaying learning "
                "rate: use --lr_scheduler_type constant_with_warmup, or --optim sgd_sai_factored with this one.",
                schedule,
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        # The last step, too: what Trainer loads at the end, as its best model, are means already.
        _show(optimizer, _leads_to_saving(control) or state.global_step >= state.max_steps)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        _show(optimizer, _leads_to_saving(control))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        _show(optimizer, _leads_to_saving(control))


def _leads_to_saving(control: TrainerControl) -> bool:
    return control.should_save or control.should_training_stop


def _averages(optimizer: Any) -> bool:
    inner = unwrap_optimizer(optimizer)
    return isinstance(inner, SGDSaI) and any(RULES[group["update"]].averages for group in inner.param_groups)


def _show(optimizer: Any, now: bool) -> None:
    if now and _averages(optimizer):
        unwrap_optimizer(optimizer).eval()
