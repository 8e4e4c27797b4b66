"""Every tuner of PEFT: each parameter in one group of the right role, each one trains, and scales outlive a reload."""

from typing import Any

import pytest
import torch
from peft_cases import CASES, VOCAB, Case, base_model, build, peft, transformers

from hf_sai import SGDSaI, param_groups
from hf_sai.groups.peft_roles import merged_adapters

STEPS = 4
RATES = {"published": 0.1, "factored": 1e-3, "orthogonal": 1e-3}


def _reload(case: Case, tmp_path: Any) -> Any:
    """The adapter saved below `tmp_path` on a fresh base model, trainable."""
    if peft.PeftConfig.from_pretrained(tmp_path / "adapter").is_prompt_learning:
        # PEFT refuses is_trainable=True for these; to go on training, one loads the weights into a new adapter.
        model = build(case, tmp_path)
        if case.saved_whole:
            peft.set_peft_model_state_dict(model, peft.utils.load_peft_weights(str(tmp_path / "adapter")))
        return model
    torch.manual_seed(1)
    return peft.PeftModel.from_pretrained(base_model(), tmp_path / "adapter", is_trainable=True)


def _step(model: Any, optimizer: SGDSaI, case: Case, seed: int) -> set[str]:
    """Trains one step; returns the names of the parameters whose gradient was not zero."""
    torch.manual_seed(seed)
    ids = torch.randint(5, VOCAB, (2, 8))
    model.train()
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, **case.inputs).loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    optimizer.step()
    optimizer.zero_grad()
    return reached


def _optimizer(model: Any, update: str = "published") -> SGDSaI:
    return SGDSaI(param_groups(model, lr=RATES[update], weight_decay=0.0, update=update), lr=RATES[update])


def _scales(optimizer: SGDSaI) -> dict[str, float | None]:
    return {row.name: row.gsnr for row in optimizer.gsnr_report()}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_the_table_covers_every_peft_type() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = {config.__name__ for config in PEFT_TYPE_TO_CONFIG_MAPPING.values()}
    assert known <= {case.config for case in CASES.values()}


def test_each_parameter_is_in_one_group_of_its_role(case: Case, tmp_path: Any) -> None:
    model = build(case, tmp_path)
    groups = param_groups(model, lr=0.1, weight_decay=0.5)
    grouped = [name for group in groups for name, _ in group["params"]]
    assert sorted(grouped) == sorted(name for name, p in model.named_parameters() if p.requires_grad)

    expected = {name if name.startswith(("base/", "0/", "1/")) else f"default/{name}" for name in case.roles.split()}
    assert {group["name"] for group in groups} == expected
    for group in groups:
        assert group.get("normalize_over", "base") == group["name"].partition("/")[0]


def test_only_matrices_decay(case: Case, tmp_path: Any) -> None:
    for group in param_groups(build(case, tmp_path), lr=0.1, weight_decay=0.5):
        for name, parameter in group["params"]:
            if parameter.ndim <= 1 or parameter.numel() == 1:
                assert group["weight_decay"] == 0.0, name


@pytest.mark.parametrize("update", RATES)
def test_every_parameter_moves_unless_its_gradient_stays_zero(case: Case, update: str, tmp_path: Any) -> None:
    model = build(case, tmp_path)
    optimizer = _optimizer(model, update)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    reached = before.keys() & set().union(*(_step(model, optimizer, case, seed) for seed in range(STEPS)))
    moved = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
    assert moved == reached
    assert {row.name for row in optimizer.gsnr_report().unmeasured} == before.keys() - reached
    assert len(before) - len(reached) == case.never_reached


@pytest.mark.parametrize("update", ["published", "orthogonal"])
def test_saving_loading_and_resuming_keep_scales(case: Case, update: str, tmp_path: Any) -> None:
    model = build(case, tmp_path)
    optimizer = _optimizer(model, update)
    for seed in range(STEPS):
        _step(model, optimizer, case, seed)
    model.save_pretrained(tmp_path / "adapter")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")

    loaded = _reload(case, tmp_path)
    resumed = _optimizer(loaded, update)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert _scales(resumed) == _scales(optimizer)

    _step(model, optimizer, case, seed=STEPS)
    _step(loaded, resumed, case, seed=STEPS)
    assert _scales(resumed) == _scales(optimizer)
    if not case.saved_whole:
        return
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in loaded.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter, trained[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.mergeable])
def test_merging_and_unmerging_keep_scales(name: str, tmp_path: Any) -> None:
    case = CASES[name]
    model = build(case, tmp_path)
    optimizer = _optimizer(model)
    for seed in range(STEPS):
        _step(model, optimizer, case, seed)
    scales = _scales(optimizer)
    model.merge_adapter()
    assert merged_adapters(model) == {"default"}
    with pytest.raises(ValueError, match="adapter default is merged"):
        _optimizer(model)
    model.unmerge_adapter()
    assert _step(model, optimizer, case, seed=STEPS)
    assert _scales(optimizer) == scales


@pytest.mark.parametrize("autocast", [True, False], ids=["float32_adapter", "half_adapter"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["lora", "dora", "loha", "ia3", "vera"])
def test_adapters_train_on_a_half_precision_base(name: str, dtype: torch.dtype, autocast: bool, tmp_path: Any) -> None:
    case = CASES[name]
    config = case.build(tmp_path)
    model = base_model().to(dtype)
    torch.manual_seed(1)
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=autocast)
    trainable = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trainable.values()} == {torch.float32 if autocast else dtype}

    optimizer = _optimizer(model)
    for seed in range(STEPS):
        _step(model, optimizer, case, seed)
    scales = _scales(optimizer)
    assert not optimizer.gsnr_report().unmeasured
    moved = {n for n, p in model.named_parameters() if n in trainable and not torch.equal(p, trainable[n])}
    # A half-precision weight near 1 rounds small updates away, whatever the optimizer.
    assert moved == trainable.keys() if autocast else moved
    resumed = _optimizer(model)
    resumed.load_state_dict(optimizer.state_dict())
    _step(model, resumed, case, seed=STEPS)
    assert _scales(resumed) == scales


@pytest.mark.parametrize("bits", [8, 4])
def test_adapters_train_on_a_kbit_base(bits: int, tmp_path: Any) -> None:
    pytest.importorskip("bitsandbytes")
    base_model(hidden=64).save_pretrained(tmp_path / "base")  # bitsandbytes' CPU kernels want multiples of 32
    quantization = transformers.BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=quantization, device_map="cpu"
    )
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(1)
    model = peft.get_peft_model(model, CASES["lora"].build(tmp_path))
    assert any(p.dtype in (torch.int8, torch.uint8) for p in model.parameters())

    optimizer = _optimizer(model)
    assert {group["name"] for group in optimizer.param_groups} == {"default/lora_A", "default/lora_B"}
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for seed in range(STEPS):
        _step(model, optimizer, CASES["lora"], seed)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    assert not optimizer.gsnr_report().unmeasured
