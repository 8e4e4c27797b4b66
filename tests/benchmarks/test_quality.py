"""benchmarks/quality: what it tunes, what it reports, and that every rival takes the steps it should."""

import math
import sys

import pytest
import torch
from torch import nn

from benchmarks.quality import __main__ as program
from benchmarks.quality.ideas import IDEAS, laid_over, with_qkv_apart
from benchmarks.quality.optimizers import RIVALS, VARIANTS
from benchmarks.quality.package_sources import load_sources
from benchmarks.quality.search import best_settings, choosers, coordinate_search
from benchmarks.quality.sinkgd import unit_rows_and_columns
from benchmarks.quality.tables import steps_to, tables
from benchmarks.quality.task import Task, halves
from benchmarks.quality.training import train_once
from hf_sai import SGDSaI
from hf_sai.optim.rules import orthogonal
from recipes.common.lr_search import Results

usual_newton_schulz = orthogonal.newton_schulz
PACKAGE = {"schedule_free": "schedulefree", "adam_mini": "adam_mini"}


class Model(nn.Module):
    """An embedding, a numbered layer and a head, on the interface of transformers' models."""

    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"hidden_size": 8, "num_attention_heads": 2})
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8)])
        self.classifier = nn.Linear(8, 4)

    def forward(self, input_ids, labels):
        logits = self.classifier(self.layers[0](self.embed(input_ids)).relu())
        return type("Output", (), {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits})


def rows(count):
    ids = torch.arange(count) % 16
    return {"input_ids": ids, "labels": ids % 4}


def task(**changes):
    settings = {"warmup": 0.1, "learning_rate": 5e-2}
    return Task(Model, rows(64), rows(16), rows(12), **{**settings, **changes})


def trained(name, seed=0, **changes):
    rival = (RIVALS | VARIANTS)[name]
    return train_once(task(), rival, {**rival.first(5e-2), **changes}, seed, steps=40, batch_size=8, report=True)


@pytest.mark.parametrize("name", [*RIVALS, *VARIANTS])
def test_every_rival_learns_and_says_the_same_twice(name):
    pytest.importorskip(PACKAGE.get(name, "torch"))
    first = trained(name)
    assert first["test_loss"] < 1.2 < math.log(4)  # guessing
    assert first == trained(name)
    assert first["test_loss"] != trained(name, seed=1)["test_loss"]


@pytest.mark.parametrize("rule", ["published", "factored", "orthogonal"])
def test_without_gsnr_a_training_is_another(rule):
    settings = {"learning_rate": 0.2} if rule == "published" else {}
    assert trained(f"{rule}_without_gsnr", **settings)["curve"] != trained(rule, **settings)["curve"]


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.endswith("bit")])
def test_low_bits_are_asked_for(name):
    (optimizer,) = VARIANTS[name].build(Model(), VARIANTS[name].first(5e-2))
    assert {group["momentum_dtype"] for group in optimizer.param_groups} == {name.rpartition("_")[2]}


def idea_by_hand(name, make_gradient, mu, lr, decay):
    """Published steps with a g-SNR of 1 and the idea, written down plainly in float64."""
    p, m, mine = torch.linspace(-1, 1, 6, dtype=torch.float64), None, None
    for step in range(6):
        g = make_gradient(step)
        m = g if m is None else mu * m + (1 - mu) * g
        update, share = m, 1.0
        if name == "cautious_mask":
            agrees = (m * g > 0).double()
            update = m * agrees / agrees.mean().clamp(min=1e-3)
        elif name == "cautious_decay":
            share = (m * p >= 0).double()
        elif name == "nesterov":
            update = g if step == 0 else mu * m + (1 - mu) * g
        elif name == "clipped":
            unit = g / max(1.0, g.square().mean().sqrt().item())
            update = mine = unit if mine is None else mu * mine + (1 - mu) * unit
        else:
            update = m * m.square().mean().sqrt() * math.sqrt((1 + mu) / (1 - mu))
        p = p - lr * decay * share * p - lr * update
    return p


@pytest.mark.parametrize("name", IDEAS)
def test_an_idea_makes_the_steps_that_its_docstring_says(name):
    mu, lr, decay = 0.8, 0.1, 0.5

    def make_gradient(step):
        return 2 * torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))

    weight = nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64))

    def build(model, settings):
        optimizer = SGDSaI([weight], lr=lr, momentum=mu, weight_decay=decay)
        optimizer.state[weight]["gsnr"] = 1.0
        return [optimizer]

    (optimizer,) = laid_over(build, IDEAS[name])(nn.Module(), {})
    for step in range(6):
        weight.grad = make_gradient(step)
        optimizer.step()
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (lr, decay)
    torch.testing.assert_close(weight.detach(), idea_by_hand(name, make_gradient, mu, lr, decay), atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.endswith((*IDEAS, "beta2_0.99"))])
def test_a_variant_trains_another_way_than_its_rule(name):
    assert trained(name, weight_decay=0.1)["curve"] != trained(name.partition("_")[0], weight_decay=0.1)["curve"]


