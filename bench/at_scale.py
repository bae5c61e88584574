"""The cost model carried on paper to large models and many GPUs. Nothing here is measured but the counts of work.

    python -m bench.at_scale [--json FILE]

The work of a network pass and of a decoded image is counted on tensors without memory; seconds follow from ASSUMED, and
from nothing else. Compute and traffic are added, as if none of it overlapped. docs/scaling.md reads the table.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.cost_model import Job, memory_bytes, messages, rollout_calls, update_calls, wire_bytes
from bench.record import machine, write_json

ASSUMED = {
    "peak": 989e12,  # FLOP/s of a GPU in bf16, dense: H100 SXM's data sheet
    "utilisation": 0.4,  # of it, in forward and backward alike
    "memory": 80e9,  # bytes of a GPU
    "node": 8,  # GPUs that share a fast link
    "node_bandwidth": 300e9,  # bytes/s of a GPU in a ring inside a node (450 GB/s a direction, two thirds of it used)
    "bandwidth": 40e9,  # bytes/s of a GPU in a ring across nodes (a 400 Gbit/s port each, 80 % of it used)
    "latency": 20e-6,  # seconds of a collective for each doubling of the ranks
    "object": 100e-6,  # seconds to unpack one rank's figures, in each of GATHERS: pickle.loads of a small tensor here
    "encoder": 0.16e12,  # FLOPs of a reward encoder on one image: ViT-L/14 at 224 pixels
    "file_system": 10e9,  # bytes/s of the shared disk, for all ranks together
}
GATHERS = 5  # of figures in an iteration, each an all-gather of pickled objects (engine/ranks.py)
BUCKETS = {0: 5e8, 1: 5e8, 2: 5e8, 3: 5e7}
"""ZeRO stage -> most elements in a collective of weights or gradients, by DeepSpeed's defaults (stage 3: prefetch)."""


@dataclass(frozen=True)
class Model:
    """A network to distill, built without memory.

    Attributes:
        build: the network.
        inputs: of one latent.
        evaluations: of the network at a step: 2 with guidance.
        decoder: the decoder of images and its latents, for the reward.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    evaluations: int
    decoder: tuple[int, int]


def _sd15() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)


def _sdxl() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(guidance_embeds=True)


def _unet_inputs(side: int, width: int, pooled: bool) -> dict[str, Any]:
    inputs = {"sample": torch.empty(1, 4, side, side), "timestep": torch.empty(1)}
    inputs["encoder_hidden_states"] = torch.empty(1, 77, width)
    if pooled:
        inputs["added_cond_kwargs"] = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
    return inputs


def _flux_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.empty(1, 4096, 64),
        "encoder_hidden_states": torch.empty(1, 512, 4096),
        "pooled_projections": torch.empty(1, 768),
        "timestep": torch.empty(1),
        "img_ids": torch.empty(4096, 3),
        "txt_ids": torch.empty(512, 3),
        "guidance": torch.empty(1),
    }


MODELS = {
    "SD1.5, 512 pixels": Model(_sd15, lambda: _unet_inputs(64, 768, pooled=False), 2, (4, 64)),
    "SDXL, 1024 pixels": Model(_sdxl, lambda: _unet_inputs(128, 2048, pooled=True), 2, (4, 128)),
    "FLUX.1, 1024 pixels": Model(_flux, _flux_inputs, 1, (16, 128)),
}
GPUS = (8, 64, 1000)
JOB = Job(conditions=64, group_size=8, steps=5, prefix=0, window=1, micro_batch=8, rollout_batch=8)
"""The default's sizes, one group to a network call; with more GPUs than conditions, as many conditions as GPUs."""
TEACHER_STEPS = 50


