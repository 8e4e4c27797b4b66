"""The Trainer callback that writes a run record, and sends what it measures to ``report_to``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_sai.runs.environment import settings_of
from hf_sai.runs.record import RunRecord
from hf_sai.runs.recorder import RunRecorder
from hf_sai.trainer.registration import add_scalars_to_trainer_logs

__all__ = ["RunRecordCallback"]


class RunRecordCallback(TrainerCallback):
    """Writes ``run_record.json`` into the output directory while Trainer trains, with any optimizer.

    Add it in one line: ``Trainer(..., callbacks=[RunRecordCallback()])``. Every training log gets the values of
    :meth:`RunRecorder.scalars`, so that they reach whatever ``report_to`` names, and the record the log history. The
    record is copied into each checkpoint, and a resumed run goes on with it.

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
        self._recorder: RunRecorder | None = None
        add_scalars_to_trainer_logs()

    @property
    def record(self) -> RunRecord:
        """The record as it stands."""
        return self._require().record

    def add(self, **more: Any) -> None:
        """Add ``results``, ``samples``, ``images`` or ``data``, see :meth:`RunRecorder.add`."""
        self._require().add(**more)

    def scalars(self) -> dict[str, float]:
        """What Trainer's next training log gets beside the loss."""
        return self._require().scalars()

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._recorder = RunRecorder(
            str(args.output_dir),
            **self._options,
            secrets=[token for token in (args.hub_token,) if token],
            main_process=state.is_world_process_zero,
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        recorder = self._require()
        if state.global_step and not _has_record(recorder.directory):
            # Resumed in another directory: Trainer's own history is in the checkpoint.
            for entry in state.log_history:
                recorder.append(int(entry["step"]), entry)
        recorder.start(kwargs["model"], kwargs["optimizer"], step=state.global_step, settings=settings_of(args))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._require().step_begins()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = state.global_step + 1
        logs = step % max(1, int(state.logging_steps)) == 0 or (step == 1 and args.logging_first_step)
        self._require().update_begins(measure=logs)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._require().update_ends()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._require().step_ends()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._require().append(state.global_step, logs or {})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        checkpoint = Path(str(args.output_dir), f"checkpoint-{state.global_step}")
        if checkpoint.is_dir():
            self._require().save(checkpoint)
        self._require().save()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._require().finish()

    def _require(self) -> RunRecorder:
        if self._recorder is None:
            raise RuntimeError("RunRecordCallback works from Trainer's creation on; give it to a Trainer first.")
        return self._recorder


def _has_record(directory: Path) -> bool:
    try:
        RunRecord.load(directory)
    except ValueError:
        return False
    return True
