"""How dense tokens are stored: as float16, as int8 with a scale per token, or as their principal components.

| storage.dense_tokens | arrays of an image | bytes of a token |
|---|---|---|
| float16 | dense_tokens (V, G, G, C) float16 | 2 C |
| int8 | dense_tokens (V, G, G, C) int8, dense_scales (V, G, G) float16 | C + 2 |
| pca-K | dense_tokens (V, G, G, K) float16, with one mean and K components for the whole cache | 2 K |

Float16 ends at 65504: larger values are stored as that, never as infinity. Tokens must be finite.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from configs.errors import UserError

DENSE_TOKENS, DENSE_SCALES = "dense_tokens", "dense_scales"
_LARGEST = np.float32(np.finfo(np.float16).max)
_STEPS = np.float32(127)


class Pca(NamedTuple):
    """An orthogonal projection of tokens on the directions in which they differ most."""

    mean: np.ndarray  # (C,) float32
    components: np.ndarray  # (K, C) float32, orthonormal rows


def pca_size(encoding: str, width: int | None = None) -> int | None:
    """K of "pca-K"; None for another encoding. UserError unless K is below C = `width`, where that is given."""
    if not encoding.startswith("pca-"):
        return None
    size = int(encoding.removeprefix("pca-"))
    if width is not None and size >= width:
        raise UserError(
            f"storage.dense_tokens {encoding}: the teacher's tokens have only C = {width} values: choose K below "
            f"{width}, or float16"
        )
    return size


def encode_dense(tokens: np.ndarray, encoding: str, pca: Pca | None = None) -> dict[str, np.ndarray]:
    """Encode dense tokens as arrays.

    Args:
        tokens: (..., C) float32.
        encoding: none, float16, int8 or pca-K.
        pca: of the cache, for pca-K.

    Returns:
        Nothing for none; otherwise dense_tokens, (..., C or K), and for int8 also dense_scales, (...).
    """
    if encoding == "none":
        return {}
    if encoding == "int8":
        return _quantise(tokens)
    if encoding.startswith("pca-"):
        assert pca is not None
        tokens = (tokens - pca.mean) @ pca.components.T
    return {DENSE_TOKENS: _as_float16(tokens)}


def decode_dense(stored: Mapping[str, np.ndarray], pca: Pca | None = None) -> np.ndarray:
    """The inverse of `encode_dense`: (..., C) float32. The encoding is inferred from the arrays."""
    tokens = stored[DENSE_TOKENS].astype(np.float32)
    if DENSE_SCALES in stored:
        tokens *= stored[DENSE_SCALES].astype(np.float32)[..., None]
    return tokens if pca is None else tokens @ pca.components + pca.mean


def _as_float16(values: np.ndarray) -> np.ndarray:
    return np.clip(values, -_LARGEST, _LARGEST).astype(np.float16)


def _quantise(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Each token as multiples, from -127 to 127, of its own scale: off by at most half of it.

    The scale is rounded up, so that the largest value fits; only a token beyond 127 x 65504 is cut off.
    """
    wanted = np.abs(tokens).max(axis=-1) / _STEPS
    scales = _as_float16(wanted)
    up = np.nextafter(scales, np.float16(_LARGEST))
    scales = np.where(scales.astype(np.float32) < wanted, up, scales)
    steps = np.where(scales == 0, np.float16(1), scales).astype(np.float32)[..., None]
    codes = np.clip(np.rint(tokens / steps), -_STEPS, _STEPS).astype(np.int8)
    return {DENSE_TOKENS: codes, DENSE_SCALES: scales}
