"""The synthesizer of section 3.3: centroids of dense features -> prototypes in CLIP's text space."""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F


class DecoderSynthesizer(nn.Module):
    """A transformer decoder: queries are the centroids, keys and values the batch's CLS tokens.

    The layers are torch's. `forward` calls their parts, as torch's own copies queries, keys and values once more.
    """

    def __init__(self, width: int, layers: int = 3, heads: int = 8) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(width, heads, dim_feedforward=4 * width, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, layers)

    def forward(self, centroids: Tensor, cls_token: Tensor) -> Tensor:
        """(P, C), (B, C) -> prototypes (P, C)."""
        x = centroids
        for layer in self.decoder.layers:
            normed = layer.norm1(x)
            x = x + layer.dropout1(_attend(layer.self_attn, normed, normed))
            x = x + layer.dropout2(_attend(layer.multihead_attn, layer.norm2(x), cls_token))
            hidden = layer.dropout(F.relu(layer.linear1(layer.norm3(x))))
            x = x + layer.dropout3(layer.linear2(hidden))
        return x


def _attend(attention: nn.MultiheadAttention, queries: Tensor, others: Tensor) -> Tensor:
    """(P, C), (B, C) -> (P, C), what `attention` returns of queries, keys `others` and values `others`."""
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    heads = (attention.num_heads, attention.head_dim)
    if queries is others:
        q, k, v = F.linear(queries, weight, bias).unflatten(1, (3, *heads)).unbind(1)
    else:
        sizes = [attention.embed_dim, 2 * attention.embed_dim]
        (w_q, w_kv), (b_q, b_kv) = weight.split(sizes), bias.split(sizes)
        q = F.linear(queries, w_q, b_q).unflatten(1, heads)
        k, v = F.linear(others, w_kv, b_kv).unflatten(1, (2, *heads)).unbind(1)
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))  # (1, heads, P or B, C / heads)
    dropout = attention.dropout if attention.training else 0.0
    found = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    return attention.out_proj(found[0].transpose(0, 1).flatten(1))


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
