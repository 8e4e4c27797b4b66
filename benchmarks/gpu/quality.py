"""Part 4: GPT-2 small (124 million parameters) on real text, optimizer by optimizer, for the same number of steps.

    python -m benchmarks.gpu.quality --output runs/gpu --seconds 300

Weights in float32 under bfloat16 autocast, torch.compile, sequences of 1,024 tokens from the sources of the installed
packages (text.py). First whole training steps of half a million tokens are timed, optimizers in turn. Then each one's
learning rate is searched in short runs, and its best one is used for a long run, whose length follows from the time.
All runs start at the same weights and see the same batches. The rate rises for a tenth of a run and falls to zero; that
of an optimizer which averages its weights stays, and its losses are those of the mean.
"""

from __future__ import annotations

import functools
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.gpu import text
from benchmarks.gpu.contenders import ADAMW, MUON, RIVALS, Contender, sai
from benchmarks.gpu.models import causal_lm
from benchmarks.gpu.part import Part
from hf_sai.runs.meters import state_bytes
from recipes.common.lr_search import Results, search

#: GPT-2's 50,257, rounded up to what matrix units like.
VOCABULARY = 50304
TOKENS_PER_STEP = 2**19
RISE = 0.1
ROUNDS = 3
#: Of an optimizer's time, that of one short run, of which at most four are made, and that of its long run.
SHORT, LONG = 0.09, 0.55
#: So many optimizers share the time.
AT_LEAST = 4
#: What one of them gets where nobody ends the part.
SECONDS_EACH = 90.0


@dataclass(frozen=True)
class Trained:
    """An optimizer with the rates to begin the search at.

    Attributes:
        contender: It.
        grid: Learning rates.
        weight_decay: Such that a step's decay is alike for all at their usual rates.
        averages: It is evaluated at the mean of its weights, which takes the place of a falling rate.
    """

    contender: Contender
    grid: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    weight_decay: float = 0.1
    averages: bool = False


def trained() -> list[Trained]:
    """In the order of their worth; those after the fourth are for what time remains."""
    return [
        Trained(RIVALS[ADAMW]),
        Trained(sai("factored", momentum=0.8)),
        Trained(sai("orthogonal")),
        Trained(sai("published"), (4e-3, 1.2e-2, 3.6e-2), 0.01),
        Trained(sai("averaged", momentum=0.8), averages=True),
        Trained(RIVALS[MUON]),
    ]


class Task:
    """The model, its batches and its loss.

    Args:
        part: This part.
    """

    def __init__(self, part: Part) -> None:
        self.device = part.device
        settings = text.TINY if part.rehearse else text.FULL
        self.batch, self.length = (4, 32) if part.rehearse else (16, 1024)
        found = text.tokens(settings)
        self.facts = found.facts
        self._train, self._validation = (t.to(self.device.torch) for t in (found.train, found.validation))
        torch.manual_seed(0)
        vocabulary = 384 if part.rehearse else VOCABULARY
        self.model = causal_lm(
            "gpt2", self.device.torch, tiny=part.rehearse, attn_implementation="sdpa", vocab_size=vocabulary
        ).train()
        self._start = [p.detach().clone() for p in self.model.parameters()]
        windows = (len(self._train) - 1) // self.length
        self.validation_batches = (len(self._validation) - 1) // (self.length * self.batch)
        self._order = torch.randperm(windows, generator=torch.Generator().manual_seed(0)).to(self.device.torch)
        self._loss = torch.compile(self._plain_loss, backend="eager" if part.rehearse else "inductor")
        self.compiled = self._try_compiled()

    def restart(self) -> None:
        """The weights that every run starts at."""
        with torch.no_grad():
            for p, start in zip(self.model.parameters(), self._start, strict=True):
                p.copy_(start)
                p.grad = None

    def loss(self, step: int) -> Tensor:
        """Of a step's batch; after all windows have been seen, from the first again."""
        places = (torch.arange(self.batch, device=self._order.device) + step * self.batch) % len(self._order)
        return self._loss(*self._windows(self._train, self._order[places]))

    def validation_loss(self, batches: int) -> float:
        """Of the first batches of the validation text. Gradients stay enabled, so that nothing is compiled anew."""
        losses = []
        for index in range(batches):
            windows = torch.arange(self.batch, device=self._order.device) + index * self.batch
            losses.append(self._loss(*self._windows(self._validation, windows)).detach())
        return torch.stack(losses).mean().item()

    def _windows(self, of: Tensor, windows: Tensor) -> tuple[Tensor, Tensor]:
        places = windows.unsqueeze(1) * self.length + torch.arange(self.length + 1, device=windows.device)
        taken = of[places].long()
        return taken[:, :-1].contiguous(), taken[:, 1:].contiguous()

    def _plain_loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(self.device.torch.type, torch.bfloat16):
            logits = self.model(input_ids=ids).logits
        return cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def _try_compiled(self) -> str:
        """How the loss is computed; without torch.compile where that fails, which the results then say."""
        try:
            self.loss(0).backward()
        except Exception as error:
            self._loss = self._plain_loss
            self.loss(0).backward()
            return f"no: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        finally:
            self.restart()
        return "yes"


