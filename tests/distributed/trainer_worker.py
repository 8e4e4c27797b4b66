"""Runs Trainer with --optim sgd_sai under an engine and resumes: ``trainer_worker.py ENGINE [lora]``."""

import json
import os
import sys
import warnings

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from common import FOLDER, join, write_result
from on_cpu import use_no_deepspeed_kernels
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import hf_sai

warnings.filterwarnings("ignore")
os.environ["DS_ACCELERATOR"] = "cpu"
ENGINE, LORA = sys.argv[1], "lora" in sys.argv
ALONE = int(os.environ["WORLD_SIZE"]) == 1
EXPECTED = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero": "DEEPSPEED"}
if ALONE:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name)
    RANK = 0
else:
    os.environ.pop("ACCELERATE_USE_CPU")
    if not ENGINE.startswith("zero"):
        os.environ["ACCELERATE_USE_CPU"] = "true"
    RANK, _ = join()

if ENGINE.startswith("zero"):
    use_no_deepspeed_kernels()


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        tokens = torch.randint(50, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def trainer(**options):
    engine = {}
    if ENGINE == "fsdp2":
        wrap = {
            "fsdp_version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "state_dict_type": "SHARDED_STATE_DICT",
        }
        engine = {"fsdp": True, "fsdp_config": wrap}
    if ENGINE.startswith("zero") and not ALONE:
        engine = {
            "deepspeed": {
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_clipping": "auto",
                "zero_optimization": {"stage": int(ENGINE[-1])},
            }
        }
    arguments = TrainingArguments(
        output_dir=str(FOLDER / "run"),
        optim="sgd_sai",
        learning_rate=3e-2,
        weight_decay=0.1,
        per_device_train_batch_size=8 if ALONE else 4,
        max_steps=8,
        save_steps=4,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **({} if ALONE else engine),
        **options,
    )
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    model = GPT2LMHeadModel(config)
    if LORA:
        model = get_peft_model(model, LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True))
    return Trainer(model=model, args=arguments, train_dataset=Tokens())


def sgd_sai_of(run):
    optimizer = run.optimizer
    while not isinstance(optimizer, hf_sai.SGDSaI):
        optimizer = optimizer.optimizer
    return optimizer


def losses_of(run):
    return [row["loss"] for row in run.state.log_history if "loss" in row]


run = trainer()
run.train()
expected_type = EXPECTED[ENGINE.rstrip("0123456789") if ENGINE.startswith("zero") else ENGINE] if not ALONE else "NO"
assert PartialState().distributed_type.name != "NO" or ALONE
assert run.accelerator.distributed_type.name == expected_type, run.accelerator.distributed_type
assert ALONE or dist.get_world_size() == run.accelerator.num_processes == 2
report = sgd_sai_of(run).gsnr_report()
result = {
    "type": run.accelerator.distributed_type.name,
    "losses": losses_of(run),
    "gsnr": {row.name.replace("module.", ""): row.gsnr for row in report},
    "groups": {row.name.replace("module.", ""): row.group for row in report},
}
resumed = trainer()
resumed.train(resume_from_checkpoint=str(FOLDER / "run" / "checkpoint-4"))
result["resumed_losses"] = losses_of(resumed)
result["resumed_gsnr"] = {row.name.replace("module.", ""): row.gsnr for row in sgd_sai_of(resumed).gsnr_report()}
if ALONE:
    os.environ["RANK"] = "0"
write_result(json.loads(json.dumps(result)))
