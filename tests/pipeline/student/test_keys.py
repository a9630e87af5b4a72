"""Published checkpoints, written here from their published modules, fill our students: same tensors, same R."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import Student as StudentConfig
from pipeline.student import timm_encoder
from pipeline.student.student import Student

State = dict[str, Tensor]
Pairs = Iterator[tuple[str, Any]]  # a name, and a module (all of its tensors) or a tensor
CLASSES, CHANNELS, WIDTH = 5, 32, 8
# Swin-T of fewer and narrower blocks: its files have the same names, a hundredth of the size.
SMALL_SWIN = {"embed_dim": 24, "depths": (2, 2, 2, 1), "num_heads": (1, 2, 4, 8)}


def scramble(module: nn.Module, seed: int = 0) -> None:
    """No tensor keeps a value that an initialisation gives."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            drawn = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim > 1:
                drawn /= tensor[0].numel() ** 0.5
            tensor.copy_(drawn.abs() + 0.5 if name.endswith("running_var") else drawn)
        else:
            tensor += 7


def make(model: str, weights: str = "none", auxiliary: bool = False) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm_encoder, "create", partial(timm_encoder.create, **SMALL_SWIN))
        config = StudentConfig(model=model, weights=weights, channels=CHANNELS, auxiliary=auxiliary)
        return Student(config, WIDTH).eval()


@pytest.fixture(scope="module")
def sources() -> dict[str, Any]:
    """Students of random weights, which the files are written from."""
    students = {model: make(model, auxiliary=model == "swin-t") for model in ("segformer-b0", "segnext-t", "swin-t")}
    for student in students.values():
        scramble(student)
    return students


def write(pairs: Pairs) -> State:
    state: State = {}
    for name, part in pairs:
        tensors = {"": part} if isinstance(part, Tensor) else {f".{key}": t for key, t in part.state_dict().items()}
        for key, tensor in tensors.items():
            assert name + key not in state
            state[name + key] = tensor.detach().clone(memory_format=torch.contiguous_format)
    return state


def linear(width: int) -> nn.Linear:
    return nn.Linear(width, CLASSES)


def conv_seg(width: int) -> nn.Conv2d:
    return nn.Conv2d(width, CLASSES, 1)


# ---- MiT: NVlabs' mix_transformer.py, and what mmsegmentation's mit2mmseg.py makes of it.


def mit_official(encoder: Any) -> Pairs:
    for number, stage in enumerate(encoder.stages, 1):
        embedding = encoder.patch_embed if number == 1 else stage.downsample
        yield f"patch_embed{number}.proj", embedding.proj
        yield f"patch_embed{number}.norm", embedding.norm
        for index, block in enumerate(stage.blocks):
            name = f"block{number}.{index}"
            yield f"{name}.norm1", block.norm1
            yield from ((f"{name}.attn.{part}", getattr(block.attn, part)) for part in ("q", "kv", "proj"))
            if number < 4:
                yield f"{name}.attn.sr", block.attn.sr
                yield f"{name}.attn.norm", block.attn.norm
            yield f"{name}.norm2", block.norm2
            yield f"{name}.mlp.fc1", block.mlp.fc1
            yield f"{name}.mlp.dwconv.dwconv", block.mlp.dwconv
            yield f"{name}.mlp.fc2", block.mlp.fc2
        yield f"norm{number}", stage.norm
    yield "head", linear(256)


def mit_mmseg(encoder: Any) -> Pairs:
    """Queries, keys and values in one projection; feed-forward layers are 1 x 1 convolutions."""
    for level, stage in enumerate(encoder.stages):
        embedding = stage.downsample if level else encoder.patch_embed
        yield f"layers.{level}.0.projection", embedding.proj
        yield f"layers.{level}.0.norm", embedding.norm
        for index, block in enumerate(stage.blocks):
            name, attention = f"layers.{level}.1.{index}", block.attn
            yield f"{name}.norm1", block.norm1
            yield f"{name}.attn.attn.in_proj_weight", torch.cat([attention.q.weight, attention.kv.weight])
            yield f"{name}.attn.attn.in_proj_bias", torch.cat([attention.q.bias, attention.kv.bias])
            yield f"{name}.attn.attn.out_proj", attention.proj
            if level < 3:
                yield f"{name}.attn.sr", attention.sr
                yield f"{name}.attn.norm", attention.norm
            yield f"{name}.norm2", block.norm2
            yield f"{name}.ffn.layers.0.weight", block.mlp.fc1.weight[:, :, None, None]
            yield f"{name}.ffn.layers.0.bias", block.mlp.fc1.bias
            yield f"{name}.ffn.layers.1", block.mlp.dwconv
            yield f"{name}.ffn.layers.4.weight", block.mlp.fc2.weight[:, :, None, None]
            yield f"{name}.ffn.layers.4.bias", block.mlp.fc2.bias
        yield f"layers.{level}.2", stage.norm


