"""The operators inside what trains networks: DeepSpeed's ZeRO-3, and CUDA graphs."""

import copy
import os
import subprocess
import sys

import pytest
import torch

from engine.kernels import backend, policy_loss, policy_sample

UPDATES = 3
ZERO_3 = {
    "train_batch_size": 4,
    # every weight is partitioned, gathered for its layer and let go, however small
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


class Network(torch.nn.Module):
    """Predictions (B, 12) from latents (B, 12) and a condition, a number."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(13, 32), torch.nn.SiLU(), torch.nn.Linear(32, 12))

    def forward(self, x, condition):
        return self.body(torch.cat([x, x.new_full((x.shape[0], 1), condition)], 1))


def loss_of(network, reference, seed):
    """The loss of one update on steps that some other policy took."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, 4, 12, generator=generator)
    advantage = torch.randn(4, generator=generator)
    with torch.no_grad():
        pred_ref = reference(x, 1.0)
    return policy_loss(
        x, x + noise, network(x, 1.0), 0.9, -0.5, 1.0, torch.full((4,), -1.5), advantage,
        pred_uncond=network(x, 0.0), guidance=2.0, pred_ref=pred_ref, kl_coef=0.1, clip_range=0.2,
    ).loss  # fmt: skip


def check_zero_3():
    """Gradients and weights of updates under ZeRO-3 against those without DeepSpeed; needs a process of its own."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    assert backend.INTERPRETED
    torch.manual_seed(0)
    network, reference = Network(), Network()
    plain = copy.deepcopy(network)
    optimizer, zeros = (torch.optim.AdamW(n.parameters(), lr=1e-2) for n in (plain, network))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(auto_mpi_discovery=False)
    engine, *_ = deepspeed.initialize(model=network, optimizer=zeros, config=ZERO_3, dist_init_required=False)
    assert all(parameter.numel() == 0 for parameter in network.parameters())
    for seed in range(UPDATES):
        optimizer.zero_grad()
        loss_of(plain, reference, seed).backward()
        engine.backward(loss_of(engine, reference, seed))
        for ours, expected in zip(network.parameters(), plain.parameters(), strict=True):
            assert expected.grad.count_nonzero() > 0
            torch.testing.assert_close(safe_get_full_grad(ours), expected.grad, rtol=1e-5, atol=1e-7)
        optimizer.step()
        engine.step()
        for ours, expected in zip(network.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(safe_get_full_fp32_param(ours), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(backend.INTERPRETED, reason="starts the interpreter itself")
def test_updates_under_zero_3_are_those_of_plain_torch():
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in (*ranks, backend.VARIABLE)}
    environment |= {"TRITON_INTERPRET": "1", "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]


@pytest.mark.gpu
@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cuda_graph_replays_a_step_and_its_gradient_on_new_inputs(dtype, drawn, truth):
    if backend.INTERPRETED or not torch.cuda.is_available():
        pytest.skip("no GPU in this process")
    s, other = (truth.batch((5, 4, 8, 8), dtype=dtype, device="cuda", seed=seed) for seed in (0, 1))
    s.seed, other.seed = (torch.tensor(seed, device="cuda") for seed in (3, 4))
    s.offset, other.offset = (torch.tensor(offset, device="cuda") for offset in (0, 5))
    leaves = [s.pred.requires_grad_(), s.pred_uncond.requires_grad_()]

    def step():
        guided = {"pred_uncond": s.pred_uncond, "guidance": 2.0}
        source = {"seed": s.seed, "offset": s.offset} if drawn else {"noise": s.noise}
        x_next, old = policy_sample(s.x, s.pred, 0.9, s.b, s.std, **guided, **source)
        result = policy_loss(
            s.x, x_next, s.pred * 1.01, 0.9, s.b, s.std, old, s.advantage, **guided,
            pred_ref=s.pred_ref, kl_coef=0.1, weight=s.weight, clip_range=0.2,
        )  # fmt: skip
        return [t.detach() for t in (x_next, *result, *torch.autograd.grad(result.loss, leaves))]

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # nothing may be compiled while a graph is captured
        before = step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for name, value in vars(s).items():
            value.copy_(getattr(other, name))
    graph.replay()
    replayed = [t.clone() for t in captured]
    expected = step()
    assert not any(torch.equal(first, second) for first, second in zip(before[:2], replayed[:2], strict=True))
    assert all(torch.equal(ours, eager) for ours, eager in zip(replayed, expected, strict=True))


if __name__ == "__main__":
    check_zero_3()
