"""PixArt-Sigma: PixArt-alpha with longer prompts, never told a size."""

from .family import Family, patch_size
from .pixart_alpha import call, encode_text

FAMILY = Family(
    name="PixArt-Sigma",
    pipelines=("PixArtSigmaPipeline",),
    component="transformer",
    network="PixArtTransformer2DModel",
    call=call,
    encode=encode_text,
    max_tokens={"tokenizer": 300},
    patch=patch_size,
)
