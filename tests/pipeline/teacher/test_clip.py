"""The frozen teacher: its tokens against the papers' formulas, at any size, and what it says of itself."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP, resize_pos_embed
from torch import Tensor

from configs.errors import UserError
from configs.schema import CONFIGS, Teacher
from pipeline.teacher.clip import FrozenClip
from pipeline.teacher.towers import Positions
from tests.pipeline.teacher import vit
from tests.pipeline.teacher.conftest import ARCHITECTURE, Weights, draw_pixels, random_weights, write
from tests.reference import Array

LAYERS, HEADS, PATCH, WIDTH = 2, 2, 8, 16
DATA = Path(__file__).parents[4] / "shared" / "data" / "clip_text_embeddings"


def parameters(weights: Weights, positions: Tensor | None = None) -> dict[str, Array]:
    values = {name: value.double().numpy() for name, value in weights.items()}
    if positions is not None:
        values["visual.positional_embedding"] = positions.double().numpy()
    return values


def assert_tokens(found: tuple[Tensor, Tensor], pixels: Tensor, values: dict[str, Array]) -> None:
    cls_token, dense = vit.encode(pixels.double().numpy(), values, LAYERS, HEADS)
    np.testing.assert_allclose(found[0], cls_token, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[1], dense, rtol=1e-5, atol=1e-5)


def at_size(weights: Weights, architecture: dict[str, Any], size: int | tuple[int, int]) -> CLIP:
    """open_clip's model with its position embeddings resized as open_clip does it at `force_image_size`."""
    vision = architecture["vision_cfg"] | {"image_size": size}
    model = CLIP(**(architecture | {"vision_cfg": vision})).eval().requires_grad_(False)
    state = dict(weights)
    resize_pos_embed(state, model)
    model.load_state_dict(state)
    return model


def test_what_it_says_of_itself(teacher: FrozenClip) -> None:
    assert (teacher.stride, teacher.width) == (PATCH, WIDTH)
    assert teacher.mean == open_clip.OPENAI_DATASET_MEAN and teacher.std == open_clip.OPENAI_DATASET_STD


def test_weights_are_those_of_the_file_and_frozen(files: Teacher, weights: Weights) -> None:
    teacher = FrozenClip(files)
    for size in (32, 48, 32):
        teacher.encode(draw_pixels(1, size))
    state = teacher.model.state_dict()
    assert set(state) == set(weights) and not teacher.model.training
    for name, value in weights.items():
        assert torch.equal(state[name], value), name
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_tokens(batch: int, scale: float, teacher: FrozenClip, weights: Weights) -> None:
    """Against the papers' formulas, and the CLS token against open_clip's own; images of one grey included."""
    pixels = draw_pixels(batch, 32, scale=scale)
    cls_token, dense = teacher.encode(pixels)
    assert cls_token.shape == (batch, WIDTH) and dense.shape == (batch, 4, 4, WIDTH)
    assert_tokens((cls_token, dense), pixels, parameters(weights))
    torch.testing.assert_close(cls_token, teacher.model.encode_image(pixels), rtol=0, atol=0)
    assert not cls_token.requires_grad and not dense.requires_grad


def test_images_of_a_batch_do_not_meet(teacher: FrozenClip) -> None:
    pixels = draw_pixels(3, 32)
    together = teacher.encode(pixels)
    for index in range(3):
        for one, all_of_them in zip(teacher.encode(pixels[index : index + 1]), together, strict=True):
            torch.testing.assert_close(one[0], all_of_them[index], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (48, 48), (16, 64), (8, 128), (40, 24)])
def test_another_image_size(size: tuple[int, int], teacher: FrozenClip, weights: Weights) -> None:
    """Position embeddings are resized, bicubic; the CLS token's is not. 16 x 64 and 8 x 128 have as many as 32 x 32."""
    grid = size[0] // PATCH, size[1] // PATCH
    first, rest = weights["visual.positional_embedding"].split((1, 16))
    square = rest.T.reshape(1, -1, 4, 4)
    resized = torch.nn.functional.interpolate(square, grid, mode="bicubic", antialias=True)[0]
    pixels = draw_pixels(2, *size)
    found = teacher.encode(pixels)
    assert teacher.grid(size[0]) == grid[0] and found[1].shape == (2, *grid, WIDTH)
    positions = torch.cat([first, resized.flatten(1).T])
    theirs = at_size(weights | {"visual.positional_embedding": positions}, ARCHITECTURE, size)
    torch.testing.assert_close(found[0], theirs.encode_image(pixels), rtol=1e-5, atol=1e-5)
    values = parameters(weights, positions)
    if grid[0] == grid[1]:  # vit.encode is of square images
        assert_tokens(found, pixels, values)


