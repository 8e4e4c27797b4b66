"""The rules ``rows`` and ``factored``: near the reference in every path, for gradients of any size."""

import copy
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from reference import ReferenceSGDSaI, Rows, assert_moved_alike
from torch import nn

from hf_sai import SGDSaI
from hf_sai.optim import layout
from hf_sai.optim.layout import Part
from hf_sai.optim.rules import RULES
from hf_sai.optim.rules.factored import MEAN_SQUARES
from hf_sai.optim.rules.rows import mean_squares
from hf_sai.runs.describe import optimizer_scalars

SHAPES = [(40, 130), (6, 3, 2, 2), (7,), (1, 5), ()]
PATHS = [{}, {"foreach": False}, {"foreach": True}, {"fused": True}, {"gradient_release": True}]


def make_params(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradients(params, step, size=1.0):
    """With rows of very different sizes, the first of the first tensor zero in odd steps."""
    generator = torch.Generator().manual_seed(100 + step)
    made = []
    for p in params:
        g = torch.randn(p.shape, generator=generator) + 0.3
        rows = torch.logspace(-3, 1, p.shape[0]).view(-1, *[1] * (p.ndim - 1)) if p.ndim > 1 else 1.0
        made.append((size * g * rows).to(p.dtype))
    made[0][0] *= step % 2 == 0
    return made


def set_gradients(params, step, size=1.0):
    for p, g in zip(params, gradients(params, step, size), strict=True):
        p.grad = g


def update(params, optimizer, step, size=1.0):
    if optimizer._releases is not None:  # gradients arrive in backward
        sum((p * g).sum() for p, g in zip(params, gradients(params, step, size), strict=True)).backward()
    else:
        set_gradients(params, step, size)
    optimizer.step()


@pytest.mark.parametrize("how", ["rows", "factored"])
@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"maximize": True, "weight_decay": 0.0}, {"momentum": 0.0}, {"nesterov": True, "momentum": 0.8}],
    ids=str,
)
def test_every_path_equals_the_reference(how, path, options):
    params, start = make_params(torch.float64), make_params(torch.float64)
    optimizer = SGDSaI(params, lr=1e-2, update=how, **options, **path)
    reference = ReferenceSGDSaI(params, lr=1e-2, update=how, **options)
    for step in range(5):
        reference.step(gradients(params, step))
        update(params, optimizer, step)
    # Running means are float32.
    assert_moved_alike(params, reference.params, start, rel=1e-5 if how == "factored" else 1e-6)


@pytest.mark.parametrize("momentum_dtype", [torch.bfloat16, "8bit"], ids=str)
def test_low_bit_momentum_stays_near_the_reference(momentum_dtype):
    if momentum_dtype == "8bit":
        pytest.importorskip("bitsandbytes")
    params = make_params()
    before = params[0].detach().double().clone()
    optimizer = SGDSaI(params, lr=1e-2, update="rows", momentum_dtype=momentum_dtype)
    reference = ReferenceSGDSaI(params[:1], lr=1e-2, update="rows")
    for step in range(5):
        reference.step(gradients(params, step)[:1])
        update(params, optimizer, step)
    moved = (reference.params[0] - before).norm()
    assert (params[0].detach().double() - reference.params[0]).norm() <= 2e-2 * moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_get_unit_size_and_zeros_stay(dtype):
    params = make_params(dtype)
    set_gradients(params, 1)
    expected = [Rows()(p.grad.double()) for p in params]
    for p, factors in zip(params, RULES["rows"].factors([Part(p, {}, {}) for p in params]), strict=True):
        for factor in factors:
            p.grad.mul_(factor)
    for p, unit in zip(params, expected, strict=True):
        torch.testing.assert_close(p.grad.double(), unit, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
    assert not params[0].grad[0].any()


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_the_update_does_not_depend_on_the_size_of_the_loss(size):
    def trained(size):
        params = make_params()
        optimizer = SGDSaI(params, lr=1e-2, update="rows", eps=0.0)
        for step in range(4):
            update(params, optimizer, step, size)
        return params

    for scaled, plain in zip(trained(size), trained(1.0), strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=1e-5)


def test_with_mean_free_gradients_no_element_moves_further_than_the_learning_rate_on_average():
    p = nn.Parameter(torch.zeros(64, 256))
    optimizer = SGDSaI([p], lr=1e-3, weight_decay=0.0, update="rows")
    p.grad = 1e-5 * torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    torch.testing.assert_close(p.detach().square().mean(1).sqrt(), torch.full((64,), 1e-3), rtol=1e-3, atol=0.0)


def test_a_row_without_gradient_comes_to_rest():
    """An embedding's row whose token does not come again must not be driven on by a momentum made large again."""
    p = nn.Parameter(torch.zeros(2, 8))
    optimizer = SGDSaI([p], lr=1e-2, weight_decay=0.0, update="rows")
    for step in range(200):
        p.grad = torch.randn(2, 8, generator=torch.Generator().manual_seed(step))
        if step > 0:
            p.grad[1] = 0.0
        optimizer.step()
        if step == 150:
            late = p.detach().clone()
    assert not torch.equal(p[0], late[0])
    torch.testing.assert_close(p[1].detach(), late[1], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["rows", "factored"])
def test_resuming_goes_on_exactly(how, dtype):
    params = make_params(dtype)
    optimizer = SGDSaI(params, lr=1e-2, update=how)
    for step in range(3):
        update(params, optimizer, step)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = SGDSaI(twins, lr=1.0)
    resumed.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    for step in range(3, 6):
        update(params, optimizer, step)
        update(twins, resumed, step)
    assert all(map(torch.equal, params, twins))


def test_the_means_are_a_row_and_a_column_in_float32_and_no_two_optimizers_share_them():
    params = make_params(torch.bfloat16)
    optimizer = SGDSaI(params, update="factored")
    update(params, optimizer, 0)
    state = optimizer.state[params[0]]
    assert [state[name].shape for name in MEAN_SQUARES] == [(1, 1), (40, 1), (1, 130)]
    assert all(state[name].dtype == torch.float32 for name in MEAN_SQUARES)
    vector = optimizer.state[params[2]]
    assert vector["mean_square"].shape == (7,)
    assert MEAN_SQUARES[1] not in vector
    other = SGDSaI(make_params(torch.bfloat16), update="factored")
    other.load_state_dict(optimizer.state_dict())
    before = state["row_mean_square"].clone()
    update(other.param_groups[0]["params"], other, 1)
    assert torch.equal(state["row_mean_square"], before)


def test_a_factored_gradient_of_rank_one_in_its_squares_has_elements_of_size_one():
    p = nn.Parameter(torch.zeros(3, 5))
    signs = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).sign()
    p.grad = signs * torch.tensor([[1e-3], [1.0], [50.0]]) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    optimizer = SGDSaI([p], update="factored")
    optimizer.step()
    torch.testing.assert_close(p.grad, signs)


