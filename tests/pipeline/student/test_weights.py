"""Encoder weights from files: what is in the file is in the encoder, and no file's code is run."""

import importlib.util
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import Student as StudentConfig
from pipeline.student import weights
from pipeline.student.student import Student
from pipeline.student.weights import EFFICIENTNET_LITE0, load_encoder_weights

State = dict[str, Tensor]
packaged = pytest.mark.skipif(
    importlib.util.find_spec(EFFICIENTNET_LITE0.replace("-", "_")) is None,
    reason=f"the package {EFFICIENTNET_LITE0} (extra `demo`) is not installed",
)


def make_encoder(seed: int, name: str = "test_efficientnet") -> nn.Module:
    torch.manual_seed(seed)
    encoder: nn.Module = timm.create_model(name, features_only=True, pretrained=False)
    return encoder


def draw_state(seed: int = 0) -> State:
    """A state of the test encoder that no initialisation gives."""
    generator = torch.Generator().manual_seed(seed)
    state: State = make_encoder(0).state_dict()
    return {
        name: torch.rand(value.shape, generator=generator) + 0.1 if value.is_floating_point() else value + 7
        for name, value in state.items()
    }


def save(state: Any, path: Path) -> str:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return str(path)


def refusal(encoder: nn.Module, source: str) -> str:
    """The message; the encoder keeps what it had."""
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_encoder_weights(encoder, source)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_own_state_dict(suffix: str, tmp_path: Path) -> None:
    state, encoder = draw_state(), make_encoder(1)
    load_encoder_weights(encoder, save(state, tmp_path / f"weights{suffix}"))
    assert set(encoder.state_dict()) == set(state)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_whole_model_fills_its_encoder(tmp_path: Path) -> None:
    """Tensors that the encoder lacks, such as a classifier, are left out; half precision is converted."""
    state, encoder = draw_state(), make_encoder(1)
    half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    file = save(half | {"classifier.weight": torch.zeros(3, 3)}, tmp_path / "weights.safetensors")
    load_encoder_weights(encoder, file)
    for name, value in encoder.state_dict().items():
        assert value.dtype == state[name].dtype and torch.equal(value, half[name].to(value.dtype)), name


def test_counters_of_batches_may_be_missing(tmp_path: Path) -> None:
    """They are no weights, and older files have none."""
    state, encoder = draw_state(), make_encoder(1)
    kept = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    assert len(kept) < len(state)
    load_encoder_weights(encoder, save(kept, tmp_path / "weights.pth"))
    assert all(torch.equal(encoder.state_dict()[name], value) for name, value in kept.items())


def test_student_reads_them(tmp_path: Path) -> None:
    state = draw_state()
    file = save(state, tmp_path / "weights.safetensors")
    student = Student(StudentConfig(encoder="test_efficientnet", weights=file, channels=16), 8)
    assert all(torch.equal(value, state[name]) for name, value in student.encoder.state_dict().items())


def some_missing(state: State) -> State:
    return {name: value for name, value in state.items() if name not in ("conv_stem.weight", "bn1.running_mean")}


def other_shapes(state: State) -> State:
    return state | {"conv_stem.weight": torch.zeros(1, 3, 3, 3), "bn1.bias": torch.zeros(())}


def both(state: State) -> State:
    return some_missing(state) | {"bn1.bias": torch.zeros(17)}


def nothing(state: State) -> State:
    return {}


