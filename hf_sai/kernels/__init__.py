"""The same arithmetic, faster: kernels by numba, Triton, torch and bitsandbytes, and which of them takes a tensor."""
