"""``hf-sai run``: an unmodified script, or a command such as ``trl sft``, in which ``--optim sgd_sai`` is known."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

from hf_sai.run import CannotRunError, add_arguments, require_target, run_followed, show_error

__all__ = ["add_parser"]


def add_parser(subparsers: Any) -> None:
    """Adds ``run`` to the ``hf-sai`` command."""
    parser = subparsers.add_parser(
        "run",
        help="run a script or a command in which --optim sgd_sai is known",
        description="Run an unmodified script, module or installed command in which --optim sgd_sai is known; the "
        "processes that it starts know it, too. Example: hf-sai run trl sft --optim sgd_sai --output_dir out ...",
    )
    add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> NoReturn:
    """Ends as the script does."""
    require_target(args)
    sys.excepthook = lambda kind, error, trace: show_error(error, trace)
    try:
        run_followed(args)
    except CannotRunError:
        raise
    except Exception as error:  # the script's own: not in one line, which would not say where, but as its hook shows it
        sys.excepthook(type(error), error, error.__traceback__)
        raise SystemExit(1) from None
    raise SystemExit(0)