def mscan_official(encoder: Any) -> Pairs:
    """SegNeXt's mscan.py, of which mmsegmentation keeps the names."""
    for index in (0, 1, 3, 4):
        yield f"patch_embed1.proj.{index}", encoder.patch_embed.proj[index]
    for number, stage in enumerate(encoder.stages, 1):
        if number > 1:
            yield f"patch_embed{number}.proj", stage.downsample.proj
            yield f"patch_embed{number}.norm", stage.downsample.norm
        for index, block in enumerate(stage.blocks):
            name, unit = f"block{number}.{index}", block.attn.spatial_gating_unit
            yield f"{name}.layer_scale_1", block.layer_scale_1
            yield f"{name}.layer_scale_2", block.layer_scale_2
            yield f"{name}.norm1", block.norm1
            yield f"{name}.attn.proj_1", block.attn.proj_1
            for part in ("conv0", "conv0_1", "conv0_2", "conv1_1", "conv1_2", "conv2_1", "conv2_2", "conv3"):
                yield f"{name}.attn.spatial_gating_unit.{part}", getattr(unit, part)
            yield f"{name}.attn.proj_2", block.attn.proj_2
            yield f"{name}.norm2", block.norm2
            yield f"{name}.mlp.fc1", block.mlp.fc1
            yield f"{name}.mlp.dwconv.dwconv", block.mlp.dwconv
            yield f"{name}.mlp.fc2", block.mlp.fc2
        yield f"norm{number}", stage.norm


def mscan_classifier(encoder: Any) -> Pairs:
    yield from mscan_official(encoder)
    yield "head", linear(256)


# ---- Swin: Microsoft's swin_transformer.py, and what mmsegmentation's swin2mmseg.py makes of it.


def swin_blocks(encoder: Any, layers: str, attention: str, fc1: str, fc2: str) -> Pairs:
    """The buffers hold nonsense: they follow from the window's size and are not to be taken."""
    for level, layer in enumerate(encoder.model.layers):
        for index, block in enumerate(layer.blocks):
            name = f"{layers}.{level}.blocks.{index}"
            if index % 2 and level < 3:
                yield f"{name}.attn_mask", torch.full((4, 49, 49), 3.0)
            yield f"{name}.norm1", block.norm1
            yield f"{name}.{attention}.relative_position_bias_table", block.attn.relative_position_bias_table
            yield f"{name}.{attention}.relative_position_index", torch.zeros(49, 49, dtype=torch.long)
            yield f"{name}.{attention}.qkv", block.attn.qkv
            yield f"{name}.{attention}.proj", block.attn.proj
            yield f"{name}.norm2", block.norm2
            yield f"{name}.{fc1}", block.mlp.fc1
            yield f"{name}.{fc2}", block.mlp.fc2


def swin_end(encoder: Any, levels: bool) -> Pairs:
    """A segmenter has norms after its levels, a classifier one at its end."""
    if levels:
        yield from ((f"norm{level}", norm) for level, norm in enumerate(encoder.norms))
    else:
        yield "norm", nn.LayerNorm(encoder.channels[-1])
        yield "head", linear(encoder.channels[-1])


def swin_official(encoder: Any, levels: bool = False) -> Pairs:
    model = encoder.model
    yield "patch_embed.proj", model.patch_embed.proj
    yield "patch_embed.norm", model.patch_embed.norm
    yield from swin_blocks(encoder, "layers", "attn", "mlp.fc1", "mlp.fc2")
    for level in range(3):
        yield f"layers.{level}.downsample.reduction", model.layers[level + 1].downsample.reduction
        yield f"layers.{level}.downsample.norm", model.layers[level + 1].downsample.norm
    yield from swin_end(encoder, levels)


def swin_timm(encoder: Any) -> Pairs:
    """What timm.create_model has, of this very model."""
    yield from encoder.model.state_dict().items()
    yield "norm", nn.LayerNorm(encoder.channels[-1])
    yield "head.fc", linear(encoder.channels[-1])


def unfolded(channels: int) -> Tensor:
    """Where each of nn.Unfold's values of a 2 x 2 patch is in Swin's order, found by merging a patch of numbers."""
    patch = torch.arange(4 * channels).reshape(1, channels, 2, 2)
    swin = torch.cat([patch[:, :, 0, 0], patch[:, :, 1, 0], patch[:, :, 0, 1], patch[:, :, 1, 1]], dim=1)[0]
    mmseg = nn.functional.unfold(patch.float(), kernel_size=2, stride=2)[0, :, 0].long()
    return torch.stack([(swin == number).nonzero()[0, 0] for number in mmseg])


