"""Warns of updates that are too small to train anything, by what the first steps moved, whatever the learning rate."""

from __future__ import annotations

import logging
from typing import Any

from torch.optim import Optimizer

from hf_sai.runs.meters import UpdateMeter

__all__ = ["watch_updates"]

logger = logging.getLogger(__name__)

#: The step that is judged: the first ones measure g-SNR and fill the momentum.
STEP = 5
#: Updates of less than this part of the weights are warned of. AdamW moves weights of size 0.02 so far at 4e-7.
SMALLEST = 2e-5


def watch_updates(optimizer: Optimizer) -> None:
    """Judge the size of an optimizer's updates once, at its fifth step with a learning rate above 0.

    Args:
        optimizer: A torch optimizer. Rates still in warmup are taken for what they grow to (``initial_lr``).
    """
    _Watch(optimizer)


class _Watch:
    def __init__(self, optimizer: Optimizer) -> None:
        self._meter: UpdateMeter | None = UpdateMeter(optimizer)  # None once the updates have been judged
        self._steps = 0
        # After the steps, not around one: with gradient_release the update is over when step() is called. The hook
        # stays: torch goes through its hooks and fails where one takes itself away and another comes after it.
        optimizer.register_step_post_hook(self._after)

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        if self._meter is not None:
            try:
                self._judge(optimizer, self._meter)
            except Exception as error:  # advice never ends a training
                self._meter = None
                logger.debug("The size of the updates was not judged: %s", error)

    def _judge(self, optimizer: Optimizer, meter: UpdateMeter) -> None:
        rates = [(float(group["lr"]), float(group.get("initial_lr", group["lr"]))) for group in optimizer.param_groups]
        now, full = max(rates, default=(0.0, 0.0))
        self._steps += now > 0
        if self._steps == STEP - 1:
            meter.before()
        elif self._steps >= STEP:
            self._meter = None
            meter.after()
            ratio = meter.whole_ratio()
            if ratio is not None and 0 < ratio * full / now < SMALLEST:
                logger.warning(_words(ratio * full / now, full))


def _words(ratio: float, rate: float) -> str:
    return (
        f"An update moves the weights by {ratio:.1e} of their size at learning rate {rate:g}, which will hardly train "
        "anything. SGD-SaI's published rule mostly wants 2.5 to 50 times AdamW's learning rate: try "
        "--learning_rate 1e-2, then a third and three times that; or --optim sgd_sai_factored, which takes AdamW's."
    )
