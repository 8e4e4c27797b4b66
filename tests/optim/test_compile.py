"""torch.compile of the step: the same numbers as without, and no compiling anew when the learning rate changes."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from hf_sai import SGDSaI, create_sgd_sai_optimizer
from hf_sai.optim.rules import RULES

#: torch 2.6 compiles anew for each rate, up to its limit, 2.13 does not; those between were not tried.
COMPILES_ONCE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


def train(model, optimizer, step, steps, lrs):
    for index in range(steps):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(index))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        for group in optimizer.param_groups:
            group["lr"].fill_(lrs[index])
        step()


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": False}, {"nesterov": True}], ids=str)
def test_a_compiled_step_is_compiled_once_for_all_learning_rates(options):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    plain = copy.deepcopy(model)
    counter = CompileCounter()
    lrs = [1e-3 * (index + 1) for index in range(8)]
    optimizer = SGDSaI(model.parameters(), lr=torch.tensor(0.01), **options)
    train(model, optimizer, optimizer.step, 1, lrs)  # measures

    compiled = torch.compile(lambda: optimizer.step(), backend=counter)
    counts = []

    def step():
        compiled()
        counts.append(counter.frame_count)

    train(model, optimizer, step, 8, lrs)
    reference = SGDSaI(plain.parameters(), lr=torch.tensor(0.01), **options)
    train(plain, reference, reference.step, 1, lrs)
    train(plain, reference, reference.step, 8, lrs)
    assert counts[0] >= 1
    assert not COMPILES_ONCE or counts[2:] == [counts[2]] * 6
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_learning_rate_that_is_a_number_is_compiled_in_and_followed():
    """The numbers are right for each; a scheduler wants ``lr=torch.tensor(...)``, which is compiled once (above)."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    plain = copy.deepcopy(model)
    counter = CompileCounter()
    pair = [SGDSaI(m.parameters(), lr=0.01) for m in (model, plain)]
    compiled = torch.compile(lambda: pair[0].step(), backend=counter)
    counts = []
    for index, rate in enumerate([0.01, 0.01, 0.02, 0.03]):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(index))
        for own, optimizer, step in (
            (model, pair[0], compiled if index else pair[0].step),
            (plain, pair[1], pair[1].step),
        ):
            optimizer.zero_grad()
            own(x).square().mean().backward()
            optimizer.param_groups[0]["lr"] = rate
            step()
        counts.append(counter.frame_count)
    assert not COMPILES_ONCE or counts == [0, 1, 2, 2]  # once more when it first changes, then for all rates
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("update", RULES)
def test_the_first_step_may_be_compiled_which_makes_the_state(update):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    plain = copy.deepcopy(model)
    pair = [create_sgd_sai_optimizer(m, lr=torch.tensor(0.01), update=update) for m in (model, plain)]
    steps = [torch.compile(lambda: pair[0].step(), backend="eager"), pair[1].step]
    for index in range(3):
        for own, step in zip((model, plain), steps, strict=True):
            train(own, pair[own is plain], step, 1, [0.01 * (index + 1)])
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)
        assert {k: getattr(v, "shape", v) for k, v in pair[0].state[p].items()} == {
            k: getattr(v, "shape", v) for k, v in pair[1].state[q].items()
        }
