"""``hf-sai plot``: pictures of one or several runs, from their records."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hf_sai.runs.record import RunRecord

__all__ = ["add_parser"]


def add_parser(subparsers: Any) -> None:
    """Adds ``plot`` to the ``hf-sai`` command."""
    parser = subparsers.add_parser(
        "plot",
        help="draw loss curves, g-SNR and update ratios of runs",
        description="Draw the loss curves of all runs over steps and over bytes of optimizer state, and each run's "
        "g-SNR per layer and role and its update-to-weight ratios.",
    )
    parser.add_argument("records", nargs="+", metavar="RECORD", help="a run's directory, or its run_record.json")
    parser.add_argument("--out", default="pictures", help="folder for the PNG files (default: pictures)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> str:
    """Returns the names of the pictures drawn, one a line."""
    from hf_sai.publishing.plots import save_pictures

    files = save_pictures([RunRecord.load(record) for record in args.records], Path(args.out))
    return "\n".join(map(str, files))
