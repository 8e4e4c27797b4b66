"""Loading states: hooks and names are honoured, what does not fit is refused, what is overruled is said."""

import copy
import logging
import re

import pytest
import torch
from torch import nn

from hf_sai import SGDSaI, create_sgd_sai_optimizer
from hf_sai.optim.rules.factored import product

RULES = ["published", "rows", "factored"]


def named(seed=0, shapes=((4, 3), (5,), (4, 3))):
    generator = torch.Generator().manual_seed(seed)
    return [(f"p{i}", nn.Parameter(torch.randn(shape, generator=generator))) for i, shape in enumerate(shapes)]


def train(optimizer, steps, start=0):
    for step in range(start, start + steps):
        for group in optimizer.param_groups:
            for name, p in zip(group["param_names"], group["params"], strict=True):
                generator = torch.Generator().manual_seed(1000 * step + sum(map(ord, name)))
                p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def trained(update="published", **options):
    optimizer = SGDSaI(named(), lr=1e-2, update=update, **options)
    train(optimizer, 3)
    return optimizer


# --- hooks and names


@pytest.mark.parametrize("update", RULES)
def test_the_same_names_in_another_order_are_loaded_by_name(update):
    optimizer = trained(update)
    values = dict(zip(["p0", "p1", "p2"], optimizer.param_groups[0]["params"], strict=True))
    turned = [(name, nn.Parameter(values[name].detach().clone())) for name in ("p2", "p0", "p1")]
    other = SGDSaI(turned, lr=1e-2, update=update)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0]["param_names"] == ["p2", "p0", "p1"]
    train(optimizer, 3, start=3)
    train(other, 3, start=3)
    for name, p in turned:
        assert torch.equal(p, values[name])


