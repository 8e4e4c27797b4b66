"""``--optim_args`` is typed and strict."""

import pytest

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
