"""Where the teacher's weights come from, and what is said of a model that cannot be loaded."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from configs.errors import UserError
from configs.schema import CONFIGS, Teacher
from pipeline.teacher.clip import FrozenClip
from pipeline.teacher.load import weights_fingerprint
from tests.hub import put
from tests.pipeline.teacher.conftest import ARCHITECTURE, Weights, draw_pixels, random_weights, refusal, write

# Widths of 64: OpenAI's archives say nothing of heads, which are all 64 wide.
OPENAI = ARCHITECTURE | {
    "quick_gelu": True,
    "vision_cfg": ARCHITECTURE["vision_cfg"] | {"width": 64, "head_width": 64},
    "text_cfg": ARCHITECTURE["text_cfg"] | {"width": 64, "heads": 1},
}


def archive(path: Path, state: Weights) -> None:
    """As OpenAI distributes its models: scripted, fp16, with three numbers beside the weights."""

    class Tree(nn.Module):
        def forward(self) -> int:
            return 0

    def add(tree: nn.Module, name: str, value: torch.Tensor) -> None:
        first, _, rest = name.partition(".")
        if not rest:
            return tree.register_parameter(first, nn.Parameter(value, requires_grad=False))
        if not hasattr(tree, first):
            tree.add_module(first, Tree())
        add(getattr(tree, first), rest, value)

    root = Tree()
    for name, value in state.items():
        add(root, name, value.half() if "ln_" not in name else value)
    for name, number in (("input_resolution", 32), ("context_length", 24), ("vocab_size", 49408)):
        root.register_buffer(name, torch.tensor(number))
    torch.jit.script(root).save(str(path))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt", "wrapped.pt", "parallel.bin"])
def test_files_of_weights(suffix: str, files: Teacher, weights: Weights, tmp_path: Path) -> None:
    file = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(weights, file)
    elif suffix == "wrapped.pt":  # as open_clip's training leaves them
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in weights.items()}}, file)
    else:
        torch.save({f"module.{n}" if suffix == "parallel.bin" else n: v for n, v in weights.items()}, file)
    state = FrozenClip(Teacher(model=files.model, pretrained=str(file))).model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights.items())


def test_openai_archive(tmp_path: Path) -> None:
    state = random_weights(OPENAI)
    config = write(tmp_path, OPENAI, state)
    archive(tmp_path / "ViT-tiny.pt", state)
    teacher = FrozenClip(Teacher(model=config.model, pretrained=str(tmp_path / "ViT-tiny.pt")))
    assert {parameter.dtype for parameter in teacher.model.parameters()} == {torch.float32}
    assert teacher.mean == open_clip.OPENAI_DATASET_MEAN
    pixels = draw_pixels(2, 48)
    for found, expected in zip(teacher.encode(pixels), FrozenClip(config).encode(pixels), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)  # the archive's weights are in fp16


def test_openai_archive_refused(tmp_path: Path) -> None:
    """Without QuickGELU, and of another architecture."""
    file = tmp_path / "ViT-B-16.pt"
    archive(file, random_weights(OPENAI))
    config = write(tmp_path, OPENAI | {"quick_gelu": False}, {})
    message = refusal(Teacher(model=config.model, pretrained=str(file)))
    assert message.endswith(f'teacher.model {config.model} computes GELU: set "quick_gelu": true in it')
    message = refusal(Teacher(model="ViT-B-16", pretrained=str(file)))
    assert message.startswith(f"teacher.pretrained {file} is an OpenAI archive, trained with QuickGELU")
    assert message.endswith("use teacher.model=ViT-B-16-quickgelu")
    assert "-quickgelu" in refusal(Teacher(model="EVA02-B-16", pretrained=str(file)))
    other = write(tmp_path, OPENAI | {"embed_dim": 24}, {})
    message = refusal(Teacher(model=other.model, pretrained=str(file)))
    assert message.startswith(f"teacher.pretrained {file}: the weights cannot be loaded into {other.model}: ")
    assert "size mismatch" in message


@pytest.mark.parametrize(
    ("model", "pretrained", "instead"),
    [
        ("ViT-B-16", "openai", "ViT-B-16-quickgelu"),
        ("ViT-B-16", "OpenAI", "ViT-B-16-quickgelu"),
        ("ViT-B-32", "metaclip-400m", "ViT-B-32-quickgelu"),
        ("ViT-H-14", "dfn5b", "ViT-H-14-quickgelu"),
        ("RN50", "openai", "RN50-quickgelu"),
        ("ViT-B-32-quickgelu", "laion2b_s34b_b79k", "ViT-B-32"),
        ("ViT-H-14-378-quickgelu", "openai", None),
    ],
)
def test_tags_of_another_activation(
    model: str, pretrained: str, instead: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_clip, "download_pretrained", lambda *_, **__: pytest.fail("something was downloaded"))
    message = refusal(Teacher(model=model, pretrained=pretrained, dense="plain"))
    if instead:
        assert message.startswith(f"teacher.pretrained {pretrained} was trained with ")
        assert message.endswith(f"use teacher.model={instead}")
    else:
        assert "is neither a file nor a tag of" in message


def test_every_tag_of_open_clip_has_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that open_clip warns of are refused, and the model that is named instead would be downloaded."""

    def download(_: Any) -> str:
        raise ConnectionError

    monkeypatch.setattr(open_clip, "download_pretrained", download)
    mismatched, accepted, redirected = set(), set(), {}
    for model, tag in open_clip.list_pretrained():
        quick = open_clip.get_model_config(model).get("quick_gelu", False)
        if open_clip.get_pretrained_cfg(model, tag).get("quick_gelu", False) != quick:
            mismatched.add((model, tag))
        message = refusal(Teacher(model=model, pretrained=tag))
        if "cannot be downloaded" in message:
            accepted.add((model, tag))
        else:
            redirected[model, tag] = message.rpartition("teacher.model=")[2], tag
    # open_clip has this one with QuickGELU only; its tag just does not say so.
    assert set(redirected) == mismatched - {("roberta-ViT-B-32", "laion2b_s12b_b32k")}
    assert redirected and set(redirected.values()) <= accepted


