"""The student: any image size, padding that leaves no trace, and the settings that it is made with."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from configs.errors import UserError
from configs.schema import Student as StudentConfig
from pipeline.student.student import Student

WIDTH = 8
# Two convnets, a plain ViT, an NHWC model, and the smallest of each family.
SMALL = ["timm:test_efficientnet", "timm:test_convnext", "timm:test_vit", "timm:test_mambaout"]
FAMILIES = ["segformer-b0", "segnext-t", "swin-t"]
SIZES = [(1, 1), (3, 5), (4, 4), (31, 33), (32, 32), (64, 32), (50, 97), (5, 128), (101, 7), (97, 131)]


def student(model: str = "timm:test_efficientnet", load_weights: bool = True, **settings: Any) -> Student:
    """On torch's seed 0; 32 channels inside the head, SegNeXt's 64."""
    torch.manual_seed(0)
    settings = {"channels": 64 if model.startswith("segnext") else 32, "weights": "none", **settings}
    return Student(StudentConfig(model=model, **settings), WIDTH, load_weights)


@pytest.fixture(scope="module")
def evaluated() -> dict[str, Student]:
    return {model: student(model).eval() for model in (*SMALL, *FAMILIES)}


def shape_of(made: Student, batch: int, height: int, width: int) -> tuple[int, ...]:
    stride = made.stride
    return (batch, WIDTH, -(-height // stride), -(-width // stride))


@pytest.mark.parametrize("model", [*SMALL, *FAMILIES])
def test_any_size(model: str, evaluated: dict[str, Student]) -> None:
    made = evaluated[model]
    assert made.stride == (8 if model.startswith("segnext") else 4)
    for height, width in SIZES if model in SMALL else [(1, 1), (5, 64), (97, 131)]:
        with torch.inference_mode():
            features = made(torch.randn(2, 3, height, width))
        assert features.shape == shape_of(made, 2, height, width)
        assert features.isfinite().all()


@pytest.mark.parametrize("model", ["timm:test_vit", "segformer-b0", "segnext-t"])
def test_photograph(model: str, evaluated: dict[str, Student]) -> None:
    for height, width in [(640, 427), (427, 640)]:
        with torch.inference_mode():
            features = evaluated[model](torch.rand(1, 3, height, width))
        assert features.shape == shape_of(evaluated[model], 1, height, width) and features.isfinite().all()


@pytest.mark.parametrize("model", [*SMALL, *FAMILIES])
@pytest.mark.parametrize("fill", [None, 0.0, 2.0])
def test_padding_is_to_the_right_and_below(model: str, fill: float | None, evaluated: dict[str, Student]) -> None:
    """With zeros, up to whole tokens of the coarsest level; what it adds is cut off again."""
    made, seen = evaluated[model], []
    assert made.encoder.multiple == 32
    pixels = torch.randn(1, 3, 40, 50) if fill is None else torch.full((1, 3, 40, 50), fill)
    padded = torch.zeros(1, 3, 64, 64)
    padded[:, :, :40, :50] = pixels
    hook = made.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        small, large = made(pixels), made(padded)
    hook.remove()
    assert torch.equal(seen[0], padded) and torch.equal(seen[1], padded)
    stride = made.stride
    assert large.shape == (1, WIDTH, 64 // stride, 64 // stride)
    torch.testing.assert_close(small, large[:, :, : -(-40 // stride), : -(-50 // stride)])


@pytest.mark.parametrize("model", ["timm:sequencer2d_s", "timm:crossvit_tiny_240"])
def test_coarsest_stride_that_is_no_multiple_of_4(model: str) -> None:
    """Their tokens cover 14 and 17 pixels."""
    made = student(model).eval()
    for height, width in [(14, 17), (1, 1), (28, 30), (97, 131)]:
        with torch.inference_mode():
            assert made(torch.randn(1, 3, height, width)).shape == shape_of(made, 1, height, width)


@pytest.mark.parametrize("model", ["timm:test_convnext", "timm:test_vit", "segformer-b0", "segnext-t"])
def test_images_do_not_see_each_other(model: str, evaluated: dict[str, Student]) -> None:
    pixels = torch.randn(3, 3, 40, 33)
    with torch.inference_mode():
        together = evaluated[model](pixels)
        for image in range(3):
            alone = evaluated[model](pixels[image : image + 1])
            torch.testing.assert_close(together[image : image + 1], alone, rtol=1e-3, atol=1e-4)


def test_windows_of_a_fixed_count() -> None:
    made = student("timm:maxvit_rmlp_pico_rw_256").eval()
    with torch.inference_mode():
        assert made(torch.randn(1, 3, 40, 257)).shape == shape_of(made, 1, 40, 257)


def test_normalisation_is_the_encoders(evaluated: dict[str, Student]) -> None:
    for made in evaluated.values():
        assert made.mean == made.encoder.mean and made.std == made.encoder.std
        assert len(made.mean) == len(made.std) == 3 and isinstance(made.mean, tuple)


@pytest.mark.parametrize(
    "model", ["timm:test_efficientnet", "timm:test_convnext", "timm:test_vit", "segformer-b0", "segnext-t", "swin-t"]
)
def test_gradients_reach_every_parameter(model: str) -> None:
    """In training mode; a parameter without a gradient stops distributed training."""
    trained = student(model, auxiliary=model == "swin-t")
    features, second = trained.with_auxiliary(torch.randn(2, 3, 64, 40))
    loss = features.square().mean()
    if second is not None:
        loss = loss + second.square().mean()
    loss.backward()
    for name, parameter in trained.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    reached = [name for name, p in trained.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(reached) > 0.9 * len(list(trained.parameters()))
    assert {"head.project.weight", "head.project.bias"} < set(reached)


def drop_rates(made: Student) -> list[float]:
    return [module.drop_prob for module in made.encoder.modules() if hasattr(module, "drop_prob")]


@pytest.mark.parametrize(("model", "unset"), [("segformer-b0", 0.1), ("segnext-t", 0.1), ("swin-t", 0.3)])
def test_drop_path(model: str, unset: float) -> None:
    """Unset it is the family's; 0 is a setting like any other."""
    assert max(drop_rates(student(model))) == pytest.approx(unset)
    assert max(drop_rates(student(model, drop_path=0.45))) == pytest.approx(0.45)
    assert max(drop_rates(student(model, drop_path=0.0)), default=0) == 0


