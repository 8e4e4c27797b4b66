"""The optimizers that `benchmark.py` compares: how each is built, and where its grid of learning rates starts."""

from __future__ import annotations

import pytorch_optimizer
import sgd_sai
import torch
from peft.optimizers import create_loraplus_optimizer
from pooled import PooledSGDSaI, by_module

from recipes.common.candidates import Candidate, adamw, sai, trainable

__all__ = ["CANDIDATES"]


CANDIDATES = {
    "adamw": Candidate(adamw(), (5e-3, 1e-2, 2e-2)),
    "adamw, beta1 0.8": Candidate(adamw(betas=(0.8, 0.999)), (2.5e-3, 5e-3, 1e-2)),
    "sgd_sai": Candidate(sai(), (2e-2, 4e-2, 8e-2)),
    "sgd_sai, A x 4": Candidate(sai(lr_ratios={"lora_A": 4}), (1e-2, 2e-2, 4e-2)),
    "sgd_sai, B x 4": Candidate(sai(lr_ratios={"lora_B": 4}), (1e-2, 2e-2, 4e-2)),
    "sgd_sai, clip 0.1": Candidate(sai(), (4e-2, 8e-2, 16e-2), {"max_grad_norm": 0.1}),
    "official sgd-sai": Candidate(
        lambda model, lr: sgd_sai.SGD_sai(trainable(model), lr=lr, weight_decay=0.0), (5e-3, 1e-2, 2e-2)
    ),
    "pytorch_optimizer SGDSaI": Candidate(
        lambda model, lr: pytorch_optimizer.SGDSaI(trainable(model), lr=lr, weight_decay=0.0), (1e-2, 2e-2, 4e-2)
    ),
    "LoRA+ adamw (B x 16)": Candidate(
        lambda model, lr: create_loraplus_optimizer(model, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=16),
        (5e-4, 1e-3, 2e-3),
    ),
    "sgd_sai, momentum 0.95": Candidate(sai(momentum=0.95), (1e-2, 2e-2)),
    "sgd_sai, momentum 0.8": Candidate(sai(momentum=0.8), (2e-2, 4e-2)),
    "sgd_sai, cosine": Candidate(sai(), (2e-2, 4e-2), {"lr_scheduler_type": "cosine"}),
    "sgd_sai, factored gradient": Candidate(sai(update="factored"), (2.5e-3, 5e-3, 1e-2)),
    "sgd_sai, factored gradient, momentum 0.8": Candidate(sai(update="factored", momentum=0.8), (2.5e-3, 5e-3, 1e-2)),
    "sgd_sai, averaged": Candidate(
        sai(update="averaged", momentum=0.8), (2.5e-3, 5e-3, 1e-2), {"lr_scheduler_type": "constant_with_warmup"}
    ),
    "sgd_sai, 8-bit momentum": Candidate(sai(momentum_dtype="8bit"), (2e-2, 4e-2, 8e-2)),
    "sgd_sai, 4-bit momentum": Candidate(sai(momentum_dtype="4bit"), (2e-2, 4e-2, 8e-2)),
    "sgd_sai, factored gradient, momentum 0.8, 8 bits": Candidate(
        sai(update="factored", momentum=0.8, momentum_dtype="8bit"), (2.5e-3, 5e-3, 1e-2)
    ),
    "sgd_sai, unit rows": Candidate(sai(update="rows"), (2.5e-3, 5e-3, 1e-2)),
    "sgd_sai, pooled per layer": Candidate(
        lambda model, lr: PooledSGDSaI(model, by_module, lr=lr, weight_decay=0.0), (1e-2, 2e-2)
    ),
    "sgd_sai, pooled per adapter": Candidate(
        # g-SNR is about the square root of the number of elements, and an adapter has many.
        lambda model, lr: PooledSGDSaI(model, lambda name: "adapter", lr=lr, weight_decay=0.0),
        (2e-3, 4e-3),
    ),
    "sgd momentum": Candidate(
        lambda model, lr: torch.optim.SGD(trainable(model), lr=lr, momentum=0.9), (2e-1, 4e-1, 8e-1)
    ),
}
