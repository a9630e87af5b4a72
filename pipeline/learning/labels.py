"""Fused labels F, section 3.3: seen classes where there are annotations, groups of tokens elsewhere."""

import torch
from torch import Tensor, nn

from pipeline.learning.losses import channels_last
from pipeline.learning.ranks import gathered, rank, summed

UNLABELLED = -1
ANNOTATED = 255


def fuse_labels(seen: Tensor, groups: Tensor, num_seen: int) -> tuple[Tensor, int]:
    """Label every pixel of a batch, or of this rank's share of it.

    Annotated pixels keep their seen class. Others get `num_seen` + the group of their token; groups of different images
    are different labels, also across ranks. A pixel with neither is UNLABELLED.

    Args:
        seen: (B, H, W) uint8, 255 = unannotated.
        groups: (B, G, G) uint8, 255 = annotated token.

    Returns:
        (B, H, W) int64, and the number of labels: num_seen + all groups of the batch.
    """
    groups, counts = groups.long(), group_counts(groups)
    everywhere = gathered(counts)
    first = (num_seen + everywhere.cumsum(0) - everywhere).view(-1, len(counts))[rank()]
    labels = torch.where(groups == ANNOTATED, UNLABELLED, groups + first[:, None, None])
    pixels = nn.functional.interpolate(labels[:, None].double(), size=seen.shape[1:], mode="nearest-exact")[:, 0].long()
    fused = torch.where(seen == ANNOTATED, pixels, seen.long())
    return fused, num_seen + int(everywhere.sum())


def group_counts(groups: Tensor) -> Tensor:
    """How many groups each view has. (B, G, G) uint8, 255 = annotated -> (B,) int64."""
    return torch.where(groups == ANNOTATED, -1, groups.long()).amax(dim=(1, 2)) + 1


def at_stride(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels (B, H, W) sampled to (B, h, w): each feature gets the label of the pixel at its centre."""
    resized = nn.functional.interpolate(labels[:, None].double(), size=size, mode="nearest-exact")
    return resized[:, 0].long()


def class_centroids(features: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Eq. 5: mean feature of every label over the batch, all ranks' shares of it.

    Args:
        features: (B, C, h, w).
        labels: (B, h, w); UNLABELLED pixels are skipped.
        count: number of labels L.

    Returns:
        (L, C), zero for absent labels, and (L,) bool: present.
    """
    sums, sizes = class_sums(features, labels, count)
    return sums / sizes.clamp(min=1)[:, None], sizes > 0


def class_sums(features: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The sums and counts behind `class_centroids`: (L, C) sums in float32 or float64, (L,) numbers of pixels."""
    flat = channels_last(features).flatten(0, 1)  # (B * h * w, C)
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    index = labels.flatten() + 1  # UNLABELLED = -1 goes to a row that is cut off: no pixel need be left out by a mask
    sums = flat.new_zeros(count + 1, flat.shape[1]).index_add(0, index, flat)[1:]
    return summed(sums), summed(torch.bincount(index, minlength=count + 1)[1:])
