"""The teacher's tokens against an independent reference on `transformers`' CLIP: variants, sizes, activations."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP, resize_pos_embed
from safetensors.torch import save_file
from torch import Tensor

from configs.schema import Teacher
from pipeline.teacher.clip import FrozenClip
from tests.pipeline.teacher.reference_vit import VARIANTS, Array, ReferenceVit, Weights

TOLERANCE = 1e-5
MODELS = ("quick-16", "gelu-16", "quick-32", "gelu-32")
# Height and width; 0 is one patch. The models are made for 224 x 224.
SIZES = [(224, 224), (512, 512), (224, 512), (512, 224), (96, 160), (0, 0)]
Kind = Literal["noise", "zero", "constant"]


def architecture_of(model: str) -> dict[str, Any]:
    """Image width, head width and embedding width all differ; so do heads and layers."""
    activation, patch = model.split("-")
    width, head_width, embed_dim = (64, 32, 40) if patch == "16" else (96, 24, 56)
    return {
        "embed_dim": embed_dim,
        "quick_gelu": activation == "quick",
        "vision_cfg": {
            "image_size": 224,
            "patch_size": int(patch),
            "width": width,
            "head_width": head_width,
            "layers": 3,
        },
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }


def draw_weights(architecture: dict[str, Any], seed: int) -> Weights:
    """Tokens far apart, attention neither uniform nor on one token, no bias of 0, no norm's weight of 1."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        weights = CLIP(**architecture).state_dict()
        for name, value in weights.items():
            if not name.startswith("visual."):
                continue
            if ".ln_" in name and name.endswith("weight"):
                value.normal_(1, 0.2)
            elif name.endswith("bias"):
                value.normal_(0, 0.2)
            elif name.endswith(("class_embedding", "positional_embedding")):
                value.normal_(0, 0.5)
            elif name.endswith("in_proj_weight"):
                value *= 1.2
    return {name: value.contiguous() for name, value in weights.items()}


