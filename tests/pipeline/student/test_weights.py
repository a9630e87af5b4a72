"""Weights from files: timm's and transformers' own, what does not fit is refused by name, and no file's code is run."""

import importlib.util
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    SegformerConfig,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
    SegformerModel,
)

from configs.errors import UserError
from configs.schema import Student as StudentConfig
from pipeline.student import weights
from pipeline.student.student import Student
from pipeline.student.timm_encoder import TimmEncoder
from pipeline.student.weights import EFFICIENTNET_LITE0, load_encoder, load_head
from tests.pipeline.student.test_keys import make as make_small
from tests.pipeline.student.test_keys import mit_official, mscan_official, scramble, swin_mmseg, write

State = dict[str, Tensor]
packaged = pytest.mark.skipif(
    importlib.util.find_spec(EFFICIENTNET_LITE0.replace("-", "_")) is None,
    reason=f"the package {EFFICIENTNET_LITE0} (extra `demo`) is not installed",
)


def make(model: str, source: str | Path) -> Any:
    return Student(StudentConfig(model=model, weights=str(source), channels=32), 8).eval()


def save(state: Any, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def draw_image(height: int, width: int) -> Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))


def timms(name: str) -> Any:
    """Timm's model with its classifier, of random weights; in the students' layout, so that sums have their order."""
    model = timm.create_model(name, pretrained=False).eval().to(memory_format=torch.channels_last)
    scramble(model)
    return model


def refusal(source: str | Path, model: str = "timm:test_convnext") -> str:
    """The message, on one line; the encoder keeps what it had."""
    encoder = make(model, "none").encoder
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_encoder(encoder, str(source))
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert "\n" not in str(error.value)
    return str(error.value)


# Models that timm takes apart (`stages_0.`), leaves as they are, or wraps (`model.`).
NAMES = ["test_convnext", "test_efficientnet", "test_resnet", "test_nfnet", "test_vit"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", NAMES)
def test_timms_own_weights(name: str, suffix: str, tmp_path: Path) -> None:
    """What timm saves of a model gives that model's features, to the last bit."""
    model = timms(name)
    encoder = make(f"timm:{name}", save(model.state_dict(), tmp_path / f"weights{suffix}")).encoder
    image = draw_image(*model.pretrained_cfg["input_size"][1:])
    with torch.inference_mode():
        found = encoder.model(image)
        expected = [level for level in model.forward_intermediates(image, intermediates_only=True) if level.ndim == 4]
    if name == "test_vit":
        found, expected = found[-1:], expected[-1:]
    by_size = {level.shape: level for level in expected}
    assert len(found) >= (1 if name == "test_vit" else 4)
    for level in found:
        assert torch.equal(level, by_size[level.shape])


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_timms_model_is_taken(name: str, tmp_path: Path) -> None:
    """But for those that its features do not have: a classifier, and what is before it."""
    model = timms(name)
    state = {
        key: torch.full_like(tensor, number + 1) for number, (key, tensor) in enumerate(model.state_dict().items())
    }
    taken = make(f"timm:{name}", save(state, tmp_path / "weights.pth")).encoder.model.state_dict()
    numbers = {int(tensor.flatten()[0]) for key, tensor in taken.items()}
    assert len(numbers) == len(taken)
    left = [key for number, key in enumerate(state) if number + 1 not in numbers]
    assert len(left) <= len(state) / 4
    assert all(
        key.startswith(("head", "classifier", "fc", "norm", "fc_norm", "conv_head", "bn2", "final")) for key in left
    )


def nested(state: State) -> Any:
    return {"epoch": 3, "state_dict": state}


def named_model(state: State) -> Any:
    return {"model": state, "lr": 0.1}


def parallel(state: State) -> Any:
    return {f"module.{key}": tensor for key, tensor in state.items()}


def nested_parallel(state: State) -> Any:
    return nested(parallel(state))


def uncounted(state: State) -> Any:
    kept = {key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}
    assert len(kept) < len(state)
    return kept


def without_classifier(state: State) -> Any:
    return {key: tensor for key, tensor in state.items() if not key.startswith("classifier.")}


def halved(state: State) -> Any:
    return {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in state.items()}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "change", [dict, nested, named_model, parallel, nested_parallel, uncounted, without_classifier, halved]
)
def test_forms_of_files(change: Callable[[State], Any], suffix: str, tmp_path: Path) -> None:
    """Nested, saved by DataParallel, without counters of batches or a classifier, in half precision."""
    state: State = timms("test_efficientnet").state_dict()
    content = change(state)
    if suffix == ".safetensors" and not all(isinstance(value, Tensor) for value in content.values()):
        return  # the format does not nest
    student = make("timm:test_efficientnet", save(content, tmp_path / f"weights{suffix}"))
    for key, tensor in student.encoder.model.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            expected = state[key].half().float() if change is halved else state[key]
            assert tensor.dtype == torch.float32 and torch.equal(tensor, expected), key