def count(model: Model) -> dict[str, float]:
    """Parameters, tensors of parameters, FLOPs of a pass and of a decoded image."""
    from diffusers import AutoencoderKL

    channels, side = model.decoder
    with torch.device("meta"), torch.no_grad():
        network = model.build()
        vae = AutoencoderKL(
            latent_channels=channels,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        return {
            "parameters": sum(value.numel() for value in network.parameters()),
            "tensors": len(list(network.parameters())),
            "pass": flops(lambda: network(**model.inputs())),
            "decode": flops(lambda: vae.decode(torch.empty(1, channels, side, side))),
        }


def flops(function: Callable[[], object]) -> int:
    """Of matrix products, convolutions and attention: a multiplication and an addition are two."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def carry(counted: dict[str, float], job: Job, tensors: int) -> dict[str, float]:
    """Seconds of an iteration by what takes them, the mean over the window's places, and bytes of memory of a GPU."""
    places = [replace(job, prefix=prefix) for prefix in range(job.steps - 1)]
    parameters, rate = counted["parameters"], ASSUMED["peak"] * ASSUMED["utilisation"]
    latents = fmean(sum(rollout_calls(place)) + 3 * sum(update_calls(place)) for place in places)
    bandwidth = ASSUMED["node_bandwidth" if job.ranks <= ASSUMED["node"] else "bandwidth"]
    latency = ASSUMED["latency"] * math.log2(job.ranks)
    weights, average = 0.0, 0.0
    for place in places:
        for message in messages(place, parameters, weight_bytes=2):
            seconds = wire_bytes(message, job.ranks) / bandwidth
            if message.phase == "average":
                average += (seconds + tensors * latency) / len(places)
            else:
                weights += (seconds + latency * message.payload / (2 * BUCKETS[job.stage])) / len(places)
    reward = job.samples * (counted["decode"] + 2 * ASSUMED["encoder"]) / rate
    # the averaged weights are in host memory
    memory = memory_bytes(parameters, job, weight_bytes=2, copies={"teacher": 2})
    return {
        "network": latents * counted["pass"] / rate,
        "reward": reward,
        "weights": weights,
        "average": average,
        "figures": GATHERS * job.ranks * ASSUMED["object"],
        "memory": sum(memory.values()),
    }


def rows(counts: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Every model, number of GPUs and ZeRO stage."""
    result = []
    for name, counted in counts.items():
        for gpus in GPUS:
            for stage in range(4):
                conditions = max(JOB.conditions, gpus)
                job = replace(JOB, conditions=conditions, ranks=gpus, stage=stage, evaluations=MODELS[name].evaluations)
                costs = carry(counted, job, int(counted["tensors"]))
                memory = costs.pop("memory")
                result.append(
                    {
                        "model": name,
                        "gpus": gpus,
                        "stage": stage,
                        "conditions": conditions,
                        **costs,
                        "iteration": sum(costs.values()),
                        "samples_per_second": conditions * job.group_size / sum(costs.values()),
                        "working": (costs["network"] + costs["reward"]) / sum(costs.values()),
                        "memory": memory,
                    }
                )
    return result


def once(counted: dict[str, float], evaluations: int) -> dict[str, float]:
    """Seconds beside the iterations: a teacher's image on one GPU, and a checkpoint with the averaged student."""
    parameters, rate = counted["parameters"], ASSUMED["peak"] * ASSUMED["utilisation"]
    return {
        "target": TEACHER_STEPS * evaluations * counted["pass"] / rate,
        "checkpoint": parameters * (2 + 12 + 4) / ASSUMED["file_system"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write it with --json."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.at_scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures here too")
    options = parser.parse_args(arguments)
    counts = {name: count(model) for name, model in MODELS.items()}
    for name, counted in counts.items():
        beside = once(counted, MODELS[name].evaluations)
        print(
            f"{name}: {counted['parameters'] / 1e9:.2f} B parameters in {counted['tensors']} tensors, "
            f"{counted['pass'] / 1e12:.2f} TFLOP a pass, {counted['decode'] / 1e12:.2f} an image decoded; "
            f"a target {beside['target']:.2f} s, a checkpoint {beside['checkpoint']:.1f} s"
        )
    table = rows(counts)
    print(
        f"{'model':22}{'GPUs':>5}{'stage':>6}{'network':>9}{'reward':>8}{'weights':>9}{'average':>9}{'figures':>9}"
        f"{'seconds':>9}{'samples/s':>11}{'working':>9}{'GB':>7}"
    )
    for row in table:
        fits = " " if row["memory"] <= ASSUMED["memory"] else "!"
        print(
            f"{row['model']:22}{row['gpus']:5}{row['stage']:6}{row['network']:9.2f}{row['reward']:8.2f}"
            f"{row['weights']:9.3f}{row['average']:9.3f}{row['figures']:9.3f}{row['iteration']:9.2f}"
            f"{row['samples_per_second']:11.1f}{row['working']:9.0%}{row['memory'] / 1e9:7.1f}{fits}"
        )
    if options.json:
        write_json(options.json, {"machine": machine("cpu"), "assumed": ASSUMED, "counted": counts, "rows": table})


if __name__ == "__main__":
    main()