@pytest.mark.parametrize("update", RULES)
def test_what_a_load_hook_has_made_is_what_is_loaded(update):
    optimizer = trained(update)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"] = {0: saved["state"][2], 1: saved["state"][1], 2: saved["state"][0]}
    del saved["param_groups"][0]["param_names"]

    def turn(_, state_dict):
        state = state_dict["state"]
        return {**state_dict, "state": {0: state[2], 1: state[1], 2: state[0]}}

    other = SGDSaI(named(), lr=1e-2, update=update)
    other.register_load_state_dict_pre_hook(turn)
    other.load_state_dict(saved)
    for p, q in zip(optimizer.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        assert optimizer.state[p].keys() == other.state[q].keys()
        assert torch.equal(optimizer.state[p]["momentum_buffer"], other.state[q]["momentum_buffer"])
        assert optimizer.state[p]["gsnr"] == other.state[q]["gsnr"]


def test_hooks_of_after_loading_see_the_whole_state():
    optimizer, seen = trained(), []
    other = SGDSaI(named(), lr=1e-2)
    other.register_load_state_dict_post_hook(lambda o: seen.append([sorted(state) for state in o.state.values()]))
    other.load_state_dict(optimizer.state_dict())
    assert seen == [[["gsnr", "momentum_buffer"]] * 3]


def test_other_names_are_refused_with_the_way_out():
    saved = copy.deepcopy(trained().state_dict())
    saved["param_groups"][0]["param_names"] = ["k.lora_A", "k.lora_B", "p2"]
    other = SGDSaI(named(), lr=1e-2)
    with pytest.raises(
        ValueError, match=r"parameter k.lora_A where this optimizer has p0 \(2 of 3 differ\).*fresh state"
    ):
        other.load_state_dict(saved)
    assert not other.state


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_what_wrappers_add_to_names_does_not_count(prefix):
    saved = copy.deepcopy(trained().state_dict())
    saved["param_groups"][0]["param_names"] = [f"{prefix}p{i}" for i in range(3)]
    SGDSaI(named(), lr=1e-2).load_state_dict(saved)


def test_the_state_of_a_group_of_nothing_loads():
    optimizer = SGDSaI([{"params": []}], lr=1e-2)
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.state


# --- states that do not fit


@pytest.mark.parametrize("options", [{}, {"update": "factored"}, {"momentum_dtype": torch.bfloat16}], ids=str)
def test_a_state_of_other_shapes_is_refused_and_nothing_is_loaded(options):
    small = SGDSaI([("a", nn.Parameter(torch.randn(4, 8)))], **options)
    train(small, 2)
    large = SGDSaI([("a", nn.Parameter(torch.randn(8, 8)))], **options)
    with pytest.raises(
        ValueError, match=r"of parameter a has shape \(.*\), and the parameter has \(8, 8\).*fresh state"
    ):
        large.load_state_dict(small.state_dict())
    assert not large.state
    train(large, 2)


@pytest.mark.parametrize("momentum_dtype", ["8bit", "4bit"])
@pytest.mark.parametrize("shape", [(128, 64), (64, 64), (8, 8)], ids=str)
def test_a_quantised_state_of_other_shapes_is_refused(momentum_dtype, shape):
    pytest.importorskip("bitsandbytes")
    saved = SGDSaI([("a", nn.Parameter(torch.randn(shape)))], momentum_dtype=momentum_dtype)
    train(saved, 2)
    other = SGDSaI([("a", nn.Parameter(torch.randn(96, 64)))], momentum_dtype=momentum_dtype)
    with pytest.raises(ValueError, match=rf"of parameter a has shape {re.escape(str(shape))}, and"):
        other.load_state_dict(saved.state_dict())


SAME_SIZE = [(64, 96), (96 * 64,), (192, 32), (96, 32, 2), (96, 64, 1)]


@pytest.mark.parametrize("shape", SAME_SIZE, ids=str)
@pytest.mark.parametrize(
    "options", [{"momentum_dtype": "4bit"}, {"momentum_dtype": "8bit"}, {"momentum": 0.0}], ids=str
)
def test_a_state_of_as_many_elements_in_another_shape_is_refused(options, shape):
    saved = SGDSaI([("a", nn.Parameter(torch.randn(96, 64)))], **options)
    train(saved, 1)
    other = SGDSaI([("a", nn.Parameter(torch.randn(shape)))], **options)
    with pytest.raises(ValueError, match=r"of parameter a has shape \(96, 64\), and the parameter.*another model's"):
        other.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert not other.state
    again = SGDSaI([("a", nn.Parameter(torch.randn(96, 64)))], **options)
    again.load_state_dict(copy.deepcopy(saved.state_dict()))
    train(again, 1)


@pytest.mark.parametrize("options", [{"momentum_dtype": "4bit"}, {"momentum": 0.0}], ids=str)
def test_a_state_that_does_not_say_its_shape_loads_as_before(options):
    saved = SGDSaI([("a", nn.Parameter(torch.randn(96, 64)))], **options)
    train(saved, 1)
    state_dict = copy.deepcopy(saved.state_dict())
    assert state_dict["state"][0].pop("shape").shape == (96, 64, 0)
    other = SGDSaI([("a", nn.Parameter(torch.randn(96, 64)))], **options)
    other.load_state_dict(state_dict)
    [(mine, its)] = zip(saved.state.values(), other.state.values(), strict=True)
    assert mine.keys() == its.keys()
    assert "shape" not in mine


@pytest.mark.parametrize("told", [torch.tensor(0.0), torch.zeros(96, 64), torch.zeros(0), 5], ids=str)
def test_a_damaged_shape_is_refused(told):
    saved = SGDSaI([("a", nn.Parameter(torch.randn(96, 64)))], momentum_dtype="4bit")
    train(saved, 1)
    state_dict = copy.deepcopy(saved.state_dict())
    state_dict["state"][0]["shape"] = told
    other = SGDSaI([("a", nn.Parameter(torch.randn(96, 64)))], momentum_dtype="4bit")
    with pytest.raises(ValueError, match=r"has shape|shape of parameter a is missing"):
        other.load_state_dict(state_dict)
    assert not other.state


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96)], ids=str)
def test_torchs_distributed_checkpoint_compares_the_shapes_of_flat_codes(shape, flat, tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    def made(shape):
        model = nn.ParameterDict({"a": torch.randn(shape)})
        return model, SGDSaI(model.named_parameters(), momentum_dtype="4bit")

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = made((96, 64))
    train(optimizer, 2)
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}, checkpoint_id=tmp_path)
    other_model, other = made(shape)
    states = get_optimizer_state_dict(other_model, other, options=options)
    if shape != (96, 64):
        with pytest.raises(dcp.api.CheckpointException, match="Size mismatch"):
            dcp.load({"optimizer": states}, checkpoint_id=tmp_path)
        return
    dcp.load({"optimizer": states}, checkpoint_id=tmp_path)
    set_optimizer_state_dict(other_model, other, states, options=options)
    [(mine, its)] = zip(optimizer.state.values(), other.state.values(), strict=True)
    assert mine.keys() == its.keys()
    assert mine["gsnr"] == its["gsnr"]
    assert torch.equal(mine["momentum_buffer"], its["momentum_buffer"])


