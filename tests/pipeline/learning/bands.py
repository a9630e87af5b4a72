"""NEL and cross-entropy in bands as the criterion has them, of the arguments that plain.py takes."""

from torch import Tensor

from pipeline.learning.pixel_loss import count_labelled, count_pairs, pixel_sums


def losses(
    features: Tensor, text_seen: Tensor, prototypes: Tensor, alpha: Tensor, beta: float, labels: Tensor
) -> dict[str, Tensor]:
    """The sums, divided."""
    sums = pixel_sums(features, text_seen, prototypes, alpha, beta, labels)
    pairs = count_pairs(labels, len(text_seen) + len(prototypes))
    return {"nel": sums["nel"] / pairs, "ce": sums["ce"] / count_labelled(labels)}
