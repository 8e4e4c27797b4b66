"""Loss and perplexity of a language model from the negative log-likelihoods of texts; an `evaluate` metric module.

`evaluate.load("recipes/metrics/token_nll/token_nll.py")` needs no network and loads no model: whoever runs the model
hands over one number a text, so that logits never have to be kept.
"""

import math

import datasets
import evaluate

_DESCRIPTION = """\
Loss and perplexity over tokens: the summed negative log-likelihood of all texts divided by all predicted tokens, and
its exponential. Texts of different length weigh by their tokens.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of float): for each text, the negative log-likelihood of its tokens, summed, in nats.
    references (list of int): for each text, the number of tokens that were predicted.

Returns:
    loss (float): nats per token.
    perplexity (float): exp(loss); inf where that overflows.

Example:
    >>> metric = evaluate.load("recipes/metrics/token_nll/token_nll.py")
    >>> results = metric.compute(predictions=[2.0, 6.0], references=[1, 3])
    >>> print(results["loss"], round(results["perplexity"], 3))
    2.0 7.389
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class TokenNLL(evaluate.Metric):
    """The metric; see `_KWARGS_DESCRIPTION`."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        tokens = sum(references)
        if tokens <= 0:
            raise ValueError(f"the texts have {tokens} predicted tokens; loss per token needs at least one.")
        loss = math.fsum(predictions) / tokens
        try:
            perplexity = math.exp(loss)
        except OverflowError:
            perplexity = math.inf
        return {"loss": loss, "perplexity": perplexity}
