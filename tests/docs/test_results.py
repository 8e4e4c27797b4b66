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


def test_sentences_beside_the_tables_say_what_the_tables_say(results):
    def loss(task, name, **other):
        stores, own = results.of_quality(task, [name])
        reported = results.quality_reported(stores[name], name, **own | other)
        return results.statistics.mean(run["test_loss"] for run in reported)

    def lead(task, **other):
        return f"{loss(task, 'adamw', **other) - loss(task, 'orthogonal', **other):.2f}"

    stores, own = results.of_quality("seq2seq", ["adamw"])
    by_rate = {"weight_decay": 0.01, "beta1": 0.9, "beta2": 0.999}
    runs = stores["adamw"].find("adamw", 0.002, settings=by_rate, **own)
    of_rate = [run["test_loss"] for run in runs if run["seed"] in range(1, 6)]
    assert len(of_rate) == 5
    by_rate_alone = f"{results.statistics.mean(of_rate) - loss('seq2seq', 'orthogonal'):.2f}"

    which, lengths = (
        " ".join((results.ROOT / page).read_text().split())
        for page in ("docs/which_update.md", "docs/research/lengths.md")
    )
    there = "(../which_update.md#beside-other-optimizers)"
    assert f"it ended at {results.mean_and_spread(of_rate)}:" in which
    assert f"is {lead('gpt2', steps=3200)} here, and {lead('gpt2')} in [800 steps]{there}" in lengths
    assert f"is {lead('llama_code', steps=200)} here and {lead('llama_code')} after 800 steps" in lengths
    assert f"grows from {lead('seq2seq', steps=200)} to {by_rate_alone}, or {lead('seq2seq')}, as AdamW's" in lengths
    assert (
        f"is {lead('gpt2', batch_size=2)} with 2 rows, {lead('gpt2')} with [8 rows]{there} and "
        f"{lead('gpt2', batch_size=32, steps=200)} with 32." in lengths
    )
    for table in ("gpt2-rows-2", "gpt2-rows-32", "vit-rows-2", "vit-rows-8"):
        assert results.TABLES[table]({}).splitlines()[2].startswith("| orthogonal |")  # the lowest loss comes first
    assert round(loss("gpt2", "published"), 4) == round(loss("gpt2", "official"), 4)
    assert loss("smollm2_full", "averaged") < loss("smollm2_full", "adamw") < loss("smollm2_full", "orthogonal")


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
