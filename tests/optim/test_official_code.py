"""Against PyPI's sgd-sai 1.0.3: equal where it is well defined, and each of its known faults named and absent here.

Every fault test shows the official behaviour too, so that it tells when a release mends it.
"""

import copy
import math

import pytest
import torch
from sgd_sai import SGD_sai
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

from hf_sai import SGDSaI


def official(params, **options):
    return SGD_sai(params, **options)


def tiny_gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=100, n_positions=32, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    tokens = torch.randint(100, (50, 4, 16), generator=torch.Generator().manual_seed(1))
    return model, lambda step: model(input_ids=tokens[step], labels=tokens[step]).loss


def tiny_vit():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4,
        num_labels=10,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(50, 4, 3, 16, 16, generator=generator)
    labels = torch.randint(10, (50, 4), generator=generator)
    return model, lambda step: model(pixel_values=images[step], labels=labels[step]).loss


@pytest.mark.parametrize("path", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_vit])
def test_parameters_equal_the_official_ones_after_fifty_steps(make, path):
    trained = []
    for optimizer_class, options in ((SGD_sai, {}), (SGDSaI, path)):
        model, loss = make()
        optimizer = optimizer_class(model.parameters(), lr=1e-3, weight_decay=0.1, **options)
        for step in range(50):
            optimizer.zero_grad()
            loss(step).backward()
            optimizer.step()
        trained.append(dict(model.named_parameters()))
    for name, expected in trained[0].items():
        if name.endswith(("k_proj.bias", "key.bias")):
            # Softmax does not see this bias: its gradient is rounding noise of 1e-12, which only eps measures.
            assert max(expected.abs().max(), trained[1][name].abs().max()) < 1e-9
        else:
            assert (trained[1][name] - expected).norm() <= 1e-4 * expected.norm(), name


def test_an_official_checkpoint_loads_and_continues_alike():
    states = []
    for continue_with in (SGD_sai, SGDSaI):
        model, loss = tiny_gpt2()
        optimizer = SGD_sai(model.parameters(), lr=1e-3, weight_decay=0.1)
        for step in range(20):
            if step == 10:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = continue_with(model.parameters(), lr=1e-3, weight_decay=0.1)
                optimizer.load_state_dict(saved)
                if continue_with is SGD_sai:
                    optimizer.has_warmup = True  # what its state dict forgets
            optimizer.zero_grad()
            loss(step).backward()
            optimizer.step()
        states.append(dict(model.named_parameters()))
    for name, expected in states[0].items():
        assert (states[1][name] - expected).norm() <= 1e-4 * expected.norm(), name


def gradient_step(optimizer, p, gradient):
    p.grad = None if gradient is None else torch.tensor(gradient, dtype=p.dtype)
    optimizer.step()


def parameter(values=(1.0, 2.0), dtype=torch.float32):
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def moved(make_optimizer, gradients, **options):
    """How a parameter [1, 2] ends after these gradients, without weight decay."""
    p = parameter()
    optimizer = make_optimizer([p], weight_decay=0.0, lr=0.1, **options)
    for gradient in gradients:
        gradient_step(optimizer, p, gradient)
    return p.detach()


def test_fault_a_zero_first_gradient_freezes_for_ever():
    gradients = [[0.0, 0.0]] + [[1.0, -1.0]] * 5
    assert moved(official, gradients).tolist() == [1.0, 2.0]
    assert moved(SGDSaI, gradients).tolist() == pytest.approx([0.5, 2.5])


def test_fault_one_element_explodes():
    ends = []
    for make_optimizer in (official, SGDSaI):
        p = parameter([1.0])
        gradient_step(make_optimizer([p], lr=0.1, weight_decay=0.0), p, [1.0])
        ends.append(p.item())
    assert ends[0] < -1e5
    assert ends[1] == pytest.approx(0.9)


def test_fault_a_late_gradient_is_a_key_error():
    gradients = [None, [1.0, -1.0]]
    p, other = parameter(), parameter()
    optimizer = official([p, other])
    other.grad = torch.ones(2)
    optimizer.step()
    p.grad = torch.ones(2)
    with pytest.raises(KeyError, match="gsnr"):
        optimizer.step()
    assert moved(SGDSaI, gradients).tolist() == pytest.approx([0.9, 2.1])


