"""Which tensors are hidden matrices: by the structure of real models, by the user's word, in groups and in Trainer."""

import itertools
import logging

import pytest
import torch
import transformers as tf
from torch import nn

from hf_sai import SGDSaI, create_sgd_sai_optimizer, param_groups
from hf_sai.groups.hidden_matrices import hidden_matrices

#: Of names of embeddings, positions and heads.
ENDS = ("embed", "wte", "wpe", "lm_head", "shared", "classifier", "score")

SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}


def gpt2(**options):
    config = tf.GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=11, n_positions=6, bos_token_id=0, eos_token_id=0)
    config.update(options)
    return tf.GPT2LMHeadModel(config)


def llama(**options):
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, vocab_size=11, num_key_value_heads=1, **options))


MODELS = {
    "gpt2": (gpt2, {"linear_transposed": 8}, ["c_attn", "c_proj", "c_fc"]),
    "gpt2, head untied": (lambda: gpt2(tie_word_embeddings=False), {"linear_transposed": 8}, ["c_"]),
    "llama": (llama, {"linear": 14}, ["_proj"]),
    "llama, classes": (
        lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**SMALL, vocab_size=11, pad_token_id=0)),
        {"linear": 14},
        ["_proj"],
    ),
    "bert": (
        lambda: tf.BertForMaskedLM(tf.BertConfig(**SMALL, vocab_size=11)),
        {"linear": 12},
        ["query", "key", "value", "dense"],
    ),
    "vit": (
        lambda: tf.ViTForImageClassification(tf.ViTConfig(**SMALL, image_size=8, patch_size=4)),
        {"linear": 12},
        ["layer", "encoder"],
    ),
    "t5": (
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, vocab_size=11, decoder_start_token_id=0)
        ),
        {"linear": 4 + 2 + 8 + 2},
        ["SelfAttention", "EncDecAttention", "DenseReluDense"],
    ),
    "resnet": (
        lambda: tf.ResNetForImageClassification(
            tf.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
        ),
        {"convolution": 5},
        ["stages"],
    ),
    "mixtral": (
        lambda: tf.MixtralForCausalLM(
            tf.MixtralConfig(**SMALL, vocab_size=11, num_key_value_heads=1, num_local_experts=3)
        ),
        None,  # up to transformers 4 every expert is a module with matrices of its own
        ["_proj", "experts"],
    ),
    "torch's transformer": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12), 2, enable_nested_tensor=False),
        {"linear": 8},
        ["in_proj", "out_proj", "linear"],
    ),
    "sequential": (
        lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)),
        {"linear": 1},
        ["2."],
    ),
    "one layer": (lambda: nn.Linear(3, 2), {}, []),
    "a list of weights": (
        lambda: nn.ModuleList([nn.Linear(9, 8), nn.Linear(8, 8), nn.Linear(8, 2)]),
        {"linear": 1},
        ["1."],
    ),
    "ctrl": (
        lambda: tf.CTRLLMHeadModel(tf.CTRLConfig(n_layer=1, n_embd=8, n_head=2, dff=12, vocab_size=11)),
        {"linear": 6},
        ["multi_head_attention", "ffn"],
    ),
    "funnel": (
        lambda: tf.FunnelForSequenceClassification(
            tf.FunnelConfig(block_sizes=[1], d_model=8, n_head=2, d_head=4, d_inner=12, vocab_size=11)
        ),
        {"linear": 6},
        ["q_head", "k_head", "v_head", "post_proj", "ffn"],
    ),
    "wav2vec2": (
        lambda: tf.Wav2Vec2ForCTC(
            tf.Wav2Vec2Config(
                **SMALL,
                conv_dim=(8, 8),
                conv_kernel=(10, 3),
                conv_stride=(5, 2),
                num_feat_extract_layers=2,
                num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2,
                vocab_size=11,
            )
        ),
        {"linear": 12, "convolution": 1},  # not the convolution that hears the sound itself
        ["encoder.layers", "conv_layers.1"],
    ),
}


def named(model, hidden):
    return {name: hidden[id(p)] for name, p in model.named_parameters() if id(p) in hidden}


@pytest.mark.parametrize("model", MODELS)
def test_in_real_models(model):
    build, expected, words = MODELS[model]
    model = build()
    found = named(model, hidden_matrices(model))
    if expected is not None:
        assert {form: list(found.values()).count(form) for form in set(found.values())} == expected
    for name in found:
        assert any(word in name for word in words), name
        assert not any(word in name for word in ENDS), name


def test_stacked_experts_are_a_matrix_each():
    model = MODELS["mixtral"][0]()
    stacked = {name for name, p in model.named_parameters() if p.ndim == 3}
    if not stacked:
        pytest.skip("this transformers keeps experts as modules")
    found = named(model, hidden_matrices(model))
    assert stacked
    assert all(found[name] == "experts" for name in stacked)


