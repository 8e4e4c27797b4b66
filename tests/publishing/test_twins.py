"""Twins: the runs a card compares with are those that differ in the optimizer alone."""

import pytest
from test_plots import make_record

from hf_sai.cli.main import main
from hf_sai.publishing.artifacts import finish_run
from hf_sai.publishing.twins import MAX_TWINS, find_twins
from hf_sai.runs.record import RECORD_FILE


def save(folder, name, optimizer="SGDSaI", *, loss=3.1, **more):
    record = make_record(name, optimizer)
    record.run.update(status="finished", steps=40)
    record.settings = {"seed": 1, "learning_rate": 0.1, "output_dir": name, "optim": optimizer}
    record.model = {"class": "GPT2LMHeadModel", "parameters": 5}
    record.data = [{"name": "d"}]
    record.results = {"eval_loss": loss}
    for field, values in more.items():
        getattr(record, field).update(values)
    record.save(folder / name)
    return folder / name


def test_only_the_optimizer_may_differ(tmp_path):
    own = save(tmp_path, "own")
    twin = save(tmp_path, "adamw", "AdamW", settings={"learning_rate": 0.5, "adam_beta1": 0.8})
    save(tmp_path, "same-optimizer")
    save(tmp_path, "other-seed", "SGD", settings={"seed": 2})
    save(tmp_path, "other-model", "SGD", model={"parameters": 6})
    save(tmp_path, "longer", "SGD", run={"steps": 41})
    save(tmp_path, "unfinished", "SGD", run={"status": "running"})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / RECORD_FILE).write_text("{")
    assert find_twins(own) == [twin]
    assert find_twins(twin) == [own]  # the first of equal ones, by name


def test_adapters_are_compared_but_not_the_order_of_their_targets(tmp_path):
    own = save(tmp_path, "own", model={"adapter": {"r": 8, "target_modules": ["q", "v"]}})
    save(tmp_path, "other-rank", "SGD", model={"adapter": {"r": 4, "target_modules": ["q", "v"]}})
    twin = save(tmp_path, "adamw", "AdamW", model={"adapter": {"r": 8, "target_modules": ["v", "q"]}})
    assert find_twins(own) == [twin]


def test_of_each_optimizer_the_best_is_taken_and_not_too_many(tmp_path):
    own = save(tmp_path, "own")
    save(tmp_path, "adamw-1", "AdamW", loss=3.5)
    best = save(tmp_path, "adamw-2", "AdamW", loss=3.0)
    assert find_twins(own) == [best]
    for index in range(MAX_TWINS + 2):
        save(tmp_path, f"z{index}", f"Other{index}")
    assert len(find_twins(own)) == MAX_TWINS


def test_a_card_compares_with_twins_unless_told_otherwise(tmp_path, capsys):
    own = save(tmp_path, "own")
    save(tmp_path, "adamw", "AdamW")
    assert "| adamw | AdamW |" in finish_run(own)[-1].read_text()
    assert "| own | SGDSaI |" in finish_run(tmp_path / "adamw")[-1].read_text()
    alone = save(tmp_path / "elsewhere", "own")
    assert "AdamW" not in finish_run(alone)[-1].read_text()
    assert "AdamW" not in finish_run(save(tmp_path, "own"), twins=())[-1].read_text()
    assert main(["card", str(own), "--twin", str(alone)]) == 0
    assert "AdamW" not in (own / "README.md").read_text()


def test_a_run_without_a_record_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot read"):
        find_twins(tmp_path)
