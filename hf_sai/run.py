"""Runs an unmodified script with ``sgd_sai`` registered: ``python -m hf_sai.run script.py --optim sgd_sai ...``.

Works wherever Python runs a module: ``torchrun ... -m hf_sai.run script.py ...``,
``accelerate launch ... -m hf_sai.run script.py ...``; for modules: ``python -m hf_sai.run -m trl.scripts.sft ...``; and
for commands that a package installs: ``python -m hf_sai.run trl sft ...``. ``hf-sai run ...`` is the same.
The script sees its own ``sys.argv``, ``__main__``, import path, working directory, exit code and traceback. Processes
that it starts know the name, too. With ``--record`` before the script, every Trainer leaves a record.
"""

from __future__ import annotations

import argparse
import atexit
import builtins
import contextlib
import importlib.machinery
import io
import os
import runpy
import shutil
import signal
import sys
import tempfile
import threading
import traceback
import zipfile
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType, TracebackType

from hf_sai.imports import when_imported
from hf_sai.startup import following

__all__ = ["CannotRunError", "add_arguments", "main", "require_target", "run_followed", "run_target", "show_error"]

#: With ``python -P`` or PYTHONSAFEPATH neither a script's folder nor the working directory is on the import path.
_SAFE_PATH = getattr(sys.flags, "safe_path", False)

# Whose frames stand between a command and the script that it runs.
_OWN_FILES = {__file__, runpy.__file__, "<frozen runpy>"}


def main() -> None:
    """Run what the command line names as ``__main__``.

    Raises:
        SystemExit: With code 2 if the command line is wrong, else with the script's own code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m hf_sai.run", description="Run an unmodified script in which --optim sgd_sai is known."
    )
    add_arguments(parser)
    options = parser.parse_args()
    try:
        require_target(options)
    except ValueError as error:
        parser.error(str(error))
    sys.excepthook = lambda kind, error, trace: show_error(error, trace)
    try:
        run_followed(options)
    except CannotRunError as error:
        parser.error(str(error))


class CannotRunError(ValueError):
    """The target cannot be run: nothing of it has been."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the runner's own arguments, which stand before the script's."""
    parser.add_argument("--record", action="store_true", help="every Trainer leaves run_record.json in its output_dir")
    parser.add_argument("-m", dest="is_module", action="store_true", help="the target is a module, as in python -m")
    parser.add_argument("target", help="path of a script, a command such as trl, or the name of a module after -m")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="everything after the target is the script's own")


def require_target(options: argparse.Namespace) -> None:
    """Raise ValueError unless the target is there; whether a module is, shows when it runs."""
    if not options.is_module and not os.path.exists(options.target) and _command(options.target) is None:
        raise ValueError(
            f"no script {options.target!r} in {os.getcwd()!r}, and no package here installs a command of that name; "
            f"for a module write -m {options.target}"
        )


def run_followed(options: argparse.Namespace) -> None:
    """Run the target, see to the processes that it starts, and say at the end if SGD-SaI was not used.

    Args:
        options: What a parser with :func:`add_arguments` has read.

    Raises:
        SystemExit: The script's own.
    """
    _follow(record=options.record)
    try:
        run_target(options.target, options.arguments, is_module=options.is_module)
    except SystemExit as end:
        if end.code in (None, 0):
            _say_if_ours_was_not_used(options.arguments)
        raise
    except KeyboardInterrupt as interrupt:
        _end_as_python_does(interrupt)
    _say_if_ours_was_not_used(options.arguments)


def run_target(target: str, arguments: Sequence[str], *, is_module: bool) -> None:
    """Run a script or module as ``__main__`` in this process; what it raises comes out, ``SystemExit`` too.

    Args:
        target: Path of a script, or the name of a module or of an installed command. A file of that name comes first.
        arguments: The target's own command line, without its name.
        is_module: Whether it is the name of a module.

    Raises:
        CannotRunError: There is no such module, or nothing in there that could be run.
    """
    try:
        _run_target(target, arguments, is_module=is_module)
    except (ImportError, OSError) as error:
        frames = traceback.walk_tb(error.__traceback__)
        if any(frame.f_code.co_filename not in _OWN_FILES for frame, _ in frames):
            raise  # out of the script, or of something that it imports
        told = error.strerror if isinstance(error, OSError) else error
        raise CannotRunError(
            f"cannot run {target!r}: {told}. Give a script, a folder with a __main__.py, or after -m a module that can "
            "be imported from here."
        ) from None


