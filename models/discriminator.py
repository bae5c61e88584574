"""Discriminators: heads that tell real images from drawn ones by the features of another network.

Either of the denoiser that judges noised latents (DMD2, Yin et al. 2024, arXiv 2405.14867, section 4.3), at its middle;
or of a frozen encoder that looks at pixels, at several depths (Flash-DMD, arXiv 2511.20549).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Head(nn.Module):
    """One logit for each position of a feature map: larger, more like a real image.

    Args:
        channels: of the features.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.hidden = nn.Linear(channels, channels)
        self.logit = nn.Linear(channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, L) of features (B, L, D) or (B, D, H, W), in the head's dtype."""
        x = positions(features).to(self.hidden.weight.dtype)
        return self.logit(F.silu(self.hidden(self.norm(x)))).squeeze(-1)


class Heads(nn.Module):
    """A head for each of several feature maps.

    Args:
        channels: of each.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(count) for count in channels)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Logits (B, L) of each map."""
        return [head(of) for head, of in zip(self.heads, features, strict=True)]


class ClassifyingDenoiser(nn.Module):
    """A denoiser with a head on the features of its middle, so that one pass gives prediction and logits.

    Args:
        network: a UNet or transformer of diffusers.

    Attributes:
        logits: (B, L) of the last forward pass.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.head = Head(_width(network))
        self.logits: Tensor | None = None
        self._features: Tensor | None = None
        bottleneck(network).register_forward_hook(self._keep)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """What the network gives for these arguments."""
        output = self.network(*arguments, **keywords)
        self.logits, self._features = self.head(self._features), None
        return output

    def _keep(self, module: nn.Module, arguments: Any, output: Any) -> None:
        # The joint blocks of SD3 and FLUX give the text's tokens, then the image's.
        self._features = output[-1] if isinstance(output, tuple) else output


def bottleneck(network: nn.Module) -> nn.Module:
    """The middle of a denoiser: the block between a UNet's two halves, or the middle one of a transformer's blocks.

    Raises:
        ValueError: the network has neither.
    """
    if getattr(network, "mid_block", None) is not None:
        return network.mid_block
    blocks = [*getattr(network, "transformer_blocks", []), *getattr(network, "single_transformer_blocks", [])]
    if not blocks:
        raise ValueError(f"a {type(network).__name__} has no middle: neither mid_block nor transformer_blocks")
    return blocks[(len(blocks) - 1) // 2]


def positions(features: Tensor) -> Tensor:
    """Features (B, L, D), from those or from (B, D, H, W)."""
    return features.flatten(2).transpose(1, 2) if features.dim() == 4 else features


def discriminator_loss(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """-log D(real) - log(1 - D(fake)), means over images, positions and maps, with D the sigmoid of logits (B, L)."""
    return _mean([-of for of in real]) + _mean(fake)


def generator_loss(fake: Sequence[Tensor]) -> Tensor:
    """The non-saturating -log D(fake)."""
    return _mean([-of for of in fake])


def _mean(logits: Sequence[Tensor]) -> Tensor:
    return torch.stack([F.softplus(of.float()).mean() for of in logits]).mean()


def _width(network: nn.Module) -> int:
    if hasattr(network, "mid_block"):
        return network.config.block_out_channels[-1]
    return network.inner_dim
