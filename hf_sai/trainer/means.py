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
    """Let a Trainer save the means, if its optimizer averages; once is enough, again does nothing."""
    optimizer: Any = unwrap_optimizer(trainer.optimizer)
    if not isinstance(optimizer, SGDSaI) or not any(
        RULES[group["update"]].averages for group in optimizer.param_groups
    ):
        return
    if not any(isinstance(callback, _MeansCallback) for callback in trainer.callback_handler.callbacks):
        trainer.add_callback(_MeansCallback())


class _MeansCallback(TrainerCallback):
    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
        if schedule not in _CONSTANT and state.is_world_process_zero:
            logger.warning(
                "lr_scheduler_type is %s, and update='averaged' takes the mean in the place of a decaying learning "
                "rate: use --lr_scheduler_type constant_with_warmup, or --optim sgd_sai_factored with this one.",
                schedule,
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The last step, too: what Trainer loads at the end, as its best model, are means already.
        if control.should_save or control.should_training_stop or state.global_step >= state.max_steps:
            kwargs["optimizer"].eval()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save or control.should_training_stop:
            kwargs["optimizer"].eval()
