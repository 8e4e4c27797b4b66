"""The memory estimate: equal to what optimizers, quantised models, FSDP2 and ZeRO keep; near the paper's figures."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_sai import SGDSaI, create_sgd_sai_optimizer
from hf_sai.memory.estimate import OPTIMIZERS, MemoryRow, estimate_memory
from hf_sai.memory.skeletons import build_skeleton

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

LLAMA = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))


class Shapes(nn.Module):
    """Parameters of every kind of shape, above and below the size at which bitsandbytes quantises states."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in {
            "scalar": (),
            "one": (1,),
            "vector": (7,),
            "long_vector": (4100,),
            "matrix": (9, 5),
            "large": (96, 101),
            "convolution": (16, 8, 7, 7),
        }.items():
            setattr(self, name, nn.Parameter(torch.ones(shape)))
        self.frozen = nn.Parameter(torch.ones(11), requires_grad=False)


def step(model: nn.Module, optimizer: Any) -> None:
    torch.manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn_like(p)
    optimizer.step()


def tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield getattr(value, "_local_tensor", value)
    elif isinstance(value, dict):
        for entry in value.values():
            yield from tensors(entry)


def held(values: Any) -> int:
    """Bytes of the tensors in nested dicts; those that share memory count once."""
    return sum({t.data_ptr() or id(t): t.numel() * t.element_size() for t in tensors(values)}.values())


def row(model: nn.Module, optimizer: str, **kwargs: Any) -> MemoryRow:
    (only,) = estimate_memory(model, [optimizer], **kwargs)
    return only


def bitsandbytes_adamw(model: nn.Module) -> Any:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    return bitsandbytes.optim.AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def adam_mini(model: nn.Module) -> Any:
    optimizers = pytest.importorskip("pytorch_optimizer")
    return optimizers.AdamMini(model, lr=1e-3, num_embeds=64, num_heads=4)


def orthogonal(model: nn.Module, **options: Any) -> SGDSaI:
    return create_sgd_sai_optimizer(model, lr=1e-2, update="orthogonal", **options)


REAL = {
    "sgd_sai": lambda model: SGDSaI(model.named_parameters()),
    "sgd_sai_bf16": lambda model: SGDSaI(model.named_parameters(), momentum_dtype=torch.bfloat16),
    "sgd_sai_8bit": lambda model: SGDSaI(model.named_parameters(), momentum_dtype="8bit"),
    "sgd_sai_4bit": lambda model: SGDSaI(model.named_parameters(), momentum_dtype="4bit"),
    "sgd_sai_factored": lambda model: SGDSaI(model.named_parameters(), update="factored"),
    "sgd_sai_factored_8bit": lambda model: SGDSaI(model.named_parameters(), update="factored", momentum_dtype="8bit"),
    "sgd_sai_factored_4bit": lambda model: SGDSaI(model.named_parameters(), update="factored", momentum_dtype="4bit"),
    "sgd_sai_averaged": lambda model: SGDSaI(model.named_parameters(), update="averaged", momentum_dtype=torch.float32),
    "sgd_sai_orthogonal": lambda model: orthogonal(model),
    "sgd_sai_orthogonal_8bit": lambda model: orthogonal(model, momentum_dtype="8bit"),
    "sgd_sai_orthogonal_4bit": lambda model: orthogonal(model, momentum_dtype="4bit"),
    "sgd_momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "adamw_torch": lambda model: torch.optim.AdamW(model.parameters()),
    "adamw_bnb_8bit": bitsandbytes_adamw,
    "adafactor": lambda model: transformers.Adafactor([p for p in model.parameters() if p.requires_grad]),
    "adam_mini": adam_mini,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_are_those_of_the_real_optimizer(name: str, dtype: torch.dtype) -> None:
    model = Shapes().to(dtype)
    optimizer = REAL[name](model)
    step(model, optimizer)
    assert row(model, name).states == held(optimizer.state)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ("adamw_bnb_8bit", "adam_mini")])
