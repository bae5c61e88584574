"""The InceptionV3 of the Frechet Inception Distance: its architecture, its weights' layout and its way to resize.

FID is defined by one network (`pt_inception-2015-12-05`, converted from TensorFlow), which differs from torchvision's
InceptionV3: average pools leave the padding out of the mean, the last block pools by maximum, and images are resized as
TensorFlow 1 did, without half-pixel centres. Figures of other networks or resizes are not comparable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEATURES = 2048
SIDE = 299
CLASSES = 1008  # of the classifier in the weights, which the features lie below; torchvision's has 1000


class WeightsError(ValueError):
    """A file that does not hold FID's InceptionV3."""


class Conv(NamedTuple):
    """A convolution without bias, its normalisation and ReLU; stride 1 keeps the size, stride 2 pads nothing."""

    name: str
    width: int
    kernel: int | tuple[int, int]
    stride: int = 1


Fork = tuple[Conv, Conv]
"""Two convolutions of one input, side by side."""
Step = Conv | Fork | str
"""The name of a pool, "mean" (without padding in the mean), "max" or "max, stride 2"; or convolutions."""
Branch = Sequence[Step]


def _pooled(width: int, pool: str = "mean") -> Branch:
    return pool, Conv("branch_pool", width, 1)


def _block_a(pooled: int) -> tuple[Branch, ...]:
    return (
        (Conv("branch1x1", 64, 1),),
        (Conv("branch5x5_1", 48, 1), Conv("branch5x5_2", 64, 5)),
        (Conv("branch3x3dbl_1", 64, 1), Conv("branch3x3dbl_2", 96, 3), Conv("branch3x3dbl_3", 96, 3)),
        _pooled(pooled),
    )


def _block_c(width: int) -> tuple[Branch, ...]:
    row, column = (1, 7), (7, 1)
    return (
        (Conv("branch1x1", 192, 1),),
        (Conv("branch7x7_1", width, 1), Conv("branch7x7_2", width, row), Conv("branch7x7_3", 192, column)),
        (
            Conv("branch7x7dbl_1", width, 1),
            Conv("branch7x7dbl_2", width, column),
            Conv("branch7x7dbl_3", width, row),
            Conv("branch7x7dbl_4", width, column),
            Conv("branch7x7dbl_5", 192, row),
        ),
        _pooled(192),
    )


def _block_e(pool: str) -> tuple[Branch, ...]:
    row, column = (1, 3), (3, 1)
    return (
        (Conv("branch1x1", 320, 1),),
        (Conv("branch3x3_1", 384, 1), (Conv("branch3x3_2a", 384, row), Conv("branch3x3_2b", 384, column))),
        (
            Conv("branch3x3dbl_1", 448, 1),
            Conv("branch3x3dbl_2", 384, 3),
            (Conv("branch3x3dbl_3a", 384, row), Conv("branch3x3dbl_3b", 384, column)),
        ),
        _pooled(192, pool),
    )


_BLOCK_B: tuple[Branch, ...] = (
    (Conv("branch3x3", 384, 3, stride=2),),
    (Conv("branch3x3dbl_1", 64, 1), Conv("branch3x3dbl_2", 96, 3), Conv("branch3x3dbl_3", 96, 3, stride=2)),
    ("max, stride 2",),
)
_BLOCK_D: tuple[Branch, ...] = (
    (Conv("branch3x3_1", 192, 1), Conv("branch3x3_2", 320, 3, stride=2)),
    (
        Conv("branch7x7x3_1", 192, 1),
        Conv("branch7x7x3_2", 192, (1, 7)),
        Conv("branch7x7x3_3", 192, (7, 1)),
        Conv("branch7x7x3_4", 192, 3, stride=2),
    ),
    ("max, stride 2",),
)
_BLOCKS: Mapping[str, tuple[Branch, ...]] = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": _BLOCK_B,
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": _BLOCK_D,
    "Mixed_7b": _block_e("mean"),
    "Mixed_7c": _block_e("max"),
}


