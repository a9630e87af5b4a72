"""Random dual encoders of transformers, small, as `save_pretrained` writes them: model, image processor, tokenizer."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

LETTERS = "abcdefghijklmnopqrstuvwxyz.0123456789"
SIDE, PATCH, WIDTH, LONGEST = 32, 8, 16, 40
VIT = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": PATCH,
}
VISION = VIT | {"image_size": SIDE}
NARROW = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH}  # SigLIP: C is the width of the tower
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 200}


def _ids(*tokens: str) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def _clip() -> Any:
    ends = (letter + "</w>" for letter in LETTERS)
    vocabulary = _ids("<|startoftext|>", "<|endoftext|>", *LETTERS, *ends)
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=LONGEST)


def _bert() -> Any:
    vocabulary = _ids("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *("##" + letter for letter in LETTERS))
    return transformers.BertTokenizer(vocab=vocabulary, model_max_length=LONGEST)


def _xlm_roberta() -> Any:
    special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    pieces = [(start + letter, -2.0) for letter in LETTERS for start in ("▁", "")]
    vocabulary = [*special, *pieces, ("▁", -3.0), ("<mask>", 0.0)]
    return transformers.XLMRobertaTokenizer(vocab=vocabulary, model_max_length=LONGEST)


def _gemma(kind: str = "GemmaTokenizer") -> Any:
    return getattr(transformers, kind)(vocab=_ids("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *LETTERS, "▁"))


def _clip_images() -> Any:
    size = {"height": SIDE, "width": SIDE}
    return transformers.CLIPImageProcessor(size=size, crop_size=size)


def _siglip_images() -> Any:
    return transformers.SiglipImageProcessor(size={"height": SIDE, "width": SIDE})


def _siglip2_images() -> Any:
    return transformers.Siglip2ImageProcessor(patch_size=PATCH, max_num_patches=(SIDE // PATCH) ** 2)


ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
# model_type: config, its vision and text parts, tokenizer, image processor
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any], Callable[[], Any], Callable[[], Any]]] = {
    "clip": ("CLIPConfig", VISION, TEXT | ENDS | {"max_position_embeddings": LONGEST}, _clip, _clip_images),
    "metaclip_2": (
        "MetaClip2Config", VISION,
        TEXT | {"max_position_embeddings": LONGEST, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
        _xlm_roberta, _clip_images,
    ),
    "altclip": (
        "AltCLIPConfig", VISION, TEXT | {"max_position_embeddings": LONGEST + 2, "project_dim": 24},
        _xlm_roberta, _clip_images,
    ),
    "chinese_clip": ("ChineseCLIPConfig", VISION, TEXT | {"max_position_embeddings": LONGEST}, _bert, _clip_images),
    "siglip": (
        "SiglipConfig", VISION | NARROW, TEXT | {"max_position_embeddings": LONGEST, "projection_size": WIDTH},
        _gemma, _siglip_images,
    ),
    "siglip2": (
        "Siglip2Config", VIT | NARROW | {"num_patches": (SIDE // PATCH) ** 2},
        TEXT | {"max_position_embeddings": LONGEST, "projection_size": WIDTH},
        partial(_gemma, "Siglip2Tokenizer"), _siglip2_images,
    ),
}  # fmt: skip


def write_dual_encoder(folder: Path, kind: str, hidden_act: str | None = None) -> Any:
    """Writes the model to `folder` and returns it. Large weights: sharp attention, no bias 0, no norm's weight 1."""
    config, vision, text, tokenizer, images = KINDS[kind]
    if hidden_act:
        vision = vision | {"hidden_act": hidden_act}
    parts = {"vision_config": vision, "text_config": text}
    settings = getattr(transformers, config)(**parts, **({} if "siglip" in kind else {"projection_dim": WIDTH}))
    model = transformers.AutoModel.from_config(settings).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        norm = parameter.ndim == 1 and name.endswith("weight")
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + norm)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    images().save_pretrained(folder)
    return model
