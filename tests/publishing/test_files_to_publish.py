"""What goes to the Hub: all that loading needs, in every library's layout, and nothing that is somebody's own."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from hf_sai.publishing.files_to_publish import is_tokenizer, plan_files, worth_telling

LAYOUTS = {
    "marian": ["source.spm", "target.spm", "vocab.json", "tokenizer_config.json"],
    "qwen2-vl": ["preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json", "tokenizer.json"],
    "custom code": ["configuration_my.py", "modeling_my.py", "tokenization_my.py"],
    "sentence-transformers": [
        *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
        *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"),
    ],
    "phobert, gpt-sw3, wav2vec2": [
        *("bpe.codes", "vocab.txt", "spiece.model", "feature_extractor_config.json", "normalizer.json"),
    ],
    "sentence-transformers, a router": [
        *("modules.json", "router_config.json", "idf.json", "sentence_roberta_config.json"),
        *("query_0_SparseStaticEmbedding/idf.json", "document_0_MLMTransformer/sentence_bert_config.json"),
        *("0_WordEmbeddings/wordembedding_config.json", "0_WordEmbeddings/whitespacetokenizer_config.json"),
    ],
    "a pipeline with a part of its own": ["model_index.json", "unet/my_unet.py", "unet/config.json", "my_pipeline.py"],
    "instructblip, bark, mistral": [
        *("qformer_tokenizer/tokenizer.json", "qformer_tokenizer/tokenizer_config.json", "tekken.json"),
        *("speaker_embeddings_path.json", "speaker_embeddings/v2/en_1_coarse.npy"),
    ],
    "custom generation": ["custom_generate/generate.py", "custom_generate/requirements.txt"],
    "several chat templates": ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"],
    "mistral's own, open_clip": ["params.json", "open_clip_config.json"],
    "licences": ["LICENSE.md", "LICENCE", "COPYING", "NOTICE.txt", "USE_POLICY.md"],
    "two adapters": ["adapter_config.json", "style/adapter_config.json", "style/adapter_model.safetensors"],
    "an adapter with a name of its own": ["style/adapter_config.json", "style/adapter_model.safetensors"],
}
INDEXES = {
    "modules.json": [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}],
    "router_config.json": {"types": {"query_0_SparseStaticEmbedding": "a.B", "document_0_MLMTransformer": "a.C"}},
    "model_index.json": {"_class_name": ["my_pipeline", "P"], "unet": ["my_unet", "MyUNet"]},
}


def write(folder, name, content="{}"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".safetensors"):
        save_file({"x": torch.zeros(1)}, path)
    else:
        path.write_text(json.dumps(INDEXES[name]) if content == "{}" and name in INDEXES else content)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_left_out_that_loading_needs(tmp_path, layout):
    for name in ["config.json", "model.safetensors", *LAYOUTS[layout]]:
        write(tmp_path, name)
    assert plan_files(tmp_path).left_out == ()


def test_a_list_of_modules_that_names_none_leaves_no_module_out(tmp_path):
    for name in ("model.safetensors", "1_Pooling/config.json"):
        write(tmp_path, name)
    (tmp_path / "modules.json").write_text("{}")
    assert "1_Pooling/config.json" in dict(plan_files(tmp_path).files)


def test_code_that_a_configuration_names_goes_with_what_it_imports(tmp_path):
    write(tmp_path, "model.safetensors")
    write(tmp_path, "config.json", '{"auto_map": {"AutoModel": "net.Net", "AutoConfig": "other/repo--conf.C"}}')
    write(tmp_path, "net.py", "from .parts import A\nfrom . import layers\nimport torch\n")
    for name in ("parts.py", "layers.py", "train.py", "conf.py"):
        write(tmp_path, name, "x = 1\n")
    plan = plan_files(tmp_path)
    assert {name for name, _ in plan.files} == {"model.safetensors", "config.json", "net.py", "parts.py", "layers.py"}


def test_imports_of_a_models_code_are_followed_over_lines_and_folders(tmp_path):
    write(tmp_path, "model.safetensors")
    write(tmp_path, "config.json", '{"auto_map": {"AutoModel": "net.Net"}}')
    write(tmp_path, "modules.json", '[{"path": "", "type": "own.Module"}]')
    write(tmp_path, "own.py", "from .shared import x")
    write(
        tmp_path,
        "net.py",
        "from . import (\n    a,\n    b as c,\n)\nif True:\n    from .sub.mod import (\n  x,\n  y)\n",
    )
    write(tmp_path, "sub/mod.py", "from .deep import z\nfrom ..top import z\nfrom ...outside import z\n")
    write(tmp_path, "custom_generate/generate.py", "from .steps import step")
    used = ["a.py", "b.py", "shared.py", "top.py", "sub/__init__.py", "sub/deep.py", "custom_generate/steps.py"]
    for name in (*used, "train.py", "sub/unused.py", "../outside.py"):
        write(tmp_path, name, "x = 1\n")
    assert [name for name, _ in plan_files(tmp_path).left_out] == ["sub/unused.py", "train.py"]


def test_code_that_cannot_be_read_goes_alone(tmp_path):
    write(tmp_path, "model.safetensors")
    write(tmp_path, "modeling_my.py", "from .a import (")
    write(tmp_path, "a.py", "x = 1")
    assert dict(plan_files(tmp_path).left_out) == {"a.py": "not on the list; --include it if it is to be public"}


def test_the_vocabulary_of_every_tokenizer_of_transformers_is_on_the_list():
    names = set()
    for file in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py"):
        for found in re.findall(r"VOCAB_FILES_NAMES = \{(.*?)\}", file.read_text(), re.DOTALL):
            names |= set(re.findall(r":\s*\"([^\"]+)\"", found))
    assert len(names) > 15
    assert [name for name in sorted(names) if not is_tokenizer(name)] == []


def test_what_somebody_may_miss_is_told_and_what_a_training_keeps_is_not(tmp_path):
    write(tmp_path, "model.safetensors")
    for name in ("optimizer.pt", "rng_state_0.pth", "training_args.bin", "checkpoint-5/x.bin", "runs/events", ".cache"):
        write(tmp_path, name)
    assert worth_telling(plan_files(tmp_path)) is None
    write(tmp_path, "notes.txt")
    write(tmp_path, "tokens.txt")
    assert worth_telling(plan_files(tmp_path)).startswith("left out of the upload: notes.txt, tokens.txt; --include")


NEVER = [
    *(".env", "my.ENV", "server.PEM", "ID_RSA", "id_ed25519.pub", "secrets.yaml", "SECRET.json", "Credentials.json"),
    *("training_args.bin", "checkpoint-1/training_args.bin", "keys/server.Key", "kaggle.json", "prod-secrets.toml"),
    *(".netrc", "cert.p12", "store.kdbx", "token", "client_secret_1.json", "passwords.txt", "password.md"),
    *("token.txt", "hf_token.txt", "openai_api_key", "wandb-api-key.json"),
]


@pytest.mark.parametrize("name", NEVER)
def test_what_is_somebodys_own_is_never_uploaded_in_any_case_of_letters(tmp_path, name):
    write(tmp_path, "model.safetensors")
    write(tmp_path, name)
    plan = plan_files(tmp_path, include=["*/*" if "/" in name else "*", name])
    assert dict(plan.left_out)[name] == "never uploaded"
    assert [name for name, _ in plan.files] == ["model.safetensors"]


def test_pickled_weights_are_refused_with_a_way_out(tmp_path):
    write(tmp_path, "pytorch_model.bin")
    with pytest.raises(ValueError, match="save them again with safe_serialization"):
        plan_files(tmp_path)


@pytest.mark.parametrize("cut", [0, 7, 40, -1], ids=["empty", "in the size", "in the header", "in the data"])
def test_weights_that_are_cut_off_are_not_published(tmp_path, cut):
    write(tmp_path, "model.safetensors")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or not .* \(.*\); save it again"):
        plan_files(tmp_path)


@pytest.mark.parametrize("content", ["", '{"a": 1', "[" * 10**5, "\xff"])
@pytest.mark.parametrize("name", ["config.json", "style/adapter_config.json", "model.safetensors.index.json"])
def test_settings_that_are_cut_off_are_not_published(tmp_path, name, content):
    write(tmp_path, "model.safetensors")
    write(tmp_path, "style/adapter_config.json")
    (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"{name} is damaged or not .* \(no JSON: .*\); save it again"):
        plan_files(tmp_path)


def test_an_index_that_names_weights_which_are_not_there_is_not_published(tmp_path):
    write(tmp_path, "model-00001-of-00002.safetensors")
    names = {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}
    write(tmp_path, "model.safetensors.index.json", json.dumps({"weight_map": names}))
    with pytest.raises(ValueError, match=r"index.json is damaged or not .* \(model-00002-of-00002.safetensors is not"):
        plan_files(tmp_path)
    write(tmp_path, "model-00002-of-00002.safetensors")
    assert len(plan_files(tmp_path).files) == 3


def test_weights_behind_a_symbolic_link_are_refused_with_a_way_out(tmp_path):
    write(tmp_path, "blobs/0a1b.safetensors")
    (tmp_path / "model.safetensors").symlink_to("blobs/0a1b.safetensors")
    with pytest.raises(ValueError, match=r"holds no weights .* link is not followed, so copy there what it leads to"):
        plan_files(tmp_path)


@pytest.mark.parametrize("name", ["a\nleft out   b.png", "a\udcff.png", "a\u202egnp.png"])
def test_a_file_whose_name_cannot_be_shown_stays_out_and_is_told(tmp_path, name):
    write(tmp_path, "model.safetensors")
    write(tmp_path, f"images/{name}")
    assert plan_files(tmp_path).left_out == ((ascii(f"images/{name}"), "its name has signs that cannot be shown"),)


@pytest.mark.parametrize("pattern", ["optimizr.pt", "../*", "/etc/passwd", "", "["])
def test_a_pattern_that_names_no_file_is_refused(tmp_path, pattern):
    write(tmp_path, "model.safetensors")
    with pytest.raises(ValueError, match="names no file in"):
        plan_files(tmp_path, include=[pattern])


def test_a_file_that_is_asked_for_and_stays_out_is_warned_of(tmp_path, caplog):
    write(tmp_path, "model.safetensors")
    write(tmp_path, "training_args.bin")
    plan_files(tmp_path, include=["*"])
    assert not caplog.records
    plan_files(tmp_path, include=["training_args.bin"])
    assert "training_args.bin stays out, though it is asked for: never uploaded." in caplog.text