def test_fault_a_group_added_later_is_a_key_error():
    for make_optimizer in (official, SGDSaI):
        p, late = parameter(), parameter()
        optimizer = make_optimizer([p])
        gradient_step(optimizer, p, [1.0, -1.0])
        optimizer.add_param_group({"params": [late]})
        late.grad = torch.tensor([1.0, -1.0])
        if make_optimizer is official:
            with pytest.raises(KeyError):
                optimizer.step()
        else:
            optimizer.step()
            assert optimizer.state[late]["gsnr"] == pytest.approx(1.0)


def test_fault_momentum_zero_is_an_unbound_local():
    with pytest.raises(UnboundLocalError):
        moved(official, [[1.0, -1.0]], momentum=0.0)
    assert moved(SGDSaI, [[1.0, -1.0]], momentum=0.0).tolist() == pytest.approx([0.9, 2.1])


def test_fault_momentum_zero_in_a_second_group_uses_the_previous_parameters_buffer():
    ends = []
    for make_optimizer in (official, SGDSaI):
        p, q = parameter(), parameter()
        optimizer = make_optimizer([{"params": [p]}, {"params": [q], "momentum": 0.0}], lr=0.1, weight_decay=0.0)
        p.grad, q.grad = torch.tensor([1.0, -1.0]), torch.tensor([5.0, -5.0])
        optimizer.step()
        ends.append(q.tolist())
    assert ends[0] == pytest.approx([0.9, 2.1])  # moved by the other's gradient
    assert ends[1] == pytest.approx([0.5, 2.5])


def test_fault_a_closure_runs_twice_on_the_first_step():
    calls = {}
    for make_optimizer in (official, SGDSaI):
        p = parameter()
        optimizer = make_optimizer([p])
        calls[make_optimizer] = 0

        def closure(p=p, key=make_optimizer):
            calls[key] += 1
            p.grad = torch.tensor([1.0, -1.0])
            return p.sum()

        optimizer.step(closure)
    assert calls == {official: 2, SGDSaI: 1}


def test_fault_step_prints(capsys):
    moved(official, [[1.0, -1.0]])
    assert capsys.readouterr().out
    moved(SGDSaI, [[1.0, -1.0]])
    assert not capsys.readouterr().out


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_fault_inf_or_nan_in_the_first_gradient_stays(bad):
    gradients = [[bad, 1.0], [1.0, -1.0]]
    assert not moved(official, gradients).isfinite().all()
    assert moved(SGDSaI, gradients).tolist() == pytest.approx([0.9, 2.1])


def test_fault_resume_measures_again():
    for make_optimizer, again in ((official, True), (SGDSaI, False)):
        p = parameter()
        optimizer = make_optimizer([p])
        gradient_step(optimizer, p, [1.0, -1.0])
        before = float(optimizer.state[p]["gsnr"])
        resumed = make_optimizer([p])
        resumed.load_state_dict(optimizer.state_dict())
        gradient_step(resumed, p, [1.0, 3.0])
        assert (float(resumed.state[p]["gsnr"]) != pytest.approx(before)) == again


def test_fault_loading_casts_gsnr_to_the_parameters_dtype():
    values = torch.linspace(-1, 1, 1000).tolist()
    gradient = [value + 0.37 for value in values]
    for make_optimizer, exact in ((official, False), (SGDSaI, True)):
        p = parameter(values)
        optimizer = make_optimizer([p])
        gradient_step(optimizer, p, gradient)
        low = parameter(values, dtype=torch.bfloat16)
        loaded = make_optimizer([low])
        loaded.load_state_dict(optimizer.state_dict())
        assert (float(loaded.state[low]["gsnr"]) == float(optimizer.state[p]["gsnr"])) == exact