def swin_mmseg(encoder: Any, levels: bool = False) -> Pairs:
    model = encoder.model
    yield "patch_embed.projection", model.patch_embed.proj
    yield "patch_embed.norm", model.patch_embed.norm
    yield from swin_blocks(encoder, "stages", "attn.w_msa", "ffn.layers.0.0", "ffn.layers.1")
    for level in range(3):
        merging, order = model.layers[level + 1].downsample, unfolded(encoder.channels[level])
        yield f"stages.{level}.downsample.norm.weight", merging.norm.weight[order]
        yield f"stages.{level}.downsample.norm.bias", merging.norm.bias[order]
        yield f"stages.{level}.downsample.reduction.weight", merging.reduction.weight[:, order]
    yield from swin_end(encoder, levels)


# ---- mmsegmentation's decode heads: ConvModule has `conv`, and a norm by its kind: `bn` or `gn`.


def conv_module(name: str, layers: Any, norm: str = "bn") -> Pairs:
    yield f"{name}.conv", layers[0]
    if len(layers) > 1:
        yield f"{name}.{norm}", layers[1]


def all_mlp(head: Any) -> Pairs:
    for level, layers in enumerate(head.convs):
        yield from conv_module(f"convs.{level}", layers)
    yield from conv_module("fusion_conv", head.fusion_conv)
    yield "conv_seg", conv_seg(CHANNELS)


def light_ham(head: Any) -> Pairs:
    yield "conv_seg", conv_seg(CHANNELS)
    yield from conv_module("squeeze", head.squeeze, "gn")
    yield from conv_module("hamburger.ham_in", head.hamburger.ham_in)
    yield from conv_module("hamburger.ham_out", head.hamburger.ham_out, "gn")
    yield from conv_module("align", head.align, "gn")


def uper(head: Any) -> Pairs:
    yield "conv_seg", conv_seg(CHANNELS)
    for index, pooled in enumerate(head.psp_modules):
        yield from conv_module(f"psp_modules.{index}.1", pooled[1])
    yield from conv_module("bottleneck", head.bottleneck)
    for name in ("lateral_convs", "fpn_convs"):
        for level, layers in enumerate(getattr(head, name)):
            yield from conv_module(f"{name}.{level}", layers)
    yield from conv_module("fpn_bottleneck", head.fpn_bottleneck)


def fcn(head: Any) -> Pairs:
    yield "conv_seg", conv_seg(256)
    yield from conv_module("convs.0", head.convs[0])


def segmenter(backbone: Pairs, head: Pairs, auxiliary: Pairs | None = None) -> dict[str, Any]:
    """A checkpoint as mmcv saves it."""
    parts = {"backbone": backbone, "decode_head": head, **({"auxiliary_head": auxiliary} if auxiliary else {})}
    pairs = ((f"{part}.{name}", value) for part, found in parts.items() for name, value in found)
    return {"meta": {"mmcv_version": "1.7.0", "CLASSES": ("wall",), "iter": 160000}, "state_dict": write(pairs)}


IMAGENET: dict[str, tuple[str, Callable[[Any], Pairs], Callable[[State], Any]]] = {
    "mit": ("segformer-b0", mit_official, dict),
    "mit-mmseg": ("segformer-b0", mit_mmseg, dict),
    "mscan": ("segnext-t", mscan_classifier, lambda state: {"state_dict": state}),
    "mscan-mmseg": ("segnext-t", mscan_official, dict),
    "swin": ("swin-t", swin_official, lambda state: {"model": state}),
    "swin-timm": ("swin-t", swin_timm, dict),
    "swin-mmseg": ("swin-t", swin_mmseg, dict),
}
SEGMENTERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "segformer-b0": lambda source: segmenter(mit_mmseg(source.encoder), all_mlp(source.head)),
    "segnext-t": lambda source: segmenter(mscan_official(source.encoder), light_ham(source.head)),
    "swin-t": lambda source: segmenter(
        swin_mmseg(source.encoder, levels=True), uper(source.head), fcn(source.auxiliary_head)
    ),
}


def assert_equal(source: nn.Module, loaded: nn.Module, prefix: str = "") -> None:
    """Every tensor whose name begins with the prefix, but for a head's last layer and what calibration sets."""
    found = loaded.state_dict()
    for name, tensor in source.state_dict().items():
        if name.startswith(prefix) and ".project." not in name and not name.endswith(("num_batches_tracked", "spread")):
            assert torch.equal(tensor, found[name]), name


