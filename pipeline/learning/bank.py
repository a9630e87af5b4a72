"""The CLS token bank of section 3.2."""

from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor


class TokenBank:
    """The CLS tokens of the last `size` batches, first in, first out, with the images they belong to."""

    def __init__(self, size: int) -> None:
        self._batches: deque[tuple[Tensor, Tensor]] = deque(maxlen=size)

    def enqueue(self, cls_tokens: Tensor, image_ids: Tensor) -> None:
        """Adds a batch, (B, C) and (B,); the oldest batch leaves when the bank is full."""
        self._batches.append((cls_tokens.detach(), image_ids))

    def tokens(self, cls_tokens: Tensor, image_ids: Tensor) -> tuple[Tensor, Tensor]:
        """All tokens (M, C) and their image ids (M,); M may be 0, then of the types of a batch (B, C), (B,)."""
        if not self._batches:
            return cls_tokens[:0].detach(), image_ids[:0]
        kept, kept_ids = zip(*self._batches, strict=True)
        return torch.cat(kept), torch.cat(kept_ids)

    def state(self) -> list[tuple[Tensor, Tensor]]:
        """The batches, oldest first; `restore` takes them back."""
        return list(self._batches)

    def restore(self, state: Iterable[Iterable[Tensor]], device: torch.device) -> None:
        self._batches.clear()
        for cls_tokens, image_ids in state:
            self.enqueue(cls_tokens.to(device), image_ids.to(device))
