"""The GPT-2 recipe: its command runs as documented, its numbers are right, and bad input ends in one sentence."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, TrainingArguments

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "gpt2_pretraining"
OPTIMIZER_LINES = {"optim", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "optim_args", "output_dir"}
TEXT = "\n\n".join(f"Paragraph {number} says that {number} times {number} is {number**2}." for number in range(400))


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, RECIPE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # sweep.py imports train
    spec.loader.exec_module(module)
    return module


train = load_script("train")
compare = load_script("compare")
sweep = load_script("sweep")


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture
def arguments(text_file, tmp_path):
    """The smoke configuration on a small text, without progress bars."""
    small = ["--train_file", text_file, "--disable_tqdm", "true", "--report_to", "none", "--use_cpu", "true"]
    return [str(RECIPE / "smoke.yaml"), *small, "--output_dir", str(tmp_path / "run")]


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory):
    """The documented command, in a process of its own, on the standard library's documentation."""
    run = tmp_path_factory.mktemp("smoke") / "run"
    config = ROOT / "recipes" / "accelerate_configs" / "cpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += [str(RECIPE / "train.py"), str(RECIPE / "smoke.yaml"), "--output_dir", str(run)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return run, finished.stdout


def test_smoke_command_trains_on_real_text_and_says_where_everything_is(smoke_run):
    run, output = smoke_run
    results = json.loads((run / "results.json").read_text())
    vocabulary = yaml.safe_load((RECIPE / "smoke.yaml").read_text())["vocab_size"]
    assert results["metrics"]["eval_loss"] < math.log(vocabulary) - 0.5
    assert results["metrics"]["eval_perplexity"] == pytest.approx(math.exp(results["metrics"]["eval_loss"]))
    assert results["optimizer"]["optim"] == "sgd_sai"
    for name in ("pictures/loss.png", "results.json", "README.md"):
        assert str(run / name) in output
        assert (run / name).stat().st_size > 0
    assert (run / "sample.txt").read_text().startswith("Return the")
    assert list(run.glob("runs/*/events.out.tfevents.*")), "TensorBoard's files"


def test_saved_run_loads_with_its_trained_tokenizer(smoke_run):
    run, _ = smoke_run
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    text = "def größe(x):\n    return x"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert model.config.vocab_size == len(tokenizer) == 512
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_comparison_counts_half_of_adamw_s_state_and_saves_table_picture_and_numbers(
    smoke_run, text_file, tmp_path, capsys
):
    run, _ = smoke_run
    same_shapes = ["--model_name_or_path", str(run), "--train_file", text_file]
    options = ["--optim", "adamw_torch", "--learning_rate", "3e-3", "--max_steps", "2", "--save_steps", "2"]
    quiet = ["--disable_tqdm", "true", "--report_to", "none", "--eval_strategy", "no", "--sample_tokens", "0"]
    train.main([str(RECIPE / "smoke.yaml"), *same_shapes, *options, *quiet, "--output_dir", str(tmp_path / "adamw")])
    names = [str(run), str(tmp_path / "adamw")]
    comparison = compare.main([*names, "--output_dir", str(tmp_path / "comparison"), "--rounds", "5"])

    ours, adamw = (comparison["runs"][name] for name in names)
    tensors = sum(1 for _ in AutoModelForCausalLM.from_pretrained(run).parameters())
    assert ours["optimizer_state_bytes"] == 4 * ours["parameters"] + 8 * tensors  # buffer and one number a tensor
    assert adamw["optimizer_state_bytes"] == 8 * adamw["parameters"] + 4 * tensors  # two averages and a step count
    assert ours["optimizer_state_ratio"] == pytest.approx(0.5, abs=0.01)
    assert adamw["step_time_ratio"]["median"] == 1
    assert ours["step_time_ratio"]["lower_quartile"] <= ours["step_time_ratio"]["median"]
    table = (tmp_path / "comparison" / "comparison.md").read_text()
    assert table.strip() in capsys.readouterr().out
    assert f"{ours['eval_loss']:.4f}" in table
    assert (tmp_path / "comparison" / "loss.png").stat().st_size > 0


def test_comparison_refuses_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(compare.InputError, match=r"is no finished run of train\.py"):
        compare.main([str(tmp_path / "one"), str(tmp_path / "two")])


def test_resumed_run_ends_with_the_very_loss_of_the_uninterrupted_one(arguments, tmp_path):
    whole = train.main(arguments)
    resumed = [*arguments[:-1], str(tmp_path / "resumed"), "--resume_from_checkpoint"]
    again = train.main([*resumed, str(tmp_path / "run" / "checkpoint-10")])
    assert again["eval_loss"] == whole["eval_loss"]
    assert json.loads((tmp_path / "resumed" / "results.json").read_text())["checkpoint"] == "checkpoint-20"