def features(student: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        return student(torch.randn(1, 3, 64, 96, generator=generator))


def assert_same_features(source: Any, loaded: Any) -> None:
    """To the last bit, once the last layer, which no file holds, is the same too."""
    assert not torch.equal(features(source), features(loaded))
    loaded.head.project.load_state_dict(source.head.project.state_dict())
    assert torch.equal(features(source), features(loaded))


@pytest.mark.parametrize("form", list(IMAGENET))
def test_imagenet_weights(form: str, sources: dict[str, Any], tmp_path: Path) -> None:
    """They fill the encoder, and leave the head and the norms after Swin's levels as they were made."""
    model, writer, nest = IMAGENET[form]
    source, file = sources[model], tmp_path / "weights.pth"
    torch.save(nest(write(writer(source.encoder))), file)
    loaded = make(model, str(file))
    if model == "swin-t":
        assert_equal(source, loaded, "encoder.model.")
        assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in loaded.encoder.norms)
        loaded.encoder.norms.load_state_dict(source.encoder.norms.state_dict())
    assert_equal(source, loaded, "encoder.")
    loaded.head.load_state_dict({k: v for k, v in source.head.state_dict().items() if "project" not in k}, strict=False)
    assert_same_features(source, loaded)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("model", list(SEGMENTERS))
def test_mmsegmentations_segmenters(model: str, suffix: str, sources: dict[str, Any], tmp_path: Path) -> None:
    """They fill encoder and heads, all but their last layers."""
    source, file = sources[model], tmp_path / f"weights{suffix}"
    content = SEGMENTERS[model](source)
    if suffix == ".pth":
        torch.save(content, file)
    else:
        save_file(content["state_dict"], file)
    loaded = make(model, str(file), auxiliary=model == "swin-t")
    assert_equal(source, loaded)
    assert_same_features(source, loaded)


def test_heads_that_are_not_wanted_are_left_out(sources: dict[str, Any], tmp_path: Path) -> None:
    """The auxiliary head where the student has none; both where the file has the encoder alone under `backbone`."""
    file, source = tmp_path / "weights.pth", sources["swin-t"]
    torch.save(SEGMENTERS["swin-t"](source), file)
    assert_same_features(source, make("swin-t", str(file)))
    encoder = segmenter(swin_official(source.encoder, levels=True), iter(()))
    torch.save(encoder, file)  # Microsoft's own segmenters: official names, with a norm after each level
    loaded = make("swin-t", str(file), auxiliary=True)
    assert_equal(source, loaded, "encoder.")


def test_head_of_another_width(sources: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save(SEGMENTERS["segformer-b0"](sources["segformer-b0"]), file)
    with pytest.raises(UserError) as error:
        Student(StudentConfig(model="segformer-b0", weights=str(file), channels=CHANNELS // 2), WIDTH)
    assert f"{file} (decode_head) belong to another model" in str(error.value)


def test_swins_merging_is_mmsegmentations(sources: dict[str, Any], tmp_path: Path) -> None:
    """Unfold, norm, linear layer: its own weights, drawn here, give the same merged patches once loaded."""
    file, source = tmp_path / "weights.pth", sources["swin-t"]
    state = write(swin_mmseg(source.encoder))
    generator = torch.Generator().manual_seed(0)
    own: dict[int, list[Tensor]] = {}
    for level, channels in enumerate(source.encoder.channels[:3]):
        shapes = {"norm.weight": [4 * channels], "norm.bias": [4 * channels]}
        shapes["reduction.weight"] = [2 * channels, 4 * channels]
        for name, shape in shapes.items():
            state[f"stages.{level}.downsample.{name}"] = torch.randn(shape, generator=generator)
            own.setdefault(level, []).append(state[f"stages.{level}.downsample.{name}"].double())
    torch.save(state, file)
    layers = make("swin-t", str(file)).double().encoder.model.layers
    for level, (weight, bias, reduction) in own.items():
        x = torch.randn(2, source.encoder.channels[level], 6, 10, generator=generator, dtype=torch.float64)
        patches = nn.Unfold(kernel_size=2, stride=2)(x).transpose(1, 2)
        expected = nn.functional.layer_norm(patches, patches.shape[-1:], weight, bias) @ reduction.T
        with torch.inference_mode():
            found = layers[level + 1].downsample(x.permute(0, 2, 3, 1))
        torch.testing.assert_close(found.flatten(1, 2), expected, rtol=1e-10, atol=1e-10)


def test_mits_joint_projection_is_torchs(sources: dict[str, Any], tmp_path: Path) -> None:
    """What mmsegmentation keeps in nn.MultiheadAttention attends alike."""
    file, state = tmp_path / "weights.pth", write(mit_mmseg(sources["segformer-b0"].encoder))
    theirs = nn.MultiheadAttention(256, 8, batch_first=True)
    scramble(theirs)
    state |= {f"layers.3.1.1.attn.attn.{name}": tensor for name, tensor in theirs.state_dict().items()}
    torch.save(state, file)
    attention = make("segformer-b0", str(file)).encoder.stages[3].blocks[1].attn
    x = torch.randn(2, 12, 256, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(attention(x, [3, 4]), theirs(x, x, x)[0], rtol=1e-4, atol=1e-5)
