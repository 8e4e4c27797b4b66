"""``hf-sai groups``: what it prints for models, adapters and checkpoints, and what it says to a wrong path."""

import json
from typing import Any

import pytest
import torch
from peft_cases import CASES, UNSEEN_TOKENS, base_model, build, peft, transformers

from hf_sai import create_sgd_sai_optimizer, param_groups
from hf_sai.cli.main import main
from hf_sai.groups.table import describe_groups

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def rows(text: str) -> dict[str, list[str]]:
    """The printed table's columns by the group's name; columns are two or more spaces apart."""
    lines = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]
    return {cells[0]: cells[1:] for cells in lines[1:] if len(cells) > 2}


def groups(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    capsys.readouterr()
    assert main(["groups", *map(str, argv)]) == 0
    return capsys.readouterr().out


def error(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    capsys.readouterr()
    assert main(["groups", *map(str, argv)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.fixture
def base_directory(tmp_path: Any) -> Any:
    model = base_model()
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapter_on(base_directory: Any, **kwargs: Any) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base_directory)
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(**{**LORA, **kwargs}))


def checkpoint(directory: Any, model: Any, steps: int = 2) -> Any:
    """Trains and leaves what Trainer leaves in a checkpoint directory; returns the optimizer."""
    optimizer = create_sgd_sai_optimizer(model, lr=0.1, weight_decay=0.1)
    ids = torch.arange(5, 29).reshape(2, 12)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    torch.save(optimizer.state_dict(), directory / "optimizer.pt")
    return optimizer


def test_a_models_directory_needs_no_weights(base_directory: Any, capsys: Any) -> None:
    for weights in base_directory.glob("*.safetensors"):
        weights.unlink()
    table = rows(groups(capsys, base_directory))
    assert table["base/decay"][:2] == ["base", "16"]
    assert table["base/decay"][-3:] == ["yes", "-", "-"]
    assert "no" in table["base/no_decay"]
    assert table["total"][0] == str(len(list(base_model().parameters())))


def test_hidden_matrices_are_shown_for_the_rule_that_has_them(base_directory: Any, tmp_path: Any, capsys: Any) -> None:
    shown = rows(groups(capsys, base_directory, "--update", "orthogonal"))
    layers = base_model().config.num_hidden_layers
    assert shown["base/linear"][1] == str(7 * layers)
    assert "base/linear" not in rows(groups(capsys, base_directory))
    chosen = ("--update", "orthogonal", "--matrices", "mlp:false")
    assert rows(groups(capsys, base_directory, *chosen))["base/linear"][1] == str(4 * layers)
    assert "found in no parameter's name" in error(capsys, base_directory, *chosen[:3], "nothing:false")
    assert "matrices must be expression:true" in error(capsys, base_directory, *chosen[:3], "mlp")
    assert "not of the form key=value" in error(capsys, base_directory, *chosen[:3], "l{1,2}:false")  # as in Trainer
    assert "matrices is for update='orthogonal'" in error(capsys, base_directory, *chosen[2:])
    checkpoint(tmp_path / "trained", base_model())
    for words in (chosen[:2], chosen[2:]):
        assert "leave out --update and --matrices" in error(capsys, tmp_path / "trained", *words)


def test_names_are_shown_with_their_groups(base_directory: Any, tmp_path: Any, capsys: Any) -> None:
    table, tensors = groups(capsys, base_directory, "--update", "orthogonal", "--names").split("\n\n")
    assert table == groups(capsys, base_directory, "--update", "orthogonal").strip()
    shown = rows(tensors)
    assert set(shown) == {name for name, _ in base_model().named_parameters()}
    assert shown["model.layers.0.mlp.up_proj.weight"][0] == "base/linear"
    assert shown["lm_head.weight"][0] == "base/decay"
    optimizer = checkpoint(tmp_path / "trained", base_model())
    shown = rows(groups(capsys, tmp_path / "trained", "--names").split("\n\n")[1])
    assert {name: cells[-1] for name, cells in shown.items()} == {
        row.name: f"{row.gsnr:.4g}" for row in optimizer.gsnr_report()
    }


def test_an_adapters_directory_shows_its_roles(base_directory: Any, tmp_path: Any, capsys: Any) -> None:
    adapter_on(base_directory, use_dora=True).save_pretrained(tmp_path / "adapter")
    table = rows(groups(capsys, tmp_path / "adapter"))
    assert table["default/lora_A"] == ["lora_A", "4", "256", "4x16 (4)", "yes", "-", "-"]
    assert table["default/lora_B"] == ["lora_B", "4", "256", "16x4 (4)", "yes", "-", "-"]
    assert table["default/magnitude"] == ["magnitude", "4", "64", "16 (4)", "no", "-", "-"]


@pytest.mark.parametrize("init", ["pissa", "olora", "gaussian", False])
def test_an_initialisation_that_needs_weights_is_no_obstacle(
    init: Any, base_directory: Any, tmp_path: Any, capsys: Any
) -> None:
    adapter_on(base_directory, init_lora_weights=init).save_pretrained(tmp_path / "adapter")
    assert {"default/lora_A", "default/lora_B"} <= set(rows(groups(capsys, tmp_path / "adapter")))


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.config not in ("XLoraConfig", "LoraConfig")])
def test_every_tuners_directory_can_be_shown(name: str, base_directory: Any, tmp_path: Any, capsys: Any) -> None:
    model = build(CASES[name], tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    expected = rows(describe_groups(param_groups(model, lr=1.0, weight_decay=1.0)))
    shown = rows(groups(capsys, tmp_path / "adapter", "--base-model", base_directory))
    # Role and number of tensors: AdaMSS takes its shapes from the base's weights, which are not read.
    assert {name: cells[:2] for name, cells in shown.items()} == {name: cells[:2] for name, cells in expected.items()}


def test_a_checkpoint_shows_the_measured_scales(base_directory: Any, tmp_path: Any, capsys: Any) -> None:
    model = adapter_on(base_directory)
    optimizer = checkpoint(tmp_path / "checkpoint-2", model)
    shown = groups(capsys, tmp_path / "checkpoint-2")
    assert shown.strip() == describe_groups(optimizer)
    values = [row.gsnr for row in optimizer.gsnr_report() if row.group == "default/lora_A"]
    assert f"{min(values):.4g} to {max(values):.4g}" in rows(shown)["default/lora_A"]
    assert "UNMEASURED" not in shown


def test_an_adapter_with_a_name_of_its_own_is_shown_by_its_runs_directory(
    base_directory: Any, tmp_path: Any, capsys: Any
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(base_directory)
    model = peft.get_peft_model(model, peft.LoraConfig(**LORA, trainable_token_indices=UNSEEN_TOKENS), "style")
    model.save_pretrained(tmp_path / "run")
    assert {"style/lora_A", "style/lora_B"} <= set(rows(groups(capsys, tmp_path / "run")))
    optimizer = checkpoint(tmp_path / "checkpoint-2", model)
    assert groups(capsys, tmp_path / "checkpoint-2").strip() == describe_groups(optimizer)
    (tmp_path / "run" / "other").mkdir()
    (tmp_path / "run" / "other" / "adapter_config.json").write_text("{}")
    assert "holds 2 adapters; give the directory of one" in error(capsys, tmp_path / "run")


def test_unmeasured_parameters_stand_out(base_directory: Any, tmp_path: Any, capsys: Any) -> None:
    model = adapter_on(base_directory, trainable_token_indices=UNSEEN_TOKENS)
    checkpoint(tmp_path / "checkpoint-2", model)
    shown = groups(capsys, tmp_path / "checkpoint-2")
    assert "1 UNMEASURED" in rows(shown)["default/trainable_tokens_delta"]
    assert shown.strip().splitlines()[-1].endswith("token_adapter.trainable_tokens_delta.default")


def test_parameters_without_state_are_shown_unmeasured(base_directory: Any, tmp_path: Any, capsys: Any) -> None:
    model = adapter_on(base_directory)
    optimizer = checkpoint(tmp_path / "checkpoint-2", model)
    state = optimizer.state_dict()
    state["state"] = {0: state["state"][0]}
    torch.save(state, tmp_path / "checkpoint-2" / "optimizer.pt")
    table = rows(groups(capsys, tmp_path / "checkpoint-2"))
    assert table["default/lora_A"][-2].endswith(", 3 UNMEASURED")
    assert table["default/lora_B"] == ["lora_B", "4", "256", "16x4 (4)", "yes", "4 UNMEASURED", "-"]


def test_a_full_models_checkpoint_shows_the_measured_scales(base_directory: Any, tmp_path: Any, capsys: Any) -> None:
    optimizer = checkpoint(tmp_path / "checkpoint-2", base_model())
    assert groups(capsys, tmp_path / "checkpoint-2").strip() == describe_groups(optimizer)


def test_a_trainers_checkpoint_can_be_shown(base_directory: Any, tmp_path: Any, capsys: Any) -> None:
    arguments = transformers.TrainingArguments(
        tmp_path / "out", optim="sgd_sai", learning_rate=0.1, max_steps=2, save_steps=2, report_to=[], disable_tqdm=True
    )
    data = [{"input_ids": list(range(5, 17)), "labels": list(range(5, 17))}] * 16
    trainer = transformers.Trainer(adapter_on(base_directory), arguments, train_dataset=data)
    trainer.train()
    table = rows(groups(capsys, tmp_path / "out" / "checkpoint-2"))
    assert set(table) == {"default/lora_A", "default/lora_B", "total"}
    assert float(table["default/lora_B"][-1]) > 0.5


def test_diffusers_directories_can_be_shown(tmp_path: Any, capsys: Any) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    model.save_pretrained(tmp_path)
    assert rows(groups(capsys, tmp_path))["total"][0] == str(len(list(model.parameters())))


def test_error_on_a_directory_without_a_model(tmp_path: Any, capsys: Any) -> None:
    (tmp_path / "notes.txt").write_text("")
    message = error(capsys, tmp_path)
    assert "neither adapter_config.json nor config.json, but notes.txt" in message


def test_error_on_an_adapter_whose_base_is_gone(base_directory: Any, tmp_path: Any, capsys: Any) -> None:
    adapter_on(base_directory).save_pretrained(tmp_path / "adapter")
    base_directory.rename(tmp_path / "moved")
    message = error(capsys, tmp_path / "adapter")
    assert (
        f"the base model {base_directory} of {tmp_path / 'adapter'} cannot be read; name it with --base-model"
        in message
    )
    assert "default/lora_A" in groups(capsys, tmp_path / "adapter", "--base-model", tmp_path / "moved")


def test_error_on_an_adapter_that_names_no_base(base_directory: Any, tmp_path: Any, capsys: Any) -> None:
    adapter_on(base_directory).save_pretrained(tmp_path / "adapter")
    config_file = tmp_path / "adapter" / "adapter_config.json"
    config_file.write_text(json.dumps({**json.loads(config_file.read_text()), "base_model_name_or_path": None}))
    assert "does not say which base model it is for; name it with --base-model" in error(capsys, tmp_path / "adapter")


def test_error_on_a_name_that_cannot_be_found(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "hf-sai/no-such-model is no directory here, and no model of that name" in error(
        capsys, "hf-sai/no-such-model"
    )


def test_error_on_another_optimizers_state(base_directory: Any, tmp_path: Any, capsys: Any) -> None:
    optimizer = torch.optim.AdamW(base_model().named_parameters())
    torch.save(optimizer.state_dict(), base_directory / "optimizer.pt")
    assert "holds no g-SNR: it is not the state of an SGD-SaI optimizer" in error(capsys, base_directory)


def test_error_on_a_state_without_names(base_directory: Any, tmp_path: Any, capsys: Any) -> None:
    checkpoint(tmp_path / "checkpoint-2", base_model())
    file = tmp_path / "checkpoint-2" / "optimizer.pt"
    state = torch.load(file, weights_only=True)
    for group in state["param_groups"]:
        del group["param_names"]
    torch.save(state, file)
    assert "holds no parameter names" in error(capsys, tmp_path / "checkpoint-2")


def test_error_on_an_unknown_architecture(base_directory: Any, capsys: Any) -> None:
    config_file = base_directory / "config.json"
    config_file.write_text(json.dumps({**json.loads(config_file.read_text()), "architectures": ["MadeUpModel"]}))
    assert "names the architecture MadeUpModel, unknown here" in error(capsys, base_directory)


def test_the_command_needs_a_subcommand(capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("says_shapes", [True, False])
@pytest.mark.parametrize("momentum_dtype", ["8bit", "4bit"])
def test_a_checkpoint_with_few_bits_shows_the_parameters_own_shapes(
    momentum_dtype: str, says_shapes: bool, tmp_path: Any, capsys: Any
) -> None:
    pytest.importorskip("bitsandbytes")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config)
    optimizer = create_sgd_sai_optimizer(model, lr=0.1, weight_decay=0.1, momentum_dtype=momentum_dtype)
    ids = torch.arange(5, 29).reshape(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    saved = optimizer.state_dict()
    if not says_shapes:  # as before version 0.1.0's release: then the model beside it must
        saved["state"] = {
            index: {k: v for k, v in own.items() if k != "shape"} for index, own in saved["state"].items()
        }
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(tmp_path)
    torch.save(saved, tmp_path / "optimizer.pt")
    assert groups(capsys, tmp_path).strip() == describe_groups(optimizer)


@pytest.mark.parametrize("cut", [0, 10, 0.5, 0.99])
def test_error_on_a_damaged_state(cut: float, base_directory: Any, tmp_path: Any, capsys: Any) -> None:
    checkpoint(tmp_path / "checkpoint-2", adapter_on(base_directory))
    file = tmp_path / "checkpoint-2" / "optimizer.pt"
    content = file.read_bytes()
    file.write_bytes(content[: cut if isinstance(cut, int) else int(cut * len(content))])
    assert f"{file} cannot be read: it is damaged, or no optimizer's state" in error(capsys, tmp_path / "checkpoint-2")


@pytest.mark.parametrize("saved", [[], 3, {"state": {}}, {"state": {0: 3}, "param_groups": [{"params": [0]}]}])
def test_error_on_a_file_that_is_no_state(saved: Any, base_directory: Any, capsys: Any) -> None:
    torch.save(saved, base_directory / "optimizer.pt")
    assert "is no optimizer's state as torch saves it" in error(capsys, base_directory)


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"model_type": 3}', '{"model_type": "llama", "hidden_size": "x"}', "\\xff"]
)
def test_error_on_a_damaged_configuration(text: str, tmp_path: Any, capsys: Any) -> None:
    (tmp_path / "config.json").write_text(text)
    assert str(tmp_path) in error(capsys, tmp_path)