def test_streamed_text_with_a_given_model_and_its_tokenizer(arguments, smoke_run):
    run, _ = smoke_run
    options = ["--streaming", "true", "--validation_documents", "40", "--model_name_or_path", str(run)]
    metrics = train.main([*arguments, *options, "--max_steps", "2", "--eval_strategy", "no"])
    assert math.isfinite(metrics["eval_loss"])


def test_held_out_documents_are_the_first_and_are_not_trained_on(text_file):
    script_args, _ = train.parse_arguments(["--train_file", text_file, "--output_dir", "unused"])
    documents = train.load_text(script_args)
    paragraphs = TEXT.split("\n\n")
    assert list(documents["validation"]["text"]) == paragraphs[:40]
    assert list(documents["train"]["text"]) == paragraphs[40:]


def test_blocks_are_the_documents_with_an_end_token_after_each_and_nothing_else(smoke_run):
    tokenizer = AutoTokenizer.from_pretrained(smoke_run[0])
    script_args, _ = train.parse_arguments(["--block_size", "4", "--output_dir", "unused"])
    texts = ["One document.", "", "   ", None, "Another one, longer."]
    blocks = train.to_blocks(Dataset.from_dict({"text": texts}), "test", script_args, tokenizer)
    joined = [token for block in blocks["input_ids"] for token in block]
    expected = [token for text in texts if text and text.strip() for token in [*tokenizer(text)["input_ids"], 0]]
    assert tokenizer.eos_token_id == 0
    assert joined == expected[: len(expected) // 4 * 4]
    assert blocks["labels"] == blocks["input_ids"]


def test_reduced_logits_and_the_metric_give_the_model_s_own_loss():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2)).eval()
    tokens = torch.randint(0, 50, (3, 16))
    labels = tokens.clone()
    labels[0, 9:] = -100
    with torch.no_grad():
        output = model(input_ids=tokens, labels=labels)
    reduced = train.nll_and_tokens(output.logits, labels)
    assert reduced.shape == (3, 2)
    result = evaluate.load(str(train.METRIC)).compute(predictions=reduced[:, 0], references=reduced[:, 1].long())
    assert result["loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(output.loss.item()), rel=1e-5)


def test_metric_says_infinity_for_a_perplexity_beyond_floats_and_refuses_no_tokens():
    metric = evaluate.load(str(train.METRIC))
    assert metric.compute(predictions=[1e4], references=[1]) == {"loss": 1e4, "perplexity": math.inf}
    with pytest.raises(ValueError, match="at least one"):
        metric.compute(predictions=[0.0], references=[0])


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_model_sizes_are_openai_s(size, parameters):
    script_args, _ = train.parse_arguments(
        ["--model_size", size, "--block_size", "1024", "--output_dir", "unused"],
    )

    class Tokenizer:
        bos_token_id = eos_token_id = 50256
        __len__ = lambda self: 50257  # noqa: E731

    with torch.device("meta"):
        assert train.load_model(script_args, Tokenizer()).num_parameters() == parameters


@pytest.mark.parametrize("config", sorted(RECIPE.glob("*.yaml")), ids=lambda path: path.name)
def test_every_configuration_opens_with_command_cost_and_expectation_and_has_no_unknown_key(config):
    head = config.read_text().split("\noutput_dir:")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"recipes/gpt2_pretraining/train.py recipes/gpt2_pretraining/{config.name}" in head
    assert "# Cost: " in head
    assert "Expect" in head
    allowed = set(train.ScriptArguments.__dataclass_fields__) | set(TrainingArguments.__dataclass_fields__)
    assert set(yaml.safe_load(config.read_text())) <= allowed


@pytest.mark.parametrize("name", ["demo", "gpt2_small"])
def test_adamw_twin_differs_only_in_the_optimizer_s_lines(name):
    ours, adamw = (yaml.safe_load((RECIPE / f"{name}{twin}.yaml").read_text()) for twin in ("", "_adamw"))
    differing = {key for key in ours | adamw if ours.get(key) != adamw.get(key)}
    assert differing <= OPTIMIZER_LINES
    ours_expected = "sgd_sai_orthogonal" if name == "demo" else "sgd_sai"
    assert (ours["optim"], adamw["optim"]) == (ours_expected, "adamw_torch_fused")


BAD_INPUT = {
    "missing configuration": (["nowhere.yaml"], "cannot read the settings: .*nowhere.yaml"),
    "unknown key": (["--lerning_rate", "1"], "cannot read the settings: .*lerning_rate"),
    "unknown optimizer": (["--optim_args", "mass=1"], "cannot build the optimizer sgd_sai: .*mass"),
    "missing file": (["--train_file", "nowhere.txt"], "there is no file nowhere.txt"),
    "missing validation file": (["--validation_file", "nowhere.txt"], "there is no file nowhere.txt"),
    "unknown kind of file": (["--train_file", __file__], "must be of one kind, and end in one of .txt"),
    "unknown column": (["--text_column", "body"], "has no column 'body'; name one of text as --text_column"),
    "text below one block": (["--block_size", "100000"], "shorter than one block of 100000 tokens"),
    "unknown dtype": (["--dtype", "int8"], "dtype is 'int8'; choose one of float32, bfloat16"),
    "unknown size": (["--model_size", "huge"], "model_size is 'huge'; choose one of tiny, gpt2"),
    "tiny block": (["--block_size", "1"], "block_size is 1; it must be at least 2"),
    "vocabulary below the bytes": (["--vocab_size", "100"], "vocab_size is 100; it must be above 256"),
    "endless stream": (["--streaming", "true", "--max_steps", "-1"], "streaming needs --max_steps"),
    "nothing to resume": (["--resume_from_checkpoint", "true"], "holds no whole checkpoint"),
    "no checkpoint there": (["--resume_from_checkpoint", "nowhere"], "nowhere is no checkpoint folder"),
    "missing model": (["--model_name_or_path", "./nowhere"], "cannot load the tokenizer ./nowhere"),
}


@pytest.mark.parametrize(("options", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_sentence_and_leaves_no_output_directory(options, message, arguments, tmp_path):
    argv = [*options, *arguments[1:]] if options[0].endswith(".yaml") else [*arguments, *options]
    with pytest.raises(train.InputError, match=message) as caught:
        train.main(argv)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_unknown_key_in_the_file_is_an_error(arguments, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text((RECIPE / "smoke.yaml").read_text() + "bloc_size: 3\n")
    with pytest.raises(train.InputError, match="bloc_size"):
        train.main([str(config), *arguments[1:]])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", r"the file .*empty\.txt is empty"),
        ("short.txt", "One paragraph.", "is one document or none .* none can be held out"),
        ("blank.txt", "\n \n\n \n\n \n", "text is empty"),
        ("broken.jsonl", "{nothing", r"cannot load .*broken\.jsonl: "),
    ],
)
def test_file_without_usable_text_is_one_sentence(name, content, message, arguments, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(train.InputError, match=message):
        train.main([*arguments, "--train_file", str(path)])
    assert not (tmp_path / "run").exists()


def test_earlier_checkpoints_are_not_mixed_with_a_new_run(arguments, tmp_path):
    (tmp_path / "run" / "checkpoint-7").mkdir(parents=True)
    with pytest.raises(train.InputError, match=r"checkpoint-7 is from an earlier run: .*--restart true"):
        train.main([*arguments, "--restart", "false"])
    train.main([*arguments, "--max_steps", "2", "--save_steps", "2", "--eval_strategy", "no"])
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]


def test_unreachable_hub_is_one_sentence_on_stderr_and_leaves_no_output_directory(tmp_path):
    command = [sys.executable, str(RECIPE / "train.py"), str(RECIPE / "smoke.yaml"), "--dataset_name", "some/corpus"]
    finished = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "run")],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 1
    assert "Traceback" not in finished.stderr
    assert finished.stderr.strip().splitlines()[-1].startswith("train.py: cannot load some/corpus: ")
    assert not (tmp_path / "run").exists()


