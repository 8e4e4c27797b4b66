"""benchmarks/lora_rules: its rules are what they are called, candidates train, and what chose is not what reports."""

import math
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.lora_rules import __main__ as program
from benchmarks.lora_rules.rules import CANDIDATES, PairOptimizer, Rule, pairs_of, power
from hf_sai import SGDSaI
from recipes.common.lr_search import Results


def pair(seed=0, inputs=7, outputs=6, rank=3):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rank, inputs), (outputs, rank)]
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]


def train(factors, optimizer, steps, seed=1):
    """Steps along gradients of B A that do not depend on the factors."""
    a, b = factors
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        of_product = torch.randn(len(b), a.shape[1], generator=generator, dtype=torch.float64)
        a.grad, b.grad = b.detach().mT @ of_product, of_product @ a.detach().mT
        optimizer.step()
    return b.detach() @ a.detach()


def test_without_whitening_the_factored_rule_is_that_of_the_package():
    mine, theirs = pair(), pair()
    train(mine, PairOptimizer([tuple(mine)], 1e-3, Rule()), 1)
    optimizer = SGDSaI(theirs, lr=1e-3, weight_decay=0.0, momentum=0.8, update="factored")
    train(theirs, optimizer, 1)
    for own, other, start in zip(mine, theirs, pair(), strict=True):
        scale = optimizer.state[other]["gsnr"] / math.sqrt(other.numel())
        torch.testing.assert_close((own - start) * scale, other - start, rtol=1e-5, atol=1e-9)


IN_PRODUCT = {"size": "orthogonal", "before": 0.5, "after": 0.5, "in_product": True, "floor": 0.0}


@pytest.mark.parametrize("settings", [IN_PRODUCT, IN_PRODUCT | {"nesterov": True, "momentum_a": 0.0}])
def test_in_the_product_each_factor_moves_it_by_the_learning_rate_in_every_direction(settings):
    a, b = pair()
    before = a.detach().clone(), b.detach().clone()
    train([a, b], PairOptimizer([(a, b)], 1e-2, Rule(**settings)), 1)
    for moved in ((b - before[1]) @ before[0], before[1] @ (a - before[0])):
        torch.testing.assert_close(torch.linalg.svdvals(moved.detach())[:3], torch.full((3,), 1e-2).double())


def test_in_the_product_it_does_not_matter_how_the_product_is_factored():
    mixed = torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    products = []
    for basis in (torch.eye(3, dtype=torch.float64), mixed):
        a, b = pair()
        factors = [nn.Parameter(torch.linalg.solve(basis, a.detach())), nn.Parameter(b.detach() @ basis)]
        products.append(train(factors, PairOptimizer([tuple(factors)], 1e-2, Rule(**IN_PRODUCT)), 1))
    torch.testing.assert_close(*products)


def test_whitening_by_shape_alone_changes_no_norm_of_the_step():
    steps = []
    for after in (0.0, 0.5):
        a, b = pair()
        start = b.detach().clone()
        train([a, b], PairOptimizer([(a, b)], 1e-2, Rule(size="orthogonal", after=after)), 1)
        steps.append(b.detach() - start)
    assert not torch.allclose(*steps, rtol=1e-2)
    torch.testing.assert_close(*(step.norm() for step in steps))


def test_a_ratio_moves_b_faster_and_a_slower():
    a, b = pair()
    rates = [group["lr"] for group in PairOptimizer([(a, b)], 1e-2, Rule(ratio=4.0)).param_groups]
    assert rates == [5e-3, 2e-2]


def test_powers_are_of_the_matrix():
    gram = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    torch.testing.assert_close(power(gram, -1), gram.inverse())
    torch.testing.assert_close(power(gram, 0.5) @ power(gram, 0.5), gram)


def adapted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 7))
    return get_peft_model(model, LoraConfig(r=4, target_modules=["0", "2"]))


