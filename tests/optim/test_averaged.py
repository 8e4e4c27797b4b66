"""``update="averaged"``: equal to Schedule-Free's three sequences, shows their mean, and says what it cannot do."""

import copy
import math

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from hf_sai import SGDSaI

BETA, DECAY, STEPS = 0.7, 0.1, 12
KEPT = 0.999
RATES = [0.0, 0.01, 0.02, *[0.03] * 5, 0.01, *[0.03] * 3]


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.randn(6, 9, generator=torch.Generator().manual_seed(0)))
        self.vector = torch.nn.Parameter(torch.randn(7, generator=torch.Generator().manual_seed(1)))


def gradients(model, step):
    generator = torch.Generator().manual_seed(100 + step)
    return [
        0.3 * p.detach() + torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        for p in model.parameters()
    ]


def optimizer_of(model, **options):
    return SGDSaI(
        model.named_parameters(), **{"momentum": BETA, "weight_decay": DECAY, "update": "averaged", **options}
    )


def train(model, optimizer, steps, rates=RATES):
    for step in steps:
        optimizer.train()
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        for p, g in zip(model.parameters(), gradients(model, step), strict=True):
            p.grad = g
        optimizer.step()


def reference(p, make_gradient, gsnr, rates):
    """y, z and x of the paper's equations 3 to 5 in float64, with the factored rule's gradient; returns (y, x)."""
    z = x = y = p.detach().double()
    means, weights = None, 0.0
    for step, lr in enumerate(rates):
        g = make_gradient(y, step)
        squares = (
            [g.square()] if g.ndim < 2 else [g.square().mean(), g.square().mean(1, True), g.square().mean(0, True)]
        )
        means = [(1 - KEPT) * s + (KEPT * m if means else 0) for s, m in zip(squares, means or squares, strict=True)]
        unbiased = [m / (1 - KEPT ** (step + 1)) for m in means]
        size = unbiased[0] if g.ndim < 2 else unbiased[1] * unbiased[2] / unbiased[0]
        weights += lr**2
        c = lr**2 / weights if lr else 0.0
        z = z - lr * (gsnr / math.sqrt(g.numel()) * g / size.sqrt() + DECAY * y)
        x = (1 - c) * x + c * z
        y = (1 - BETA) * z + BETA * x
    return y, x


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("path", [{}, {"fused": False}, {"foreach": True}, {"foreach": False}], ids=str)
def test_it_equals_the_papers_three_sequences(maximize, path):
    model = Tiny()
    start = copy.deepcopy(model)
    optimizer = optimizer_of(model, maximize=maximize, **path)
    train(model, optimizer, range(STEPS))
    sign = -1 if maximize else 1
    for index, (p, before) in enumerate(zip(model.parameters(), start.parameters(), strict=True)):

        def make(y, step, index=index, p=p):
            generator = torch.Generator().manual_seed(100 + step)
            noise = [torch.randn(q.shape, generator=generator, dtype=torch.float64) for q in start.parameters()][index]
            return sign * (0.3 * y + noise)

        y, x = reference(before, make, optimizer.state[p]["gsnr"], RATES)
        start_of = before.detach().double()
        assert ((p.detach() - y).norm() / (y - start_of).norm()).item() < 1e-5
        optimizer.eval()
        assert ((p.detach() - x).norm() / (x - start_of).norm()).item() < 1e-5
        optimizer.train()


def test_the_mean_is_shown_and_hidden_again_and_no_step_is_made_from_it():
    model = Tiny()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(4))
    trained = [p.detach().clone() for p in model.parameters()]
    optimizer.eval()
    optimizer.eval()
    assert not any(torch.equal(p, y) for p, y in zip(model.parameters(), trained, strict=True))
    with pytest.raises(ValueError, match=r"call optimizer\.train\(\)"):
        optimizer.step()
    optimizer.train()
    for p, y in zip(model.parameters(), trained, strict=True):
        torch.testing.assert_close(p.detach(), y, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shown", [False, True])
def test_a_saved_run_goes_on_to_the_bit(shown, tmp_path):
    model = Tiny()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(5))
    if shown:
        optimizer.eval()
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "saved.pt")
    train(model, optimizer, range(5, STEPS))

    again = Tiny()
    resumed = optimizer_of(again)
    weights, state = torch.load(tmp_path / "saved.pt", weights_only=True)
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    train(again, resumed, range(5, STEPS))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_other_rules_have_nothing_to_show():
    model = Tiny()
    optimizer = optimizer_of(model, update="factored")
    train(model, optimizer, range(3))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.eval()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all("means_shown" not in group for group in optimizer.param_groups)


