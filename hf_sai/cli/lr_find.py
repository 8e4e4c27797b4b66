"""``hf-sai lr-find``: which learning rate suits an unmodified Trainer script, by a range test in its place."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_sai.runs.files import atomic_write

if TYPE_CHECKING:
    from hf_sai.trainer.range_test import RangeTest

__all__ = ["add_parser"]


def add_parser(subparsers: Any) -> None:
    """Adds ``lr-find`` to the ``hf-sai`` command."""
    parser = subparsers.add_parser(
        "lr-find",
        help="find a learning rate for a Trainer script",
        description="Run a script up to its first Trainer.train(), train some steps there with a learning rate that "
        "grows from one to the next, draw the loss over the rate and suggest one to start from. The script ends then; "
        "nothing is saved. Example: hf-sai lr-find train.py --optim sgd_sai --output_dir out",
    )
    parser.add_argument("--smallest", type=float, default=1e-5, help="rate of the first step (default: 1e-5)")
    parser.add_argument("--largest", type=float, default=10.0, help="rate of the last step (default: 10)")
    parser.add_argument("--steps", type=int, default=100, help="how many steps (default: 100)")
    parser.add_argument("--out", default="lr_find", help="folder for pictures and numbers (default: lr_find)")
    parser.add_argument("-m", dest="is_module", action="store_true", help="the target is a module, as in python -m")
    parser.add_argument("target", help="path of a script, or the name of a module after -m")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="everything after the target is the script's own")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> str:
    """Returns the suggestion, and the names of the files written."""
    if not args.is_module and not os.path.exists(args.target):
        raise ValueError(f"no script {args.target!r} in {os.getcwd()!r}; for a module write -m {args.target}")
    folder = Path(args.out).resolve()  # the script may go elsewhere
    test = _run_until_tested(args)
    return "\n".join([_verdict(test, args), *map(str, _save(test, folder))])


class _TestedError(SystemExit):
    """Ends the script after the test; no script takes SystemExit for an error of its own."""

    def __init__(self, test: RangeTest) -> None:
        super().__init__(0)
        self.test = test


def _run_until_tested(args: argparse.Namespace) -> RangeTest:
    from transformers import Trainer

    from hf_sai.run import run_target
    from hf_sai.trainer.range_test import range_test

    original = Trainer.train

    def train(self: Trainer, *positional: Any, **named: Any) -> Any:
        Trainer.train = original  # type: ignore[method-assign]
        raise _TestedError(range_test(self, smallest=args.smallest, largest=args.largest, steps=args.steps))

    Trainer.train = train  # type: ignore[method-assign]
    try:
        run_target(args.target, args.arguments, is_module=args.is_module)
    except _TestedError as tested:
        return tested.test
    finally:
        Trainer.train = original  # type: ignore[method-assign]
    raise ValueError(f"{args.target} ended without calling Trainer.train(), so there was nothing to test")


def _verdict(test: RangeTest, args: argparse.Namespace) -> str:
    tried = f"{len(test.losses)} steps, learning rate {test.learning_rates[0]:g} to {test.learning_rates[-1]:.2g}"
    if test.suggestion is None:
        return f"{tried}: the loss never fell, so there is no suggestion; try more --steps or another --smallest"
    words = f"{tried}: try --learning_rate {test.suggestion:.1e}, then a third and three times that"
    if test.smoothed[-1] == min(test.smoothed):
        words += f" (the loss was still falling at the end: --largest {10 * args.largest:g} may find a larger one)"
    return words


def _save(test: RangeTest, folder: Path) -> list[Path]:
    from hf_sai.publishing.plots import draw
    from hf_sai.trainer.range_plot import plot_range_test

    folder.mkdir(parents=True, exist_ok=True)
    numbers = {"suggestion": test.suggestion, "learning_rates": test.learning_rates, "losses": test.losses}
    files = [atomic_write(folder / "lr_find.json", json.dumps(numbers, indent=1) + "\n")]
    files.append(atomic_write(folder / "lr_find.png", draw(plot_range_test(test))))
    return files
