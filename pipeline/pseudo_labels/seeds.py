"""Multi-scale mask seeds, Eq. 4."""

import numpy as np


def window_seeds(tokens: np.ndarray, unannotated: np.ndarray, windows: tuple[int, ...]) -> np.ndarray:
    """Means of the unannotated tokens under sliding windows.

    Each window size slides with stride window + 1, so that 7 and 3 give 4 x 4 + 8 x 8 seeds on a 32 x 32 grid. A
    window that is larger than the grid covers all of it. Windows without an unannotated token give no seed; where that
    leaves none (the strips between windows hold the only unannotated tokens), their overall mean is the one seed.

    Args:
        tokens: (G, G, C) float32.
        unannotated: (G, G) bool.

    Returns:
        (n, C) float32, in the order of `windows`, then row by row; n is 0 only without an unannotated token.
    """
    grid = tokens.shape[0]
    seeds = []
    for window in windows:
        starts = range(0, max(grid - window, 0) + 1, window + 1)
        for top in starts:
            for left in starts:
                area = np.s_[top : top + window, left : left + window]
                free = tokens[area][unannotated[area]]
                if len(free):
                    seeds.append(free.mean(axis=0))
    if not seeds and unannotated.any():
        seeds.append(tokens[unannotated].mean(axis=0))
    return np.array(seeds, np.float32).reshape(len(seeds), tokens.shape[2])
