"""torch.compile of the step: the same numbers as without, and no compiling anew when the learning rate changes."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from hf_sai import SGDSaI


def train(model, optimizer, step, steps, lrs):
    for index in range(steps):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(index))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        for group in optimizer.param_groups:
            group["lr"].fill_(lrs[index])
        step()


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": False}], ids=str)
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
    assert counts[2:] == [counts[2]] * 6
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)
