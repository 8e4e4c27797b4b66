"""What the recipes share in reading their input: a YAML file and flags, and one clear sentence if that fails."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import types
import typing
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import yaml

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


#: The least that a number of TrainingArguments (and of what is called alike) can be; transformers checks a few of them.
_LEAST: dict[str, float] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon", "warmup_steps", "seed"), 0),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "dataloader_num_workers", "num_train_epochs"), 0),
    **dict.fromkeys(("save_total_limit", "logging_steps", "eval_steps", "save_steps"), 0),
}
#: What numpy takes as a seed, and torch as a size.
_MOST: dict[str, float] = {"seed": 2**32 - 1, "data_seed": 2**32 - 1}
_LARGEST = 2**63 - 1


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one sentence that says what and what to do."""


def option(default: Any, text: str) -> Any:
    """Return a dataclass's field with a default and a line of help."""
    return field(default=default, metadata={"help": text})


def parse_config_and_flags(kinds: Sequence[Any], argv: Sequence[str], usage: str) -> tuple[Any, ...]:
    """Read `[CONFIG.yaml] [--key value ...]` into dataclasses with TRL's parser; flags win over the file.

    Args:
        kinds: Dataclasses to fill, in the order of the result.
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

    parser = TrlParser(tuple(kinds))
    parser.usage = usage
    setattr(parser, "error", _refuse)  # noqa: B010  (argparse prints the usage of 200 options before what is wrong)
    arguments = ["--config", *argv] if argv and not argv[0].startswith("-") else list(argv)
    try:
        if argv and not argv[0].startswith("-"):
            _check_file(argv[0], kinds)
        parsed = parser.parse_args_and_config(arguments)
    except InputError:
        raise
    except Exception as error:  # each option of transformers and DeepSpeed has errors of its own
        raise InputError(f"cannot read the settings: {first_line(error)}") from error
    for settings in parsed:
        _check_numbers(settings)
    return parsed


def _refuse(message: str) -> typing.NoReturn:
    raise InputError(f"cannot read the settings: {message}")


def _check_file(path: str, kinds: Sequence[Any]) -> None:
    """Refuse a file of settings whose values are of another kind than the options; TrlParser takes them as they are."""
    if Path(path).exists() and not Path(path).is_file():  # reading a pipe would wait for ever
        raise InputError(f"cannot read {path}: it is no regular file.")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        place = getattr(error, "problem_mark", None)
        where = f", line {place.line + 1}" if place else ""
        raise InputError(f"{path} is no YAML{where}: {getattr(error, 'problem', None) or first_line(error)}.") from None
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{path} holds no settings; write one on each line, as key: value.")
    for kind in kinds:
        hints = typing.get_type_hints(kind)
        for option_ in dataclasses.fields(kind):
            if option_.name in content:
                value, hint = content[option_.name], hints[option_.name]
                if not _fits(value, hint):
                    shown = repr(value) if len(repr(value)) < 80 else f"a {type(value).__name__}"
                    raise InputError(f"{path}: {option_.name} is {shown}; it must be {_in_words(hint)}.")


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "settings by name"}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value that YAML read is of an option's type; a text may still be what argparse turns into it."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(_fits(entry, part) for entry in value for part in parts[:1])
    if hint is type(None):
        return value is None
    if hint in (int, float):
        kinds: tuple[type, ...] = (int, str) if hint is int else (int, float, str)
        return isinstance(value, kinds) and not isinstance(value, bool)
    if hint is bool:
        return isinstance(value, bool | str)
    if hint in (str, dict):
        return isinstance(value, hint)
    return not isinstance(value, list | dict)  # an enum's value, a literal, ...


def _in_words(hint: Any) -> str:
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) is list:
        return f"a list, each {_in_words(parts[0]) if parts else 'a value'}"
    if parts and typing.get_origin(hint) is not typing.Literal:
        return " or ".join(dict.fromkeys(_in_words(part) for part in parts))
    return _WORDS.get(hint, "a single value")


def _check_numbers(settings: Any) -> None:
    """Refuse numbers that nothing can be done with, which would end in a traceback later on."""
    for option_ in dataclasses.fields(settings):
        name, value = option_.name, getattr(settings, option_.name, None)
        if name == "output_dir" and isinstance(value, str) and not value.strip():
            raise InputError("output_dir is empty; name a folder.")
        if isinstance(value, bool) or not isinstance(value, int | float) or value == option_.default:
            continue
        largest = _LARGEST if isinstance(value, int) else sys.float_info.max
        least, most = _LEAST.get(name, -largest), _MOST.get(name, largest)
        if not least <= value <= most:  # NaN is neither
            allowed = f"at least {least:g}" if value < least else f"a number of at most {most:g}"
            raise InputError(f"{name} is {str(value)[:40]}; it must be {allowed}.")


def find_checkpoint(training_args: Any, restart: bool = False, marker: str = "trainer_state.json") -> str | None:
    """Return the checkpoint to resume from; refuse to mix a new run with the checkpoints of an old one.

    A folder without the marker, which is written last, or with a part of it, was being saved when its run was killed,
    and is passed over.

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
        numbered = (path for path in Path(folder).glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal())
        whole = [path for path in numbered if _is_whole(path / marker)]
        if not whole:
            raise InputError(f"cannot resume: {folder} holds no whole checkpoint; leave out --resume_from_checkpoint.")
        return _unfinished(max(whole, key=lambda path: int(path.name.rpartition("-")[2])), marker, training_args)
    if not _is_whole(Path(wanted, marker)):
        raise InputError(f"cannot resume: {wanted} is no checkpoint folder of this trainer (it has no whole {marker}).")
    return _unfinished(Path(wanted), marker, training_args)