TRANSFORMERS = {
    "classifier": SegformerForImageClassification,
    "encoder": SegformerModel,
    "segmenter": SegformerForSemanticSegmentation,
}


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("kind", list(TRANSFORMERS))
def test_transformers(kind: str, suffix: str, tmp_path: Path) -> None:
    """What it saves, under the names of its hub, gives its features (the epsilons of some norms differ)."""
    theirs: Any = TRANSFORMERS[kind](SegformerConfig(num_labels=5)).eval()  # type: ignore[no-untyped-call]
    scramble(theirs)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    prefix = "" if kind == "encoder" else "segformer."
    assert f"{prefix}encoder.block.0.0.attention.self.query.weight" in state  # the hub's names
    if suffix == ".bin":
        file = save(state, tmp_path / "pytorch_model.bin")
    image = draw_image(64, 96)
    with torch.inference_mode():
        expected = getattr(theirs, "segformer", theirs)(image, output_hidden_states=True).hidden_states
        found = make("segformer-b0", file).encoder(image)
    for level, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(level, reference, rtol=1e-2, atol=1e-2)


FIRST, SECOND = "block1.0.attn.q.weight", "patch_embed3.norm.bias"
OURS = {FIRST: "stages.0.blocks.0.attn.q.weight", SECOND: "stages.2.downsample.norm.bias"}


@pytest.fixture(scope="module")
def official() -> State:
    return write(mit_official(make("segformer-b0", "none").encoder))


@pytest.mark.parametrize(
    ("lack", "more", "bend", "expected"),
    [
        ([FIRST], [], [], f"missing: {OURS[FIRST]}"),
        ([FIRST, SECOND], [], [], f"missing: {OURS[FIRST]}, {OURS[SECOND]}"),
        ([], ["extra.weight"], [], "unexpected: extra.weight"),
        ([], ["extra.weight", "more"], [], "unexpected: extra.weight, more"),
        ([], ["headless.weight", "norms.bias"], [], "unexpected: headless.weight, norms.bias"),  # no classifiers
        ([], [], [FIRST], f"of the wrong shape: {OURS[FIRST]}"),
        ([SECOND], ["more"], [FIRST], f"missing: {OURS[SECOND]}; unexpected: more; of the wrong shape: {OURS[FIRST]}"),
    ],
)
def test_every_key_that_does_not_fit_is_named(
    lack: list[str], more: list[str], bend: list[str], expected: str, official: State, tmp_path: Path
) -> None:
    state = {key: torch.zeros(3, 3) if key in bend else tensor for key, tensor in official.items() if key not in lack}
    file = save(state | {key: torch.zeros(2) for key in more}, tmp_path / "weights.pth")
    assert refusal(file, "segformer-b0") == f"student.weights {file} does not fit student.model: {expected}"


@pytest.mark.parametrize(
    ("model", "writer", "lacks", "named"),
    [
        ("segnext-t", mscan_official, "block2.1.layer_scale_2", "stages.1.blocks.1.layer_scale_2"),
        ("swin-t", swin_mmseg, "stages.1.downsample.norm.bias", "model.layers.2.downsample.norm.bias"),
    ],
)
def test_other_families_name_theirs(
    model: str, writer: Callable[[Any], Any], lacks: str, named: str, tmp_path: Path
) -> None:
    """Also Swin, although the norms after its levels may be missing."""
    state = write(writer(make_small(model).encoder))
    del state[lacks]
    file = tmp_path / "weights.pth"
    torch.save(state, file)
    with pytest.raises(UserError, match=f"does not fit student.model: missing: {re.escape(named)}$"):
        make_small(model, str(file))


def test_parts_that_no_segmenter_has_are_named(official: State, tmp_path: Path) -> None:
    state = {f"backbone.{key}": tensor for key, tensor in official.items() if not key.startswith("head.")}
    file = save(state | {"neck.convs.0.weight": torch.zeros(2)}, tmp_path / "weights.pth")
    assert "unexpected: neck.convs.0.weight" in refusal(file, "segformer-b0")


@pytest.mark.parametrize("lacks", ["stem.0.weight", "stages.1.blocks.0.mlp.fc1.bias"])
def test_keys_of_timms_models_are_named_too(lacks: str, tmp_path: Path) -> None:
    state = timms("test_convnext").state_dict()
    bias = state.pop(lacks)
    start = f"student.weights {tmp_path / 'weights.pth'} does not fit student.model: "
    assert refusal(save(state, tmp_path / "weights.pth")) == f"{start}missing: {lacks}"
    file = save(state | {lacks: bias, "stages.9.x": bias}, tmp_path / "weights.pth")
    assert refusal(file) == f"{start}unexpected: stages.9.x"
    file = save(state | {lacks: torch.zeros(3)}, tmp_path / "weights.pth")
    expected = lacks.replace("stem.0", "stem_0").replace("stages.1", "stages_1")
    assert refusal(file) == f"{start}of the wrong shape: {expected}"


@pytest.mark.parametrize("other", ["segformer-b1", "segnext-t", "timm:test_resnet"])
def test_weights_of_another_model(other: str, tmp_path: Path) -> None:
    """Few of their keys are named, and how many do not fit."""
    encoder = make(other, "none").encoder
    state = write(mit_official(encoder)) if other == "segformer-b1" else encoder.state_dict()
    message = refusal(save(state, tmp_path / "weights.pth"), "segformer-b0")
    assert message.startswith(
        f"student.weights {tmp_path / 'weights.pth'} belong to another model: 176 tensors are needed"
    )
    assert len(message) < 600


