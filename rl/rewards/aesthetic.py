"""LAION's aesthetic predictors: a small head on the embedding of a CLIP model."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .contract import Asked, Encoder, Reward, RewardError

MLP_LAYERS = (0, 2, 4, 6, 7)  # of the published nn.Sequential; between them is dropout, and no activation


def aesthetic_reward(encoder: Encoder, *, head: nn.Module) -> Reward:
    """The head's score of the embedding of length 1; LAION's scores are of 1 (worst) to 10.

    Args:
        encoder: gives "embedding" (B, D).
        head: (B, D) -> (B, 1).

    Returns:
        The reward; it ignores the targets.
    """

    def reward(images: Tensor, targets: Tensor, asked: Asked) -> Tensor:
        return head(F.normalize(encoder(images)["embedding"], dim=-1)).squeeze(1)

    return reward


def load_head(file: str, width: int, device: torch.device) -> nn.Module:
    """Reads a head.

    Args:
        file: .safetensors, .pth or .pt with the tensors "weight" (1, D) and "bias" (1,) (LAION-Aesthetics V1), or
            "layers.0.weight", "layers.0.bias" and those of layers 2, 4, 6 and 7 (improved-aesthetic-predictor, V2).
        width: D, of the embeddings.
        device: where the head stays.

    Returns:
        A frozen fp32 module, (B, D) -> (B, 1).

    Raises:
        RewardError: the file is missing, unreadable, of another layout, or for embeddings of another width.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise RewardError("this file does not exist; the head's weights are needed, apart from the CLIP model")
    try:
        if path.suffix == ".safetensors":
            tensors = safetensors.torch.load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        names = sorted(tensors)
    except Exception as error:
        text = " ".join(str(error).split())
        raise RewardError(f"it cannot be read as {path.suffix or 'torch'} weights: {text}") from error
    layouts = {"linear": [""], "MLP": [f"layers.{layer}." for layer in MLP_LAYERS]}
    for prefixes in layouts.values():
        if names == sorted(f"{prefix}{part}" for prefix in prefixes for part in ("weight", "bias")):
            break
    else:
        raise RewardError(
            f"it holds {', '.join(map(str, names[:4]))}{', ...' if len(names) > 4 else ''}; supported are a linear "
            "head (weight, bias) and the MLP without activations (weight and bias of layers.0, 2, 4, 6 and 7)"
        )
    layers = []
    for prefix in prefixes:
        weight, bias = tensors[f"{prefix}weight"].float(), tensors[f"{prefix}bias"].float()
        inputs = layers[-1].out_features if layers else width
        if weight.dim() != 2 or weight.shape[1] != inputs or bias.shape != weight.shape[:1]:
            raise RewardError(
                f"{prefix}weight {tuple(weight.shape)} and {prefix}bias {tuple(bias.shape)} do not take {inputs} "
                f"features; a head for the {width} features of this CLIP model is needed"
            )
        layer = nn.Linear(inputs, len(weight))
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    if layers[-1].out_features != 1:
        raise RewardError(f"it gives {layers[-1].out_features} scores an image; 1 is needed")
    return nn.Sequential(*layers).requires_grad_(False).to(device)
