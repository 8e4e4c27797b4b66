"""Paths: what only this machine knows stands in no field of a record, however it was given."""

import os

import pytest

from hf_sai.runs.paths import hide_paths, is_local_path, short_path
from hf_sai.runs.record import RECORD_FILE, RunRecord

FORMS = (
    *("{}", "--train_file={}", "data.path={}", "+data.path={}", "file://{}", "file:{}", "train:{}", "a={},b={}"),
    *('{{"train": "{}"}}', "{{'train': ['{}']}}", "see {} and ({})", "-I{}", "ssh host:{}", "FILES={}:{}", "[{},{}]"),
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    monkeypatch.setenv("HOME", "/home/somebody")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "path", ["/home/NAME/private/x.txt", "/scratch/NAME/x.txt", "../../../NAME/x.txt", "/home/NAME"]
)
def test_a_path_is_shortened_in_every_form(form, path):
    shown = short_path(form.format(*[path] * form.count("{}")))
    assert "NAME" not in shown
    assert "private" not in shown
    assert short_path(shown) == shown


def test_windows_paths_and_other_peoples_homes_are_shortened():
    assert hide_paths(r"C:\Users\NAME\x.txt") == "/path/to/x.txt"
    assert short_path("~NAME/x") == "~/x"


def test_own_folders_can_be_told_from_others():
    assert short_path(os.getcwd() + "/out") == "out"
    assert short_path("/home/somebody/data") == "~/data"
    assert short_path("/home/somebody") == "~"
    assert short_path("/mnt/with blanks/some data.txt") == "/path/to/some data.txt"
    assert short_path("/data") == "/path/to/data"


@pytest.mark.parametrize(
    "text",
    [
        *("base/decay", "me/model", "https://host/a/b/c", "s3://bucket/a/b", "hf://datasets/a/b", "1/2/3", "</b></i>"),
        *("and/or", "data/x.txt", "./data/x.txt", "~/data", "/path/to/x", "--lr=1e-3", "a / b", "text/x-python", "/"),
    ],
)
def test_what_is_no_path_of_the_machine_stays(text):
    assert short_path(text) == text


def test_local_places_are_told_from_names_on_the_hub(tmp_path):
    os.makedirs("runs/base")
    assert all(map(is_local_path, ["/x", "./x", "../x", "~/x", "file:///x", "a/b/c", "runs/base", r"C:\x"]))
    assert not any(map(is_local_path, ["gpt2", "me/base"]))


def test_no_field_of_a_record_names_a_folder_of_the_machine(tmp_path):
    os.makedirs("corpus/mine")
    path = "/home/NAME/project/x"
    record = RunRecord(
        run={
            "name": "n",
            "card": {"base_model": path, "datasets": [path, "corpus/mine"], "description": f"From {path}."},
        },
        settings={"file": path, "dict": {path: [f"file://{path}"]}, "hydra": f"data={path}"},
        model={"base_model": path},
        data=[{"name": path, "id": path}, {"name": "mine", "id": "corpus/mine"}],
        images=[{"title": path, "file": "images/a.png"}],
        history=[{"step": 1, "note": path}],
        results={"best": path},
    )
    record.save(tmp_path)
    assert "NAME" not in (tmp_path / RECORD_FILE).read_text()
    saved = RunRecord.load(tmp_path)
    assert saved.data[1]["id"] == "./corpus/mine"  # a folder here is no data set on the Hub
    assert saved.run["card"]["datasets"][1] == "./corpus/mine"
    again = saved.to_text()
    assert again == (tmp_path / RECORD_FILE).read_text()
