"""Files of results: damaged ones are named in one sentence, and none is left half written."""

import os

import pytest

from recipes.common.lr_search import Results
from recipes.common.recipe_input import InputError
from recipes.common.result_files import read_json, write_json

DAMAGED = {
    "cut": ('{"a": {"b":', "is damaged: it is no JSON"),
    "bytes": (b"\xff\xfe", "is damaged: it is no JSON"),
    "deep": ("[" * 100_000, "is damaged: it is no JSON"),
    "a list": ("[1]", "holds a list in the place of a dict"),
    "no key": ('{"a": 1}', "it has no a.b"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named_in_one_sentence(content, message, tmp_path):
    file = tmp_path / "results.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        read_json(file, keys=("a.b",))
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.timeout(60)
def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "results.json")
    with pytest.raises(InputError, match=r"cannot read .*results\.json: it is no regular file"):
        read_json(tmp_path / "results.json")


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path, monkeypatch):
    file = write_json(tmp_path / "results.json", {"eval_loss": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="what was there before is unchanged"):
        write_json(file, {"eval_loss": 2})
    assert read_json(file) == {"eval_loss": 1}
    assert os.listdir(tmp_path) == ["results.json"]


@pytest.mark.parametrize("content", ["{", '{"task": {}}', '{"task": [], "runs": []}', '{"task": {}, "runs": [{}]}'])
def test_damaged_results_of_a_search_are_refused(content, tmp_path):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(InputError, match="is damaged"):
        Results(tmp_path / "results.json", {})
