"""Today's trainings are those that were recorded, and a training that is not would be noticed.

With ``HF_SAI_EXACT_PINS=1`` every bit must be as recorded: for a change that must change nothing, on the machine and
with the torch that made the pins.
"""

import os
from dataclasses import replace

import pytest
import torch
from cases import CASES
from comparison import excesses
from make_pins import load_pins
from training import STEPS, train

PINS = load_pins()
EXACT = os.environ.get("HF_SAI_EXACT_PINS") == "1"

# One for each tolerance, and for each rule of those.
WATCHED = [
    f"gpt2 {dtype} {path} {rule}"
    for dtype, path in (("float32", "numba"), ("float32", "torch"), ("float16", "plain"), ("bfloat16", "multi-tensor"))
    for rule in ("published", "factored")
] + [
    *(f"gpt2 float32 numba published momentum_dtype={kind}" for kind in ("bfloat16", "8bit", "4bit")),
    "gpt2 float32 numba published momentum=0.0",
    "gpt2 bfloat16 plain rows",
    "gpt2 bfloat16 plain published momentum_dtype=8bit",
    "vit bfloat16 plain published",
    "vit float32 numba published normalize=True",
    "llama_lora float32 plain published grouped",
    "llama_lora bfloat16 plain factored grouped",
]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def too_far(outcome, name):
    far = excesses(outcome, PINS[name], CASES[name])
    return {what: f"{excess:.3g} times what is allowed" for what, excess in far.items() if not excess <= 1}


def test_every_case_is_pinned_and_no_other():
    assert CASES.keys() == PINS.keys()


@pytest.mark.parametrize("name", CASES)
def test_training_is_as_pinned(name):
    outcome = train(CASES[name])
    assert not too_far(outcome, name)
    if EXACT:
        assert outcome.sha256 == PINS[name].sha256


# --- what the pins would notice


@pytest.mark.parametrize("lr_factor", [0.95, 1.05])
@pytest.mark.parametrize("name", WATCHED)
def test_a_scale_that_is_five_percent_off_is_noticed(name, lr_factor):
    assert too_far(train(CASES[name], lr_factor), name)


@pytest.mark.parametrize("name", WATCHED)
def test_a_missing_step_is_noticed(name):
    assert too_far(train(CASES[name], steps=STEPS - 1), name)


@pytest.mark.parametrize("name", WATCHED)
def test_no_update_at_all_is_noticed_in_every_tensor_that_moved(name):
    pinned = PINS[name]
    still = replace(pinned, movement=torch.zeros_like(pinned.movement), norms=pinned.norms * torch.tensor([0.0, 1.0]))
    noticed = {what.split(": ")[0] for what in too_far(still, name)}
    # In bfloat16 some weights of norms, which are 1, move by no more than their rounding.
    unnoticed = len(pinned.gsnr) - len(noticed)
    assert unnoticed <= (5 if " bfloat16 " in name else 0)


@pytest.mark.parametrize("name", WATCHED)
def test_a_wrong_gsnr_or_momentum_is_noticed_in_every_tensor(name):
    pinned = PINS[name]
    assert len(too_far(replace(pinned, gsnr=pinned.gsnr * 1.01), name)) == len(pinned.gsnr)
    if len(pinned.momentum):
        wrong = replace(pinned, momentum=-pinned.momentum, norms=pinned.norms * torch.tensor([1.0, 0.9]))
        assert len(too_far(wrong, name)) == 2 * len(pinned.gsnr)


def test_an_update_in_the_wrong_direction_or_of_nan_is_noticed():
    name = "gpt2 float32 plain published"
    assert too_far(replace(PINS[name], movement=-PINS[name].movement), name)
    assert too_far(replace(PINS[name], movement=PINS[name].movement * torch.nan), name)
    assert too_far(replace(PINS[name], norms=PINS[name].norms * torch.nan), name)