def test_with_qkv_apart_each_third_of_a_matrix_moves_as_if_alone():
    whole = nn.Parameter(torch.zeros(4, 12))  # queries, keys and values side by side, as in GPT-2
    thirds = [nn.Parameter(torch.zeros(4, 4)) for _ in range(3)]
    grad = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))

    def step(parameters, wrap):
        group = {"params": parameters, "matrices": "linear_transposed"}
        (optimizer,) = wrap(lambda model, settings: [SGDSaI([group], lr=0.1, update="orthogonal")])(nn.Module(), {})
        for parameter in parameters:
            optimizer.state[parameter]["gsnr"] = math.sqrt(parameter.numel())
        optimizer.step()

    whole.grad = grad.clone()
    for third, part in zip(thirds, grad.split(4, dim=1), strict=True):
        third.grad = part.clone()
    step([whole], with_qkv_apart)
    step(thirds, lambda build: build)
    for own, alone in zip(whole.detach().split(4, dim=1), thirds, strict=True):
        torch.testing.assert_close(own.norm(), alone.detach().norm(), rtol=0.1, atol=0)  # rows are sized by the whole
        torch.testing.assert_close(own / own.norm(), (alone / alone.norm()).detach())
    assert orthogonal.newton_schulz is usual_newton_schulz


def test_without_gsnr_every_step_is_scaled_by_one():
    model = Model()
    name = "factored_without_gsnr"
    (optimizer,) = VARIANTS[name].build(model, VARIANTS[name].first(5e-2))
    model(**rows(8)).loss.backward()
    optimizer.step()
    assert all(optimizer.state[p]["gsnr"] == math.sqrt(p.numel()) for p in model.parameters())
    assert all("momentum_buffer" in optimizer.state[p] for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "axis"), [(name, axis) for name, rival in RIVALS.items() for axis in rival.all_axes()]
)
def test_no_axis_is_without_effect(name, axis):
    pytest.importorskip(PACKAGE.get(name, "torch"))
    rival = RIVALS[name]
    usual = rival.first(5e-2)[axis]
    values = [value for value in rival.all_axes()[axis] if value != usual]
    assert values
    assert all(trained(name)["curve"] != trained(name, **{axis: value})["curve"] for value in values)


def test_lion_and_nadamw_step_as_their_papers_say():
    lr, decay, beta1, beta2 = 0.1, 0.1, 0.9, 0.99
    settings = {"learning_rate": lr, "weight_decay": decay, "beta1": beta1, "beta2": beta2, "momentum_decay": 1e3}
    for name in ("lion", "nadamw"):
        torch.manual_seed(0)
        model = Model().double()
        weight = model.layers[0].weight
        mine, m, v = weight.detach().clone(), torch.zeros_like(weight), torch.zeros_like(weight)
        (optimizer,) = RIVALS[name].build(model, settings)
        for t in range(1, 4):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            g = weight.grad.clone()
            optimizer.step()
            mine *= 1 - lr * decay
            if name == "lion":
                mine -= lr * (beta1 * m + (1 - beta1) * g).sign()
                m = beta2 * m + (1 - beta2) * g
            else:
                m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
                ahead = beta1 * m / (1 - beta1 ** (t + 1)) + (1 - beta1) * g / (1 - beta1**t)
                mine -= lr * ahead / ((v / (1 - beta2**t)).sqrt() + 1e-8)
        torch.testing.assert_close(weight.detach(), mine, atol=1e-6, rtol=0)


def test_sinkgd_and_muon_leave_embedding_and_head_to_adamw():
    for name in ("muon", "sinkgd"):
        model = Model()
        matrices, rest = RIVALS[name].build(model, RIVALS[name].first(1e-2))
        held = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in (matrices, rest)]
        assert [id(p) for p in held[0]] == [id(model.layers[0].weight)]
        assert {id(p) for part in held for p in part} == {id(p) for p in model.parameters()}
        assert sum(map(len, held)) == len(list(model.parameters()))


def test_unit_rows_and_columns_are_unit():
    torch.manual_seed(0)
    unit = unit_rows_and_columns(torch.randn(12, 20) * torch.logspace(-2, 2, 12)[:, None])
    assert torch.allclose(unit.square().mean(0), torch.ones(20), atol=1e-3)
    assert torch.allclose(unit.square().mean(1), torch.ones(12), atol=0.05)


def test_the_search_finds_the_valley_of_two_axes():
    tried = []

    def loss_of(settings):
        tried.append(settings)
        rate = settings["learning_rate"]
        if rate > 0.2:
            return math.nan
        return abs(math.log2(rate / (0.08 if settings["momentum"] == 0.8 else 0.02))) - (settings["momentum"] == 0.8)

    found = coordinate_search(loss_of, {"learning_rate": 0.01, "momentum": 0.9}, {"momentum": (0.8, 0.95)})
    assert found == {"learning_rate": 0.02, "momentum": 0.9}  # 0.8 is no better at the rate that is best for 0.9 ...
    found = coordinate_search(loss_of, {"learning_rate": 0.04, "momentum": 0.8}, {"momentum": (0.9,)})
    assert found == {"learning_rate": 0.08, "momentum": 0.8}
    assert len(tried) == len({tuple(settings.values()) for settings in tried[:5]}) + len(tried[5:])


