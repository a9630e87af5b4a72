"""Region tokens: the mean direction of each group's dense tokens, with one byte per channel."""

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
    """The largest number of groups that `pseudo_labels` can give a view with grid side `grid`: one per seed."""
    return min(count_windows(config.windows, grid), ANNOTATED)


def region_tokens(dense_tokens: Tensor, groups: np.ndarray | Tensor, most: int) -> np.ndarray:
    """For each group, round(127 m / max |m|), where m is the mean of its dense tokens at unit length.

    The codes keep only the direction of m: their cosine with m is above 0.999, unless one channel of hundreds dominates
    it. Zero tokens count as zero. If the sum of a group's tokens is shorter than 1e-9, or the view lacks the group, its
    row is 0.

    Sums are float64, so a view's codes do not depend on the other views; another device may change the rounding of a
    code.

    Args:
        dense_tokens: (B, G, G, C) of any float type and length, finite where there is a group, on any device.
        groups: (B, G, G) uint8; values of `most` and above, such as 255, are no group.
        most: M, the largest number of groups in a view.

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