def test_a_schedule_of_the_momentum_is_refused_since_it_would_move_the_weights():
    model = Tiny()
    optimizer = optimizer_of(model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.03, total_steps=STEPS)  # sets it before training
    train(model, optimizer, range(1))
    schedule.step()
    optimizer.param_groups[0]["momentum"], scheduled = 0.5, optimizer.param_groups[0]["momentum"]
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="cycle_momentum=False"):
        optimizer.step()
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    assert optimizer.param_groups[0]["momentum"] != scheduled


def test_between_eval_and_train_the_momentum_can_change():
    model = Tiny()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(4))
    optimizer.eval()
    mean = copy.deepcopy(model.state_dict())
    optimizer.param_groups[0]["momentum"] = 0.4
    optimizer.train()
    optimizer.eval()
    torch.testing.assert_close(model.state_dict(), mean, rtol=1e-6, atol=1e-6)
    train(model, optimizer, range(4, STEPS))


def test_a_parameter_that_is_reached_late_averages_from_then_on():
    model = Tiny()
    optimizer = optimizer_of(model)
    for step in range(6):
        for name, p in model.named_parameters():
            p.grad = torch.zeros_like(p) if name == "vector" and step < 3 else torch.ones_like(p) + torch.randn_like(p)
        optimizer.step()
    state = optimizer.state[model.vector]
    assert state["weight_sum"] == pytest.approx(3 * optimizer.param_groups[0]["lr"] ** 2)
    assert optimizer.state[model.matrix]["weight_sum"] == pytest.approx(2 * state["weight_sum"])


def test_a_sharded_checkpoint_of_shown_means_says_so_to_a_new_optimizer():
    """torch.distributed.checkpoint loads only keys that the new optimizer's groups have."""
    model = Tiny()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(4))
    optimizer.eval()
    assert optimizer_of(Tiny()).param_groups[0].keys() == optimizer.param_groups[0].keys()
    saved = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    again = Tiny()
    again.load_state_dict(model.state_dict())
    resumed = optimizer_of(again)
    wanted = get_optimizer_state_dict(again, resumed, options=StateDictOptions(flatten_optimizer_state_dict=True))
    loaded = {key: saved[key] for key in wanted}  # as DefaultLoadPlanner does
    set_optimizer_state_dict(again, resumed, loaded, options=StateDictOptions(flatten_optimizer_state_dict=True))
    optimizer.train()
    resumed.train()
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_the_momentum_of_another_rule_is_not_shown_as_a_mean():
    model = Tiny()
    optimizer = optimizer_of(model, update="factored", lr=1e-3)
    train(model, optimizer, range(3), rates=[1e-3] * 3)
    before = [p.detach().clone() for p in model.parameters()]
    saved = optimizer.state_dict()
    saved["param_groups"][0]["update"] = "averaged"
    optimizer.load_state_dict(saved)
    optimizer.eval()
    assert all(map(torch.equal, model.parameters(), before))


def test_the_official_codes_momentum_is_forgotten():
    model = Tiny()
    optimizer = optimizer_of(model, update="published", lr=1e-3)
    train(model, optimizer, range(3), rates=[1e-3] * 3)
    saved = optimizer.state_dict()
    for name in ("update", "normalize", "maximize", "momentum_dtype", "stochastic_rounding", "foreach", "fused"):
        del saved["param_groups"][0][name]
    again = Tiny()
    resumed = optimizer_of(again)
    resumed.load_state_dict(saved)
    start = [p.detach().clone() for p in again.parameters()]
    train(again, resumed, range(3, 4), rates=[1e-3] * 4)
    for p, q in zip(again.parameters(), start, strict=True):
        assert 0 < (p - q).abs().max() < 0.02
        assert resumed.state[p]["momentum_buffer"].abs().max() < 0.02


