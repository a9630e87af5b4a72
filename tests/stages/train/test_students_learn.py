"""Every named student, and one timm encoder of each kind, learns: 15 iterations on scenes, and the loss falls."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cache.reader import open_cache
from configs.load import resolve
from pipeline.student.families import FAMILIES
from stages.train.stage import train
from tests.conftest import World

# Without local distillation: a batch of two has few regions, and their loss is noise.
TIMM = ("timm:resnet10t", "timm:vit_tiny_patch16_224")  # a convolutional encoder, and a plain ViT under its pyramid
SETTINGS = ("train.iterations=15", "train.batch_size=2", "train.lr=1e-3", "train.head_lr_factor=1", "train.warmup=3",
            "train.validate_every=15", "loss.label_stride=4", "loss.local=false",
            "student.drop_path=0", "student.channels=32")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("model", [*FAMILIES, *TIMM])
def test_loss_falls(model: str, world: World, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    cache = open_cache(world.folder / "caches" / "tiny")
    config = resolve(config=world.config, assignments=[*SETTINGS, f"student.model={model}"])
    run = train(config, cache, world.data, tmp_path / "run", "cpu")
    totals = [json.loads(line)["total"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert len(totals) == 15 and np.isfinite(totals).all()
    assert np.mean(totals[-4:]) < 0.9 * np.mean(totals[:4])
    (run / "student.safetensors").unlink()  # half a gigabyte, of the largest