def test_steps_before_the_first_usable_gradient_do_not_count_in_the_means():
    """LoRA's A has a zero gradient in step 1, and torch.distributed.checkpoint makes its template by such a step."""
    params, others = make_params(), make_params()
    late = SGDSaI(params, lr=1e-2, update="factored")
    prompt = SGDSaI(others, lr=1e-2, update="factored")
    for p in params:
        p.grad = torch.zeros_like(p)
    late.step()
    for step in range(3):
        update(params, late, step)
        update(others, prompt, step)
    assert all(map(torch.equal, params, others))


def test_switched_on_in_the_middle_of_training():
    params = make_params()
    optimizer = SGDSaI(params, lr=1e-2)
    update(params, optimizer, 0)
    optimizer.param_groups[0]["update"] = "factored"
    update(params, optimizer, 1)
    assert optimizer.state[params[0]]["averaged_steps"] == 1


def test_a_rule_takes_nothing_over_that_another_one_means_otherwise():
    """Both keep something of each row under one name; a momentum of unit size is far too much for the published one."""
    params = [make_params()[0]]
    optimizer = SGDSaI(params, lr=1e-3, update="factored")
    update(params, optimizer, 0)
    optimizer.param_groups[0].update(update="orthogonal", matrices="linear_transposed")
    update(params, optimizer, 1)
    assert optimizer.state[params[0]].keys() == {"gsnr", "momentum_buffer", "row_mean_square"}
    assert optimizer.state[params[0]]["row_mean_square"].shape == (1, params[0].shape[1])
    optimizer.param_groups[0]["update"] = "factored"
    update(params, optimizer, 2)
    assert optimizer.state[params[0]]["averaged_steps"] == 1
    optimizer.param_groups[0]["update"] = "published"
    update(params, optimizer, 3, size=1e-3)
    assert optimizer.state[params[0]].keys() == {"gsnr", "momentum_buffer"}
    assert optimizer.state[params[0]]["momentum_buffer"].abs().max() < 0.1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"update": "orthogonal"}, "matrices=None"),
        ({"update": "averaged", "momentum": 0.0}, "needs a momentum"),
        ({"update": "rows", "normalize": True}, "two ways"),
        ({"update": "muon"}, "update must be one of"),
    ],
    ids=str,
)
def test_a_rule_that_is_switched_on_is_checked_before_anything_moves(changed, message):
    params = make_params()
    optimizer = SGDSaI(params, lr=1e-3, update="factored")
    update(params, optimizer, 0)
    before = copy.deepcopy(params)
    optimizer.param_groups[0].update(changed)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            update(params, optimizer, 1)
    assert all(map(torch.equal, params, before))


