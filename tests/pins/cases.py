"""What is pinned: three tiny models, made from configurations without network, and the table of cases."""

import itertools
from dataclasses import dataclass, field

import torch
from internals import rule_options
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from hf_sai import SGDSaI, param_groups

#: Different batches; training goes around them.
BATCHES = 4
VOCAB = 160  # 160 * 32 elements: the embedding is large enough for a quantised momentum


# --- models: each returns the model and its loss at a step


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=VOCAB, n_positions=16, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    for block in model.transformer.h:
        # Softmax does not see a third of it (the keys'), whose gradient is rounding noise and no two machines' alike.
        block.attn.c_attn.bias.requires_grad_(False)
    return model, _language_loss(model)


def vit():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4,
        num_labels=10, qkv_bias=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCHES, 4, 3, 16, 16, generator=generator)
    labels = torch.randint(10, (BATCHES, 4), generator=generator)

    def loss(step):
        step %= BATCHES
        return torch.nn.functional.cross_entropy(
            model(pixel_values=images[step].to(model.dtype)).logits.float(), labels[step]
        )

    return model, loss


def llama_lora():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=64,
        vocab_size=VOCAB, max_position_embeddings=16, initializer_range=0.2,
    )  # fmt: skip
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(LlamaForCausalLM(config), lora)
    return model, _language_loss(model)


def _language_loss(model):
    tokens = torch.randint(VOCAB, (BATCHES, 4, 12), generator=torch.Generator().manual_seed(1))

    def loss(step):
        batch = tokens[step % BATCHES]
        logits = model(input_ids=batch).logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits.float(), batch[:, 1:].flatten())

    return loss


MODELS = {"gpt2": gpt2, "vit": vit, "llama_lora": llama_lora}


# --- cases


@dataclass(frozen=True)
class Case:
    """One training that is pinned.

    Attributes:
        model: A key of ``MODELS``.
        dtype: Of all parameters.
        path: ``plain``, ``multi-tensor``, ``torch`` (its fused kernel, numba being unavailable), ``numba`` or
            ``automatic``.
        rule: ``published``, ``rows`` or ``factored``.
        grouped: Groups by ``hf_sai.param_groups``, with an ``lr_ratio`` for LoRA's B.
        tensor_lr: The learning rate is a tensor.
        options: Of ``SGDSaI``, beside these.
    """

    model: str
    dtype: torch.dtype
    path: str
    rule: str = "published"
    grouped: bool = False
    tensor_lr: bool = False
    options: dict = field(default_factory=dict)

    @property
    def name(self):
        said = [f"{key}={str(value).removeprefix('torch.')}" for key, value in self.options.items()]
        said += [key for key in ("grouped", "tensor_lr") if getattr(self, key)]
        return " ".join([self.model, str(self.dtype).removeprefix("torch."), self.path, self.rule, *said])

    @property
    def lr(self):
        """Such that twenty steps change the weights by a good part of their size."""
        if self.rule != "published":
            return {"gpt2": 2e-3, "vit": 2e-3, "llama_lora": 1e-2}[self.model]
        lr = {"gpt2": 1e-2, "vit": 1e-2, "llama_lora": 3e-2}[self.model]
        largest = {"gpt2": 70.0, "vit": 45.0, "llama_lora": 10.0}[self.model]  # g-SNR, which normalize divides by
        return lr * largest if self.options.get("normalize") else lr

    def optimizer(self, model, lr_factor=1.0):
        lr = self.lr * lr_factor
        if self.tensor_lr:
            lr = torch.tensor(lr)
        path = {"plain": {"foreach": False}, "multi-tensor": {"foreach": True}, "automatic": {}}
        options = {"momentum": 0.9, "weight_decay": 0.1} | self.options
        if self.grouped:
            ratios = {"lora_B": 4.0} if self.model == "llama_lora" else None
            params = param_groups(model, lr=lr, weight_decay=options["weight_decay"], lr_ratios=ratios)
        else:
            params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return SGDSaI(params, lr=lr, **rule_options(self.rule), **path.get(self.path, {"fused": True}), **options)


