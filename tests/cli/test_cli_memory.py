"""``hf-sai memory``: what it prints for directories, adapters and known sizes, and what it says to wrong options."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from hf_sai.cli.main import main
from hf_sai.memory.state_sizes import OPTIMIZERS

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

LLAMA = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))


def memory(capsys: pytest.CaptureFixture[str], *argv: Any) -> dict[str, list[str]]:
    """The printed table's rows by their texts."""
    capsys.readouterr()
    assert main(["memory", *map(str, argv)]) == 0
    lines = capsys.readouterr().out.split("\n\n")[1].splitlines()[1:]
    texts = len(lines[0].split()) - sum(cell[0].isdigit() or cell == "-" for cell in lines[0].split())
    return {" ".join(line.split()[:texts]): line.split()[texts:] for line in lines}


def error(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    capsys.readouterr()
    assert main(["memory", *map(str, argv)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.strip().splitlines()[-1]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model's directory with a configuration and no weights."""
    config = transformers.LlamaConfig(**LLAMA, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_command_needs_no_weights(directory: Path, capsys: Any) -> None:
    table = memory(capsys, directory)
    assert set(table) == set(OPTIMIZERS)
    megabytes = f"{4 * sum(p.numel() for p in llama().parameters()) / 1e6:.2f}"
    assert table["sgd_sai"][:3] == [megabytes] * 3


def test_the_command_shows_gpt2_xl_and_llama_2_7b(capsys: Any) -> None:
    assert memory(capsys, "gpt2-xl", "--optim", "sgd_sai,adamw_torch") == {
        "sgd_sai": ["6.23", "6.23", "6.23", "18.69"],
        "adamw_torch": ["6.23", "6.23", "12.46", "24.92"],
    }
    assert memory(capsys, "llama-2-7b", "--optim", "sgd_sai", "--unit", "GiB") == {
        "sgd_sai": ["25.10", "25.10", "25.10", "75.31"]
    }


def test_dtype_auto_is_the_configurations(directory: Path, capsys: Any) -> None:
    assert main(["memory", str(directory), "--dtype", "auto"]) == 0
    assert "(bfloat16)" in capsys.readouterr().out


def test_an_adapters_directory_trains_the_adapter_alone(directory: Path, tmp_path: Path, capsys: Any) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path / "adapter")
    base = ("--base-model", directory, "--optim", "sgd_sai")
    assert memory(capsys, tmp_path / "adapter", *base) == memory(
        capsys, directory, "--optim", "sgd_sai", "--lora", "r=4,targets=q_proj;v_proj"
    )


def test_lora_options_reach_peft(directory: Path, capsys: Any) -> None:
    assert main(["memory", str(directory), "--lora", "r=2,targets=all-linear,save=lm_head"]) == 0
    linear = 2 * 2 * (4 * (64 + 64) + 3 * (64 + 128))
    assert f"{linear + 96 * 64:,} trained" in capsys.readouterr().out


def test_several_devices_show_every_sharding(directory: Path, capsys: Any) -> None:
    table = memory(capsys, directory, "--devices", 4, "--optim", "sgd_sai")
    assert list(table) == [f"{sharding} sgd_sai" for sharding in ("ddp", "fsdp", "zero1", "zero2", "zero3")]
    assert float(table["fsdp sgd_sai"][-1]) < float(table["zero3 sgd_sai"][-1]) < float(table["ddp sgd_sai"][-1])


def test_4_bit_weights_are_not_sharded(directory: Path, capsys: Any) -> None:
    pytest.importorskip("bitsandbytes")
    qlora = (directory, "--lora", "r=2,targets=q_proj", "--load-in-4bit", "--optim", "sgd_sai", "--devices", 2)
    assert [name.split()[0] for name in memory(capsys, *qlora)] == ["ddp", "zero1", "zero2"]
    assert "sharding fsdp of 4-bit weights is not known here" in error(capsys, *qlora, "--sharding", "fsdp")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--optim", "adam"],
            "optimizers names 'adam'; allowed: sgd_sai, sgd_sai_bf16, sgd_sai_8bit, sgd_sai_4bit, sgd_",
        ),
        (["--optim", ""], "optimizers names ''; allowed:"),
        (["--devices", 0], "devices must be a whole number above 0, but is 0"),
        (["--devices", 2, "--sharding", "zero4"], "shardings names 'zero4'; allowed: none, ddp, fsdp"),
        (["--devices", 2, "--sharding", "none"], "sharding none does not fit 2 devices; name another"),
        (["--sharding", "fsdp"], "sharding fsdp does not fit 1 device; give 2 devices or more"),
        (["--lora", "r=0"], "lora: r must be a whole number above 0 and below 10,000,000, but is '0'"),
        (["--lora", "rank=4"], "lora: 'rank=4' in 'rank=4' is unknown, repeated or without a value"),
        (["--lora", "r=4,r=4"], "lora: 'r=4' in 'r=4,r=4' is unknown, repeated or without a value"),
        (["--lora", ""], "lora: '' in '' is unknown, repeated or without a value; write each of r, targets, save"),
        (["--lora", "r=4,targets=made_up"], "made_up"),
        (["--base-model", "gpt2"], "is no adapter, so it has no base model"),
    ],
)
def test_error_on_wrong_options(arguments: list[Any], message: str, directory: Path, capsys: Any) -> None:
    assert message in error(capsys, directory, *arguments)


def test_error_on_4_bit_weights_without_an_adapter(directory: Path, capsys: Any) -> None:
    pytest.importorskip("bitsandbytes")
    assert "nothing to train" in error(capsys, directory, "--load-in-4bit")