@pytest.mark.parametrize("update", RULES)
@pytest.mark.parametrize("options", [{}, {"full_state_dict": True}, {"flatten_optimizer_state_dict": True}], ids=str)
def test_parameters_of_no_elements_are_saved_and_loaded_by_torchs_distributed_checkpoint(update, options, tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    def made():
        torch.manual_seed(0)
        model = nn.ParameterDict({"none": torch.zeros(0), "some": torch.randn(4, 3), "flat": torch.zeros(0, 3)})
        return model, SGDSaI(model.named_parameters(), lr=1e-2, update=update)

    dsd = StateDictOptions(**options)
    model, optimizer = made()
    train(optimizer, 2)
    dcp.save(dict(zip("mo", get_state_dict(model, optimizer, options=dsd), strict=True)), checkpoint_id=tmp_path)
    other_model, other = made()
    weights, states = get_state_dict(other_model, other, options=dsd)
    dcp.load({"m": weights, "o": states}, checkpoint_id=tmp_path)
    set_state_dict(other_model, other, model_state_dict=weights, optim_state_dict=states, options=dsd)
    for both in ((model, optimizer), (other_model, other)):
        train(both[1], 2, start=2)
    assert torch.equal(model["some"], other_model["some"])
    assert len(other.gsnr_report()) == 1


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.AdamW,
        torch.optim.Adafactor,
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        lambda params: torch.optim.SGD(params, momentum=0.9),
        lambda params: torch.optim.RMSprop(params, momentum=0.9),
    ],
    ids=["AdamW", "Adafactor", "RMSprop", "Adagrad", "SGD", "RMSprop with momentum"],
)
def test_a_state_of_another_optimizer_is_refused_with_the_way_out(make):
    theirs = make([p for _, p in named()])
    for p in theirs.param_groups[0]["params"]:
        p.grad = torch.randn_like(p)
    theirs.step()
    ours = SGDSaI(named(), lr=1e-2)
    with pytest.raises(ValueError, match=r"written by another optimizer.*fresh state.*remove optimizer.pt"):
        ours.load_state_dict(theirs.state_dict())
    assert not ours.state
    train(ours, 1)


@pytest.mark.parametrize("kind", ["bitsandbytes' AdamW8bit", "transformers' Adafactor"])
def test_a_state_of_another_librarys_optimizer_is_refused(kind):
    if kind == "transformers' Adafactor":
        make = pytest.importorskip("transformers").Adafactor
    else:
        make = pytest.importorskip("bitsandbytes").optim.AdamW8bit
    params = [p for _, p in named(shapes=((4096, 3),))]
    theirs = make(params, lr=1e-2, **({"relative_step": False} if "Adafactor" in kind else {}))
    for p in theirs.param_groups[0]["params"]:
        p.grad = torch.randn_like(p)
    theirs.step()
    ours = SGDSaI(named(shapes=((4096, 3),)), lr=1e-2)
    with pytest.raises(ValueError, match=r"written by another optimizer.*fresh state"):
        ours.load_state_dict(theirs.state_dict())
    assert not ours.state


@pytest.mark.parametrize("change", [{"r": 8}, {"target_modules": ["q_proj", "k_proj"]}], ids=str)
@pytest.mark.parametrize("fused", [None, True])
def test_a_state_of_another_lora_is_refused(change, fused):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")

    def trained_lora(steps, **config):
        size = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, num_attention_heads=2))
        model = peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **config}))
        optimizer = create_sgd_sai_optimizer(model, lr=0.1, fused=fused)
        ids = torch.arange(5, 13).reshape(1, 8)
        for _ in range(steps):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        return optimizer

    other = trained_lora(0, **change)
    with pytest.raises(ValueError, match=r"(has shape|was saved for).*fresh state"):
        other.load_state_dict(trained_lora(1).state_dict())
    assert not other.state


BAD_STATES = {
    "eps": (lambda saved: saved["param_groups"][0].update(eps=-1), "eps must be"),
    "weight_decay": (lambda saved: saved["param_groups"][0].update(weight_decay=float("inf")), "weight_decay must be"),
    "lr": (lambda saved: saved["param_groups"][0].update(lr=torch.zeros(2)), "lr must be"),
    "update": (lambda saved: saved["param_groups"][0].update(update=[]), "update must be"),
    "momentum_dtype": (lambda saved: saved["param_groups"][0].update(momentum_dtype=-1), "momentum_dtype must be"),
    "no options": (lambda saved: saved.update(param_groups=[0.5]), "is damaged, or none that an optimizer saves"),
    "no groups": (lambda saved: saved.pop("param_groups"), "is damaged, or none that an optimizer saves"),
    "names": (lambda saved: saved["param_groups"][0].update(param_names=torch.zeros(3)), "is damaged"),
    "no mean": (lambda saved: saved["state"][0].pop("mean_square"), "mean_square of parameter p0 is missing"),
    "steps": (lambda saved: saved["state"][0].update(averaged_steps=-1), "averaged_steps of parameter p0"),
    "sparse": (lambda saved: saved["state"][0].update(momentum_buffer=torch.zeros(4, 3).to_sparse()), "is damaged"),
    "no data": (lambda saved: saved["state"][0].update(momentum_buffer=torch.zeros(4, 3, device="meta")), "is damaged"),
}


