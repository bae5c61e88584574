"""What a call costs the host before any arithmetic: checks, dispatch, autograd, and the launches.

    python -m bench.host [--json FILE]

With a GPU the calls are real, on latents too small to wait for. Without one they go through Triton to a driver that
does nothing, so the figure lacks the GPU driver's own part of a launch. Two rows that do next to nothing show what of
it is PyTorch's: forward and backward of `(pred * 2).sum()`, and of an autograd.Function with the inputs of the loss.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bench.null_driver import null_driver
from bench.record import machine, write_json
from engine.kernels import group_advantage, policy_divergence, policy_log_prob, policy_loss, policy_sample

CALLS, REPEATS = 200, 40


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, x_next, pred, uncond, ref, a, b, std, old, advantage, weight, numbers):
        ctx.save_for_backward(a, b, x, x_next, pred, uncond, ref)
        ctx.set_materialize_grads(False)
        return torch.empty((), device=x.device)

    @staticmethod
    def backward(ctx, grad):
        return None, None, torch.empty_like(ctx.saved_tensors[4]), *(None,) * 9


def calls(device: str) -> dict[str, Callable[[], object]]:
    """Name and call of every row, on 8 bf16 latents (4, 8, 8)."""
    x, x_next, pred, noise, reference = (torch.randn(8, 4, 8, 8, device=device).bfloat16() for _ in range(5))
    a, b, std, old, advantage = (torch.rand(8, device=device) + 0.5 for _ in range(5))
    offset = torch.zeros((), dtype=torch.int64, device=device)
    one, rows = torch.ones((), device=device), torch.ones(8, device=device)
    pred.requires_grad_()

    def differentiated(function: Callable[[], Tensor], grad: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(), pred, grad)

    step = (x, x_next, pred, a, b, std)
    return {
        "(pred * 2).sum(), f+b": differentiated(lambda: (pred * 2).sum(), one.bfloat16()),
        "empty Function, f+b": differentiated(
            lambda: _Nothing.apply(x, x_next, pred, None, None, a, b, std, old, advantage, None, (1.0,)), one
        ),
        "group_advantage": lambda: group_advantage(advantage, 4),
        "policy_sample, noise given": lambda: policy_sample(x, pred, a, b, std, noise=noise),
        "policy_sample, noise drawn": lambda: policy_sample(x, pred, a, b, std, seed=offset, offset=offset),
        "policy_log_prob, f+b": differentiated(lambda: policy_log_prob(*step), rows),
        "policy_divergence, f+b": differentiated(lambda: policy_divergence(pred, reference, b, std), rows),
        "policy_loss, f": lambda: policy_loss(*step, old, advantage),
        "policy_loss, f+b": differentiated(lambda: policy_loss(*step, old, advantage).loss, one),
        "policy_loss with reference, f+b": differentiated(
            lambda: policy_loss(*step, old, advantage, pred_ref=reference, kl_coef=0.1).loss, one
        ),
    }


def microseconds(call: Callable[[], object], device: str) -> tuple[float, float]:
    """(least, median) time of one call over batches of calls: the least is the one without neighbours."""
    times = []
    for _ in range(REPEATS + 3):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return min(times[3:]), statistics.median(times[3:])


def main() -> None:
    """Print the table, and write it with --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the rows here too")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    launches = "real" if device == "cuda" else "to a driver that does nothing"
    print(f"microseconds of host time a call, launches {launches}\n{'':34}{'least':>8}{'median':>8}")
    rows = []
    with contextlib.nullcontext() if device == "cuda" else null_driver():
        for name, call in calls(device).items():
            least, median = microseconds(call, device)
            rows.append({"call": name, "least_us": round(least, 1), "median_us": round(median, 1)})
            print(f"{name:34}{least:8.1f}{median:8.1f}", flush=True)
    if options.json:
        write_json(options.json, {"machine": machine(device), "launches": launches, "rows": rows})


if __name__ == "__main__":
    main()
