"""The update: equal to the reference on every path, deferred where nothing can be measured, clear at the edges."""

import copy
import io
import logging
import math
import pickle

import pytest
import torch
from reference import ReferenceSGDSaI
from torch import nn

from hf_sai import SGDSaI, sgd_sai
from hf_sai.optim.sgd_sai import WARN_UNMEASURED_AFTER

PATHS = [{"foreach": False}, {"foreach": True}, {"fused": True}, {}]
SHAPES = [(7, 5), (3,), (2, 3, 4), (64, 33), (1000,)]


def make_params(dtype=torch.float32, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(params, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def parameter(*values, dtype=torch.float32):
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def step_with(optimizer, p, *gradient):
    p.grad = None if gradient == (None,) else torch.tensor(gradient, dtype=p.dtype)
    optimizer.step()


# --- the arithmetic


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)]
)
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.0}, {"weight_decay": 0.0}, {"maximize": True}, {"momentum": 0.3}, {"nesterov": True}],
    ids=str,
)
def test_every_path_equals_the_reference(path, dtype, rtol, options):
    params = make_params(dtype)
    optimizer = SGDSaI(params, lr=1e-3, **options, **path)
    reference = ReferenceSGDSaI(params, lr=1e-3, **options)
    for step in range(8):
        set_gradients(params, step)
        reference.step([p.grad for p in params])
        optimizer.step()
    for p, expected in zip(params, reference.params, strict=True):
        torch.testing.assert_close(p.detach().double(), expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_nesterov_is_that_of_torchs_sgd(path):
    """torch's momentum is a sum of gradients, ours their mean: a buffer of 1 / (1 - mu) times the size."""
    mu, lr = 0.8, 0.1
    ours, theirs = (make_params(torch.float64) for _ in range(2))
    optimizer = SGDSaI(ours, lr=lr, momentum=mu, nesterov=True, weight_decay=0.0, **path)
    torchs = torch.optim.SGD(theirs, lr=lr * (1 - mu), momentum=mu, nesterov=True)
    for p, q in zip(ours, theirs, strict=True):
        optimizer.state[p].update(gsnr=1.0, momentum_buffer=torch.ones_like(p))
        torchs.state[q]["momentum_buffer"] = torch.full_like(q, 1 / (1 - mu))
    for step in range(4):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        torchs.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_tensor_lr_gives_the_same_as_a_float(path):
    with_float, with_tensor = make_params(), make_params()
    a, b = SGDSaI(with_float, lr=0.05, **path), SGDSaI(with_tensor, lr=torch.tensor(0.05), **path)
    for step in range(3):
        set_gradients(with_float, step)
        set_gradients(with_tensor, step)
        a.step()
        b.step()
    for p, q in zip(with_float, with_tensor, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_non_contiguous_parameters_and_gradients_are_updated_right(path):
    data, g = torch.randn(7, 5), torch.randn(7, 5)
    plain = nn.Parameter(data.clone())
    transposed = nn.Parameter(data.t().contiguous().t())  # same values, other strides
    strided_gradient = nn.Parameter(data.clone())
    plain.grad, transposed.grad, strided_gradient.grad = g.clone(), g.clone(), g.t().contiguous().t()
    for p in (plain, transposed, strided_gradient):
        SGDSaI([p], **path).step()
    torch.testing.assert_close(transposed, plain)
    torch.testing.assert_close(strided_gradient, plain)


def test_the_first_step_moves_by_gsnr_times_the_gradient():
    p = parameter(1.0, 1.0)
    optimizer = SGDSaI([p], lr=0.1, weight_decay=0.0)
    step_with(optimizer, p, 1.0, -1.0)
    assert optimizer.state[p]["gsnr"] == pytest.approx(1.0)  # norm sqrt(2), unbiased std sqrt(2)
    assert p.tolist() == pytest.approx([0.9, 1.1])
    assert torch.equal(optimizer.state[p]["momentum_buffer"], p.grad)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_momentum_starts_at_the_gradient(path, dtype):
    params = make_params(dtype)
    set_gradients(params, 0)
    optimizer = SGDSaI(params, **path)
    optimizer.step()
    for p in params:
        exact = path in ({"foreach": False}, {"foreach": True})
        torch.testing.assert_close(
            optimizer.state[p]["momentum_buffer"], p.grad, **({"rtol": 0, "atol": 0} if exact else {})
        )


def test_weight_decay_is_decoupled_and_not_scaled_by_gsnr():
    p = parameter(*([2.0] * 100))
    optimizer = SGDSaI([p], lr=0.1, weight_decay=0.5)
    step_with(optimizer, p, *([1.0, -1.0] * 50))
    before = p.detach().clone()
    optimizer.state[p]["momentum_buffer"].zero_()
    step_with(optimizer, p, *([0.0] * 100))
    torch.testing.assert_close(p.detach(), before * (1 - 0.1 * 0.5))


def test_normalize_divides_by_the_largest_of_all_groups_or_of_those_that_share_a_key():
    small, large, other = (nn.Parameter(torch.zeros(n)) for n in (4, 100, 9))
    optimizer = SGDSaI(
        [{"params": [small]}, {"params": [large]}, {"params": [other], "normalize_over": "adapter"}],
        lr=1.0,
        weight_decay=0.0,
        normalize=True,
    )
    for p in (small, large, other):
        p.grad = torch.randn(p.shape)
    optimizer.step()
    gsnr = {p: optimizer.state[p]["gsnr"] for p in (small, large, other)}
    torch.testing.assert_close(small.detach(), -small.grad * gsnr[small] / gsnr[large])
    torch.testing.assert_close(large.detach(), -large.grad)
    torch.testing.assert_close(other.detach(), -other.grad)


def test_functional_updates_in_place():
    p, m = torch.ones(2), torch.ones(2)
    sgd_sai([p], [torch.full((2,), 3.0)], [m], [2.0], lr=0.1, momentum=0.5, weight_decay=0.0)
    assert m.tolist() == [2.0, 2.0]
    assert p.tolist() == pytest.approx([0.6, 0.6])
    sgd_sai([], [], [], [], lr=0.1, momentum=0.5, weight_decay=0.0)


# --- deferred measurement


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("unusable", [(0.0, 0.0), (math.nan, 1.0), (math.inf, 1.0), (None,)], ids=str)
def test_a_parameter_is_left_untouched_until_its_first_usable_gradient(path, unusable):
    p = parameter(1.0, 2.0)
    optimizer = SGDSaI([p], lr=0.1, weight_decay=0.5, **path)
    for _ in range(3):
        step_with(optimizer, p, *unusable)
        assert p.tolist() == [1.0, 2.0]
    step_with(optimizer, p, 1.0, -1.0)
    assert optimizer.state[p]["gsnr"] == pytest.approx(1.0)
    assert torch.equal(optimizer.state[p]["momentum_buffer"], p.grad)
    assert p.tolist() == pytest.approx([0.95 - 0.1, 1.9 + 0.1])


def test_after_measuring_a_zero_gradient_is_an_ordinary_gradient():
    p = parameter(1.0, 2.0)
    optimizer = SGDSaI([p], lr=0.1, weight_decay=0.0)
    step_with(optimizer, p, 1.0, -1.0)
    step_with(optimizer, p, 0.0, 0.0)
    assert p.tolist() == pytest.approx([1.0 - 0.1 - 0.09, 2.0 + 0.1 + 0.09])


def test_a_group_added_later_is_measured_at_its_own_first_gradient():
    first, second = parameter(1.0, 2.0), parameter(3.0, 4.0)
    optimizer = SGDSaI([first], weight_decay=0.0)
    step_with(optimizer, first, 1.0, -1.0)
    optimizer.add_param_group({"params": [second], "lr": 0.1})
    second.grad = torch.tensor([2.0, -2.0])
    optimizer.step()
    assert second.tolist() == pytest.approx([2.8, 4.2])


def test_a_parameter_unfrozen_later_is_measured_then():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    optimizer = SGDSaI(model.named_parameters())
    for step in range(4):
        model.bias.requires_grad_(step >= 2)
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        assert ("gsnr" in optimizer.state[model.bias]) == (step >= 2)


def test_a_warmup_from_lr_zero_measures_and_leaves_the_weights():
    p = parameter(1.0, 2.0)
    optimizer = SGDSaI([p], lr=0.1, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 2)
    step_with(optimizer, p, 1.0, -1.0)
    assert p.tolist() == [1.0, 2.0]
    schedule.step()
    step_with(optimizer, p, 1.0, -1.0)
    assert p.tolist() == pytest.approx([0.95, 2.05])
    assert optimizer.state[p]["gsnr"] == pytest.approx(1.0)


def test_an_expert_without_tokens_trains_once_it_gets_some():
    experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    optimizer = SGDSaI(experts.named_parameters(), weight_decay=0.0)
    idle = experts[1].weight.detach().clone()
    for used in (0, 0, 1):
        optimizer.zero_grad()
        experts[used](torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
        assert torch.equal(experts[1].weight, idle) == (used == 0)


def test_a_parameter_behind_a_zero_layer_starts_to_train_when_that_layer_has_moved():
    a, b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    nn.init.zeros_(b.weight)
    start = a.weight.detach().clone()
    optimizer = SGDSaI([a.weight, b.weight], weight_decay=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        (b(a(torch.randn(8, 4))) - 1).square().sum().backward()
        optimizer.step()
    assert not torch.equal(a.weight, start)


def test_empty_parameters_are_skipped():
    empty, p = nn.Parameter(torch.empty(0, 3)), parameter(1.0, 2.0)
    optimizer = SGDSaI([empty, p])
    empty.grad = torch.empty(0, 3)
    step_with(optimizer, p, 1.0, -1.0)
    assert [row.shape for row in optimizer.gsnr_report()] == [(2,)]


def test_a_closure_is_evaluated_once_a_step():
    p = parameter(1.0, 2.0)
    optimizer = SGDSaI([p])
    calls = []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == pytest.approx(5.0)
    assert len(calls) == 1


def test_momentum_zero_in_one_group_keeps_no_buffer_there_and_uses_nobody_elses():
    kept, without = parameter(1.0, 2.0), parameter(1.0, 2.0)
    optimizer = SGDSaI([{"params": [kept]}, {"params": [without], "momentum": 0.0}], lr=0.1, weight_decay=0.0)
    for gradient in ([1.0, -1.0], [3.0, -3.0]):
        kept.grad, without.grad = torch.tensor(gradient), torch.tensor(gradient)
        optimizer.step()
    assert "momentum_buffer" not in optimizer.state[without]
    assert without.tolist() == pytest.approx([1.0 - 0.1 - 0.3, 2.0 + 0.1 + 0.3])
    assert kept.tolist() == pytest.approx([1.0 - 0.1 - 0.12, 2.0 + 0.1 + 0.12])


@pytest.mark.parametrize(
    ("update", "changed", "message"),
    [
        ("published", {"momentum": 0.0}, "momentum is 0"),
        ("published", {"nesterov": "false"}, "nesterov must be true or false, but is 'false'"),
        ("averaged", {"nesterov": True}, "keeps a mean in its place"),
    ],
    ids=str,
)
def test_a_contradiction_that_comes_later_is_refused_before_anything_moves(update, changed, message):
    p = parameter(1.0, 2.0)
    optimizer = SGDSaI([p], lr=0.1, update=update, nesterov=update == "published")
    step_with(optimizer, p, 1.0, -2.0)
    before = p.detach().clone()
    optimizer.param_groups[0].update(changed)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            step_with(optimizer, p, 1.0, 1.0)
    assert torch.equal(p, before)


def test_momentum_switched_on_later_starts_at_the_gradient():
    p = parameter(1.0, 2.0)
    optimizer = SGDSaI([p], lr=0.1, momentum=0.0, weight_decay=0.0)
    step_with(optimizer, p, 1.0, -1.0)
    optimizer.param_groups[0]["momentum"] = 0.9
    step_with(optimizer, p, 2.0, -2.0)
    assert torch.equal(optimizer.state[p]["momentum_buffer"], p.grad)


# --- never measured twice


def trained(dtype=torch.float32, **options):
    params = make_params(dtype)
    optimizer = SGDSaI(params, lr=0.01, **options)
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    return params, optimizer


def gsnrs(optimizer):
    return [optimizer.state[p]["gsnr"] for group in optimizer.param_groups for p in group["params"]]


def through_state_dict(params, optimizer):
    fresh = SGDSaI(params, lr=0.01)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch's state dicts share tensors
    return params, fresh


def through_a_file(params, optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh = SGDSaI(params, lr=0.01)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return params, fresh


def through_deepcopy(params, optimizer):
    clone = copy.deepcopy(optimizer)
    return clone.param_groups[0]["params"], clone


def through_pickle(params, optimizer):
    clone = pickle.loads(pickle.dumps(optimizer))
    return clone.param_groups[0]["params"], clone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("through", [through_state_dict, through_a_file, through_deepcopy, through_pickle])
def test_a_copy_keeps_the_exact_gsnr_and_continues_alike(through, dtype):
    params, optimizer = trained(dtype)
    copies, clone = through([nn.Parameter(p.detach().clone()) for p in params], optimizer)
    expected = gsnrs(optimizer)
    for step in range(3, 6):
        set_gradients(params, step)
        set_gradients(copies, step)
        optimizer.step()
        clone.step()
    assert gsnrs(clone) == expected
    for p, q in zip(params, copies, strict=True):
        assert torch.equal(p, q)


def test_loading_an_empty_state_does_not_count_as_measuring():
    params = make_params()
    optimizer = SGDSaI(params)
    optimizer.load_state_dict(optimizer.state_dict())
    set_gradients(params, 0)
    optimizer.step()
    assert all(value > 0 for value in gsnrs(optimizer))


def test_a_checkpoint_of_an_older_version_without_new_group_keys_loads():
    params, optimizer = trained()
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        for key in ("normalize", "maximize", "foreach", "fused"):
            del group[key]
    fresh = SGDSaI(params)
    fresh.load_state_dict(saved)
    set_gradients(params, 9)
    fresh.step()
    assert gsnrs(fresh) == gsnrs(optimizer)


@pytest.mark.parametrize("when", ["before", "after"])
def test_torch_distributed_checkpoint_state_keeps_and_restores_gsnr(when):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def new():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        return model, SGDSaI(model.parameters(), lr=0.01)

    def train(model, optimizer, steps):
        torch.manual_seed(1)
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(5, 4)).square().sum().backward()
            optimizer.step()

    model, optimizer = new()
    if when == "before":
        get_optimizer_state_dict(model, optimizer)  # takes a step on zero gradients to see the state's shape
        train(model, optimizer, 2)
        plain_model, plain = new()
        train(plain_model, plain, 2)
        assert gsnrs(optimizer) == gsnrs(plain)
        for p, q in zip(model.parameters(), plain_model.parameters(), strict=True):
            torch.testing.assert_close(p, q)
    else:
        train(model, optimizer, 2)
        saved = get_optimizer_state_dict(model, optimizer)
        fresh_model, fresh = new()
        set_optimizer_state_dict(fresh_model, fresh, saved)
        assert gsnrs(fresh) == gsnrs(optimizer)
        train(fresh_model, fresh, 1)
        assert gsnrs(fresh) == gsnrs(optimizer)


# --- GradScaler


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_grad_scaler_overflow_on_the_first_steps_changes_nothing_and_later_steps_are_right(path):
    p, plain = parameter(1.0, 2.0), parameter(1.0, 2.0)
    optimizer, reference = SGDSaI([p], lr=0.1, **path), SGDSaI([plain], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for gradient in ([math.inf, 1.0], [1.0, -1.0], [math.nan, 0.0], [0.5, 0.25], [2.0, 1.0]):
        scale = scaler.get_scale()
        scaler.scale(torch.zeros(()))
        p.grad = torch.tensor(gradient) * scale
        scaler.step(optimizer)
        scaler.update()
        if all(map(math.isfinite, gradient)):
            step_with(reference, plain, *gradient)
        torch.testing.assert_close(p, plain)
    assert optimizer.state[p]["gsnr"] == reference.state[plain]["gsnr"]


# --- edges


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr must be a finite number >= 0 or a floating tensor of one element, but is -1.0"),
        ({"lr": math.nan}, "lr must be a finite number >= 0 .*, but is nan"),
        ({"lr": "0.1"}, "lr must be a finite number >= 0 .*, but is '0.1'"),
        ({"lr": torch.tensor([1.0, 2.0])}, r"one element, but is tensor\(\[1., 2.\]\)"),
        ({"lr": torch.tensor(math.nan)}, "lr must be a finite number"),
        ({"momentum": 1.0}, r"momentum must be a number in \[0, 1\), but is 1.0"),
        ({"momentum": -0.1}, r"momentum must be a number in \[0, 1\), but is -0.1"),
        ({"weight_decay": math.inf}, "weight_decay must be a finite number >= 0, but is inf"),
        ({"eps": -1e-8}, "eps must be a finite number >= 0"),
        ({"normalize": "yes"}, "normalize must be true or false, but is 'yes'"),
        ({"foreach": True, "fused": True}, "foreach and fused are both True"),
        ({"nesterov": 1}, "nesterov must be true or false, but is 1"),
        ({"nesterov": True, "momentum": 0.0}, "looks ahead along a momentum, and momentum is 0"),
        ({"nesterov": True, "update": "averaged"}, "update='averaged' keeps a mean in its place"),
    ],
    ids=str,
)
def test_bad_options_name_the_value_and_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        SGDSaI([parameter(1.0)], **options)
    optimizer = SGDSaI([parameter(1.0)])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [parameter(2.0)], **options})
    assert len(optimizer.param_groups) == 1


def test_complex_parameters_are_refused_by_name_and_leave_the_optimizer_as_it_was():
    optimizer = SGDSaI([("w", parameter(1.0))])
    with pytest.raises(ValueError, match="Parameter z is complex"):
        optimizer.add_param_group({"params": [("z", nn.Parameter(torch.ones(2, dtype=torch.complex64)))]})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_are_a_clear_error():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = SGDSaI(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="sparse=False"):
        optimizer.step()


@pytest.mark.parametrize("update", ["published", "factored", "averaged", "rows"])
def test_sparse_gradients_are_a_clear_error_after_dense_ones_too(update):
    """As after a resume by a script whose embedding is sparse now."""
    embedding = nn.Embedding(5, 3)
    optimizer = SGDSaI(embedding.parameters(), update=update)
    embedding(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    before = embedding.weight.detach().clone()
    optimizer.zero_grad()
    embedding.sparse = True
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="sparse=False"):
        optimizer.step()
    assert torch.equal(embedding.weight, before)


def test_a_refused_sparse_gradient_leaves_the_other_gradients_and_the_count_of_roundings():
    """GradScaler's scale must not be undone twice by who catches the error and steps again."""
    dense = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    embedding = nn.Parameter(torch.ones(4, 2))
    optimizer = SGDSaI([dense, embedding], fused=True, stochastic_rounding=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    dense.grad, embedding.grad = torch.full_like(dense, 1024.0), torch.eye(4)[:, :2].to_sparse()
    before = dense.grad.clone()
    for _ in range(2):
        with pytest.raises(ValueError, match="sparse=False"):
            optimizer.step()
    assert torch.equal(dense.grad, before)
    assert "rounding_step" not in optimizer.param_groups[0]
    assert not optimizer.state[dense]


def test_step_prints_nothing(capsys):
    trained()
    assert capsys.readouterr() == ("", "")


# --- telling


def test_the_report_names_every_parameter_and_who_is_unmeasured():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    optimizer = SGDSaI([{"params": list(model.named_parameters()), "name": "all"}])
    model[0](torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    report = optimizer.gsnr_report()
    assert [row.name for row in report] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert [row.name for row in report.unmeasured] == ["1.weight", "1.bias"]
    weight = next(iter(report))
    assert weight.shape == (2, 3)
    assert weight.group == "all"
    assert weight.ratio == pytest.approx(weight.gsnr / math.sqrt(6))
    lines = str(report).splitlines()
    assert "UNMEASURED" in lines[1]
    assert lines[-1] == "2 of 4 parameters measured"


def test_names_may_come_with_the_question():
    model = nn.Linear(3, 2)
    optimizer = SGDSaI(model.parameters())
    assert [row.name for row in optimizer.gsnr_report()] == ["group 0 parameter 0", "group 0 parameter 1"]
    assert [row.name for row in optimizer.gsnr_report(model.named_parameters())] == ["weight", "bias"]


def test_unmeasured_parameters_are_warned_about_once_by_name(caplog):
    used, idle = parameter(1.0, 2.0), parameter(1.0, 2.0)
    optimizer = SGDSaI([("used", used), ("idle", idle)])
    with caplog.at_level(logging.WARNING, logger="hf_sai"):
        for _ in range(3 * WARN_UNMEASURED_AFTER):
            step_with(optimizer, used, 1.0, -1.0)
    assert len(caplog.records) == 1
    assert "not being trained: idle." in caplog.text


NAMES = {
    "without names to named ones": ([("a", parameter(3.0))], {"params": [parameter(2.0)]}, "without names"),
    "nothing to named ones": ([("a", parameter(3.0))], {"params": []}, "without names"),
    "with names to unnamed ones": ([parameter(3.0)], {"params": [("b", parameter(2.0))]}, "with names"),
    "too many": (
        [("a", parameter(3.0))],
        {"params": [parameter(2.0)], "param_names": ["b", "c"]},
        r"each parameter \(1",
    ),
    "too few": ([("a", parameter(3.0))], {"params": [parameter(2.0)], "param_names": []}, r"each parameter \(1"),
    "none": ([("a", parameter(3.0))], {"params": [parameter(2.0)], "param_names": None}, "is None; it must be a list"),
    "numbers": ([("a", parameter(3.0))], {"params": [(1, parameter(2.0))]}, r"is \[1\]; it must be a list of texts"),
}


@pytest.mark.parametrize(("first", "second", "message"), NAMES.values(), ids=NAMES)
def test_a_group_whose_names_do_not_go_with_the_others_is_refused_and_the_optimizer_is_as_before(
    first, second, message
):
    optimizer = SGDSaI(first, lr=0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(second)
    (p,) = optimizer.param_groups[0]["params"]
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert len(optimizer.gsnr_report()) == 1


def test_names_may_be_given_beside_the_parameters():
    optimizer = SGDSaI([("a", parameter(3.0))], lr=0.1)
    optimizer.add_param_group({"params": [parameter(2.0)], "param_names": ["b"]})
    assert [row.name for row in optimizer.gsnr_report()] == ["a", "b"]
