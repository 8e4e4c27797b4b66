"""How large SGD-SaI's first updates are beside AdamW's, in any Trainer script: would that translate a learning rate?

    python benchmarks/update_size.py recipes/gpt2_pretraining/train.py recipes/gpt2_pretraining/demo.yaml \\
        --optim sgd_sai --learning_rate 1e-2
    python benchmarks/update_size.py recipes/llama_lora/benchmark.py recipes/llama_lora/benchmark.yaml \\
        --results runs/update_size.json --candidates sgd_sai

At a learning rate of 1, AdamW's first update is 1 or -1 in every element, SGD-SaI's the g-SNR of the tensor times the
gradient. Printed is the root mean square of the latter over all measured elements, step by step, with the gradients
as the optimizer gets them (clipped), and 1 over its largest value so far: the factor on AdamW's learning rate that
would make the updates equally large. The script ends after the steps. docs/learning_rate.md says what came out.
"""

import argparse
import math

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from watched_run import watch_steps

from hf_sai import SGDSaI


def main() -> None:
    parser = argparse.ArgumentParser(description="The size of SGD-SaI's first updates in a Trainer script.")
    parser.add_argument("--steps", type=int, default=12, help="how many steps to watch (default: 12)")
    parser.add_argument("script", help="path of a script that trains with SGD-SaI")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own")
    args = parser.parse_args()
    sizes: list[float] = []

    def look(optimizer: SGDSaI) -> None:
        sizes.append(update_size(optimizer))
        print(f"step {len(sizes)}: RMS of G g {sizes[-1]:.4f}, factor {1 / max(sizes):.2f}", flush=True)

    watch_steps(args.script, args.arguments, args.steps, register_optimizer_step_post_hook, look)


def update_size(optimizer: SGDSaI) -> float:
    """Return the root mean square of g-SNR times gradient over the elements of all measured parameters."""
    squares, count = 0.0, 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            gsnr = optimizer.state[p].get("gsnr", 0.0) if p.grad is not None else 0.0
            if gsnr:
                squares += (gsnr * torch.linalg.vector_norm(p.grad, dtype=torch.float64).item()) ** 2
                count += p.numel()
    return math.sqrt(squares / count) if count else 0.0


if __name__ == "__main__":
    main()
