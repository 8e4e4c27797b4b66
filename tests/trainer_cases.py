"""A Trainer over a GPT-2 of a few thousand parameters that learns to count, for all tests that need some training."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import hf_sai  # noqa: F401  (registers the optimizer's names)
from hf_sai.trainer.callbacks import RunRecordCallback

ROWS = [{"input_ids": [1, 2, 3, 4, 5, 6, 7, i % 9], "labels": [1, 2, 3, 4, 5, 6, 7, i % 9]} for i in range(64)]


def tiny_gpt2():
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=16, n_positions=64, **ids))


def arguments(folder, **more):
    options = {
        "optim": "sgd_sai",
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_steps": 6,
        "logging_steps": 2,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **{**options, **more})


def plain_trainer(folder, model=None, cls=Trainer, callbacks=None, **more):
    """A Trainer without a record."""
    model = model or tiny_gpt2()
    return cls(model, arguments(folder, **more), train_dataset=ROWS, eval_dataset=ROWS[:8], callbacks=callbacks)


def trainer_for(folder, callback=None, model=None, **more):
    """A Trainer that leaves a record."""
    callback = callback or RunRecordCallback(budget=1.0, data=[{"name": "counting", "license": "cc0-1.0"}])
    return plain_trainer(folder, model=model, callbacks=[callback], **more)