@pytest.mark.parametrize("embedded", [False, True])
def test_512_is_open_clip_at_512(embedded: bool, files: Teacher) -> None:
    """`create_model(..., force_image_size=512)` itself, whose table is resized in the file's precision."""
    config = files
    if embedded:
        config = Teacher(model="teachers/scenes-vit.json", pretrained="teachers/scenes-vit.safetensors")
    teacher, pixels = FrozenClip(config), draw_pixels(1, 512)
    name, file = Path(config.model).stem, CONFIGS / config.pretrained
    theirs = open_clip.create_model(name, pretrained=str(file), force_image_size=512).eval()
    found = teacher.encode(pixels)[0]
    torch.testing.assert_close(found, theirs.encode_image(pixels).detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(teacher.model.visual.positional_embedding, theirs.visual.positional_embedding.data)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there")
def test_the_position_table_of_openai() -> None:
    """ViT-B/16's own, 14 x 14: for views of 512 pixels it is what open_clip makes of it."""
    table = torch.from_numpy(np.load(DATA / "zegclip_vit-b-16-pos_emb_197x768.npy"))

    for grid in [(32, 32), (14, 14), (32, 48)]:
        state = {"visual.positional_embedding": table}
        resize_pos_embed(state, SimpleNamespace(visual=SimpleNamespace(grid_size=grid)))
        found = Positions(table, (14, 14)).at(grid)
        torch.testing.assert_close(found.data, state["visual.positional_embedding"], rtol=1e-5, atol=1e-6)
    # As many tokens in another shape: open_clip would take it for the same.
    assert not torch.equal(Positions(table, (14, 14)).at((7, 28)).data, table)


def test_positions_come_from_the_original_table() -> None:
    table = torch.randn(17, 3, generator=torch.Generator().manual_seed(0))
    positions = Positions(table, (4, 4))
    before = positions.at((2, 6))
    positions.at((1, 1))
    assert positions.at((2, 6)) is before and torch.equal(positions.at((4, 4)), table)
    torch.testing.assert_close(positions.at((2, 6)), Positions(table, (4, 4)).at((2, 6)))
    assert torch.equal(positions.at((9, 2))[0], table[0])


def test_half_precision_weights(weights: Weights, tmp_path: Path) -> None:
    """As the embedded teacher's; the computation is in float32, the resizing of positions too."""
    half = {name: value.half() for name, value in weights.items()}
    teacher = FrozenClip(write(tmp_path, ARCHITECTURE, half))
    assert {parameter.dtype for parameter in teacher.model.parameters()} == {torch.float32}
    pixels = draw_pixels(2, 32)
    assert_tokens(teacher.encode(pixels), pixels, parameters(half))
    assert teacher.encode(draw_pixels(1, 48))[1].dtype == torch.float32


def test_two_files_of_one_name(files: Teacher, weights: Weights, tmp_path: Path) -> None:
    """open_clip knows models by the file's name alone: the file that was given last counts."""
    small = {**ARCHITECTURE, "embed_dim": 8}
    other = write(tmp_path, small, random_weights(small))
    assert Path(other.model).name == Path(files.model).name
    assert FrozenClip(other).width == 8
    again = FrozenClip(files)
    assert again.width == WIDTH and torch.equal(again.model.visual.proj, weights["visual.proj"])


@pytest.mark.parametrize(("size", "fitting"), [(33, "32 or 40"), (31, "24 or 32"), (12, "8 or 16"), (4, "8")])
def test_size_that_the_patches_do_not_divide(size: int, fitting: str, teacher: FrozenClip) -> None:
    for call in (lambda: teacher.grid(size), lambda: teacher.encode(draw_pixels(1, 32, size))):
        with pytest.raises(UserError) as error:
            call()
        assert str(error.value).startswith(f"views.size {size} is not a multiple of 8, ")
        assert str(error.value).endswith(f"tiny-vit.json: use {fitting}")