def test_a_router_is_none_whatever_it_is_made_of():
    layer = nn.Module()
    layer.gate, layer.experts = nn.Linear(4, 3), nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    model = nn.ModuleList([layer])
    assert set(named(model, hidden_matrices(model))) == {f"0.experts.{index}.weight" for index in range(3)}
    del layer.experts
    assert set(named(model, hidden_matrices(model))) == {"0.gate.weight"}  # here it gates something else


def module(**children):
    made = nn.Module()
    for name, child in children.items():
        setattr(made, name, child)
    return made


def layer():
    return module(inner=nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)))


def weights(*sizes):
    """Linear weights in a row."""
    return [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]


STRUCTURES = {
    "a sequence of weights": (lambda: nn.Sequential(*weights(9, 8, 8, 2)), ["1"]),
    "the same with one number in and one out": (lambda: nn.Sequential(*weights(1, 8, 8, 1)), ["1"]),
    "convolutions that see colours": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 4)),
        ["1"],
    ),
    "a convolution within a list that hears a sound": (
        lambda: module(convs=nn.ModuleList([nn.Conv1d(1, 8, 3), nn.Conv1d(8, 8, 3)]), out=nn.Linear(8, 2)),
        ["convs.1"],
    ),
    "a sequence of sequences": (
        lambda: nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in "abc"]),
        ["1.0"],
    ),
    "a list of heads beside a sequence": (
        lambda: module(trunk=nn.Sequential(*weights(9, 8, 8)), outs=nn.ModuleList([nn.Linear(8, 2), nn.Linear(8, 3)])),
        ["trunk.1"],
    ),
    "a list of weights beside a sequence that gives out": (
        lambda: module(
            into=nn.Linear(9, 8), layers=nn.ModuleList(weights(8, 8, 8)), head=nn.Sequential(*weights(8, 8, 2))
        ),
        ["layers.0", "layers.1"],
    ),
    "a list of weights after an embedding": (
        lambda: module(table=nn.Embedding(11, 8), layers=nn.ModuleList(weights(8, 8, 8))),
        ["layers.0", "layers.1"],
    ),
    "layers beside a list of heads": (
        lambda: module(layers=nn.ModuleList([layer()]), outs=nn.ModuleList([nn.Linear(8, 2)])),
        ["layers.0.inner.0", "layers.0.inner.2"],
    ),
    "blocks in a sequence that have lists": (
        lambda: module(
            table=nn.Embedding(11, 8),
            blocks=nn.Sequential(
                *[module(heads=nn.ModuleList([module(key=nn.Linear(8, 4))]), up=nn.Linear(8, 8)) for _ in "ab"]
            ),
            other=nn.Sequential(nn.Linear(8, 8)),
            lm_head=nn.Linear(8, 11),
        ),
        ["blocks.0.heads.0.key", "blocks.0.up", "blocks.1.heads.0.key", "blocks.1.up"],
    ),
    "heads that are attention, and heads that are not": (
        lambda: nn.ModuleList([module(q_head=nn.Linear(8, 8), cls_head=nn.Linear(8, 5), classifier=nn.Linear(8, 5))]),
        ["0.q_head"],
    ),
    "a tower below an embedder": (
        lambda: module(text_embedder=module(layers=nn.ModuleList([layer()])), decoder=nn.ModuleList([layer()])),
        ["text_embedder.layers.0.inner.0", "text_embedder.layers.0.inner.2", "decoder.0.inner.0", "decoder.0.inner.2"],
    ),
    "what embeds and what predicts, in lists of their own": (
        lambda: module(
            patch_embeddings=nn.ModuleList([module(proj=nn.Conv2d(4, 8, 2))]),
            class_embed=module(layers=nn.ModuleList(weights(8, 8))),
            bbox_predictor=module(layers=nn.ModuleList(weights(8, 8, 4))),
            decoder=nn.ModuleList([layer()]),
        ),
        ["decoder.0.inner.0", "decoder.0.inner.2"],
    ),
    "routers and gates by their names, and what has one row": (
        lambda: nn.ModuleList(
            [
                module(
                    router=module(layer=nn.Linear(8, 3)),
                    shared_expert_gate=nn.Linear(8, 2),
                    one=nn.Linear(8, 1),
                    up=nn.Linear(8, 8),
                )
            ]
        ),
        ["0.up"],
    ),
}


@pytest.mark.parametrize(("build", "found"), STRUCTURES.values(), ids=STRUCTURES)
def test_in_structures_of_ones_own(build, found):
    model = build()
    assert [name.removesuffix(".weight") for name in named(model, hidden_matrices(model))] == found