def whole_steps(part: Part, task: Task, found: dict[str, Any]) -> None:
    """Training steps of half a million tokens, optimizers in turn on the same model."""
    pieces = 2 if part.rehearse else TOKENS_PER_STEP // (task.batch * task.length)
    optimizers = {one.contender.name: one.contender.build(task.model, 1e-6, 0.0) for one in trained()}
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    of_optimizer: dict[str, list[float]] = {name: [] for name in optimizers}

    def backward(count: int) -> None:
        for piece in range(count):
            task.loss(piece).backward()

    for index in range(1 + (2 if part.rehearse else ROUNDS)):
        for name, optimizer in optimizers.items():
            task.device.wait()
            count = pieces if index else 1  # the first step measures and allocates, and is not timed
            whole = task.device.timed(functools.partial(backward, count))
            own = task.device.timed(optimizer.step)
            task.device.wait()
            for p in task.model.parameters():
                p.grad = None
            if index:
                of_optimizer[name].append(own.seconds())
                seconds[name].append(whole.seconds() + of_optimizer[name][-1])
    baseline = statistics.median(seconds[ADAMW])
    found |= {
        "tokens": pieces * task.batch * task.length,
        "rows": [
            {
                "optimizer": name,
                "seconds": statistics.median(seconds[name]),
                "optimizer_seconds": statistics.median(of_optimizer[name]),
                "ratio": statistics.median(seconds[name]) / baseline,
            }
            for name in optimizers
        ],
    }
    part.save()


def train(
    task: Task,
    one: Trained,
    lr: float,
    steps: int,
    seconds: float,
    evaluations: int,
    told: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """One run.

    Args:
        task: What is trained.
        one: With which optimizer.
        lr: Its highest learning rate.
        steps: How many, unless the time is over before.
        seconds: After which it ends.
        evaluations: How often it is evaluated, evenly, the last time at its end.
        told: Called after each evaluation.
    """
    task.restart()
    optimizer = one.contender.build(task.model, lr, one.weight_decay)
    rates = [group["lr"] for group in optimizer.param_groups]
    points: list[dict[str, float]] = []
    run = {"learning_rate": lr, "steps": 0, "points": points}
    spent, since, losses = 0.0, time.perf_counter(), []
    at = {round(steps * (index + 1) / evaluations) for index in range(evaluations)}
    for step in range(1, steps + 1):
        falling = 1.0 if one.averages else (steps - step + 1) / ((1 - RISE) * steps)
        share = min(step / (RISE * steps), falling, 1.0)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share
        loss = task.loss(step - 1)
        loss.backward()
        nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        over = step % 20 == 0 and spent + time.perf_counter() - since > seconds
        if step in at or over:
            task.device.wait()
            spent += time.perf_counter() - since
            last = step == steps or over
            if one.averages:
                optimizer.eval()
            batches = min(40 if last else 8, task.validation_batches)
            evaluation = task.validation_loss(batches)
            if one.averages:
                optimizer.train()
            points.append(
                {
                    "step": step,
                    "seconds": spent,
                    "train_loss": torch.stack(losses).mean().item(),
                    "eval_loss": evaluation,
                    "eval_batches": batches,
                }
            )
            run |= {"steps": step, "state_bytes": state_bytes(optimizer)}
            told()
            if over or not math.isfinite(evaluation):
                break
            losses, since = [], time.perf_counter()
    return {**run, "eval_loss": points[-1]["eval_loss"], "train_seconds": spent, "ended_early": run["steps"] < steps}


def seconds_of_a_step(task: Task) -> float:
    """Of a training run with AdamW."""
    steps = 12
    run = train(task, trained()[0], 1e-6, steps, math.inf, 2)
    half, whole = run["points"]
    return (whole["seconds"] - half["seconds"]) / (steps / 2)


def compare(part: Part, task: Task, one: Trained, short: int, long: int, most: float) -> None:
    """One optimizer's search and long run.

    Args:
        part: This part.
        task: What is trained.
        one: With which optimizer.
        short: Steps of a run of the search.
        long: Steps of the run with the best rate.
        most: Seconds, after which runs end early.
    """
    name = one.contender.name
    found: dict[str, Any] = {"optimizer": name, "weight_decay": one.weight_decay, "short_steps": short, "search": []}
    part.results["runs"].append(found)

    def train_once(lr: float, seed: int) -> dict[str, Any]:
        run = train(task, one, lr, short, SHORT * most, 1)
        found["search"].append({key: run[key] for key in ("learning_rate", "steps", "eval_loss")})
        part.save()
        return run

    with tempfile.TemporaryDirectory() as folder:
        results = Results(f"{folder}/search.json", {"optimizer": name})
        search(name, train_once, one.grid, results, growth=1, factor=one.grid[1] / one.grid[0], seeds=0)
        best = results.best(name)
    rates = [run["learning_rate"] for run in found["search"]]
    found |= {"learning_rate": best, "at_the_end_of_the_grid": best in (min(rates), max(rates))}
    found["long"] = train(task, one, best, long, LONG * most, 2 if part.rehearse else 10, part.save)


def main() -> None:
    with Part("quality", __doc__) as part:
        part.results |= {"whole_steps": {}, "runs": []}
        task = Task(part)
        part.results["task"] = {
            "text": task.facts,
            "parameters": sum(p.numel() for p in task.model.parameters()),
            "tokens_a_step": task.batch * task.length,
            "compiled": task.compiled,
        }
        part.save()
        with part.attempt("whole training steps"):
            whole_steps(part, task, part.results["whole_steps"])
        step_seconds = seconds_of_a_step(task)
        part.results["task"]["step_seconds"] = step_seconds
        each = min(SECONDS_EACH, part.seconds_left() / AT_LEAST)
        short, long = (5, 10) if part.rehearse else (max(20, int(of * each / step_seconds)) for of in (SHORT, LONG))
        for one in trained():
            with part.attempt(one.contender.name):
                if part.seconds_left() < 0.7 * each:
                    raise TimeoutError(f"{part.seconds_left():.0f} seconds were left of {each:.0f} that it takes")
                compare(part, task, one, short, long, math.inf if part.rehearse else 1.4 * each)


if __name__ == "__main__":
    main()
