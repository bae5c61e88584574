"""The digits of scikit-learn: 1797 images of 8x8 pixels that come with the package, so nothing is downloaded."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor

CLASSES = 10
TRAIN_IMAGES = 1347
SPLIT_SEED = 0
"""Fixed apart from every training seed: the held-out images are the same whichever weights are compared."""

Split = Literal["train", "held_out", "all"]


def digits(split: Split = "all") -> tuple[Tensor, Tensor]:
    """The images of one split, stratified by class: 1347 for training, 450 held out, 1797 in all.

    Args:
        split: "train", "held_out" or "all" (training images first).

    Returns:
        images: (N, 1, 8, 8) float32 in [-1, 1]; 17 grey levels.
        labels: (N,) int64 in 0..9.
    """
    if split not in ("train", "held_out", "all"):
        raise ValueError(f"split={split!r} is not a split of the digits; pass 'train', 'held_out' or 'all'")
    images, labels = _all()
    part = {"train": slice(None, TRAIN_IMAGES), "held_out": slice(TRAIN_IMAGES, None), "all": slice(None)}[split]
    return images[part].clone(), labels[part].clone()


@cache
def _all() -> tuple[Tensor, Tensor]:
    # Imported here: scikit-learn takes about a second, and whoever only loads the weights does not need it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()
    train, held_out = train_test_split(
        range(len(source.target)), train_size=TRAIN_IMAGES, stratify=source.target, random_state=SPLIT_SEED
    )
    order = [*train, *held_out]
    images = torch.from_numpy(source.images[order]).float().unsqueeze(1) / 8 - 1
    return images, torch.from_numpy(source.target[order]).long()
