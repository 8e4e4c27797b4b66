"""Writes a run's record while it trains: for transformers' Trainer through a callback, for any other loop by hand."""

from __future__ import annotations

import contextlib
import datetime
import functools
import logging
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from hf_sai.runs.describe import describe_gsnr, describe_model, describe_optimizer, optimizer_scalars
from hf_sai.runs.environment import command_line, hardware, is_main_process, short_path, versions
from hf_sai.runs.meters import Stopwatch, UpdateMeter, unwrap_optimizer
from hf_sai.runs.record import RunRecord, first_problem, to_json

__all__ = ["RunRecorder"]

logger = logging.getLogger(__name__)

Method = TypeVar("Method", bound=Callable[..., Any])


def _never_ends_training(method: Method) -> Method:
    """What fails in a method costs a warning, once, and a part of the record, never the training."""

    @functools.wraps(method)
    def guarded(self: RunRecorder, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return None
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            words = (method.__name__, type(error).__name__, error)
            level = logging.DEBUG if method in self._failed else logging.WARNING
            logger.log(level, "The run record is incomplete (%s: %s: %s). Training goes on.", *words)
            logger.debug("Where it failed:", exc_info=True)
            self._failed.add(method)
            return None

    return guarded  # type: ignore[return-value]


class RunRecorder:
    """Keeps a :class:`RunRecord` up to date and on disk, for at most ``budget`` of the training time.

    In a loop of one's own (plain PyTorch or Accelerate)::

        recorder = RunRecorder("out", data=[{"name": "my/data", "license": "cc-by-4.0"}])
        recorder.start(model, optimizer, settings=vars(args))           # after accelerator.prepare
        for step, batch in enumerate(loader, start=1):
            with recorder.step():
                accelerator.backward(model(**batch).loss)
                with recorder.update(measure=step % 10 == 0):
                    optimizer.step()
                optimizer.zero_grad()
            if step % 10 == 0:
                accelerator.log(recorder.log(step, {"loss": loss.item()}), step=step)
        recorder.finish({"eval_loss": evaluate()})

    Every process may call it; only the main one measures and writes. After a resume call ``start`` with the step that
    training goes on from. A disk that is full or read-only, or a model that cannot be described, costs a warning, never
    the training.

    Args:
        directory: Where ``run_record.json`` goes.
        name: The run's name; default: the directory's.
        data: One dict per data source, with ``name``, ``role`` (train, validation), ``license``, and ``id`` where it
            is on the Hub.
        card: What only you know, for the model card: ``description``, ``limits`` (texts), and metadata such as
            ``license``, ``language``, ``base_model``.
        budget: Largest part of the step time that measuring and writing may take (0 to 1). Measurements and
            intermediate writes that would exceed it are left out; 1 leaves out nothing. What is asked for expressly
            (``save``, ``finish``) is always written, and counted.
        secrets: Strings that must not get into the record, such as an access token.
        main_process: Whether this process writes. Default: rank 0.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        name: str | None = None,
        data: Iterable[Mapping[str, Any]] = (),
        card: Mapping[str, Any] | None = None,
        budget: float = 0.01,
        secrets: Iterable[str] = (),
        main_process: bool | None = None,
    ) -> None:
        if not 0.0 <= budget <= 1.0:
            raise ValueError(f"budget is {budget!r}, but must be between 0 and 1: the part of the time to spend")
        self.directory = Path(directory)
        self.record = RunRecord(data=_entries("data", data))
        self.active = is_main_process() if main_process is None else main_process
        self._name = str(name or self.directory.resolve().name)
        self._card = to_json(dict(card or {}))
        self._budget = budget
        self._secrets = tuple(secrets)
        self._optimizer: Any = None
        self._model: nn.Module | None = None
        self._spent = self._save_cost = self._measure_cost = 0.0
        self._timed_steps = 0
        self._warned = False
        self._failed: set[Callable[..., Any]] = set()
        self._before: dict[str, float] = {"step_seconds": 0.0, "optimizer_seconds": 0.0, "record_seconds": 0.0}

    @_never_ends_training
    def start(
        self, model: nn.Module, optimizer: Any, *, step: int = 0, settings: Mapping[str, Any] | None = None
    ) -> None:
        """Describe the run and write the first record.

        Args:
            model: The model, wrapped or not.
            optimizer: Its optimizer, wrapped or not.
            step: The step training goes on from; above 0 the directory's record, if any, is continued: entries
                up to that step stay, later ones are about to be made again.
            settings: Training arguments.
        """
        if self._optimizer is not None and step == 0:  # trained again from the start
            self.record = RunRecord(data=self.record.data)
        self._model, self._optimizer = model, unwrap_optimizer(optimizer)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._step_watch, self._update_watch = Stopwatch(device), Stopwatch(device)
        self._meter = UpdateMeter(self._optimizer)
        self._rates: list[Any] | None = None
        self._spent, self._timed_steps = 0.0, 0
        if step > 0:
            self._continue(step)
        self._describe(model, step, settings or {})
        self.save()
        self._spent = 0.0  # what it takes to begin is no cost of a step

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Times one training step (forward, backward and the rest)."""
        self.step_begins()
        yield
        self.step_ends()

    @contextlib.contextmanager
    def update(self, *, measure: bool = False) -> Iterator[None]:
        """Times the optimizer's step, and with ``measure`` sees how far it moves each group's weights."""
        self.update_begins(measure=measure)
        yield
        self.update_ends()

    @_never_ends_training
    def step_begins(self) -> None:
        """As ``step()``, where a loop offers events instead of a block."""
        if self._optimizer is None:
            raise RuntimeError("start(model, optimizer) comes first")
        self._step_watch.start()

    @_never_ends_training
    def step_ends(self, step: int | None = None) -> None:
        """The end of ``step_begins``; ``step`` is the number of steps done, where nobody logs it."""
        if self._optimizer is None:
            return
        self._step_watch.stop()
        self._timed_steps += 1
        if step is not None:
            self.record.run["steps"] = max(step, self.record.run.get("steps", 0))

    @_never_ends_training
    def update_begins(self, *, measure: bool = False) -> None:
        """As ``update()``."""
        if self._optimizer is None:
            return
        if measure and self._affordable(self._measure_cost):
            with self._spending():
                self._meter.before()
        self._update_watch.start()

    @_never_ends_training
    def update_ends(self) -> None:
        """The end of ``update_begins``."""
        if self._optimizer is None:
            return
        self._update_watch.stop()
        with self._spending() as spent:
            # Before a scheduler sets those of the next step. A rate that is a tensor is set in place.
            rates = (group["lr"] for group in self._optimizer.param_groups)
            self._rates = [rate.clone() if isinstance(rate, torch.Tensor) else rate for rate in rates]
            self._meter.after()
        self._measure_cost = max(self._measure_cost, 2 * spent[0])

    def log(self, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Add an entry to the history, and write the record if the budget allows.

        Args:
            step: The number of optimizer steps done.
            values: Such as ``{"loss": 2.5}`` or ``{"eval_loss": 2.4}``.

        Returns:
            ``values`` with :meth:`scalars` added, for a tracker.
        """
        if not self.active:
            return dict(values)
        entry = {**values, **(self.scalars() if self._optimizer is not None else {})}
        self.append(step, entry)
        return entry

    @_never_ends_training
    def append(self, step: int, values: Mapping[str, Any]) -> None:
        """Add an entry to the history as it is, and write the record if the budget allows."""
        step = int(operator.index(step))  # also numpy's and torch's integers, which JSON does not know
        with self._spending():
            self.record.history += _entries("history", [{**values, "step": step}])
        if self._optimizer is not None:
            self.record.run["steps"] = max(step, self.record.run.get("steps", 0))
            if self.record.run.get("status") == "finished" or self._affordable(self._save_cost):
                self.save()

    def scalars(self) -> dict[str, float]:
        """What to show in a tracker beside the loss, by names whose alphabetical order is the order to read them in.

        Returns:
            ``sai/gsnr_over_sqrt_n/ROLE``: the median of the role's tensors; ``sai/gsnr_unmeasured``: parameters without
            g-SNR, which do not train yet; ``sai/lr/ROLE``: the effective learning rate of the last step, the group's
            rate times the mean scale of its elements; ``sai/update_ratio/ROLE``: norm of the update over norm of the
            weights in the last measured step; ``sai/wall_time/optimizer`` and ``sai/wall_time/record``: the part of
            the step time so far that the optimizer and this recorder took. Other optimizers have no g-SNR, and
            their groups' own rates.
        """
        return (self._scalars() if self._optimizer is not None else None) or {}

    @_never_ends_training
    def _scalars(self) -> dict[str, float]:
        with self._spending():
            found = dict(optimizer_scalars(self._optimizer, self._rates))
            ratios = self._meter.ratios() or {}
            found.update({f"sai/update_ratio/{name}": ratio for name, ratio in ratios.items()})
            elapsed = self._step_watch.seconds()
            updating = self._update_watch.seconds()
        if elapsed:
            found["sai/wall_time/optimizer"] = updating / elapsed
            found["sai/wall_time/record"] = self._spent / elapsed
        return found

    def add(
        self,
        *,
        results: Mapping[str, Any] | None = None,
        samples: Iterable[Mapping[str, Any]] = (),
        images: Iterable[Mapping[str, Any]] = (),
        data: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        """Add final figures, generated samples (``title``, ``text``), pictures (``title``, ``file``), data sources."""
        self._add(results or {}, samples, images, data)
        if self._optimizer is not None:
            self.save()

    @_never_ends_training
    def _add(
        self,
        results: Mapping[str, Any],
        samples: Iterable[Mapping[str, Any]] = (),
        images: Iterable[Mapping[str, Any]] = (),
        data: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        self.record.results.update(to_json(dict(results)))
        for name, entries in (("samples", samples), ("images", images), ("data", data)):
            getattr(self.record, name).extend(_entries(name, entries))

    @_never_ends_training
    def save(self, directory: str | Path | None = None) -> None:
        """Write the record now, into ``directory`` or the run's own."""
        with self._spending() as spent:
            self._measure()
            self.record.run["updated"] = _now()
            try:
                self.record.save(directory or self.directory, self._secrets)
            except OSError as error:
                if not self._warned:
                    logger.warning("The run record is not up to date: %s. Training goes on.", error)
                self._warned = True
        self._save_cost = spent[0]

    @_never_ends_training
    def finish(self, results: Mapping[str, Any] | None = None) -> None:
        """Mark the run as finished, add its final figures, and write the record."""
        self.record.run["status"] = "finished"
        self._add(results or {})
        if self._optimizer is not None:
            self.save()

    @_never_ends_training
    def _describe(self, model: nn.Module, step: int, settings: Mapping[str, Any]) -> None:
        """What is known before the first step."""
        now, record = _now(), self.record
        record.run = {"name": self._name, "created": now, "sessions": [], **record.run}
        record.run.update(status="running", steps=step, card=self._card)
        record.run["sessions"].append({"command": command_line(), "started": now, "from_step": step})
        record.versions, record.hardware = versions(), hardware()
        record.model = describe_model(model)
        record.settings = _short(to_json(dict(settings)))

    def _continue(self, step: int) -> None:
        """Take over the record of an earlier session up to ``step``."""
        try:
            old = RunRecord.load(self.directory)
        except ValueError as error:
            logger.warning("Training goes on from step %d without its earlier record: %s", step, error)
            return
        self._adopt(old, step)

    def _adopt(self, old: RunRecord, step: int) -> None:
        record = self.record
        record.run = {key: old.run[key] for key in ("name", "created", "sessions") if key in old.run}
        kept = [entry for entry in old.history if entry["step"] <= step]
        # What this process has logged before (an evaluation before training) replaces the same of the last one.
        again = {(entry["step"], *sorted(entry)) for entry in kept}
        record.history = kept + [entry for entry in record.history if (entry["step"], *sorted(entry)) not in again]
        record.results = {**old.results, **record.results}
        record.samples, record.images = old.samples + record.samples, old.images + record.images
        record.data = record.data or old.data
        # A killed run may have timed steps that are about to be made again.
        timed = old.timing.get("steps", 0)
        self._timed_steps = min(step, timed)
        kept_part = self._timed_steps / max(1, timed)
        self._before = {key: kept_part * float(old.timing.get(key) or 0.0) for key in self._before}

    @_never_ends_training
    def _measure(self) -> None:
        """Bring everything up to date that is read from the optimizer and the watches."""
        if self._optimizer is None:
            return
        self.record.optimizer = describe_optimizer(self._optimizer)
        self.record.gsnr = describe_gsnr(self._optimizer, self._model)
        seconds = (self._step_watch.seconds(), self._update_watch.seconds(), self._spent)
        self.record.timing = {"steps": self._timed_steps} | {
            key: before + now for (key, before), now in zip(self._before.items(), seconds, strict=True)
        }

    def _affordable(self, cost: float) -> bool:
        return self._budget == 1.0 or self._spent + cost <= self._budget * self._step_watch.seconds()

    @contextlib.contextmanager
    def _spending(self) -> Iterator[list[float]]:
        """Adds the time of its block to what the recorder has spent, and hands it out."""
        spent = [0.0]
        begun = time.perf_counter()
        yield spent
        spent[0] = time.perf_counter() - begun
        self._spent += spent[0]


def _entries(name: str, entries: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Entries for one of the record's lists, such as nobody would refuse to read again.

    Raises:
        ValueError: One is none of these.
    """
    listed = list(entries)
    if not all(isinstance(entry, Mapping) for entry in listed):
        raise ValueError(
            f"{name} must be dicts, but among them is {next(e for e in listed if not isinstance(e, Mapping))!r}"
        )
    found: list[dict[str, Any]] = [to_json(dict(entry)) for entry in listed]
    if problem := first_problem({name: found}):
        raise ValueError(problem)
    return found


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _short(value: Any) -> Any:
    """Settings without what only this machine knows."""
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_short(item) for item in value]
    return short_path(value) if isinstance(value, str) else value
