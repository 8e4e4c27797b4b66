"""One configuration or more for every tuner of PEFT, on a two-layer Llama: what to build and what must come of it."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

__all__ = ["CASES", "UNSEEN_TOKENS", "VOCAB", "Case", "base_model", "build"]

VOCAB, HIDDEN, RANK = 64, 16, 4
TARGETS = ["q_proj", "v_proj"]
VIRTUAL = {"num_virtual_tokens": 4}
LORA = {"r": RANK, "target_modules": TARGETS}
UNSEEN_TOKENS = [3, 4]  # batches hold tokens from 5 on


@dataclass(frozen=True)
class Case:
    """One configuration: PEFT's config class by name, its arguments, and what must come of it."""

    config: str
    roles: str  # the groups' names without the adapter, in any order
    kwargs: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    never_reached: int = 0  # parameters that the loss does not depend on
    mergeable: bool = False
    saved_whole: bool = True  # False where PEFT saves what inference needs and not all that was trained

    def build(self, tmp_path: Any) -> Any:
        if not hasattr(peft, self.config):
            pytest.skip(f"this PEFT has no {self.config}")
        kwargs = {**self.kwargs, "task_type": "CAUSAL_LM"}
        if self.config == "XLoraConfig":
            kwargs["adapters"] = {str(i): _saved_expert(tmp_path / str(i), seed=i) for i in (0, 1)}
        for name, nested in kwargs.items():
            if isinstance(nested, _Nested):
                kwargs[name] = nested.build()
        return getattr(peft, self.config)(**kwargs)


@dataclass(frozen=True)
class _Nested:
    """A LoRA variant's own config, looked up late because older PEFT lacks it."""

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Any:
        config = getattr(peft.tuners.lora.config, self.name, None)
        if config is None:
            pytest.skip(f"this PEFT has no {self.name}")
        return config(**self.kwargs)


