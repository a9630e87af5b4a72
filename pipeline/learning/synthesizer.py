"""The synthesizer of section 3.3: centroids of dense features -> prototypes in CLIP's text space."""

from typing import Literal

from torch import Tensor, nn


class DecoderSynthesizer(nn.Module):
    """A transformer decoder: queries are the centroids, keys and values the batch's CLS tokens."""

    def __init__(self, width: int, layers: int = 3, heads: int = 8) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(width, heads, dim_feedforward=4 * width, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, layers)

    def forward(self, centroids: Tensor, cls_token: Tensor) -> Tensor:
        """(P, C), (B, C) -> prototypes (P, C)."""
        return self.decoder(centroids[None], cls_token[None])[0]


class MLPSynthesizer(nn.Module):
    """The FC-ReLU-FC of Table 4."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, centroids: Tensor, cls_token: Tensor) -> Tensor:
        return self.layers(centroids)


class FeatureSynthesizer(nn.Module):
    """The centroids themselves, as in Table 4's "original features"."""

    def forward(self, centroids: Tensor, cls_token: Tensor) -> Tensor:
        return centroids


def make_synthesizer(kind: Literal["decoder", "mlp", "features"], width: int) -> nn.Module:
    if kind == "decoder":
        return DecoderSynthesizer(width)
    return MLPSynthesizer(width) if kind == "mlp" else FeatureSynthesizer()
