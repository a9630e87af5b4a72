"""NEL and cross-entropy in bands as the criterion has them, of the arguments that plain.py takes."""

from torch import Tensor

from pipeline.learning.pixel_loss import pixel_losses


def losses(
    features: Tensor,
    text_seen: Tensor,
    prototypes: Tensor,
    alpha: Tensor,
    beta: float,
    labels: Tensor,
    nel_channels: int | None = None,
) -> dict[str, Tensor]:
    """NEL of all channels, unless it is of the first few."""
    count = len(text_seen) + len(prototypes) if nel_channels is None else nel_channels
    return pixel_losses(features, text_seen, prototypes, alpha, beta, labels, count)
