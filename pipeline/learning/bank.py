"""The CLS token bank of section 3.2, and banks that the cache makes possible: it holds every CLS token."""

from collections import deque
from collections.abc import Iterable
from typing import Protocol

import faiss
import numpy as np
import torch
from torch import Tensor, nn

DUPLICATE = 0.95  # cosine similarity above which another image's token is taken to say the same


class Bank(Protocol):
    """Negatives for InfoNCE beside those of the batch."""

    def tokens(self, cls_tokens: Tensor, image_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (M, C) and their image ids (M,) for a batch (B, C), (B,); M may be 0."""

    def enqueue(self, cls_tokens: Tensor, image_ids: Tensor) -> None:
        """Takes note of a batch after its loss was taken."""

    def state(self) -> list[tuple[Tensor, Tensor]]:
        """What `restore` takes back."""

    def restore(self, state: Iterable[Iterable[Tensor]], device: torch.device) -> None:
        """In place of what the bank holds."""


class TokenBank:
    """The CLS tokens of the last `iterations` batches, first in, first out, with the images they belong to."""

    def __init__(self, iterations: int) -> None:
        self._batches: deque[tuple[Tensor, Tensor]] = deque(maxlen=iterations)

    def enqueue(self, cls_tokens: Tensor, image_ids: Tensor) -> None:
        """Adds a batch, (B, C) and (B,); the oldest batch leaves when the bank is full."""
        self._batches.append((cls_tokens.detach(), image_ids))

    def tokens(self, cls_tokens: Tensor, image_ids: Tensor) -> tuple[Tensor, Tensor]:
        """All tokens, whatever the batch."""
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


class CacheBank:
    """Tokens of the whole cache: random ones, or those nearest to the batch's.

    Random ones are drawn by torch's global generator. The nearest, `count / B` of each token of the batch, are found by
    FAISS; another view of an image of the batch, or what is as similar to any of its tokens as DUPLICATE says, is
    passed over: a false negative. It holds no state.
    """

    def __init__(self, cls_tokens: Tensor, image_ids: Tensor, count: int, hard: bool) -> None:
        """`cls_tokens` (T, C) and `image_ids` (T,) are the cache's; `count`: how many negatives, at most."""
        self._tokens, self._ids, self._count = cls_tokens, image_ids, min(count, len(cls_tokens))
        self._index = None
        if hard and count:
            self._index = faiss.IndexScalarQuantizer(
                cls_tokens.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
            )  # half the memory of float32
            self._index.add(nn.functional.normalize(cls_tokens.float(), dim=1).numpy())

    def tokens(self, cls_tokens: Tensor, image_ids: Tensor) -> tuple[Tensor, Tensor]:
        found = self._nearest(cls_tokens, image_ids) if self._index else torch.randint(len(self._ids), (self._count,))
        return self._tokens[found].to(cls_tokens), self._ids[found].to(image_ids)

    def _nearest(self, cls_tokens: Tensor, image_ids: Tensor) -> Tensor:
        """(M,) rows of the cache, each once."""
        wanted = -(-self._count // len(cls_tokens))
        unit = nn.functional.normalize(cls_tokens.detach().float(), dim=1).cpu()
        near = self._index.search(unit.numpy(), min(4 * wanted, len(self._ids)))[1]  # type: ignore[union-attr]
        rows = np.unique(near)
        similar = nn.functional.normalize(self._tokens[rows].float(), dim=1) @ unit.T
        refused = (similar > DUPLICATE).any(dim=1) | torch.isin(self._ids[rows], image_ids.cpu())
        good = ~np.isin(near, rows[refused.numpy()])
        chosen = [line[keep][:wanted] for line, keep in zip(near, good, strict=True)]
        return torch.from_numpy(np.unique(np.concatenate(chosen)))

    def enqueue(self, cls_tokens: Tensor, image_ids: Tensor) -> None:
        pass

    def state(self) -> list[tuple[Tensor, Tensor]]:
        return []

    def restore(self, state: Iterable[Iterable[Tensor]], device: torch.device) -> None:
        pass
