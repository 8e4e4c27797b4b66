"""The ``hf-sai`` command: one parser, and one module for each subcommand."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from hf_sai import __version__
from hf_sai.cli import card, groups, lr_find, memory, plot, publish, run

__all__ = ["main"]

# Each has add_parser(subparsers), which sets ``run``: a function of the parsed arguments that returns what to print.
SUBCOMMANDS = (run, groups, memory, lr_find, plot, card, publish)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the ``hf-sai`` command.

    Args:
        argv: Arguments without the program's name; default: those of the process.

    Returns:
        The exit status: 0, or 1 after an error, whose one-line message goes to stderr.
    """
    parser = argparse.ArgumentParser(prog="hf-sai", description="SGD-SaI for Hugging Face.")
    parser.add_argument("--version", action="version", version=f"hf-sai {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for subcommand in SUBCOMMANDS:
        subcommand.add_parser(subparsers)
    args = parser.parse_args(argv)
    try:
        text = args.run(args)
    except (ImportError, OSError, ValueError) as error:
        print("hf-sai:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    try:
        print(text, flush=True)
    except BrokenPipeError:  # whoever read it, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
