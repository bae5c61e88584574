"""Class-conditional UNets on pixels, with the null class of guidance last: the embedded digits, and `DDIMPipeline`s."""

from torch import Tensor

from .family import Family


def _call(network, x, timestep, condition, guidance):
    output = network(x, timestep, class_labels=condition["class_labels"])
    return output if isinstance(output, Tensor) else output.sample  # a user's own network may give the tensor


FAMILY = Family(
    name="class-conditional UNet",
    pipelines=("DDIMPipeline", "DDPMPipeline"),
    component="unet",
    network="UNet2DModel",
    call=_call,
    classes=lambda config: (config["num_class_embeds"] or 0) - 1,
    has_vae=False,
)
