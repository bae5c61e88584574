"""The supported model families, one short file each; docs/families.md says how to add one."""

from . import class_unet, dit, flux, pixart_alpha, pixart_sigma, stable_diffusion, stable_diffusion_3
from . import stable_diffusion_xl as sdxl
from .family import Family

FAMILIES: tuple[Family, ...] = (
    class_unet.FAMILY,
    stable_diffusion.FAMILY,
    sdxl.FAMILY,
    dit.FAMILY,
    pixart_alpha.FAMILY,
    pixart_sigma.FAMILY,
    stable_diffusion_3.FAMILY,
    flux.FAMILY,
)

__all__ = ["FAMILIES", "Family"]
