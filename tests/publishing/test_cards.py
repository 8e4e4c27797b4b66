"""Model cards: valid metadata, settings, code that runs; a user's words survive, a stranger's are tame."""

import errno
import itertools
import os
import re

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from test_plots import make_record
from trainer_cases import tiny_gpt2, trainer_for
from transformers import PreTrainedTokenizerFast

from hf_sai.cli.main import main
from hf_sai.publishing.artifacts import finish_run
from hf_sai.publishing.card_text import markdown_text
from hf_sai.publishing.cards import BACKUP_FILE, CARD_FILE, render_card, write_card
from hf_sai.runs.record import RunRecord
from hf_sai.trainer.callbacks import RunRecordCallback

DATA = [
    {"name": "counting", "id": "me/counting", "role": "train", "license": "cc0-1.0"},
    {"name": "held-out counting", "id": "me/held-out", "role": "validation", "license": "cc0-1.0"},
]
CARD = {"license": "apache-2.0", "language": "en", "description": "Counts.", "limits": "Counts to nine."}


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {
        "<unk>": 0,
        **{word: index for index, word in enumerate(["Return", "the", "one", "two", "three"], 1)},
    }
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<unk>")


def trained(folder, model=None, **more):
    callback = RunRecordCallback(budget=1.0, data=DATA, card=CARD)
    trainer = trainer_for(folder, callback, model=model, eval_strategy="steps", eval_steps=3, **more)
    trainer.train()
    trainer.save_model()
    tokenizer().save_pretrained(folder)
    callback.add(samples=[{"title": "after training", "text": "Return the ```fenced``` sum", "prompt": "Return the"}])
    return trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "counting"
    trained(folder)
    trained(folder.with_name("counting-adamw"), optim="adamw_torch", learning_rate=1e-3)
    return folder


def python_code(card_text):
    return re.search(r"```python\n(.*?)\n```", card_text, re.DOTALL).group(1)


def test_a_card_tells_everything_that_makes_the_result(run):
    files = finish_run(run, twins=[run.with_name("counting-adamw")])
    assert files[-1] == run / CARD_FILE
    text = ModelCard.load(run / CARD_FILE).text
    for part in (
        "Counts.",
        "A GPT2LMHeadModel, trained from scratch with SGDSaI",
        "| held-out counting | validation | cc0-1.0 |",
        "| momentum | 0.9 |",
        "| weight_decay | 0.1 |",
        "| eps | 1e-08 |",
        "| max_grad_norm | 1.0 |",
        "| base/decay | ",
        "| max_steps | 6 |",
        "## g-SNR",
        "pictures/gsnr.png",
        "| counting (this one) | SGDSaI | 0.01 | 6 |",
        "| counting-adamw | AdamW | 0.001 | 6 |",
        "Counts to nine.",
        f"- Pytorch {torch.__version__}",
        "2412.11768",
    ):
        assert part in text, part
    command = RunRecord.load(run).run["sessions"][0]["command"]
    assert command in text
    assert (run / "pictures" / "loss.png").exists()


def test_metadata_holds_what_was_measured(run):
    write_card(run)
    data = ModelCard.load(run / CARD_FILE).data
    assert (data.license, data.language, data.library_name) == ("apache-2.0", "en", "transformers")
    assert data.pipeline_tag == "text-generation"
    assert data.datasets == ["me/counting", "me/held-out"]
    assert {"hf-sai", "sgd-sai"} <= set(data.tags)
    result = next(result for result in data.eval_results if result.metric_type == "loss")
    assert result.metric_value == RunRecord.load(run).curve("eval_loss")[-1][1]
    assert (result.dataset_type, result.dataset_name) == ("me/held-out", "held-out counting")
    assert result.dataset_split == "validation"


def test_a_data_set_that_is_not_on_the_hub_gives_no_entry_of_the_model_index(tmp_path):
    record = make_record("mine")
    record.history[-1]["eval_loss"] = 1.2345
    record.data = [{"name": "counting", "id": "/home/me/counting", "role": "validation"}]
    record.save(tmp_path)
    write_card(tmp_path)
    card = ModelCard.load(tmp_path / CARD_FILE)
    assert (card.data.eval_results, card.data.datasets) == (None, None)
    assert "1.234" in card.text


def test_the_code_in_a_full_models_card_runs(run, capsys):
    write_card(run, repo_id=str(run))
    exec(python_code((run / CARD_FILE).read_text()), {})
    assert capsys.readouterr().out.startswith("Return the")