def test_states_on_the_meta_device_are_those_of_the_real_model(name: str) -> None:
    model = llama()
    optimizer = REAL[name](model)
    step(model, optimizer)
    with torch.device("meta"):
        skeleton = transformers.LlamaForCausalLM(model.config)
    estimate = row(skeleton, name)
    assert estimate.states == held(optimizer.state)
    assert estimate.parameters == held(dict(model.named_parameters()))
    assert estimate.gradients == held({n: p.grad for n, p in model.named_parameters()})


def test_adam_mini_counts_two_numbers_where_it_keeps_one_per_head() -> None:
    model = llama()
    optimizer = adam_mini(model)
    step(model, optimizer)
    queries_and_keys = 2 * LLAMA["num_hidden_layers"]
    heads = 4 * queries_and_keys * LLAMA["num_attention_heads"]
    assert row(model, "adam_mini").states == held(optimizer.state) - heads + 8 * queries_and_keys


def test_trainer_keeps_embeddings_out_of_8_bit(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = llama()
    arguments = transformers.TrainingArguments(tmp_path, optim="adamw_bnb_8bit", report_to=[], use_cpu=True)
    optimizer = transformers.Trainer(model, arguments).create_optimizer()
    step(model, optimizer)
    assert row(model, "adamw_bnb_8bit").states == held(optimizer.state)
    assert 2 * 4 * LLAMA["vocab_size"] * LLAMA["hidden_size"] < held(optimizer.state)


def test_tied_and_frozen_weights_count_once_and_as_weights_alone() -> None:
    model = Shapes()
    model.tied = model.large
    estimate = estimate_memory(model, ["sgd_sai"])
    trained = sum(p.numel() for p in model.parameters()) - 11
    assert (estimate.trained, estimate.elements) == (trained, trained + 11)
    (only,) = estimate
    assert (only.parameters, only.gradients, only.states) == (4 * (trained + 11), 4 * trained, 4 * trained)
    assert only.total == 4 * (3 * trained + 11)


def test_lora_on_16_bit_weights_is_float32() -> None:
    lora = {"r": 16, "target_modules": ["q_proj", "v_proj"]}
    model = build_skeleton("llama-2-7b", dtype=torch.bfloat16, lora=lora)
    estimate = estimate_memory(model, ["sgd_sai", "adamw_torch"])
    adapter = 32 * 2 * 16 * (4096 + 4096)
    assert (estimate.trained, estimate.elements) == (adapter, adapter + 6_738_415_616)
    assert [r.parameters for r in estimate] == 2 * [2 * 6_738_415_616 + 4 * adapter]
    assert [r.gradients for r in estimate] == 2 * [4 * adapter]
    assert [r.states for r in estimate] == [4 * adapter, 2 * 4 * adapter + 4 * 32 * 2 * 2]


def test_4_bit_weights_are_those_of_the_quantised_model(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    llama().save_pretrained(tmp_path)
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    config = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantization, device_map="cpu", dtype=torch.float32
    )
    model = peft.get_peft_model(model, peft.LoraConfig(**config))
    packed = 0
    for p in model.parameters():
        packed += p.numel() * p.element_size()
        if state := getattr(p, "quant_state", None):
            nested = [state.state2.absmax, state.state2.code]
            packed += held(dict(enumerate([state.absmax, state.code, state.offset, *nested])))
    # Tables of 16 and 256 numbers count for every layer, also where layers share them.
    skeleton = build_skeleton(str(tmp_path), lora=config, load_in_4bit=True)
    assert row(skeleton, "sgd_sai") == row(model, "sgd_sai")
    assert row(model, "sgd_sai").parameters == packed
    assert packed < 0.6 * row(llama(), "sgd_sai").parameters


@pytest.fixture
def first_of_two_processes() -> Iterator[None]:
    """A process group whose second member does not exist: collectives return at once."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("first_of_two_processes")
@pytest.mark.parametrize("name", ["sgd_sai", "sgd_sai_bf16", "sgd_momentum", "adamw_torch"])
def test_fsdp_shards_are_those_of_the_first_device(name: str) -> None:
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(33, 7), nn.Linear(7, 5, bias=False))
    estimate = row(model, name, devices=2, shardings=["fsdp"])
    fully_shard(model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (2,)))
    optimizer = REAL[name](model)
    model(torch.randn(4, 33)).square().sum().backward()
    optimizer.step()
    assert estimate.states == held(optimizer.state)
    assert estimate.gradients == held({n: p.grad for n, p in model.named_parameters()})
    assert estimate.parameters == held(dict(model.named_parameters())) == 4 * (4 * 33 + 4 + 3 * 7)


@pytest.mark.usefixtures("first_of_two_processes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in REAL if name.startswith("sgd_sai_")])
def test_blocks_rows_and_columns_are_those_of_shards(name: str, dtype: torch.dtype) -> None:
    """With bfloat16 weights and 8 bits 3 bytes an element: stochastic rounding keeps nothing."""
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(200, 90), nn.Linear(90, 130), nn.Linear(130, 64)).to(dtype)
    estimate = row(model, name, devices=2, shardings=["fsdp"])
    fully_shard(model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (2,)))
    optimizer = REAL[name](model)
    for group in optimizer.param_groups:
        group["stochastic_rounding"] = dtype == torch.bfloat16
    model(torch.randn(4, 200, dtype=dtype)).square().sum().backward()
    optimizer.step()
    assert estimate.states == held(optimizer.state)


@pytest.mark.usefixtures("first_of_two_processes")
@pytest.mark.parametrize("name", ["adamw_bnb_8bit", "adafactor"])
def test_optimizers_without_fsdp_states_fail_there(name: str) -> None:
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(128, 64)
    fully_shard(model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (2,)))
    optimizer = REAL[name](model)
    model(torch.randn(4, 128)).square().sum().backward()
    with pytest.raises(RuntimeError, match=r"DTensor|sharding strategy"):
        optimizer.step()


ZERO_WORKER = """
import json, sys, deepspeed, torch
from torch import nn
from hf_sai import SGDSaI, create_sgd_sai_optimizer

found = []
for stage in (1, 2, 3):
    for kind in ("sgd_sai", "adamw_torch"):
        model = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 64))
        optimizer = SGDSaI(model.named_parameters()) if kind == "sgd_sai" else torch.optim.AdamW(model.parameters())
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        engine, zero, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        engine.backward(engine(torch.randn(2, 256, dtype=torch.bfloat16)).float().square().mean())
        engine.step()
        weights = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
        master = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
        states = [t for state in zero.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        found.append([f"zero{stage}", kind, *(sum(t.nbytes for t in ts) for ts in (weights, master, states))])
if torch.distributed.get_rank() == 0:
    open(sys.argv[1], "w").write(json.dumps(found))
"""


@pytest.mark.slow
def test_zero_partitions_are_deepspeeds(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    (tmp_path / "worker.py").write_text(ZERO_WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    subprocess.run([*command, tmp_path / "worker.py", tmp_path / "found.json"], env=environment, check=True)
    model = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 64)).to(torch.bfloat16)
    zero = ["zero1", "zero2", "zero3"]
    expected = estimate_memory(model, ["sgd_sai", "adamw_torch"], devices=2, shardings=zero)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == [[r.sharding, r.optimizer, r.parameters, r.master, r.states] for r in expected]


def test_zero_shards_more_with_every_stage() -> None:
    model = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 64)).to(torch.bfloat16)
    rows = estimate_memory(model, ["sgd_sai"], devices=2, shardings=["ddp", "zero1", "zero2", "zero3"])
    assert [(r.parameters, r.gradients, r.master, r.states) for r in rows] == [
        (328_832, 328_832, 0, 328_832),
        (328_832, 328_832, 328_832, 328_832),
        (328_832, 164_416, 328_832, 328_832),
        (164_416, 164_416, 328_832, 328_832),
    ]


def test_optimizers_that_fail_on_shards_have_no_states_there() -> None:
    rows = {(r.sharding, r.optimizer): r for r in estimate_memory(nn.Linear(70, 70), devices=2)}
    unknown = {key for key, r in rows.items() if r.states is None}
    ours = [name for name in OPTIMIZERS if name.startswith("sgd_sai_")]
    assert unknown == {("fsdp", o) for o in ("adamw_bnb_8bit", "adafactor", "adam_mini")} | {
        (f"zero{stage}", o) for stage in (1, 2, 3) for o in (*ours, "adam_mini")
    }
    assert all(rows[key].total is None for key in unknown)
    # A flat tensor has no rows and columns.
    assert rows["zero1", "adafactor"].states == 4 * (4970 // 2 + 1)


def cuda_blocks(sizes: Iterable[int]) -> int:
    """Bytes of the blocks that CUDA's caching allocator gives to new tensors, which is what a profiler adds up.

    As PYTORCH_CUDA_ALLOC_CONF documents and CUDACachingAllocator.cpp has it: multiples of 512 bytes; above 1 MiB from
    segments of 20 MiB, from 10 MiB on from a segment of their own in steps of 2 MiB; a rest up to 1 MiB stays in the
    block.
    """
    mib = 1024**2
    total = rest = 0
    for size in sizes:
        block = 512 * math.ceil(size / 512)
        if block > mib:
            room = rest if rest >= block else 20 * mib if block < 10 * mib else 2 * mib * math.ceil(block / (2 * mib))
            left = room - block
            if block < 10 * mib:
                rest = left if left > mib else 0
            block = block if left > mib else room
        total += block
    return total


def nano_gpt_xl() -> list[int]:
    """Sizes in the GPT2-1.5B of the authors' profiling script: no biases, vocabulary 50304, q, k, v apart."""
    layer = [1600] + 4 * [1600 * 1600] + [1600] + 2 * [4 * 1600 * 1600]
    return [4 * size for size in (50304 * 1600, 1024 * 1600, *(48 * layer), 1600)]


def test_the_papers_gpt2_state_is_this_many_bytes_in_cuda_blocks() -> None:
    assert sum(nano_gpt_xl()) == 4 * 1_556_840_000
    assert round(sum(nano_gpt_xl()) / 1024**3, 2) == 5.80
    assert round(cuda_blocks(nano_gpt_xl()) / 1024**3, 2) == 5.93
    two_moments = [size for size in nano_gpt_xl() for _ in range(2)]
    assert round(cuda_blocks(two_moments) / 1024**3, 2) == 11.86


def test_the_papers_vit_state_is_this_many_bytes_in_cuda_blocks() -> None:
    # torchvision's order of parameters, as in the authors' script; its query, key and value are one matrix.
    layer = [1280, 1280, 3 * 1280 * 1280, 3 * 1280, 1280 * 1280, 1280, 1280, 1280]
    layer += [5120 * 1280, 5120, 5120 * 1280, 1280]
    sizes = [1280, 1280 * 3 * 14 * 14, 1280, 257 * 1280, *(32 * layer), 1280, 1280, 1000 * 1280, 1000]
    model = build_skeleton("vit-h-14")
    assert sum(sizes) == sum(p.numel() for p in model.parameters())
    assert round(cuda_blocks(4 * size for size in sizes) / 1024**3, 2) == 2.42


def test_llama_2_loses_nothing_to_cuda_blocks() -> None:
    sizes = [4 * p.numel() for p in build_skeleton("llama-2-7b").parameters()]
    assert sum(sizes) == 4 * 6_738_415_616
    assert [round(blocks / 1024**3, 2) for blocks in (sum(sizes), cuda_blocks(sizes))] == [25.10, 25.10]


def test_the_papers_figures_are_near() -> None:
    figures = {"gpt2-xl": (5.93, 0.023), "llama-2-7b": (25.15, 0.002), "vit-h-14": (2.42, 0.03)}
    for name, (figure, tolerance) in figures.items():
        states = row(build_skeleton(name), "sgd_sai").states
        assert states is not None
        assert states / 1024**3 == pytest.approx(figure, rel=tolerance)
        assert states / 1024**3 < figure


def test_error_on_an_unknown_unit_or_a_string_for_names() -> None:
    with pytest.raises(ValueError, match="unit must be one of MB, GB, MiB, GiB, but is 'TB'"):
        estimate_memory(nn.Linear(2, 2)).table("TB")
    with pytest.raises(ValueError, match=r"give a sequence of names, such as \['sgd_sai'\]"):
        estimate_memory(nn.Linear(2, 2), "sgd_sai")


def test_error_on_quantised_weights_that_are_trained() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    with torch.device("meta"):
        model = bitsandbytes.nn.Linear4bit(64, 64)
    model.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="parameter weight is trained but 4-bit; freeze it"):
        estimate_memory(model)
