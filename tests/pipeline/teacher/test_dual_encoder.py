"""Dual encoders of transformers as teachers: against transformers' own outputs, and open_clip with its weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import normalize

from configs.errors import UserError
from configs.schema import Teacher as Settings
from pipeline.teacher.clip import FrozenClip
from pipeline.teacher.dense import VARIANTS
from pipeline.teacher.dual_encoder import MODELS
from pipeline.teacher.teacher import Teacher, fingerprint, load_teacher
from tests.hub import put
from tests.pipeline.teacher.conftest import ARCHITECTURE, draw_pixels, random_weights, write
from tests.pipeline.teacher.dual_encoders import KINDS, PATCH, SIDE, write_dual_encoder
from tests.pipeline.teacher.test_towers import timm_tower

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(request.param) / request.param
    write_dual_encoder(made, request.param)
    return made


def settings(folder: Path, **others: str) -> Settings:
    return Settings.model_validate({"model": "transformers", "pretrained": str(folder), **others})


def theirs(folder: Path) -> Any:
    return transformers.AutoModel.from_pretrained(folder).eval().requires_grad_(False)


def test_every_kind_is_tested() -> None:
    assert set(MODELS) == set(KINDS)


def test_cosines_are_those_of_transformers(folder: Path) -> None:
    """Their processor and whole forward pass, from RGB and words to cosines, for two images and four words."""
    teacher, model = load_teacher(settings(folder)), theirs(folder)
    images = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)
    words = ["Cat", "dog", "a long-haired dog at 4 km", "x"]
    prepared = transformers.AutoImageProcessor.from_pretrained(folder)(images=list(images), return_tensors="pt")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if "siglip" in folder.name:  # as they were trained: lower case, filled up on the right, no mask
        texts = [f"a photo of a {word.lower()}." for word in words]
        longest = model.config.text_config.max_position_embeddings
        how = {"padding": "max_length", "max_length": longest, "padding_side": "right", "truncation": True}
        tokens = {"input_ids": tokenizer(texts, return_tensors="pt", **how)["input_ids"]}
    else:
        tokens = tokenizer([f"a photo of a {word}." for word in words], padding=True, return_tensors="pt")
    output = model(**prepared, **tokens)
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - torch.tensor(teacher.mean).view(3, 1, 1)) / (
        torch.tensor(teacher.std).view(3, 1, 1)
    )
    cls_token, dense = teacher.encode(pixels)
    features = teacher.text_features([[word] for word in words], "single")
    assert dense.shape == (2, SIDE // PATCH, SIDE // PATCH, teacher.width) and teacher.stride == PATCH
    torch.testing.assert_close(normalize(cls_token, dim=-1), output.image_embeds, **CLOSE)
    torch.testing.assert_close(features, output.text_embeds, **CLOSE)
    assert (features @ features.T).fill_diagonal_(0).max() < 0.9999, "words that differ"


def alone(model: Any, token: Tensor) -> Tensor:
    """The embedding (C,) of a token (W,) after the last block, step by step."""
    tower = model.vision_model
    token = tower.post_layernorm(token)
    if hasattr(model, "visual_projection"):
        return model.visual_projection(token)
    pool, width = tower.head, len(token)
    value = pool.attention.in_proj_weight[2 * width :] @ token + pool.attention.in_proj_bias[2 * width :]
    pooled = pool.attention.out_proj(value)
    return pooled + pool.mlp(pool.layernorm(pooled))


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (2, 5), (6, 6), (1, 1)])
def test_plain_tokens_and_sizes(folder: Path, rows: int, columns: int) -> None:
    """S is theirs at any size; plain tokens are the unmodified last block's, each pooled alone."""
    teacher, model = load_teacher(settings(folder, dense="plain")), theirs(folder)
    pixels, outputs = draw_pixels(2, rows * PATCH, columns * PATCH), []
    layer = model.vision_model.encoder.layers[-1]
    layer.register_forward_hook(lambda *call: outputs.append(call[2]))
    if "siglip2" in folder.name:
        patches = torch.nn.functional.unfold(pixels, PATCH, stride=PATCH).unflatten(1, (3, -1))
        patches = patches.permute(0, 3, 2, 1).flatten(2)
        mask, shapes = torch.ones(patches.shape[:2]), torch.tensor([[rows, columns]] * 2)
        expected = model.get_image_features(patches, mask, shapes).pooler_output
    else:
        expected = model.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output
    cls_token, dense = teacher.encode(pixels)
    torch.testing.assert_close(cls_token, expected, **CLOSE)
    tokens = outputs[0][:, -rows * columns :].flatten(0, 1)
    singly = torch.stack([alone(model, token) for token in tokens]).view(dense.shape)
    torch.testing.assert_close(dense, singly, **CLOSE)