def test_a_mean_of_16_bits_is_refused_however_it_comes_about():
    model = Tiny()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    resumed = optimizer_of(Tiny().bfloat16(), momentum_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"saved options cannot be used: .* lost in torch\.bfloat16"):
        resumed.load_state_dict(saved)
    cast = Tiny()
    late = optimizer_of(cast)
    cast.bfloat16()
    before = [p.detach().clone() for p in cast.parameters()]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"lost in torch\.bfloat16"):
            train(cast, late, range(2))
    assert all(map(torch.equal, cast.parameters(), before))


@pytest.mark.parametrize(
    ("key", "value"), [("means_shown", "no"), ("means_shown", 1), ("rounding_step", "1"), ("rounding_step", -1)]
)
def test_what_a_group_has_beside_its_options_is_checked(key, value):
    model = Tiny()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    saved["param_groups"][0][key] = value
    with pytest.raises(ValueError, match=f"{key} of a group"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 0.0}, "needs a momentum"),
        ({"normalize": True}, "two ways"),
        ({"update": "orthogonal"}, "matrices"),
    ],
    ids=str,
)
def test_saved_options_that_exclude_each_other_are_refused(options, message):
    model = Tiny()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    saved["param_groups"][0].update(options)
    with pytest.raises(ValueError, match=f"saved options cannot be used: .*{message}"):
        optimizer.load_state_dict(saved)


def test_a_run_that_leaves_it_goes_on_from_the_weights_that_are_shown():
    model = Tiny()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(4))
    optimizer.eval()
    shown = [p.detach().clone() for p in model.parameters()]
    optimizer.param_groups[0]["update"] = "factored"
    optimizer.train()
    assert all(map(torch.equal, model.parameters(), shown))
    train(model, optimizer, range(4, 5), rates=[1e-3] * 5)
    state = optimizer.state[model.matrix]
    assert "weight_sum" not in state
    assert state["averaged_steps"] == 5  # the size of the gradients is known
    # Not the difference of two weights: the momentum begins at a gradient of unit size.
    assert state["momentum_buffer"].square().mean() > 0.1


def test_switching_to_it_forgets_the_other_rules_momentum():
    model = Tiny()
    optimizer = optimizer_of(model, update="factored", lr=1e-3)
    train(model, optimizer, range(3), rates=[1e-3] * 3)
    optimizer.param_groups[0]["update"] = "averaged"
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, range(3, 4), rates=[1e-3] * 4)
    for p, q in zip(model.parameters(), before, strict=True):
        assert 0 < (p - q).abs().max() < 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 0.0}, "needs a momentum above 0"),
        ({"momentum_dtype": "8bit"}, "lost in 8bit"),
        ({"momentum_dtype": "4bit"}, "lost in 4bit"),
        ({"momentum_dtype": torch.bfloat16}, "lost in torch.bfloat16"),
        ({"normalize": True}, "two ways"),
    ],
)
def test_what_it_cannot_do_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        optimizer_of(Tiny(), **options)


def test_16_bit_parameters_keep_their_mean_in_float32():
    model = Tiny().bfloat16()
    with pytest.raises(ValueError, match="momentum_dtype=float32"):
        optimizer_of(model)
    optimizer = optimizer_of(model, momentum_dtype=torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, range(STEPS))
    assert all(optimizer.state[p]["momentum_buffer"].dtype == torch.float32 for p in model.parameters())
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, "1", True])
def test_a_damaged_sum_of_weights_is_refused(value):
    model = Tiny()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    state["state"][0]["weight_sum"] = value
    with pytest.raises(ValueError, match="weight_sum"):
        optimizer_of(Tiny()).load_state_dict(state)


def test_a_list_of_gsnrs_is_refused_where_no_tensor_is_flat():
    """Only ZeRO's flat tensors have one; a vector that got it failed in its first step."""
    model = Tiny()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    state["state"][1]["gsnr"] = [1.0, 2.0]
    fresh = optimizer_of(Tiny())
    with pytest.raises(ValueError, match="gsnr"):
        fresh.load_state_dict(state)
    assert not fresh.state
