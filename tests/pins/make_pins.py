"""Records the pins: ``python tests/pins/make_pins.py``; ``--spread`` shows how far apart its paths are."""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from cases import CASES
from comparison import excesses
from safetensors import safe_open
from safetensors.torch import save_file
from training import Outcome, train

import hf_sai

PINS = Path(__file__).with_name("pins.safetensors")


def main():
    torch.set_num_threads(1)
    if "--spread" in sys.argv:
        return show_spread()
    tensors, hashes = {}, {}
    for name, case in CASES.items():
        outcome = train(case)
        for key in ("movement", "momentum", "norms", "gsnr"):
            tensors[f"{name}: {key}"] = getattr(outcome, key)
        hashes[name] = outcome.sha256
    made_with = {
        "hf_sai": hf_sai.__version__, "torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()
    }  # fmt: skip
    save_file(tensors, PINS, {"sha256": json.dumps(hashes), "made_with": json.dumps(made_with)})
    print(len(CASES), "cases,", PINS.stat().st_size, "bytes")


def load_pins():
    """Name of a case -> its outcome."""
    with safe_open(PINS, "pt") as file:
        hashes = json.loads(file.metadata()["sha256"])
        keys = ("movement", "momentum", "norms", "gsnr")
        return {
            name: Outcome(**{key: file.get_tensor(f"{name}: {key}") for key in keys}, sha256=sha256)
            for name, sha256 in hashes.items()
        }


def show_spread():
    """The paths round differently: how far the trainings of one case on all paths are from the plain one's."""
    pins = load_pins()
    for name, case in CASES.items():
        plain = name.replace(f" {case.path} ", " plain ")
        if case.path != "plain" and plain in pins:
            far = excesses(pins[name], pins[plain], case)
            worst = max(far, key=far.get)
            print(f"{far[worst]:.2f} of what is allowed:", name, "|", worst)


if __name__ == "__main__":
    main()