@pytest.mark.parametrize("model", ["timm:test_convnext", "timm:test_vit"])
def test_drop_path_of_timm_models(model: str) -> None:
    assert max(drop_rates(student(model)), default=0) == 0
    assert max(drop_rates(student(model, drop_path=0.45))) == pytest.approx(0.45)


def test_channels() -> None:
    """Of the head alone; unset they are the family's."""
    narrow, wide = student("segformer-b0", channels=24), student("segformer-b0", channels=None)
    assert narrow.head.project.in_channels == 24 and wide.head.project.in_channels == 256
    assert narrow.encoder.channels == wide.encoder.channels == [32, 64, 160, 256]


@pytest.mark.parametrize("model", ["segformer-b0", "segnext-t", "swin-t", "timm:test_resnet", "timm:test_efficientnet"])
def test_synchronised_batch_norm(model: str) -> None:
    """Every batch norm is converted, and nothing else changes: the same features, in training as in evaluation."""
    auxiliary = model == "swin-t"
    plain, synced = (student(model, batch_norm=kind, auxiliary=auxiliary) for kind in ("local", "sync"))
    before = [name for name, module in plain.named_modules() if isinstance(module, nn.BatchNorm2d)]
    after = [name for name, module in synced.named_modules() if isinstance(module, nn.SyncBatchNorm)]
    assert before == after and any(name.startswith("head") for name in before) == (model != "segnext-t")
    assert any(name.startswith("encoder") for name in before) == model.startswith(("segnext", "timm"))
    assert any(name.startswith("auxiliary_head") for name in before) == auxiliary
    assert not any(isinstance(module, nn.BatchNorm2d) for module in synced.modules())
    synced.load_state_dict(plain.state_dict())
    pixels = torch.randn(2, 3, 64, 64)
    for mode in (True, False):
        outputs = []
        for made in (plain, synced):
            torch.manual_seed(1)
            outputs.append(made.train(mode)(pixels))
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
    synced.train()(pixels).square().mean().backward()
    assert all(p.grad is not None for name, p in synced.named_parameters() if not name.startswith("auxiliary"))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (33, 97), (1, 1), (336, 336)])