def _run_target(target: str, arguments: Sequence[str], *, is_module: bool) -> None:
    sys.argv = [target, *arguments]
    if is_module:
        if not _SAFE_PATH:
            sys.path[0] = os.getcwd()
        runpy.run_module(target, run_name="__main__", alter_sys=True)
        return
    command = None if os.path.exists(target) else _command(target)
    if command is not None:
        sys.exit(command.load()())
    if os.path.isdir(target) or zipfile.is_zipfile(target):
        if not _SAFE_PATH:
            del sys.path[0]  # the target itself takes its place
        runpy.run_path(os.path.abspath(target), run_name="__main__")  # absolute, for the script may go elsewhere
        return
    # ``python -m`` put the working directory first on the import path; a script has its own folder there.
    if not _SAFE_PATH:
        sys.path[0] = os.path.dirname(os.path.realpath(target))
    if target.endswith(".pyc"):
        runpy.run_path(target, run_name="__main__")
        return
    # As Python does it: an absolute __file__, for a script may go elsewhere, and sys.argv as it was given, neither of
    # which runpy leaves so; and a module that is still there when threads and atexit's functions run.
    path = os.path.abspath(target)
    module = ModuleType("__main__")
    loader = importlib.machinery.SourceFileLoader("__main__", path)
    vars(module).update(__file__=path, __cached__=None, __loader__=loader, __builtins__=builtins)
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec")
    sys.modules["__main__"] = module
    exec(code, vars(module))


def show_error(error: BaseException, trace: TracebackType | None = None) -> None:
    """Show an uncaught exception as Python does, from the script's first frame on."""
    first = trace = trace or error.__traceback__
    while first is not None and first.tb_frame.f_code.co_filename not in _OWN_FILES:
        first = first.tb_next  # what called run_target
    trace = first or trace
    while trace is not None and trace.tb_frame.f_code.co_filename in _OWN_FILES:
        trace = trace.tb_next
    sys.__excepthook__(type(error), error.with_traceback(trace), trace)


def _command(name: str) -> EntryPoint | None:
    """What a package has installed as the command of this name, in this Python."""
    return next(iter(entry_points(group="console_scripts", name=name)), None)


def _follow(*, record: bool) -> None:
    """Prepare this process and, by their environment, those that the script will start."""
    if following.NOTES not in os.environ:
        with contextlib.suppress(OSError):  # no folder for temporary files: no line at the end
            folder = os.environ[following.NOTES] = tempfile.mkdtemp(prefix="hf-sai-run-")
            atexit.register(_remove, folder, os.getpid())
    when_imported("torch.optim.optimizer", following.note_steps)
    if record:
        os.environ[following.RECORD] = "1"
        when_imported("transformers.trainer", following.record_every_trainer)
    startup = os.path.dirname(os.path.abspath(following.__file__))
    path = os.environ.get("PYTHONPATH", "")
    if startup not in path.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [startup, path]))


def _remove(folder: str, process: int) -> None:
    if os.getpid() == process:  # not a fork of it
        shutil.rmtree(folder, ignore_errors=True)


def _say_if_ours_was_not_used(arguments: Sequence[str]) -> None:
    """One line at the end of a run that trained with other optimizers than the one that it was started for."""
    others = following.stepped()
    is_known = following.NOTES in os.environ
    if following.OURS in others or not is_known or os.environ.get("RANK", "0") != "0":
        return
    if not others and "sgd_sai" not in " ".join(arguments):
        return  # such as --help
    did = f"stepped {', '.join(sorted(others))}, and SGD-SaI was not among them" if others else "stepped no optimizer"
    sys.stderr.write(
        f"hf_sai.run: this run {did}. A Trainer script takes --optim sgd_sai; one that makes its optimizer itself, by "
        "an option of its own, does not know the name.\n"
    )


def _end_as_python_does(interrupt: KeyboardInterrupt) -> None:
    """End by the signal that came, so that shells and launchers see an interruption (130 in a shell)."""
    show_error(interrupt)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
    sys.exit(130)


if __name__ == "__main__":
    main()
