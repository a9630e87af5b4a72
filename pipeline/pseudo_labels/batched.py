"""The K-means of kmeans.py for many views at once, in torch: for GPUs, which one view leaves idle."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from pipeline.pseudo_labels.kmeans import MARGIN, TIE, VANISHED
from pipeline.pseudo_labels.split import split_empty

PAIRS = 1 << 14  # inner products computed in float64 at a time: 64 MiB at 512 channels


def kmeans_batched(
    tokens: Tensor, token_counts: Tensor, seeds: Tensor, seed_counts: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    """Clusters each view's tokens exactly as kmeans.kmeans does; views do not know of each other.

    Padding is whatever lies behind a view's counts; it must be zero.

    Args:
        tokens: (B, n, C) float32, unit length or zero.
        token_counts: (B,) int64, from 0 to n.
        seeds: (B, k, C), any length.
        seed_counts: (B,) int64, from 0 to k; 0 only for views without tokens.

    Returns:
        labels (B, n) int64, -1 in the padding; centroids (B, k, C) float64, of which count as many as the view has
        seeds, or tokens where it has no more tokens than seeds.
    """
    n, few = tokens.shape[1], min(tokens.shape[1], seeds.shape[1])
    own = torch.arange(n, device=tokens.device).expand(len(tokens), n)
    inside = own < token_counts[:, None]
    labels = torch.where(inside, own, -1)  # no more tokens than seeds: each is a cluster
    centroids = torch.zeros_like(seeds, dtype=torch.float64)
    centroids[:, :few] = tokens[:, :few]
    many = (token_counts > seed_counts).nonzero()[:, 0]
    if len(many):
        with torch.autocast(tokens.device.type, enabled=False), _full_float32():
            found = _iterate(tokens[many], inside[many], seeds[many].double(), seed_counts[many], iterations)
        labels[many], centroids[many] = found
    return labels, centroids


@contextmanager
def _full_float32() -> Iterator[None]:
    """Matrix products without TF32 or bfloat16 inside, which MARGIN does not cover."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _iterate(
    tokens: Tensor, inside: Tensor, seeds: Tensor, seed_counts: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    batch, k, channels = seeds.shape
    real = torch.arange(k, device=seeds.device) < seed_counts[:, None]
    offset = k * torch.arange(batch, device=seeds.device)[:, None]
    centroids, sums = direction(seeds), torch.zeros_like(seeds)
    labels, before = _nearest(tokens, centroids, inside, real), torch.full_like(inside, -1, dtype=torch.int64)
    for step in range(iterations):
        moved = before != labels
        rows = tokens[moved].double()
        sums.view(-1, channels).index_add_(0, (labels + offset)[moved], rows)
        if step:
            sums.view(-1, channels).index_add_(0, (before + offset)[moved], rows, alpha=-1)
        sizes = torch.zeros(batch * k, dtype=torch.int64, device=seeds.device)
        sizes = sizes.index_add_(0, (labels + offset)[inside], inside[inside].long()).view(batch, k)
        centroids = direction(sums)
        empty = ((sizes == 0) & real).any(dim=1)
        if empty.any():
            centroids[empty] = _split(centroids[empty], sizes[empty], seed_counts[empty])
        before, labels = labels, _nearest(tokens, centroids, inside, real)
        if torch.equal(before, labels):
            break
    return labels, centroids


def direction(vectors: Tensor) -> Tensor:
    """(..., C) float64 at length 1; zero where there is no direction."""
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return torch.where(length < VANISHED, 0, vectors / length.clamp(min=VANISHED))


def _split(centroids: Tensor, sizes: Tensor, counts: Tensor) -> Tensor:
    """(B, k, C), (B, k), (B,): FAISS's rule; it walks on the CPU, on the sizes alone."""
    batch, k, channels = centroids.shape
    source, factors = np.tile(np.arange(k), (batch, 1)), np.ones((batch, k, 2))
    for view, (view_sizes, count) in enumerate(zip(sizes.cpu().numpy(), counts.tolist(), strict=True)):
        source[view, :count], factors[view, :count] = split_empty(view_sizes[:count])
    index = torch.from_numpy(source).to(centroids.device)[..., None].expand_as(centroids)
    parity = torch.arange(channels, device=centroids.device) % 2
    return direction(centroids.gather(1, index) * torch.from_numpy(factors).to(centroids.device)[..., parity])


def _nearest(tokens: Tensor, centroids: Tensor, inside: Tensor, real: Tensor) -> Tensor:
    """(B, n) the real centroid (B, k) of the largest inner product, the first within TIE; -1 in the padding."""
    similarity = torch.bmm(tokens, centroids.float().transpose(1, 2)).masked_fill_(~real[:, None], -torch.inf)
    close = similarity >= similarity.amax(dim=2, keepdim=True) - MARGIN  # (B, n, k)
    unsure = inside & (close.sum(dim=2) > 1)
    if unsure.any():
        close &= _exactly_largest(tokens, centroids, close & unsure[..., None]) | ~unsure[..., None]
    return torch.where(inside, close.to(torch.uint8).argmax(dim=2), -1)


def _exactly_largest(tokens: Tensor, centroids: Tensor, pairs: Tensor) -> Tensor:
    """Those of the pairs (B, n, k) whose float64 inner product is within TIE of the token's largest."""
    exact = torch.full(pairs.shape, -torch.inf, dtype=torch.float64, device=tokens.device)
    for view, row, column in zip(*(index.split(PAIRS) for index in pairs.nonzero(as_tuple=True)), strict=True):
        exact[view, row, column] = (tokens[view, row].double() * centroids[view, column]).sum(dim=1)
    return pairs & (exact >= exact.amax(dim=2, keepdim=True) - TIE)
