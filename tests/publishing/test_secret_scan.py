"""No secret becomes public: it is found in every file that is uploaded, in whatever form, and told by file and line."""

import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile
import zlib

import numpy
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from hf_sai.publishing.files_to_publish import plan_files
from hf_sai.publishing.secret_scan import find_secret

# Put together here, so that nobody's scanner takes this file for a leak.
SECRETS = {
    "Hugging Face": "hf_" + "aB3dE6gH9" * 4,
    "GitHub": "ghp_" + "a1B2c3D4e5" * 3 + "a1B2c3",
    "GitHub, fine-grained": "github_pat_" + "A1b2C3d4" * 4,
    "GitLab": "glpat-" + "a1B2c3D4e5F6g7H8i9J0",
    "OpenAI": "sk-" + "a1B2c3D4e5F6g7H8i9J0" + "T3BlbkFJ" + "a1B2c3D4e5F6g7H8i9J0",
    "OpenAI, project": "sk-proj-" + "a1B2c3D4e5F6" * 4,
    "Anthropic": "sk-ant-api03-" + "a1B2c3D4e5F6" * 4,
    "AWS": "AKIA" + "Z7Y6X5W4V3U2T1S0",
    "Google": "AIza" + "SyA1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6Q",
    "Slack": "xoxb-" + "123456789012-123456789012-" + "a1B2c3D4e5F6g7H8",
    "Stripe": "sk_live_" + "a1B2c3D4e5F6g7H8i9J0k1L2",
    "private key": "-----BEGIN RSA " + "PRIVATE KEY-----",
    "encrypted key": "-----BEGIN ENCRYPTED " + "PRIVATE KEY-----",
    "login": "https://somebody:" + "s3cr3tw0rd@host.org/x",
}
TOKEN = SECRETS["Hugging Face"]


