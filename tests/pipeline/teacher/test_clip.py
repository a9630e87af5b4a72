"""The frozen teacher: its tokens, its text features, and what is said of a model that cannot be loaded."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import CONFIGS, Teacher
from pipeline.teacher.clip import FrozenClip, weights_fingerprint
from tests.pipeline.teacher import vit
from tests.pipeline.teacher.conftest import ARCHITECTURE, random_weights, write
from tests.reference import Array, unit

LAYERS, HEADS, PATCH, WIDTH = 2, 2, 8, 16
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def teacher(files: Teacher) -> FrozenClip:
    return FrozenClip(files, 32)


def draw_pixels(batch: int, size: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(size))


def parameters(weights: Weights, positions: Tensor | None = None) -> dict[str, Array]:
    values = {name: value.double().numpy() for name, value in weights.items()}
    if positions is not None:
        values["visual.positional_embedding"] = positions.double().numpy()
    return values


def assert_tokens(found: tuple[Tensor, Tensor], pixels: Tensor, values: dict[str, Array]) -> None:
    cls_token, dense = vit.encode(pixels.double().numpy(), values, LAYERS, HEADS)
    np.testing.assert_allclose(found[0], cls_token, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[1], dense, rtol=1e-5, atol=1e-5)


def refusal(config: Teacher, image_size: int = 32) -> str:
    with pytest.raises(UserError) as error:
        FrozenClip(config, image_size)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_it_says_of_itself(teacher: FrozenClip) -> None:
    assert (teacher.grid, teacher.width) == (4, WIDTH)
    assert teacher.mean == open_clip.OPENAI_DATASET_MEAN and teacher.std == open_clip.OPENAI_DATASET_STD


def test_weights_are_those_of_the_file_and_frozen(teacher: FrozenClip, weights: Weights) -> None:
    state = teacher.model.state_dict()
    assert set(state) == set(weights) and not teacher.model.training
    for name, value in weights.items():
        assert torch.equal(state[name], value), name
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_tokens(batch: int, scale: float, teacher: FrozenClip, weights: Weights) -> None:
    """Against the papers' formulas, and the CLS token against open_clip's own; images of one grey included."""
    pixels = draw_pixels(batch, 32, scale)
    cls_token, dense = teacher.encode(pixels)
    assert cls_token.shape == (batch, WIDTH) and dense.shape == (batch, 4, 4, WIDTH)
    assert_tokens((cls_token, dense), pixels, parameters(weights))
    torch.testing.assert_close(cls_token, teacher.model.encode_image(pixels), rtol=1e-5, atol=1e-5)
    assert not cls_token.requires_grad and not dense.requires_grad


def test_tokens_are_not_those_of_the_unmodified_block(teacher: FrozenClip) -> None:
    """With these weights the variants are far apart, so that the test above can tell them."""
    visual, pixels = teacher.model.visual, draw_pixels(2, 32)
    plain = visual.ln_post(visual.transformer(visual._embeds(pixels))[:, 1:]) @ visual.proj
    dense = teacher.encode(pixels)[1]
    assert torch.nn.functional.cosine_similarity(dense.flatten(1, 2), plain, dim=-1).mean() < 0.9
    assert (dense - dense.mean(dim=(1, 2), keepdim=True)).std() > 0.1


def test_images_of_a_batch_do_not_meet(teacher: FrozenClip) -> None:
    pixels = draw_pixels(3, 32)
    together = teacher.encode(pixels)
    for index in range(3):
        for one, all_of_them in zip(teacher.encode(pixels[index : index + 1]), together, strict=True):
            torch.testing.assert_close(one[0], all_of_them[index], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [8, 16, 48])
def test_another_image_size(size: int, files: Teacher, weights: Weights) -> None:
    """Position embeddings are resized, bicubic; the CLS token's is not."""
    teacher = FrozenClip(files, size)
    grid = size // PATCH
    first, rest = weights["visual.positional_embedding"].split((1, 16))
    square = rest.T.reshape(1, -1, 4, 4)
    resized = torch.nn.functional.interpolate(square, (grid, grid), mode="bicubic", antialias=True)[0]
    positions = torch.cat([first, resized.flatten(1).T])
    torch.testing.assert_close(teacher.model.visual.positional_embedding, positions)
    pixels = draw_pixels(2, size)
    assert teacher.grid == grid and teacher.encode(pixels)[1].shape == (2, grid, grid, WIDTH)
    assert_tokens(teacher.encode(pixels), pixels, parameters(weights, positions))


