"""``hf-sai publish``: a finished run on the Hub; without ``--yes`` it only says what it would upload."""

from __future__ import annotations

import argparse
from typing import Any

from hf_sai.runs.units import human_bytes

__all__ = ["add_parser"]


def add_parser(subparsers: Any) -> None:
    """Adds ``publish`` to the ``hf-sai`` command."""
    parser = subparsers.add_parser(
        "publish",
        help="upload a finished run to the Hub (a dry run by default)",
        description="Upload weights, configuration, card, record and pictures of a finished run in one commit. "
        "Without --yes nothing is sent: every file is listed with its size. The access token comes from `hf auth "
        "login` or HF_TOKEN.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the run's directory")
    parser.add_argument("repo_id", metavar="REPO", help="name or namespace/name of the repository")
    parser.add_argument("--yes", action="store_true", help="upload; default: only list the files")
    parser.add_argument("--public", action="store_true", help="for everybody to see (default: a private repository)")
    parser.add_argument("--revision", help="branch to commit to; made where missing (default: main)")
    parser.add_argument("--message", default="Publish a run of hf-sai", help="the commit's message")
    parser.add_argument(
        "--include", action="append", default=[], metavar="PATTERN", help="upload these files too, such as optimizer.pt"
    )
    parser.add_argument(
        "--update",
        action="store_true",
        help="commit also to a repository that holds something else than a run, or a card with words of a person",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> str:
    """Returns what would be uploaded, or where it is now."""
    from hf_sai.publishing.files_to_publish import plan_files
    from hf_sai.publishing.publish import publish, require_possible_name, visibility
    from hf_sai.publishing.shortcomings import shortcomings

    require_possible_name(args.repo_id)
    plan = plan_files(args.run_dir, include=args.include)
    missing = [f"missing    {sentence}" for sentence in shortcomings(args.run_dir, plan)]
    if args.yes:
        url = publish(
            args.run_dir,
            args.repo_id,
            private=not args.public,
            revision=args.revision,
            include=args.include,
            update=args.update,
            message=args.message,
        )
        seen = visibility(args.repo_id)
        if args.public and seen == "private":
            missing.append("private    as the repository was before: --public is for new ones, its settings change it")
        return "\n".join([f"published, {seen}: {url}", *missing])
    lines = [f"{human_bytes(size):>9}  {name}" for name, size in plan.files]
    lines += [f"left out   {name} ({reason})" for name, reason in plan.left_out]
    return "\n".join(
        [
            f"Dry run: {len(plan.files)} files, {human_bytes(plan.total_bytes)}, would go to {args.repo_id}, "
            f"{'for everybody to see' if args.public else 'as a private repository'}. "
            "Add --yes to upload them.",
            *lines,
            *missing,
        ]
    )
