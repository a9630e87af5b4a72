"""Trunks of timm's that give a map: each dense token is the trunk's own head and projection at that place alone."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.model import CLIP
from safetensors.torch import save_file
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from configs.errors import UserError
from configs.schema import Teacher
from pipeline.teacher.clip import FrozenClip
from tests.pipeline.teacher.conftest import TEXT, draw_pixels, refusal

# Trunk -> what its JSON file says otherwise than most. A head that widens the features is itself the projection.
OWN_PROJECTION = {"timm_proj": None}
FAMILIES: dict[str, dict[str, Any]] = {
    "tf_efficientnet_lite0": {},
    "regnetx_002": {},
    "resnet18": {},
    "mobilenetv3_small_050": OWN_PROJECTION,
    "convnext_atto": {},
    "fastvit_t8": {},
    "hgnetv2_b0": OWN_PROJECTION,
    "poolformer_s12": {"timm_proj": "mlp"},
    "test_byobnet": {"timm_pool": "rot_attn", "timm_proj": None},
    "resnetv2_18": {"timm_pool": "abs_attn", "timm_proj": None},
    "test_mambaout": OWN_PROJECTION,
}
CHANNELS_LAST = {"test_mambaout", "swin_tiny_patch4_window7_224"}


def architecture(trunk: str, **vision: Any) -> dict[str, Any]:
    given = {"timm_model_name": trunk, "timm_model_pretrained": False, "timm_pool": "avg", "timm_proj": "linear"}
    return {
        "embed_dim": 16,
        "vision_cfg": given | {"timm_proj_bias": False, "image_size": 256} | vision,
        "text_cfg": TEXT,
    }


def draw_weights(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random, but no norm's weight is 1, no layer's scale 1e-6, and batch norms know their inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIP(**config)
        for parameter in model.visual.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
        for module in model.visual.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        side = config["vision_cfg"]["image_size"]
        with torch.no_grad():
            model.visual.train()(draw_pixels(2, side))
    return {name: value.contiguous() for name, value in model.state_dict().items()}


def write(folder: Path, trunk: str, config: dict[str, Any], **settings: str) -> Teacher:
    (folder / f"{trunk}.json").write_text(json.dumps(config))
    save_file(draw_weights(config), folder / f"{trunk}.safetensors")
    files = {"model": str(folder / f"{trunk}.json"), "pretrained": str(folder / f"{trunk}.safetensors")}
    return Teacher.model_validate({"dense": "plain"} | files | settings)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Trunk -> its teacher."""
    folder = tmp_path_factory.mktemp("maps")
    return cache(lambda trunk: FrozenClip(write(folder, trunk, architecture(trunk, **FAMILIES.get(trunk, {})))))


def slow(teacher: FrozenClip, pixels: Tensor, trunk: str) -> Tensor:
    """D (B, rows, columns, C): the rest of the tower, called for a map of one place, as often as there are places."""
    visual = teacher.model.visual
    with torch.no_grad():
        features = visual.trunk.forward_features(pixels)
        if trunk not in CHANNELS_LAST:
            features = features.permute(0, 2, 3, 1)
        batch, rows, columns, channels = features.shape
        found = torch.empty(batch, rows, columns, teacher.width)
        for image, row, column in torch.cartesian_prod(*map(torch.arange, (batch, rows, columns))):
            alone = features[image, row, column]
            shape = (1, 1, 1, channels) if trunk in CHANNELS_LAST else (1, channels, 1, 1)
            found[image, row, column] = visual.head(visual.trunk.forward_head(alone.reshape(shape)))[0]
    return found


