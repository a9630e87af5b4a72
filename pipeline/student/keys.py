"""How published checkpoints name what this package's students name otherwise. Formats are told by their names.

| checkpoint | encoder's names |
|---|---|
| MiT, MSCAN, official | `patch_embed1.`, `block1.0.`, `norm1.` |
| MiT, mmsegmentation | `layers.0.0.projection.`, `layers.0.1.0.attn.attn.in_proj_weight`, `layers.0.2.` |
| MiT, transformers | `segformer.encoder.block.0.0.attention.self.query.` |
| Swin, official | `layers.0.downsample.`, at the end of a level where timm has it at the beginning of the next |
| Swin, mmsegmentation | `stages.0.blocks.0.attn.w_msa.`, `ffn.layers.0.0.`, `norm0.`; neighbours in another order |
"""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]
Rule = tuple[str, str | Callable[[re.Match[str]], str]]


def _renamed(state: Mapping[str, Tensor], rules: list[Rule]) -> State:
    """Every key after all rules, each a regular expression and what takes its place."""
    result = {}
    for key, tensor in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        result[key] = tensor
    return result


def _stage(part: str) -> Callable[[re.Match[str]], str]:
    return lambda match: f"stages.{int(match[1]) - 1}.{part}."


_PYRAMID: list[Rule] = [
    (r"^patch_embed1\.", "patch_embed."),
    (r"^patch_embed(\d)\.", _stage("downsample")),
    (r"^block(\d)\.", _stage("blocks")),
    (r"^norm(\d)\.", _stage("norm")),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
]

_MIT_MMSEG: list[Rule] = [
    (r"^layers\.0\.0\.", "patch_embed."),
    (r"^layers\.(\d)\.0\.", r"stages.\1.downsample."),
    (r"^layers\.(\d)\.1\.", r"stages.\1.blocks."),
    (r"^layers\.(\d)\.2\.", r"stages.\1.norm."),
    (r"\.projection\.", ".proj."),
    (r"\.attn\.attn\.out_proj\.", ".attn.proj."),
    (r"\.ffn\.layers\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.dwconv."),
    (r"\.ffn\.layers\.4\.", ".mlp.fc2."),
]

_MIT_TRANSFORMERS: list[Rule] = [
    (r"^segformer\.", ""),
    (r"^encoder\.patch_embeddings\.0\.", "patch_embed."),
    (r"^encoder\.patch_embeddings\.(\d)\.", r"stages.\1.downsample."),
    (r"^encoder\.block\.(\d)\.", r"stages.\1.blocks."),
    (r"^encoder\.layer_norm\.(\d)\.", r"stages.\1.norm."),
    (r"\.layer_norm_([12])\.", r".norm\1."),
    (r"\.attention\.self\.layer_norm\.", ".attn.norm."),
    (r"\.attention\.self\.query\.", ".attn.q."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_norm\.", ".norm."),
    (r"\.mlp\.dense([12])\.", r".mlp.fc\1."),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
]

_SWIN_MMSEG: list[Rule] = [
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^stages\.(\d)\.downsample\.", lambda match: f"layers.{int(match[1]) + 1}.downsample."),
    (r"^stages\.", "layers."),
    (r"\.attn\.w_msa\.", ".attn."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
]

_SWIN_DERIVED = ("relative_position_index", "attn_mask")  # buffers that follow from the window's size

_HEADS: list[Rule] = [(r"\.conv\.", ".0."), (r"\.(bn|gn)\.", ".1.")]


def mit(state: State) -> State:
    """Names of pipeline/student/mit.py."""
    if any(".attn.attn.in_proj_" in key for key in state):
        return _renamed(dict(_split_in_proj(state)), _MIT_MMSEG)
    if any(".attention.self.query." in key for key in state):
        return _join_key_value(_renamed(state, _MIT_TRANSFORMERS))
    return _renamed(state, _PYRAMID)


def _split_in_proj(state: State) -> State:
    """Q (the first third) and kv of mmsegmentation's joint projection, and its 1 x 1 convolutions as linear layers."""
    result = {}
    for key, tensor in state.items():
        if ".attn.attn.in_proj_" in key:
            before, kind = key.split("attn.attn.in_proj_")
            result[f"{before}attn.q.{kind}"], result[f"{before}attn.kv.{kind}"] = tensor.split(
                [len(tensor) // 3, 2 * len(tensor) // 3]
            )
        elif re.search(r"\.ffn\.layers\.[04]\.weight$", key):
            result[key] = tensor.flatten(1)
        else:
            result[key] = tensor
    return result


def _join_key_value(state: State) -> State:
    result = {}
    for key, tensor in state.items():
        if ".attn.key." in key:
            value = state.get(key.replace(".attn.key.", ".attn.value."))
            if value is not None:
                result[key.replace(".attn.key.", ".attn.kv.")] = torch.cat([tensor, value])
        elif ".attn.value." not in key:
            result[key] = tensor
    return result


def mscan(state: State) -> State:
    """Names of pipeline/student/mscan.py."""
    return _renamed(state, _PYRAMID)


def swin(state: State) -> State:
    """Names of `Swin` in pipeline/student/timm_encoder.py."""
    if any(".attn.w_msa." in key for key in state):
        state = {key: _reordered(tensor) if "downsample" in key else tensor for key, tensor in state.items()}
        state = _renamed(state, _SWIN_MMSEG)
    elif "layers.0.downsample.reduction.weight" in state:
        moved: Rule = (r"^layers\.(\d)\.downsample\.", lambda match: f"layers.{int(match[1]) + 1}.downsample.")
        state = _renamed(state, [moved])
    kept = {key: tensor for key, tensor in state.items() if not key.endswith(_SWIN_DERIVED)}
    return _renamed(kept, [(r"^", "model."), (r"^model\.norm(\d)\.", r"norms.\1.")])


def _reordered(tensor: Tensor) -> Tensor:
    """From nn.Unfold's order of a patch's pixels, channel by channel, to Swin's: pixels (0, 0) (1, 0) (0, 1) (1, 1)."""
    by_channel = tensor.unflatten(-1, (-1, 4))  # (..., channels, 4 pixels in rows)
    return by_channel[..., [0, 2, 1, 3]].transpose(-1, -2).flatten(-2)


def head(state: State) -> State:
    """Names of pipeline/student/heads.py and ham.py, from mmsegmentation's decode heads without their prefix."""
    return _renamed(state, _HEADS)
