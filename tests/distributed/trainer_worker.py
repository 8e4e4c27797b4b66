"""Runs Trainer with --optim sgd_sai and resumes: ``trainer_worker.py ENGINE WHAT FROM [ENGINE WHAT FROM ...]``.

ENGINE is ``none`` (one process), ``ddp``, ``fsdp1``, ``fsdp2`` or ``zero1`` to ``zero3``, these also with ``_block``,
an optimizer's block in DeepSpeed's config; WHAT is ``full``, ``lora`` or ``factored``, full under that rule;
FROM is ``-`` for a run of its own and its resume; the folder of another launch, whose run is only resumed; ``dies`` for
a run that saves every step and is killed from outside, or ``killed:`` and the folder of that run, to go on with it.
"""

import os
import sys
import warnings
from types import SimpleNamespace

import torch
import torch.distributed as dist
from common import DDP_TYPE, DEVICE, FOLDER, join, write_result
from on_cpu import use_no_deepspeed_kernels
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import hf_sai
from recipes.common.recipe_input import find_checkpoint

warnings.filterwarnings("ignore")
_, WORLD = join(alone="-" not in sys.argv or "none" in sys.argv)
LONG = 40  # steps of a run that is killed
TYPES = {"none": "NO", "ddp": DDP_TYPE, "fsdp1": "FSDP", "fsdp2": "FSDP"}
if any(word.startswith("zero") for word in sys.argv):
    use_no_deepspeed_kernels()


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        tokens = torch.randint(50, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def settings_of(engine):
    if engine.startswith("fsdp"):
        wrap = {
            "fsdp_version": int(engine[4]),
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "state_dict_type": "SHARDED_STATE_DICT",
        }
        if engine == "fsdp1":  # on the CPU it cannot send the weights around at first
            wrap |= {"use_orig_params": True, "cpu_ram_efficient_loading": False, "sync_module_states": False}
        return {"fsdp": True, "fsdp_config": wrap}
    if engine.startswith("zero"):
        config = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {"stage": int(engine[4])},
        }
        if engine.endswith("block"):
            config["optimizer"] = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}}
        return {"deepspeed": config}
    return {}


def trainer(engine, what, **options):
    arguments = TrainingArguments(
        output_dir=str(FOLDER / f"{engine}_{what}"),
        optim="sgd_sai_factored" if what == "factored" else "sgd_sai",
        learning_rate=3e-3 if what == "factored" else 3e-2,
        weight_decay=0.1,
        per_device_train_batch_size=8 // WORLD,
        logging_steps=1,
        report_to=[],
        use_cpu=DEVICE == "cpu",
        disable_tqdm=True,
        **{"max_steps": 8, "save_steps": 4, **settings_of(engine), **options},
    )
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    model = GPT2LMHeadModel(config)
    if what == "lora":
        model = get_peft_model(model, LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True))
    return Trainer(model=model, args=arguments, train_dataset=Tokens())


def sgd_sai_of(run):
    optimizer = run.optimizer
    while not isinstance(optimizer, hf_sai.SGDSaI):
        optimizer = optimizer.optimizer
    return optimizer


def train(engine, what, checkpoint=None, **options):
    run = trainer(engine, what, **options)
    run.train(resume_from_checkpoint=checkpoint)
    assert run.accelerator.distributed_type.name == TYPES.get(engine, "DEEPSPEED"), run.accelerator.distributed_type
    assert dist.get_world_size() == run.accelerator.num_processes == WORLD
    rows = [(row.name, row) for row in sgd_sai_of(run).gsnr_report()]
    rows = [(name.replace("_fsdp_wrapped_module.", "").replace("module.", ""), row) for name, row in rows]
    return {
        "losses": [row["loss"] for row in run.state.log_history if "loss" in row],
        "gsnr": {name: row.gsnr for name, row in rows},
        "groups": {name: row.group for name, row in rows},
    }


def run_case(engine, what, place):
    environment = dict(os.environ)
    if engine == "none":
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            del os.environ[name]
    if engine.startswith("zero"):
        os.environ.pop("ACCELERATE_USE_CPU", None)
    try:
        if engine.endswith("block"):
            try:
                train(engine, what)
            except ValueError as error:
                return {"message": str(error)}
        if place == "dies":
            return train(engine, what, max_steps=LONG, save_steps=1)
        if place.startswith("killed:"):
            dead = SimpleNamespace(
                output_dir=f"{place[len('killed:') :]}/{engine}_{what}", resume_from_checkpoint="true"
            )
            checkpoint = find_checkpoint(dead)
            options = {"max_steps": LONG, "save_strategy": "no"}
            resumed = train(engine, what, checkpoint, **options)
            return {"checkpoint": checkpoint, "resumed": resumed, "whole": train(engine, what, **options)}
        if place != "-":
            return {"resumed": train(engine, what, f"{place}/{engine}_{what}/checkpoint-4")}
        whole = train(engine, what)
        return {"whole": whole, "resumed": train(engine, what, str(FOLDER / f"{engine}_{what}" / "checkpoint-4"))}
    finally:
        os.environ.clear()
        os.environ.update(environment)  # Trainer and accelerate leave their choices there


cases = zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3], strict=True)
write_result({f"{engine} {what} {place}": run_case(engine, what, place) for engine, what, place in cases})
