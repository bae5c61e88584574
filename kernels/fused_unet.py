"""diffusers' UNet modules on the fused group norm.

A class here is the stock one with another forward: the same parameters, signature and name (diffusers, accelerate and
FSDP look blocks up by the name of their class). A norm's kernel runs in the norm's own forward, where ZeRO-3 and FSDP
have gathered its weight.
"""

import inspect
import re

from diffusers.models import resnet
from torch import Tensor, nn

from .group_norm_silu import group_norm_silu

_HEAD = re.compile(r"sample = self\.conv_norm_out\(sample\)\s+sample = self\.conv_act\(sample\)\s")


class GroupNorm(nn.GroupNorm):
    """The stock norm, which can be asked for the SiLU behind it."""

    def forward(self, input: Tensor, activation: str = "none") -> Tensor:
        """As of ``group_norm_silu``: input (N, C, ...), activation "none" or "silu"."""
        return group_norm_silu(input, self.weight, self.bias, self.num_groups, eps=self.eps, activation=activation)


class ResnetBlock2D(resnet.ResnetBlock2D):
    """norm1 and norm2 with the SiLU behind them; of a norm2 with scale and shift, norm1 alone."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args, **kwargs) -> Tensor:
        hidden_states = self.norm1(input_tensor, "silu")
        resample = self.upsample or self.downsample
        if resample is not None:
            if self.upsample is not None and hidden_states.shape[0] >= 64:
                # nearest-neighbour upsampling of large channels_last batches fails: diffusers issue 984
                input_tensor, hidden_states = input_tensor.contiguous(), hidden_states.contiguous()
            input_tensor, hidden_states = resample(input_tensor), resample(hidden_states)
        hidden_states = self.conv1(hidden_states)

        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))[:, :, None, None]
        if self.time_embedding_norm == "scale_shift":
            scale, shift = temb.chunk(2, dim=1)
            hidden_states = self.nonlinearity(self.norm2(hidden_states) * (1 + scale) + shift)
        else:
            if self.time_embedding_norm == "default" and temb is not None:
                hidden_states = hidden_states + temb
            hidden_states = self.norm2(hidden_states, "silu")
        hidden_states = self.conv2(self.dropout(hidden_states))

        if self.conv_shortcut is not None:
            # contiguous for the strides of gradients that DDP expects: diffusers issue 12975
            input_tensor = self.conv_shortcut(input_tensor.contiguous() if self.training else input_tensor)
        hidden_states = input_tensor + hidden_states
        # a division by 1 would be one more pass over the feature map
        return hidden_states if self.output_scale_factor == 1 else hidden_states / self.output_scale_factor


def can_fuse_resnet(block: nn.Module) -> bool:
    """Whether a stock ResnetBlock2D has SiLU behind norms that are fused already."""
    return _is_silu(block.nonlinearity) and type(block.norm1) is type(block.norm2) is GroupNorm


def _is_silu(module: nn.Module | None) -> bool:
    return type(module) is nn.SiLU and "forward" not in vars(module)  # nor made another on the instance


class GroupNormSiLU(nn.GroupNorm):
    """``conv_norm_out`` of a UNet, with the SiLU that its owner calls next."""

    def forward(self, input: Tensor) -> Tensor:
        return group_norm_silu(input, self.weight, self.bias, self.num_groups, eps=self.eps)


class AbsorbedSiLU(nn.SiLU):
    """The ``conv_act`` behind a ``GroupNormSiLU``: it has nothing left to do."""

    def forward(self, input: Tensor) -> Tensor:
        return input


def can_fuse_head(unet: nn.Module) -> bool:
    """Whether a module calls its ``conv_norm_out`` and its ``conv_act`` once each, the second right on the first."""
    if type(getattr(unet, "conv_norm_out", None)) is not GroupNorm or not _is_silu(getattr(unet, "conv_act", None)):
        return False
    try:
        source = inspect.getsource(type(unet).forward)
    except OSError:  # an installation without source files
        return False
    return bool(_HEAD.search(source)) and source.count("conv_norm_out(") == source.count("conv_act(") == 1