class InceptionV3(nn.Module):
    """FID's InceptionV3 up to its pooled features; parameters are named as in `pt_inception-2015-12-05`."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3)
        width = 192
        for name, branches in _BLOCKS.items():
            block = _Block(width, branches)
            self.add_module(name, block)
            width = block.width

    def forward(self, images: Tensor) -> Tensor:
        """Encodes images.

        Args:
            images: (B, 3, H, W) uint8, of any size.

        Returns:
            (B, 2048) fp32.
        """
        x = (resize_as_tensorflow_1(images.float(), SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name in _BLOCKS:
            x = getattr(self, name)(x)
        return x.mean((2, 3))


def load_inception(path: Path) -> InceptionV3:
    """FID's InceptionV3 from a local file, in eval mode and frozen.

    Args:
        path: `weights-inception-2015-12-05-6726825d.pth` as torch-fidelity and pytorch-fid distribute it.

    Raises:
        WeightsError: says what the file is, or which weights it lacks.
    """
    if not path.is_file():
        raise WeightsError("there is no such file; weights-inception-2015-12-05-6726825d.pth of torch-fidelity fits")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch raise many kinds for a truncated or foreign file
        raise WeightsError(f"it cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise WeightsError("it holds no mapping of names to tensors; a state dict is needed")
    if "fc.weight" in weights and len(weights["fc.weight"]) != CLASSES:
        raise WeightsError(
            f"its classifier has {len(weights['fc.weight'])} classes and FID's {CLASSES}: it is torchvision's network, "
            "whose figures are not FID"
        )
    network = InceptionV3()
    wanted = network.state_dict()
    wrong = [
        name
        for name, value in wanted.items()
        if not name.endswith("num_batches_tracked") and (name not in weights or weights[name].shape != value.shape)
    ]
    if wrong:
        raise WeightsError(f"{len(wrong)} of {len(wanted)} weights are missing or of another shape, first {wrong[0]}")
    network.load_state_dict({name: weights[name] for name in wanted if name in weights}, strict=False)
    return network.eval().requires_grad_(False)


def resize_as_tensorflow_1(images: Tensor, side: int) -> Tensor:
    """Bilinear resize to (side, side) with corners, not centres, of pixels aligned, and no antialiasing.

    Output pixel i lies at i * (input / side) between two input pixels; what lies beyond the last is the last.

    Args:
        images: (B, C, H, W), any floating dtype.

    Returns:
        (B, C, side, side) of the same dtype.
    """
    for dim in (3, 2):
        last = images.shape[dim] - 1
        place = torch.arange(side, dtype=images.dtype, device=images.device) * ((last + 1) / side)
        low = place.long()
        below = images.index_select(dim, low)
        above = images.index_select(dim, (low + 1).clamp_max(last))
        weight = (place - low).view(-1, *([1] * (3 - dim)))
        images = below + (above - below) * weight
    return images


class _Convolution(nn.Module):
    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Block(nn.Module):
    """Branches of one input, concatenated."""

    def __init__(self, inputs: int, branches: tuple[Branch, ...]) -> None:
        super().__init__()
        self.branches = branches
        self.width = 0
        for branch in branches:
            width = inputs
            for step in branch:
                if isinstance(step, str):
                    continue
                convs = [step] if isinstance(step, Conv) else step
                for conv in convs:
                    self.add_module(conv.name, _convolution(width, conv))
                width = sum(conv.width for conv in convs)
            self.width += width

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._branch(x, branch) for branch in self.branches], dim=1)

    def _branch(self, x: Tensor, branch: Branch) -> Tensor:
        for step in branch:
            if isinstance(step, str):
                x = _POOLS[step](x)
            elif isinstance(step, Conv):
                x = getattr(self, step.name)(x)
            else:
                x = torch.cat([getattr(self, conv.name)(x) for conv in step], dim=1)
        return x


_POOLS = {
    "mean": lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
    "max": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
    "max, stride 2": lambda x: F.max_pool2d(x, 3, stride=2),
}


def _convolution(inputs: int, conv: Conv) -> _Convolution:
    kernel = (conv.kernel, conv.kernel) if isinstance(conv.kernel, int) else conv.kernel
    padding = tuple(side // 2 for side in kernel) if conv.stride == 1 else 0
    return _Convolution(inputs, conv.width, kernel, stride=conv.stride, padding=padding)