def _unfinished(checkpoint: Path, marker: str, training_args: Any) -> str:
    """The checkpoint, unless nothing is left to train: transformers would take one step more, at a rate of 0."""
    if marker.endswith(".json"):
        state = json.loads((checkpoint / marker).read_text(encoding="utf-8"))
        for reached, wanted in (("global_step", "max_steps"), ("epoch", "num_train_epochs")):
            goal, value = getattr(training_args, wanted, -1), state.get(reached)
            if goal > 0 and isinstance(value, int | float):
                if value >= goal:
                    raise InputError(
                        f"nothing is left to train: {checkpoint} is from {reached.replace('_', ' ')} {value}, and "
                        f"{wanted} is {goal}; give a larger one, or leave out --resume_from_checkpoint."
                    )
                break
    return str(checkpoint)


def _is_whole(marker: Path) -> bool:
    """Whether a checkpoint's last file is there to its end: JSON that ends, or an archive as torch writes it."""
    if not marker.is_file():
        return False
    if marker.suffix != ".json":
        return zipfile.is_zipfile(marker)
    try:
        return isinstance(json.loads(marker.read_text(encoding="utf-8")), dict)
    except (ValueError, RecursionError):
        return False


def delete_checkpoints(training_args: Any) -> None:
    """Delete the checkpoints in `output_dir`, in the process that also saves them."""
    if training_args.should_save:
        for old in Path(training_args.output_dir).glob("checkpoint-*"):
            shutil.rmtree(old)


def check_optimizer(training_args: Any, model: Any) -> None:
    """Find out before training, and before anything is written, whether Trainer can build the optimizer.

    It is built once, for small tensors in the place of the model's.

    Raises:
        InputError: It cannot, with the reason.
    """
    from transformers import Trainer

    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(training_args, model)
        if not {"model", "optimizer_dict"} & set(options):  # else it steps within the backward pass of this model
            groups = [_small(group) for group in options.pop("params", None) or [{}]]
            kind(groups, **options)
    except Exception as error:  # every optimizer refuses its options in its own way
        name = getattr(training_args.optim, "value", training_args.optim)
        raise InputError(f"cannot build the optimizer {name}: {first_line(error)}") from error


def _small(group: Any) -> dict[str, Any]:
    """A parameter group with its settings and one small tensor."""
    import torch

    kept = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    return {**kept, "params": [torch.nn.Parameter(torch.zeros(2, 2))]}


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type where there is none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