@pytest.mark.parametrize(
    ("model", "mean"),
    [("ViT-B-16", open_clip.OPENAI_DATASET_MEAN[0]), ("ViT-B-16-SigLIP", 0.5), ("MobileCLIP-S1", 0.0)],
)
def test_normalisation_of_local_files(model: str, mean: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the model's tags: open_clip itself would take OpenAI's."""
    asked: dict[str, Any] = {}

    def create(*_: Any, **settings: Any) -> None:
        asked.update(settings)
        raise RuntimeError

    monkeypatch.setattr(open_clip, "create_model", create)
    (tmp_path / "weights.safetensors").touch()
    refusal(Teacher(model=model, pretrained=str(tmp_path / "weights.safetensors"), dense="plain"))
    assert asked["force_preprocess_cfg"]["mean"][0] == mean


def test_random_weights(files: Teacher, capsys: pytest.CaptureFixture[str]) -> None:
    """The same each time, whatever torch's generator is at, which is left alone; and nobody can miss it."""
    config = Teacher(model=files.model, pretrained="none")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = FrozenClip(config).model.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: teacher.pretrained=none: ") and "random" in warning and files.model in warning
    torch.manual_seed(6)
    second = FrozenClip(config).model.state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert weights_fingerprint(config)["pretrained"] == "none: random weights, seed 0"


def test_hub_model_from_the_cache(offline: Path, weights: Weights, tmp_path: Path) -> None:
    save_file(weights, tmp_path / "weights.safetensors")
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    content = json.dumps({"model_cfg": ARCHITECTURE, "preprocess_cfg": preprocess}).encode()
    stored = (tmp_path / "weights.safetensors").read_bytes()
    put(offline, "org/tiny", {"open_clip_config.json": content, "open_clip_model.safetensors": stored})
    config = Teacher(model="hf-hub:org/tiny")
    assert config.pretrained == "hub"
    assert weights_fingerprint(config) == {"model": "hf-hub:org/tiny", "pretrained": "hub"}
    teacher = FrozenClip(config)
    assert (teacher.mean, teacher.std, teacher.width) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 16)
    state = teacher.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    assert teacher.text_features([("cat",)], "single").shape == (1, 16)
    assert Teacher.model_validate_json(config.model_dump_json()) == config
    message = refusal(Teacher(model="hf-hub:org/tiny", pretrained="openai"))
    assert message.startswith("teacher.pretrained 'openai': ") and message.endswith("set teacher.pretrained=hub")


def test_hub_model_without_weights(offline: Path) -> None:
    """open_clip would go on with random ones."""
    put(offline, "org/tiny", {"open_clip_config.json": json.dumps({"model_cfg": ARCHITECTURE}).encode()})
    for model in ("hf-hub:org/tiny", "hf-hub:org/other"):
        message = refusal(Teacher(model=model))
        assert message.startswith(f"teacher.model {model} is not in the Hugging Face cache and cannot be ")
        assert "connect once" in message and "local file" in message


def test_tag_without_a_network(offline: Path) -> None:
    message = refusal(Teacher())
    assert message.startswith("teacher.pretrained openai: the weights of ViT-B-16-quickgelu cannot be downloaded")
    assert message.endswith("connect once, or set teacher.pretrained to a local file of them")


