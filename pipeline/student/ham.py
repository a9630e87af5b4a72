"""SegNeXt's head: LightHam, whose middle factorises the features into non-negative matrices (Geng et al. 2021)."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from configs.errors import UserError
from pipeline.student.heads import DROPOUT, Head, conv_norm_relu, resize

TRAIN_STEPS, EVAL_STEPS = 6, 7
EPSILON = 1e-6
GROUPS = 32  # of its group norms
EVAL_SEED = 0


def factorise(x: Tensor, bases: Tensor, steps: int) -> Tensor:
    """Non-negative matrix factorisation by multiplicative updates (Lee and Seung 2000): the nearest X ~ D C^T found.

    Args:
        x: (B, D, N) non-negative. bases: (B, D, rank) non-negative, what the search starts from.
        steps: updates of the coefficients and the bases; the coefficients are updated once more at the end.

    Returns:
        (B, D, N).
    """
    coefficients = torch.softmax(x.transpose(1, 2) @ bases, dim=-1)  # (B, N, rank)
    for _ in range(steps):
        coefficients = _update(coefficients, x.transpose(1, 2), bases)
        bases = _update(bases, x, coefficients)
    coefficients = _update(coefficients, x.transpose(1, 2), bases)
    return bases @ coefficients.transpose(1, 2)


def _update(factor: Tensor, x: Tensor, other: Tensor) -> Tensor:
    return factor * (x @ other) / (factor @ (other.transpose(1, 2) @ other) + EPSILON)


def rank_of(channels: int) -> int:
    """The official code's: 16 for SegNeXt-T and S, whose heads have 256 channels, else 64 (mmsegmentation: 16)."""
    return 16 if channels <= 256 else 64


class Hamburger(nn.Module):
    """A factorisation between two linear layers, beside a residual; (B, C, h, w) in and out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rank = rank_of(channels)
        self.ham_in = nn.Sequential(nn.Conv2d(channels, channels, 1))
        self.ham_out = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.GroupNorm(GROUPS, channels))
        bases = torch.rand(1, channels, self.rank, generator=torch.Generator().manual_seed(EVAL_SEED))
        self.register_buffer("eval_bases", bases, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.ham_in(x).relu().flatten(2)  # (B, C, h w)
        # In single precision always: products of three factors overflow float16 at activations of std 9.
        inner = inner.to(torch.promote_types(inner.dtype, torch.float32))
        kind = x.device.type
        lowered = kind != "meta" and torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if lowered else nullcontext():
            bases = nn.functional.normalize(self._random_bases(inner), dim=1)
            found = factorise(inner, bases, TRAIN_STEPS if self.training else EVAL_STEPS)
        return (x + self.ham_out(found.view_as(x).to(x.dtype))).relu()

    def _random_bases(self, inner: Tensor) -> Tensor:
        """(B, C, rank), uniform. In eval mode always the same, so that a prediction does not depend on chance."""
        batch, channels, _ = inner.shape
        if self.training:
            return torch.rand(batch, channels, self.rank, device=inner.device, dtype=inner.dtype)
        eval_bases: Tensor = self.eval_bases  # type: ignore[assignment]
        return eval_bases.to(inner.dtype).expand(batch, -1, -1)


class LightHamHead(Head):
    """SegNeXt's (Guo et al. 2022): the three coarser levels, joined; R at stride 8."""

    stride = 8

    def __init__(self, in_channels: list[int], channels: int, width: int) -> None:
        super().__init__()
        if channels % GROUPS:
            raise UserError(f"student.channels {channels}: SegNeXt's head needs a multiple of {GROUPS}")
        self.squeeze = conv_norm_relu(sum(in_channels[1:]), channels, groups=GROUPS)
        self.hamburger = Hamburger(channels)
        self.align = conv_norm_relu(channels, channels, groups=GROUPS)
        self.dropout = nn.Dropout2d(DROPOUT)
        self.project = nn.Conv2d(channels, width, 1)

    def decode(self, levels: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Levels (B, C_i, h_i, w_i), finest first, the second at `size` -> (B, channels, *size)."""
        joined = torch.cat([resize(level, size) for level in levels[1:]], dim=1)
        return self.dropout(self.align(self.hamburger(self.squeeze(joined))))