def test_fault_torch_distributed_checkpoint_leaves_gsnr_zero():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    for make_optimizer, trains in ((official, False), (SGDSaI, True)):
        model = nn.Linear(3, 2)
        start = model.weight.detach().clone()
        optimizer = make_optimizer(model.parameters(), weight_decay=0.0)
        get_optimizer_state_dict(model, optimizer)
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        assert (not torch.equal(model.weight, start)) == trains


def test_fault_small_gradients_lose_their_gsnr_to_eps():
    g = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    for make_optimizer, right in ((official, False), (SGDSaI, True)):
        p = nn.Parameter(torch.zeros(4096))
        optimizer = make_optimizer([p])
        p.grad = g * 1e-9
        optimizer.step()
        assert (float(optimizer.state[p]["gsnr"]) == pytest.approx(64.0, rel=0.05)) == right


def test_fault_fp16_parameters_become_nan():
    ends = []
    for make_optimizer in (official, SGDSaI):
        p = parameter(dtype=torch.float16)
        optimizer = make_optimizer([p], lr=0.1, weight_decay=0.0)
        gradient_step(optimizer, p, [0.0, 0.0])
        ends.append(p.detach())
    assert ends[0].isnan().all()  # eps is 0 in float16: 0 / 0
    assert ends[1].tolist() == [1.0, 2.0]


def test_fault_a_copied_optimizer_cannot_step():
    for make_optimizer, works in ((official, False), (SGDSaI, True)):
        clone = copy.deepcopy(make_optimizer([parameter()]))
        p = clone.param_groups[0]["params"][0]
        p.grad = torch.tensor([1.0, -1.0])
        if works:
            clone.step()
        else:
            with pytest.raises(AttributeError, match="has_warmup"):
                clone.step()


def test_fault_a_frozen_zero_of_an_official_checkpoint_is_measured_here():
    p = parameter()
    optimizer = official([p], lr=0.1, weight_decay=0.0)
    gradient_step(optimizer, p, [0.0, 0.0])
    healed = SGDSaI([p], lr=0.1, weight_decay=0.0)
    healed.load_state_dict(optimizer.state_dict())
    gradient_step(healed, p, [1.0, -1.0])
    assert p.tolist() == pytest.approx([0.9, 2.1])


def test_fault_lora_a_never_moves():
    peft = pytest.importorskip("peft")
    for make_optimizer, trains in ((official, False), (SGDSaI, True)):
        torch.manual_seed(0)
        model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 6)), peft.LoraConfig(r=2, target_modules=["0"]))
        a = next(p for name, p in model.named_parameters() if "lora_A" in name)
        start = a.detach().clone()
        optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], weight_decay=0.0)
        for _ in range(10):
            optimizer.zero_grad()
            model(torch.randn(4, 6)).square().sum().backward()
            optimizer.step()
        assert (not torch.equal(a, start)) == trains


def test_fault_bfloat16_gradients_are_measured_in_bfloat16():
    g = (torch.randn(3000, generator=torch.Generator().manual_seed(0)) + 0.5).to(torch.bfloat16)
    exact = (g.double().norm() / g.double().std()).item()
    errors = []
    for make_optimizer in (official, SGDSaI):
        p = nn.Parameter(torch.zeros(3000, dtype=torch.bfloat16))
        optimizer = make_optimizer([p])
        p.grad = g.clone()
        optimizer.step()
        errors.append(abs(float(optimizer.state[p]["gsnr"]) / exact - 1))
    assert errors[0] > 1e-3
    assert errors[1] < 1e-6


def test_fault_a_constant_gradient_explodes():
    ends = []
    for make_optimizer in (official, SGDSaI):
        p = nn.Parameter(torch.zeros(100))
        p.grad = torch.ones(100)
        make_optimizer([p], lr=1e-3, weight_decay=0.0).step()
        ends.append(p.abs().max().item())
    assert ends[0] > 1e5
    assert ends[1] == pytest.approx(1e-3 * 10 * 10)


def test_fault_sparse_gradients_fail_without_saying_what_to_do():
    for make_optimizer, error in ((official, NotImplementedError), (SGDSaI, ValueError)):
        embedding = nn.Embedding(5, 3, sparse=True)
        embedding(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(error):
            make_optimizer(embedding.parameters()).step()
