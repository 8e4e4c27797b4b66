"""Runs an unmodified script with ``sgd_sai`` registered: ``python -m hf_sai.run script.py --optim sgd_sai ...``.

Works wherever Python runs a module: ``torchrun ... -m hf_sai.run script.py ...``,
``accelerate launch ... -m hf_sai.run script.py ...``; and for modules: ``python -m hf_sai.run -m trl.scripts.sft ...``.
The script sees its own ``sys.argv``, ``__main__``, import path, working directory, exit code and traceback.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from types import TracebackType

__all__ = ["main", "run_target"]


def main() -> None:
    """Run the script or module that the command line names as ``__main__``.

    Raises:
        SystemExit: With code 2 if the command line is wrong, else with the script's own code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m hf_sai.run", description="Run an unmodified script in which --optim sgd_sai is known."
    )
    parser.add_argument("-m", dest="is_module", action="store_true", help="the target is a module, as in python -m")
    parser.add_argument("target", help="path of a script, or the name of a module after -m")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="everything after the target is the script's own")
    options = parser.parse_args()
    if not options.is_module and not os.path.exists(options.target):
        parser.error(f"no script {options.target!r} in {os.getcwd()!r}; for a module write -m {options.target}")

    sys.excepthook = _without_runner_frames
    run_target(options.target, options.arguments, is_module=options.is_module)


def run_target(target: str, arguments: Sequence[str], *, is_module: bool) -> None:
    """Run a script or module as ``__main__`` in this process; what it raises comes out, ``SystemExit`` too.

    Args:
        target: Path of a script, or the name of a module.
        arguments: The target's own command line, without its name.
        is_module: Which of the two it is.
    """
    sys.argv = [target, *arguments]
    if is_module:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        # ``python -m`` put the working directory first on the import path; a script has its own folder there.
        sys.path[0] = os.path.dirname(os.path.realpath(target))
        runpy.run_path(target, run_name="__main__")


def _without_runner_frames(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Show an uncaught exception as Python does, from the script's first frame on."""
    own = {__file__, runpy.__file__, "<frozen runpy>"}
    while traceback is not None and traceback.tb_frame.f_code.co_filename in own:
        traceback = traceback.tb_next
    sys.__excepthook__(kind, error.with_traceback(traceback), traceback)


if __name__ == "__main__":
    main()
