"""``hf-sai groups``: the parameter groups of a model, an adapter or a checkpoint, without loading its weights."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from hf_sai.groups.param_groups import param_groups
from hf_sai.groups.table import describe_groups, group_table
from hf_sai.memory.skeletons import build_skeleton
from hf_sai.optim.gsnr import UNMEASURED, GSNRRow

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
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> str:
    """Returns the table of the groups of ``args.path``.

    Raises:
        ValueError: The directory holds no model, adapter or checkpoint, or an optimizer that is not SGD-SaI's.
        OSError: The model, or the adapter's base model, cannot be found.
    """
    optimizer_file = Path(args.path) / _OPTIMIZER_FILE
    if optimizer_file.is_file():
        return _table_of_checkpoint(optimizer_file, args)
    # The table says whether a group decays; any value above 0 will do.
    return describe_groups(
        param_groups(build_skeleton(args.path, base_model=args.base_model), lr=1.0, weight_decay=1.0)
    )


def _table_of_checkpoint(file: Path, args: argparse.Namespace) -> str:
    saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    groups, state = saved["param_groups"], saved["state"]
    if not any("gsnr" in entry for entry in state.values()):
        raise ValueError(f"{file} holds no g-SNR: it is not the state of an SGD-SaI optimizer that took a step")
    if not all("param_names" in group for group in groups):
        raise ValueError(
            f"{file} holds no parameter names, so its g-SNR cannot be told apart; build the optimizer from named "
            "parameters (hf_sai.create_sgd_sai_optimizer, or SGDSaI(model.named_parameters()))"
        )
    shapes = {
        name: tuple(state[index]["momentum_buffer"].shape)
        for group in groups
        for index, name in zip(group["params"], group["param_names"], strict=True)
        if "momentum_buffer" in state.get(index, {})
    }
    if any(name not in shapes for group in groups for name in group["param_names"]):
        shapes |= {
            name: tuple(p.shape) for name, p in build_skeleton(args.path, base_model=args.base_model).named_parameters()
        }
    rows = []
    for number, group in enumerate(groups):
        for index, name in zip(group["params"], group["param_names"], strict=True):
            gsnr = float(state.get(index, {}).get("gsnr", UNMEASURED)) or None
            ratio = gsnr / math.sqrt(math.prod(shapes[name])) if gsnr else None
            rows.append(GSNRRow(name, str(group.get("name", number)), shapes[name], gsnr, ratio))
    return group_table(groups, rows, trained=True)
