"""Parameters in pieces or in copies: DTensor (FSDP2, HSDP, tensor parallelism), FSDP1, DeepSpeed ZeRO; DDP.

Importing this lets the optimizer know them.
"""

from hf_sai.distributed import ddp, dtensor, fsdp1, zero

__all__ = ["ddp", "dtensor", "fsdp1", "zero"]