def test_sweep_pools_seeds_counts_divergence_and_does_not_repeat_runs(monkeypatch, tmp_path, capsys):
    calls = []

    def fake_main(argv):
        options = dict(zip(argv[1::2], argv[2::2], strict=True))
        calls.append(options)
        diverged = options["--learning_rate"] == "9"
        return {"eval_loss": math.nan if diverged else 3.0 + int(options["--seed"])}

    monkeypatch.setattr(sweep.train, "main", fake_main)
    argv = ["demo.yaml", "--output", str(tmp_path / "table"), "--grid", "learning_rate=1,9", "--grid", "seed=0,1"]
    sweep.main([*argv, "--weight_decay", "0.1"])
    sweep.main([*argv, "--weight_decay", "0.1"])
    assert len(calls) == 4
    assert all(options["--weight_decay"] == "0.1" for options in calls)
    assert all(not Path(options["--output_dir"]).exists() for options in calls)
    table = (tmp_path / "table.md").read_text()
    assert "| demo, weight_decay 0.1, learning_rate 1 | 2 | 0 | 3.5000 | 0.7071 | 3.0000 to 4.0000 |" in table
    assert "| demo, weight_decay 0.1, learning_rate 9 | 2 | 2 | - | - | - |" in table
    assert table in capsys.readouterr().out
