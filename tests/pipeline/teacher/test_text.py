"""Class features: the prompt ensemble against a slow loop, and files of features."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.numpy import save_file

from configs.errors import UserError
from pipeline.teacher import text
from pipeline.teacher.clip import FrozenClip
from pipeline.teacher.text import prompt_templates, read_text_features
from tests.reference import unit

DATA = Path(__file__).parents[4] / "shared" / "data" / "clip_text_embeddings"
NAMES = [("cat",), ("potted plant", "plant", "house plant"), ("tv/monitor",), ("a word " * 30,), ("{x}", "")]


@pytest.mark.parametrize("templates", ["single", "zegclip", ("{}", "a {} in {} scenes {0}.", "This is one {}!")])
@pytest.mark.parametrize("batch", [1, 7, 256])
def test_ensemble(
    batch: int, templates: str | tuple[str, ...], teacher: FrozenClip, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts normalised, averaged over templates, normalised; over synonyms, normalised; long names are cut."""
    monkeypatch.setattr(text, "BATCH", batch)
    found = teacher.text_features(NAMES, templates)
    tokenizer = open_clip.SimpleTokenizer(context_length=24)
    classes = []
    for synonyms in NAMES:
        means = []
        for name in synonyms:
            prompts = [template.replace("{}", name) for template in prompt_templates(templates)]
            with torch.no_grad():
                each = [unit(teacher.model.encode_text(tokenizer(prompt))[0].double().numpy()) for prompt in prompts]
            means.append(unit(np.mean(each, axis=0)))
        classes.append(unit(np.mean(means, axis=0)))
    assert found.dtype == torch.float32 and not found.requires_grad
    np.testing.assert_allclose(found, np.stack(classes), rtol=1e-5, atol=1e-5)
    assert (found[0] - found[1]).norm() > 1e-2


def test_templates() -> None:
    """ZegCLIP's 15 as docs/facts.md lists them; open_clip's 80 are functions."""
    photo = ["a photo of a {}.", "a photo of a small {}.", "a photo of a medium {}.", "a photo of a large {}."]
    zegclip = [*photo, *("This is " + each for each in photo), "a {} in the scene.", "a photo of a {} in the scene."]
    zegclip += ["There is a {} in the scene.", "There is the {} in the scene."]
    zegclip += ["This is a {} in the scene.", "This is the {} in the scene.", "This is one {} in the scene."]
    assert list(prompt_templates("zegclip")) == zegclip
    assert prompt_templates("single") == ("a photo of a {}.",)
    imagenet = prompt_templates("imagenet")
    assert len(set(imagenet)) == 80 and all(template.count("{}") == 1 for template in imagenet)
    assert [t.replace("{}", "cat") for t in imagenet] == [t("cat") for t in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert prompt_templates(["{}"]) == ("{}",)


def features(classes: int = 3, width: int = 4) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(classes, width)).astype(np.float16)


@pytest.mark.parametrize("width", [4, None])
@pytest.mark.parametrize("name", ["a.npy", "one.safetensors", "named.safetensors"])
def test_reading(name: str, width: int | None, tmp_path: Path) -> None:
    path, wanted = tmp_path / name, features()
    others = {"other": features(2)} if name.startswith("named") else {}
    if path.suffix == ".npy":
        np.save(path, wanted)
    else:
        save_file({"text_features" if others else "anything": wanted, **others}, path)
    found = read_text_features(path, 3, width)
    assert found.dtype == np.float32
    exact = wanted.astype(np.float64)
    np.testing.assert_allclose(found, exact / np.linalg.norm(exact, axis=1, keepdims=True), rtol=1e-6)


def refusal(path: Path, classes: int = 3, width: int | None = 4) -> str:
    with pytest.raises(UserError) as error:
        read_text_features(path, classes, width)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (features(4), "have 4 rows, but 3 are needed"),
        (features(3, 5), "5 wide, but the teacher's embedding is 4"),
        (features()[0], "must be floats"),
        (features()[None], "must be floats"),
        (np.ones((3, 4), dtype=np.int64), "must be floats"),
        (features() * np.array([[1], [0], [1]], dtype=np.float16), "row 1 is zero or not finite"),
        (features() * np.array([[1], [1], [np.nan]], dtype=np.float16), "row 2 is zero or not finite"),
        (features() * np.array([[np.inf], [1], [1]], dtype=np.float16), "row 0 is zero or not finite"),
        (np.array([[{}]], dtype=object), "cannot be read"),
    ],
)
def test_wrong_content(content: np.ndarray, said: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.npy"
    np.save(path, content, allow_pickle=True)
    assert said in refusal(path)


@pytest.mark.parametrize("name", ["wrong.npy", "wrong.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"{}", b"\x93NUMPY\x01\x00"])
def test_broken_files(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert "cannot be read" in refusal(tmp_path / name)


def test_other_files(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "nowhere.npy")
    assert "cannot" in refusal(tmp_path / "nowhere.safetensors")
    assert "must be a .npy or a .safetensors" in refusal(tmp_path / "features.pt")
    save_file({"a": features(), "b": features()}, tmp_path / "two.safetensors")
    assert "none of the 2 tensors is named text_features" in refusal(tmp_path / "two.safetensors")


@pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there")
@pytest.mark.parametrize(("name", "classes"), [("zegclip_coco_single", 171), ("zegclip_voc12_single", 20)])
def test_openai_features(name: str, classes: int) -> None:
    """Real ones, of ViT-B/16."""
    found = read_text_features(DATA / f"{name}.npy", classes, 512)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(found, np.load(DATA / f"{name}.npy"), atol=1e-3)
    assert np.triu(found @ found.T, 1).max() < 0.999