def test_the_program_resumes_and_the_seed_that_chose_is_not_reported(tmp_path, monkeypatch, capsys):
    made = []

    def counted(*args, **options):
        made.append((args[3], options["report"]))
        return train_once(*args, **options)

    module = type("module", (), {"make": staticmethod(task), "STEPS": 40, "BATCH_SIZE": 8, "CHOOSERS": 2})
    monkeypatch.setitem(sys.modules, "benchmarks.quality.tasks.vit", module)
    monkeypatch.setattr(program, "train_once", counted)
    call = ["vit", "--optimizers", "adamw", "factored", "--axes", "rate", "--seeds", "2", "--results", str(tmp_path)]
    program.main(call)
    first = capsys.readouterr().out
    assert {seed for seed, report in made if not report} == {0, 100}
    assert sorted(seed for seed, report in made if report) == [1, 1, 2, 2]
    count = len(made)
    program.main(call)
    assert len(made) == count
    table = first[first.index("| optimizer") :]
    assert capsys.readouterr().out == table
    runs = Results(tmp_path / "vit" / "adamw.json", task().settings()).runs
    reported = [run["test_loss"] for run in runs if "test_loss" in run]
    assert len(reported) == 2
    assert f"{sum(reported) / 2:.4f} ±" in table
    assert all(run["seed"] in (1, 2) for run in runs if "test_loss" in run)

    program.main([*call, "--steps", "2", "--batch_size", "4"])
    assert all(run["steps"] == 40 for run in runs)
    longer = [run for run in Results(tmp_path / "vit" / "adamw.json", {}).runs if run["steps"] == 80]
    assert longer
    assert all(run["batch_size"] == 4 for run in longer)


def test_results_of_other_data_are_refused(tmp_path):
    store = Results(tmp_path / "adamw.json", task().settings())
    store.add({"candidate": "adamw", "learning_rate": 1.0, "seed": 0, "eval_loss": 1.0})
    other = Task(Model, rows(65), rows(16), rows(12), 0.1, 1e-2)
    with pytest.raises(ValueError, match="another data"):
        Results(tmp_path / "adamw.json", other.settings())


def test_the_table_counts_steps_to_adamws_loss_and_names_what_diverged(tmp_path):
    def store(name, losses, curve):
        results = Results(tmp_path / f"{name}.json", {})
        for seed, loss in enumerate(losses):
            run = {"candidate": name, "learning_rate": 1.0, "seed": seed, "steps": 20, "batch_size": 1, "settings": {}}
            results.add(
                {**run, "eval_loss": loss, "state_bytes": 8, **({"test_loss": loss, "curve": curve} if seed else {})}
            )
        return results

    stores = {
        "adamw": store("adamw", [3.0, 3.0, 3.001], [[10, 4.0], [20, 3.0]]),
        "muon": store("muon", [2.0, 2.0, 2.001], [[10, 4.0], [20, 2.0]]),
        "lion": store("lion", [2.5, math.nan], [[10, 4.0]]),
    }
    lines = tables(stores, steps=20, batch_size=1).splitlines()
    assert lines[2].startswith("| muon | 2.0005 ± 0.0007 | - | 2 | 2.0005 ± 0.0007 | 15 | 8 |")
    assert lines[3].startswith("| adamw | 3.0005")
    assert lines[4].startswith("| lion | diverged")


def test_settings_are_chosen_by_the_mean_of_the_seeds_that_choose(tmp_path):
    results = Results(tmp_path / "adamw.json", {})
    for rate, seed, loss in ((1, 0, 1.0), (1, 100, 3.0), (2, 0, 1.5), (2, 100, 1.6), (2, 1, 9.0), (3, 0, 0.1)):
        results.add({"candidate": "adamw", "learning_rate": rate, "seed": seed, "settings": {}, "eval_loss": loss})
    assert best_settings(results, "adamw") == {"learning_rate": 2}  # 3 was tried with one seed alone
    assert choosers(1) == [0]
    assert choosers(3) == [0, 100, 101]


def test_steps_to_a_loss_that_is_never_reached():
    assert steps_to(1.0, [[1, 3.0], [2, 2.0]]) is None
    assert steps_to(3.0, [[5, 3.0]]) == 5.0


def test_halves_share_no_row():
    first, second = halves({"labels": torch.arange(11)})
    assert sorted([*first["labels"].tolist(), *second["labels"].tolist()]) == list(range(11))


def test_sources_of_packages_share_no_paragraph(tmp_path, monkeypatch):
    package = tmp_path / "some_package"
    (package / "tests").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "tests" / "test_it.py").write_text("never = 1\n")
    for index in range(120):
        (package / f"part{index}.py").write_text(f"# the licence\n\nvalue{index} = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    splits = load_sources(("some_package",))
    assert min(len(splits["validation"]), len(splits["test"])) > 0
    assert len(splits["train"]) > 100
    assert not any("licence" in text or "never" in text for text in splits["train"]["text"])
    with pytest.raises(ValueError, match="no_such_package is not installed"):
        load_sources(("no_such_package",))
