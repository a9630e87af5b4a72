"""Principal components against an eigendecomposition in float64."""

import numpy as np
import pytest

from configs.errors import UserError
from pipeline.pca import fit_pca


@pytest.mark.parametrize(("count", "width", "size"), [(500, 12, 5), (40, 40, 39), (64, 7, 1)])
def test_components_are_the_directions_of_most_variance(count, width, size):
    random = np.random.default_rng(0)
    tokens = (random.normal(size=(count, width)) * np.arange(1, width + 1) + 30).astype("float32")
    tokens = tokens @ np.linalg.qr(random.normal(size=(width, width)))[0].astype("float32")
    mean, components = fit_pca(tokens, size)
    assert mean.shape == (width,) and components.shape == (size, width)
    assert mean.dtype == components.dtype == np.float32
    np.testing.assert_allclose(mean, tokens.astype(float).mean(axis=0), atol=1e-3)
    np.testing.assert_allclose(components @ components.T, np.eye(size), atol=1e-5)
    values = np.linalg.eigvalsh(np.cov(tokens.astype(float).T, bias=True))[::-1][:size]
    kept = ((tokens - mean).astype(float) @ components.T.astype(float)).var(axis=0)
    np.testing.assert_allclose(kept, values, rtol=1e-3)


@pytest.mark.parametrize("tokens", [np.zeros((30, 6), "float32"), np.ones((30, 6), "float32") * 7])
def test_tokens_that_do_not_differ(tokens):
    mean, components = fit_pca(tokens, 3)
    np.testing.assert_allclose(mean, tokens[0])
    np.testing.assert_allclose(components @ components.T, np.eye(3), atol=1e-6)


def test_twice_the_same_bytes():
    tokens = np.random.default_rng(0).normal(size=(900, 24)).astype("float32")
    assert [part.tobytes() for part in fit_pca(tokens, 9)] == [part.tobytes() for part in fit_pca(tokens, 9)]


@pytest.mark.parametrize("count", [0, 5])
def test_too_few_tokens(count):
    with pytest.raises(UserError, match=rf"pca-2 is fitted on at least 6 tokens, and these images have {count}: use"):
        fit_pca(np.zeros((count, 6), "float32"), 2)