def assert_like_slow(teacher: FrozenClip, pixels: Tensor, trunk: str, lost: int = 0) -> None:
    calls: list[Any] = []
    hook = teacher.model.visual.trunk.register_forward_hook(lambda *call: calls.append(call))
    cls_token, dense = teacher.encode(pixels)
    hook.remove()
    assert len(calls) == 1, "one pass of the trunk"
    with torch.no_grad():
        assert torch.equal(cls_token, teacher.model.encode_image(pixels, normalize=False))
    rows, columns = (side // teacher.stride for side in pixels.shape[-2:])
    assert dense.shape == (len(pixels), rows, columns, teacher.width)
    expected = slow(teacher, pixels, trunk)
    assert expected.shape[1:3] == (rows - lost, columns - lost)
    inner = dense[:, lost // 2 : rows - lost // 2, lost // 2 : columns - lost // 2]
    torch.testing.assert_close(inner, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert dense.std(dim=(1, 2)).mean() > 1e-3 * dense.abs().mean(), "places differ"


@pytest.mark.parametrize("trunk", FAMILIES)
def test_each_place_alone(trunk: str, built: Any) -> None:
    """At two sizes, neither of them square, in turn."""
    teacher = built(trunk)
    assert teacher.stride == 32
    for rows, columns in [(2, 3), (4, 1), (2, 3)]:
        assert_like_slow(teacher, draw_pixels(2, rows * 32, columns * 32), trunk)


@pytest.mark.parametrize("trunk", ["tf_efficientnet_lite0", "regnetx_002", "resnet18"])
def test_the_mean_of_all_places_is_the_image(trunk: str, built: Any) -> None:
    """Where the head is a mean and a matrix: D is told by S, without any of the trunk's functions."""
    cls_token, dense = built(trunk).encode(draw_pixels(2, 64, 160))
    torch.testing.assert_close(dense.mean(dim=(1, 2)), cls_token, rtol=1e-4, atol=1e-4)


def test_from_json_and_safetensors(tmp_path: Path) -> None:
    """The whole way: image tower, text tower, and the line for a size that is no multiple of the stride."""
    config = architecture("tf_efficientnet_lite0") | {"embed_dim": 512}
    teacher, pixels = FrozenClip(write(tmp_path, "lite", config)), draw_pixels(1, 96, 64)
    theirs = CLIP(**config).eval()
    theirs.load_state_dict(draw_weights(config))
    cls_token, dense = teacher.encode(pixels)
    torch.testing.assert_close(cls_token, theirs.encode_image(pixels).detach(), rtol=0, atol=0)
    assert dense.shape == (1, 3, 2, 512) and dense.dtype == torch.float32
    assert teacher.text_features([["circle"], ["star", "asterisk"]], "single").shape == (2, 512)
    with pytest.raises(UserError, match=r"views\.size 80 is not a multiple of 32, "):
        teacher.grid(80)


def test_a_trunk_that_does_not_pad(tmp_path: Path) -> None:
    """Inception's map is two places shorter than the grid: the first and the last are their neighbours'."""
    teacher = FrozenClip(write(tmp_path, "inception_v3", architecture("inception_v3", image_size=128)))
    pixels = draw_pixels(1, 96, 160)
    assert_like_slow(teacher, pixels, "inception_v3", lost=2)
    dense = teacher.encode(pixels)[1][0]
    assert torch.equal(dense[0], dense[1]) and torch.equal(dense[:, -1], dense[:, -2])
    with pytest.raises(UserError, match="does not accept images of 64 x 64 pixels"):
        teacher.encode(draw_pixels(1, 64))


@pytest.mark.parametrize(
    ("trunk", "stride", "why"),
    [("test_maxvit", 32, "must be divisible by"), ("swin_tiny_patch4_window7_224", 32, "doesn't match model")],
)
def test_trunks_of_one_size(trunk: str, stride: int, why: str, tmp_path: Path) -> None:
    """They are refused at others, in one line that says which size is theirs."""
    own = 224 if trunk.startswith("swin") else 160
    teacher = FrozenClip(write(tmp_path, trunk, architecture(trunk, image_size=own)))
    assert teacher.stride == stride
    assert_like_slow(teacher, draw_pixels(1, own), trunk)
    with pytest.raises(UserError) as error:
        teacher.encode(draw_pixels(1, own + stride, own))
    message = str(error.value)
    assert message.startswith(f"teacher.model {tmp_path / trunk}.json: its image tower (") and "\n" not in message
    assert f"does not accept images of {own + stride} x {own} pixels" in message and why in message
    assert message.endswith(f"its default size is {own} x {own}")


def test_what_a_trunk_says_of_its_stride_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init = ResNet.__init__

    def wrong(self: ResNet, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.feature_info[-1]["reduction"] = 8

    monkeypatch.setattr(ResNet, "__init__", wrong)
    teacher = FrozenClip(write(tmp_path, "test_resnet", architecture("test_resnet", image_size=160)))
    assert teacher.stride == 32 and teacher.encode(draw_pixels(1, 64))[1].shape == (1, 2, 2, 16)


def test_a_projection_that_does_not_fit_the_head(tmp_path: Path) -> None:
    """open_clip builds the model, and it cannot run."""
    name = tmp_path / "mobilenet.json"
    name.write_text(json.dumps(architecture("mobilenetv3_small_050")))
    message = refusal(Teacher(model=str(name), pretrained="none", dense="plain"))
    assert message.startswith(
        f"teacher.model {name}: its image tower (MobileNetV3) cannot embed an image of its default size"
    )
    assert message.endswith("needs timm_proj null")


def test_faster_ways_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled blocks, channels last, half precision."""
    config = write(tmp_path, "test_resnet", architecture("test_resnet", image_size=160))
    pixels = draw_pixels(2, 64)
    expected = FrozenClip(config).encode(pixels)
    counter, compile = CompileCounter(), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile(module, backend=counter))
    torch._dynamo.reset()
    fast = FrozenClip(config, channels_last=True, compile=True).encode(pixels)
    assert counter.frame_count > 0
    half = FrozenClip(config.model_copy(update={"precision": "bf16"})).encode(pixels)
    for exact, found, rough in zip(expected, fast, half, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
        assert rough.dtype == torch.float32 and 0 < (rough - exact).norm() / exact.norm() < 0.05
