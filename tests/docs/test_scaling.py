"""docs/scaling.md: its byte tables are recomputed, and the simulation it describes is run by its own command."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
#: As the simulation prints them, which the last test compares with the page.
PARAMETERS = {"7B": 6_738_415_616, "70B": 68_976_648_192, "405B": 405_853_388_800}
#: Columns of the bytes per rank -> rows of the bytes per parameter.
ENGINES = ["DDP, fp32", "FSDP2, fp32 shards, bf16 compute", "ZeRO-2, same", "ZeRO-3, same"]


def table(head):
    """The rows of the table whose head starts so."""
    _, _, *rows = TEXT[TEXT.index(f"\n| {head} |") :].split("\n\n")[0].strip().splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


#: Engine -> parameters, gradients, SGD-SaI state, AdamW state, SGD-SaI in all, AdamW in all; written with N.
PER_PARAMETER = {engine: cells for engine, *cells in table("engine")}
PER_RANK = table("model (parameters)")
ON_THE_WIRE = table("model")
SIMULATED = table("command")


def value(formula, ranks):
    """What a cell like ``4 + 8/N`` is for so many ranks."""
    assert re.fullmatch(r"[\d\s+/()N]+", formula), formula
    return eval(formula, {"N": ranks})


@pytest.mark.parametrize("engine", PER_PARAMETER)
def test_the_parts_add_up_to_the_whole(engine):
    parameters, gradients, *states_and_sums = (value(cell, 64) for cell in PER_PARAMETER[engine])
    for state, whole in zip(states_and_sums[:2], states_and_sums[2:], strict=True):
        assert parameters + gradients + state == pytest.approx(whole)


@pytest.mark.parametrize("row", PER_RANK, ids=lambda row: f"{row[0].split()[0]} on {row[1]}")
def test_bytes_per_rank_are_those_per_parameter_times_the_parameters(row):
    model, ranks, *pairs = row
    count, ranks = PARAMETERS[model.split()[0]], int(ranks.replace(",", ""))
    assert float(re.search(r"\(([\d.]+) B\)", model)[1]) == round(count / 1e9, 2)
    for engine, pair in zip(ENGINES, pairs, strict=True):
        for written, formula in zip(pair.split("/"), PER_PARAMETER[engine][4:], strict=True):
            decimals = len(written.strip().partition(".")[2])
            gib = count * value(formula, ranks) / 2**30
            assert float(written.replace(",", "")) == pytest.approx(gib, abs=0.51 * 10**-decimals)


def test_bytes_on_the_wire_are_16_per_tensor_beside_6_per_parameter():
    assert [row[0] for row in ON_THE_WIRE] == list(PARAMETERS)
    for model, tensors, engine, own in ON_THE_WIRE:
        assert float(engine.split()[0].replace(",", "")) == pytest.approx(6 * PARAMETERS[model] / 1e9, rel=2e-3)
        assert int(own.split()[0].replace(",", "")) == 32 * int(tensors.replace(",", ""))


def test_the_orthogonal_rule_sends_each_hidden_element_to_one_rank_and_back_in_two_bytes():
    embeddings = {"7B": 2 * 32_000 * 4096, "70B": 2 * 32_000 * 8192, "405B": 2 * 128_256 * 16_384}
    for head, ranks, engine, orthogonal, adamw in table("model, hidden elements"):
        model, ranks = head.split()[0], int(ranks.replace(",", ""))
        hidden = PARAMETERS[model] - embeddings[model]
        assert float(re.search(r"\(([\d.]+) B\)", head)[1]) == round(hidden / 1e9, 2)
        assert float(orthogonal.split()[0]) == pytest.approx(4 * hidden * (ranks - 1) / ranks**2 / 1e9, abs=0.006)
        assert engine.split()[0] in {row[2].split()[0] for row in ON_THE_WIRE}
        assert adamw == "0"


def test_sharing_out_under_ddp_costs_two_bytes_for_each_hidden_element_and_divides_the_work():
    layer = [(4096, 4096)] * 4 + [(4096, 11_008)] * 3
    operations = 32 * sum(5 * (4 * r * r * c + 2 * r**3) for r, c in layer)
    hidden = PARAMETERS["7B"] - 2 * 32_000 * 4096
    ((_, ranks, engine, sent, alone, shared),) = table("DDP, hidden elements")
    ranks = int(ranks)
    assert float(engine.split()[0]) == pytest.approx(4 * PARAMETERS["7B"] / 1e9, abs=0.06)
    assert float(sent.split()[0]) == pytest.approx(2 * hidden * (ranks - 1) / ranks / 1e9, abs=0.006)
    assert float(alone.split()[0]) == pytest.approx(operations / 1e12, abs=0.6)
    assert float(shared.split()[0]) == pytest.approx(operations / ranks / 1e12, abs=0.6)


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=() if "70b" in row[0] else pytest.mark.slow, id=row[0]) for row in SIMULATED]
)
def test_measuring_costs_one_small_all_reduce_and_no_tensor_larger_than_a_shard(row):
    command, local_elements, _, _, collectives, largest_made, largest_shard = row
    words = shlex.split(command.strip("`"))
    script = [sys.executable, str(ROOT / "benchmarks" / "first_step_at_scale.py"), *words]
    report = json.loads(subprocess.run(script, capture_output=True, text=True, check=True).stdout)
    model = words[1].upper()
    tensors = {cells[0]: int(cells[1].replace(",", "")) for cells in ON_THE_WIRE}[model]
    assert report["parameters"] == PARAMETERS[model]
    assert f"{PARAMETERS[model]:,}" in TEXT
    assert report["tensors"] == tensors
    assert report["local_elements"] / 1e6 == pytest.approx(float(local_elements.split()[0]), abs=0.051)
    assert collectives == "1 / 0"
    assert [report[step]["collectives"] for step in ("first", "second", "third")] == [1, 0, 0]
    assert report["first"]["collective_bytes"] == 32 * tensors
    assert report["largest_local_tensor"] == int(largest_shard.replace(",", ""))
    made = [report[step]["largest_tensor_made"] for step in ("first", "second", "third")]
    assert max(made) == int(largest_made.replace(",", "")) <= report["largest_local_tensor"]
