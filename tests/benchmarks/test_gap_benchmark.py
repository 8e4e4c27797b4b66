"""`benchmarks/gap.py` measures what it says: its rules are those of the library and of torch, variants do not meet."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_sai import SGDSaI

GAP = Path(__file__).parents[2] / "benchmarks" / "gap.py"


@pytest.fixture(scope="module")
def gap():
    spec = importlib.util.spec_from_file_location("gap", GAP)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gap"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gap"]


@pytest.mark.parametrize(
    ("rule", "build"),
    [
        ("sai", lambda p: SGDSaI([p], lr=0.01, weight_decay=0.0)),
        ("sai:mu0.8", lambda p: SGDSaI([p], lr=0.01, weight_decay=0.0, momentum=0.8)),
        ("g_rows:snr", lambda p: SGDSaI([p], lr=0.01, weight_decay=0.0, update="rows")),
        ("adam", lambda p: torch.optim.AdamW([p], lr=0.01, weight_decay=0.0)),
    ],
)
@pytest.mark.parametrize("shape", [(6, 5), (7,)])
def test_rules_are_those_of_the_library_and_of_torch(gap, rule, build, shape):
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.zeros(shape))
    mine, optimizer, made = torch.zeros(shape), build(p), None
    for _ in range(5):
        p.grad = torch.randn(shape, generator=generator) + 0.5
        made = made or gap.Rule(rule, p.grad.clone())
        mine -= 0.01 * made.update(p.grad.clone())
        optimizer.step()
    torch.testing.assert_close(mine, p.detach(), rtol=1e-4, atol=1e-6)


def test_variants_side_by_side_train_as_alone(gap):
    text = torch.randint(97, 123, (80, gap.CONTEXT), generator=torch.Generator().manual_seed(0))
    variants = [gap.Variant.parse("sai@1e-2"), gap.Variant.parse("adam@4e-3 vector=g_rows@1e-3 clip=0.1")]
    together = list(gap.train(variants, (text[:64], text[64:]), steps=4, seed=0))
    alone = [next(gap.train([variant], (text[:64], text[64:]), steps=4, seed=0)) for variant in variants]
    assert together[0]["eval_loss"] != pytest.approx(together[1]["eval_loss"], abs=1e-3)
    for a, b in zip(together, alone, strict=True):
        assert a["eval_loss"] == pytest.approx(b["eval_loss"], abs=2e-3)


def test_a_variant_says_what_each_class_gets(gap):
    variant = gap.Variant.parse("sai@1e-2 embedding=adam@4e-3 clip=0.1")
    assert variant.rules["matrix"] == variant.rules["vector"] == ("sai", 0.01)
    assert variant.rules["embedding"] == ("adam", 0.004)
    assert variant.settings == {"clip": 0.1}


def test_a_model_does_not_see_the_byte_it_predicts(gap):
    p = {name: tensor[None] for name, tensor in gap.initial(0).items()}
    tokens = torch.randint(256, (1, gap.CONTEXT), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 256
    difference = (gap.losses_of(p, tokens) - gap.losses_of(p, changed))[0, 0]
    assert not difference[:19].any()
    assert difference[20:].any()
