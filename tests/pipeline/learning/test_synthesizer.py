"""The synthesizers of section 3.3 and Table 4."""

from typing import Literal

import pytest
import torch

from pipeline.learning.synthesizer import make_synthesizer

Kind = Literal["decoder", "mlp", "features"]
KINDS: list[Kind] = ["decoder", "mlp", "features"]
WIDTH = 16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "batch"), [(1, 1), (7, 1), (1, 4), (9, 4)])
def test_shape(kind: Kind, count: int, batch: int) -> None:
    centroids, cls_token = torch.randn(count, WIDTH), torch.randn(batch, WIDTH)
    prototypes = make_synthesizer(kind, WIDTH)(centroids, cls_token)
    assert prototypes.shape == (count, WIDTH) and prototypes.isfinite().all()


def test_features_are_the_centroids() -> None:
    centroids = torch.randn(5, WIDTH)
    assert torch.equal(make_synthesizer("features", WIDTH)(centroids, torch.randn(2, WIDTH)), centroids)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_centroids_and_parameters(kind: Kind) -> None:
    synthesizer, centroids = make_synthesizer(kind, WIDTH), torch.randn(5, WIDTH, requires_grad=True)
    synthesizer(centroids, torch.randn(3, WIDTH)).square().sum().backward()
    for tensor in (centroids, *synthesizer.parameters()):
        assert tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.any()


@pytest.mark.parametrize("training", [True, False])
def test_the_decoder_is_that_of_torch(training: bool) -> None:
    """Its prototypes, their gradients, and what it draws for dropout."""
    synthesizer = make_synthesizer("decoder", WIDTH).double().train(training)
    centroids, tokens = torch.randn(6, WIDTH).double().requires_grad_(), torch.randn(4, WIDTH).double()
    leaves, decoder, found = [centroids, *synthesizer.parameters()], synthesizer.decoder, []
    for forward in (synthesizer, lambda *tensors: decoder(*(t[None] for t in tensors))[0]):  # type: ignore[operator]
        torch.manual_seed(1)
        prototypes = forward(centroids, tokens)
        found.append([prototypes, *torch.autograd.grad(prototypes.square().sum(), leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_order_means_nothing_to_the_decoder() -> None:
    """Centroids are a set, and so are CLS tokens: no position is encoded."""
    torch.manual_seed(0)
    synthesizer = make_synthesizer("decoder", WIDTH).eval()
    centroids, cls_token, order = torch.randn(6, WIDTH), torch.randn(4, WIDTH), torch.randperm(6)
    prototypes = synthesizer(centroids, cls_token)
    torch.testing.assert_close(synthesizer(centroids[order], cls_token), prototypes[order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(synthesizer(centroids, cls_token.flip(0)), prototypes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "reads"), [("decoder", True), ("mlp", False), ("features", False)])
def test_only_the_decoder_reads_cls_tokens(kind: Kind, reads: bool) -> None:
    torch.manual_seed(0)
    synthesizer, centroids = make_synthesizer(kind, WIDTH).eval(), torch.randn(6, WIDTH)
    one, other = (synthesizer(centroids, torch.randn(4, WIDTH)) for _ in range(2))
    assert torch.allclose(one, other) != reads
