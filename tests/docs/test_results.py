"""The tables of README and docs are those that `make results` writes from the files of results."""

import importlib.util
import json
import re
from pathlib import Path

import PIL.Image
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def results():
    return load("results")


def load(name):
    """A script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_on_top_of_readme_is_drawn_from_the_records_that_are_there():
    script = load("headline_picture")
    with PIL.Image.open(script.PICTURE) as picture:
        assert picture.text["Source"] == script.digest(), "run `make results`"
    alternative = re.search(r"!\[(.+?)\]\(docs/headline\.png\)", (script.ROOT / "README.md").read_text())[1]
    for run, _, _ in script.RUNS:
        assert script.name(script.RunRecord.load(script.ROOT / "model_cards" / run).optimizer) in alternative


def test_no_page_is_out_of_date(results):
    results.main(["--check"])


def test_every_table_stands_on_a_page(results):
    pages = [path.read_text() for pattern in results.PAGES for path in results.ROOT.glob(pattern)]
    shown = {block[2] for text in pages for block in results.BLOCK.finditer(text)}
    assert shown == set(results.TABLES)


def test_a_tasks_own_length_is_told_from_those_that_were_tried_more_often(results):
    stores, own = results.of_quality("vit", ["adamw", "factored", "factored_nesterov"])
    assert own == {"steps": 150, "batch_size": 32}
    assert all(results.quality_reported(store, name, **own) for name, store in stores.items())


def test_a_page_that_was_changed_by_hand_is_named_and_written_again(results, tmp_path, monkeypatch, capsys):
    (tmp_path / "docs" / "research").mkdir(parents=True)
    for name in ("results.json", "research/step_speed.json"):
        (tmp_path / "docs" / name).write_text((results.ROOT / "docs" / name).read_text())
    (tmp_path / "recipes").symlink_to(results.ROOT / "recipes")
    page = tmp_path / "README.md"
    page.write_text("Before.\n<!-- results: demo -->\n| 1 |\n<!-- /results -->\nAfter.\n")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "FILE", tmp_path / "docs" / "results.json")
    monkeypatch.setattr(results, "PAGES", ("README.md",))
    with pytest.raises(SystemExit, match=r"out of date: README.md; run `make results`"):
        results.main(["--check"])
    assert "| 1 |" in page.read_text()
    results.main([])
    assert capsys.readouterr().out == "README.md\n"
    text = page.read_text()
    assert text.startswith("Before.\n<!-- results: demo -->\n")
    assert text.endswith("<!-- /results -->\nAfter.\n")
    demo = json.loads(results.FILE.read_text())["stated"]["demo"]
    assert f"{demo['sgd_sai_orthogonal']['eval_loss']:.3f}" in text
    results.main(["--check"])


def test_bold_is_the_best_and_all_that_equal_it(results):
    assert results.bold_best(["2.0 ± 0.1", "", "1.0 ± 0.2", "1.0"]) == ["2.0 ± 0.1", "", "**1.0 ± 0.2**", "**1.0**"]
    assert results.bold_best(["2.0", "1.0"], max) == ["**2.0**", "1.0"]
