"""Trains transformers' and PEFT's models under torch's engines against one process: ``models_worker.py MODE ...``."""

import sys
import warnings

import torch
import torch.distributed as dist
from common import (
    DEVICE,
    FOLDER,
    OPTIONS,
    STEPS,
    build,
    counting,
    gsnr_of,
    join,
    largest_difference,
    mean,
    params_of,
    same_placements,
    write_result,
)
from common import tensor_parallel as tensor_parallel_of_tiny
from common import train as train_tiny
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hf_sai import create_sgd_sai_optimizer

warnings.filterwarnings("ignore")
RANK, WORLD = join()


def pretrained(**options):
    """A Llama of two layers with the same weights on all ranks, in training mode.

    In evaluation mode bitsandbytes takes a bfloat16 kernel for weights of 4 bits on processors that have one.
    """
    folder = FOLDER / "llama"
    if RANK == 0 and not folder.exists():
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
        LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes)).save_pretrained(folder)
    dist.barrier()
    return LlamaForCausalLM.from_pretrained(folder, **options).to(DEVICE).train()


def with_lora(model):
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))


def shard(model, **options):
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def train(model, rank=0, world_size=1, **options):
    """g-SNR, losses and groups of a run on this rank's part of each global batch."""
    optimizer = create_sgd_sai_optimizer(model, **options)
    losses, per_step = [], []
    for step in range(STEPS):
        tokens = torch.randint(64, (8, 9), generator=torch.Generator().manual_seed(step)).chunk(world_size)[rank]
        tokens = tokens.to(DEVICE)
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        with counting(optimizer, per_step):
            optimizer.step()
        losses.append(mean(loss))
    groups = {row.name.replace("_fsdp_wrapped_module.", ""): row.group for row in optimizer.gsnr_report()}
    return optimizer, {"gsnr": gsnr_of(optimizer), "losses": losses, "groups": groups, "collectives": per_step}


def compare(alone, model, rank, world_size, **options):
    _, expected = train(alone, **options)
    optimizer, got = train(model, rank, world_size, **options)
    return {
        **largest_difference(got, expected),
        "collectives": got["collectives"],
        "same_groups": got["groups"] == expected["groups"],
        "same_placements": same_placements(optimizer),
        "sharded": sum(isinstance(p, DTensor) for p in params_of(optimizer)),
    }


def tensor_parallel():
    """transformers' own, where the embedding is sharded and its gradient replicated."""
    return compare(pretrained(), pretrained(tp_plan="auto"), 0, 1, lr=1e-2)


def tensor_parallel_lora():
    """PEFT's LoRA on layers that transformers has sharded: B is, too, and A, of which PEFT draws another, is whole."""
    alone, sharded = with_lora(pretrained()), with_lora(pretrained(tp_plan="auto"))
    weights = dict(alone.named_parameters())
    for name, p in sharded.named_parameters():
        if "lora_A" in name:
            p.data.copy_(weights[name])
    return compare(alone, sharded, 0, 1, lr=3e-2, weight_decay=0.1)


def hsdp_lora():
    """LoRA, sharded over two ranks and replicated over two."""
    mesh = init_device_mesh(DEVICE, (2, WORLD // 2), mesh_dim_names=("dp", "shard"))
    sharded = shard(with_lora(pretrained()), mesh=mesh)
    return compare(with_lora(pretrained()), sharded, RANK, WORLD, lr=3e-2, weight_decay=0.1)


def fsdp1_lora():
    """PEFT's LoRA over frozen weights, grouped after wrapping."""
    sliced = FullyShardedDataParallel(
        with_lora(pretrained()),
        use_orig_params=True,
        device_id=torch.device(DEVICE),
        auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}),
    )
    return compare(with_lora(pretrained()), sliced, RANK, WORLD, lr=3e-2, weight_decay=0.1)


def fsdp2_qlora():
    """LoRA over weights of 4 bits, stored as float32 that FSDP2 shards like any other."""
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.float32}
    quantized = BitsAndBytesConfig(**options, bnb_4bit_compute_dtype=torch.float32)
    alone, sharded = (with_lora(pretrained(quantization_config=quantized, dtype=torch.float32)) for _ in range(2))
    result = compare(alone, shard(sharded), RANK, WORLD, lr=3e-2, weight_decay=0.1)
    weight = next(module for name, module in sharded.named_modules() if name.endswith("mlp.up_proj"))
    halves = type(weight).__name__ == "Linear4bit" and weight.weight.to_local().numel() * WORLD * 8 == 64 * 128
    return {**result, "quantized_shards": halves}


def mixed_meshes():
    """Trainer's groups of a model of which one part is sharded and one is not, as under expert parallelism."""
    arguments = {"output_dir": str(FOLDER), "use_cpu": DEVICE == "cpu", "report_to": [], "optim": "sgd_sai"}
    arguments = TrainingArguments(**arguments, learning_rate=OPTIONS["lr"], weight_decay=OPTIONS["weight_decay"])
    runs = []
    for mesh in (None, init_device_mesh(DEVICE, (WORLD,))):
        model = build() if mesh is None else tensor_parallel_of_tiny(build(), mesh)
        trainer = Trainer(model=model, args=arguments)
        optimizer = trainer.create_optimizer()
        losses = train_tiny(model, optimizer, range(STEPS))
        runs.append({"gsnr": gsnr_of(optimizer), "losses": losses, "groups": optimizer.param_groups})
    decay = [{name: group["weight_decay"] for group in run["groups"] for name in group["param_names"]} for run in runs]
    groups = runs[1]["groups"]
    meshes = [{getattr(p, "device_mesh", None) for p in group["params"]} for group in groups]
    return {
        **largest_difference(runs[1], runs[0]),
        "same_decay": decay[0] == decay[1],
        "meshes": [len(of_group) for of_group in meshes],
        "names": sorted(group["name"] for group in groups),
    }


CHECKS = {
    "mixed_meshes": mixed_meshes,
    "tensor_parallel": tensor_parallel,
    "tensor_parallel_lora": tensor_parallel_lora,
    "hsdp_lora": hsdp_lora,
    "fsdp1_lora": fsdp1_lora,
    "fsdp2_qlora": fsdp2_qlora,
}
write_result({"world_size": dist.get_world_size(), **{name: CHECKS[name]() for name in sys.argv[1:]}})
