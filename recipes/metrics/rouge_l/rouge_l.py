"""ROUGE-L of texts against their references; an `evaluate` metric module.

`evaluate.load("recipes/metrics/rouge_l/rouge_l.py")` needs no network, unlike `evaluate.load("rouge")`, which fetches
its module. The scores are the `rouge_score` package's own.
"""

import statistics

import datasets
import evaluate
from rouge_score.rouge_scorer import RougeScorer

_DESCRIPTION = """\
ROUGE-L (Lin, 2004): the F-measure of the longest common subsequence of words, averaged over the texts. Words are runs
of letters and digits, in lower case, not stemmed.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of str): generated texts.
    references (list of str): what each of them should be.

Returns:
    rouge_l (float): between 0 and 1.

Example:
    >>> metric = evaluate.load("recipes/metrics/rouge_l/rouge_l.py")
    >>> results = metric.compute(predictions=["Return the name."], references=["Return the full name."])
    >>> print(round(results["rouge_l"], 3))
    0.857
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class RougeL(evaluate.Metric):
    """The metric; see `_KWARGS_DESCRIPTION`."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references):
        scorer = RougeScorer(["rougeL"])
        pairs = zip(references, predictions, strict=True)
        return {"rouge_l": statistics.fmean(scorer.score(*pair)["rougeL"].fmeasure for pair in pairs)}