@pytest.mark.parametrize(
    ("change", "missing", "shapes"),
    [
        (some_missing, ["conv_stem.weight", "bn1.running_mean"], []),
        (other_shapes, [], ["conv_stem.weight", "bn1.bias"]),
        (both, ["conv_stem.weight", "bn1.running_mean"], ["bn1.bias"]),
        (nothing, ["conv_stem.weight", "bn1.weight", "bn1.bias"], []),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_tensors_that_do_not_fit(
    suffix: str, change: Callable[[State], State], missing: list[str], shapes: list[str], tmp_path: Path
) -> None:
    file = save(change(draw_state()), tmp_path / f"weights{suffix}")
    expected = f"student.weights {file} does not fit the encoder: missing {missing}, other shapes {shapes}"
    assert refusal(make_encoder(1), file) == expected


def test_weights_of_another_encoder(tmp_path: Path) -> None:
    file = save(make_encoder(0, "test_convnext").state_dict(), tmp_path / "weights.safetensors")
    assert "does not fit the encoder: missing ['conv_stem.weight', " in refusal(make_encoder(1), file)


@pytest.mark.parametrize("name", ["nowhere.pth", "nowhere.safetensors", "folder.pth", "imagenet"])
def test_no_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.pth").mkdir()
    path = tmp_path / name
    expected = f"student.weights: no file {path}; write timm, none or a weights file"
    assert refusal(make_encoder(1), str(path)) == expected


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_corrupt_file(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"weights{suffix}"
    save(draw_state(), file)
    data, encoder = file.read_bytes(), make_encoder(1)
    for broken in (data[: len(data) // 2], data[:4], b"", b"\x00" * 64, b"{}" + data, b"no weights"):
        file.write_bytes(broken)
        expected = f"student.weights {file} cannot be read as safetensors or plain tensors: "
        assert refusal(encoder, str(file)).startswith(expected)


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_file_is_not_run(form: str, tmp_path: Path) -> None:
    sprung, file = tmp_path / "sprung", tmp_path / "weights.pth"
    content = {**draw_state(), "conv_stem.weight": Trap(sprung)}
    if form == "pickle":
        file.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    assert refusal(make_encoder(1), str(file)).startswith(f"student.weights {file} cannot be read as ")
    assert not sprung.exists()
    if form == "pickle":
        pickle.loads(file.read_bytes())
        assert sprung.exists()  # the trap was set


@pytest.mark.parametrize("content", [{"state_dict": {}}, [torch.zeros(3)], torch.zeros(3), {"epoch": 3}])
def test_file_of_something_else(content: Any, tmp_path: Path) -> None:
    file = save(content, tmp_path / "weights.pth")
    assert refusal(make_encoder(1), file) == f"student.weights {file} is not a state dict of tensors"


@packaged
def test_packaged_weights() -> None:
    """Every kernel of the encoder is the file's, at the same place in the order of its layers."""
    state: State = torch.load(weights._packaged_file(), map_location="cpu", weights_only=True)
    encoder = make_encoder(0, "tf_efficientnet_lite0")
    load_encoder_weights(encoder, EFFICIENTNET_LITE0)
    kernels = [value for value in state.values() if value.ndim == 4]
    found = [module.weight for module in encoder.modules() if isinstance(module, nn.Conv2d)]
    assert len(found) > 40
    for kernel, expected in zip(found, kernels, strict=False):
        assert torch.equal(kernel, expected)
    used = [value for name, value in encoder.state_dict().items() if not name.endswith("num_batches_tracked")]
    stored = [value for name, value in state.items() if not name.endswith("num_batches_tracked")]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(used, stored, strict=False))
    kinds = [[n.rpartition(".")[2] for n in names if "num_batches" not in n] for names in (encoder.state_dict(), state)]
    assert kinds[0] == kinds[1][: len(used)]  # weight, bias, running_mean, running_var
    left = stored[len(used) :]  # the classifier, and the layer before it
    assert left[-1].shape == (1000,) and len(left) < 10


@packaged
def test_packaged_weights_for_another_encoder() -> None:
    message = refusal(make_encoder(0, "test_convnext"), EFFICIENTNET_LITE0)
    assert message.startswith(f"student.weights {EFFICIENTNET_LITE0} does not fit the encoder: missing [")


def test_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = refusal(make_encoder(0), EFFICIENTNET_LITE0)
    assert message.startswith(f"student.weights: install the package {EFFICIENTNET_LITE0} (extra `demo`)")
