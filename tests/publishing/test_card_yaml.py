"""A card's metadata is read and written as the Hub reads it, whatever version of YAML the next reader follows."""

import math

import pytest
import yaml
from huggingface_hub import ModelCard
from test_plots import make_record

from hf_sai.publishing.card_yaml import dump_metadata, load_metadata
from hf_sai.publishing.cards import CARD_FILE, write_card


@pytest.mark.parametrize("word", ["no", "yes", "on", "off", "y", "N", "1e3x", "12:30:45", "1_000", "=", "<<"])
def test_a_word_of_yaml_1_2_is_a_word(word):
    assert load_metadata(f"language: {word}\ntags: [{word}]") == {"language": word, "tags": [word]}


@pytest.mark.parametrize("text", ["1.10", "1.0", "007", "1e5", "0x10", "2024-01-02", ".5", "true", "null", "12"])
def test_what_is_no_word_is_written_again_as_it_was(text):
    assert dump_metadata(load_metadata(f"a: {text}")) == f"a: {text}"


@pytest.mark.parametrize(
    "word", ["no", "on", "1.10", "1e3", "0o7", "true", "null", "~", "2024-01-02", "012", "", "1:30"]
)
def test_a_word_that_some_version_reads_otherwise_gets_quotes(word):
    text = dump_metadata({"a": word})
    assert yaml.safe_load(text) == load_metadata(text) == {"a": word}
    assert text[3] in "'\""


def test_numbers_are_numbers():
    read = load_metadata("a: 1.10\nb: 3\nc: .inf\nd: -1.5e-3\ne: 0o17")
    assert (read["a"], read["b"], read["d"], read["e"]) == (1.1, 3, -0.0015, 15)
    assert math.isinf(read["c"])


def test_a_users_metadata_survives_the_writing_of_a_card(tmp_path):
    record = make_record("mine")
    record.run["card"] = {"license": "mit", "version": "1.10", "language": "no"}
    record.save(tmp_path)
    (tmp_path / CARD_FILE).write_text("---\nlanguage: no\ntags:\n- on\n- cat\nmodel_version: 1.10\n---\nMy words.\n")
    for _ in range(2):
        write_card(tmp_path)
        data = ModelCard.load(tmp_path / CARD_FILE).data
        assert data.language == "no"
        assert data.tags[:2] == ["on", "cat"]
        assert data["version"] == "1.10"
        assert "\nmodel_version: 1.10\n" in (tmp_path / CARD_FILE).read_text()
