"""Principal components of dense tokens, by FAISS."""

import numpy as np

from configs.errors import UserError
from pipeline.openmp import faiss, one_thread


def fit_pca(tokens: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The directions in which a sample of tokens varies most.

    Args:
        tokens: (n, C) float32.
        size: K, at most C.

    Returns:
        mean (C,) and components (K, C), both float32; the components are orthonormal, those of most variance first.

    Raises:
        UserError: n < C, which does not determine C directions.
    """
    count, width = tokens.shape
    if count < width:
        raise UserError(
            f"storage.dense_tokens pca-{size} is fitted on at least {width} tokens, and these images have {count}: use "
            "float16 or int8"
        )
    pca = faiss.PCAMatrix(width, size)
    with one_thread():
        pca.train(np.ascontiguousarray(tokens, np.float32))
    components = faiss.vector_to_array(pca.A).reshape(size, width)
    return faiss.vector_to_array(pca.mean), components
