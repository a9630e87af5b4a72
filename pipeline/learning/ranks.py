"""A batch that is split among processes: sums over their shares, with which losses are those of the whole batch.

Gradients are averaged over ranks, and so the mean of the ranks' losses must be the loss of the whole batch: a sum over
the rank's own pixels is divided by the *mean* count over ranks, and a term that all ranks compute alike counts once.
In a single process all of this does nothing.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.precision import with_float64


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def several_gpus() -> bool:
    """Whether this is one of several processes with a GPU each."""
    return world_size() > 1 and "nccl" in str(dist.get_backend_config())


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor) -> Tensor:
        total = share.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)  # every rank's loss depends on this rank's share


def summed(share: Tensor) -> Tensor:
    """The sum over ranks, of equal shapes. Gradients go back to each."""
    return share if world_size() == 1 else _Sum.apply(share)


def gathered(share: Tensor) -> Tensor:
    """(B, ...) of every rank, of equal shapes -> (ranks x B, ...) in the ranks' order. Gradients go back to each."""
    if world_size() == 1:
        return share
    before, after = (share.new_zeros(n * len(share), *share.shape[1:]) for n in (rank(), world_size() - 1 - rank()))
    return summed(torch.cat([before, share, after]))


def mean_count(count: Tensor) -> Tensor:
    """The mean over ranks of a count, by which a sum over the rank's own share is divided; at least 1 in all."""
    return averaged(count).clamp(min=1 / world_size()).float().to(count.device)


def averaged(share: Tensor) -> Tensor:
    """The mean over ranks, as float64; no gradient. Of counts, say, or of losses to be shown."""
    mean = with_float64(share.detach()).double()
    if world_size() > 1:
        mean = mean.clone()
        dist.all_reduce(mean)
        mean /= world_size()
    return mean


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """All gradients become their mean over ranks, in one message; after the backward pass.

    Which parameters have a part in the losses depends on settings and the whole batch, so it is the same on every rank.
    Those without a gradient keep none.
    """
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
