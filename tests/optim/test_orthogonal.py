"""The rule ``orthogonal``: each form against the reference, in all paths, dtypes and momenta; resume, bad gradients."""

import copy
import math

import pytest
import torch
from reference import Orthogonal, ReferenceSGDSaI, assert_moved_alike
from torch import nn

from hf_sai import SGDSaI
from hf_sai.optim.rules import orthogonal
from hf_sai.optim.rules.orthogonal import ROW_MEAN_SQUARE, newton_schulz

PATHS = [{}, {"foreach": False}, {"foreach": True}, {"fused": True}, {"gradient_release": True}]

#: Form -> a shape, and how it is a list of matrices (outputs, inputs).
FORMS = {
    "linear": ((12, 30), lambda t: [t]),
    "linear_transposed": ((12, 30), lambda t: [t.T]),
    "convolution": ((10, 3, 2, 2), lambda t: [t.flatten(1)]),
    "experts": ((3, 8, 5), lambda t: list(t)),
    "experts_transposed": ((3, 8, 5), lambda t: [m.T for m in t]),
}


def gradient(shape, step, size=1.0):
    """Of full rank, with singular values of all sizes and a mean."""
    generator = torch.Generator().manual_seed(100 + step)
    return size * (torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3)


def optimizer_for(form, *tensors, **options):
    groups = [{"params": list(tensors), "matrices": form, "name": "hidden"}]
    return SGDSaI(groups, **{"lr": 1e-2, "update": "orthogonal", **options})


def train(optimizer, p, steps, first=0, size=1.0):
    for step in range(first, first + steps):
        g = gradient(p.shape, step, size).to(p.dtype)
        if optimizer._releases is not None:
            (p * g).sum().backward()
        else:
            p.grad = g
        optimizer.step()


def needs_quantizer(momentum_dtype):
    if isinstance(momentum_dtype, str):
        pytest.importorskip("bitsandbytes")


class ReferenceStack(Orthogonal):
    """Every matrix of one tensor by itself; the g-SNR is the tensor's."""

    def __init__(self, momentum, form):
        self.parts, self.cut = None, FORMS[form][1]
        self.momentum = momentum

    def __call__(self, gradient):
        direction = gradient.clone()
        matrices, places = self.cut(gradient), self.cut(direction)
        self.parts = self.parts or [Orthogonal(self.momentum) for _ in matrices]
        for rule, matrix, place in zip(self.parts, matrices, places, strict=True):
            place.copy_(rule(matrix).reshape(place.shape))
        return direction


def reference_for(p, form, **options):
    reference = ReferenceSGDSaI([p], lr=1e-2, update="orthogonal", **options)
    reference.rules = [ReferenceStack(options.get("momentum", 0.9), form)]
    return reference


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("options", [{}, {"maximize": True, "weight_decay": 0.0}, {"momentum": 0.0}], ids=str)
def test_every_form_and_path_equals_the_reference(form, path, options):
    start = gradient(FORMS[form][0], 7)
    p = nn.Parameter(start.clone())
    optimizer, reference = optimizer_for(form, p, **options, **path), reference_for(p, form, **options)
    train(optimizer, p, 5)
    for step in range(5):
        reference.step([gradient(p.shape, step)])
    # On CPU matrices are made orthogonal in float32.
    assert_moved_alike([p], reference.params, [start], rel=1e-4)


@pytest.mark.parametrize(
    ("dtype", "momentum_dtype", "rel"),
    [
        (torch.bfloat16, None, 0.1),
        (torch.float16, None, 0.05),
        (torch.float32, torch.bfloat16, 0.03),
        (torch.float32, "8bit", 0.1),
        (torch.float32, "4bit", 0.4),
    ],
    ids=str,
)
def test_other_dtypes_move_alike(dtype, momentum_dtype, rel):
    needs_quantizer(momentum_dtype)
    start = gradient((64, 96), 7).to(dtype)
    p = nn.Parameter(start.clone())
    # Of a learning rate at which bfloat16 parameters can follow.
    optimizer = optimizer_for("linear", p, lr=0.3, weight_decay=0.0, momentum_dtype=momentum_dtype)
    reference = ReferenceSGDSaI([p], lr=0.3, weight_decay=0.0, update="orthogonal")
    for step in range(5):
        reference.step([gradient(p.shape, step).to(dtype)])
    train(optimizer, p, 5)
    assert_moved_alike([p], reference.params, [start], rel=rel)


