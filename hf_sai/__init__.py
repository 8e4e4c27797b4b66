"""SGD-SaI for Hugging Face: the optimizer, and its name ``sgd_sai`` in every Trainer script.

Importing this package registers the name with transformers where transformers is installed. The optimizer itself
needs torch alone.
"""

import importlib.util

from hf_sai import distributed, kernels  # noqa: F401 - they register what they know with the optimizer
from hf_sai.groups.param_groups import create_sgd_sai_optimizer, param_groups
from hf_sai.optim.gsnr import GSNRReport, GSNRRow, measure_gsnr
from hf_sai.optim.sgd_sai import SGDSaI
from hf_sai.optim.update import sgd_sai

__all__ = [
    "GSNRReport",
    "GSNRRow",
    "SGDSaI",
    "__version__",
    "create_sgd_sai_optimizer",
    "measure_gsnr",
    "param_groups",
    "sgd_sai",
]

__version__ = "0.1.0"


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


if _is_installed("transformers") and _is_installed("accelerate"):
    from hf_sai.trainer.registration import register

    register()
