"""``hf-sai groups``: the parameter groups of a model, an adapter or a checkpoint, without loading its weights."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from hf_sai.groups.param_groups import param_groups
from hf_sai.groups.table import group_table, tensor_table, unmeasured_rows
from hf_sai.memory.skeletons import build_skeleton
from hf_sai.optim.gsnr import UNMEASURED, GSNRRow
from hf_sai.optim.momentum import QUANTIZED
from hf_sai.optim.rules import RULES
from hf_sai.optim.saved_state import SHAPE_KEY
from hf_sai.trainer.optim_args import parse_optim_args

__all__ = ["add_parser"]

# What Trainer calls the optimizer's state in a checkpoint directory.
_OPTIMIZER_FILE = "optimizer.pt"


def add_parser(subparsers: Any) -> None:
    """Adds ``groups`` to the ``hf-sai`` command."""
    parser = subparsers.add_parser(
        "groups",
        help="show the parameter groups of a model, an adapter or a checkpoint",
        description="Show into which groups SGD-SaI sorts the trainable parameters, and, for a checkpoint directory "
        f"with an {_OPTIMIZER_FILE}, the g-SNR measured for them. Only configurations are read, no weights.",
    )
    parser.add_argument("path", help="a model's or adapter's directory or name, or a Trainer checkpoint directory")
    parser.add_argument("--base-model", help="the adapter's base model, if it is not where the adapter says")
    parser.add_argument("--update", choices=RULES, help="with orthogonal: also which tensors are hidden matrices")
    parser.add_argument("--matrices", metavar="EXPRESSION:BOOL;...", help="what --optim_args matrices=... would change")
    parser.add_argument("--names", action="store_true", help="also show each tensor and its group")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that the model brings along")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> str:
    """Returns the table of the groups of ``args.path``.

    Raises:
        ValueError: The directory holds no model, adapter or checkpoint, or an optimizer that is not SGD-SaI's.
        OSError: The model, or the adapter's base model, cannot be found.
    """
    optimizer_file = Path(args.path) / _OPTIMIZER_FILE
    if optimizer_file.exists() and not optimizer_file.is_file():
        raise ValueError(f"cannot read {optimizer_file}: it is no regular file")
    if optimizer_file.is_file():
        if args.update is not None or args.matrices is not None:
            raise ValueError(
                f"{args.path} holds an optimizer's state, which says its rule itself; leave out --update and --matrices"
            )
        return _table_of_checkpoint(optimizer_file, args)
    chosen = parse_optim_args(None if args.matrices is None else f"matrices={args.matrices}")
    # The table says whether a group decays; any value above 0 will do.
    groups = param_groups(_skeleton(args), lr=1.0, weight_decay=1.0, update=args.update, **chosen)
    return _tables(groups, unmeasured_rows(groups), args, trained=False)


def _tables(groups: list[dict[str, Any]], rows: list[GSNRRow], args: argparse.Namespace, *, trained: bool) -> str:
    table = group_table(groups, rows, trained=trained)
    return f"{table}\n\n{tensor_table(rows)}" if args.names else table


def _skeleton(args: argparse.Namespace) -> Any:
    return build_skeleton(args.path, base_model=args.base_model, trust_remote_code=args.trust_remote_code)


def _table_of_checkpoint(file: Path, args: argparse.Namespace) -> str:
    groups, state = _read_state(file)
    if not any("gsnr" in entry for entry in state.values()):
        raise ValueError(f"{file} holds no g-SNR: it is not the state of an SGD-SaI optimizer that took a step")
    if not all("param_names" in group for group in groups):
        raise ValueError(
            f"{file} holds no parameter names, so its g-SNR cannot be told apart; build the optimizer from named "
            "parameters (hf_sai.create_sgd_sai_optimizer, or SGDSaI(model.named_parameters()))"
        )
    named = [
        (number, index, str(name))
        for number, group in enumerate(groups)
        for index, name in zip(group["params"], group["param_names"], strict=True)
    ]
    shapes = {name: shape for _, index, name in named if (shape := _saved_shape(state.get(index, {}))) is not None}
    if len(shapes) < len({name for _, _, name in named}):
        shapes |= {name: tuple(p.shape) for name, p in _skeleton(args).named_parameters()}
    rows = []
    for number, index, name in named:
        if name not in shapes:
            raise ValueError(f"{file} names the parameter {name}, which the model beside it does not have")
        gsnr = float(state.get(index, {}).get("gsnr", UNMEASURED)) or None
        ratio = gsnr / math.sqrt(math.prod(shapes[name])) if gsnr and math.prod(shapes[name]) else None
        rows.append(GSNRRow(name, str(groups[number].get("name", number)), shapes[name], gsnr, ratio))
    return _tables(groups, rows, args, trained=True)


def _read_state(file: Path) -> tuple[list[dict[str, Any]], dict[Any, dict[str, Any]]]:
    """The groups and the state of a saved optimizer.

    Raises:
        ValueError: The file is damaged, or holds something else.
    """
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged archive or pickle can fail in any way
        if isinstance(error, PermissionError):
            raise
        reason = str(error).partition(".")[0]
        raise ValueError(f"{file} cannot be read: it is damaged, or no optimizer's state ({reason})") from error
    try:
        groups, state = list(saved["param_groups"]), dict(saved["state"])
        for group in groups:
            float(group["weight_decay"])
            if len(group["params"]) != len(group.get("param_names", group["params"])):
                raise ValueError
            hash(tuple(group["params"]))
        for entry in state.values():
            if not math.isfinite(float(entry.get("gsnr", UNMEASURED))):
                raise ValueError
            _saved_shape(entry)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        raise ValueError(f"{file} is no optimizer's state as torch saves it, or a damaged one") from None
    return groups, state


def _saved_shape(entry: dict[str, Any]) -> tuple[int, ...] | None:
    """A parameter's shape as its saved state tells it; one in 4 bits of before it did so, which is flat, does not."""
    if isinstance(told := entry.get(SHAPE_KEY), torch.Tensor):
        return tuple(told.shape[:-1])
    momentum = entry.get("momentum_buffer")
    if momentum is None:
        return None
    scales = entry.get("momentum_scales")
    if scales is not None and scales.numel() != math.ceil(momentum.numel() / QUANTIZED["8bit"]):
        return None
    return tuple(momentum.shape)
