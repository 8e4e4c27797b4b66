"""The same arithmetic, faster: kernels by numba, Triton, torch and bitsandbytes, and which of them takes a tensor.

Importing this lets the optimizer know them; what they are written in is imported when one is first asked for.
"""

from hf_sai.kernels import choice

__all__ = ["choice"]
