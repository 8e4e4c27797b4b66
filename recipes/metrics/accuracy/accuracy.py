"""Top-1 accuracy; an `evaluate` metric module.

`evaluate.load("recipes/metrics/accuracy/accuracy.py")` needs no network, unlike `evaluate.load("accuracy")`, which
fetches its module.
"""

import datasets
import evaluate

_DESCRIPTION = """\
Accuracy: the part of the predicted classes that are the right ones.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of int): predicted classes.
    references (list of int): the right ones.

Returns:
    accuracy (float): between 0 and 1.

Example:
    >>> metric = evaluate.load("recipes/metrics/accuracy/accuracy.py")
    >>> metric.compute(predictions=[1, 2, 0, 2], references=[1, 2, 2, 2])
    {'accuracy': 0.75}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Accuracy(evaluate.Metric):
    """The metric; see `_KWARGS_DESCRIPTION`."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions, references):
        right = sum(guess == truth for guess, truth in zip(predictions, references, strict=True))
        return {"accuracy": right / len(references)}
