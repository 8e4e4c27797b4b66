"""model_cards/: every card is what its record gives, its metadata is valid, and nothing of the machine is in it."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from hf_sai.publishing.card_merge import is_hub_id
from hf_sai.publishing.cards import CARD_FILE, render_card
from hf_sai.runs.record import RECORD_FILE, RunRecord
from hf_sai.runs.redact import redact

HOME = Path(__file__).parents[2] / "model_cards"
FOLDERS = sorted(file.parent for file in HOME.glob(f"*/{RECORD_FILE}"))
IDS = [folder.name for folder in FOLDERS]
KEPT = ("README.md", "run_record.json", "*/*.png", "samples/*.txt", "sample.txt")


def load_collect():
    spec = importlib.util.spec_from_file_location("collect_model_cards", HOME / "collect.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def collect():
    return load_collect()


def pictures(folder):
    return sorted(path.name for path in (folder / "pictures").glob("*.png"))


def test_there_are_cards():
    assert {"gpt2_demo", "gpt2_demo_adamw"} <= set(IDS)
    assert all(file.parent in FOLDERS for file in HOME.glob(f"*/{CARD_FILE}"))


@pytest.mark.parametrize("folder", FOLDERS, ids=IDS)
def test_a_card_is_what_its_record_gives(folder):
    record = RunRecord.load(folder)
    assert str(render_card(record, pictures=pictures(folder))) == (folder / CARD_FILE).read_text(encoding="utf-8")
    for twin in record.twins:
        assert twin == RunRecord.load(HOME / twin["name"]).summary()


@pytest.mark.parametrize("folder", FOLDERS, ids=IDS)
def test_the_metadata_names_what_the_hub_knows(folder):
    record, data = RunRecord.load(folder), ModelCard.load(folder / CARD_FILE).data
    assert data.license
    assert data.library_name in ("transformers", "peft", "diffusers")
    assert data.pipeline_tag
    assert "hf-sai" in data.tags
    assert data.base_model is None or is_hub_id(data.base_model)
    assert set(data.metrics or ()) == record.metrics().keys() - {"loss"} != record.metrics().keys()
    assert all(is_hub_id(result.dataset_type) for result in data.eval_results or ())
    assert all(is_hub_id(name) for name in data.datasets or ())


@pytest.mark.parametrize("folder", FOLDERS, ids=IDS)
def test_what_git_keeps_is_small_and_holds_nothing_of_the_machine(folder):
    assert all(path.stat().st_size < 2**20 for pattern in KEPT for path in folder.glob(pattern))
    text = "\n".join(path.read_text(encoding="utf-8") for path in (folder / RECORD_FILE, folder / CARD_FILE))
    # An absolute path: not part of a URL, of a relative path, of a role such as default/lora_A, or of a tag.
    paths = re.findall(r"(?<![\w.:/<~*])/(?:home|root|work|tmp|mnt|data|opt|usr|Users|var|private)\b[^\s\"']*", text)
    assert paths == []
    assert not re.search(r"(?:\d{1,3}\.){3}\d{1,3}\b(?!\w)", re.sub(r"[\d.]+\.dev\S*", "", text))
    record = RunRecord.load(folder)
    assert redact(record.settings) == record.settings


@pytest.mark.parametrize("folder", FOLDERS, ids=IDS)
def test_every_picture_a_card_shows_is_there(folder):
    card = (folder / CARD_FILE).read_text(encoding="utf-8")
    shown = set(re.findall(r"!\[[^\]]*\]\(([^)]+)\)", card))
    assert "pictures/loss.png" in shown
    assert all((folder / name).is_file() for name in shown)


@pytest.mark.skipif(not shutil.which("git") or not (HOME.parent / ".git").exists(), reason="no clone of the repository")
def test_git_keeps_no_weights():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "."]
    kept = subprocess.run(command, cwd=HOME, check=True, capture_output=True, text=True).stdout.split("\0")
    own = {path.relative_to(HOME).as_posix() for folder in FOLDERS for glob in KEPT for path in folder.glob(glob)}
    assert set(kept) == own | {"", ".gitignore", "README.md", "collect.py"}


def test_the_readme_lists_what_was_measured(collect):
    assert collect.table() in (HOME / "README.md").read_text(encoding="utf-8")


def test_folders_are_filled_from_finished_runs_only(collect, tmp_path, monkeypatch, capsys):
    from test_plots import make_record

    monkeypatch.setattr(collect, "HERE", tmp_path / "cards")
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "README.md").write_text("before\n<!-- runs -->\nold\n<!-- /runs -->\nafter\n")
    for name, optimizer, status in (
        ("a", "SGDSaI", "finished"),
        ("a_adamw", "AdamW", "finished"),
        ("c", "SGD", "running"),
    ):
        record = make_record(name, optimizer)
        record.run["status"] = status
        record.save(tmp_path / name)
        save_file({"w": torch.zeros(2)}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "optimizer.pt").write_text("private")
        (tmp_path / name / "sample.txt").write_text("written")
    shutil.copytree(tmp_path / "a", tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    collect.main([str(tmp_path / name) for name in ("a", "a_adamw", "c", "missing", "bare")])
    made = {path.relative_to(tmp_path / "cards").as_posix() for path in (tmp_path / "cards").rglob("*.*")}
    assert {"a/README.md", "a/run_record.json", "a/sample.txt", "a/pictures/loss.png", "a_adamw/README.md"} <= made
    assert {"a/model.safetensors", "a_adamw/model.safetensors"} <= made
    assert not any(name.endswith(".pt") or name.startswith(("c/", "missing", "bare")) for name in made)
    for one, other in (("a", "a_adamw"), ("a_adamw", "a")):
        assert [twin["name"] for twin in RunRecord.load(tmp_path / "cards" / one).twins] == [other]
    readme = (tmp_path / "cards" / "README.md").read_text()
    assert "[a](a/README.md)" in readme
    assert "old" not in readme
    assert readme.endswith("after\n")
    told = capsys.readouterr().err
    assert "c is not finished" in told
    assert "bare holds no weights" in told
    (tmp_path / "a" / "sample.txt").write_bytes(b"x" * (collect.MAX_FILE_BYTES + 1))
    with pytest.raises(SystemExit, match="at most 1,048,576 belong here"):
        collect.main([str(tmp_path / "a")])
    assert (tmp_path / "cards" / "a" / "sample.txt").read_text() == "written"