def test_matrices_of_many_sizes_are_updated_in_batches_as_they_would_be_alone(monkeypatch):
    shapes = [(8, 12), (12, 8), (8, 12), (5, 5), (8, 12)]
    together = [nn.Parameter(gradient(shape, index).float()) for index, shape in enumerate(shapes)]
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    optimizers = [optimizer_for("linear", *together), *(optimizer_for("linear", p) for p in alone)]
    monkeypatch.setattr(orthogonal, "_BATCH", 2 * 8 * 12)  # two of the four of one size at once
    for step in range(3):
        for index, (p, q) in enumerate(zip(together, alone, strict=True)):
            p.grad = gradient(p.shape, 10 * step + index).float()
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for index, (p, q) in enumerate(zip(together, alone, strict=True)):
        assert_moved_alike([p], [q], [gradient(p.shape, index)], rel=1e-5)


def test_no_more_matrices_are_made_orthogonal_at_once_than_there_is_room_for(monkeypatch):
    sizes = []
    real = orthogonal.newton_schulz
    monkeypatch.setattr(orthogonal, "newton_schulz", lambda x: sizes.append(x.numel()) or real(x))
    monkeypatch.setattr(orthogonal, "_BATCH", 2 * 8 * 12)
    params = [nn.Parameter(torch.randn(8, 12)) for _ in range(5)]
    optimizer = optimizer_for("linear", *params)
    for p in params:
        p.grad = torch.randn(8, 12)
    optimizer.step()
    assert sizes == [192, 192, 96]


def test_a_gradient_in_float16_counts_as_finite_whose_norm_is_beyond_float16():
    large, small = (nn.Parameter(gradient((256, 256), 7).to(dtype)) for dtype in (torch.float16, torch.float32))
    start = small.detach().clone()
    for p in (large, small):
        optimizer = optimizer_for("linear", p, lr=0.3, weight_decay=0.0)
        for step in range(3):
            p.grad = (300 * gradient(p.shape, step)).to(p.dtype)
            assert p.grad.isfinite().all()
            optimizer.step()
    assert_moved_alike([large], [small], [start], rel=0.05)


