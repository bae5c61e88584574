"""diffusers' transformer modules on the fused adaptive norms, gated residuals and GEGLU.

A class here is the stock one with another forward: the same parameters, signature and name (diffusers, accelerate and
FSDP look blocks up by the name of their class). The norms that a block absorbs have no weights, so no kernel reads a
weight outside the forward of its owner, where ZeRO-3 and FSDP have gathered it. What a block is rarely asked for
(feed-forward chunks, attention arguments) is left to the stock forward.
"""

from typing import Any

import torch
from diffusers.models import activations, attention, normalization
from diffusers.models.transformers import transformer_flux
from torch import Tensor, nn

from .gated_residual import gated_residual
from .geglu import geglu
from .modulate import norm_modulate, residual_norm_modulate
from .tokens import MAX_CHANNELS


def is_plain(norm: nn.Module | None) -> bool:
    """Whether ``norm`` is the LayerNorm over channels that the kernels compute, without weights."""
    return (
        type(norm) is nn.LayerNorm
        and "forward" not in vars(norm)  # nor made another on the instance
        and norm.weight is None
        and norm.bias is None
        and len(norm.normalized_shape) == 1
        and norm.normalized_shape[0] <= MAX_CHANNELS
    )


def has_plain_norm(module: nn.Module) -> bool:
    """Whether a stock adaptive norm modulates a plain LayerNorm."""
    return is_plain(module.norm)


class GEGLU(activations.GEGLU):
    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return geglu(self.proj(hidden_states))


# ---- Adaptive norms


class AdaLayerNormZero(normalization.AdaLayerNormZero):
    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        hidden_dtype: torch.dtype | None = None,
        emb: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift_msa, scale_msa, *others = self.linear(self.silu(emb)).chunk(6, dim=1)
        return norm_modulate(x, shift_msa, scale_msa, eps=self.norm.eps), *others


