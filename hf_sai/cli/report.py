"""``hf-sai report``: runs side by side on one HTML page."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["add_parser"]


def add_parser(subparsers: Any) -> None:
    """Adds ``report`` to the ``hf-sai`` command."""
    parser = subparsers.add_parser(
        "report",
        help="lay runs side by side on one HTML page",
        description="Write one HTML page, which needs no network, about runs side by side: results, loss curves, "
        "memory, settings that differ, g-SNR, samples and images.",
    )
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="a run's directory; the run of interest first")
    parser.add_argument("--out", default="report.html", help="the HTML file (default: report.html)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> str:
    """Returns the name of the file written."""
    from hf_sai.publishing.report import write_report

    return str(write_report(args.run_dirs, args.out))