def test_half_precision_weights(weights: Weights, tmp_path: Path) -> None:
    """As the embedded teacher's; the computation is in float32."""
    half = {name: value.half() for name, value in weights.items()}
    teacher = FrozenClip(write(tmp_path, ARCHITECTURE, half), 32)
    assert {parameter.dtype for parameter in teacher.model.parameters()} == {torch.float32}
    pixels = draw_pixels(2, 32)
    assert_tokens(teacher.encode(pixels), pixels, parameters(half))


def test_two_files_of_one_name(files: Teacher, weights: Weights, tmp_path: Path) -> None:
    """open_clip knows models by the file's name alone: the file that was given last counts."""
    small = {**ARCHITECTURE, "embed_dim": 8}
    other = write(tmp_path, small, random_weights(small))
    assert Path(other.model).name == Path(files.model).name
    assert FrozenClip(other, 32).width == 8
    again = FrozenClip(files, 32)
    assert again.width == WIDTH and torch.equal(again.model.visual.proj, weights["visual.proj"])


@pytest.mark.parametrize("templates", [("a photo of a {}.",), ("{}", "a {} in the scene.", "This is one {}!")])
@pytest.mark.parametrize("names", [("cat",), ("cat", "potted plant", "tv/monitor", "", "a word " * 30)])
def test_text_features(names: tuple[str, ...], templates: tuple[str, ...], teacher: FrozenClip) -> None:
    """Each prompt's feature normalised, averaged, normalised; long names are cut."""
    found = teacher.text_features(names, templates)
    assert found.shape == (len(names), WIDTH)
    tokenizer = open_clip.SimpleTokenizer(context_length=24)
    for name, feature in zip(names, found, strict=True):
        with torch.no_grad():
            prompts = [teacher.model.encode_text(tokenizer(t.replace("{}", name)))[0] for t in templates]
        mean = np.mean([unit(prompt.double().numpy()) for prompt in prompts], axis=0)
        np.testing.assert_allclose(feature, unit(mean), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.norm(dim=1), 1, rtol=1e-6)
    if len(names) > 1:
        assert (found[0] - found[1]).norm() > 1e-2


def test_unknown_model() -> None:
    message = refusal(Teacher(model="ViT-B-99"))
    assert message.startswith("unknown teacher.model 'ViT-B-99': ") and "open_clip.list_models()" in message


