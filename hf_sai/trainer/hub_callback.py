"""Trainer's ``--push_to_hub`` by way of ``hf_sai.publishing``: the same options, an allow-list, no token on disk."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy

from hf_sai.publishing.publish import create_repository, publish

__all__ = ["RESUME", "PublishCallback", "take_over_push_to_hub"]

logger = logging.getLogger(__name__)

#: What Trainer needs to go on from a checkpoint, and what ``hub_strategy`` checkpoint and all_checkpoints ask for.
RESUME = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "trainer_state.json")


def take_over_push_to_hub(args: TrainingArguments, resume: Iterable[str] = RESUME) -> PublishCallback | None:
    """Take ``push_to_hub`` and the token out of the arguments, for a callback that does it instead of Trainer.

    Trainer uploads all of the output directory, ``training_args.bin`` with a pickled ``hub_token`` among it, and
    writes its own card over the run's. Call this before Trainer is made; the repository is created now, so that a
    wrong token or name fails before the training.

    Args:
        args: ``push_to_hub``, ``hub_model_id``, ``hub_strategy``, ``hub_token``, ``hub_private_repo``,
            ``hub_revision`` and ``hub_always_push`` are read.
        resume: Patterns of the files in a checkpoint that training goes on from, where a loop of one's own saves it.

    Returns:
        A callback for Trainer, or None without ``push_to_hub``. Another loop calls its ``saved`` and ``finish``.

    Raises:
        ValueError: The repository's name is impossible.
        PublishError: The Hub cannot be reached or refuses.
    """
    if not args.push_to_hub:
        return None
    callback = PublishCallback(args, resume)
    args.push_to_hub = False
    args.hub_token = None
    return callback


class PublishCallback(TrainerCallback):
    """Publishes the run as ``hub_strategy`` says: at the end, at every save, or with the checkpoints."""

    def __init__(self, args: TrainingArguments, resume: Iterable[str] = RESUME) -> None:
        self._active = args.process_index == 0
        self._directory = Path(str(args.output_dir))
        self._strategy = HubStrategy(args.hub_strategy)
        self._always = args.hub_always_push
        self._resume = tuple(resume)
        self._job: Future[str] | None = None
        self._options: dict[str, Any] = {
            "token": args.hub_token,
            "private": args.hub_private_repo is not False,  # None, too: public is what somebody said
            "revision": getattr(args, "hub_revision", None),
            "update": True,  # the repository was looked at when this was made
        }
        self.repo_id = args.hub_model_id or self._directory.resolve().name
        if self._active:
            self._api, self.repo_id = create_repository(self.repo_id, **{**self._options, "update": False})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.saved(state.global_step)

    def saved(self, step: int) -> None:
        """Publish ``checkpoint-STEP``, weights included, if the strategy says so, while training goes on."""
        if not self._active or self._strategy == HubStrategy.END:
            return
        if self._job is not None and not self._job.done() and not self._always:
            return
        self._settle()
        self._job = self._api.run_as_future(self._push, self._directory / f"checkpoint-{step}", step)

    def finish(self) -> str | None:
        """Publish the finished run; call it when its card is written.

        Returns:
            The commit's URL; None in other processes.

        Raises:
            ValueError: There is nothing to upload, or a file holds a secret.
            PublishError: The Hub refused or the connection broke; the run on disk is as it was.
        """
        if not self._active:
            return None
        self._settle()
        return publish(self._directory, self.repo_id, message="End of training", **self._options)

    def _push(self, checkpoint: Path, step: int) -> str:
        message = f"Training in progress, step {step}"
        url = publish(checkpoint, self.repo_id, message=message, **self._options)
        if self._strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            folder = "last-checkpoint" if self._strategy == HubStrategy.CHECKPOINT else checkpoint.name
            resume = [pattern for pattern in self._resume if any(checkpoint.glob(pattern))]
            options = {**self._options, "include": resume, "path_in_repo": folder}
            url = publish(checkpoint, self.repo_id, message=f"{message}, checkpoint", **options)
        return url

    def _settle(self) -> None:
        """Wait for the upload under way; its failure costs a warning, for the next one brings the same and more."""
        if self._job is None:
            return
        try:
            self._job.result()
        except (OSError, ValueError) as error:
            logger.warning("A checkpoint was not published: %s", error)
        self._job = None
