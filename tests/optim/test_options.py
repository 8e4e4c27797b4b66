"""The table of options: what each takes and refuses, in one sentence whatever came."""

import inspect
import math

import pytest
import torch

from hf_sai import SGDSaI
from hf_sai.optim.options import DEFAULTS, OPTIONS, upgrade_group
from hf_sai.optim.rules import RULES


def test_the_constructor_has_every_option_with_its_default():
    parameters = inspect.signature(SGDSaI.__init__).parameters
    assert {name: p.default for name, p in parameters.items() if name in OPTIONS} == DEFAULTS
    assert set(parameters) - set(OPTIONS) == {"self", "params"}


@pytest.mark.parametrize("digits", [400, 5000])
def test_an_integer_without_end_is_refused_in_one_sentence(digits):
    with pytest.raises(ValueError, match=r"^momentum must be a number in \[0, 1\), but is .{1,200}$"):
        OPTIONS["momentum"].check(10**digits)


@pytest.mark.parametrize("name", list(OPTIONS))
def test_what_is_no_value_at_all_is_refused_with_what_is_allowed(name):
    for wrong in (object(), [], {}, "no such value", b"1"):
        with pytest.raises(ValueError, match=f"^{name} must be ") as caught:
            OPTIONS[name].check(wrong)
        assert OPTIONS[name].allowed in str(caught.value)


def test_every_default_is_allowed_and_every_rule_is():
    for name, option in OPTIONS.items():
        option.check(DEFAULTS[name])
    for rule in RULES:
        OPTIONS["update"].check(rule)


def test_groups_of_older_versions_get_todays_keys():
    assert upgrade_group({"lr": 1.0, "normalize_gradient": None})["update"] == "published"
    assert upgrade_group({"lr": 1.0, "normalize_gradient": "factored"})["update"] == "factored"
    assert upgrade_group({"lr": 1.0}, {**DEFAULTS, "maximize": True})["maximize"] is True


@pytest.mark.parametrize(
    "lr",
    [torch.tensor([0.1], device="meta"), torch.tensor(1), torch.tensor(math.nan), torch.tensor([0.1, 0.2])],
    ids=str,
)
def test_a_rate_that_is_no_number_is_refused_in_a_sentence(lr):
    with pytest.raises(ValueError, match="lr must be a finite number"):
        SGDSaI([torch.nn.Parameter(torch.ones(2))], lr=lr)