def run_of(folder):
    save_file({"x": torch.zeros(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return folder


def refusal(folder, include=()):
    with pytest.raises(ValueError, match="take it out before it is public") as caught:
        plan_files(folder, include=include)
    return str(caught.value)


@pytest.mark.parametrize("kind", SECRETS)
@pytest.mark.parametrize(
    ("name", "form", "line"),
    [
        ("README.md", "# Title\n\nuse {} here\n", 3),
        ("config.json", '{{"a": 1,\n "note": "{}"}}', 2),
        ("chat_template.jinja", "a\n{{# {} #}}\n", 2),
        ("sample.txt", "one\ntwo\nthree {}\n", 3),
        ("modeling_mine.py", "x = 1\n\n# {}\n", 3),
        ("tokenizer.json", '{{"model": {{"vocab":\n{{"{}": 5}}}}}}', 2),
        ("merges.txt", "a b\n{}", 2),
    ],
)
def test_a_secret_in_a_text_stops_the_upload_and_is_told_by_file_and_line(tmp_path, kind, name, form, line):
    secret = SECRETS[kind]
    (run_of(tmp_path) / name).write_text(form.format(secret))
    said = refusal(tmp_path)
    assert f"{tmp_path / name} (line {line}) holds " in said
    assert secret not in said


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
def test_a_secret_in_another_encoding_is_found(tmp_path, encoding):
    (run_of(tmp_path) / "sample.txt").write_bytes(f"one\nsee {TOKEN} there\n".encode(encoding))
    assert "sample.txt (" in refusal(tmp_path)


def png(chunks):
    out = io.BytesIO()
    Image.new("RGB", (2, 2)).save(out, "png")
    content = out.getvalue()
    packed = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return content[:-12] + packed + content[-12:]


@pytest.mark.parametrize(
    "chunk",
    [
        (b"tEXt", b"Comment\0" + TOKEN.encode()),
        (b"zTXt", b"Comment\0\0" + zlib.compress(TOKEN.encode())),
        (b"iTXt", b"Comment\0\0\0en\0\0" + TOKEN.encode()),
        (b"iTXt", b"Comment\0\1\0en\0\0" + zlib.compress(TOKEN.encode())),
        (b"eXIf", b"II*\0" + TOKEN.encode()),
        (b"prVt", TOKEN.encode()),
    ],
)
def test_a_secret_in_a_pictures_metadata_is_found(tmp_path, chunk):
    (run_of(tmp_path) / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png([chunk]))
    assert "images/a.png (" in refusal(tmp_path)


def test_pictures_as_pillow_and_ours_write_them_pass(tmp_path):
    run_of(tmp_path)
    (tmp_path / "images").mkdir()
    words = PngImagePlugin.PngInfo()
    words.add_text("Software", "matplotlib")
    Image.effect_noise((300, 300), 90).save(tmp_path / "images" / "a.png", pnginfo=words)
    assert "images/a.png" in dict(plan_files(tmp_path).files)


def test_a_secret_in_the_header_of_weights_is_found_even_if_escaped(tmp_path):
    run_of(tmp_path)
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors", metadata={"note": TOKEN})
    assert "model.safetensors (the header)" in refusal(tmp_path)
    header = json.dumps({"__metadata__": {"note": TOKEN}}).replace("hf_", "\\u0068f_").encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert "model.safetensors (the header)" in refusal(tmp_path)


@pytest.mark.parametrize("text", [TOKEN.replace("hf_", "\\u0068f_"), SECRETS["login"].replace("/", "\\/")])
def test_a_secret_that_json_writes_with_escapes_is_found(tmp_path, text):
    (run_of(tmp_path) / "config.json").write_text('{"a": "x",\n "list": [["' + text + '"]]}')
    assert "config.json (a text with escapes)" in refusal(tmp_path)


def test_a_secret_in_a_files_name_is_found_and_not_told(tmp_path):
    (run_of(tmp_path) / "images").mkdir()
    (tmp_path / "images" / f"{TOKEN}.png").write_bytes(png([]))
    said = refusal(tmp_path)
    assert "(its name) holds an access token" in said
    assert TOKEN not in said


def test_a_password_that_is_a_common_word_stops_no_upload(tmp_path, monkeypatch):
    monkeypatch.setenv("DB_PASSWORD", "password")
    (run_of(tmp_path) / "README.md").write_text("It finds the word password in texts.")
    assert "README.md" in dict(plan_files(tmp_path).files)


def test_a_secret_in_a_pickle_or_a_packed_archive_is_found(tmp_path):
    run_of(tmp_path)
    for secret in (TOKEN, SECRETS["OpenAI"], SECRETS["OpenAI, project"], SECRETS["GitHub"]):
        (tmp_path / "state.pkl").write_bytes(pickle.dumps({"hub": secret, "x": b"\0\1\2" * 9}, protocol=4))
        assert "state.pkl (" in refusal(tmp_path, ["state.pkl"])
    torch.save({"hub": TOKEN}, tmp_path / "optimizer.pt")
    assert "optimizer.pt (" in refusal(tmp_path, ["optimizer.pt"])
    with zipfile.ZipFile(tmp_path / "data.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", f"x {TOKEN}")
    assert "data.npz (a.txt in the archive)" in refusal(tmp_path, ["data.npz"])
    for name in ("data.npz", "data.npy"):
        save = numpy.save if name == "data.npy" else numpy.savez_compressed
        save(tmp_path / name, numpy.array([TOKEN]))
        assert f"{name} (" in refusal(tmp_path, [name])


@pytest.mark.parametrize("legacy", [False, True])
def test_a_secret_of_a_fixed_length_is_found_among_the_letters_of_a_pickle(tmp_path, legacy):
    for kind in ("AWS", "Google"):
        state = {"note": SECRETS[kind], "x": torch.zeros(2)}
        torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
        assert find_secret(tmp_path / "a.pt", "a.pt") is not None


def test_a_secret_behind_the_letters_of_protobuf_is_found(tmp_path):
    secret = SECRETS["Anthropic"] + "a1B2" * 12
    assert chr(len(secret)) == "m"
    (tmp_path / "events").write_bytes(b"\x08\x07B" + bytes([len(secret)]) + secret.encode() + b"\0\xff")
    assert find_secret(tmp_path / "events", "events") is not None


def test_a_secret_in_a_name_within_an_archive_is_found(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(SECRETS["AWS"], "x")
    assert find_secret(tmp_path / "a.zip", "a.zip")[0] == "the archive's names"


def test_a_secret_behind_the_first_64_mebibytes_is_found(tmp_path):
    with open(run_of(tmp_path) / "sample.txt", "wb") as file:
        file.write((b"word " * 19 + b"word\n") * (66 * 2**20 // 100))
        file.write(TOKEN.encode())
    assert "sample.txt (line " in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{"a": {\n"api_key": "zx81zx81"}}'),
        ("config.json", '{"a":\n"python x.py --hub_token zx81zx81"}'),
        ("README.md", "run\npython x.py --hub_token zx81zx81"),
        ("README.md", "run\nHF_TOKEN=zx81zx81 python x.py"),
        ("README.md", "run\npython x.py --password HUNTERTWO"),
        ("README.md", "run\npython x.py --password '$ecretPass99'"),
        ("README.md", "Password:\npassword: zx81zx81"),
        ("README.md", "run\npython x.py --password zx81xxx81"),
        ("README.md", 'caf\xe9\nhub_token = "zx81zx81"'),
        ("config.json", '{"password":\n"$ecretPass99"}'),
        ("config.json", '{"password":\n"HUNTERTWO"}'),
        ("config.json", '{"api_keys":\n["zx81zx81"]}'),
        ("config.json", '{"auth": {"token":\n{"value": "zx81zx81"}}}'),
        ("config.json", '{"argv": ["train.py", "--hub_token",\n"zx81zx81"]}'),
        ("config.json", '{"env": [{"name": "HF_TOKEN",\n"value": "zx81zx81"}]}'),
        ("config.json", '{"db_password":\n83746592}'),
        ("modeling_mine.py", 'import os\nlogin(token="zx81zx81zx")'),
        ("README.md", "[default]\naws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYzz81KEY"),
        ("modeling_mine.py", 'import os\npassword = "zx81zx81zx"'),
        ("chat_template.jinja", 'a\n{% set api_key = "zx81zx81zx" %}'),
    ],
)
def test_what_a_name_gives_away_is_found(tmp_path, name, content):
    (run_of(tmp_path) / name).write_text(content, encoding="latin-1")
    assert "(line 2) holds" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{"eos_token": "<|im_end|>", "pad_token": "<pad>", "image_token": "<image>", "token": "<s>"}'),
        ("vocab.json", '{"password": 5, "token": 6, "api_key": 7, "secret": 8}'),
        ("README.md", "--hub_token <redacted> --eos_token '<|im_end|>' HF_TOKEN=$HF_TOKEN https://huggingface.co/a/b"),
        ("README.md", 'model = AutoModel.from_pretrained("a", token=True)  # or token=hub_token'),
        ("modeling_mine.py", 'token = os.environ["HF_TOKEN"]\npassword = get_password()\nself.key = key'),
        ("README.md", "token = tokenizer.eos_token_2\nhub_token = os.environ['TOKEN_1']\nnum_tokens = 12345678"),
        ("config.json", '{"a": "C:\\\\x", "b": "\\ud7ff \\u00e9", "c": "\\n"}'),
        ("tokenizer_config.json", '{"user_token": "USER:", "bot_token": {"content": "<bot>"}, "token": "the cat"}'),
        ("config.json", '{"storage_key": "weights", "auth": "basic", "api_key": "MY_API_KEY", "password": "$DB_PASS"}'),
        (
            "modeling_mine.py",
            'print("the token:", token)\nif password == "a1b2c3d4": pass  # not ours\ntoken: str = get()',
        ),
        ("sample.txt", 'def f():\n    password = "generated by the model"'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"5": {"content": "<pad>"}}, "sep_token": "[SEP]"}'),
        ("tokenizer.json", json.dumps({"precompiled_charsmap": "ABIA" + "A" * 400, "vocab": {"AKIA": 1}})),
    ],
)
def test_what_loading_or_reading_needs_is_no_secret(tmp_path, name, content):
    (run_of(tmp_path) / name).write_text(content)
    assert name in dict(plan_files(tmp_path).files)


def test_a_vocabulary_under_openais_name_is_no_secret(tmp_path):
    (run_of(tmp_path) / "encoder.json").write_text('{"password": 28712, "token": 30001}')
    assert "encoder.json" in dict(plan_files(tmp_path, include=["encoder.json"]).files)


def test_without_detect_secrets_nothing_is_planned(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "detect_secrets.core.plugins.util", None)
    with pytest.raises(ImportError, match=r'pip install "hf-sai\[hub\]"'):
        find_secret(run_of(tmp_path) / "config.json", "config.json")


@pytest.mark.parametrize(
    "line",
    [
        "login(token=os.environ['HF_TOKEN'])",
        "login(token=userdata.get('HF_TOKEN'))",
        "login(token=token)",
        "TrainingArguments(hub_token=args.hub_token)",
        "pass `hub_token=None`",
        "`train.py --hub_token $HF_TOKEN`",
        "HF_TOKEN=$(cat file)",
        "HF_TOKEN=TOKEN",
        "HF_TOKEN=`cat file`",
        "hub_token: read from the environment",
        "https://user:$PASSWORD@host/x and https://user:password@host/x",
        "export HF_TOKEN=" + "hf_" + "x" * 30,
        'api_key="EMPTY", api_key="sk-...", api_key="xxxxxx"',
        "token,label\n1996-08-22,O and token: 1996-08-22, auth=oauth2",
        "https://hooks.slack.com/services/T00000000/B00000000/XXXXXXXXXXXXXXXXXXXXXXXX",
        "base_model: sk-learn/sk-small-language-model-v1-base",
        "train.py --token $token --api_key $1 --api_key KEY",
        "train.py --password PASSWORD",
        "`train.py --token <s>`",
        "train.py --hub_token ${HF_TOKEN}",
        'headers = {"Authorization": "Bearer " + token}',
        'headers = {"Authorization": "Bearer <token>", "authorization": "Bearer $HF_TOKEN"}',
        *(f'api_key="{key}"' for key in ("not-needed", "dummy-key", "fake-key-1", "sk-no-key-required", "ollama")),
    ],
)
def test_what_only_stands_for_a_secret_may_be_published(line, tmp_path):
    (tmp_path / "README.md").write_text(f"# Use\n\n{line}\n")
    assert find_secret(tmp_path / "README.md", "README.md") is None


@pytest.mark.parametrize("name", ["NOTICE", "Dockerfile", "train.log", "notes.rst", "app.conf", "app.properties"])
def test_named_secrets_are_looked_for_in_files_of_many_kinds(name, tmp_path):
    (tmp_path / name).write_text("python train.py --hub_token abc123def456\n")
    assert find_secret(tmp_path / name, name) is not None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", '{"a": 1}\n{"hub_token": "abc123def456"}\n'),
        ("rows.jsonl", '{"a": 1}\nbroken\n{"note": "--hub_token abc123def456"}\n'),
        ("rows.csv", "a,b\n1,train.py --hub_token abc123def456\n"),
        ("rows.tsv", "a\tb\n1\thub_token=abc123def456\n"),
        ("app.js", 'const hub_token = "abc123def456";\n'),
        ("app.xml", "<x><password>abc123def456</password></x>\n"),
        ("run.ps1", '$env:HF_TOKEN = "abc123def456"\n'),
        ("book.ipynb", '{"cells": [{"source": ["x\\n", "hub_token = \\"abc123def456\\"\\n"]}]}'),
    ],
)
def test_data_programs_and_pages_that_are_asked_for_are_searched_by_name(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    assert find_secret(tmp_path / name, name) is not None


def test_a_line_of_a_text_may_say_that_it_holds_no_secret(tmp_path):
    (tmp_path / "a.py").write_text('password = "abc123def456"  # pragma: allowlist secret\n')
    assert find_secret(tmp_path / "a.py", "a.py") is None
    (tmp_path / "a.py").write_text(f"# base: me/{SECRETS['OpenAI']}\n")
    assert find_secret(tmp_path / "a.py", "a.py") is not None
    (tmp_path / "a.py").write_text(f"# base: me/{SECRETS['OpenAI']} pragma: allowlist secret\n")
    assert find_secret(tmp_path / "a.py", "a.py") is None
    assert find_secret(tmp_path / "a.py", "a.py", [SECRETS["OpenAI"]]) is not None


def test_a_named_secret_in_the_metadata_of_weights_or_of_a_picture_is_found(tmp_path):
    for key, note in (("hub_token", "zx81zx81"), ("command", "train.py --hub_token zx81zx81")):
        save_file({"x": torch.zeros(2)}, tmp_path / "a.safetensors", metadata={key: note})
        assert find_secret(tmp_path / "a.safetensors", "a.safetensors")[0] == "the header"
        (tmp_path / "a.png").write_bytes(png([(b"tEXt", f"{key}\0{note}".encode())]))
        assert find_secret(tmp_path / "a.png", "a.png")[0] == "a text chunk"
    (tmp_path / "a.png").write_bytes(png([(b"tEXt", b'workflow\0{"1": {"inputs": {"api_keys": ["zx81zx81"]}}}')]))
    assert find_secret(tmp_path / "a.png", "a.png")[0] == "a text chunk"


def packed(content, how):
    out = io.BytesIO()
    if how == "gz":
        return gzip.compress(content)
    if how.startswith("tar"):
        with tarfile.open(fileobj=out, mode=f"w:{how[4:]}") as archive:
            entry = tarfile.TarInfo("a.yaml")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        return out.getvalue()
    kind = zipfile.ZIP_STORED if how == "stored zip" else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(out, "w", kind) as archive:
        archive.writestr("a.yaml" if content.startswith(b"x") else "in.zip", content)
    return packed(out.getvalue(), "zip") if how == "zip in zip" else out.getvalue()


@pytest.mark.parametrize("secret", [f"note: {TOKEN}", "hub_token: zx81zx81"])
@pytest.mark.parametrize("how", ["gz", "tar", "tar.gz", "tar.bz2", "tar.xz", "zip", "stored zip", "zip in zip"])
def test_a_secret_in_an_archive_of_any_kind_is_found(tmp_path, how, secret):
    (tmp_path / "a.bin").write_bytes(packed(f"x: 1\n{secret}\n".encode(), how))
    assert find_secret(tmp_path / "a.bin", "a.bin") is not None
