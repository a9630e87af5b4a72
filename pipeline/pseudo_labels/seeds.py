"""Multi-scale mask seeds, Eq. 4."""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

LEAST = 1e-6  # below the share of one token under any window


def count_windows(windows: tuple[int, ...], grid: int) -> int:
    """How many windows `window_seeds` takes the means of, of a grid of G = `grid`."""
    return sum(((grid - min(window, grid)) // (window + 1) + 1) ** 2 for window in windows)


def window_seeds(
    tokens: Tensor, unannotated: Tensor, windows: tuple[int, ...], everything: bool = False
) -> tuple[Tensor, Tensor]:
    """Means of the unannotated tokens under sliding windows, or of all tokens there, of many views at once.

    Each window size slides with stride window + 1, so that 7 and 3 give 4 x 4 + 8 x 8 seeds on a 32 x 32 grid. A
    window that is larger than the grid covers all of it. Windows without an unannotated token give no seed; where that
    leaves none (the strips between windows hold the only unannotated tokens), their overall mean is the one seed.

    Args:
        tokens: (B, G, G, C); annotated tokens must be zero, unless they count.
        unannotated: (B, G, G) bool.
        everything: annotated tokens count too.

    Returns:
        Seeds (B, k, C), of each view in the order of `windows`, then row by row, then zeros; and how many they are,
        (B,) int64, 0 only without an unannotated token. k is the number of windows.
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
    # A mean counts annotated tokens, which are zero; divided by the share of the others it is theirs alone.
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
