"""The notebook of diffusers runs from top to bottom on a checkpoint that knows nothing."""

import pytest

from notebooks import run_notebook


@pytest.mark.slow
def test_stable_diffusion_lora(tiny, tmp_path):
    parameters = f"MODEL, RESOLUTION, STEPS, BATCH = {str(tiny)!r}, 16, 60, 8"
    run_notebook("stable_diffusion_lora.ipynb", tmp_path, parameters=parameters, run="runs/sd_lora")
