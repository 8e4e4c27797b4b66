"""Parameters in pieces: DTensor (FSDP2, HSDP, tensor parallelism), FSDP1 and DeepSpeed ZeRO."""
