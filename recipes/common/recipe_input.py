"""What the recipes share in reading their input: a YAML file and flags, and one clear sentence if that fails."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

__all__ = [
    "OPTIMIZER_SETTINGS",
    "InputError",
    "check_optimizer",
    "delete_checkpoints",
    "find_checkpoint",
    "first_line",
    "option",
    "parse_config_and_flags",
]


#: What a later process needs in order to build the same optimizer again, as TrainingArguments calls it.
OPTIMIZER_SETTINGS = (
    "optim",
    "optim_args",
    "optim_target_modules",
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
)


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one sentence that says what and what to do."""


def option(default: Any, text: str) -> Any:
    """Return a dataclass's field with a default and a line of help."""
    return field(default=default, metadata={"help": text})


def parse_config_and_flags(dataclasses: Sequence[Any], argv: Sequence[str], usage: str) -> tuple[Any, ...]:
    """Read `[CONFIG.yaml] [--key value ...]` into dataclasses with TRL's parser; flags win over the file.

    Args:
        dataclasses: Types to fill, in the order of the result.
        argv: Command line without the program's name.
        usage: First line of the help text.

    Returns:
        One instance of each dataclass.

    Raises:
        InputError: The file cannot be read, or a key or value is not allowed.

    Example:
        >>> import dataclasses
        >>> Options = dataclasses.make_dataclass("Options", [("size", int, 3)])
        >>> parse_config_and_flags([Options], ["--size", "4"], usage="train.py [CONFIG.yaml]")
        (Options(size=4),)
    """
    from trl import TrlParser  # heavy, and only the recipes need it

    parser = TrlParser(tuple(dataclasses))
    parser.usage = usage
    arguments = ["--config", *argv] if argv and not argv[0].startswith("-") else list(argv)
    try:
        return parser.parse_args_and_config(arguments)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the settings: {error}") from error


def find_checkpoint(training_args: Any, restart: bool = False, marker: str = "trainer_state.json") -> str | None:
    """Return the checkpoint to resume from; refuse to mix a new run with the checkpoints of an old one.

    A folder without the marker, which is written last, was being saved when its run was killed, and is passed over.

    Args:
        training_args: TrainingArguments; `output_dir` and `resume_from_checkpoint` (true, false or a folder) are read.
        restart: Whether a new run may begin where there are checkpoints; `delete_checkpoints` then removes them.
        marker: File that every whole checkpoint has. Default: Trainer's.

    Raises:
        InputError: There is nothing to resume from, or an old run is in the way.
    """
    from transformers.trainer_utils import get_last_checkpoint

    folder = training_args.output_dir
    last = get_last_checkpoint(folder) if Path(folder).is_dir() else None
    wanted = training_args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        if last and not restart:
            raise InputError(
                f"{last} is from an earlier run: give --resume_from_checkpoint true to go on with it, "
                "--restart true to delete it, or another --output_dir."
            )
        return None
    if str(wanted).lower() == "true":
        whole = [path for path in Path(folder).glob("checkpoint-*") if Path(path, marker).is_file()]
        if not whole:
            raise InputError(f"cannot resume: {folder} holds no whole checkpoint; leave out --resume_from_checkpoint.")
        return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2])))
    if not Path(wanted, marker).is_file():
        raise InputError(f"cannot resume: {wanted} is no checkpoint folder of this trainer (it has no {marker}).")
    return str(wanted)


def delete_checkpoints(training_args: Any) -> None:
    """Delete the checkpoints in `output_dir`, in the process that also saves them."""
    if training_args.should_save:
        for old in Path(training_args.output_dir).glob("checkpoint-*"):
            shutil.rmtree(old)


def check_optimizer(training_args: Any, model: Any) -> None:
    """Find out before training, and before anything is written, whether Trainer can build the optimizer.

    Raises:
        InputError: It cannot, with the reason.
    """
    from transformers import Trainer

    try:
        Trainer.get_optimizer_cls_and_kwargs(training_args, model)
    except (ImportError, ValueError) as error:
        raise InputError(f"cannot build the optimizer {training_args.optim.value}: {error}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type where there is none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
