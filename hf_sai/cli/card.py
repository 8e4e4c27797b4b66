"""``hf-sai card``: the model card and the pictures of a run, from its record."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["add_parser"]


def add_parser(subparsers: Any) -> None:
    """Adds ``card`` to the ``hf-sai`` command."""
    parser = subparsers.add_parser(
        "card",
        help="write a run's model card and pictures",
        description="Write the model card (README.md) and the pictures of a run from its record. What you wrote into "
        "the card outside the hf-sai comments stays.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the run's directory")
    parser.add_argument(
        "--twin",
        action="append",
        default=[],
        metavar="DIR",
        help="a run to compare with; may be given several times (default: those of the card before)",
    )
    parser.add_argument("--template", help="a Jinja template instead of the package's own")
    parser.add_argument("--repo-id", help="where the model will be on the Hub, for the code that loads it")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> str:
    """Returns the names of the files written, one a line."""
    from hf_sai.publishing.artifacts import finish_run

    files = finish_run(args.run_dir, twins=args.twin, template=args.template, repo_id=args.repo_id)
    return "\n".join(map(str, files))
