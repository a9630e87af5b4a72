"""Multi-scale mask seeds, Eq. 4."""

import torch
from torch import Tensor


def window_seeds(tokens: Tensor, unannotated: Tensor, windows: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Means of the unannotated tokens under sliding windows, of many views at once.

    Each window size slides with stride window + 1, so that 7 and 3 give 4 x 4 + 8 x 8 seeds on a 32 x 32 grid. A
    window that is larger than the grid covers all of it. Windows without an unannotated token give no seed; where that
    leaves none (the strips between windows hold the only unannotated tokens), their overall mean is the one seed.

    Args:
        tokens: (B, G, G, C) float32; annotated tokens must be zero.
        unannotated: (B, G, G) bool.

    Returns:
        Seeds (B, k, C) float64, of each view in the order of `windows`, then row by row, then zeros; and how many they
        are, (B,) int64, 0 only without an unannotated token. k is the number of windows.
    """
    means, found = [], []
    for window in windows:
        size, stride = min(window, tokens.shape[1]), window + 1
        sums = _slide(_slide(tokens, 1, size, stride), 2, size, stride).flatten(1, 2)  # (B, windows, C)
        sizes = _slide(_slide(unannotated, 1, size, stride), 2, size, stride).flatten(1, 2)
        means.append(sums / sizes.clamp(min=1)[..., None])
        found.append(sizes > 0)
    seeds, filled = torch.cat(means, dim=1), torch.cat(found, dim=1)
    counts = filled.sum(dim=1)
    if not filled.all():
        order = (~filled).to(torch.uint8).argsort(dim=1, stable=True)
        seeds = seeds.gather(1, order[..., None].expand_as(seeds))
        missed = (counts == 0) & unannotated.flatten(1).any(dim=1)
        if missed.any():
            free = unannotated[missed].sum(dim=(1, 2))[:, None]
            seeds[missed, 0] = tokens[missed].sum(dim=(1, 2), dtype=torch.float64) / free
            counts = counts + missed
    return seeds, counts


def _slide(values: Tensor, axis: int, size: int, stride: int) -> Tensor:
    """Sums of `size` neighbours along an axis, every `stride`, in float64 (no order of adding shows in float32)."""
    last = (values.shape[axis] - size) // stride * stride
    index: list[slice] = [slice(None)] * values.ndim
    index[axis] = slice(0, last + 1, stride)
    sums = values[tuple(index)].to(torch.float64, copy=True)
    for offset in range(1, size):
        index[axis] = slice(offset, offset + last + 1, stride)
        sums += values[tuple(index)]
    return sums
