"""Grouping: names, decay, ratios, freezing, several adapters, and what is refused."""

import subprocess
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

from hf_sai import SGDSaI, create_sgd_sai_optimizer, param_groups
from hf_sai.groups.param_groups import no_decay_names
from hf_sai.groups.peft_roles import merged_adapters, peft_roles

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TINY = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
TARGETS = ["q_proj", "v_proj"]
IDS = torch.arange(5, 29).reshape(2, 12)


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=64, initializer_range=0.3, **TINY)
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2))


def vit() -> Any:
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **TINY)
    return transformers.ViTForImageClassification(config)


def lora(model: Any, adapter_name: str = "default", **kwargs: Any) -> Any:
    torch.manual_seed(1)
    config = peft.LoraConfig(**{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **kwargs})
    return peft.get_peft_model(model, config, adapter_name=adapter_name)


def two_adapters() -> Any:
    model = lora(llama(), "a")
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    return model


def groups_of(model: nn.Module, **kwargs: Any) -> dict[str, dict[str, Any]]:
    groups = param_groups(model, **{"lr": 0.1, "weight_decay": 0.5, **kwargs})
    assert len({group["name"] for group in groups}) == len(groups)
    return {group["name"]: group for group in groups}


def names_in(group: dict[str, Any]) -> list[str]:
    return [name for name, _ in group["params"]]


