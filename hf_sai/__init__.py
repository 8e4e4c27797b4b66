"""SGD-SaI for Hugging Face: the optimizer, and its name ``sgd_sai`` in every Trainer script and in timm.

Importing this package imports torch alone. The name is there as soon as transformers' TrainingArguments or timm's
optimizers are, whichever is imported first.
"""

from hf_sai import distributed, kernels  # noqa: F401 - they register what they know with the optimizer
from hf_sai.groups.param_groups import create_sgd_sai_optimizer, param_groups
from hf_sai.optim.gsnr import GSNRReport, GSNRRow, measure_gsnr
from hf_sai.optim.sgd_sai import SGDSaI
from hf_sai.optim.update import sgd_sai
from hf_sai.timm import register as register_with_timm
from hf_sai.trainer.registration import register

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

register()
register_with_timm()
