"""Learning-rate range test: some steps of a Trainer with a rate that grows, after which nothing of them remains."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_sai.trainer.building import without_advice

__all__ = ["RangeTest", "check_settings", "range_test"]

#: Weight of the past in the smoothed loss.
SMOOTHING = 0.9
#: The test ends where the smoothed loss exceeds the loss at the start so many times.
DIVERGED_AT = 1.5
#: How far the suggestion stays below the rate with the smallest smoothed loss.
SAFETY = 3.0
#: A smoothed loss that has not fallen by this part of the loss at the start says nothing.
LEAST_FALL = 0.01
#: Of what the smoothed loss has fallen, it must rise again by this part before there is a suggestion.
RISEN_AGAIN = 0.5
#: So many losses make the loss at the start.
START_STEPS = 5

# What Trainer's own run would otherwise do beside training.
_QUIET = {
    "eval_on_start": False,
    "load_best_model_at_end": False,
    "logging_nan_inf_filter": False,
    "push_to_hub": False,
    "auto_find_batch_size": False,
}


@dataclass(frozen=True)
class RangeTest:
    """What a range test found.

    Attributes:
        learning_rates: Rate of each step, growing.
        losses: Training loss of each step, before its update; the last one may be infinite or NaN.
    """

    learning_rates: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def smoothed(self) -> tuple[float, ...]:
        """The losses as exponential averages over the steps so far, without a bias to the first."""
        average, values = 0.0, []
        for step, loss in enumerate(self.losses, start=1):
            average = SMOOTHING * average + (1 - SMOOTHING) * loss
            values.append(average / (1 - SMOOTHING**step))
        return tuple(values)

    @property
    def start(self) -> float:
        """The loss before anything was learned: the mean of the first five."""
        first = self.losses[:START_STEPS]
        return sum(first) / len(first)

    @property
    def diverged(self) -> bool:
        """Whether the loss went far above where it started."""
        last = self.smoothed[-1]
        return not last <= DIVERGED_AT * self.start  # also NaN

    @property
    def fell(self) -> bool:
        """Whether the smoothed loss went below where it started, by enough to say something."""
        return self._smallest[0] < (1 - LEAST_FALL) * self.start

    @property
    def suggestion(self) -> float | None:
        """A learning rate to start from: a third of the one with the smallest smoothed loss.

        None if the loss never fell, or if it has not risen again by the last rate: then the test has not come to what
        is too large, and where its smallest loss happens to lie says nothing.
        """
        smallest, index = self._smallest
        last = self.smoothed[-1]
        if not self.fell or last < smallest + RISEN_AGAIN * (self.start - smallest):  # NaN has risen
            return None
        return self.learning_rates[index] / SAFETY

    @property
    def _smallest(self) -> tuple[float, int]:
        """The smallest smoothed loss and its step, without the first five: one easy batch there would pass for it."""
        finite = [(loss, index) for index, loss in enumerate(self.smoothed) if math.isfinite(loss)]
        return min(finite[START_STEPS:], default=(math.inf, 0))


def range_test(
    trainer: Trainer, *, smallest: float = 1e-5, largest: float = 10.0, steps: int = 100, progress: bool = True
) -> RangeTest:
    """Train some steps with a learning rate that grows from one to the next, then put everything back.

    The steps are the Trainer's own: its batches, accumulation, clipping, precision and optimizer; groups keep the
    ratios of their rates. Its callbacks are not called, nothing is logged, evaluated or saved. Afterwards the model
    (weights, buffers, gradients, modes), an optimizer and a scheduler that the Trainer was given, its state and all
    random number generators are as before, so that ``trainer.train()`` does exactly what it would have done without.

    Args:
        trainer: Any Trainer, TRL's too, alone or under DDP; one whose training has not begun, or is between two calls.
        smallest: Rate of the first step.
        largest: Rate of the last step, unless the loss diverges earlier: then the test ends.
        steps: How many steps; each costs as much as one of the training.
        progress: Whether to show a progress bar.

    Returns:
        Rates and losses, with the suggestion.

    Raises:
        ValueError: A rate or the number of steps is impossible, or the model is sharded (FSDP, DeepSpeed), so that its
            weights could not be put back.

    Example:
        >>> test = range_test(trainer, steps=50)  # doctest: +SKIP
        >>> trainer.args.learning_rate = test.suggestion  # doctest: +SKIP
    """
    check_settings(smallest, largest, steps)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            "a range test cannot put the weights of a sharded model back; run it without FSDP and DeepSpeed."
        )
    # Not by their quotient, which may be too large for a float.
    rates = [smallest ** (1 - step / (steps - 1)) * largest ** (step / (steps - 1)) for step in range(steps)]
    with (
        tqdm(total=steps, desc="learning rates", unit="step", disable=not progress) as bar,
        _put_back(trainer),
        without_advice(),
    ):
        tester = _Tester(rates, bar)
        _prepare(trainer, tester, rates)
        trainer.train()
    return RangeTest(tuple(rates[: len(tester.losses)]), tuple(tester.losses))


def check_settings(smallest: float, largest: float, steps: int) -> None:
    """Raise ValueError for rates or a number of steps that :func:`range_test` cannot do anything with."""
    are_numbers = all(isinstance(rate, int | float) for rate in (smallest, largest))
    if not (are_numbers and 0 < smallest < largest < math.inf):
        raise ValueError(
            f"smallest is {smallest} and largest {largest}; they must be finite numbers above 0, the first the smaller."
        )
    if not isinstance(steps, int) or steps < 2 * START_STEPS:
        raise ValueError(f"steps is {steps}; it must be a whole number, at least {2 * START_STEPS}.")


class _Tester(TrainerCallback):
    """Collects the loss of each step, and stops when it diverges."""

    def __init__(self, rates: list[float], bar: Any) -> None:
        self.rates, self.bar = rates, bar
        self.losses: list[float] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:  # the summary at the end
            return
        self.losses.append(float(logs["loss"]))
        self.bar.set_postfix(lr=f"{self.rates[len(self.losses) - 1]:.1e}", loss=f"{self.losses[-1]:.4g}")
        self.bar.update()
        enough = len(self.losses) == len(self.rates)
        if enough or RangeTest(tuple(self.rates), tuple(self.losses)).diverged:
            control.should_training_stop = True


def _prepare(trainer: Trainer, tester: _Tester, rates: list[float]) -> None:
    """Set a Trainer up for the test; `_put_back` undoes it."""
    trainer.args = copy.copy(trainer.args)
    for key, value in _QUIET.items():
        if hasattr(trainer.args, key):
            setattr(trainer.args, key, value)
    trainer.args.max_steps = len(rates)
    trainer.callback_handler.callbacks = [tester]
    trainer.lr_scheduler = None

    def create_scheduler(num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        optimizer = optimizer or trainer.optimizer
        assert optimizer is not None
        if trainer.lr_scheduler is None:
            # Groups may have rates of their own: the largest follows the test, unless Trainer has made them all.
            base = max(float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups)
            base = trainer.args.learning_rate if made_here else base
            if not base > 0:
                raise ValueError("the learning rate is 0, of which no multiple can be tried; give any other.")
            trainer.lr_scheduler = LambdaLR(optimizer, lambda step: rates[min(step, len(rates) - 1)] / base)
        return trainer.lr_scheduler

    made_here = trainer.optimizer is None
    trainer.create_scheduler = create_scheduler  # type: ignore[method-assign]


@contextlib.contextmanager
def _put_back(trainer: Trainer) -> Iterator[None]:
    """Restore a Trainer, its model, optimizer and the random number generators afterwards, also after an error."""
    attributes = dict(vars(trainer))
    callbacks = trainer.callback_handler.callbacks
    control = copy.copy(trainer.control)
    optimizer = trainer.optimizer
    saved_optimizer = {} if optimizer is None else copy.deepcopy(optimizer.state_dict())
    counters = {} if optimizer is None else {key: v for key, v in vars(optimizer).items() if type(v) is int}
    assert trainer.model is not None
    model = _ModelState(trainer.model)
    generators = _random_states()
    try:
        yield
    finally:
        vars(trainer).clear()
        vars(trainer).update(attributes)
        trainer.callback_handler.callbacks = callbacks
        vars(trainer.control).update(vars(control))
        trainer.accelerator.free_memory()
        model.restore()
        if optimizer is not None:
            optimizer.load_state_dict(saved_optimizer)
            vars(optimizer).update(counters)
        gc.collect()  # the test's optimizer, whose hooks (gradient_release) live as long as it does
        _set_random_states(generators)


class _ModelState:
    """What training changes of a model: trainable weights, buffers, gradients and modes."""

    def __init__(self, model: torch.nn.Module) -> None:
        tensors = [p for p in model.parameters() if p.requires_grad] + list(model.buffers())
        self.values = [(tensor, tensor.detach().clone()) for tensor in tensors]
        self.gradients = [(p, p.grad) for p in model.parameters()]
        self.modes = [(module, module.training) for module in model.modules()]

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, value in self.values:
            tensor.copy_(value)
        for p, gradient in self.gradients:
            p.grad = gradient
        for module, training in self.modes:
            module.training = training


def _random_states() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return random.getstate(), numpy.random.get_state(), torch.get_rng_state(), cuda


def _set_random_states(states: tuple[Any, ...]) -> None:
    python, arrays, cpu, cuda = states
    random.setstate(python)
    numpy.random.set_state(arrays)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
