"""A Trainer over a GPT-2 of a thousand parameters, for a checkpoint that can be kept in the repository."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import hf_sai  # noqa: F401  (registers the optimizer's name)

STEPS = 4
BATCH = 2


class InOrder(Trainer):
    """The rows in their order, whatever a version of transformers draws them by."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(folder, optim_args, save_steps=None):
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=1, n_embd=8, n_head=2, vocab_size=32, n_positions=8, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    for block in model.transformer.h:  # a third of it has rounding noise for a gradient
        block.attn.c_attn.bias.requires_grad_(False)
    tokens = torch.randint(32, (STEPS * BATCH, 8), generator=torch.Generator().manual_seed(1))
    saving = {"save_strategy": "no"} if save_steps is None else {"save_strategy": "steps", "save_steps": save_steps}
    args = TrainingArguments(
        str(folder),
        optim="sgd_sai",
        optim_args=optim_args,
        learning_rate=0.01,
        weight_decay=0.1,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        **saving,
    )
    return InOrder(model=model, args=args, train_dataset=[{"input_ids": row, "labels": row} for row in tokens])
