"""Parameters in pieces: DTensor (FSDP2, HSDP, tensor parallelism), FSDP1 and DeepSpeed ZeRO.

Importing this lets the optimizer know them.
"""

from hf_sai.distributed import dtensor, fsdp1, zero

__all__ = ["dtensor", "fsdp1", "zero"]