@pytest.mark.parametrize(("up", "down", "form"), [
    ((3, 24, 8), (3, 8, 12), "experts"),
    ((3, 8, 24), (3, 12, 8), "experts_transposed"),
])  # fmt: skip
def test_stacks_of_experts_say_by_how_they_fit_which_dimension_is_the_outputs(up, down, form):
    experts = nn.Module()
    experts.gate_up_proj, experts.down_proj = nn.Parameter(torch.zeros(up)), nn.Parameter(torch.zeros(down))
    model = nn.ModuleList([module(experts=experts)])
    assert set(hidden_matrices(model).values()) == {form}


def test_a_stack_of_experts_that_says_how_it_lies_is_believed():
    experts = nn.Module()
    experts.w, experts.is_transposed = nn.Parameter(torch.zeros(3, 8, 24)), True
    assert set(hidden_matrices(nn.ModuleList([module(experts=experts)])).values()) == {"experts_transposed"}


def test_a_stack_that_the_user_names_is_a_matrix_for_each_and_a_convolution_one():
    normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 2))
    model = nn.ModuleList([module(conv=nn.Conv1d(8, 8, 2, groups=2), up=nn.ConvTranspose1d(8, 8, 2), normed=normed)])
    model[0].w = nn.Parameter(torch.zeros(4, 8, 16))
    chosen = named(model, hidden_matrices(model, {r"\.w$": True, r"(conv|up)\.weight": True, "original1": True}))
    convolutions = ("0.conv.weight", "0.up.weight", "0.normed.parametrizations.weight.original1")
    assert chosen == {"0.w": "experts", **dict.fromkeys(convolutions, "convolution")}


def test_every_model_trains_with_its_groups():
    model = gpt2()
    optimizer = create_sgd_sai_optimizer(model, lr=1e-2, update="orthogonal", weight_decay=0.1)
    rules = {group["name"]: (group["update"], group["weight_decay"]) for group in optimizer.param_groups}
    assert rules == {
        "base/decay": ("factored", 0.1),
        "base/no_decay": ("factored", 0.0),
        "base/linear_transposed": ("orthogonal", 0.1),
    }
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.arange(10).view(2, 5)
    for _ in range(2):
        model(x, labels=x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_other_rules_have_the_groups_they_always_had():
    names = [group["name"] for group in param_groups(gpt2(), lr=1.0, weight_decay=0.1)]
    assert names == ["base/decay", "base/no_decay"]
    groups = param_groups(gpt2(), lr=1.0, weight_decay=0.1, update="factored")
    assert [group["update"] for group in groups] == ["factored", "factored"]


def test_the_user_decides_by_expressions_of_which_the_last_wins():
    model = llama()
    default = named(model, hidden_matrices(model))
    chosen = named(model, hidden_matrices(model, {"lm_head": True, "mlp": False, r"layers\.0\.mlp": True}))
    assert set(chosen) - set(default) == {"lm_head.weight"}
    assert {name.split(".")[2] for name in set(default) - set(chosen)} == {"1"}


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        ({"nothing_like_it": True}, "found in no parameter's name"),
        ({"(": True}, "no regular expression"),
        ({"norm": True}, r"of shape \(8,\)"),
        ({"mlp": "false"}, "True or False"),
        ({0: False}, "no regular expression"),
        (["mlp"], "True or False"),
        ("mlp:false", "True or False"),
    ],
)
def test_error_on_an_expression_that_cannot_be(matrices, message):
    with pytest.raises(ValueError, match=message):
        param_groups(llama(), lr=1.0, weight_decay=0.0, update="orthogonal", matrices=matrices)


def test_error_on_matrices_for_a_rule_that_makes_no_difference():
    with pytest.raises(ValueError, match="matrices is for update='orthogonal'"):
        create_sgd_sai_optimizer(llama(), lr=1.0, update="factored", matrices={"mlp": False})


def test_adapters_take_factored_and_a_model_without_hidden_matrices_says_so(caplog):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with caplog.at_level(logging.WARNING, "hf_sai"):
        optimizer = create_sgd_sai_optimizer(model, lr=1e-2, update="orthogonal")
    assert {group["update"] for group in optimizer.param_groups} == {"factored"}
    assert "trains no hidden matrix" in caplog.text
    with pytest.raises(ValueError, match="of an adapter"):
        param_groups(model, lr=1.0, weight_decay=0.0, update="orthogonal", matrices={"lora_A": True})


def test_error_on_parameters_in_the_place_of_the_model():
    with pytest.raises(ValueError, match=r"from the model itself \(a torch.nn.Module\), but this is a generator"):
        create_sgd_sai_optimizer(llama().parameters(), lr=1e-2, update="orthogonal")


def test_groups_made_for_another_rule_are_refused_and_say_what_to_call():
    with pytest.raises(ValueError, match="create_sgd_sai_optimizer"):
        SGDSaI(param_groups(llama(), lr=1e-2, weight_decay=0.0), update="orthogonal")
