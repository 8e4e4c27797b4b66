"""``--optim_args`` is typed and strict."""

import pytest
import torch

from hf_sai.optim.options import OPTIONS
from hf_sai.trainer.optim_args import parse_optim_args


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, {}),
        ("", {}),
        (" ", {}),
        ("momentum=0.95", {"momentum": 0.95}),
        ("momentum=0.95, eps=1e-6", {"momentum": 0.95, "eps": 1e-6}),
        ("normalize=True,foreach=none,fused=false", {"normalize": True, "foreach": None, "fused": False}),
        ("lr_ratios=lora_A:1;lora_B:16", {"lr_ratios": {"lora_A": 1.0, "lora_B": 16.0}}),
        ("freeze=lora_A", {"freeze": ("lora_A",)}),
        ("freeze=lora_A;default/lora_B", {"freeze": ("lora_A", "default/lora_B")}),
        ("update=factored", {"update": "factored"}),
        ("nesterov=true", {"nesterov": True}),
        ("momentum_dtype=BFloat16,maximize=true", {"momentum_dtype": torch.bfloat16, "maximize": True}),
        ({"momentum": 0.5, "normalize": False}, {"momentum": 0.5, "normalize": False}),
        ({"lr_ratios": {"lora_B": 4}, "freeze": ["lora_A"]}, {"lr_ratios": {"lora_B": 4.0}, "freeze": ("lora_A",)}),
    ],
)
def test_right_arguments_become_typed_options(given, expected):
    parsed = parse_optim_args(given)
    assert parsed == expected
    assert all(type(parsed[key]) is type(value) for key, value in expected.items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("momentun=0.9", r"unknown key 'momentun' \(value '0.9'\). Allowed: momentum, eps"),
        ("momentum", "'momentum' in 'momentum' is not of the form key=value"),
        ("momentum=", "is not of the form key=value"),
        ("momentum=0.9,", "'' in 'momentum=0.9,' is not of the form key=value"),
        ("momentum=" + "9" * 400, "momentum must be a number in .* characters"),
        ({"eps": 10**400}, "eps must be a finite number"),
        ({"eps": 10**5000}, "eps must be a finite number .* thousands of digits"),
        ({"lr_ratios": {"lora_B": 10**400}}, "lr_ratios must be role:factor pairs"),
        ("lr_ratios=lora_B:1;lora_B:2", "lr_ratios must be role:factor pairs"),
        ({"freeze": {"lora_A": 1}}, "freeze must be roles"),
        ({"freeze": 3}, "freeze must be roles"),
        ({("a", "b"): 1}, "unknown key"),
        ("matrices=c_fc", "matrices must be expression:true or expression:false"),
        ("matrices=c_fc:maybe", "matrices must be expression:true or expression:false"),
        ("normalize_gradient=factored", "normalize_gradient is called update now; write update=factored"),
        ({"normalize_gradient": None}, "write update=published"),
        (
            "normalize_gradient=tensor",
            "must be one of published, rows, factored, averaged, orthogonal; there is no 'tensor'",
        ),
        ("update=tensor", "update must be one of published, rows, factored, averaged, orthogonal, but is 'tensor'"),
        ("momentum=1.5", r"momentum must be a number in \[0, 1\), but is '1.5'"),
        ("betas=(0.9,0.99)", r"'0.99\)' in 'betas=\(0.9,0.99\)' is not of the form key=value"),
        ("momentum=high", r"momentum must be a number in \[0, 1\), but is 'high'"),
        ("normalize=maybe", "normalize must be true or false, but is 'maybe'"),
        ("foreach=2", "foreach must be true, false or none, but is '2'"),
        ("lr_ratios=lora_B", "lr_ratios must be role:factor pairs"),
        ("lr_ratios=lora_B:x", "lr_ratios must be role:factor pairs"),
        ("momentum=0.9,momentum=0.8", "momentum is given twice"),
        ("weight_decay=0.1", "weight_decay is set by --weight_decay, not in optim_args"),
        ("lr=0.1", "lr is set by --learning_rate"),
        ({"momentum": True}, "momentum must be a number"),
        (7, "must be a string 'key=value,key=value' or a mapping, but is 7"),
    ],
)
def test_wrong_arguments_name_the_key_the_value_and_what_is_allowed(given, message):
    with pytest.raises(ValueError, match=message):
        parse_optim_args(given)


def test_every_option_of_the_optimizer_can_be_given_unless_trainer_has_an_argument_for_it():
    for name, option in OPTIONS.items():
        text = {True: "true", False: "false", None: "none"}.get(option.default, str(option.default))
        if option.of_trainer is None:
            assert parse_optim_args(f"{name}={text}") == {name: option.default}
        else:
            with pytest.raises(ValueError, match=f"{name} is set by --{option.of_trainer}"):
                parse_optim_args(f"{name}={text}")
