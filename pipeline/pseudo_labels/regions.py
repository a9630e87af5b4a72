"""Region tokens: of each group of a view the direction of its dense tokens, in a byte a channel."""

import numpy as np
import torch
from torch import Tensor

from configs.schema import PseudoLabels
from pipeline.precision import with_float64
from pipeline.pseudo_labels import ANNOTATED
from pipeline.pseudo_labels.kmeans import direction, unit_length
from pipeline.pseudo_labels.seeds import count_windows

LARGEST = 127


def most_groups(config: PseudoLabels, grid: int) -> int:
    """How many groups `pseudo_labels` can give a view of G = `grid`: one a seed, as far as labels go."""
    return min(count_windows(config.windows, grid), ANNOTATED)


def region_tokens(dense_tokens: Tensor, groups: np.ndarray | Tensor, most: int) -> np.ndarray:
    """Of each group g the direction of the mean m of its dense tokens at unit length, as round(127 m / max |m|).

    Only the direction is kept: its cosine with the codes is above 0.999, unless a single channel of hundreds holds
    nearly all of it. A zero token counts as zero. Where the sum of a group's tokens is shorter than 1e-9 there is no
    direction, and the row is 0, as are those of groups that the view does not have.

    Sums are float64, so that views do not show in each other's codes, nor the device but for a code on the edge between
    two.

    Args:
        dense_tokens: (B, G, G, C) of any float type and length, finite where there is a group, on any device.
        groups: (B, G, G) uint8; from `most` on, as 255, no group.
        most: M, groups that a view can have.

    Returns:
        (B, M, C) int8.
    """
    dense_tokens = with_float64(dense_tokens)
    batch, width = len(dense_tokens), dense_tokens.shape[-1]
    group = torch.as_tensor(groups, device=dense_tokens.device).flatten(1).long()
    inside = group < most
    row = (group + most * torch.arange(batch, device=group.device)[:, None])[inside]
    sums = torch.zeros(batch * most, width, dtype=torch.float64, device=group.device)
    means = direction(sums.index_add_(0, row, unit_length(dense_tokens.flatten(1, 2)[inside].double())))
    largest = means.abs().amax(dim=1, keepdim=True)
    codes = (LARGEST * means / torch.where(largest == 0, 1, largest)).round().to(torch.int8)
    return codes.view(batch, most, width).cpu().numpy()
