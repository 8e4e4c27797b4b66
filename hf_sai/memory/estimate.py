"""Says what training will keep in memory: bytes of parameters, gradients and optimizer state, per optimizer and device.

Plain arithmetic on the shapes of a model that may stand on the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hf_sai.groups.hidden_matrices import hidden_matrices
from hf_sai.memory.quantised import PACKED
from hf_sai.memory.state_sizes import OPTIMIZERS, Weight
from hf_sai.optim.gsnr import PIECE
from hf_sai.optim.rules.orthogonal import FORMS

__all__ = ["OPTIMIZERS", "SHARDINGS", "UNITS", "MemoryReport", "MemoryRow", "estimate_memory"]

SHARDINGS = ("none", "ddp", "fsdp", "zero1", "zero2", "zero3")

UNITS = {"MB": 1000**2, "GB": 1000**3, "MiB": 1024**2, "GiB": 1024**3}

_NOT_COUNTED = (
    "Not counted: activations, buffers, communication buckets, temporary tensors of the step, the CUDA context and "
    "what its allocator rounds up."
)


@dataclass(frozen=True)
class MemoryRow:
    """Bytes on the fullest device with one optimizer.

    Attributes:
        sharding: One of ``SHARDINGS``.
        optimizer: One of ``OPTIMIZERS``.
        parameters: Trained and frozen weights.
        gradients: Of the trained weights, all of them in memory at once.
        master: The copies of the weights that DeepSpeed ZeRO updates in float32; 0 elsewhere.
        states: What the optimizer keeps, or None if it does not run with this sharding.
        measuring: What SGD-SaI needs for a moment in its first step, beside the gradients, to measure g-SNR; 0 for the
            others. It is not part of the total, which is what stays.
    """

    sharding: str
    optimizer: str
    parameters: int
    gradients: int
    master: int
    states: int | None
    measuring: int = 0

    @property
    def total(self) -> int | None:
        """The sum, or None if ``states`` is."""
        return None if self.states is None else self.parameters + self.gradients + self.master + self.states


@dataclass(frozen=True)
class MemoryReport:
    """What :func:`estimate_memory` returns: iterate it for its rows, or show it (``str(report)``, ``table``).

    Attributes:
        rows: One for each sharding and optimizer.
        devices: Number of devices that share the work.
        elements: Numbers in the model's parameters; tied weights count once.
        trained: How many of these are trained.
        dtypes: The parameters' dtypes as text, the most frequent first.
    """

    rows: tuple[MemoryRow, ...]
    devices: int
    elements: int
    trained: int
    dtypes: str

    def __iter__(self) -> Iterator[MemoryRow]:
        return iter(self.rows)

    def __str__(self) -> str:
        return self.table()

    def table(self, unit: str | None = None) -> str:
        """Returns the rows as a table, with what is not counted below it.

        Args:
            unit: MB, GB (powers of 1000), MiB or GiB (of 1024). Default: GB, or MB if the gradients are below 0.1 GB.

        Raises:
            ValueError: An unknown unit.
        """
        if unit is not None and unit not in UNITS:
            raise ValueError(f"unit must be one of {', '.join(UNITS)}, but is {unit!r}")
        if unit is None:
            unit = "GB" if all(row.gradients >= 0.1 * UNITS["GB"] for row in self.rows) else "MB"
        columns = ["parameters", "gradients", "master", "states", "total"]
        if not any(row.master for row in self.rows):
            columns.remove("master")
        lines = [["sharding", "optimizer", *columns]]
        for row in self.rows:
            values = [getattr(row, column) for column in columns]
            shown = ["-" if value is None else f"{value / UNITS[unit]:,.2f}" for value in values]
            lines.append([row.sharding, row.optimizer, *shown])
        if self.devices == 1:
            lines = [line[1:] for line in lines]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts = len(lines[0]) - len(columns)
        table = [
            "  ".join(
                c.ljust(w) if i < texts else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        per = "on one device" if self.devices == 1 else f"on each of {self.devices} devices"
        head = f"{self.elements:,} parameters ({self.dtypes}), {self.trained:,} trained; {unit} {per}"
        notes = [_NOT_COUNTED]
        if measuring := max(row.measuring for row in self.rows):
            size = f"{measuring / UNITS[unit]:,.2f}"
            notes.append(f"SGD-SaI's first step takes {size} {unit} more for a moment, to measure g-SNR in pieces.")
        if any(row.states is None for row in self.rows):
            notes.append("- : the optimizer does not run with this sharding, or its state there is not known.")
        return "\n".join([head, "", *table, "", *notes])


def estimate_memory(
    model: nn.Module,
    optimizers: Sequence[str] | None = None,
    *,
    devices: int = 1,
    shardings: Sequence[str] | None = None,
) -> MemoryReport:
    """Estimates what training ``model`` keeps in memory beside activations.

    Args:
        model: Any module, on any device, meta included; its dtypes and ``requires_grad`` are taken as they are. Weights
            that are quantised (bitsandbytes, or as ``build_skeleton`` finds them saved) are counted packed.
        optimizers: Keys of ``OPTIMIZERS``. Default: all.
        devices: Devices that share the work.
        shardings: How they do, of ``SHARDINGS``: ``fsdp`` is FSDP2 with every parameter sharded, ``zero1`` to
            ``zero3`` are DeepSpeed's. Default: ``none`` on one device, on several all others that are known for the
            model.

    Returns:
        A row for each sharding and optimizer, in bytes.

    Raises:
        ValueError: An unknown name, a number of devices that does not fit, or nothing to train.

    Example:
        >>> from torch import nn
        >>> print(estimate_memory(nn.Linear(1000, 1000), ["sgd_sai", "adamw_torch"]))
        1,001,000 parameters (float32), 1,001,000 trained; MB on one device
        <BLANKLINE>
        optimizer    parameters  gradients  states  total
        sgd_sai            4.00       4.00    4.00  12.01
        adamw_torch        4.00       4.00    8.01  16.02
        <BLANKLINE>
        Not counted: activations, buffers, communication buckets, temporary tensors of the step, the CUDA context and what its allocator rounds up.
        SGD-SaI's first step takes 8.00 MB more for a moment, to measure g-SNR in pieces.
    """  # noqa: E501
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1:
        raise ValueError(f"devices must be a whole number above 0, but is {devices!r}")
    optimizers = _known("optimizers", OPTIMIZERS if optimizers is None else optimizers, OPTIMIZERS)
    weights = list(_weights(model))
    if not any(weight.trained for weight in weights):
        raise ValueError(
            f"nothing to train: none of the {len(weights)} parameters of {type(model).__name__} has requires_grad. "
            "Add an adapter (lora=... for a base in 4 bits) or call model.requires_grad_(True)"
        )
    shardings = _shardings(shardings, devices, any(weight.packed for weight in weights))
    rows = []
    for sharding in shardings:
        layout = _layout(weights, sharding, devices)
        for optimizer in optimizers:
            runs = sharding in _WHOLE or optimizer in _RUNS_ON[sharding]
            states = OPTIMIZERS[optimizer](layout.updated) if runs else None
            kept = (layout.parameters, layout.gradients, layout.master, states)
            rows.append(MemoryRow(sharding, optimizer, *kept, _measuring(layout.updated, optimizer)))
    elements: dict[str, int] = {}
    for weight in weights:
        elements[weight.dtype] = elements.get(weight.dtype, 0) + weight.numel
    return MemoryReport(
        rows=tuple(rows),
        devices=devices,
        elements=sum(elements.values()),
        trained=sum(weight.numel for weight in weights if weight.trained),
        dtypes=", ".join(sorted(elements, key=lambda dtype: -elements[dtype])),
    )


@dataclass(frozen=True)
class _Layout:
    """Bytes on one device, and what its optimizer updates."""

    parameters: int
    gradients: int
    master: int
    updated: list[Weight]


_WHOLE = ("none", "ddp")  # every device has every parameter

# Seen with torch 2.13: bitsandbytes' kernels and Adafactor's factors mix DTensors with plain tensors, and fail.
# Adam-mini needs names and whole tensors, which ZeRO's flat ones do not have. What SGDSaI keeps under ZeRO of rows,
# columns and blocks depends on where DeepSpeed cuts, and is not known here; its orthogonal rule does not run there.
_ELEMENTWISE = ("sgd_sai", "sgd_momentum", "adamw_torch")
_FLAT = (*_ELEMENTWISE, "adamw_bnb_8bit", "adafactor")
_RUNS_ON = {
    "fsdp": (*_ELEMENTWISE, *(name for name in OPTIMIZERS if name.startswith("sgd_sai_"))),
    "zero1": _FLAT,
    "zero2": _FLAT,
    "zero3": _FLAT,
}


def _weights(model: nn.Module) -> Iterator[Weight]:
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    forms = hidden_matrices(model)
    for name, p in model.named_parameters():
        packed, kind, shape = _packed(p)
        if p.requires_grad and (packed or not p.is_floating_point()):
            kind = kind or str(p.dtype)
            raise ValueError(f"parameter {name} is trained but {kind}; freeze it (requires_grad_(False)), use LoRA")
        yield Weight(
            shape=tuple(shape),
            itemsize=p.element_size(),
            dtype=kind or str(p.dtype).removeprefix("torch."),
            name=name,
            trained=p.requires_grad,
            is_embedding=id(p) in embeddings,
            row_dims=FORMS[forms[id(p)]] if id(p) in forms else (),
            packed=packed,
        )


def _measuring(updated: Sequence[Weight], optimizer: str) -> int:
    largest = max((weight.numel for weight in updated), default=0)
    return 8 * min(PIECE, largest) if optimizer.startswith("sgd_sai") else 0  # float64, piece by piece


def _packed(p: Any) -> tuple[int, str, tuple[int, ...]]:
    """Bytes, kind and shape of a quantised weight; 0 and no kind for any other."""
    if saved := getattr(p, PACKED, None):
        return (*saved, tuple(p.shape))
    if type(p).__name__ == "Params4bit":
        nbytes, shape = _packed_4bit(p)
        return nbytes, "4-bit", shape
    if type(p).__name__ == "Int8Params":  # a float32 scale for each row
        return p.numel() + 4 * p.shape[0], "8-bit", tuple(p.shape)
    return 0, "", tuple(p.shape)


def _packed_4bit(p: Any) -> tuple[int, tuple[int, ...]]:
    """Bytes and shape of a weight that bitsandbytes quantises, or has quantised, to 4 bits."""
    shape = p.shape if p.quant_state is None else p.quant_state.shape
    numel = math.prod(shape)
    blocks = math.ceil(numel / p.blocksize)
    scales = 4 * blocks
    if p.compress_statistics:  # a byte each, with scales of their own, a table of 256 and an offset
        scales = blocks + 4 * math.ceil(blocks / 256) + 4 * 256 + 4
    return math.ceil(numel / 2) + scales + 4 * 16, tuple(shape)


def _layout(weights: Sequence[Weight], sharding: str, devices: int) -> _Layout:
    trained = [weight for weight in weights if weight.trained]
    everything = sum(weight.nbytes for weight in weights)
    gradients = sum(weight.nbytes for weight in trained)
    if sharding in _WHOLE:
        return _Layout(everything, gradients, 0, trained)
    if sharding == "fsdp":
        shards = [_first_shard(weight, devices) for weight in trained]
        kept = sum(_first_shard(weight, devices).nbytes for weight in weights)
        return _Layout(kept, sum(shard.nbytes for shard in shards), 0, shards)

    # DeepSpeed's optimizer updates a flat float32 copy (seen with 0.19, of float32 models too). What it pads, a few
    # elements, is left out.
    partition = Weight((math.ceil(sum(weight.numel for weight in trained) / devices),), itemsize=4)
    if sharding == "zero3":
        everything = sum(math.ceil(weight.numel / devices) * weight.itemsize for weight in weights)
    if sharding != "zero1":
        gradients = sum(math.ceil(weight.numel / devices) * weight.itemsize for weight in trained)
    return _Layout(everything, gradients, partition.nbytes, [partition])


def _first_shard(weight: Weight, devices: int) -> Weight:
    """What FSDP2 leaves on the first device, the fullest: a part of the first dimension."""
    if not weight.shape:
        return weight
    shape = (math.ceil(weight.shape[0] / devices), *weight.shape[1:])
    return replace(weight, shape=shape)


def _shardings(shardings: Sequence[str] | None, devices: int, has_4bit: bool) -> list[str]:
    if shardings is None:
        known = SHARDINGS[:1] if devices == 1 else SHARDINGS[1:]
        return [sharding for sharding in known if not (has_4bit and sharding in ("fsdp", "zero3"))]
    known_shardings = _known("shardings", shardings, SHARDINGS)
    for sharding in known_shardings:
        if (sharding == "none") != (devices == 1):
            cure = "name another" if sharding == "none" else "give 2 devices or more"
            raise ValueError(f"sharding {sharding} does not fit {devices} device{'s'[: devices > 1]}; {cure}")
        if has_4bit and sharding in ("fsdp", "zero3"):
            raise ValueError(f"sharding {sharding} of 4-bit weights is not known here; use ddp, zero1 or zero2")
    return known_shardings


def _known(argument: str, given: Iterable[str], allowed: Iterable[str]) -> list[str]:
    allowed = list(allowed)
    if isinstance(given, str):
        raise ValueError(f"{argument} is the string {given!r}: give a sequence of names, such as [{given!r}]")
    names = list(dict.fromkeys(given))
    unknown = [name for name in names if name not in allowed]
    if unknown or not names:
        got = ", ".join(map(repr, unknown)) or "nothing"
        raise ValueError(f"{argument} names {got}; allowed: {', '.join(allowed)}")
    return names
