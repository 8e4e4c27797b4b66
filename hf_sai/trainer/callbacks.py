"""The Trainer callback that writes a run record, and sends what it measures to ``report_to``."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_sai.runs.environment import settings_of
from hf_sai.runs.record import RunRecord
from hf_sai.runs.recorder import RunRecorder

__all__ = ["RunRecordCallback"]


class RunRecordCallback(TrainerCallback):
    """Writes ``run_record.json`` into the output directory while Trainer trains, with any optimizer.

    Add it in one line: ``Trainer(..., callbacks=[RunRecordCallback()])``, or with ``add_callback`` any time before
    ``train()``. Every training log gets the values of :meth:`RunRecorder.scalars`, so that they reach whatever
    ``report_to`` names, and the record the log history. The record is copied into each checkpoint, and a resumed run
    goes on with it. In a hyperparameter search every trial has a record of its own, where its checkpoints are.

    Args:
        name: The run's name; default: the output directory's.
        data: One dict per data source: ``name``, ``role`` (train, validation), ``license``, and what else is known.
        card: For the model card, see :class:`RunRecorder`: ``description``, ``limits``, ``license``, ...
        budget: Largest part of the training time to spend (0 to 1).

    Example:
        >>> callback = RunRecordCallback(data=[{"name": "wikitext", "role": "train", "license": "cc-by-sa-4.0"}])
        >>> Trainer(model, args, train_dataset=data, callbacks=[callback])  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        name: str | None = None,
        data: Iterable[Mapping[str, Any]] = (),
        card: Mapping[str, Any] | None = None,
        budget: float = 0.01,
    ) -> None:
        self._options: dict[str, Any] = {"name": name, "data": list(data), "card": card, "budget": budget}
        RunRecorder("", **self._options, main_process=False)  # what is wrong ends here, and no training that has begun
        self._recorder: RunRecorder | None = None
        self._output_dir = ""
        self._trials = 0
        _add_scalars_to_training_logs()

    @property
    def record(self) -> RunRecord:
        """The record as it stands."""
        return self._require().record

    def add(self, **more: Any) -> None:
        """Add ``results``, ``samples``, ``images`` or ``data``, see :meth:`RunRecorder.add`."""
        self._require().add(**more)

    def scalars(self) -> dict[str, float]:
        """What Trainer's next training log gets beside the loss."""
        return {} if self._recorder is None else self._recorder.scalars()

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._recorder_for(args, state)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_hyper_param_search:
            folder = Path(str(args.output_dir), state.trial_name or f"run-{self._trials}")
            self._trials += 1
            self._recorder = self._new(args, state, folder)
        recorder = self._recorder_for(args, state)
        if state.global_step and not _has_record(recorder.directory):
            # Resumed in another directory: Trainer's own history is in the checkpoint.
            for entry in state.log_history:
                recorder.append(int(entry["step"]), entry)
        recorder.start(kwargs["model"], kwargs["optimizer"], step=state.global_step, settings=_settings(args, state))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._recorder_for(args, state).step_begins()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = state.global_step + 1
        logs = step % max(1, int(state.logging_steps or 1)) == 0 or (step == 1 and args.logging_first_step)
        self._recorder_for(args, state).update_begins(measure=logs)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._recorder_for(args, state).update_ends()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._recorder_for(args, state).step_ends(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._recorder_for(args, state).append(state.global_step, logs or {})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        recorder = self._recorder_for(args, state)
        checkpoint = recorder.directory / f"checkpoint-{state.global_step}"
        if checkpoint.is_dir():
            recorder.save(checkpoint)
        recorder.save()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._recorder_for(args, state).finish()

    def _recorder_for(self, args: TrainingArguments, state: TrainerState) -> RunRecorder:
        # Added to a Trainer that is made already, this hears of nothing before the training. Given to another Trainer,
        # it leaves the record of the first as it is.
        if self._recorder is None or str(args.output_dir) != self._output_dir:
            self._recorder = self._new(args, state, Path(str(args.output_dir)))
        return self._recorder

    def _new(self, args: TrainingArguments, state: TrainerState, folder: Path) -> RunRecorder:
        self._output_dir = str(args.output_dir)
        secrets = [token for token in (args.hub_token,) if token]
        return RunRecorder(folder, **self._options, secrets=secrets, main_process=state.is_world_process_zero)

    def _require(self) -> RunRecorder:
        if self._recorder is None:
            raise RuntimeError("RunRecordCallback has no record yet; give it to a Trainer first.")
        return self._recorder


def _settings(args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
    """The arguments as they are in force: ``auto_find_batch_size`` leaves the first batch size in them."""
    settings = settings_of(args)
    if args.auto_find_batch_size and state.train_batch_size:
        settings["per_device_train_batch_size"] = state.train_batch_size // max(1, args.n_gpu)
    if state.is_hyper_param_search and state.trial_params:
        settings.update(state.trial_params)
    return settings


def _add_scalars_to_training_logs() -> None:
    """Let our callbacks add to Trainer's training logs; again does nothing.

    A callback cannot do it by itself: those that write to ``report_to`` come before it and have no word of it.
    """
    original = Trainer.log
    if getattr(original, "_hf_sai", False):
        return

    @functools.wraps(original)
    def log(self: Trainer, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:  # a training log, no evaluation and no summary
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, RunRecordCallback):
                    logs.update(callback.scalars())
        original(self, logs, *args, **kwargs)

    log._hf_sai = True  # type: ignore[attr-defined]
    Trainer.log = log  # type: ignore[method-assign]


def _has_record(directory: Path) -> bool:
    try:
        RunRecord.load(directory)
    except ValueError:
        return False
    return True