@pytest.mark.parametrize("model", ["segformer-b0", "segnext-t", "swin-t", "timm:test_vit"])
def test_no_tensors_at_all(model: str, tmp_path: Path) -> None:
    assert "belong to another model" in refusal(save({"state_dict": {}}, tmp_path / "weights.pth"), model)


def test_heads_name_their_keys(tmp_path: Path) -> None:
    student, head = make("segformer-b0", "none"), make("segformer-b0", "none").head
    state = {f"decode_head.{key}": tensor for key, tensor in head.state_dict().items() if "project" not in key}
    del state["decode_head.fusion_conv.1.bias"]
    state |= {"decode_head.odd": torch.zeros(1), "backbone.any": torch.zeros(1)}
    file = save(state, tmp_path / "weights.pth")
    with pytest.raises(
        UserError, match=r"\(decode_head\) does not fit .*: missing: fusion_conv.1.bias; unexpected: odd$"
    ):
        load_head(student.head, str(file), "decode_head")
    before = {key: tensor.clone() for key, tensor in student.head.state_dict().items()}
    load_head(student.head, str(file), "auxiliary_head")  # which the file lacks
    assert all(torch.equal(tensor, before[key]) for key, tensor in student.head.state_dict().items())


@pytest.mark.parametrize("name", ["nowhere.pth", "nowhere.safetensors", "folder.pth", "imagenet"])
def test_no_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.pth").mkdir()
    expected = f"student.weights: no file {tmp_path / name}; give a weights file that exists, or none"
    assert refusal(tmp_path / name) == expected


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_corrupt_file(suffix: str, tmp_path: Path) -> None:
    file = save(timms("test_convnext").state_dict(), tmp_path / f"weights{suffix}")
    data = file.read_bytes()
    for broken in (data[: len(data) // 2], data[:-1], data[:4], b"", b"\x00" * 64, b"{}" + data, b"no weights"):
        file.write_bytes(broken)
        expected = f"student.weights {file} cannot be read as safetensors or plain tensors, "
        assert refusal(file).startswith(expected)


class Trap:
    """Creates a file by a shell's command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("nest", [dict, nested])
def test_code_in_a_file_is_not_run(nest: Callable[[Any], Any], form: str, tmp_path: Path) -> None:
    sprung, file = tmp_path / "sprung", tmp_path / "weights.pth"
    content = nest({**timms("test_convnext").state_dict(), "stem.0.weight": Trap(sprung)})
    if form == "pickle":
        file.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    assert refusal(file).startswith(f"student.weights {file} cannot be read as ")
    assert not sprung.exists()
    if form == "pickle":
        pickle.loads(file.read_bytes())
        assert sprung.exists()  # the trap was set


@pytest.mark.parametrize("content", [[torch.zeros(3)], torch.zeros(3), {"epoch": 3}, {0: torch.zeros(3)}])
def test_file_of_something_else(content: Any, tmp_path: Path) -> None:
    file = save(content, tmp_path / "weights.pth")
    assert refusal(file) == f"student.weights {file} is not a state dict of tensors"


@packaged
def test_packaged_weights() -> None:
    """Every tensor of the encoder is the file's, at the same place in the order of its layers."""
    state: State = torch.load(weights.packaged_file(), map_location="cpu", weights_only=True)
    encoder = make("timm:tf_efficientnet_lite0", EFFICIENTNET_LITE0).encoder
    assert isinstance(encoder, TimmEncoder)
    kernels = [value for value in state.values() if value.ndim == 4]
    found = [module.weight for module in encoder.modules() if isinstance(module, nn.Conv2d)]
    assert len(found) > 40
    for kernel, expected in zip(found, kernels, strict=False):
        assert torch.equal(kernel, expected)
    used = [value for name, value in encoder.model.state_dict().items() if not name.endswith("num_batches_tracked")]
    stored = [value for name, value in state.items() if not name.endswith("num_batches_tracked")]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(used, stored, strict=False))
    kinds = [
        [name.rpartition(".")[2] for name in names if "num_batches" not in name]
        for names in (encoder.model.state_dict(), state)
    ]
    assert kinds[0] == kinds[1][: len(used)]  # weight, bias, running_mean, running_var
    left = stored[len(used) :]  # the classifier, and the layer before it
    assert left[-1].shape == (1000,) and len(left) < 10


@packaged
@pytest.mark.parametrize("model", ["timm:test_convnext", "segformer-b0", "segnext-t", "swin-t"])
def test_packaged_weights_for_another_encoder(model: str) -> None:
    assert refusal(EFFICIENTNET_LITE0, model).startswith(
        f"student.weights {EFFICIENTNET_LITE0} belong to another model"
    )


def test_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = refusal(EFFICIENTNET_LITE0)
    assert message.startswith(f"student.weights: install the package {EFFICIENTNET_LITE0} (extra `demo`)")