CASES = {
    "lora": Case("LoraConfig", "lora_A lora_B", LORA, mergeable=True),
    "lora_bias": Case("LoraConfig", "lora_A lora_B lora_B/no_decay", {**LORA, "lora_bias": True}, mergeable=True),
    "lora_bias_all": Case("LoraConfig", "lora_A lora_B base/no_decay", {**LORA, "bias": "all"}),
    "lora_rslora": Case("LoraConfig", "lora_A lora_B", {**LORA, "use_rslora": True}, mergeable=True),
    "lora_pissa": Case("LoraConfig", "lora_A lora_B", {**LORA, "init_lora_weights": "pissa"}),
    "lora_olora": Case("LoraConfig", "lora_A lora_B", {**LORA, "init_lora_weights": "olora"}),
    "lora_orthogonal": Case("LoraConfig", "lora_A lora_B", {**LORA, "init_lora_weights": "orthogonal"}),
    "lora_embedding": Case(
        "LoraConfig",
        "lora_A lora_B lora_embedding_A lora_embedding_B",
        {**LORA, "target_modules": ["embed_tokens", "q_proj"]},
        mergeable=True,
    ),
    "lora_modules_to_save": Case(
        "LoraConfig",
        "lora_A lora_B modules_to_save modules_to_save/no_decay",
        {**LORA, "modules_to_save": ["lm_head", "norm"]},
    ),
    "lora_unseen_tokens": Case(
        "LoraConfig",
        "lora_A lora_B trainable_tokens_delta",
        {**LORA, "trainable_token_indices": UNSEEN_TOKENS},
        never_reached=1,
    ),
    "lora_parameters": Case(
        "LoraConfig", "lora_A lora_B", {"r": RANK, "target_modules": [], "target_parameters": ["mlp.down_proj.weight"]}
    ),
    "dora": Case("LoraConfig", "lora_A lora_B magnitude", {**LORA, "use_dora": True}, mergeable=True),
    "lora_kasa": Case("LoraConfig", "lora_A lora_B lora_diag", {**LORA, "kasa_config": _Nested("KasaConfig")}),
    "lora_velora": Case(
        "LoraConfig", "lora_A lora_B", {**LORA, "velora_config": _Nested("VeloraConfig", {"num_groups": 4})}
    ),
    "lora_monteclora": Case(
        "LoraConfig",
        "lora_A lora_B lora_monteclora_sampler",
        {**LORA, "monteclora_config": _Nested("MontecloraConfig")},
        saved_whole=False,  # the samples drawn ahead are not saved
    ),
    "lora_block_diagonal": Case(
        "LoraConfig",
        "lora_A lora_B",
        {
            **LORA,
            "use_bdlora": _Nested(
                "BdLoraConfig", {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["v_proj"], "nblocks": 2}
            ),
        },
    ),
    "adalora": Case(
        "AdaLoraConfig",
        "lora_A lora_B lora_E",
        {"init_r": RANK, "target_r": 2, "total_step": 100, "tinit": 10, "tfinal": 10, "target_modules": TARGETS},
        mergeable=True,
    ),
    "adamss": Case(
        "AdamssConfig",
        "adamss_A adamss_B",
        {"r": RANK, "num_subspaces": 2, "subspace_rank": 1, "target_modules": TARGETS},
    ),
    "adaption_prompt": Case(
        "AdaptionPromptConfig", "adaption_prompt adaption_gate", {"adapter_len": 4, "adapter_layers": 2}
    ),
    "beft": Case("BeftConfig", "beft_bias", {"target_modules": TARGETS}),
    "boft": Case("BOFTConfig", "boft_R boft_s", {"boft_block_size": 4, "target_modules": TARGETS}, mergeable=True),
    "c3a": Case("C3AConfig", "c3a_kernel", {"block_size": 4, "target_modules": TARGETS}, mergeable=True),
    "cartridge": Case("CartridgeConfig", "prompt_encoder", {**VIRTUAL, "num_frozen_tokens": 1}),
    "cpt": Case(
        "CPTConfig",
        "prompt_encoder",
        {"cpt_token_ids": [1, 2, 3, 4], "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1, 2, 3, 4]},
        saved_whole=False,
    ),
    "deft": Case("DeftConfig", "deft_P deft_R", LORA),
    "delora": Case("DeloraConfig", "delora_A delora_B delora_lambda", LORA, mergeable=True),
    "fourierft": Case("FourierFTConfig", "fourierft_spectrum", {"n_frequency": 20, "target_modules": TARGETS}),
    "frod": Case("FrodConfig", "frod_lambda_l frod_lambda_s_values", {"target_modules": TARGETS}),
    "glora": Case("GloraConfig", "glora_A glora_B glora_C glora_D glora_E", LORA),
    "gralora": Case("GraloraConfig", "gralora_A gralora_B", {**LORA, "gralora_k": 2}),
    "gralora_hybrid": Case(
        "GraloraConfig",
        "gralora_A gralora_B gralora_A_general gralora_B_general",
        {**LORA, "gralora_k": 2, "hybrid_r": 2},
    ),
    "hira": Case("HiraConfig", "hira_A hira_B", LORA, mergeable=True),
    "hra": Case("HRAConfig", "hra_u", LORA, mergeable=True),
    "ia3": Case(
        "IA3Config",
        "ia3_l",
        {"target_modules": [*TARGETS, "down_proj"], "feedforward_modules": ["down_proj"]},
        mergeable=True,
    ),
    "lily": Case("LilyConfig", "lily_A lily_B lily_router", {**LORA, "num_B": 2, "stride_A": 1}),
    "ln_tuning": Case("LNTuningConfig", "ln_tuning_layers", {"target_modules": ["input_layernorm"]}),
    "loha": Case("LoHaConfig", "hada_w1_a hada_w1_b hada_w2_a hada_w2_b", LORA, mergeable=True),
    "lokr": Case("LoKrConfig", "lokr_w1 lokr_w2", {**LORA, "r": 2}, mergeable=True),
    "lokr_factored": Case(
        "LoKrConfig",
        "lokr_w1_a lokr_w1_b lokr_w2_a lokr_w2_b",
        {**LORA, "r": 1, "decompose_both": True, "decompose_factor": 4},
        mergeable=True,
    ),
    "miss": Case("MissConfig", "miss_block", LORA, mergeable=True),
    "multitask_prompt_tuning": Case(
        "MultitaskPromptTuningConfig",
        "prompt_encoder",
        {**VIRTUAL, "num_tasks": 2},
        inputs={"task_ids": torch.tensor([0, 1])},
    ),
    "oft": Case("OFTConfig", "oft_R", {"oft_block_size": 4, "r": 0, "target_modules": TARGETS}, mergeable=True),
    "osf": Case(
        "OSFConfig", "osf_svd_params osf_svd_params/no_decay", {"target_modules": TARGETS, "effective_rank": RANK}
    ),
    "p_tuning": Case(
        "PromptEncoderConfig",
        "prompt_encoder prompt_encoder/no_decay",
        {**VIRTUAL, "encoder_hidden_size": 8},
        saved_whole=False,
    ),
    "peanut": Case("PeanutConfig", "peanut_A peanut_B peanut_encoders peanut_decoders", {**LORA, "depth": 2}),
    "poly": Case(
        "PolyConfig",
        "poly_lora_A poly_lora_B poly_router",
        {**LORA, "n_tasks": 2, "n_skills": 2},
        inputs={"task_ids": torch.tensor([0, 1])},
    ),
    "prefix_tuning": Case("PrefixTuningConfig", "prompt_encoder", VIRTUAL),
    "prefix_tuning_projected": Case(
        "PrefixTuningConfig",
        "prompt_encoder prompt_encoder/no_decay",
        {**VIRTUAL, "prefix_projection": True, "encoder_hidden_size": 8},
        saved_whole=False,
    ),
    "prompt_tuning": Case("PromptTuningConfig", "prompt_encoder", VIRTUAL),
    "psoft": Case("PsoftConfig", "psoft_R", LORA),
    "pvera": Case("PveraConfig", "pvera_lambda_b pvera_lambda_d", LORA),
    "randlora": Case("RandLoraConfig", "randlora_lambda randlora_gamma", LORA),
    "road": Case("RoadConfig", "road_theta road_alpha", {"group_size": 8, "target_modules": TARGETS}, mergeable=True),
    # The last layer's update of the shadow state is read by nobody.
    "shadow": Case(
        "ShadowConfig",
        "shadow_down shadow_up shadow_update_transform shadow_update_transform/no_decay shadow_update_gate "
        "shadow_update_gate/no_decay shadow_backbone shadow_backbone/no_decay",
        {"r": RANK},
        never_reached=8,
    ),
    "shira": Case("ShiraConfig", "shira_weight", {**LORA, "r": 2}, mergeable=True),
    "supertuning": Case(
        "SupertuningConfig", "supertuning_values supertuning_lora_A supertuning_lora_B", {**LORA, "sparsity": 0.5}
    ),
    "tinylora": Case("TinyLoraConfig", "tinylora_v", {"r": 2, "u": 4, "target_modules": TARGETS}),
    "trainable_tokens": Case(
        "TrainableTokensConfig",
        "trainable_tokens_delta",
        {"token_indices": [3, 5, 6], "target_modules": ["embed_tokens"]},
    ),
    "trainable_tokens_unseen": Case(
        "TrainableTokensConfig",
        "trainable_tokens_delta",
        {"token_indices": UNSEEN_TOKENS, "target_modules": ["embed_tokens"]},
        never_reached=1,
    ),
    "unilora": Case("UniLoraConfig", "unilora_theta_d", {**LORA, "theta_d_length": 32}),
    "vblora": Case(
        "VBLoRAConfig",
        "vblora_logits_A vblora_logits_B vblora_vector_bank",
        {**LORA, "num_vectors": 16, "vector_length": 4, "topk": 2},
    ),
    "vera": Case("VeraConfig", "vera_lambda_b vera_lambda_d", LORA, mergeable=True),
    "waveft": Case("WaveFTConfig", "waveft_spectrum", {"n_frequency": 20, "target_modules": TARGETS}),
    "xlora": Case(
        "XLoraConfig",
        "xlora_classifier xlora_classifier/no_decay",
        {"hidden_size": HIDDEN, "xlora_depth": 2, "xlora_size": 8},
        saved_whole=False,
    ),
    "xlora_with_experts": Case(
        "XLoraConfig",
        "0/lora_A 0/lora_B 1/lora_A 1/lora_B xlora_classifier xlora_classifier/no_decay",
        {"hidden_size": HIDDEN, "xlora_depth": 2, "xlora_size": 8, "use_trainable_adapters": True},
        saved_whole=False,
    ),
}


def base_model(hidden: int = HIDDEN) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_bias=True,
        use_cache=False,
        # Wide enough that attention is not uniform: at the usual 0.02 so small a model has gradients near 1e-9 in q.
        initializer_range=0.3,
    )
    model = transformers.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers starts them at zero, and GLoRA scales them
            torch.nn.init.normal_(parameter)
    return model


def _saved_expert(path: Any, seed: int) -> str:
    model = base_model()
    torch.manual_seed(seed)
    config = peft.LoraConfig(**LORA, init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(path)
    return str(path)


def build(case: Case, tmp_path: Any) -> Any:
    config = case.build(tmp_path)
    model = base_model()
    torch.manual_seed(1)
    return peft.get_peft_model(model, config)
