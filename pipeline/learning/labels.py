"""Fused labels F, section 3.3: seen classes where there are annotations, groups of tokens elsewhere."""

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.learning.losses import channels_last
from pipeline.learning.ranks import gathered, rank, summed
from pipeline.transfer import sent

UNLABELLED = -1
ANNOTATED = 255


class Layout(NamedTuple):
    """Which labels a batch has, on all ranks. Found on the CPU, so that a GPU's tensors get their sizes without it.

    Attributes:
        groups: (ranks x B,) how many groups each view has.
        first: (B,) the first label of each of this rank's views' groups.
        total: number of labels L: K + all groups.
        rows: (P,) the labels at the features' size, ascending.
        classes: how many of `rows` are seen classes.
        channels: (L + 1,) the logits' channel of each label: its own of a seen class, then the groups in `rows` by
            turns. Groups without a centroid have none: they become UNLABELLED, as does the last entry, which -1 finds.
    """

    groups: Tensor
    first: Tensor
    total: int
    rows: Tensor
    classes: int
    channels: Tensor


def layout(seen: Tensor, groups: Tensor, num_seen: int, size: tuple[int, int]) -> Layout:
    """The labels of a batch with features of `size`; arguments as `fuse_labels` takes them, on the CPU."""
    own = group_counts(groups)
    counts = gathered(own)
    first = (num_seen + counts.cumsum(0) - counts).view(-1, len(own))[rank()]
    total = num_seen + int(counts.sum())
    # The label of a feature is that of the pixel at its centre, whose group is that of the token at the pixel's.
    rows, columns = (
        _centres(grid, pixels)[_centres(pixels, cells)]
        for grid, pixels, cells in zip(groups.shape[1:], seen.shape[1:], size, strict=True)
    )
    tokens = _numbered(groups[:, rows][:, :, columns], first)
    fused = _fused(at_stride(seen, size), tokens)
    sizes = summed(torch.bincount(fused.flatten() + 1, minlength=total + 1)[1:])
    present = sizes.nonzero()[:, 0]
    classes = int((present < num_seen).sum())
    channels = torch.full((total + 1,), UNLABELLED)
    channels[:num_seen] = torch.arange(num_seen)
    channels[present[classes:]] = torch.arange(num_seen, num_seen + len(present) - classes)
    return Layout(counts, first, total, present, classes, channels)


def fuse_labels(seen: Tensor, groups: Tensor, first: Tensor) -> Tensor:
    """Label every pixel of a batch, or of this rank's share of it.

    Annotated pixels keep their seen class. Others get the group of their token, counted on from the view's `first`:
    groups of different images are different labels, also across ranks. A pixel with neither is UNLABELLED.

    Args:
        seen: (B, H, W) uint8, 255 = unannotated.
        groups: (B, G, G) uint8, 255 = annotated token.
        first: (B,) of `layout`.

    Returns:
        (B, H, W) int64.
    """
    return _fused(seen, at_stride(_numbered(groups, first), (seen.shape[1], seen.shape[2])))


def _numbered(groups: Tensor, first: Tensor) -> Tensor:
    return (groups.long() + first[:, None, None]).masked_fill(groups == ANNOTATED, UNLABELLED)


def _fused(seen: Tensor, tokens: Tensor) -> Tensor:
    return torch.where(seen == ANNOTATED, tokens, seen.long())


def group_counts(groups: Tensor) -> Tensor:
    """How many groups each view has. (B, G, G) uint8, 255 = annotated -> (B,) int64."""
    return torch.where(groups == ANNOTATED, -1, groups.long()).amax(dim=(1, 2)) + 1


def at_stride(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels (B, H, W) sampled to (B, h, w): each feature gets the label of the pixel at its centre."""
    for axis, (pixels, cells) in enumerate(zip(labels.shape[1:], size, strict=True), 1):
        step = pixels // cells
        if pixels == step * cells:  # every so many pixels, without a copy
            labels = labels[(slice(None),) * axis + (slice(step // 2, None, step),)]
        else:
            labels = labels.index_select(axis, sent(_centres(pixels, cells), labels.device))
    return labels


def _centres(pixels: int, cells: int) -> Tensor:
    """(cells,) which of the pixels lies under each cell's centre."""
    return (2 * torch.arange(cells) + 1) * pixels // (2 * cells)


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
    sizes = index.new_zeros(count + 1).index_add(0, index, torch.ones_like(index))[1:]
    return summed(sums), summed(sizes)