def test_the_code_for_a_chat_model_asks_with_its_template(run, tmp_path, capsys):
    import shutil

    folder = shutil.copytree(run, tmp_path / "chat")
    record = RunRecord.load(folder)
    record.samples = [{"title": "t", "text": "one", "messages": [{"role": "user", "content": "Return 'the'", "x": 1}]}]
    record.save(folder)
    chat = tokenizer()
    chat.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    chat.save_pretrained(folder)
    code = python_code(write_card(folder, repo_id=str(folder)).read_text())
    assert """{'role': 'user', 'content': "Return 'the'"},""" in code
    exec(code, {})
    assert "Return" in capsys.readouterr().out


def test_the_code_in_an_adapters_card_runs(tmp_path, capsys):
    from peft import LoraConfig, get_peft_model

    base = tmp_path / "base"
    tiny_gpt2().save_pretrained(base)
    loaded = type(tiny_gpt2()).from_pretrained(base)
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    trained(tmp_path / "lora", model=get_peft_model(loaded, config))
    text = write_card(tmp_path / "lora", repo_id=str(tmp_path / "lora")).read_text()
    assert "library_name: peft" in text
    assert "- lora" in text
    assert "A LORA adapter" in text
    assert str(tmp_path) not in text.split("---\n")[1]  # PEFT's metadata names the path of a local base model
    capsys.readouterr()
    exec(python_code(text), {})
    assert capsys.readouterr().out.startswith("Return the")
    assert (tmp_path / "lora" / BACKUP_FILE).exists()  # PEFT's own, which nobody had touched

    card = (tmp_path / "lora" / CARD_FILE).read_text()
    get_peft_model(loaded, config).create_or_update_model_card(str(tmp_path / "lora"))
    updated = ModelCard.load(tmp_path / "lora" / CARD_FILE)
    assert updated.text.strip() == card.split("---\n", 2)[2].strip()  # PEFT finds its version and adds nothing
    write_card(tmp_path / "lora", repo_id=str(tmp_path / "lora"))
    assert "hf-sai" in ModelCard.load(tmp_path / "lora" / CARD_FILE).data.tags


def test_rendering_twice_changes_nothing(run):
    finish_run(run, twins=[run.with_name("counting-adamw")])
    first = (run / CARD_FILE).read_text()
    finish_run(run)
    assert (run / CARD_FILE).read_text() == first


def test_a_users_words_and_metadata_survive_and_numbers_are_renewed(tmp_path):
    make_record("mine").save(tmp_path)
    path = write_card(tmp_path)
    card = ModelCard.load(path)
    card.text = card.text.replace("## How to use\n", "## How to use\n\nMind the *gap*.\n").replace(
        "# mine\n", "# My model\n"
    )
    card.text = re.sub(r"<!-- /?hf-sai:limits -->\n?", "", card.text).replace("Evaluated only as", "I checked it as")
    card.text += "\n## Thanks\n\nTo my cat.\n"
    card.data.license, card.data.tags = "mit", ["cat", "hf-sai"]
    card.data["co2_eq_emissions"] = 3
    card.save(path)
    record = make_record("mine", state_bytes=7_654_321)
    record.history[-1]["eval_loss"] = 1.2345
    record.data = [{"name": "d", "id": "me/d"}]
    record.save(tmp_path)
    write_card(tmp_path)
    again = ModelCard.load(path)
    for words in ("Mind the *gap*.", "# My model", "I checked it as", "To my cat.", "7,654,321", "1.234"):
        assert words in again.text
    assert again.text.count("## Thanks") == 1
    assert (again.data.license, again.data.tags, again.data["co2_eq_emissions"]) == (
        "mit",
        ["cat", "hf-sai", "sgd-sai"],
        3,
    )
    assert again.data.eval_results[0].metric_value == 1.2345
    assert not (tmp_path / BACKUP_FILE).exists()


def test_scores_before_training_stand_below(tmp_path):
    record = make_record("mine")
    record.results = {"rouge": 0.5, "before training": {"eval_loss": 9.25, "rouge": 0.125, "note": "no number"}}
    assert "| before training | | | 0 | 9.25 | 0.125 | |" in render_card(record).text


def test_own_images_are_shown_and_no_others():
    record = make_record("mine")
    files = ["images/grid.png", "../secret.png", "images/../../a.png", "https://x.y/t.png", "images/a b.png", "a.png"]
    record.images = [{"title": f"[picture] {index}", "file": name} for index, name in enumerate(files)]
    shown = re.findall(r"!\[(.*)\]\((.*)\)", render_card(record).text)
    assert shown == [(r"\[picture\] 0", "images/grid.png")]