@pytest.mark.parametrize(("change", "message"), BAD_STATES.values(), ids=BAD_STATES)
def test_a_damaged_state_is_refused_in_one_sentence_and_nothing_is_loaded(change, message):
    saved = copy.deepcopy(trained("factored").state_dict())
    change(saved)
    other = SGDSaI(named(), lr=1e-2, update="factored")
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(saved)
    assert not other.state
    train(other, 1)


def test_groups_of_other_sizes_are_refused_in_one_sentence():
    with pytest.raises(ValueError, match=r"groups of \[3\] parameters, and this optimizer's have \[2\]"):
        SGDSaI(named(shapes=((4, 3), (5,))), lr=1e-2).load_state_dict(trained().state_dict())


def test_where_another_update_has_other_groups_the_refusal_names_both_updates():
    saved = trained("factored").state_dict()
    other = SGDSaI([{"params": [one]} for one in named()], lr=1e-2, update="averaged")
    with pytest.raises(ValueError, match=r"as they were: with update=factored, and not averaged\. To train on"):
        other.load_state_dict(saved)


@pytest.mark.parametrize("turned", [False, True])
def test_the_refusal_names_orthogonal_as_it_was_asked_for(turned):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Sequential(nn.Linear(6, 6)), nn.Embedding(3, 6)])
    rules = ("orthogonal", "factored")[:: -1 if turned else 1]
    saved, other = (create_sgd_sai_optimizer(model, lr=1e-2, update=rule) for rule in rules)
    train(saved, 1)
    with pytest.raises(ValueError, match=f"with update={rules[0]}, and not {rules[1]}\\. To train on"):
        other.load_state_dict(saved.state_dict())


def layers():
    torch.manual_seed(0)
    return nn.ModuleList(nn.Sequential(nn.Linear(6, 6, bias=False)) for _ in range(3))


def of_layers(model, *factored):
    matrices = {f"^{index}": False for index in factored}
    return create_sgd_sai_optimizer(model, lr=1e-2, update="orthogonal", matrices=matrices)


def test_a_parameter_whose_group_has_another_rule_now_is_refused_by_name():
    """Groups keep the options they were saved with, so that the state would come under a rule that it is not of."""
    saved = of_layers(layers(), 1)
    train(saved, 2)
    other = of_layers(layers(), 2)
    with pytest.raises(
        ValueError,
        match=r"with update=orthogonal, matrices=linear for parameter 2\.0\.weight, which is in a group with "
        r"update=factored now\. Build the groups as they were, with the same option matrices\.",
    ):
        other.load_state_dict(saved.state_dict())
    assert not other.state
    same = of_layers(layers(), 1)
    same.load_state_dict(saved.state_dict())


@pytest.mark.parametrize("both", [True, False])
def test_groups_in_another_order_keep_their_options(both):
    def optimizer(order):
        pairs = named(shapes=((4, 4), (3, 4), (4, 4), (4, 4)))
        rules = [
            {"params": pairs[:2], "update": "orthogonal", "matrices": "linear", "lr": 3e-2},
            {"params": pairs[2:], "update": "factored", "weight_decay": 0.5},
        ]
        made = SGDSaI([dict(rules[index]) for index in order], lr=1e-2)
        if not both:
            made.param_groups[order.index(0)]["update"] = "factored"  # the key matrices stays, and is not looked at
        return dict(pairs), made

    (values, saved), (others, other) = optimizer([0, 1]), optimizer([1, 0])
    train(saved, 3)
    with torch.no_grad():
        for name, p in others.items():
            p.copy_(values[name])
    other.load_state_dict(copy.deepcopy(saved.state_dict()))
    train(saved, 3, start=3)
    train(other, 3, start=3)
    for name, p in others.items():
        assert torch.equal(p, values[name]), name


