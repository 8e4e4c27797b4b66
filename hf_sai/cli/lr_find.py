"""``hf-sai lr-find``: which learning rate suits an unmodified Trainer script, by a range test in its place."""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import logging
import math
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hf_sai.run import CannotRunError, run_target, show_error
from hf_sai.runs.files import atomic_write

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_sai.trainer.range_test import RangeTest

__all__ = ["add_parser"]


def add_parser(subparsers: Any) -> None:
    """Adds ``lr-find`` to the ``hf-sai`` command."""
    parser = subparsers.add_parser(
        "lr-find",
        help="find a learning rate for a Trainer script",
        description="Run a script up to its first Trainer.train(), train some steps there with a learning rate that "
        "grows from one to the next, draw the loss over the rate and suggest one to start from. The process ends "
        "there, without what the script would do afterwards (finally blocks and atexit functions included), so that "
        "nothing is saved. Before it, the script does what it always does: give one that clears its output directory "
        "another. Example: hf-sai lr-find train.py --optim sgd_sai --output_dir out",
    )
    parser.add_argument("--smallest", type=float, default=1e-5, help="rate of the first step (default: 1e-5)")
    parser.add_argument("--largest", type=float, default=10.0, help="rate of the last step (default: 10)")
    parser.add_argument("--steps", type=int, default=100, help="how many steps (default: 100)")
    parser.add_argument("--out", default="lr_find", help="folder for pictures and numbers (default: lr_find)")
    parser.add_argument("-m", dest="is_module", action="store_true", help="the target is a module, as in python -m")
    parser.add_argument("target", help="path of a script, or the name of a module after -m")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="everything after the target is the script's own")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> NoReturn:
    """Ends the process in the place of the script's training; comes back only by an error."""
    from hf_sai.trainer.range_test import check_settings

    check_settings(args.smallest, args.largest, args.steps)  # before the script has loaded anything
    if not args.is_module and not os.path.exists(args.target):
        raise ValueError(f"no script {args.target!r} in {os.getcwd()!r}; for a module write -m {args.target}")
    folder = Path(args.out).resolve()  # the script may go elsewhere
    with _tested_instead_of_trained(args, folder):
        try:
            run_target(args.target, args.arguments, is_module=args.is_module)
        except CannotRunError:
            raise
        except Exception as error:  # the script's own: not in one line, which would not say where
            show_error(error)
            raise SystemExit(1) from None
    raise ValueError(f"{args.target} ended without calling Trainer.train(), so there was nothing to test")


@contextlib.contextmanager
def _tested_instead_of_trained(args: argparse.Namespace, folder: Path) -> Iterator[None]:
    from transformers import Trainer

    init, original = Trainer.__init__, Trainer.train
    made: list[Path] = []

    @functools.wraps(init)
    def note_folder(self: Trainer, *positional: Any, **named: Any) -> None:
        there = {path for path in _folders(positional, named) if path.exists()}
        init(self, *positional, **named)
        made.extend(path for path in _folders((self.args,), {}) if path not in there)

    def train(self: Trainer, *positional: Any, **named: Any) -> NoReturn:
        Trainer.train = original  # type: ignore[method-assign]
        _end(_test(self, args, folder, made))

    Trainer.__init__, Trainer.train = note_folder, train  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer.__init__, Trainer.train = init, original  # type: ignore[method-assign]


def _folders(positional: Any, named: dict[str, Any]) -> list[Path]:
    """The output directory among a Trainer's arguments, as it would be found from anywhere."""
    values = (*positional, *named.values())
    return [Path(value.output_dir).resolve() for value in values if isinstance(getattr(value, "output_dir", None), str)]


def _test(trainer: Trainer, args: argparse.Namespace, folder: Path, made: list[Path]) -> int:
    """Does the test, says and saves what it found; returns the exit status."""
    from hf_sai.trainer.range_test import range_test

    main = trainer.is_world_process_zero()
    try:
        test = range_test(trainer, smallest=args.smallest, largest=args.largest, steps=args.steps, progress=main)
    except (ImportError, OSError, ValueError) as error:
        if _is_of_the_script(error):
            show_error(error)
        else:
            _say(error)
        return 1
    except KeyboardInterrupt:
        return 130
    except BaseException as error:
        show_error(error)
        return 1
    finally:
        for path in made if main else ():
            with contextlib.suppress(OSError):  # there is something in it
                path.rmdir()
    if not main:
        return 0
    try:
        # The verdict first: a disk that is full must not cost what the test has found.
        for line in itertools.chain([_verdict(test, args)], _save(test, folder)):
            sys.stdout.write(f"{line}\n")
    except OSError as error:
        _say(error)
        return 1
    return 0


def _say(error: Exception) -> None:
    sys.stderr.write(f"hf-sai: {' '.join(str(error).split())}\n")


def _is_of_the_script(error: BaseException) -> bool:
    """Whether an error was raised in code that is neither ours nor of what we call (a model, a collator, a dataset)."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    return not Path(last).resolve().is_relative_to(Path(__file__).resolve().parents[1])


def _end(status: int) -> NoReturn:
    """Ends the process here and now: whatever a script does after its training, it would do with an untrained model."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _verdict(test: RangeTest, args: argparse.Namespace) -> str:
    tried = f"{len(test.losses)} steps, learning rate {test.learning_rates[0]:g} to {test.learning_rates[-1]:.2g}"
    if not test.fell:
        return f"{tried}: the loss never fell, so there is no suggestion; try more --steps or another --smallest"
    if test.suggestion is None:
        return (
            f"{tried}: the loss fell and never rose again, so there is no suggestion: what is too large was not found. "
            f"Try --largest {10 * args.largest:g}; if the curve stays flat, the rate hardly matters in so few steps"
        )
    return f"{tried}: try --learning_rate {test.suggestion:.1e}, then a third and three times that"


def _save(test: RangeTest, folder: Path) -> Iterator[str]:
    """Writes numbers and picture, and yields each file's name when it is there."""
    from hf_sai.publishing.plots import draw
    from hf_sai.trainer.range_plot import plot_range_test

    losses = [loss if math.isfinite(loss) else None for loss in test.losses]  # JSON has no other numbers
    numbers = {"suggestion": test.suggestion, "learning_rates": test.learning_rates, "losses": losses}
    yield str(atomic_write(folder / "lr_find.json", json.dumps(numbers, indent=1, allow_nan=False) + "\n"))
    try:
        picture = draw(plot_range_test(test))
    except ImportError as error:
        yield f"no picture: {error}"
        return
    yield str(atomic_write(folder / "lr_find.png", picture))
