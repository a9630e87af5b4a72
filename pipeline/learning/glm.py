"""Global Learning Module, section 3.2: aligns dense features with the CLS token of their image."""

from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.learning.losses import channels_last


def attention(features: Tensor, cls_token: Tensor) -> Tensor:
    """Eq. 1: W = softmax(S R / sqrt(C)) over the positions. (B, C, H, W), (B, C) -> (B, H * W)."""
    query = cls_token / cls_token.shape[1] ** 0.5
    return (channels_last(features) @ query[:, :, None]).squeeze(2).softmax(dim=1)


SELECTED = 0.1  # the share of the features that `selective` ends with


def predict_cls(
    features: Tensor,
    cls_token: Tensor,
    mode: Literal["attention", "max", "mean", "selective"],
    progress: float = 0.0,
) -> Tensor:
    """Eq. 2: predicted CLS tokens W R^T (B, C), or the pooled features of Table 3.

    `selective` is the authors' follow-up (arXiv 2506.22032), built from its abstract: the mean of the features
    with the largest cosine to S. As `progress` goes from 0 to 1, the fraction used goes from 1 to SELECTED.
    """
    flat = channels_last(features)
    if mode == "selective":
        unit_features, unit_token = nn.functional.normalize(flat, dim=2), nn.functional.normalize(cls_token, dim=1)
        count = max(1, round((1 - (1 - SELECTED) * progress) * flat.shape[1]))
        nearest = torch.einsum("bc,blc->bl", unit_token, unit_features).topk(count, dim=1).indices
        return flat.gather(1, nearest[..., None].expand(-1, -1, flat.shape[2])).mean(dim=1)
    if mode == "max":
        return flat.amax(dim=1)
    if mode == "mean":
        return flat.mean(dim=1)
    return (attention(features, cls_token)[:, None] @ flat).squeeze(1)


def info_nce(
    predicted: Tensor, cls_token: Tensor, bank: Tensor, tau: float, image_ids: Tensor, bank_ids: Tensor
) -> Tensor:
    """Eq. 3 with -log, over cosine similarities; mean over the batch.

    Args:
        predicted, cls_token: (B, C); row i of both belongs to image i.
        bank: (M, C) more negatives, M may be 0.
        image_ids, bank_ids: (B,), (M,); other tokens of the same image are not negatives and are excluded.
    """
    candidates = nn.functional.normalize(torch.cat([cls_token, bank]), dim=1) / tau
    logits = nn.functional.normalize(predicted, dim=1) @ candidates.T  # (B, B + M)
    same_image = image_ids[:, None] == torch.cat([image_ids, bank_ids])[None]
    same_image.fill_diagonal_(False)
    own = torch.arange(len(predicted), device=predicted.device)
    return nn.functional.cross_entropy(logits.masked_fill(same_image, -torch.inf), own)
