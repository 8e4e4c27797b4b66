"""Runs at the start of every Python process that a script under ``python -m hf_sai.run`` starts: it knows ``sgd_sai``.

``PYTHONPATH`` leads here, which spawned and forkserver workers inherit, and programs that a script starts. Torch and
transformers are not imported by this; whatever fails leaves the process as it would have been.
"""

import contextlib
import importlib.machinery
import importlib.util
import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))


class _BeforeArguments:
    """Imports hf_sai, which registers the names, right before somebody imports transformers' arguments."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "transformers.training_args" or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        with contextlib.suppress(Exception):
            importlib.import_module("hf_sai")
        for finder in list(sys.meta_path):
            spec = finder.find_spec(fullname, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                return spec
        return None


def _follow_the_runner():
    following = _by_path("_hf_sai_following", os.path.join(_HERE, "following.py"))
    # By its path, since the package itself imports torch.
    imports = _by_path("_hf_sai_imports", os.path.join(os.path.dirname(_HERE), "imports.py"))
    if following.NOTES in os.environ:
        imports.when_imported("torch.optim.optimizer", following.note_steps)
    if following.RECORD in os.environ:
        imports.when_imported("transformers.trainer", following.record_every_trainer)
    sys.meta_path.insert(0, _BeforeArguments())


def _by_path(name, path):
    loader = importlib.machinery.SourceFileLoader(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, loader))
    loader.exec_module(module)
    return module


def _run_the_next_one():
    """Python runs one sitecustomize; the one that it would have found without us comes now."""
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or os.curdir) != _HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", sys.path)
    if spec is not None and spec.loader is not None:
        module = sys.modules["sitecustomize"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


with contextlib.suppress(Exception):  # another Python than ours, or one without torch
    _follow_the_runner()
_run_the_next_one()
