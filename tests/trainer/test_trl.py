"""TRL's own command, unmodified: ``hf-sai run trl sft ... --optim sgd_sai``, on a tiny model."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("trl", reason="trl is not installed (extra recipes)")
pytestmark = pytest.mark.longer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("trl")
    texts = [f"{i} and {i + 1} make {2 * i + 1}." for i in range(32)]
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<eos>"]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=280, special_tokens=special, initial_alphabet=alphabet)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(folder / "tiny")
    config = LlamaConfig(
        vocab_size=280, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "tiny")
    return folder


@pytest.mark.parametrize(
    "command",
    [["-m", "hf_sai", "run", "trl", "sft"], ["-m", "hf_sai.run", "-m", "trl.scripts.sft"]],
    ids=["the command, whose training is a process of its own", "the module"],
)
def test_trl_sft_trains_with_our_optimizer(folder, command, tmp_path):
    options = [
        *("--model_name_or_path", "tiny", "--dataset_name", "./data", "--output_dir", str(tmp_path / "out")),
        *("--optim", "sgd_sai_factored", "--learning_rate", "1e-3", "--max_steps", "2", "--use_cpu", "--bf16", "false"),
        *("--report_to", "none", "--save_strategy", "steps", "--save_steps", "2"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, *command, *options], capture_output=True, text=True, cwd=folder, env=environment, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "hf_sai.run: 1 process trains with SGD-SaI." in done.stderr

    import torch

    state = torch.load(tmp_path / "out" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert {group["update"] for group in state["param_groups"]} == {"factored"}
    assert all(entry["gsnr"] > 0 for entry in state["state"].values())
