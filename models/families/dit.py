"""DiT: classes, and a network that predicts the variance beside the noise."""

from .family import Family, patch_size


def _call(network, x, timestep, condition, guidance):
    pred = network(x, timestep=timestep, class_labels=condition["class_labels"]).sample
    return pred[:, : x.shape[1]]


FAMILY = Family(
    name="DiT",
    pipelines=("DiTPipeline",),
    component="transformer",
    network="DiTTransformer2DModel",
    call=_call,
    classes=lambda config: config["num_embeds_ada_norm"],
    patch=patch_size,
    resizable=False,
)
