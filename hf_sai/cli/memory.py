"""``hf-sai memory``: what training a model will keep in memory, per optimizer, before any weight is loaded."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from hf_sai.memory.estimate import OPTIMIZERS, SHARDINGS, UNITS, estimate_memory
from hf_sai.memory.skeletons import KNOWN_SIZES, build_skeleton, parse_lora

__all__ = ["add_parser"]

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_parser(subparsers: Any) -> None:
    """Adds ``memory`` to the ``hf-sai`` command."""
    parser = subparsers.add_parser(
        "memory",
        help="show what training a model keeps in memory, per optimizer",
        description="Show bytes of parameters, gradients and optimizer state on each device. Only configurations are "
        "read, no weights. A model that is saved quantised (bitsandbytes, GPTQ, AWQ) is counted as it is saved.",
    )
    parser.add_argument(
        "model",
        help="a model's or adapter's directory, its name on the Hub, or one of the sizes known without either: "
        + ", ".join(KNOWN_SIZES),
    )
    parser.add_argument("--base-model", help="an adapter's base model, if it is not where the adapter says")
    parser.add_argument("--optim", metavar="A,B", help=f"of {', '.join(OPTIMIZERS)} (default: all)")
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        default="float32",
        help="of the weights; auto: the configuration's (default: float32)",
    )
    parser.add_argument(
        "--lora",
        metavar="r=16,targets=q_proj;v_proj",
        help="train a LoRA adapter: r, targets (modules, or all-linear), save (modules trained in full)",
    )
    parser.add_argument("--load-in-4bit", action="store_true", help="quantise the frozen base model (QLoRA)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that the model brings along")
    parser.add_argument("--devices", type=int, default=1, help="how many share the work (default: 1)")
    parser.add_argument("--sharding", metavar="A,B", help=f"of {', '.join(SHARDINGS[1:])} (default: all)")
    parser.add_argument("--unit", choices=UNITS, help="default: GB, or MB for small models")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> str:
    """Returns the table for ``args.model``.

    Raises:
        ValueError: Options are wrong or do not go together, or there is nothing to train.
        OSError: The model cannot be found.
    """
    model = build_skeleton(
        args.model,
        base_model=args.base_model,
        dtype=_DTYPES[args.dtype],
        lora=parse_lora(args.lora) if args.lora is not None else None,
        load_in_4bit=args.load_in_4bit,
        trust_remote_code=args.trust_remote_code,
    )
    report = estimate_memory(model, _names(args.optim), devices=args.devices, shardings=_names(args.sharding))
    return report.table(args.unit)


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]
