"""Draws README's picture, loss over steps and bytes of state, from the demos' records.

    python benchmarks/headline_picture.py     # what `make results` runs

The records are those of model_cards/gpt2_demo and its AdamW twin, which `make demo` and `make model-cards` leave. The
picture keeps their digest in its metadata, by which a test sees that it is out of date.
"""

from __future__ import annotations

import hashlib
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # hf_sai lies in the repository's root

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from hf_sai.runs.files import atomic_write
from hf_sai.runs.record import RECORD_FILE, RunRecord

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "headline.png"
#: Run, colour, marker: told apart without colour, too.
RUNS = (("gpt2_demo_adamw", "#b4541a", "s"), ("gpt2_demo", "#00796b", "o"))


def main() -> None:
    atomic_write(PICTURE, draw())
    print(PICTURE.relative_to(ROOT))


def digest() -> str:
    """Of the records that the picture is drawn from."""
    files = (ROOT / "model_cards" / run / RECORD_FILE for run, _, _ in RUNS)
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def name(optimizer: dict) -> str:
    """What a record's optimizer is called in the picture."""
    options = optimizer["options"]
    rule = options.get("update", options.get("normalize_gradient"))  # the latter in records of before
    if optimizer["name"] == "SGDSaI":
        return f"SGD-SaI, {rule or 'published'}"
    beta1 = options["betas"][0]
    return "AdamW" if beta1 == 0.9 else f"AdamW, beta1 {beta1:g}"


def draw() -> bytes:
    """The picture as a PNG file."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (curves, bars) = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=(2, 1), layout="constrained")
    for run, colour, marker in RUNS:
        record = RunRecord.load(ROOT / "model_cards" / run)
        label = name(record.optimizer)
        losses = dict(record.curve("eval_loss"))  # the last evaluation is logged twice
        curves.plot(list(losses), list(losses.values()), color=colour, marker=marker, label=label)
        state = record.state_bytes / 1e6
        bars.barh(label, state, color=colour, height=0.6)
        bars.text(state, label, f" {state:.1f}", va="center")
    curves.set(xlabel="step", ylabel="evaluation loss", title="GPT-2 from scratch, 1.1 million parameters, one seed")
    curves.legend(frameon=False)
    bars.set(xlabel="MB", title="optimizer state", xlim=(0, 10.5))
    bars.invert_yaxis()
    for axes in (curves, bars):
        axes.title.set_size(11)
        axes.title.set_horizontalalignment("center")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=160, metadata={"Source": digest(), "Software": None})
    plt.close(figure)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