@pytest.mark.parametrize("pretrained", ["opanai", "", "weights.safetensors", "teachers"])
def test_neither_tag_nor_file(pretrained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tags there are are named; nothing is built or downloaded."""
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: pytest.fail("a model was made"))
    message = refusal(Teacher(model="ViT-B-16-quickgelu", pretrained=pretrained))
    expected = f"teacher.pretrained {pretrained!r} is neither a file nor a tag of ViT-B-16-quickgelu (tags: "
    assert message.startswith(expected) and "openai" in message.removeprefix(expected)


def test_missing_weights(files: Teacher, tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere.safetensors")
    message = refusal(Teacher(model=files.model, pretrained=missing))
    assert message == f"teacher.pretrained {missing!r} is neither a file nor a tag of {files.model} (tags: none)"


def test_missing_config(files: Teacher, tmp_path: Path) -> None:
    missing, folder = tmp_path / "nowhere.json", tmp_path / "folder.json"
    folder.mkdir()
    for path in (missing, folder):
        message = refusal(Teacher(model=str(path), pretrained=files.pretrained))
        assert message.startswith(f"teacher.model: cannot read {path}: ")


@pytest.mark.parametrize("content", ["", "{", '{"embed_dim": 16,}', "embed_dim: 16", "\xff"])
def test_broken_config(content: str, files: Teacher, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content.encode("latin-1"))
    message = refusal(Teacher(model=str(path), pretrained=files.pretrained))
    assert message.startswith(f"teacher.model: {path} is not valid JSON: ")


@pytest.mark.parametrize("content", ["{}", "[]", "5", '{"embed_dim": 16}'])
def test_config_of_no_model(content: str, files: Teacher, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    assert refusal(Teacher(model=str(path), pretrained=files.pretrained)).startswith(f"teacher.model: {path} ")


def test_config_of_another_architecture(files: Teacher, tmp_path: Path) -> None:
    """A key that open_clip does not know, and a tower that is no ViT."""
    path = tmp_path / "strange.json"
    path.write_text(json.dumps(ARCHITECTURE | {"vision_cfg": ARCHITECTURE["vision_cfg"] | {"depth": 3}}))
    assert str(path) in refusal(Teacher(model=str(path), pretrained=files.pretrained))

    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
    resnet = ARCHITECTURE | {"vision_cfg": vision}
    config = write(tmp_path, resnet, random_weights(resnet))
    expected = f"teacher.model {config.model}: its image tower is no plain ViT with a CLS token; choose a ViT-* model"
    assert refusal(config) == expected


def wrong_shape(weights: Weights) -> Weights:
    return weights | {"visual.proj": torch.zeros(32, 8)}


def without_a_tensor(weights: Weights) -> Weights:
    return {name: value for name, value in weights.items() if name != "visual.ln_post.bias"}


def with_a_tensor_too_many(weights: Weights) -> Weights:
    return weights | {"visual.extra": torch.zeros(3)}


@pytest.mark.parametrize(
    ("change", "named"),
    [(wrong_shape, "size mismatch"), (without_a_tensor, "ln_post.bias"), (with_a_tensor_too_many, "visual.extra")],
)
def test_weights_that_do_not_fit(
    change: Callable[[Weights], Weights], named: str, weights: Weights, tmp_path: Path
) -> None:
    config = write(tmp_path, ARCHITECTURE, change(weights))
    message = refusal(config)
    assert message.startswith(
        f"teacher.pretrained {config.pretrained}: the weights cannot be loaded into {config.model}"
    )
    assert named in message


def test_corrupt_weights(weights: Weights, tmp_path: Path) -> None:
    config = write(tmp_path, ARCHITECTURE, weights)
    file = Path(config.pretrained)
    data = file.read_bytes()
    for broken in (data[: len(data) // 2], data[:4], b"", b"\x00" * 64, b"{}" + data):
        file.write_bytes(broken)
        assert refusal(config).startswith(f"teacher.pretrained {file}: the weights cannot be loaded into ")


class Trap:
    """Pickled into a weights file: creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_weights_with_code_are_refused(files: Teacher, tmp_path: Path) -> None:
    sprung, plain = tmp_path / "sprung", tmp_path / "weights.pt"
    plain.write_bytes(pickle.dumps({"visual.proj": Trap(sprung)}, protocol=2))
    zipped = tmp_path / "zipped.pt"
    torch.save({"visual.proj": Trap(sprung)}, zipped)
    for file in (plain, zipped):
        assert str(file) in refusal(Teacher(model=files.model, pretrained=str(file)))
        assert not sprung.exists()
    pickle.loads(plain.read_bytes())
    assert sprung.exists()  # the trap was set


@pytest.mark.parametrize("size", [33, 31, 12])
def test_size_that_the_patches_do_not_divide(size: int, files: Teacher) -> None:
    expected = f"views.size {size} is no multiple of the patch size 8 of teacher.model {files.model}"
    assert refusal(files, size) == expected


def test_size_below_one_patch(files: Teacher) -> None:
    refusal(files, 4)


def test_fingerprint(weights: Weights, tmp_path: Path) -> None:
    """It belongs to the files' bytes, not to their names."""
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    config, copy = (write(tmp_path / name, ARCHITECTURE, weights) for name in "ab")
    before = weights_fingerprint(config)
    assert set(before) == {"model", "pretrained"} and weights_fingerprint(copy) == before
    for name in ("model", "pretrained"):
        file = Path(getattr(copy, name))
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        assert weights_fingerprint(copy)[name] != before[name]
    assert weights_fingerprint(config) == before


def test_fingerprint_of_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is loaded; what lies in configs/ is found from any folder."""
    monkeypatch.chdir(tmp_path)
    assert weights_fingerprint(Teacher()) == {"model": "ViT-B-16-quickgelu", "pretrained": "openai"}
    embedded = "teachers/scenes-vit.json"
    by_name, by_path = (weights_fingerprint(Teacher(model=name)) for name in (embedded, str(CONFIGS / embedded)))
    assert by_name == by_path and len(by_name["model"]) == 64
