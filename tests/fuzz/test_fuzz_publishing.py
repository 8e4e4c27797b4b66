"""Damaged runs on their way to a picture, a card and the Hub: one sentence or what is whole, and never a traceback."""

import io
import json
import re
import struct
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from fuzzing import CHANGES, DAMAGE, cases, damage, mangle, one_sentence
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hf_sai.cli.main import main
from hf_sai.publishing import publish as publishing
from hf_sai.publishing.cards import CARD_FILE, write_card
from hf_sai.runs.record import RECORD_FILE, RunRecord

CARDS = Path(__file__).parents[2] / "model_cards" / "gpt2_demo"
README = (CARDS / CARD_FILE).read_text()
_, METADATA, BODY = re.split(r"^---$", README, maxsplit=2, flags=re.MULTILINE)


def small_record():
    """A real run's record with something in every field that is drawn or told, and little of it."""
    whole = json.loads((CARDS / RECORD_FILE).read_text())
    ratio = {"step": 4, "eval_loss": 3.0, "sai/update_ratio/base/decay": 0.01}
    whole["history"] = [*whole["history"][:1], ratio, ratio | {"step": 8}]
    whole["gsnr"]["parameters"] = whole["gsnr"]["parameters"][:3]
    whole["twins"] = [RunRecord(run={"name": "twin"}).summary()]
    return whole


RECORD = small_record()
DRAWN = ("run", "optimizer", "gsnr", "timing", "history")


def card_of(metadata):
    return f"---\n{yaml.dump(metadata, allow_unicode=True)}---{BODY}".encode(errors="surrogatepass")


def weights(header):
    content = json.dumps(header).encode()
    return struct.pack("<Q", len(content)) + content + bytes(8)


def picture():
    """A PNG with a chunk of every kind that is read."""
    out = io.BytesIO()
    Image.new("RGB", (2, 2)).save(out, "png")
    content = out.getvalue()
    for kind, data in (
        (b"tEXt", b"Comment\0words"),
        (b"zTXt", b"Comment\0\0" + zlib.compress(b"words")),
        (b"iTXt", b"Comment\0\1\0en\0\0" + zlib.compress(b"words")),
        (b"eXIf", b"II*\0words"),
    ):
        checked = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        content = content[:-12] + checked + content[-12:]
    return content


def archive():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("archive/data.pkl", "words " * 20)
    return out.getvalue()


HEADER = {"__metadata__": {"format": "pt"}, "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
#: Settings of every library: what they are, unharmed.
SETTINGS = {
    RECORD_FILE: RECORD,
    "config.json": {"model_type": "x", "auto_map": {"AutoModel": "net.Net", "AutoConfig": ["a.B", "c--d.E"]}, "n": [1]},
    "adapter_config.json": {"peft_type": "LORA", "base_model_name_or_path": "/x/y", "target_modules": ["q"], "r": 8},
    "style/adapter_config.json": {"peft_type": "LORA", "base_model_name_or_path": "x/y"},
    "model_index.json": {"_class_name": "X", "unet": ["diffusers", "UNet"], "vae": [None, None]},
    "modules.json": [{"idx": 0, "path": "", "type": "t"}, {"idx": 1, "path": "1_Pooling"}],
    "tokenizer_config.json": {"eos_token": "</s>", "added_tokens_decoder": {"5": {"content": "<pad>"}}},
    "model.safetensors.index.json": {"metadata": {"total_size": 8}, "weight_map": {"x": "model.safetensors"}},
    "trainer_state.json": {"best_model_checkpoint": "/x/y", "log_history": [{"loss": 1.5}]},
}
#: Other files, unharmed.
BYTES = {
    "images/a.png": picture(),
    "net.py": b"from .parts import A\nfrom . import b, c\n",
    "chat_template.jinja": b"{% set x = 1 %}{{ x }}\n",
    "optimizer.pt": archive(),
    "sample.txt": "w\u00f6rter\n".encode("utf-16"),
    CARD_FILE: README.encode(),
}
FILES = sorted([*SETTINGS, *BYTES, "model.safetensors", "metadata of the card"])


class Hub:
    """Takes a commit as the Hub would: every file is read."""

    def create_commit(self, name, operations, **options):
        for operation in operations:
            with operation.as_file() as file:
                file.read()
        return SimpleNamespace(commit_url=f"https://hub/{name}")


@cases(48)
@given(CHANGES, st.none() | DAMAGE)
def test_pictures_of_damaged_records(tmp_path_factory, changes, broken):
    folder = tmp_path_factory.getbasetemp() / "drawn"
    folder.mkdir(exist_ok=True)
    text = json.dumps(RECORD | mangle({key: RECORD[key] for key in DRAWN}, changes)).encode()
    (folder / RECORD_FILE).write_bytes(text if broken is None else damage(text, broken))
    assert main(["plot", str(folder), "--out", str(folder / "pictures")]) in (0, 1)


@cases(300)
@given(CHANGES, st.none() | DAMAGE, st.booleans())
def test_cards_of_others(tmp_path_factory, changes, broken, of_record):
    """A card that is there is read and brought up to date, and so is a damaged record's."""
    folder = tmp_path_factory.getbasetemp() / "carded"
    folder.mkdir(exist_ok=True)
    (folder / RECORD_FILE).write_text(json.dumps(mangle(RECORD, changes) if of_record else RECORD))
    card = card_of(yaml.safe_load(METADATA) if of_record else mangle(yaml.safe_load(METADATA), changes))
    (folder / CARD_FILE).write_bytes(card if broken is None else damage(card, broken))
    with one_sentence(ValueError):
        write_card(folder)
        assert (folder / CARD_FILE).read_text().startswith("---\n")


@cases(400)
@given(st.sampled_from(FILES), CHANGES, st.none() | DAMAGE)
def test_damaged_folders_on_their_way_to_the_hub(tmp_path_factory, what, changes, broken):
    folder = tmp_path_factory.mktemp("run")
    name = CARD_FILE if what == "metadata of the card" else what
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(weights(HEADER))
    if what in SETTINGS:
        content = json.dumps(mangle(SETTINGS[what], changes)).encode()
    elif what in BYTES:
        content = BYTES[what]
    else:
        content = (
            weights(mangle(HEADER, changes)) if what == name else card_of(mangle(yaml.safe_load(METADATA), changes))
        )
    (folder / name).write_bytes(content if broken is None else damage(content, broken))
    include = ["optimizer.pt"] if what == "optimizer.pt" else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publishing, "create_repository", lambda name, **options: (Hub(), f"me/{name}"))
        arguments = ["publish", str(folder), "run", *(f"--include={pattern}" for pattern in include)]
        assert main(arguments) in (0, 1)
        with one_sentence(ValueError, OSError):
            publishing.publish(folder, "run", include=include)
