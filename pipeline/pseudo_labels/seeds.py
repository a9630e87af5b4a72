"""Multi-scale mask seeds, Eq. 4."""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

LEAST = 1e-6  # smaller than the share of one token in any window


def count_windows(windows: tuple[int, ...], grid: int) -> int:
    """The number of windows that `window_seeds` averages on a grid of side `grid`."""
    return sum(((grid - min(window, grid)) // (window + 1) + 1) ** 2 for window in windows)


def window_seeds(
    tokens: Tensor, unannotated: Tensor, windows: tuple[int, ...], everything: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean of the unannotated tokens (or of all tokens) under each sliding window, for a batch of views.

    Each window size slides with stride window + 1, so 7 and 3 give 4 x 4 + 8 x 8 seeds on a 32 x 32 grid. A window
    larger than the grid covers the whole grid. A window without unannotated tokens gives no seed. If no window gives
    one (all unannotated tokens lie between windows), the only seed is the mean of all unannotated tokens.

    Args:
        tokens: (B, G, G, C); annotated tokens must be zero, unless they count.
        unannotated: (B, G, G) bool.
        everything: annotated tokens count too.

    Returns:
        Seeds (B, k, C), where k is the number of windows: for each view in the order of `windows`, row by row, then
        zeros. And the number of each view's seeds, (B,) int64, 0 only if no token is unannotated.
    """
    grid, free = tokens.permute(0, 3, 1, 2), unannotated[:, None].to(tokens.dtype)
    means, shares = (
        torch.cat([
            avg_pool2d(values, min(window, tokens.shape[1]), window + 1).flatten(2).transpose(1, 2)
            for window in windows
        ], dim=1)
        for values in (grid, free)
    )  # fmt: skip
    filled = shares[..., 0] > 0
    # The pooled mean includes annotated tokens as zeros; dividing by the share of the others removes them.
    seeds = means * filled[..., None] if everything else means / shares.clamp(min=LEAST)
    counts = filled.sum(dim=1)
    if not filled.all():
        order = (~filled).to(torch.uint8).argsort(dim=1, stable=True)
        seeds = seeds.gather(1, order[..., None].expand_as(seeds))
        missed = (counts == 0) & unannotated.flatten(1).any(dim=1)
        if missed.any():
            lone = grid[missed] * free[missed]
            seeds[missed, 0] = lone.sum(dim=(2, 3)) / free[missed].sum(dim=(2, 3))
            counts = counts + missed
    return seeds, counts