def draw_pixels(height: int, width: int, batch: int = 2, kind: Kind = "noise") -> Tensor:
    """Noise on broad patches of colour, so that some tokens are alike and none are the same."""
    if kind == "zero":
        return torch.zeros(batch, 3, height, width)
    generator = torch.Generator().manual_seed(1000 * height + width)
    if kind == "constant":
        return torch.randn(batch, 3, 1, 1, generator=generator).expand(-1, -1, height, width).contiguous()
    broad = torch.randn(batch, 3, -(-height // 48), -(-width // 48), generator=generator)
    broad = broad.repeat_interleave(48, dim=2).repeat_interleave(48, dim=3)[:, :, :height, :width]
    return broad + torch.randn(batch, 3, height, width, generator=generator)


class Lab:
    """Models of one session: weights, references, the product's teachers, and what the references expect."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.weights = cache(self._weights)
        self.reference = cache(self._reference)
        self.teacher = cache(self._teacher)
        self.expected = cache(self._expected)

    def _weights(self, model: str) -> Weights:
        return draw_weights(architecture_of(model), seed=MODELS.index(model))

    def _reference(self, model: str) -> ReferenceVit:
        return ReferenceVit(architecture_of(model), self.weights(model))

    def _teacher(self, model: str, variant: str) -> FrozenClip:
        return FrozenClip(write(self.folder, model, architecture_of(model), self.weights(model), variant))

    def _expected(
        self, model: str, height: int, width: int, batch: int, kind: Kind
    ) -> tuple[Tensor, tuple[Array, dict[str, Array]]]:
        pixels = draw_pixels(height, width, batch, kind)
        return pixels, self.reference(model).encode(pixels)


def write(folder: Path, name: str, architecture: dict[str, Any], weights: Weights, variant: str) -> Teacher:
    model, pretrained = folder / f"reference-{name}.json", folder / f"reference-{name}.safetensors"
    if not model.exists():
        model.write_text(json.dumps(architecture))
        save_file(weights, pretrained)
    return Teacher.model_validate({"model": str(model), "pretrained": str(pretrained), "dense": variant})


def sides(model: str, size: tuple[int, int]) -> tuple[int, int]:
    patch = architecture_of(model)["vision_cfg"]["patch_size"]
    return size[0] or patch, size[1] or patch


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("dense-reference"))


def assert_close(found: Tensor, expected: Array) -> None:
    """Absolute, and relative to the largest value when that is below 1."""
    assert found.dtype == torch.float32 and found.shape == expected.shape
    largest = np.abs(expected).max()
    assert 0.5 < largest < 10, "a tolerance of 1e-5 is for values about 1"
    np.testing.assert_allclose(found.double().cpu().numpy(), expected, rtol=0, atol=TOLERANCE * min(1.0, largest))


def open_clip_at(architecture: dict[str, Any], weights: Weights, height: int, width: int) -> CLIP:
    """open_clip's own model, made for another size, with its own way of resizing position embeddings."""
    made = {**architecture, "vision_cfg": {**architecture["vision_cfg"], "image_size": (height, width)}}
    model = CLIP(**made).eval().requires_grad_(False)
    state = dict(weights)
    resize_pos_embed(state, model)
    model.load_state_dict(state)
    return model


# The reference against others, without the product.


@pytest.mark.parametrize("model", MODELS)
def test_reference_is_the_model_of_transformers(model: str, lab: Lab) -> None:
    """The same numbers from `transformers`' forward; its last block is the row by row one."""
    pixels, (pooled, dense) = lab.expected(model, 224, 224, 2, "noise")
    reference = lab.reference(model)
    np.testing.assert_allclose(pooled, reference.image_embeds(pixels), rtol=0, atol=1e-12)
    whole = reference.model(pixel_values=pixels.double(), output_hidden_states=False)
    tokens = reference.model.visual_projection(reference.model.vision_model.post_layernorm(whole.last_hidden_state))
    np.testing.assert_allclose(dense["plain"].reshape(tokens[:, 1:].shape), tokens[:, 1:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("model", MODELS)
def test_reference_agrees_with_open_clip(model: str, size: tuple[int, int], lab: Lab) -> None:
    """S and plain tokens, at every size, from open_clip's model with open_clip's resized position embeddings."""
    pixels, (pooled, dense) = lab.expected(model, *sides(model, size), 2, "noise")
    theirs = open_clip_at(architecture_of(model), lab.weights(model), *sides(model, size))
    assert_close(theirs.encode_image(pixels), pooled)
    visual = theirs.visual
    visual.output_tokens = True
    tokens = visual(pixels)[1] @ visual.proj
    assert_close(tokens.unflatten(1, dense["plain"].shape[1:3]), dense["plain"])


@pytest.mark.parametrize("model", MODELS)
def test_variants_are_far_apart(model: str, lab: Lab) -> None:
    """And so are tokens of one image, and images: a test that a wrong answer passes would be worth nothing."""
    _, (pooled, dense) = lab.expected(model, 96, 160, 2, "noise")
    for name, value in dense.items():
        assert value.std(axis=(1, 2)).mean() > 0.05, name
        assert np.abs(value[0] - value[1]).max() > 1e4 * TOLERANCE
        for other, different in dense.items():
            assert name == other or np.abs(value - different).mean() > 1e3 * TOLERANCE, (name, other)
    assert np.abs(pooled[0] - pooled[1]).max() > 1e4 * TOLERANCE


# The product against the reference.


@pytest.mark.parametrize("model", MODELS)
def test_what_it_says_of_its_tokens(model: str, lab: Lab) -> None:
    """Width, stride and grid are those of what it returns."""
    architecture, teacher = architecture_of(model), lab.teacher(model, "naclip")
    patch = architecture["vision_cfg"]["patch_size"]
    assert (teacher.width, teacher.stride) == (architecture["embed_dim"], patch)
    pooled, dense = teacher.encode(draw_pixels(224, 512))
    assert pooled.shape == (2, teacher.width)
    assert dense.shape == (2, teacher.grid(224), teacher.grid(512), teacher.width)
    assert (teacher.grid(224), teacher.grid(512)) == (224 // patch, 512 // patch)
    assert not pooled.requires_grad and not dense.requires_grad


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", MODELS)
def test_tokens(model: str, variant: str, size: tuple[int, int], lab: Lab) -> None:
    pixels, (pooled, dense) = lab.expected(model, *sides(model, size), 2, "noise")
    found_pooled, found = lab.teacher(model, variant).encode(pixels)
    assert_close(found_pooled, pooled)
    assert_close(found, dense[variant])


@pytest.mark.parametrize("size", [(224, 224), (96, 160), (0, 0)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["zero", "constant"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", ["quick-16", "gelu-32"])
def test_featureless_images(model: str, variant: str, kind: Kind, batch: int, size: tuple[int, int], lab: Lab) -> None:
    """One colour all over: tokens differ by their position alone."""
    pixels, (pooled, dense) = lab.expected(model, *sides(model, size), batch, kind)
    found_pooled, found = lab.teacher(model, variant).encode(pixels)
    assert_close(found_pooled, pooled)
    assert_close(found, dense[variant])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", [1, 3])
def test_batches(batch: int, variant: str, lab: Lab) -> None:
    pixels, (pooled, dense) = lab.expected("quick-16", 96, 160, batch, "noise")
    found_pooled, found = lab.teacher("quick-16", variant).encode(pixels)
    assert_close(found_pooled, pooled)
    assert_close(found, dense[variant])


@pytest.mark.parametrize("variant", VARIANTS)
def test_sizes_in_turn_by_one_teacher(variant: str, lab: Lab) -> None:
    """What one size leaves behind (positions, NACLIP's map) is not used for the next, as 10 x 6 after 6 x 10."""
    teacher = lab.teacher("gelu-16", variant)
    for height, width in [(96, 160), (160, 96), (96, 160), (80, 192), (224, 224), (16, 16), (96, 160)]:
        pixels, (pooled, dense) = lab.expected("gelu-16", height, width, 2, "noise")
        found_pooled, found = teacher.encode(pixels)
        assert_close(found_pooled, pooled)
        assert_close(found, dense[variant])


# A tower of the paper's size.

LARGE_SIZES = [(224, 224), (96, 320)]


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Callable[[str], FrozenClip], list[Any]]]:
    architecture = open_clip.get_model_config("ViT-B-16-quickgelu")
    weights = draw_weights(architecture, seed=7)
    folder = tmp_path_factory.mktemp("dense-reference-large")
    reference = ReferenceVit(architecture, weights)
    cases = []
    for height, width in LARGE_SIZES:
        pixels = draw_pixels(height, width, batch=1)
        cases.append((pixels, *reference.encode(pixels)))
    yield lambda variant: FrozenClip(write(folder, "vit-b-16", architecture, weights, variant)), cases
    shutil.rmtree(folder)  # 600 MB, which pytest would keep for three sessions


@pytest.mark.parametrize("variant", VARIANTS)
def test_vit_b_16(variant: str, large: tuple[Callable[[str], FrozenClip], list[Any]]) -> None:
    build, cases = large
    teacher = build(variant)
    assert teacher.width == 512
    for pixels, pooled, dense in cases:
        found_pooled, found = teacher.encode(pixels)
        assert_close(found_pooled, pooled)
        assert_close(found, dense[variant])