def test_error_on_lora_on_an_adapter(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert "is an adapter already, so lora cannot add another" in error(capsys, tmp_path, "--lora", "r=4")


def test_error_on_an_unknown_diffusers_class(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("diffusers")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "MadeUpUNet"}))
    assert "names the diffusers class MadeUpUNet, unknown here" in error(capsys, tmp_path)


def test_error_on_a_name_that_cannot_be_found(capsys: Any) -> None:
    assert "no-such-model is no directory here, and no model of that name" in error(capsys, "hf-sai/no-such-model")


def test_the_documented_outputs_are_true(capsys: Any) -> None:
    pytest.importorskip("bitsandbytes")
    text = (Path(__file__).parents[2] / "docs" / "memory.md").read_text()
    examples = re.findall(r"```console\n\$ hf-sai ([^\n]*)\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 3
    for command, shown in examples:
        capsys.readouterr()
        assert main(shlex.split(command)) == 0
        assert capsys.readouterr().out == shown


SAVED = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "double": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True},
}
LINEAR = 2 * (4 * 64 * 64 + 3 * 64 * 128)  # elements of the layers that are quantised
ROWS = 2 * (4 * 64 + 2 * 128 + 64)
INPUTS = 2 * (6 * 64 + 128)
BYTES = {
    # Codes, a float32 scale a block of 64, and a table of 16 for each of 14 layers.
    "bitsandbytes": LINEAR // 2 + 4 * (LINEAR // 64) + 14 * 64,
    "int8": LINEAR + 4 * ROWS,
    "gptq": LINEAR // 2 + LINEAR // 32 * 2 + LINEAR // 32 // 2 + 4 * INPUTS,
    "awq": LINEAR // 2 + LINEAR // 32 * 2 + LINEAR // 32 // 2,
}


def saved_as(directory: Path, quantization: dict[str, Any] | None, **more: Any) -> Path:
    file = directory / "config.json"
    content = json.loads(file.read_text()) | more
    file.write_text(json.dumps(content | ({"quantization_config": quantization} if quantization else {})))
    return directory


@pytest.mark.parametrize("name", BYTES)
def test_a_model_that_is_saved_quantised_counts_as_it_is_saved(name: str, directory: Path, capsys: Any) -> None:
    pytest.importorskip("bitsandbytes")
    lora = ("--lora", "r=2,targets=q_proj", "--optim", "sgd_sai")
    whole = float(memory(capsys, directory, *lora)["sgd_sai"][0])
    packed = float(memory(capsys, saved_as(directory, SAVED[name]), *lora)["sgd_sai"][0])
    assert whole - packed == pytest.approx((4 * LINEAR - BYTES[name]) / 1e6, abs=0.011)


def test_a_model_saved_in_4_bits_is_what_load_in_4bit_gives(directory: Path, capsys: Any) -> None:
    pytest.importorskip("bitsandbytes")
    lora = ("--lora", "r=2,targets=q_proj", "--optim", "sgd_sai")
    loaded = memory(capsys, directory, *lora, "--load-in-4bit")
    qlora = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    assert memory(capsys, saved_as(directory, qlora), *lora) == loaded
    assert memory(capsys, directory, *lora, "--load-in-4bit") == loaded
    assert "nothing to train" in error(capsys, directory)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "fp8"}, "is saved quantised by fp8, and what that takes is not known here"),
        ({"quant_method": "gptq", "bits": "four"}, "gives bits as 'four', which is no whole number"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "gives group_size as 0"),
    ],
)
def test_error_on_a_quantisation_that_is_not_known(
    quantization: dict, message: str, directory: Path, capsys: Any
) -> None:
    assert message in error(capsys, saved_as(directory, quantization), "--lora", "r=2,targets=q_proj")


def test_error_on_4_bits_on_top_of_another_quantisation(directory: Path, capsys: Any) -> None:
    saved_as(directory, SAVED["gptq"])
    assert "is saved quantised by gptq, so it cannot be loaded in 4 bits as well" in error(
        capsys, directory, "--load-in-4bit", "--lora", "r=2,targets=q_proj"
    )


CUSTOM = """
import torch
from transformers import PreTrainedModel, PretrainedConfig

open({ran!r}, "a").write("x")

class OwnConfig(PretrainedConfig):
    model_type = "own"

class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(1000, 1000)
        self.post_init()
"""


def test_code_of_a_models_own_runs_only_where_it_is_asked_for(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    ran, folder = tmp_path / "ran", tmp_path / "own"
    folder.mkdir()
    (folder / "own.py").write_text(CUSTOM.format(ran=str(ran)))
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": classes, "architectures": ["OwnModel"]})
    )
    for command in ("memory", "groups"):
        capsys.readouterr()
        assert main([command, str(folder)]) == 1
        message = capsys.readouterr().err
        assert "brings code of its own, which this command runs only with --trust-remote-code" in message
        assert not ran.exists()
    assert memory(capsys, folder, "--trust-remote-code", "--optim", "sgd_sai")["sgd_sai"][0] == "4.00"
    assert ran.exists()
    assert main(["groups", str(folder), "--trust-remote-code"]) == 0


def test_what_measuring_takes_for_a_moment_is_told_and_not_part_of_the_total(capsys: Any) -> None:
    assert main(["memory", "gpt2", "--optim", "sgd_sai,adamw_torch"]) == 0
    out = capsys.readouterr().out
    assert "SGD-SaI's first step takes 0.03 GB more for a moment" in out
    assert main(["memory", "gpt2", "--optim", "adamw_torch"]) == 0
    assert "for a moment" not in capsys.readouterr().out


def test_error_on_a_rank_that_no_computer_holds(directory: Path, capsys: Any) -> None:
    message = error(capsys, directory, "--lora", "r=" + "9" * 400)
    assert "lora: r must be a whole number above 0 and below 10,000,000" in message
    assert len(message) < 200
