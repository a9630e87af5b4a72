"""Dual encoders of transformers as teachers: `teacher.model=transformers`, and its folder or hub name as `pretrained`.

Nothing that is downloaded can run code: weights are safetensors, and only transformers' own classes are used.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, PretrainedConfig
from transformers.utils import logging

from configs.errors import UserError, reason
from configs.schema import Teacher as Settings
from pipeline.precision import autocast
from pipeline.teacher.blocks import joined, per_head
from pipeline.teacher.dense import VARIANTS, Block
from pipeline.teacher.load import file_digest
from pipeline.teacher.text import classifier
from pipeline.teacher.towers import Grid, capture

# `model_type` in config.json -> class. All have the same ViT; the towers of SigLIP end in an attention pool.
MODELS = {
    "clip": "CLIPModel",
    "metaclip_2": "MetaClip2Model",
    "altclip": "AltCLIPModel",
    "chinese_clip": "ChineseCLIPModel",
    "siglip": "SiglipModel",  # the SigLIP 2 of fixed size too
    "siglip2": "Siglip2Model",  # the SigLIP 2 of any size ("NaFlex"), which takes patches
}
READ = {".json", ".safetensors", ".txt", ".model"}  # the files of a model's folder that transformers reads
SAFE = {"trust_remote_code": False}


class DualEncoder:
    """A `pipeline.teacher.teacher.Teacher`. Eval mode, fp32 weights, no gradients.

    S is transformers' `get_image_features`, before any normalisation. D is the last block's output, as `teacher.dense`
    changes it, then the final norm, and for each token alone what follows for S: the projection, or, in SigLIP, the
    attention pool, which over a single token is its values, output projection and feed-forward network.
    """

    def __init__(self, settings: Settings, device: str) -> None:
        """UserError: no such model here or on the hub, of a kind that is not known, or not whole."""
        name = self._name = settings.pretrained
        self._kind = kind = _read(settings, lambda: PretrainedConfig.get_config_dict(name)[0].get("model_type"))
        if kind not in MODELS:
            raise UserError(
                f"teacher.pretrained {name} is a model of the type {kind!r}: transformers' teachers are "
                f"{', '.join(MODELS)}"
            )
        self.model = _read(settings, lambda: _whole(name, kind)).to(device).eval().requires_grad_(False)
        processor = _read(settings, lambda: AutoImageProcessor.from_pretrained(name, **SAFE))
        self.mean: tuple[float, ...] = tuple(processor.image_mean)
        self.std: tuple[float, ...] = tuple(processor.image_std)
        self._settings, self._device = settings, device
        self._tower, self._variant = self.model.vision_model, VARIANTS[settings.dense]
        self.stride: int = self._tower.config.patch_size
        last = self.model.visual_projection.out_features if hasattr(self.model, "visual_projection") else None
        self.width: int = last or self._tower.config.hidden_size

    @staticmethod
    def fingerprint(settings: Settings) -> str:
        """SHA-256 of the files in the folder; a hub model's name."""
        folder = Path(settings.pretrained)
        if not folder.is_dir():
            return settings.pretrained
        digests = sorted(f"{path.name} {file_digest(path)}" for path in folder.iterdir() if path.suffix in READ)
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """As `Teacher.encode`; computed at `teacher.precision`."""
        grid = pixels.shape[-2] // self.stride, pixels.shape[-1] // self.stride
        with autocast(torch.device(self._device).type, self._settings.precision):
            with capture(self._tower.encoder.layers[-1], "forward") as calls:
                found = self.model.get_image_features(**self._inputs(pixels.to(self._device), grid))
            dense_tokens = self._dense(calls[0].x, grid)
        return found.pooler_output.float(), dense_tokens.float().unflatten(1, grid)

    def _inputs(self, pixels: Tensor, grid: Grid) -> dict[str, Any]:
        if self._kind != "siglip2":
            return {"pixel_values": pixels, "interpolate_pos_encoding": True}
        patches = pixels.unflatten(3, (grid[1], -1)).unflatten(2, (grid[0], -1))  # (B, 3, rows, y, columns, x)
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        return {
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.int32, device=patches.device),
            "spatial_shapes": torch.tensor([grid] * len(patches)),
        }

    def _dense(self, x: Tensor, grid: Grid) -> Tensor:
        """D (B, rows * columns, C) from what enters the last block, (B, N, W)."""
        tokens = self._tower.post_layernorm(self._variant(parts(self._tower.encoder.layers[-1], x, grid)))
        tokens = tokens[:, -grid[0] * grid[1] :]
        if hasattr(self.model, "visual_projection"):
            return self.model.visual_projection(tokens)
        return self._tower.head(tokens.flatten(0, 1)[:, None]).unflatten(0, tokens.shape[:2])

    @cached_property
    def _tokenizer(self) -> Any:
        return _read(self._settings, lambda: AutoTokenizer.from_pretrained(self._name, **SAFE))

    @torch.inference_mode()
    def text_features(self, names: Sequence[Sequence[str]], templates: str | Sequence[str]) -> Tensor:
        """As `Teacher.text_features`. SigLIP's texts are lower case and filled up to the length it was trained with."""
        tokenizer = self._tokenizer
        siglip, longest = self._kind.startswith("siglip"), self.model.config.text_config.max_position_embeddings

        def encode(texts: list[str]) -> Tensor:
            if siglip:
                texts = [text.lower() for text in texts]
            tokens = tokenizer(
                texts, padding="max_length" if siglip else True, padding_side="right", truncation=True,
                max_length=min(longest, tokenizer.model_max_length), return_tensors="pt",
            )  # fmt: skip
            mask = None if siglip else tokens["attention_mask"].to(self._device)  # SigLIP sees the padding
            return self.model.get_text_features(tokens["input_ids"].to(self._device), mask).pooler_output

        return classifier(encode, names, templates)


def parts(layer: Any, x: Tensor, grid: Grid) -> Block:
    """Takes a layer of transformers' ViTs apart for the tokens x (B, N, W) that enter it, as `blocks.parts` does."""
    attention, normed = layer.self_attn, layer.layer_norm1(x)
    q, k, v = (
        per_head(projection(normed), attention.num_heads)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )

    def out(mixed: Tensor) -> Tensor:
        return attention.out_proj(joined(mixed))

    def ffn(tokens: Tensor) -> Tensor:
        return tokens + layer.mlp(layer.layer_norm2(tokens))

    return Block(x, grid, q, k, v, out, ffn)


def _whole(name: str, kind: str) -> Any:
    """The model with all of its weights; transformers would only warn of those that are missing."""
    model, report = getattr(transformers, MODELS[kind]).from_pretrained(
        name, use_safetensors=True, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True, **SAFE
    )
    lacking = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if lacking:
        raise ValueError(f"{len(lacking)} weights are missing or have another shape, such as {lacking[0]}")
    return model


def _read(settings: Settings, read: Callable[[], Any]) -> Any:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of missing weights is a page long
    try:
        return read()
    except Exception as error:  # transformers, the hub, safetensors and the network each raise their own
        raise UserError(
            f"teacher.pretrained {settings.pretrained} cannot be loaded by transformers ({reason(error)}): give a "
            "folder that save_pretrained wrote, with safetensors, or ORG/NAME of the hub, and connect once"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