def test_a_local_base_model_is_not_taken_for_one_on_the_hub(tmp_path, monkeypatch):
    from hf_sai.runs.describe import describe_model

    monkeypatch.chdir(tmp_path)
    tiny_gpt2().save_pretrained("runs/base")
    described = describe_model(type(tiny_gpt2()).from_pretrained("runs/base"))
    assert described["base_model"] == "./runs/base"
    record = make_record("mine")
    record.model = described
    assert render_card(record).data.base_model is None


def test_diffusers_own_card_functions_keep_ours(tmp_path):
    hub_utils = pytest.importorskip("diffusers.utils.hub_utils")
    make_record("mine").save(tmp_path)
    ours = ModelCard.load(write_card(tmp_path))
    card = hub_utils.load_or_create_model_card(str(tmp_path / CARD_FILE), is_pipeline=True)
    hub_utils.populate_model_card(card, tags=["text-to-image"]).save(tmp_path / CARD_FILE)
    theirs = ModelCard.load(tmp_path / CARD_FILE)
    assert theirs.text.strip() == ours.text.strip()
    write_card(tmp_path)
    assert {"text-to-image", "hf-sai"} <= set(ModelCard.load(tmp_path / CARD_FILE).data.tags)


def test_foreign_evaluation_results_are_kept(tmp_path):
    record = make_record("mine")
    record.data = [{"name": "d", "id": "me/d"}]
    record.save(tmp_path)
    other = {
        "task": {"type": "text-generation"},
        "dataset": {"type": "x/y", "name": "Y"},
        "metrics": [{"type": "bleu", "value": 3}],
    }
    data = ModelCardData(**{"model-index": [{"name": "mine", "results": [other]}]})
    (tmp_path / CARD_FILE).write_text(f"---\n{data.to_yaml()}\n---\nMy text.\n")
    write_card(tmp_path)
    results = ModelCard.load(tmp_path / CARD_FILE).data.eval_results
    assert {(r.dataset_name, r.metric_type) for r in results} == {("Y", "bleu"), ("d", "loss")}
    assert "My text." in (tmp_path / CARD_FILE).read_text()


@pytest.mark.parametrize("tool", ["trainer", "peft", "trl", "diffusers"])
@pytest.mark.parametrize("touched", [False, True])
def test_tools_own_cards_are_replaced_only_if_untouched(tmp_path, tool, touched):
    if tool == "trainer":
        trainer = trainer_for(tmp_path)
        trainer.train()
        trainer.create_model_card()
    else:
        make_record("mine").save(tmp_path)
    if tool == "peft":
        from peft import LoraConfig, get_peft_model

        get_peft_model(tiny_gpt2(), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)).save_pretrained(
            tmp_path
        )
    if tool == "trl":
        import trl.trainer.utils as utils

        options = dict.fromkeys(("wandb_url", "trackio_url"), None)
        card = utils.generate_model_card(
            "me/base", "name", "me/name", "me/data", ["trl"], trainer_name="SFT", **options
        )
        card.save(tmp_path / CARD_FILE)
    if tool == "diffusers":
        hub_utils = pytest.importorskip("diffusers.utils.hub_utils")
        options = {"is_pipeline": True, "model_description": "A pipeline."} if touched else {"is_pipeline": True}
        card = hub_utils.load_or_create_model_card("nobody/nothing", **options)
        card.save(tmp_path / CARD_FILE)
    path = tmp_path / CARD_FILE
    old = ModelCard.load(path).text.strip()
    if touched:
        line = "This model knows how to count sheep."
        path.write_text(re.sub(r"(?m)^(## .*)$", rf"\1\n\n{line}", path.read_text(), count=1))
        old = ModelCard.load(path).text.strip()
        if tool == "trainer":
            old = old.replace(f"{line}\n\nMore information needed", line)
            path.write_text(path.read_text().replace(f"{line}\n\nMore information needed", line))
    write_card(tmp_path)
    text = path.read_text()
    assert "<!-- hf-sai:training -->" in text
    assert (old in text) is touched
    assert (tmp_path / BACKUP_FILE).exists() is not touched


