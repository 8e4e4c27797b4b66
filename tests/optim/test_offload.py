"""torchao's CPU offload, which builds one optimizer for each parameter, trains as one SGD-SaI over all of them."""

import pytest
import torch
from torch import nn

from hf_sai import SGDSaI


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 80), nn.GELU(), nn.Linear(80, 64))


def train(model, step, device="cpu"):
    for seed in range(5):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed)).to(device)
        model(x).square().mean().backward()
        step()
        model.zero_grad()
    return [p.detach().cpu() for p in model.parameters()]


@pytest.mark.parametrize("options", [{}, {"update": "factored", "momentum": 0.8}], ids=str)
def test_an_optimizer_for_each_parameter_equals_one_for_all(options):
    together, apart = make_model(), make_model()
    one = SGDSaI(together.parameters(), lr=1e-2, **options)
    many = [SGDSaI([{"params": p}], lr=1e-2, **options) for p in apart.parameters()]
    expected = train(together, one.step)
    assert all(map(torch.equal, expected, train(apart, lambda: [optimizer.step() for optimizer in many])))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"update": "factored", "momentum": 0.8}], ids=str)
def test_torchao_offloads_momentum_and_step(options):
    offload = pytest.importorskip("torchao.optim").CPUOffloadOptimizer
    model, twin = make_model(), make_model().to("cuda")
    expected = train(model, SGDSaI(model.parameters(), lr=1e-2, **options).step)
    offloaded = offload(twin.parameters(), SGDSaI, lr=1e-2, minimal_size=0, **options)
    torch.testing.assert_close(train(twin, offloaded.step, "cuda"), expected, rtol=1e-4, atol=1e-5)
    states = [state for optimizer in offloaded.optim_dict.values() for state in optimizer.state.values()]
    assert len(states) == 4
    assert all(state["momentum_buffer"].is_cpu for state in states)