def test_auxiliary(height: int, width: int) -> None:
    """R as without it, and features at stride 16 that cover the image as R does, without the padding."""
    made = student("swin-t", auxiliary=True).eval()
    pixels = torch.randn(1, 3, height, width)
    with torch.inference_mode():
        features, second = made.with_auxiliary(pixels)
        assert torch.equal(features, made(pixels))
    assert features.shape == shape_of(made, 1, height, width)
    assert second is not None and second.isfinite().all()
    assert second.shape == (1, WIDTH, -(-height // 16), -(-width // 16))


@pytest.mark.parametrize("model", ["swin-t", "segformer-b0", "timm:test_convnext"])
def test_without_auxiliary(model: str) -> None:
    made = student(model).eval()
    pixels = torch.randn(1, 3, 32, 32)
    features, second = made.with_auxiliary(pixels)
    assert second is None and made.auxiliary_head is None and torch.equal(features, made(pixels))


@pytest.mark.parametrize("model", ["segformer-b0", "segnext-t", "timm:test_convnext"])
def test_auxiliary_is_swins(model: str) -> None:
    with pytest.raises(UserError, match=rf"^student.auxiliary is for Swin and its UPerNet; {model} has no"):
        student(model, auxiliary=True)


@pytest.mark.parametrize("model", ["segformer-b0", "segnext-t"])
def test_weights_that_timm_has_not(model: str) -> None:
    """But where a checkpoint follows nothing is looked for."""
    with pytest.raises(UserError, match=rf"^student.weights timm: timm has no weights for {model}; give an ImageNet"):
        student(model, weights="timm")
    assert isinstance(student(model, load_weights=False, weights="timm"), Student)


def test_unknown_names() -> None:
    with pytest.raises(UserError, match=r"^unknown student.model 'segformer-bo'; did you mean 'segformer-b"):
        student("segformer-bo")
    with pytest.raises(UserError, match=r"^student.model timm:resnet5O cannot be made by timm: .*resnet5O"):
        student("timm:resnet5O")


@pytest.mark.parametrize("channels", [16, 100])
def test_channels_that_do_not_fit_the_group_norms(channels: int) -> None:
    """SegNeXt's head has 32 groups."""
    with pytest.raises(UserError, match="channels"):
        student("segnext-t", channels=channels)


def test_without_load_weights_no_file_is_read() -> None:
    """A checkpoint follows, which holds the encoder too."""
    with pytest.raises(UserError, match=r"nowhere.pth"):
        student(weights="nowhere.pth")
    restored, original = student(load_weights=False, weights="nowhere.pth").eval(), student().eval()
    nn.init.normal_(restored.head.project.weight)
    pixels = torch.randn(1, 3, 20, 20)
    assert not torch.equal(restored(pixels), original(pixels))
    restored.load_state_dict(original.state_dict())
    assert torch.equal(restored(pixels), original(pixels))


@pytest.mark.parametrize("model", ["segformer-b0", "segnext-t", "swin-t", "timm:test_resnet"])
def test_recomputed_blocks_change_nothing(model: str) -> None:
    """Neither features nor gradients, nor the running statistics of our own encoders; drop path draws the same."""
    plain = student(model).train()
    other = copy.deepcopy(plain)
    other.recompute_blocks()
    pixels, found = torch.randn(2, 3, 64, 64), []
    for made in (plain, other):
        torch.manual_seed(1)
        features = made(pixels)
        features.square().mean().backward()
        found.append([features.detach(), *(p.grad for p in made.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 50
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)
    if not model.startswith("timm:"):
        for (name, one), two in zip(plain.named_buffers(), other.buffers(), strict=True):
            assert "num_batches" in name or torch.equal(one, two), name


@pytest.mark.parametrize("several", [False, True])
def test_batch_norm_is_synchronised_where_several_gpus_train(monkeypatch: pytest.MonkeyPatch, several: bool) -> None:
    monkeypatch.setattr("pipeline.student.student.several_gpus", lambda: several)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in student("segformer-b0").modules()) == several
