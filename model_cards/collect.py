"""Fill this folder from finished runs: of each a folder that ``hf-sai publish`` takes as it is, weights included.

    python model_cards/collect.py                    # all runs of the recipes' demos that are in runs/
    python model_cards/collect.py runs/my_run ...    # these

A folder is written anew when its run is there, and left as it is when not. A run `x` and a run `x_adamw` are twins.
Git keeps record, card, pictures, images and samples; what a model is loaded from is left to the Hub, see .gitignore.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # recipes.common lies in the repository's root

from hf_sai.publishing.artifacts import PICTURES, finish_run
from hf_sai.publishing.cards import CARD_FILE
from hf_sai.publishing.files_to_publish import plan_files
from hf_sai.runs.record import RECORD_FILE, RunRecord
from hf_sai.runs.units import human_bytes
from recipes.common.comparison import markdown_table

HERE = Path(__file__).parent
RUNS = HERE.parent / "runs"
DEMOS = (
    *("gpt2_demo", "gpt2_demo_adamw", "llama_lora_demo", "llama_lora_demo_adamw", "vit_demo", "vit_demo_adamw"),
    *("diffusers_base", "diffusers_flags", "diffusers_flags_adamw"),
)
#: What of a run is small and made to be seen, and so kept by Git.
SHOWN = ("images/*.png", "samples/*.png", "samples/*.txt", "sample.txt")
MAX_FILE_BYTES = 2**20
BEGIN, END = "<!-- runs -->\n", "<!-- /runs -->\n"


def main(argv: Sequence[str]) -> None:
    wanted = [Path(name) for name in argv] or [RUNS / name for name in DEMOS]
    taken = [folder for folder in (copy_run(run) for run in wanted) if folder is not None]
    for folder in taken:  # after all are copied, so that each finds its twin
        finish_run(folder, twins=[twin for twin in twins_of(folder) if (twin / RECORD_FILE).is_file()])
        print(folder)
    readme = HERE / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    readme.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")


def copy_run(run: Path) -> Path | None:
    """Copy what of a finished run is published, and return its folder; None where there is no such run.

    Card and pictures are left out: they are made from the record.
    """
    if not (run / RECORD_FILE).is_file():
        print(f"{run} holds no run: left as it is", file=sys.stderr)
        return None
    record = RunRecord.load(run)
    if record.run.get("status") != "finished":
        print(f"{run} is not finished: left as it is", file=sys.stderr)
        return None
    for path in (path for pattern in SHOWN for path in run.glob(pattern)):
        if path.stat().st_size > MAX_FILE_BYTES:
            sys.exit(f"{path} has {path.stat().st_size:,} bytes; at most {MAX_FILE_BYTES:,} belong here")
    made = (CARD_FILE, RECORD_FILE, f"{PICTURES}/")
    try:
        names = [name for name, _ in plan_files(run).files if not name.startswith(made)]
    except ValueError as reason:
        print(f"{reason}: left as it is", file=sys.stderr)
        return None
    folder = HERE / run.resolve().name
    shutil.rmtree(folder, ignore_errors=True)
    record.twins = []  # told again from this folder, where their records are
    record.save(folder)
    for name in names:
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run / name, copy)
    return folder


def twins_of(folder: Path) -> list[Path]:
    """The folder of the same training with the other optimizer, whether it is there or not."""
    name = folder.name
    return [folder.with_name(name.removesuffix("_adamw") if name.endswith("_adamw") else f"{name}_adamw")]


def table() -> str:
    """The cards in this folder with what was measured, as Markdown."""
    rows = []
    for file in sorted(HERE.glob(f"*/{RECORD_FILE}")):
        record = RunRecord.load(file)
        run, model = record.summary(), record.model.get("base_class") or record.model.get("class", "?")
        scores = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in run["metrics"].items())
        link = f"[{file.parent.name}]({file.parent.name}/README.md)"
        rate = "?" if run["lr"] is None else f"{run['lr']:.3g}"
        state = "?" if run["state_bytes"] is None else human_bytes(run["state_bytes"])
        rows.append([link, model, run["optimizer"], rate, f"{run['steps']:,}", scores, state])
    return markdown_table(["run", "model", "optimizer", "rate", "steps", "measured", "optimizer state"], rows) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
