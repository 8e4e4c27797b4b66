"""States that version 0.1.0 and the official code wrote: they load, keep what was measured and train on as they did."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from internals import momentum, rule_options
from safetensors.torch import load_file
from tiny_trainer import STEPS, trainer
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from hf_sai import SGDSaI

STATES = Path(__file__).parents[1] / "fixtures" / "states"

#: Name of the file -> what the optimizer was built with, and how far the further steps may be from those of then, in
#: parts of their size: where numbers are kept in fewer bits, rounding decides about more.
OWN = {
    "published": ({}, 1e-4),
    "rows": ({"rule": "rows"}, 1e-4),
    "factored": ({"rule": "factored"}, 1e-4),
    "factored_of_bfloat16": ({"rule": "factored"}, 0.02),
    "bfloat16": ({"momentum_dtype": torch.bfloat16}, 5e-3),
    "8bit": ({"momentum_dtype": "8bit"}, 0.02),
    "4bit": ({"momentum_dtype": "4bit"}, 0.02),
}


def read(name):
    """The file, and parameters as they were when the state was saved."""
    saved = torch.load(STATES / f"{name}.pt", weights_only=True)
    return saved, {key: nn.Parameter(value.clone()) for key, value in saved["weights"].items()}


def build(saved, params, rule="published", **options):
    groups = [
        {"params": [(name, params[name]) for name in group["param_names"]]}
        for group in saved["state_dict"]["param_groups"]
    ]
    return SGDSaI(groups, **rule_options(rule), **options)


def continue_training(optimizer, saved, params):
    for gradients in saved["gradients"]:
        for name, p in params.items():
            p.grad = gradients[name].to(p.dtype, copy=True)  # it may be changed in place
        optimizer.step()


def assert_moved_as_then(params, saved, tolerance):
    for name, p in params.items():
        start, end = saved["weights"][name].float(), saved["expected"][name].float()
        movement = p.detach().float() - start
        assert (movement - (end - start)).norm() <= tolerance * (end - start).norm(), name
        assert (end - start).norm() > 0, name


@pytest.mark.parametrize("built_alike", [True, False], ids=["built alike", "options from the state"])
@pytest.mark.parametrize("name", OWN)
def test_an_old_state_loads_and_continues_as_it_did(name, built_alike):
    saved, params = read(name)
    options, tolerance = OWN[name]
    optimizer = build(saved, params, **(options if built_alike else {}))
    optimizer.load_state_dict(saved["state_dict"])
    assert {key: optimizer.state[p]["gsnr"] for key, p in params.items()} == saved["gsnr"]
    continue_training(optimizer, saved, params)
    assert_moved_as_then(params, saved, tolerance)
    measured_then = {key: value for key, value in saved["gsnr"].items() if value}
    assert {key: optimizer.state[params[key]]["gsnr"] for key in measured_then} == measured_then
    assert not optimizer.gsnr_report().unmeasured


@pytest.mark.parametrize("name", OWN)
def test_an_old_state_loads_before_the_first_step_and_over_an_optimizer_that_has_stepped(name):
    ends = []
    for has_stepped in (False, True):
        saved, params = read(name)
        optimizer = build(saved, params, **OWN[name][0])
        if has_stepped:
            continue_training(optimizer, saved, params)
            for key, p in params.items():
                p.data.copy_(saved["weights"][key])
        optimizer.load_state_dict(saved["state_dict"])
        continue_training(optimizer, saved, params)
        ends.append(params)
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


@pytest.mark.parametrize("name", OWN)
def test_what_is_saved_again_continues_alike(name):
    saved, params = read(name)
    first = build(saved, params, **OWN[name][0])
    first.load_state_dict(saved["state_dict"])
    again, params_again = read(name)
    second = build(again, params_again, **OWN[name][0])
    second.load_state_dict(first.state_dict())
    continue_training(second, again, params_again)
    assert_moved_as_then(params_again, again, OWN[name][1])


def test_an_old_state_without_its_momentum_or_rule_would_be_noticed():
    for name in ("published", "factored"):
        saved, params = read(name)
        optimizer = build(saved, params)
        state_dict = saved["state_dict"]
        if name == "published":
            for state in state_dict["state"].values():
                state["momentum_buffer"].zero_()
        else:
            state_dict["param_groups"] = [
                {key: value for key, value in group.items() if value != "factored"}
                for group in state_dict["param_groups"]
            ]
        optimizer.load_state_dict(state_dict)
        continue_training(optimizer, saved, params)
        with pytest.raises(AssertionError):
            assert_moved_as_then(params, saved, 0.05)


def test_an_official_state_gives_its_gsnr_and_continues_as_the_official_code_does():
    saved, params = read("official")
    optimizer = SGDSaI(params.items())
    optimizer.load_state_dict(saved["state_dict"])
    for index, (name, p) in enumerate(params.items()):
        assert optimizer.state[p]["gsnr"] == saved["gsnr"][name]
        assert torch.equal(momentum(optimizer, p), saved["state_dict"]["state"][index]["momentum_buffer"])
    continue_training(optimizer, saved, params)
    assert_moved_as_then(params, saved, 1e-4)
    assert {name: optimizer.state[p]["gsnr"] for name, p in params.items()} == saved["gsnr"]


def test_an_old_trainer_checkpoint_resumes_to_the_end_of_the_uninterrupted_training(tmp_path):
    shutil.copytree(STATES / "trainer_checkpoint", tmp_path / "checkpoint-2")
    (rule,) = rule_options("factored").items()
    run = trainer(tmp_path / "resumed", optim_args="{}={},momentum=0.8".format(*rule))
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert run.state.global_step == STEPS
    start = load_file(STATES / "trainer_checkpoint" / "model.safetensors")
    end = load_file(STATES / "trainer_end.safetensors")
    for name, p in run.model.named_parameters():
        moved, moved_then = p.detach() - start[name], end[name] - start[name]
        assert (moved - moved_then).norm() <= 1e-4 * moved_then.norm(), name


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_old_distributed_checkpoint_loads_and_continues_as_it_did():
    saved, _ = read("distributed_checkpoint")
    model = nn.ParameterDict({name: torch.zeros_like(value) for name, value in saved["weights"].items()})
    optimizer = SGDSaI(model.named_parameters(), **rule_options("factored"))
    weights, states = get_state_dict(model, optimizer)
    # The option was called normalize_gradient then, so that the group has a key which the checkpoint lacks.
    renamed = DefaultLoadPlanner(allow_partial_load=True)
    place = str(STATES / "distributed_checkpoint")
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=place, planner=renamed)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
    params = dict(model.named_parameters())
    assert {name: optimizer.state[p]["gsnr"] for name, p in params.items()} == saved["gsnr"]
    assert all(torch.equal(p, saved["weights"][name]) for name, p in params.items())
    continue_training(optimizer, saved, params)
    assert_moved_as_then(params, saved, 1e-4)


def test_every_tensor_file_loads_with_weights_only():
    files = [*STATES.glob("*.pt"), *(STATES / "trainer_checkpoint").glob("*.pt")]
    assert len(files) == len(OWN) + 4
    for file in files:
        torch.load(file, weights_only=True)


def test_the_states_stay_small():
    assert sum(path.stat().st_size for path in STATES.rglob("*") if path.is_file()) < 300_000