@pytest.mark.parametrize("shape", [(3, 20, 20), (2, 7, 50), (2, 7, 13)])
def test_newton_schulz_brings_singular_values_near_one(shape):
    x = gradient(shape, 0).float()
    values = torch.linalg.svdvals(newton_schulz(x * 1e-7))
    large = torch.linalg.svdvals(x) > 0.01 * torch.linalg.svdvals(x).amax(1, keepdim=True)
    assert large.sum() > 0.9 * large.numel()
    assert values[large].min() > 0.6
    assert values[large].max() < 1.3
    assert torch.equal(newton_schulz(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize("momentum_dtype", [None, torch.bfloat16, "8bit", "4bit"], ids=str)
def test_a_matrix_that_gets_no_gradient_any_more_comes_to_rest(momentum_dtype):
    # Such is an expert that no token goes to. Its momentum falls until its squares are zero in float32.
    needs_quantizer(momentum_dtype)
    p = nn.Parameter(gradient((64, 128), 7).float())
    optimizer = optimizer_for("linear", p, weight_decay=0.0, momentum_dtype=momentum_dtype)
    places = []
    for step in range(600):
        p.grad = gradient(p.shape, 0).float() if step == 0 else torch.zeros_like(p)
        optimizer.step()
        places.append(p.detach().clone())
    assert p.isfinite().all()
    first, last = (places[end] - places[end - 100] for end in (100, 599))
    assert last.norm() < 1e-6 * first.norm()


@pytest.mark.parametrize("columns", [19, 20, 40, 160])
def test_wide_matrices_in_float32_are_made_orthogonal_as_in_float64(columns):
    u, v = (torch.linalg.qr(gradient((2, n, 10), n).double())[0] for n in (10, columns))
    values = torch.logspace(0, -6, 10, dtype=torch.float64)
    x = (u * values) @ v.mT
    values = values / values.square().sum().sqrt()
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    exact = (u * values) @ v.mT
    assert torch.linalg.vector_norm(newton_schulz(x.float()) - exact) < 4e-3 * torch.linalg.vector_norm(exact)


def test_a_step_has_the_size_that_the_docs_say():
    p = nn.Parameter(torch.zeros(40, 160))
    optimizer = optimizer_for("linear", p, weight_decay=0.0)
    p.grad = torch.randn(40, 160)
    optimizer.step()
    ratio = optimizer.state[p]["gsnr"] / math.sqrt(p.numel())
    size = p.detach().square().mean().sqrt().item() / (1e-2 * 0.2 * ratio)
    assert 0.7 < size < 1.2  # as Muon's coefficients leave the singular values
    rows = p.detach().square().mean(1).sqrt()
    assert rows.max() < 1.01 * rows.min()


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_a_gradient_without_a_finite_norm_is_left_out(bad, momentum):
    p = nn.Parameter(gradient((6, 9), 7).float())
    optimizer = optimizer_for("linear", p, momentum=momentum)
    train(optimizer, p, 2)
    before = copy.deepcopy(optimizer.state[p])
    p.grad = gradient(p.shape, 3).float()
    p.grad[2, 3] = bad
    optimizer.step()
    if momentum:
        assert torch.equal(optimizer.state[p]["momentum_buffer"], before["momentum_buffer"])
    assert p.isfinite().all()
    assert optimizer.state[p][ROW_MEAN_SQUARE].isfinite().all()
    moved = p.detach().clone()
    train(optimizer, p, 3, first=4)
    assert p.isfinite().all()
    assert not torch.equal(p, moved)


@pytest.mark.parametrize("momentum_dtype", [None, torch.bfloat16, "8bit", "4bit"], ids=str)
def test_resuming_goes_on_exactly(momentum_dtype):
    needs_quantizer(momentum_dtype)
    p = nn.Parameter(gradient((64, 96), 7).float())
    optimizer = optimizer_for("linear", p, momentum_dtype=momentum_dtype)
    train(optimizer, p, 3)
    q = nn.Parameter(p.detach().clone())
    resumed = optimizer_for("linear", q, momentum_dtype=momentum_dtype)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, p, 3, first=3)
    train(resumed, q, 3, first=3)
    assert torch.equal(p, q)


def test_nesterov_changes_what_is_no_hidden_matrix_alone():
    moved = {}
    for nesterov in (False, True):
        matrix, bias = (nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in ((6, 8), (6,)))
        groups = [{"params": [matrix], "matrices": "linear"}, {"params": [bias], "update": "factored"}]
        optimizer = SGDSaI(groups, lr=1e-2, update="orthogonal", nesterov=nesterov)
        for step in range(3):
            matrix.grad, bias.grad = gradient(matrix.shape, step), gradient(bias.shape, step)
            optimizer.step()
        moved[nesterov] = matrix.detach(), bias.detach()
    assert torch.equal(moved[False][0], moved[True][0])
    assert not torch.equal(moved[False][1], moved[True][1])


def test_the_state_is_a_momentum_and_a_number_per_row():
    p = nn.Parameter(gradient((6, 9), 7).float())
    optimizer = optimizer_for("linear_transposed", p)
    train(optimizer, p, 1)
    shapes = {key: tuple(value.shape) for key, value in optimizer.state[p].items() if key != "gsnr"}
    assert shapes == {"momentum_buffer": (6, 9), ROW_MEAN_SQUARE: (1, 9)}


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({}, "create_sgd_sai_optimizer"),
        ({"matrices": "square"}, "matrices='square'"),
        ({"matrices": "experts"}, r"does not fit a tensor of shape \(4, 4\)"),
    ],
)
def test_without_knowing_what_the_tensors_are_it_refuses(group, message):
    with pytest.raises(ValueError, match=message):
        SGDSaI([{"params": [nn.Parameter(torch.ones(4, 4))], **group}], update="orthogonal")
    with pytest.raises(ValueError, match=r"update='orthogonal'"):
        SGDSaI(nn.Linear(4, 4).parameters(), update="orthogonal")


def test_a_form_changed_between_steps_starts_anew():
    p = nn.Parameter(gradient((12, 30), 7))
    optimizer = optimizer_for("linear", p)
    train(optimizer, p, 2)
    start = p.detach().clone()
    optimizer.param_groups[0]["matrices"] = "linear_transposed"
    train(optimizer, p, 3, first=2)
    reference = reference_for(start, "linear_transposed")
    reference.gsnr = [optimizer.state[p]["gsnr"]]
    for step in range(2, 5):
        reference.step([gradient(p.shape, step)])
    assert_moved_alike([p], reference.params, [start], rel=1e-4)
    optimizer.param_groups[0]["matrices"] = "experts"
    with pytest.raises(ValueError, match=r"matrices='experts' does not fit a tensor of shape \(12, 30\)"):
        train(optimizer, p, 1)
