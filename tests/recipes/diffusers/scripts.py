"""The scripts of the diffusers recipe as modules, however many recipes have a `train.py`."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "recipes" / "diffusers_text_to_image"


def load_script(name):
    """Import a file of the recipe under a name that no other recipe uses."""
    spec = importlib.util.spec_from_file_location(f"diffusers_{name}", RECIPE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


sys.path.insert(0, str(RECIPE))  # where the scripts find the files beside them, as when they are run
train, make_base = load_script("train"), load_script("make_base")
with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sys.modules, "train", train)
    benchmark, compare = load_script("benchmark"), load_script("compare")
import emoji_data  # noqa: E402, F401
import evaluation  # noqa: E402, F401
import image_data  # noqa: E402, F401
import image_scores  # noqa: E402, F401
import optimizers  # noqa: E402, F401
import sharded  # noqa: E402, F401

sys.path.remove(str(RECIPE))
