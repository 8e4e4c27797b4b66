"""What the run record costs: the GPT-2 demo's steps with and without it, in turn, in one process.

    python benchmarks/record_cost.py --pairs 10

The model, the batch and the logging interval are those of recipes/gpt2_pretraining/demo.yaml, on random tokens. Blocks
of one logging interval alternate; the recorder makes the calls that RunRecordCallback makes, may spend as much as it
likes (budget=1), and writes its file in each of its blocks. It reports the recorder's own account in seconds, and the
median of the ratios of neighbouring blocks' processor time, which also holds what the account cannot see.
"""

import argparse
import json
import statistics
import tempfile
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from hf_sai import create_sgd_sai_optimizer
from hf_sai.runs.recorder import RunRecorder

BATCH, LENGTH, VOCABULARY = 8, 128, 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=10, help="pairs of blocks, each with and without (default: 10)")
    parser.add_argument("--interval", type=int, default=20, help="steps of a block, as logging_steps (default: 20)")
    args = parser.parse_args()
    set_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    shape = {"n_layer": 4, "n_embd": 128, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": LENGTH}
    model = GPT2LMHeadModel(GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **ids))
    optimizer = create_sgd_sai_optimizer(model, lr=1e-2, weight_decay=0.01)
    with tempfile.TemporaryDirectory() as folder:
        recorder = RunRecorder(folder, budget=1.0)
        train(model, optimizer, None, 2, 0)  # the first step measures g-SNR and allocates the state
        recorder.start(model, optimizer)
        ratios = []
        for pair in range(args.pairs):
            first = pair * args.interval
            order = (recorder, None) if pair % 2 else (None, recorder)
            seconds = {watched: train(model, optimizer, watched, args.interval, first) for watched in order}
            ratios.append(seconds[recorder] / seconds[None])
        recorder.finish()
    cost = {
        "interval": args.interval,
        "steps": 2 * args.pairs * args.interval,
        "seconds_per_step": recorder.record.summary()["step_seconds"],
        "share_by_its_own_account": recorder.record.overhead,
        "median_ratio_of_processor_times": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4),
    }
    print(json.dumps(cost, indent=2))


def train(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, recorder: RunRecorder | None, steps: int, done: int
):
    """Take some steps and return the processor's seconds, the recorder's calls included where there is one."""
    begun = time.process_time()
    for step in range(done + 1, done + steps + 1):
        logs = step == done + steps
        if recorder:
            recorder.step_begins()
        tokens = torch.randint(VOCABULARY, (BATCH, LENGTH))
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if recorder:
            recorder.update_begins(measure=logs)
        optimizer.step()
        if recorder:
            recorder.update_ends()
        optimizer.zero_grad()
        if recorder:
            recorder.step_ends()
        if recorder and logs:
            recorder.log(step, {"loss": loss.item()})
    return time.process_time() - begun


if __name__ == "__main__":
    main()
