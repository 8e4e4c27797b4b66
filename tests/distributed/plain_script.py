"""A Trainer script as users have it, which has never heard of hf_sai; each rank says what it ran under."""

import json
import os
from pathlib import Path

import on_cpu  # noqa: F401
import torch
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        tokens = torch.randint(50, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


(arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
torch.manual_seed(0)
sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **sizes))
trainer = Trainer(model=model, args=arguments, train_dataset=Tokens())
trainer.train()

optimizer = trainer.optimizer
while hasattr(optimizer, "optimizer"):
    optimizer = optimizer.optimizer
distributed = torch.distributed.is_initialized()
mesh = getattr(next(trainer.model_wrapped.parameters()), "device_mesh", None)
seen = {
    "type": trainer.accelerator.distributed_type.name,
    "processes": trainer.accelerator.num_processes,
    "world_size": torch.distributed.get_world_size() if distributed else 1,
    "local_world_size": int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    "optimizer": type(optimizer).__name__,
    "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
    "mesh": None if mesh is None else list(mesh.shape),
}
Path(arguments.output_dir, f"rank_{os.environ.get('RANK', '0')}.json").write_text(json.dumps(seen))
if distributed:
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads may abort the interpreter at its end: see common.write_result
