"""Bad inputs, the same each time: what cannot be used ends in one sentence and never in a traceback."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
import yaml
from fuzzing import CHANGES, DAMAGE, VALUES, cases, damage, mangle, one_sentence
from hypothesis import given
from hypothesis import strategies as st

from hf_sai import SGDSaI, create_sgd_sai_optimizer
from hf_sai.cli.main import main
from hf_sai.optim.options import OPTIONS
from hf_sai.publishing.cards import render_card
from hf_sai.runs.record import RECORD_FILE, RunRecord
from hf_sai.trainer.optim_args import parse_optim_args
from recipes.common.recipe_input import InputError, find_checkpoint, parse_config_and_flags

ROOT = Path(__file__).parents[2]
CASES = cases(400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@CASES
@given(
    st.lists(st.tuples(st.sampled_from([*OPTIONS, "lr_ratios", "freeze", "made_up"]), VALUES), max_size=3),
    st.booleans(),
)
def test_optim_args(pairs, as_text):
    given_ = ",".join(f"{key}={value}" for key, value in pairs) if as_text else dict(pairs)
    with one_sentence(ImportError, ValueError):
        options = parse_optim_args(given_)
        for key in ("lr_ratios", "freeze"):
            options.pop(key, None)
        SGDSaI([torch.nn.Parameter(torch.zeros(2))], **options)


@pytest.fixture(scope="module")
def recipe():
    path = ROOT / "recipes" / "gpt2_pretraining" / "train.py"
    spec = importlib.util.spec_from_file_location("fuzzed_gpt2_recipe", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


KEYS = (
    *("optim", "optim_args", "learning_rate", "output_dir", "per_device_train_batch_size", "max_steps", "seed"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "eval_strategy", "save_strategy", "logging_steps", "report_to"),
    *("deepspeed", "fsdp", "fsdp_config", "accelerator_config", "adam_beta1", "max_grad_norm", "num_train_epochs"),
    *("dropout", "train_file", "vocab_size", "restart", "streaming", "env", "bf16", "hub_strategy", "made_up", 3),
)


@CASES
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=2), st.none() | DAMAGE)
def test_yaml_configs(folder, recipe, changes, broken):
    content = yaml.safe_load((ROOT / "recipes/gpt2_pretraining/smoke.yaml").read_text()) | {"use_cpu": True} | changes
    text = yaml.dump(content, allow_unicode=True).encode()
    file = folder / "config.yaml"
    file.write_bytes(text if broken is None else damage(text, broken))
    kinds = (recipe.ScriptArguments, transformers.TrainingArguments)
    with one_sentence(InputError):
        _, training_args = parse_config_and_flags(kinds, [str(file), "--output_dir", str(folder / "out")], usage="x")
        recipe.check_optimizer(training_args, torch.nn.Linear(2, 2))
        find_checkpoint(training_args)


@CASES
@given(CHANGES, st.none() | DAMAGE)
def test_records_and_their_cards(folder, changes, broken):
    whole = json.loads((ROOT / "model_cards/gpt2_demo" / RECORD_FILE).read_text())
    whole["history"] = whole["history"][:3]
    whole["gsnr"]["parameters"] = whole["gsnr"]["parameters"][:2]
    text = json.dumps(mangle(whole, changes)).encode()
    (folder / RECORD_FILE).write_bytes(text if broken is None else damage(text, broken))
    with one_sentence(ValueError):
        record = RunRecord.load(folder)
        card = str(render_card(record))
        assert card.startswith("---\n")


SHAPES = {"matrix": (64, 65), "vector": (5,), "last": (4, 3)}


def small_optimizer(**options):
    torch.manual_seed(0)
    return SGDSaI([(name, torch.nn.Parameter(torch.randn(shape))) for name, shape in SHAPES.items()], **options)


def step(optimizer):
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.randn_like(p)
    optimizer.step()


STATES = [
    {},
    {"update": "factored"},
    {"update": "rows"},
    {"update": "averaged"},
    {"momentum_dtype": "8bit"},
    {"momentum_dtype": torch.bfloat16},
]


@pytest.fixture(scope="module")
def saved():
    optimizers = [small_optimizer(**options) for options in STATES]
    for optimizer in optimizers:
        step(optimizer)
    return [optimizer.state_dict() for optimizer in optimizers]


@CASES
@given(st.sampled_from(range(len(STATES))), CHANGES)
def test_states_at_resume(saved, number, changes):
    """Whatever is loaded can train on; whatever is refused leaves nothing behind."""
    optimizer = small_optimizer(**STATES[number])
    with one_sentence(ValueError):
        optimizer.load_state_dict(mangle(saved[number], changes))
        step(optimizer)
        return
    assert not optimizer.state
    step(optimizer)


@pytest.fixture(scope="module")
def checkpoint(folder):
    """A checkpoint of a small adapter: what it is made of, unharmed."""
    config = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    llama = transformers.LlamaConfig(**config, num_attention_heads=2, architectures=["LlamaForCausalLM"])
    base = transformers.LlamaForCausalLM(llama)
    llama.save_pretrained(folder / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    optimizer = create_sgd_sai_optimizer(model, lr=0.1)
    ids = torch.arange(5, 13).reshape(1, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "checkpoint")
    (folder / "checkpoint" / "adapter_model.safetensors").unlink()
    return SimpleNamespace(
        config=json.loads((folder / "base" / "config.json").read_text()),
        adapter=json.loads((folder / "checkpoint" / "adapter_config.json").read_text()),
        state=optimizer.state_dict(),
    )


@CASES
@given(st.sampled_from(["config", "adapter", "state"]), CHANGES, st.none() | DAMAGE)
def test_checkpoints(folder, checkpoint, what, changes, broken):
    files = {
        "config": folder / "base" / "config.json",
        "adapter": folder / "checkpoint" / "adapter_config.json",
        "state": folder / "checkpoint" / "optimizer.pt",
    }
    for name, file in files.items():
        content = getattr(checkpoint, name)
        content = mangle(content, changes) if name == what else content
        if name == "state":
            torch.save(content, file)
        else:
            file.write_text(json.dumps(content))
    if broken is not None:
        files[what].write_bytes(damage(files[what].read_bytes(), broken))
    assert main(["groups", str(folder / "checkpoint")]) in (0, 1)
    files["state"].unlink()
    assert main(["groups", str(folder / "checkpoint")]) in (0, 1)
    assert main(["memory", str(folder / "checkpoint"), "--optim", "sgd_sai,adamw_torch"]) in (0, 1)
