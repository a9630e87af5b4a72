"""The student: any image size, and every parameter learns at its rate."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from configs.errors import UserError
from configs.schema import Student as StudentConfig
from pipeline.student.student import Student

WIDTH = 8
# timm's encoders for tests, under 0.4 M parameters each: batch norm, and layer norm with layer scale.
ENCODERS = ["test_efficientnet", "test_convnext", "test_resnet"]


def student(encoder: str = "test_efficientnet") -> Student:
    torch.manual_seed(0)
    return Student(StudentConfig(encoder=encoder, weights="none", channels=16), WIDTH)


@pytest.fixture(scope="module", params=ENCODERS)
def evaluated(request: pytest.FixtureRequest) -> Iterator[Student]:
    yield student(request.param).eval()


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (3, 5), (4, 4), (31, 33), (32, 32), (64, 32), (50, 97), (5, 128), (101, 7)]
)
def test_any_size(height: int, width: int, evaluated: Student) -> None:
    with torch.inference_mode():
        features = evaluated(torch.randn(2, 3, height, width))
    assert features.shape == (2, WIDTH, -(-height // 4), -(-width // 4))
    assert features.isfinite().all() and evaluated.stride == 4


def test_padding_is_to_the_right_and_below(evaluated: Student) -> None:
    """With zeros, up to whole tokens of the coarsest level; what it adds is cut off again."""
    pixels = torch.randn(1, 3, 40, 50)
    padded = torch.zeros(1, 3, 64, 64)
    padded[:, :, :40, :50] = pixels
    with torch.inference_mode():
        torch.testing.assert_close(evaluated(pixels), evaluated(padded)[:, :, :10, :13])
        assert evaluated(padded).shape == (1, WIDTH, 16, 16)


def test_levels_begin_at_stride_4(evaluated: Student) -> None:
    """One linear layer for each level from there on, of the encoder's own channels."""
    info = evaluated.encoder.feature_info
    used = [count for count, stride in zip(info.channels(), info.reduction(), strict=True) if stride >= 4]
    assert [layer.in_channels for layer in evaluated.head.linears] == used and len(used) == 4  # type: ignore[union-attr]
    with torch.inference_mode():
        pixels = torch.randn(1, 3, 64, 64)
        expected = evaluated.head([level for level in evaluated.encoder(pixels) if level.shape[-1] <= 16])
        torch.testing.assert_close(evaluated(pixels), expected)


def test_normalisation_is_the_encoders(evaluated: Student) -> None:
    settings = evaluated.encoder.pretrained_cfg
    assert evaluated.mean == tuple(settings["mean"]) and evaluated.std == tuple(settings["std"])
    assert len(evaluated.mean) == len(evaluated.std) == 3 and isinstance(evaluated.mean, tuple)


def test_gradients_reach_every_parameter() -> None:
    """In training mode, also of a batch of one small image."""
    trained = student()
    trained(torch.randn(2, 3, 33, 40)).square().mean().backward()
    for name, parameter in trained.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert trained.head.project.weight.grad.abs().sum() > 0  # type: ignore[union-attr]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_parameter_groups(encoder: str) -> None:
    """Every parameter once; the head's rate for the head; only weight matrices and kernels decay."""
    trained = student(encoder)
    groups = trained.parameter_groups(lr=0.2, head_lr_factor=5.0, weight_decay=0.01)
    found = [(id(p), group["lr"], group["weight_decay"]) for group in groups for p in group["params"]]  # type: ignore[attr-defined]
    assert len(found) == len({key for key, _, _ in found}) == len(list(trained.parameters()))
    settings = {key: (lr, decay) for key, lr, decay in found}
    decaying = 0
    for name, module in trained.named_modules():
        kernel = isinstance(module, nn.Conv2d | nn.Linear)
        for own, parameter in module.named_parameters(recurse=False):
            lr, decay = settings.pop(id(parameter))
            assert lr == (1.0 if name.startswith("head") else 0.2), name
            assert decay == (0.01 if kernel and own == "weight" else 0.0), f"{name}.{own}"
            decaying += decay > 0
    assert not settings and decaying > 10
    torch.optim.AdamW(groups).step()  # torch takes them


def test_frozen_parameters_are_in_no_group() -> None:
    trained = student()
    trained.encoder.requires_grad_(False)
    groups = trained.parameter_groups(1.0, 1.0, 0.1)
    listed = {id(p) for group in groups for p in group["params"]}  # type: ignore[attr-defined]
    assert listed == {id(p) for p in trained.head.parameters()}


def test_unknown_encoder() -> None:
    with pytest.raises(UserError, match=r"^student.encoder 'resnet5O' cannot be made by timm: .*resnet5O"):
        Student(StudentConfig(encoder="resnet5O", weights="none"), WIDTH)


def test_encoder_without_stride_4() -> None:
    with pytest.raises(UserError, match=r"^student.encoder 'test_vit' has no features at stride 4 \(strides \[16, "):
        Student(StudentConfig(encoder="test_vit", weights="none"), WIDTH)


def test_without_load_weights_no_file_is_read() -> None:
    """A checkpoint follows, which holds the encoder too."""
    config = StudentConfig(encoder="test_efficientnet", weights="nowhere.pth", channels=16)
    with pytest.raises(UserError, match=r"no file nowhere.pth"):
        Student(config, WIDTH)
    torch.manual_seed(1)
    restored, original = Student(config, WIDTH, load_weights=False).eval(), student().eval()
    pixels = torch.randn(1, 3, 20, 20)
    assert not torch.equal(restored(pixels), original(pixels))
    restored.load_state_dict(original.state_dict())
    assert torch.equal(restored(pixels), original(pixels))
