"""A teacher of two blocks with random weights, built as the embedded one is: JSON config and safetensors file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip.factory
import pytest
import torch
from open_clip.model import CLIP
from safetensors.torch import save_file

from configs.errors import UserError
from configs.schema import Teacher
from pipeline.teacher.clip import FrozenClip

Weights = dict[str, torch.Tensor]
TEXT: dict[str, Any] = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": TEXT,
}


def random_weights(architecture: dict[str, Any], seed: int = 0) -> Weights:
    """Large enough for sharp attention; no bias is 0, no norm's weight is 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        state = CLIP(**architecture).state_dict()
    return {
        name: value + 0.2 * torch.randn(value.shape, generator=generator) * (name != "logit_scale")
        if value.is_floating_point() and "running_var" not in name
        else value
        for name, value in state.items()
    }


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip keeps every JSON file it was shown; each test leaves its lists as they were."""
    for name in ("_MODEL_CONFIG_PATHS", "_MODEL_CONFIGS"):
        monkeypatch.setattr(open_clip.factory, name, getattr(open_clip.factory, name).copy())


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights(ARCHITECTURE)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, weights: Weights) -> Iterator[Teacher]:
    folder = tmp_path_factory.mktemp("teacher")
    yield write(folder, ARCHITECTURE, weights)


@pytest.fixture(scope="module")
def teacher(files: Teacher) -> FrozenClip:
    return FrozenClip(files)


def write(folder: Path, architecture: dict[str, Any], weights: Weights, **settings: str) -> Teacher:
    model, pretrained = folder / "tiny-vit.json", folder / "tiny-vit.safetensors"
    model.write_text(json.dumps(architecture))
    save_file({name: value.contiguous() for name, value in weights.items()}, pretrained)
    return Teacher.model_validate({"model": str(model), "pretrained": str(pretrained)} | settings)


def draw_pixels(batch: int, height: int, width: int | None = None, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height)
    return scale * torch.randn(batch, 3, height, width or height, generator=generator)


def refusal(config: Teacher) -> str:
    """The one line with which `config` is refused."""
    with pytest.raises(UserError) as error:
        FrozenClip(config)
    assert "\n" not in str(error.value)
    return str(error.value)