def joint(state: dict[str, Tensor], layer: str, kind: str) -> Tensor:
    return torch.cat([state[f"{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"])


def as_open_clip(model: Any) -> dict[str, Tensor]:
    """The image tower of a CLIPModel under open_clip's names."""
    state = {name.removeprefix("vision_model."): value for name, value in model.state_dict().items()}
    found = {
        "class_embedding": state["embeddings.class_embedding"],
        "conv1.weight": state["embeddings.patch_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "proj": state["visual_projection.weight"].T,
    }
    for kind in ("weight", "bias"):
        found |= {f"ln_pre.{kind}": state[f"pre_layrnorm.{kind}"], f"ln_post.{kind}": state[f"post_layernorm.{kind}"]}
        for index in range(2):
            old, new = f"encoder.layers.{index}", f"transformer.resblocks.{index}"
            found[f"{new}.attn.in_proj_{kind}"] = joint(state, old, kind)
            names = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2"}
            names |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
            found |= {f"{new}.{to}.{kind}": state[f"{old}.{name}.{kind}"] for name, to in names.items()}
    return {f"visual.{name}": value for name, value in found.items()}


def as_timm(model: Any) -> dict[str, Tensor]:
    """The image tower of a SiglipModel under the names of open_clip's SigLIP, a timm model."""
    state = {name.removeprefix("vision_model."): value for name, value in model.state_dict().items()}
    found = {"pos_embed": state["embeddings.position_embedding.weight"][None], "attn_pool.latent": state["head.probe"]}
    ends = {
        "embeddings.patch_embedding": "patch_embed.proj",
        "post_layernorm": "norm",
        "head.layernorm": "attn_pool.norm",
    }
    ends |= {f"head.mlp.fc{number}": f"attn_pool.mlp.fc{number}" for number in (1, 2)}
    ends |= {"head.attention.out_proj": "attn_pool.proj"}
    names = {"self_attn.out_proj": "attn.proj", "layer_norm1": "norm1", "layer_norm2": "norm2"}
    names |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for kind in ("weight", "bias"):
        found |= {f"{to}.{kind}": state[f"{name}.{kind}"] for name, to in ends.items()}
        pool = state[f"head.attention.in_proj_{kind}"]
        found[f"attn_pool.q.{kind}"], found[f"attn_pool.kv.{kind}"] = pool.split((len(pool) // 3, 2 * len(pool) // 3))
        for index in range(2):
            found[f"blocks.{index}.attn.qkv.{kind}"] = joint(state, f"encoder.layers.{index}", kind)
            found |= {
                f"blocks.{index}.{to}.{kind}": state[f"encoder.layers.{index}.{name}.{kind}"]
                for name, to in names.items()
            }
    return {f"visual.trunk.{name}": value for name, value in found.items()}


@pytest.mark.parametrize("dense", VARIANTS)
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_open_clip_with_the_same_weights(kind: str, dense: str, tmp_path: Path) -> None:
    """One image tower, loaded through either library: the same S, and the same D in every variant."""
    model = write_dual_encoder(tmp_path / kind, kind, hidden_act="gelu")
    if kind == "clip":
        architecture, tower = ARCHITECTURE, as_open_clip(model)
    else:
        architecture, tower = timm_tower("tiny_siglip", "map", "none"), as_timm(model)
    weights = random_weights(architecture)
    assert {name for name in weights if name.startswith("visual.")} == set(tower), "every weight is set"
    clip = FrozenClip(write(tmp_path, architecture, weights | tower, dense=dense))
    teacher, pixels = load_teacher(settings(tmp_path / kind, dense=dense)), draw_pixels(2, SIDE)
    for found, expected in zip(teacher.encode(pixels), clip.encode(pixels), strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


def test_half_precision(folder: Path) -> None:
    exact, half = (load_teacher(settings(folder, precision=kind)) for kind in ("fp32", "bf16"))
    pixels = draw_pixels(1, SIDE)
    for found, expected in zip(half.encode(pixels), exact.encode(pixels), strict=True):
        assert found.dtype == torch.float32 and not torch.equal(found, expected)
        assert torch.cosine_similarity(found, expected, dim=-1).min() > 0.98


def test_fingerprint(tmp_path: Path) -> None:
    """It follows what transformers reads, and nothing else."""
    folder = tmp_path / "siglip"
    write_dual_encoder(folder, "siglip")
    first = fingerprint(settings(folder))
    (folder / "README.md").write_text("a model")
    assert fingerprint(settings(folder)) == first and first["model"] == "transformers"
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | {"image_mean": [0.4, 0.5, 0.5]}))
    assert fingerprint(settings(folder)) != first
    assert fingerprint(settings(Path("google/siglip2-base-patch16-512")))["pretrained"] == (
        "google/siglip2-base-patch16-512"
    )


def test_a_model_of_the_hub(offline: Path, folder: Path) -> None:
    """From the Hugging Face cache, without a network; an absent one is one line."""
    put(offline, "org/tiny", {path.name: path.read_bytes() for path in folder.iterdir()})
    pixels, words = draw_pixels(1, SIDE), [["cat"], ["dog"]]
    ours, hubs = load_teacher(settings(folder)), load_teacher(settings(Path("org/tiny")))
    assert torch.equal(hubs.encode(pixels)[0], ours.encode(pixels)[0])
    assert torch.equal(hubs.text_features(words, "single"), ours.text_features(words, "single"))
    assert refused(Path("org/other")).endswith("or ORG/NAME of the hub, and connect once")


def refused(folder: Path, use: Any = lambda teacher: None) -> str:
    with pytest.raises(UserError) as error:
        use(load_teacher(settings(folder)))
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def words(teacher: Teacher) -> None:
    teacher.text_features([["cat"]], "single")


def test_what_is_refused(offline: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "siglip"
    model = write_dual_encoder(folder, "siglip")
    config = folder / "config.json"
    whole = json.loads(config.read_text())
    assert "cannot be loaded by transformers" in refused(tmp_path / "nowhere")
    config.write_text(json.dumps(whole | {"model_type": "bert"}))
    assert "of the type 'bert': transformers' teachers are clip, " in refused(folder)
    deeper = whole | {"vision_config": whole["vision_config"] | {"num_hidden_layers": 3}}
    config.write_text(json.dumps(deeper))
    assert "16 weights are missing" in refused(folder)
    assert not caplog.records, "transformers lists all of them"
    config.write_text(json.dumps(whole))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert "cannot be loaded by transformers" in refused(folder, words)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be loaded by transformers" in refused(folder)
    weights.unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert "safetensors" in refused(folder)


def test_a_strangers_folder_runs_no_code(tmp_path: Path) -> None:
    """Code beside the weights, which `auto_map` names, and an attention kernel to download are not looked at."""
    folder, ran = tmp_path / "clip", tmp_path / "ran"
    write_dual_encoder(folder, "clip")
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass Evil: pass\n")
    kernel = {"attn_implementation": "stranger/kernel", "_attn_implementation": "stranger/kernel"}
    kinds = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoImageProcessor")
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        content = json.loads((folder / name).read_text())
        content["auto_map"] = {kind: ["evil.Evil", "evil.Evil"] if "Tok" in kind else "evil.Evil" for kind in kinds}
        if name == "config.json":
            content |= kernel
            content["vision_config"] |= kernel
        (folder / name).write_text(json.dumps(content))
    teacher = load_teacher(settings(folder))
    teacher.encode(draw_pixels(1, SIDE))
    words(teacher)
    assert not ran.exists()