def test_a_users_own_template_is_used_in_a_sandbox(tmp_path):
    make_record("mine").save(tmp_path)
    template = tmp_path / "mine.jinja"
    template.write_text(
        "# {{ record.name | md }}\n<!-- hf-sai:x -->\n{{ runs[0].state_bytes | bytes }}\n<!-- /hf-sai:x -->\n"
    )
    assert "# mine\n<!-- hf-sai:x -->\n4.3 MB\n" in write_card(tmp_path, template=template).read_text()
    for source, reason in [
        ("{{ record.save.__globals__ }}", "SecurityError|unsafe"),
        ("{{ nothing }}", "'nothing' is undefined"),
        ("{% if %}", "line 1"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ record.save('" + str(tmp_path / "stolen.json") + "') }}", "SecurityError"),
        ("{{ record.load('" + str(tmp_path) + "').name }}", "SecurityError"),
    ]:
        template.write_text(source)
        with pytest.raises(ValueError, match=reason):
            write_card(tmp_path, template=template)
    assert not (tmp_path / "stolen.json").exists()
    assert "4.3 MB" in (tmp_path / CARD_FILE).read_text()


HOSTILE = "<script>alert(1)</script> | --- [x](javascript:1)\n# head\n<!-- /hf-sai:what -->```\n---\nlicense: evil"


def test_a_strangers_record_puts_no_markup_into_the_card():
    record = make_record(HOSTILE)
    record.run.update(
        sessions=[{"command": HOSTILE + "````", "from_step": 0}], card={"description": HOSTILE, "tags": [HOSTILE]}
    )
    record.settings = {"seed": HOSTILE, "hub_model_id": "x'); import os  # "}
    record.model = {"class": HOSTILE, "base_model": "../../etc", "library": HOSTILE}
    record.data = [{"name": HOSTILE, "license": HOSTILE, "id": HOSTILE}]
    record.samples = [{"title": HOSTILE, "text": HOSTILE, "prompt": HOSTILE}]
    record.versions = {HOSTILE: HOSTILE}
    card = render_card(record)
    outside = re.sub(r"(?ms)^(`{3,})\w*\n.*?\n\1$", "", card.text)
    for markup in ("<script", "\n# head", "[x](javascript", "<!-- /hf-sai:what -->\\"):
        assert markup not in outside
    assert outside.count("<!-- /hf-sai:what -->") == card.text.count("<!-- /hf-sai:what -->") == 1
    parsed = ModelCard(str(card)).data
    assert parsed.license is None
    assert parsed.base_model is None
    assert parsed.tags[2] == " ".join(HOSTILE.split())


def test_text_is_escaped_for_markdown():
    assert markdown_text("default/lora_A") == "default/lora_A"
    assert markdown_text("a|b\n*c* `d` _e_ <f> [g]") == "a\\|b \\*c\\* \\`d\\` \\_e\\_ &lt;f&gt; \\[g\\]"


BOMB = "a: &a [x, x]\n" + "".join(
    f"{c}: &{c} [*{p}, *{p}, *{p}, *{p}, *{p}, *{p}, *{p}, *{p}]\n" for p, c in itertools.pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (f"---\n{BOMB}---\ntext", "aliases are not allowed"),
        ("---\n!!python/object/apply:os.system ['true']\n---\ntext", "could not determine a constructor"),
        ("---\n- a list\n---\ntext", "should be a dict"),
        ("---\n1: 2\n---\ntext", "must be strings"),
        ("---\nmodel-index: [{name: 1, results: x}]\n---\ntext", "metadata of"),
        ("---\n" + "[" * 5000 + "\n---\ntext", "50 levels deep"),
    ],
)
def test_a_card_with_yaml_tricks_is_refused_and_left_alone(tmp_path, content, reason):
    make_record().save(tmp_path)
    (tmp_path / CARD_FILE).write_text(content)
    with pytest.raises(ValueError, match=reason):
        write_card(tmp_path)
    assert (tmp_path / CARD_FILE).read_text() == content


def test_a_huge_card_is_refused(tmp_path):
    make_record().save(tmp_path)
    with open(tmp_path / CARD_FILE, "wb") as file:
        file.truncate(10**9)
    with pytest.raises(ValueError, match="is larger than"):
        write_card(tmp_path)


def test_a_card_without_metadata_gets_some(tmp_path):
    make_record().save(tmp_path)
    (tmp_path / CARD_FILE).write_text("# Mine\n\nAll of it.\n")
    write_card(tmp_path)
    card = ModelCard.load(tmp_path / CARD_FILE)
    assert card.text.strip().startswith("# Mine\n\nAll of it.")
    assert "hf-sai" in card.data.tags


