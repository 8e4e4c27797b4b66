"""The update rules, one file each: what a rule does to a gradient before the momentum, and what g-SNR scales."""

from hf_sai.optim.rules.averaged import Averaged
from hf_sai.optim.rules.factored import Factored
from hf_sai.optim.rules.orthogonal import Orthogonal
from hf_sai.optim.rules.published import Published
from hf_sai.optim.rules.rows import Rows

__all__ = ["RULES"]

#: What ``update`` can be -> the rule.
RULES: dict[str, Published] = {rule.name: rule for rule in (Published(), Rows(), Factored(), Averaged(), Orthogonal())}