class AdaLayerNormZeroSingle(normalization.AdaLayerNormZeroSingle):
    def forward(self, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
        return norm_modulate(x, shift, scale, eps=self.norm.eps), gate


class AdaLayerNormContinuous(normalization.AdaLayerNormContinuous):
    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
        return norm_modulate(x, shift, scale, eps=self.norm.eps)


class SD35AdaLayerNormZeroX(normalization.SD35AdaLayerNormZeroX):
    def forward(self, hidden_states: Tensor, emb: Tensor | None = None) -> tuple[Tensor, ...]:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, shift2, scale2, gate2 = self.linear(self.silu(emb)).chunk(
            9, dim=1
        )
        first = norm_modulate(hidden_states, shift, scale, eps=self.norm.eps)
        second = norm_modulate(hidden_states, shift2, scale2, eps=self.norm.eps)
        return first, gate, shift_mlp, scale_mlp, gate_mlp, second, gate2


# ---- Blocks


def _add(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    return gated_residual(_widened(x, gate, branch), gate, branch)


def _add_and_modulate(
    x: Tensor, gate: Tensor, branch: Tensor, shift: Tensor, scale: Tensor, norm: nn.LayerNorm
) -> tuple[Tensor, Tensor]:
    return residual_norm_modulate(_widened(x, gate, branch), gate, branch, shift, scale, eps=norm.eps)


def _widened(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x in the dtype that torch would add to it: under autocast, float32 gates widen the residual stream."""
    return x.to(torch.promote_types(x.dtype, torch.promote_types(gate.dtype, branch.dtype)))


class BasicTransformerBlock(attention.BasicTransformerBlock):
    """DiT's (``ada_norm_zero``) and PixArt's (``ada_norm_single``) block."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        if cross_attention_kwargs or self._chunk_size is not None:
            return super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
                cross_attention_kwargs, class_labels, added_cond_kwargs,
            )  # fmt: skip
        single = self.norm_type == "ada_norm_single"
        if single:
            vectors = self.scale_shift_table[None] + timestep.reshape(hidden_states.shape[0], 6, -1)
            shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = vectors.unbind(1)
            normed = norm_modulate(hidden_states, shift_msa, scale_msa, eps=self.norm1.eps)
        else:
            normed, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.norm1(
                hidden_states, timestep, class_labels, hidden_dtype=hidden_states.dtype
            )
        branch = self.attn1(
            normed,
            encoder_hidden_states=encoder_hidden_states if self.only_cross_attention else None,
            attention_mask=attention_mask,
        )

        norm = self.norm2 if single else self.norm3
        if self.attn2 is None:
            hidden_states, normed = _add_and_modulate(hidden_states, gate_msa, branch, shift_mlp, scale_mlp, norm)
        else:
            hidden_states = _add(hidden_states, gate_msa, branch)
            branch = self.attn2(
                hidden_states if single else self.norm2(hidden_states),
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
            )
            hidden_states = branch + hidden_states
            normed = norm_modulate(hidden_states, shift_mlp, scale_mlp, eps=norm.eps)
        return _add(hidden_states, gate_mlp, self.ff(normed))


def can_fuse_basic_block(block: nn.Module) -> bool:
    """Whether a stock BasicTransformerBlock modulates plain LayerNorms and gates its branches."""
    if block.pos_embed is not None:
        return False
    if block.norm_type == "ada_norm_single":
        return is_plain(block.norm1) and is_plain(block.norm2)
    return block.norm_type == "ada_norm_zero" and is_plain(block.norm3)


class JointTransformerBlock(attention.JointTransformerBlock):
    """Stable Diffusion 3's block."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        if self._chunk_size is not None:
            return super().forward(hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)
        arguments = joint_attention_kwargs or {}
        normed, gate_msa, shift_mlp, scale_mlp, gate_mlp, *second = self.norm1(hidden_states, emb=temb)
        if self.context_pre_only:
            normed_context = self.norm1_context(encoder_hidden_states, temb)
        else:
            normed_context, c_gate_msa, *c_mlp = self.norm1_context(encoder_hidden_states, emb=temb)
        branch, context_branch = self.attn(hidden_states=normed, encoder_hidden_states=normed_context, **arguments)

        if self.use_dual_attention:
            normed, gate_msa2 = second
            hidden_states = _add(hidden_states, gate_msa, branch)
            gate_msa, branch = gate_msa2, self.attn2(hidden_states=normed, **arguments)
        hidden_states, normed = _add_and_modulate(hidden_states, gate_msa, branch, shift_mlp, scale_mlp, self.norm2)
        hidden_states = _add(hidden_states, gate_mlp, self.ff(normed))

        if self.context_pre_only:
            return None, hidden_states
        c_shift_mlp, c_scale_mlp, c_gate_mlp = c_mlp
        encoder_hidden_states, normed = _add_and_modulate(
            encoder_hidden_states, c_gate_msa, context_branch, c_shift_mlp, c_scale_mlp, self.norm2_context
        )
        return _add(encoder_hidden_states, c_gate_mlp, self.ff_context(normed)), hidden_states


def has_plain_second_norms(block: nn.Module) -> bool:
    """Whether the second norms of a stock two-stream block are plain (``norm2_context`` may be absent)."""
    return is_plain(block.norm2) and (block.norm2_context is None or is_plain(block.norm2_context))


class FluxTransformerBlock(transformer_flux.FluxTransformerBlock):
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        normed, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.norm1(hidden_states, emb=temb)
        normed_context, c_gate_msa, c_shift_mlp, c_scale_mlp, c_gate_mlp = self.norm1_context(
            encoder_hidden_states, emb=temb
        )
        branch, context_branch, *ip_branch = self.attn(
            hidden_states=normed,
            encoder_hidden_states=normed_context,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )

        hidden_states, normed = _add_and_modulate(hidden_states, gate_msa, branch, shift_mlp, scale_mlp, self.norm2)
        hidden_states = _add(hidden_states, gate_mlp, self.ff(normed))
        for image in ip_branch:
            hidden_states = hidden_states + image

        encoder_hidden_states, normed = _add_and_modulate(
            encoder_hidden_states, c_gate_msa, context_branch, c_shift_mlp, c_scale_mlp, self.norm2_context
        )
        encoder_hidden_states = _add(encoder_hidden_states, c_gate_mlp, self.ff_context(normed))
        return _clipped(encoder_hidden_states), hidden_states


class FluxSingleTransformerBlock(transformer_flux.FluxSingleTransformerBlock):
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        text_length = encoder_hidden_states.shape[1]
        hidden_states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        normed, gate = self.norm(hidden_states, emb=temb)
        attended = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
        branch = self.proj_out(torch.cat([attended, self.act_mlp(self.proj_mlp(normed))], dim=2))
        hidden_states = _clipped(_add(hidden_states, gate, branch))
        return hidden_states[:, :text_length], hidden_states[:, text_length:]


def _clipped(hidden_states: Tensor) -> Tensor:
    """Within the range of float16, as the stock blocks keep it."""
    return hidden_states.clip(-65504, 65504) if hidden_states.dtype == torch.float16 else hidden_states