def test_tag_from_the_cache(offline: Path, weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model in the place of ViT-B-16-quickgelu."""
    tiny = {**ARCHITECTURE, "quick_gelu": True}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-16-quickgelu", tiny)
    save_file(weights, tmp_path / "weights.safetensors")
    stored = (tmp_path / "weights.safetensors").read_bytes()
    put(offline, "timm/vit_base_patch16_clip_224.openai", {"open_clip_model.safetensors": stored})
    assert torch.equal(FrozenClip(Teacher()).model.visual.proj, weights["visual.proj"])


@pytest.mark.parametrize("obtainable", [True, False])
def test_tokenizer_of_the_hub(obtainable: bool, offline: Path, tmp_path: Path) -> None:
    """As SigLIP's: loaded only when there are prompts."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path / "tokenizer"
    if obtainable:
        folder.mkdir()
        made = Tokenizer(models.WordLevel({"[PAD]": 0, "photo": 1, "cat": 2, "[UNK]": 3}, unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        made.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    source = str(folder) if obtainable else "org/nowhere"
    architecture = ARCHITECTURE | {"text_cfg": ARCHITECTURE["text_cfg"] | {"hf_tokenizer_name": source}}
    model = tmp_path / "own-tokenizer.json"
    model.write_text(json.dumps(architecture))
    teacher = FrozenClip(Teacher(model=str(model), pretrained="none"))
    assert teacher.encode(draw_pixels(1, 32))[0].shape == (1, 16)
    if obtainable:
        assert teacher.text_features([("cat",), ("dog",)], "single").shape == (2, 16)
        return
    with pytest.raises(UserError) as error:
        teacher.text_features([("cat",)], "single")
    message = str(error.value)
    assert message.startswith(f"teacher.model {model}: its tokenizer cannot be loaded (") and "\n" not in message
    assert message.endswith("connect once, or set dataset.text_features to a .npy or .safetensors file")


def test_unknown_model() -> None:
    message = refusal(Teacher(model="ViT-B-99"))
    assert message.startswith("unknown teacher.model 'ViT-B-99': ") and "open_clip.list_models()" in message


@pytest.mark.parametrize("pretrained", ["opanai", "", "weights.safetensors", "teachers", "hub"])
def test_neither_tag_nor_file(pretrained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tags there are are named; nothing is built or downloaded."""
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: pytest.fail("a model was made"))
    message = refusal(Teacher(model="ViT-B-16-quickgelu", pretrained=pretrained))
    expected = f"teacher.pretrained {pretrained!r} is neither a file nor a tag of ViT-B-16-quickgelu (tags: "
    assert message.startswith(expected) and "openai" in message.removeprefix(expected)


def test_missing_weights(files: Teacher, tmp_path: Path) -> None:
    """A JSON file has no tags, whatever its name."""
    missing = str(tmp_path / "nowhere.safetensors")
    message = refusal(Teacher(model=files.model, pretrained=missing))
    assert message == f"teacher.pretrained {missing!r} is neither a file nor a tag of {files.model} (tags: none)"
    namesake = tmp_path / "ViT-B-32.json"
    namesake.write_text(json.dumps(ARCHITECTURE))
    assert refusal(Teacher(model=str(namesake), pretrained="openai")).endswith(f"tag of {namesake} (tags: none)")


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


@pytest.mark.parametrize("pretrained", ["none", "file"])
def test_config_of_another_architecture(pretrained: str, files: Teacher, tmp_path: Path) -> None:
    """A key that open_clip does not know."""
    path = tmp_path / "strange.json"
    path.write_text(json.dumps(ARCHITECTURE | {"vision_cfg": ARCHITECTURE["vision_cfg"] | {"depth": 3}}))
    message = refusal(Teacher(model=str(path), pretrained=files.pretrained if pretrained == "file" else "none"))
    assert str(path) in message and "depth" in message


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
    zipped = tmp_path / "zipped.bin"
    torch.save({"visual.proj": Trap(sprung)}, zipped)
    for file in (plain, zipped):
        assert str(file) in refusal(Teacher(model=files.model, pretrained=str(file)))
        assert not sprung.exists()
    pickle.loads(plain.read_bytes())
    assert sprung.exists()  # the trap was set


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
    """Nothing is loaded; what lies in configs/ is found from any folder, and a tag is no file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai").write_text("not the weights")
    assert weights_fingerprint(Teacher()) == {"model": "ViT-B-16-quickgelu", "pretrained": "openai"}
    embedded = "teachers/scenes-vit.json"
    by_name, by_path = (weights_fingerprint(Teacher(model=name)) for name in (embedded, str(CONFIGS / embedded)))
    assert by_name == by_path and len(by_name["model"]) == 64