@pytest.mark.parametrize("name", CANDIDATES)
def test_every_candidate_learns_with_a_and_b(name):
    model = adapted()
    factors = [factor for pair in pairs_of(model) for factor in pair]
    start = [factor.detach().clone() for factor in factors]
    optimizer = CANDIDATES[name].build(model, 1e-2 * CANDIDATES[name].rates[1])
    getattr(optimizer, "train", lambda: None)()  # a schedule-free one asks for it
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(1))
    y = x[:, :7].tanh()
    losses = []
    for _ in range(40):
        loss = nn.functional.mse_loss(model(x), y)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    assert all(not torch.equal(*both) for both in zip(start, factors, strict=True))


class Stub:
    """A task whose test loss is its learning rate's distance from 4, and its validation loss as well for seed 0."""

    task = {}  # noqa: RUF012

    def run(self, build, lr, seed, *, rank, steps, report, constant):
        assert not constant
        assert report == (seed > 0)
        loss = abs(lr - 4) + 0.01 * seed
        return {"eval_loss": loss, "state_bytes": rank, "train_seconds": 0.0} | ({"test_loss": loss} if report else {})


def test_the_seed_that_chooses_the_rate_does_not_report(tmp_path, monkeypatch, capsys):
    module = type(sys)("stub")
    module.Stub, module.LEARNING_RATE, module.RANK, module.STEPS = Stub, 1.0, 8, 60
    monkeypatch.setitem(sys.modules, "benchmarks.lora_rules.stub", module)
    monkeypatch.setitem(program.TASKS, "stub", ("stub", "Stub"))
    monkeypatch.setattr(program.torch, "set_num_threads", lambda count: None)
    flags = ["stub", "--candidates", "adamw", "orthogonal", "--results", str(tmp_path)]
    program.main(flags)
    printed = capsys.readouterr().out
    results = Results(tmp_path / "stub_rank_8_steps_60.json", {})
    assert {run["seed"] for run in results.find("adamw")} == {0, 1, 2, 3}
    assert {run["learning_rate"] for run in results.find("adamw") if run["seed"]} == {4.0}
    assert "| 0.0200 ± 0.0100 | 0.0200 ± 0.0100 | 3 |" in printed
    count = len(results.runs)
    program.main(flags)
    assert len(Results(results.path, {}).runs) == count  # nothing is repeated
    program.main([*flags, "--table"])
    assert capsys.readouterr().out.strip().splitlines()[-4:] == printed.strip().splitlines()[-4:]


def test_losses_are_compared_seed_by_seed(tmp_path):
    results = Results(tmp_path / "runs.json", {})
    of_seeds = {"adamw": {0: 2.0, 1: 3.0, 2: 5.0, 3: 4.0}, "averaged": {0: 1.9, 1: 2.8, 2: 4.9, 4: 9.0}}
    for candidate, losses in of_seeds.items():
        for seed, loss in losses.items():
            run = {"candidate": candidate, "learning_rate": 0.1, "seed": seed, "eval_loss": loss, "test_loss": loss}
            results.add(run)
    ours, theirs = program.table(results, ["adamw", "averaged"]).splitlines()[-1:1:-1]
    assert "| 0.1500 ± 0.0707 in 2 of 2 seeds | 0.2 |" in ours  # 0.2 and 0.1; seeds 3 and 4 have no other
    assert "| - | - |" in theirs


@pytest.mark.longer
def test_the_byte_model_learns_with_lora_on_what_it_has_not_seen(monkeypatch):
    byte_model = pytest.importorskip("benchmarks.lora_rules.byte_model")
    monkeypatch.setattr(byte_model, "PRETRAINING_STEPS", 3)
    monkeypatch.setattr(byte_model, "EVALUATED_ROWS", 8)
    task = byte_model.ByteModel()
    build = CANDIDATES["factored"].build
    first = task.run(build, 8e-3, 1, rank=4, steps=10, report=True)
    again = task.run(build, 8e-3, 1, rank=4, steps=10, report=True)
    slow = task.run(build, 1e-6, 1, rank=4, steps=10, report=True)
    assert first["test_loss"] == again["test_loss"] < slow["test_loss"]
