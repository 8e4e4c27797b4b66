"""Settings all tests share, and which of them are quick: those that start no process and take no seconds."""

import multiprocessing.process
import os
import sys
from pathlib import Path

import pytest
import torch

# Two test processes on two cores are slower with two threads each; and no test may wait for a network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton reads it when it is imported: without a GPU its interpreter runs our kernels, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

HERE = Path(__file__).parent
#: Folders, files and tests that bear the marker ``longer``; a test may bear it in its own file, too.
LONGER = (
    "benchmarks/test_quality.py::test_the_program_resumes",
    "cli/test_run.py",
    "test_core_import.py",
    "distributed",
    "docs/test_doctests.py::test_docstring_examples_are_true[recipes.common.stdlib_corpus]",
    "docs/test_scaling.py",
    "groups/test_groups.py::test_grouping_needs_torch_alone",
    "groups/test_peft_tuners.py::test_adapters_train_on_a_half_precision_base",
    "groups/test_peft_tuners.py::test_every_parameter_moves",
    "groups/test_peft_tuners.py::test_merging_and_unmerging_keep_scales",
    "groups/test_peft_tuners.py::test_saving_loading_and_resuming_keep_scales",
    "kernels/test_numba_factored.py",
    "kernels/test_triton.py",
    "optim/test_momentum.py::test_every_format_stays_near_the_reference",
    "publishing/test_publish.py",
    "publishing/test_secret_scan.py::test_a_secret_behind_the_first_64_mebibytes_is_found",
    "recipes/common/test_stdlib_corpus.py",
    "recipes/diffusers",
    "recipes/test_gpt2_recipe.py",
    "recipes/test_llama_lora_recipe.py",
    "recipes/test_vit_recipe.py",
    "runs/test_record.py::test_a_file_that_meets_a_real_size_limit",
    "runs/test_record.py::test_the_command_begins_with_the_launcher",
    "runs/test_record.py::test_whatever_loads_has_a_card",
    "trainer/test_callbacks.py::test_the_batch_size_that_auto_find",
    "trainer/test_callbacks.py::test_the_record_and_a_plain_loop_need_no_transformers",
    "trainer/test_range_test.py",
    "trainer/test_registration.py::test_a_spawned_worker",
    "trainer/test_registration.py::test_the_names_are_there_in_whatever_order",
    "trainer/test_registration.py::test_training_args_bin_loads",
    "trainer/test_registration.py::test_transformers_that_has_changed",
)
_OURS = ("python", "accelerate", "torchrun", "hf-sai", "bash", "sh")
_started: list[str] = []


def pytest_collection_modifyitems(items):
    for item in items:
        place = f"{item.path.relative_to(HERE).as_posix()}::{item.name}"
        if any(place.startswith(name) for name in LONGER):
            item.add_marker(pytest.mark.longer)


def _watch(event, arguments):
    # Other programs (a compiler, uname) are asked small questions by the libraries; Python takes seconds to start.
    starts = event in ("subprocess.Popen", "os.posix_spawn", "os.spawn")
    if event in ("os.fork", "os.forkpty") or (starts and Path(os.fsdecode(arguments[0])).name.startswith(_OURS)):
        _started.append(f"{event} {arguments[:1]}")


def _watched_start(self, start=multiprocessing.process.BaseProcess.start):
    _started.append(f"multiprocessing {self.name}")
    start(self)


sys.addaudithook(_watch)
multiprocessing.process.BaseProcess.start = _watched_start  # spawning raises no audit event


@pytest.fixture(autouse=True)
def _quick_tests_start_no_process(request):
    """A test without one of the markers fails if it started a process, so that the quick tests stay quick."""
    _started.clear()
    yield
    if not any(request.node.get_closest_marker(name) for name in ("longer", "slow", "gpu")):
        assert not _started, f"mark this test @pytest.mark.longer, since it started {_started[0]}"
