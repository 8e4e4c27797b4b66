"""Gradient release: the same training, and never all gradients at once."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from hf_sai import SGDSaI


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(16, 16), nn.Tanh())])


def train(model, optimizer, steps=5, observe=lambda: None):
    for step in range(steps):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        (model(x) - x.roll(1, 1)).square().mean().backward()
        observe()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("options", [{}, {"momentum": 0.0}, {"momentum_dtype": torch.bfloat16}], ids=str)
def test_release_changes_when_but_not_what_is_computed(options):
    plain, released = make_model(), make_model()
    train(plain, SGDSaI(plain.named_parameters(), lr=3e-3, **options))
    optimizer = SGDSaI(released.named_parameters(), lr=3e-3, gradient_release=True, **options)
    train(released, optimizer)
    for p, q in zip(plain.parameters(), released.parameters(), strict=True):
        assert torch.equal(p, q)
    assert not optimizer.gsnr_report().unmeasured


def test_no_gradient_is_left_after_backward_and_few_stand_at_once():
    model = make_model()
    optimizer = SGDSaI(model.parameters(), lr=1e-3, gradient_release=True)
    parameters, at_once = list(model.parameters()), []
    for p in parameters:
        p.register_hook(lambda gradient: at_once.append(sum(q.grad is not None for q in parameters)))

    def observe():
        assert all(p.grad is None for p in parameters)

    train(model, optimizer, steps=1, observe=observe)
    assert len(at_once) == len(parameters) == 12
    assert max(at_once) <= 2


def test_learning_rate_schedules_act_at_the_next_backward():
    model = nn.Linear(2, 2, bias=False)
    optimizer = SGDSaI(model.parameters(), lr=1.0, weight_decay=0.0, gradient_release=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step == 1))
    before = model.weight.detach().clone()
    for moved in (False, True):
        model(torch.randn(4, 2)).square().sum().backward()
        assert torch.equal(model.weight, before) is not moved
        optimizer.step()
        scheduler.step()


def test_a_loaded_state_is_used():
    model, resumed = make_model(), make_model()
    optimizer = SGDSaI(model.parameters(), lr=3e-3)
    train(model, optimizer)
    resumed.load_state_dict(model.state_dict())
    again = SGDSaI(resumed.parameters(), lr=1.0, gradient_release=True)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer)
    train(resumed, again)
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))


def test_accumulating_gradients_is_an_error():
    model = make_model()
    SGDSaI(model.parameters(), gradient_release=True)  # keeps no reference: nothing to update
    optimizer = SGDSaI(model.parameters(), gradient_release=True)
    model(torch.randn(2, 16)).sum().backward()
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=1"):
        model(torch.randn(2, 16)).sum().backward()
    optimizer.step()
    model(torch.randn(2, 16)).sum().backward()


def test_normalize_and_grad_scaler_are_refused():
    with pytest.raises(ValueError, match="gradient_release and normalize exclude each other"):
        SGDSaI(make_model().parameters(), normalize=True, gradient_release=True)
    model = make_model()
    optimizer = SGDSaI(model.parameters(), gradient_release=True)
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match="GradScaler"):  # not only in scaler.step, after backward has updated
        scaler.scale([model(torch.randn(2, 16)).sum()])
    other = make_model()
    scaler.scale(other(torch.randn(2, 16)).sum()).backward()
    with pytest.raises(ValueError, match="GradScaler"):
        scaler.step(optimizer)
    with pytest.raises(ValueError, match="gradient_release must be true or false"):
        SGDSaI(model.parameters(), gradient_release="yes")


def test_the_optimizer_is_not_kept_alive_by_its_hooks():
    model = make_model()
    optimizer = SGDSaI(model.parameters(), gradient_release=True)
    reference = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert reference() is None
    model(torch.randn(2, 16)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_many_processes_are_refused_before_the_first_update(monkeypatch):
    model = make_model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = SGDSaI(model.parameters(), gradient_release=True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="the 2 processes have been averaged"):
        model(torch.randn(2, 16)).sum().backward()
    assert optimizer.gsnr_report().unmeasured
    assert all(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))


class InterruptedTrainingError(RuntimeError):
    """What a caught out-of-memory error or Ctrl-C is in training."""


@pytest.mark.parametrize("resets", [True, False], ids=["zero_grad", "nothing"])
def test_a_backward_pass_that_was_interrupted_does_not_forbid_the_next(resets):
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    optimizer = SGDSaI([*first.parameters(), *second.parameters()], lr=1e-2, gradient_release=True)
    optimizer.step()
    fails = True

    def interrupt(gradient):
        if fails:
            raise InterruptedTrainingError

    hidden = first(torch.randn(2, 4))
    hidden.register_hook(interrupt)
    with pytest.raises(InterruptedTrainingError):
        second(hidden).sum().backward()
    if resets:
        optimizer.zero_grad()
    fails = False
    before = [p.detach().clone() for p in second.parameters()]
    second(first(torch.randn(2, 4))).sum().backward()
    assert not any(torch.equal(a, p) for a, p in zip(before, second.parameters(), strict=True))
    with pytest.raises(ValueError, match="a second gradient before optimizer"):
        second(first(torch.randn(2, 4))).sum().backward()