def train(model: Any, optimizer: SGDSaI, steps: int = 3) -> set[str]:
    """Trains some steps; returns the names of the parameters that moved."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("build", [gpt2, llama, vit])
def test_base_decay_equals_trainers(build: Any, tmp_path: Any) -> None:
    model = build()
    trainer = transformers.Trainer(model, transformers.TrainingArguments(tmp_path, report_to=[]))
    decaying = set(trainer.get_decay_parameter_names(model))
    groups = groups_of(model)
    every = {name for name, _ in model.named_parameters()}
    assert set(groups) == {"base/decay", "base/no_decay"} or set(groups) == {"base/decay"}
    assert set(names_in(groups["base/decay"])) == decaying & every
    assert no_decay_names(model) == every - decaying


def test_norms_that_trainer_does_not_know_do_not_decay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.RMSNorm(4))
    assert names_in(groups_of(model)["base/decay"]) == ["0.weight"]


def test_one_element_gates_do_not_decay() -> None:
    model = nn.Linear(3, 2, bias=False)
    model.gate = nn.Parameter(torch.zeros(1, 1))
    assert names_in(groups_of(model)["base/no_decay"]) == ["gate"]


def test_the_decay_rule_can_be_changed() -> None:
    groups = groups_of(lora(llama()), no_decay=lambda name, parameter: "lora_A" in name)
    assert [groups[name]["weight_decay"] for name in ("default/lora_A", "default/lora_B")] == [0.0, 0.5]


def test_an_adapter_named_bias_decays_all_the_same() -> None:
    assert groups_of(lora(llama(), "bias"))["bias/lora_A"]["weight_decay"] == 0.5


def test_roles_are_not_read_from_names() -> None:
    groups = groups_of(lora(llama(), "lora_B"))
    assert set(groups) == {"lora_B/lora_A", "lora_B/lora_B"}
    assert all(".lora_A.lora_B." in name for name in names_in(groups["lora_B/lora_A"]))


def test_tied_weights_are_in_one_group() -> None:
    model = gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    grouped = [p for group in groups_of(model).values() for _, p in group["params"]]
    assert len({id(p) for p in grouped}) == len(grouped) == len(list(model.parameters()))


def test_biases_set_free_by_peft_are_the_base_models() -> None:
    model = lora(gpt2(), target_modules=["c_attn"], bias="all", fan_in_fan_out=True)
    group = groups_of(model)["base/no_decay"]
    assert group["weight_decay"] == 0.0
    assert "normalize_over" not in group
    assert all(name.endswith("bias") for name in names_in(group))


def test_unfrozen_base_weights_fall_back_to_base_decay() -> None:
    model = lora(llama())
    weight = model.get_input_embeddings().weight.requires_grad_(True)
    assert [id(p) for _, p in groups_of(model)["base/decay"]["params"]] == [id(weight)]


def test_transformers_add_adapter_is_read_like_a_peft_model() -> None:
    model = llama()
    try:
        model.add_adapter(peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True), adapter_name="mine")
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(f"transformers {transformers.__version__} wants a newer PEFT than {peft.__version__} for it")
    assert set(groups_of(model)) == {"mine/lora_A", "mine/lora_B", "mine/magnitude"}
    optimizer = create_sgd_sai_optimizer(model, lr=0.1)
    assert train(model, optimizer) == {row.name for row in optimizer.gsnr_report()}


def test_diffusers_add_adapter_is_read_like_a_peft_model() -> None:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )
    # A frozen base, as diffusers' training scripts make it: add_adapter leaves it trainable.
    model.requires_grad_(False)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "conv1"], use_dora=True), adapter_name="style")
    groups = groups_of(model)
    assert set(groups) == {"style/lora_A", "style/lora_B", "style/magnitude"}
    # The magnitudes of convolutions are four-dimensional, and still are no weights to decay.
    assert {p.ndim for _, p in groups["style/magnitude"]["params"]} == {1, 4}
    assert groups["style/magnitude"]["weight_decay"] == 0.0

    optimizer = create_sgd_sai_optimizer(model, lr=1e-3)
    for _ in range(4):
        model(torch.randn(2, 4, 8, 8), 1, torch.randn(2, 3, 8)).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not optimizer.gsnr_report().unmeasured


def test_mixed_adapter_types_each_have_their_roles() -> None:
    torch.manual_seed(1)
    model = peft.PeftMixedModel(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"]), "low_rank")
    model.add_adapter("hadamard", peft.LoHaConfig(r=4, target_modules=["v_proj"]))
    model.set_adapter(["low_rank", "hadamard"])
    assert {"low_rank/lora_A", "low_rank/lora_B", "hadamard/hada_w1_a", "hadamard/hada_w2_b"} <= set(groups_of(model))


def test_only_the_active_adapter_is_grouped() -> None:
    model = two_adapters()
    assert set(groups_of(model)) == {"a/lora_A", "a/lora_B"}
    model.set_adapter("b")
    assert set(groups_of(model)) == {"b/lora_A", "b/lora_B"}


def test_adapters_named_ahead_train_when_switched_to() -> None:
    model = two_adapters()
    optimizer = create_sgd_sai_optimizer(model, lr=0.1, weight_decay=0.5, adapters=("a", "b"))
    for adapter in ("a", "b", "a"):
        model.set_adapter(adapter)
        moved = train(model, optimizer)
        assert moved == {name for name, _ in model.named_parameters() if f".{adapter}." in name}


def test_a_later_adapter_joins_by_add_param_group() -> None:
    model = two_adapters()
    optimizer = create_sgd_sai_optimizer(model, lr=0.1)
    train(model, optimizer)
    scales = {row.name: row.gsnr for row in optimizer.gsnr_report()}
    model.set_adapter("b")
    for group in param_groups(model, lr=0.1, weight_decay=0.0):
        optimizer.add_param_group(group)
    assert train(model, optimizer) == {name for name, _ in model.named_parameters() if ".b." in name}
    assert scales.items() <= {row.name: row.gsnr for row in optimizer.gsnr_report()}.items()


def test_normalize_takes_the_maximum_per_adapter() -> None:
    def after_training(adapters: tuple[str, ...]) -> dict[str, torch.Tensor]:
        model = two_adapters()
        model.base_model.set_adapter(["a", "b"])
        groups = [g for g in param_groups(model, lr=1.0, weight_decay=0.0) if g["normalize_over"] in adapters]
        train(model, SGDSaI(groups, lr=1.0, normalize=True), steps=1)
        return dict(model.named_parameters())

    alone, together = after_training(("b",)), after_training(("a", "b"))
    changed = [name for name in alone if ".lora_B.b." in name]
    assert changed
    for name in changed:
        assert alone[name].any()
        torch.testing.assert_close(together[name], alone[name])


def test_ratios_set_the_rate_of_a_role() -> None:
    model = two_adapters()
    groups = groups_of(model, adapters=("a", "b"), lr_ratios={"lora_B": 16, "b/lora_B": 4})
    assert {name: group["lr"] for name, group in groups.items()} == pytest.approx(
        {"a/lora_A": 0.1, "a/lora_B": 1.6, "b/lora_A": 0.1, "b/lora_B": 0.4}
    )


def test_ratios_outlive_a_scheduler_with_a_tensor_rate() -> None:
    optimizer = create_sgd_sai_optimizer(lora(llama()), lr=torch.tensor(0.1), lr_ratios={"lora_B": 16})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    optimizer.step()
    scheduler.step()
    assert {group["name"]: float(group["lr"]) for group in optimizer.param_groups} == pytest.approx(
        {"default/lora_A": 0.05, "default/lora_B": 0.8}
    )


def test_a_frozen_role_has_no_group_and_no_gradient() -> None:
    model = lora(llama())
    optimizer = create_sgd_sai_optimizer(model, lr=0.1, freeze=("lora_A",))
    assert [group["name"] for group in optimizer.param_groups] == ["default/lora_B"]
    assert train(model, optimizer) == {name for name, _ in model.named_parameters() if ".lora_B." in name}
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lora_A" in name)
    assert set(groups_of(model, freeze=("lora_A",))) == {"default/lora_B"}  # as when Trainer groups again


def test_optimizer_knows_the_names_and_takes_options() -> None:
    model = lora(llama())
    optimizer = create_sgd_sai_optimizer(model, lr=0.1, momentum=0.5, normalize=True)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(name for group in optimizer.param_groups for name in group["param_names"]) == sorted(trainable)
    assert all(g["momentum"] == 0.5 and g["normalize"] and g["weight_decay"] == 0.0 for g in optimizer.param_groups)
    with pytest.raises(TypeError, match="beta1"):
        create_sgd_sai_optimizer(model, lr=0.1, beta1=0.9)


def test_error_on_a_ratio_for_an_unknown_role() -> None:
    with pytest.raises(ValueError, match=r"lr_ratios names 'lora_C'.*default/lora_A, default/lora_B, lora_A, lora_B"):
        groups_of(lora(llama()), lr_ratios={"lora_C": 2})


def test_error_on_a_ratio_for_a_frozen_role() -> None:
    with pytest.raises(ValueError, match="lr_ratios names 'lora_A'"):
        groups_of(lora(llama()), lr_ratios={"lora_A": 2}, freeze=("lora_A",))


@pytest.mark.parametrize("ratio", [-1, float("nan"), float("inf"), "16", True])
def test_error_on_a_ratio_that_is_not_a_positive_number(ratio: Any) -> None:
    with pytest.raises(ValueError, match=r"lr_ratios\['lora_B'\] is .*finite number above 0"):
        groups_of(lora(llama()), lr_ratios={"lora_B": ratio})


def test_a_ratio_of_zero_points_to_freeze() -> None:
    with pytest.raises(ValueError, match=r'freeze=\("lora_A",\)'):
        groups_of(lora(llama()), lr_ratios={"lora_A": 0})


def test_error_on_freezing_an_unknown_role_or_by_a_bare_string() -> None:
    with pytest.raises(ValueError, match="freeze names 'lora_C'; this model has: base, "):
        groups_of(lora(llama()), freeze=("lora_C",))
    with pytest.raises(ValueError, match="freeze is the string 'lora_A'"):
        groups_of(lora(llama()), freeze="lora_A")


def test_error_on_an_unknown_adapter() -> None:
    with pytest.raises(ValueError, match="adapters names 'c'; this model has: a, b"):
        groups_of(two_adapters(), adapters=("a", "c"))


def test_a_refused_call_freezes_nothing() -> None:
    model = lora(llama())
    with pytest.raises(ValueError, match="nope"):
        groups_of(model, freeze=("lora_A",), lr_ratios={"nope": 1})
    assert set(groups_of(model)) == {"default/lora_A", "default/lora_B"}


def test_error_on_a_model_with_nothing_to_train() -> None:
    with pytest.raises(ValueError, match=r"nothing to train: LlamaForCausalLM has 21 parameters.*get_peft_model"):
        groups_of(llama().requires_grad_(False))
    with pytest.raises(ValueError, match=r"nothing to train.*freeze="):
        groups_of(lora(llama()), freeze=("lora_A", "lora_B"))


def test_error_after_merging_and_unloading() -> None:
    with pytest.raises(ValueError, match=r"after merge_and_unload\(\) there is no adapter left"):
        groups_of(lora(llama()).merge_and_unload())


def test_error_on_a_merged_adapter() -> None:
    model = lora(llama())
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"adapter default is merged.*unmerge_adapter"):
        groups_of(model)


def test_scales_outlive_unloading_and_loading_the_adapter(tmp_path: Any) -> None:
    model = lora(llama())
    optimizer = create_sgd_sai_optimizer(model, lr=0.1)
    train(model, optimizer)
    model.save_pretrained(tmp_path)
    base = model.unload()
    again = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    resumed = create_sgd_sai_optimizer(again, lr=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    assert train(again, resumed)
    assert list(resumed.gsnr_report()) == list(optimizer.gsnr_report())


def test_grouping_needs_torch_alone() -> None:
    program = (
        "import sys; sys.modules.update(dict.fromkeys(('transformers', 'peft', 'accelerate')))\n"
        "import torch; from hf_sai import param_groups\n"
        "print([g['name'] for g in param_groups(torch.nn.Linear(3, 2), lr=0.1, weight_decay=0.1)])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['base/decay', 'base/no_decay']"


@pytest.mark.parametrize("broken", [{}, {"tuners": None}, {"PeftModel": None}], ids=str)
def test_a_peft_whose_import_failed_half_way_is_passed_over(broken, monkeypatch):
    module = types.ModuleType("peft")
    vars(module).update(broken)
    monkeypatch.setitem(sys.modules, "peft", module)
    [group] = param_groups(nn.Linear(4, 4, bias=False), lr=0.1, weight_decay=0.0)
    assert group["role"] == "base"
    assert peft_roles(nn.Linear(2, 2)) == {}
    assert merged_adapters(nn.Linear(2, 2)) == set()