ALL_PATHS = ("plain", "multi-tensor", "torch", "numba")
TWO_PATHS = ("plain", "numba")

# Of GPT-2 in float32, on every path.
_EVERYWHERE = [
    {},
    {"options": {"momentum": 0.0}},
    {"options": {"weight_decay": 0.0}},
    {"options": {"maximize": True}},
    {"options": {"normalize": True}},
    {"tensor_lr": True},
    {"rule": "rows"},
    {"rule": "factored"},
    {"options": {"momentum_dtype": torch.bfloat16}},
    {"options": {"momentum_dtype": "8bit"}},
    {"options": {"momentum_dtype": "4bit"}},
    {"options": {"gradient_release": True}},
    {"grouped": True},
]

# Of GPT-2 in float32, where options meet: on two paths.
_TOGETHER = [
    {"rule": "factored", "options": {"momentum_dtype": torch.bfloat16}},
    {"rule": "factored", "options": {"momentum_dtype": "8bit"}},
    {"rule": "factored", "options": {"momentum_dtype": "4bit"}},
    {"rule": "factored", "options": {"momentum": 0.0}},
    {"rule": "factored", "options": {"maximize": True}},
    {"rule": "factored", "options": {"gradient_release": True}},
    {"rule": "factored", "tensor_lr": True},
    {"rule": "factored", "grouped": True},
    {"rule": "rows", "options": {"momentum_dtype": "8bit"}},
    {"rule": "rows", "options": {"momentum": 0.0, "weight_decay": 0.0}},
    {"rule": "rows", "options": {"maximize": True, "gradient_release": True}},
    {"options": {"momentum": 0.0, "weight_decay": 0.0, "maximize": True}},
    {"options": {"momentum": 0.0, "normalize": True}},
    {"options": {"momentum_dtype": "8bit", "maximize": True}, "tensor_lr": True},
    {"options": {"momentum_dtype": "4bit", "gradient_release": True}},
    {"options": {"normalize": True, "momentum_dtype": torch.bfloat16}, "grouped": True},
]

# Of GPT-2 in half precision, in the plain and the multi-tensor loop: no kernel on CPU takes it.
_HALF = [
    {"options": {"momentum": 0.0}},
    {"options": {"maximize": True}},
    {"options": {"normalize": True}},
    {"rule": "rows"},
    {"options": {"momentum_dtype": torch.float32}},
    {"options": {"momentum_dtype": "8bit"}},
    {"rule": "factored", "options": {"momentum_dtype": torch.float32}},
]


def _cases():
    product = itertools.product
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    for more, path in product(_EVERYWHERE, ALL_PATHS):
        yield Case("gpt2", f32, path, **more)
    for more, path in product(_TOGETHER, TWO_PATHS):
        yield Case("gpt2", f32, path, **more)
    for rule in ("published", "factored"):
        yield Case("gpt2", f32, "automatic", rule)
    for dtype, rule, path in product((bf16, f16), ("published", "factored"), ALL_PATHS):
        yield Case("gpt2", dtype, path, rule)
    for dtype, more, path in product((bf16, f16), _HALF, ("plain", "multi-tensor")):
        yield Case("gpt2", dtype, path, **more)
    for rule, path in product(("published", "factored"), ALL_PATHS):
        yield Case("vit", f32, path, rule)
    for more in ({"rule": "rows"}, {"options": {"normalize": True}}, {"grouped": True}):
        yield Case("vit", f32, "numba", **more)
    for dtype in (bf16, f16):
        yield Case("vit", dtype, "plain")
    for rule, path in product(("published", "factored"), ALL_PATHS):
        yield Case("llama_lora", f32, path, rule, grouped=True)
    for more, path in product(
        [
            {"rule": "rows"},
            {"options": {"normalize": True}, "grouped": True},
            {"options": {"momentum_dtype": torch.bfloat16}},
            {"options": {"momentum": 0.0}},
            {"options": {"gradient_release": True}},
        ],
        TWO_PATHS,
    ):
        yield Case("llama_lora", f32, path, **more)
    for rule in ("published", "factored"):
        yield Case("llama_lora", bf16, "plain", rule, grouped=True)


CASES = {case.name: case for case in _cases()}
