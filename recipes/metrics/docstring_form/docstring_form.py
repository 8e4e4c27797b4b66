"""Share of texts that are a docstring as one writes it into code; an `evaluate` metric module.

`evaluate.load("recipes/metrics/docstring_form/docstring_form.py")` needs no network.
"""

import ast
import statistics

import datasets
import evaluate

_DESCRIPTION = """\
The exact share of texts that can be pasted under a `def` as they are: one string literal in three double quotes that
Python can parse, not blank, with nothing before or after it.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of str): generated texts.

Returns:
    well_formed (float): between 0 and 1.

Example:
    >>> metric = evaluate.load("recipes/metrics/docstring_form/docstring_form.py")
    >>> print(metric.compute(predictions=['\"\"\"Return x.\"\"\"', "Here is your docstring."])["well_formed"])
    0.5
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class DocstringForm(evaluate.Metric):
    """The metric; see `_KWARGS_DESCRIPTION`."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions):
        return {"well_formed": statistics.fmean(map(is_docstring, predictions))}


def is_docstring(text):
    """Whether the text is one triple-quoted string and nothing else."""
    text = text.strip()
    if not (text.startswith('"""') and text.endswith('"""') and '"""' not in text[3:-3]):
        return False
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return False
    return isinstance(value, str) and bool(value.strip())
