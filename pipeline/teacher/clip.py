"""The frozen teacher: any open_clip ViT, by name and tag or by JSON config and local weights file."""

import hashlib
import json
from pathlib import Path

import open_clip
import torch
from open_clip.model import CLIP
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import CONFIGS, Teacher
from pipeline.teacher.dense import clearclip


class FrozenClip:
    """CLS and dense tokens of images, and text features of class names. Eval mode, no gradients.

    Attributes:
        grid: G, tokens along one side of the view.
        width: C, width of the joint embedding.
        mean, std: the normalisation its images must have.
    """

    def __init__(self, config: Teacher, image_size: int, device: str = "cpu") -> None:
        """Loads the model at `image_size` (position embeddings are resized now, open_clip does it at no other time).

        Raises:
            UserError: unknown model, missing or unfitting weights, not a ViT, a size its patches do not divide.
        """
        self.model = _load(config, image_size).to(device).eval().requires_grad_(False)
        self.device = device
        visual = self.model.visual
        if not isinstance(visual, VisionTransformer) or not isinstance(
            visual.transformer.resblocks[-1].attn, nn.MultiheadAttention
        ):
            raise UserError(
                f"teacher.model {config.model}: its image tower is no plain ViT with a CLS token; choose a ViT-* model"
            )
        patch = visual.patch_size[0]
        if image_size % patch:
            raise UserError(
                f"views.size {image_size} is no multiple of the patch size {patch} of teacher.model {config.model}"
            )
        self.grid: int = image_size // patch
        self.width: int = visual.output_dim
        self.mean: tuple[float, ...] = tuple(visual.image_mean or open_clip.OPENAI_DATASET_MEAN)
        self.std: tuple[float, ...] = tuple(visual.image_std or open_clip.OPENAI_DATASET_STD)
        self._tokenizer = open_clip.SimpleTokenizer(context_length=self.model.context_length)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) normalised images -> CLS tokens (B, C), unnormalised, and dense tokens (B, G, G, C)."""
        return clearclip(self.model.visual, pixels.to(self.device))

    @torch.inference_mode()
    def text_features(self, names: tuple[str, ...], templates: tuple[str, ...]) -> Tensor:
        """(K, C) unit-length: each prompt's feature normalised, averaged over templates, normalised again."""
        features = []
        for name in names:
            prompts = self._tokenizer([template.format(name) for template in templates]).to(self.device)
            each = nn.functional.normalize(self.model.encode_text(prompts), dim=-1)
            features.append(nn.functional.normalize(each.mean(dim=0), dim=-1))
        return torch.stack(features)


def _located(name: str) -> Path:
    """A file named as given, or relative to configs/ (where the embedded teacher lives)."""
    path = Path(name)
    return path if path.is_file() else CONFIGS / name


def _load(config: Teacher, image_size: int) -> CLIP:
    name = config.model
    if name.endswith(".json"):
        path = _located(name)
        try:
            content = json.loads(path.read_text())
        except OSError as error:
            raise UserError(f"teacher.model: cannot read {name}: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"teacher.model: {name} is not valid JSON: {error}") from error
        if not isinstance(content, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= content.keys():
            raise UserError(
                f"teacher.model: {name} is no open_clip config, which holds embed_dim, vision_cfg, text_cfg"
            )
        open_clip.add_model_config(path)
        name = path.stem
    elif "hf_tokenizer_name" in (open_clip.get_model_config(name) or {}).get("text_cfg", {}):
        raise UserError(
            f"teacher.model {name}: its text tower needs a tokenizer of its own, which is not supported yet"
        )
    elif name not in open_clip.list_models():
        raise UserError(
            f"unknown teacher.model {name!r}: give a name that open_clip lists (open_clip.list_models()) or a JSON file"
        )
    pretrained = config.pretrained
    if pretrained in open_clip.list_pretrained_tags_by_model(name):
        source = pretrained
    elif _located(pretrained).is_file():
        source = str(_located(pretrained))
    else:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(
            f"teacher.pretrained {pretrained!r} is neither a file nor a tag of {config.model} (tags: {tags})"
        )
    try:
        return open_clip.create_model(name, pretrained=source, force_image_size=image_size)
    except Exception as error:  # open_clip, torch, safetensors and the hub each raise their own
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"teacher.pretrained {pretrained}: the weights cannot be loaded into {config.model}: {reason}"
        ) from error


def weights_fingerprint(config: Teacher) -> dict[str, str]:
    """What a cache's fingerprint says of the teacher: sha256 of local files, the name of anything else."""
    named = {"model": config.model, "pretrained": config.pretrained}
    return {key: _digest(_located(value)) if _located(value).is_file() else value for key, value in named.items()}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
