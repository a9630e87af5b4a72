"""The CLS token bank of section 3.2."""

from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor


class TokenBank:
    """The CLS tokens of the last `iterations` batches, first in, first out, with the images they belong to."""

    def __init__(self, iterations: int) -> None:
        self._batches: deque[tuple[Tensor, Tensor]] = deque(maxlen=iterations)

    def enqueue(self, cls_token: Tensor, image_ids: Tensor) -> None:
        """Adds a batch, (B, C) and (B,), after its loss was taken; the oldest batch leaves when the bank is full."""
        self._batches.append((cls_token.detach(), image_ids))

    def tokens(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """All tokens (M, C) and their image ids (M,); M is 0 for an empty bank."""
        if not self._batches:
            return like.new_zeros(0, like.shape[1]), torch.zeros(0, dtype=torch.long, device=like.device)
        tokens, image_ids = zip(*self._batches, strict=True)
        return torch.cat(tokens), torch.cat(image_ids)

    def state(self) -> list[tuple[Tensor, Tensor]]:
        """The batches, oldest first; `restore` takes them back."""
        return list(self._batches)

    def restore(self, state: Iterable[Iterable[Tensor]], device: torch.device) -> None:
        """In place of what the bank holds."""
        self._batches.clear()
        for cls_token, image_ids in state:
            self.enqueue(cls_token.to(device), image_ids.to(device))