def test_the_command_writes_card_and_pictures(tmp_path, capsys):
    make_record("one").save(tmp_path / "one")
    make_record("two", "AdamW").save(tmp_path / "two")
    assert main(["card", str(tmp_path / "one"), "--twin", str(tmp_path / "two"), "--repo-id", "me/one"]) == 0
    assert str(tmp_path / "one" / CARD_FILE) in capsys.readouterr().out
    text = (tmp_path / "one" / CARD_FILE).read_text()
    assert "| two | AdamW |" in text
    assert "snapshot_download('me/one')" in text
    assert main(["card", str(tmp_path / "nowhere")]) == 1
    assert "cannot read" in capsys.readouterr().err


def test_a_full_disk_is_told_and_leaves_card_and_record_as_they_were(tmp_path, monkeypatch, capsys):
    make_record("one").save(tmp_path)
    write_card(tmp_path)
    (tmp_path / CARD_FILE).write_text((tmp_path / CARD_FILE).read_text() + "My words.\n")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    commands = (
        ["card", tmp_path],
        ["plot", tmp_path, "--out", tmp_path],
    )
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        patch.setattr("hf_sai.publishing.plots.draw", lambda figure: b"picture")
        for command in commands:
            assert main(list(map(str, command))) == 1
            assert "(No space left on device); what was there before is unchanged" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.glob("*.*")} == before
    assert main(["card", str(tmp_path)]) == 0  # there is room again
    assert "My words." in (tmp_path / CARD_FILE).read_text()


def test_other_processes_write_no_card(tmp_path, monkeypatch):
    make_record().save(tmp_path)
    monkeypatch.setenv("RANK", "1")
    assert finish_run(tmp_path) == []
    assert not (tmp_path / CARD_FILE).exists()


def test_a_card_that_is_refused_leaves_the_pictures_as_they_were(tmp_path, capsys):
    make_record("one").save(tmp_path)
    assert main(["card", str(tmp_path)]) == 0
    make_record("one", offset=1.0).save(tmp_path)
    (tmp_path / CARD_FILE).write_text("---\n[broken\n---\n")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["card", str(tmp_path)]) == 1
    assert "mend or remove it" in capsys.readouterr().err
    assert main(["card", str(tmp_path), "--twin", str(tmp_path / "nowhere")]) == 1
    assert main(["card", str(tmp_path), "--template", str(tmp_path / "nowhere")]) == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_card_keeps_its_twins_when_it_is_written_again(tmp_path):
    make_record("own").save(tmp_path / "own")
    make_record("other", "AdamW").save(tmp_path / "other")
    assert "AdamW" not in finish_run(tmp_path / "own")[-1].read_text()  # nobody named it
    finish_run(tmp_path / "own", twins=[tmp_path / "other"])
    assert "| other | AdamW |" in finish_run(tmp_path / "own")[-1].read_text()


def test_a_class_of_the_script_itself_is_loaded_by_its_library():
    record = make_record("mine")
    record.model = {"class": "MyGPT2LMHeadModel", "library": "__main__", "type": "gpt2"}
    card = render_card(record, repo_id="me/mine")
    assert card.data.library_name == "transformers"
    assert "AutoModelForCausalLM.from_pretrained('me/mine')" in card.text
    record.model = {"class": "Net", "library": "__main__"}
    card = render_card(record, repo_id="me/mine")
    assert card.data.library_name is None
    assert "snapshot_download('me/mine')" in card.text


def test_a_notebooks_kernel_is_shown_as_a_notebook():
    record = make_record("mine")
    record.run["sessions"] = [{"command": "python -m ipykernel_launcher -f /path/to/kernel.json", "from_step": 0}]
    text = render_card(record).text
    assert "ipykernel" not in text
    assert "# in a notebook" in text


def test_folders_of_the_machine_are_no_data_sets_or_bases_of_a_card(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "mine").mkdir(parents=True)
    record = make_record("mine")
    record.data = [{"name": "mine", "id": "data/mine"}, {"name": "theirs", "id": "them/theirs"}]
    record.run["card"] = {"base_model": "/home/SOMEBODY/base", "datasets": ["/home/SOMEBODY/d", "me/d", "data/mine"]}
    record.save("run")
    data = ModelCard.load(write_card("run")).data
    assert data.datasets == ["me/d"]
    assert data.base_model is None
    assert "SOMEBODY" not in (tmp_path / "run" / CARD_FILE).read_text()