def test_other_counts_of_hidden_matrices_are_refused_with_the_option_that_decides():
    saved = of_layers(layers(), 1)
    train(saved, 1)
    with pytest.raises(ValueError, match="as they were, with the same option matrices"):
        of_layers(layers(), 1, 2).load_state_dict(saved.state_dict())


def test_the_rule_of_a_state_that_overruled_another_can_be_changed_back():
    factored = create_sgd_sai_optimizer(layers(), lr=1e-2, update="factored")
    train(factored, 2)
    other = of_layers(layers())
    other.load_state_dict(factored.state_dict())
    assert other.param_groups[0]["update"] == "factored"
    other.param_groups[0]["update"] = "orthogonal"  # what the warning says to do
    train(other, 2)


# --- options


def test_options_that_the_saved_ones_overrule_are_named_in_one_warning(caplog):
    pytest.importorskip("bitsandbytes")
    saved = trained("factored", momentum=0.8, momentum_dtype=torch.bfloat16).state_dict()
    other = SGDSaI(named(), lr=1e-2, momentum_dtype="8bit", weight_decay=0.5)
    with caplog.at_level(logging.WARNING, logger="hf_sai"):
        other.load_state_dict(saved)
    [record] = caplog.records
    for text in (
        "momentum=0.8 (asked for: 0.9)",
        "update=factored (asked for: published)",
        "momentum_dtype=torch.bfloat16 (asked for: 8bit)",
        "weight_decay=0.01 (asked for: 0.5)",
    ):
        assert text in record.getMessage()
    group = other.param_groups[0]
    assert (group["update"], group["momentum"], group["momentum_dtype"]) == ("factored", 0.8, torch.bfloat16)


def test_a_learning_rate_asked_for_at_resume_is_named_and_a_schedules_is_not(caplog):
    optimizer = trained()
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5)
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["param_groups"][0]["lr"] == 5e-3
    for lr, warns in ((1e-2, False), (3e-2, True)):
        other = SGDSaI(named(), lr=lr)
        torch.optim.lr_scheduler.ConstantLR(other, factor=0.5)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="hf_sai"):
            other.load_state_dict(saved)
        assert ("lr=0.01 (asked for: 0.03)" in caplog.text) == warns
        assert bool(caplog.records) == warns
    assert scheduler.base_lrs == [1e-2]


def test_the_same_options_load_without_a_word(caplog):
    with caplog.at_level(logging.WARNING, logger="hf_sai"):
        trained().load_state_dict(trained().state_dict())
    assert not caplog.records


def test_the_removed_rule_is_refused_by_name():
    saved = copy.deepcopy(trained().state_dict())
    del saved["param_groups"][0]["update"]
    saved["param_groups"][0]["normalize_gradient"] = "tensor"
    with pytest.raises(ValueError, match="normalize_gradient='tensor', which is no longer there"):
        SGDSaI(named(), lr=1e-2).load_state_dict(saved)


# --- memory


@pytest.mark.parametrize("momentum_dtype", ["8bit", "4bit"])
def test_loading_a_quantised_state_takes_no_float_of_it(momentum_dtype):
    pytest.importorskip("bitsandbytes")
    shape = (1024, 1024)
    saved = SGDSaI([("a", nn.Parameter(torch.randn(shape)))], momentum_dtype=momentum_dtype)
    train(saved, 1)
    other = SGDSaI([("a", nn.Parameter(torch.randn(shape)))], momentum_dtype=momentum_dtype)
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel() * result.element_size())
            return result

    with Largest():
        other.load_state_dict(saved.state_dict())
    assert largest <= 1024 * 1024  # one byte an element, or nothing at all where the tensors are taken as they are
    ours, theirs = (next(iter(o.state.values())) for o in (other, saved))
    assert ours["momentum_buffer"].dtype == torch.uint8
    assert torch.equal(ours["momentum_buffer"], theirs["momentum_buffer"])


def test_mean_squares_of_each_element_as_fsdp1_saves_them_become_those_of_rows_and_columns():
    optimizer = trained("factored")
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["gsnr"], state["averaged_steps"] = (torch.tensor(state[key]) for key in ("gsnr", "averaged_steps"))
        if "column_mean_square" in state:
            state["mean_square"] = product(state)
            del state["row_mean_square"], state["column_mean_square"]
    other = SGDSaI(named(), lr=1e-2, update="factored")
    other.load_state_dict(saved)
    for mine, its in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert mine.keys() == its.keys()
        assert type(its["averaged_steps"]) is int
        for key, value in mine.items():
            torch.testing.assert_close(torch.as_tensor(its[key]), torch.as_tensor(value), rtol=1e-6, atol=0)
