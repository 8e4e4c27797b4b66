"""hf_sai.timm: our names in timm's registry; with timm from PyPI (`make test-timm`)."""

import contextlib
import importlib.util
from argparse import Namespace
from copy import deepcopy

import pytest
import torch

import hf_sai

if importlib.util.find_spec("timm") is None:
    pytest.skip("timm is not installed here; `make test-timm` makes an environment with it", allow_module_level=True)

if not torch.cuda.is_available():
    # torchvision from PyPI is built for CUDA and cannot load its operators beside torch for CPUs; timm needs none.
    library = torch.library.Library("torchvision", "FRAGMENT")
    with contextlib.suppress(RuntimeError):  # they are there
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold, float scale, int zero_point) -> Tensor")

import timm
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2

from hf_sai.trainer.building import OPTIMIZER_NAMES


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=4
    )


def test_every_name_is_listed():
    known = {name.replace("_", "") for name in OPTIMIZER_NAMES}
    assert known - set(list_optimizers()) == {"sgdsaiaveraged"}  # whose means timm's script would not evaluate


def losses_of(vit, optimizer):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 4
    images = torch.randn(64, 3, 16, 16, generator=generator) * 0.3 + labels.view(-1, 1, 1, 1) / 2
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(vit(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["sgd_sai", "sgd_sai_factored", "sgd_sai_orthogonal"])
def test_a_small_vit_trains_as_with_our_own_function(vit, name):
    copy = deepcopy(vit)
    losses = losses_of(vit, create_optimizer_v2(vit, opt=name, lr=2e-3))
    assert losses[-1] < 0.7 * losses[0]
    own = hf_sai.create_sgd_sai_optimizer(copy, lr=2e-3, **OPTIMIZER_NAMES[name])
    assert losses == pytest.approx(losses_of(copy, own), rel=1e-4)


@pytest.mark.longer
@pytest.mark.parametrize(
    ("name", "rate", "least"), [("sgd_sai_factored", 4e-3, 0.6), ("sgd_sai_orthogonal", 8e-3, 0.85)]
)
def test_digits_are_learnt_by_the_way_of_timms_train_py(name, rate, least):
    """By its functions: optimizer_kwargs of its options, then create_scheduler_v2, stepped at each update.

    The published rule is as good as chance here after so few steps, so that it could show nothing.
    """
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(digits.target)
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, embed_dim=48, depth=2, num_heads=3, num_classes=10
    )
    options = Namespace(opt=name, lr=rate, weight_decay=0.05, momentum=0.9, opt_eps=None, opt_betas=None, opt_args={})
    optimizer = create_optimizer_v2(vit, **optimizer_kwargs(cfg=options))
    epochs, size, updates = 8, 32, 1500 // 32
    scheduler, _ = create_scheduler_v2(
        optimizer, num_epochs=epochs, warmup_epochs=1, step_on_epochs=False, updates_per_epoch=updates
    )
    scheduler.step_update(0)
    rates = []
    for update in range(epochs * updates):
        if update % updates == 0:
            order = torch.randperm(1500)
        rows = order[update % updates * size :][:size]
        loss = torch.nn.functional.cross_entropy(vit(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step_update(update + 1)
    assert rates[0] < max(rates) > rates[-1]  # the scheduler was heard
    assert max(rates) == pytest.approx(rate, rel=0.1)
    with torch.no_grad():
        right = (vit.eval()(images[1500:]).argmax(1) == labels[1500:]).float().mean()
    assert right > least  # chance is 0.1


def test_a_name_stands_for_its_options_and_parameters_have_names(vit):
    optimizer = create_optimizer_v2(vit, opt="sgd_sai_factored", lr=1e-3, weight_decay=0.05)
    assert isinstance(optimizer, hf_sai.SGDSaI)
    assert {(group["update"], group["momentum"]) for group in optimizer.param_groups} == {("factored", 0.8)}
    assert {name for group in optimizer.param_groups for name in group["param_names"]} == dict(
        vit.named_parameters()
    ).keys()


def test_what_timm_exempts_from_decay_stays_exempt(vit):
    ours = create_optimizer_v2(vit, opt="sgd_sai", lr=1e-3, weight_decay=0.05)
    theirs = create_optimizer_v2(vit, opt="adamw", lr=1e-3, weight_decay=0.05)
    decays = [
        {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        for optimizer in (ours, theirs)
    ]
    assert decays[0] == decays[1]


def test_layer_decay_keeps_its_scales(vit):
    optimizer = create_optimizer_v2(vit, opt="sgd_sai", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    assert len({group["lr_scale"] for group in optimizer.param_groups}) > 2


def test_hidden_matrices_are_found(vit):
    optimizer = create_optimizer_v2(vit, opt="sgd_sai_orthogonal", lr=1e-3, weight_decay=0.05)
    rules = {name: group["update"] for group in optimizer.param_groups for name in group["param_names"]}
    assert rules["blocks.0.mlp.fc1.weight"] == "orthogonal"
    assert rules["pos_embed"] == "factored"


def test_a_momentum_that_a_name_would_ignore_is_refused(vit):
    with pytest.raises(ValueError, match=r"momentum is 0\.95, but sgd_sai_factored stands for 0\.8"):
        create_optimizer_v2(vit, opt="sgd_sai_factored", lr=1e-3, momentum=0.95)
    assert create_optimizer_v2(vit, opt="sgd_sai", lr=1e-3, momentum=0.95).param_groups[0]["momentum"] == 0.95


def test_other_optimizers_are_as_they_were(vit):
    assert type(create_optimizer_v2(vit, opt="adamw", lr=1e-3)) is torch.optim.AdamW
    with pytest.raises(ValueError, match="not found"):
        create_optimizer_v2(vit, opt="no_such_sai", lr=1e-3)


def test_lookahead_wraps_it(vit):
    from timm.optim import Lookahead

    assert isinstance(create_optimizer_v2(vit, opt="lookahead_sgd_sai", lr=1e-3), Lookahead)