def test_a_checkpoint_without_the_option_keeps_what_the_optimizer_was_built_with():
    params = make_params()
    optimizer = SGDSaI(params, update="rows")
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["update"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["update"] == "rows"


def test_groups_may_differ():
    plain, normalized = make_params()[0], make_params()[0]
    optimizer = SGDSaI([{"params": [plain]}, {"params": [normalized], "update": "rows"}], lr=1e-2)
    alone = [make_params()[0], make_params()[0]]
    separate = [SGDSaI([alone[0]], lr=1e-2), SGDSaI([alone[1]], lr=1e-2, update="rows")]
    for step in range(3):
        for p in (plain, normalized, *alone):
            p.grad = gradients([p], step)[0]
        for each in (optimizer, *separate):
            each.step()
    assert torch.equal(plain, alone[0])
    assert torch.equal(normalized, alone[1])


def test_gradscaler_unscales_before():
    """A gradient that the scaler has not unscaled yet would be measured and normalised, then divided by the scale."""
    params = make_params()
    optimizer = SGDSaI(params, update="rows", fused=True)
    assert not optimizer._step_supports_amp_scaling


def test_the_effective_rate_is_the_learning_rate_times_the_ratio():
    params = make_params()
    optimizer = SGDSaI(params[:1], lr=1e-2, update="rows")
    update(params, optimizer, 0)
    [row] = optimizer.gsnr_report()
    [rate] = [value for name, value in optimizer_scalars(optimizer) if name.startswith("sai/lr/")]
    assert rate == pytest.approx(1e-2 * row.ratio)


@pytest.mark.parametrize("wrong", ["columns", "tensor", True, 1, None])
def test_other_values_are_refused(wrong):
    with pytest.raises(
        ValueError, match=r"update must be one of published, rows, factored, averaged, orthogonal, but is"
    ):
        SGDSaI(make_params(), update=wrong)


def test_pieces_of_parameters_are_refused_before_the_first_update():
    """FSDP1 and ZeRO hand the optimizer pieces that do not end where rows do."""
    params = make_params()
    params[0]._fsdp_flattened = True  # as FSDP1 marks its slices
    optimizer = SGDSaI([{"params": params[:1], "matrices": "linear"}], update="orthogonal")
    with pytest.raises(
        ValueError, match=r"update='orthogonal' does not work on the slices of parameters that FSDP1 hands"
    ):
        layout.refuse(layout.kind_of(params[0]), optimizer.param_groups[0])


def test_the_two_normalisations_exclude_each_other():
    with pytest.raises(ValueError, match="choose one of them"):
        SGDSaI(make_params(), normalize=True, update="rows")


@pytest.mark.parametrize("path", [{}, {"foreach": False}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e20, 3e19])
@pytest.mark.parametrize("shape", [(40, 130), (7,)], ids=str)
def test_one_bad_element_does_not_spoil_its_tensor(shape, bad, path):
    p = nn.Parameter(torch.ones(shape))
    optimizer = SGDSaI([p], lr=1e-2, update="factored", momentum=0.8, **path)
    for step in range(6):
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        if step == 2:
            p.grad.view(-1)[3] = bad
        before = p.detach().clone()
        optimizer.step()
    spoilt = ~p.detach().isfinite().view(-1)
    assert spoilt.sum() == (0 if math.isfinite(bad) else 1)
    moved = (p.detach() - before).view(-1)
    moved[3] = 1.0
    assert (moved.abs() > 1e-5).float().mean() > 0.9  # and it goes on training
    assert all(optimizer.state[p][key].isfinite().all() for key in MEAN_SQUARES if key in optimizer.state[p])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e20])
@pytest.mark.parametrize("shape", [(4, 13), (7,)], ids=str)
def test_one_bad_element_spoils_no_other_of_its_row(shape, bad):
    p = nn.Parameter(torch.ones(shape))
    optimizer = SGDSaI([p], lr=1e-2, update="rows")
    for step in range(3):
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        if step == 1:
            p.grad.view(-1)[5] = bad
        optimizer.step()
    assert (~p.detach().isfinite()).sum() == (0 if math.isfinite(bad) else 1)


@pytest.mark.parametrize(("on_gpu", "capturing"), [(True, True), (True, False), (False, True)])
def test_a_graph_cannot_capture_the_count_of_steps(monkeypatch, on_gpu, capturing):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    part = SimpleNamespace(param=SimpleNamespace(is_cuda=on_gpu), grad=None)
    if on_gpu and capturing:
        with pytest.raises(ValueError, match="counts its steps on the host"):
            RULES["factored"].factors([part])
    else:
        monkeypatch.setattr("hf_sai.optim.rules.factored.FASTER", [lambda parts: {0: ()}])
        assert RULES["factored"].factors([part]) == [()]


@pytest.mark.parametrize("update", ["rows", "factored"])
def test_the_mean_square_of_no_elements_is_no_division_by_zero(update):
    part = Part(torch.zeros(0, 5), {"update": update}, {})
    ((mean,),) = mean_squares([part], [((0,),)], [[torch.zeros(0, 1)]])
    assert mean.shape == (0, 1)
