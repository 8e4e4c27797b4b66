"""Makes the docstrings readable for the site's reference: roles become code, formulas text, examples code blocks."""

import re
import textwrap
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([^`]+)`")
FORMULA = re.compile(r":math:`([^`]+)`")
DISPLAYED = re.compile(r"^\.\. math::\n((?:    .*\n|\n)+)", re.MULTILINE)
#: What a formula's names are as signs; the longer ones first.
SIGNS = {
    **{
        r"\text": "",
        r"\approx": "≈",
        r"\quad": "  ",
        r"\qquad": "    ",
        r"\sqrt": "√",
        r"\\": "",
        "&&": "    ",
        "&": "",
    },
    **{
        r"\leftarrow": "←",
        r"\Delta": "Δ",
        r"\epsilon": "ε",
        r"\gamma": "γ",  # noqa: RUF001
        r"\lambda": "λ",
        r"\mu": "μ",
        r"\sigma": "σ",  # noqa: RUF001
    },
    **{r"\theta": "θ", r"\,": " ", r"\|": "‖", "_{t-1}": "ₜ₋₁", "_t": "ₜ", "_1": "₁", "_2": "₂"},
}


class PlainDocstrings(griffe.Extension):
    """Rewrites each docstring once it is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Write roles and formulas as code, and give examples the head that makes them code blocks."""
        if obj.docstring:
            text = ROLE.sub(r"`\1`", obj.docstring.value)
            text = DISPLAYED.sub(lambda block: f"```text\n{_in_signs(textwrap.dedent(block[1]))}```\n\n", text)
            text = FORMULA.sub(lambda formula: f"`{_in_signs(formula[1])}`", text)
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)


def _in_signs(formula: str) -> str:
    for name, sign in SIGNS.items():
        formula = formula.replace(name, sign)
    return re.sub(r"[{}]", "", formula)
