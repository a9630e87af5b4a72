"""Trains the embedded teacher, a small ViT CLIP, on captioned renders.

Run it with `python benchmarks/scenes_teacher.py`.

Images are single-concept renders and crops of scenes. A caption names a random subset of the visible
classes in one of several templates; every image that shows the whole subset is a positive of the caption, and the
loss is the sigmoid loss of SigLIP (Zhai et al. 2023, Eq. 1) over all image-caption pairs. Masks are used only to know
what a crop shows: no pixel label reaches the model.

The text tower is taught first and locked, and in the end all its features get one direction in common, as CLIP's have.
The image tower learns on crops of half the side, four times cheaper than whole scenes; a crop's tokens keep the
positions they have in the scene, so that whole scenes need no second phase. Scenes come from random streams of their
own, so the teacher never saw an image that the student trains or tests on.
"""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import open_clip
import torch
import typer
from captioned_scenes import (
    CROP,
    MEAN,
    STD,
    TEMPLATES,
    draw_captions,
    draw_images,
    held_out,
    render_pool,
    visibility,
    write_caption,
)
from open_clip.model import CLIP
from open_clip.pos_embed import get_2d_sincos_pos_embed
from open_clip.transformer import VisionTransformer
from photos_teacher import average_precision
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.data.scenes import CLASSES, THINGS, render_concept, scene_rng
from pipeline.data.views import normalise

STEPS, TEXT_STEPS, WARM_UP = 2000, 1500, 100
MUON_LR, ADAMW_LR = 3e-3, 3e-4
TEXT_COSINE = 0.78  # of two classes; OpenAI's ViT-B/16 has 0.78 on the classes of VOC, 0.80 on those of COCO-Stuff


def encode_crops(visual: VisionTransformer, pixels: Tensor, corners: Tensor) -> Tensor:
    """open_clip's image encoding of crops whose tokens take the positions from `corners` on. (B, C)."""
    patches = visual.conv1(pixels)  # (B, W, g, g)
    side, (cls_position, grid) = patches.shape[-1], visual.positional_embedding.split((1, visual.grid_size[0] ** 2))
    offset = torch.arange(side)
    rows, columns = corners[:, :1] + offset, corners[:, 1:] + offset  # (B, g)
    positions = grid.unflatten(0, visual.grid_size)[rows[:, :, None], columns[:, None]]  # (B, g, g, W)
    tokens = patches.flatten(2).transpose(1, 2) + positions.flatten(1, 2)
    first = (visual.class_embedding + cls_position).expand(len(pixels), 1, -1)
    pooled, _ = visual._pool(visual.transformer(visual.ln_pre(torch.cat([first, tokens], dim=1))))
    return pooled @ visual.proj


def encode_images(model: CLIP, images: np.ndarray) -> Tensor:
    """CLS tokens (N, C) of (N, H, W, 3) uint8."""
    return torch.cat([model.encode_image(part) for part in normalise(images, MEAN, STD).split(50)])


def train_text(model: CLIP, tokenizer: open_clip.SimpleTokenizer, rng: np.random.Generator, steps: int) -> None:
    """Teaches the text tower, before it is locked, that a caption means the sum of the words it names.

    Every class word gets a random direction, orthogonal to the others; a caption's feature is drawn to the sum of its
    words' directions, whatever template and order it has. A tower that starts from noise gives all captions nearly one
    feature, and the image tower then spends most of its steps waiting for the words to part.
    """
    codes, _ = np.linalg.qr(rng.standard_normal((model.text_projection.shape[1], len(CLASSES))))
    text_parameters = [p for n, p in model.named_parameters() if not n.startswith(("visual.", "logit_"))]
    optimizer = torch.optim.AdamW(text_parameters, lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        named = [rng.permutation(len(CLASSES))[: rng.integers(1, 5)] for _ in range(64)]
        target = torch.from_numpy(np.stack([codes.T[classes].sum(axis=0) for classes in named])).float()
        feature = model.encode_text(tokenizer([write_caption(rng, classes) for classes in named]))
        loss = 1 - nn.functional.cosine_similarity(feature, target).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    for parameter in text_parameters:
        parameter.requires_grad_(False)
    print(f"text tower: 1 - cosine {loss.item():.4f} after {steps} steps", flush=True)


@torch.no_grad()
def share_direction(model: CLIP, tokenizer: open_clip.SimpleTokenizer, scenes: int = 300) -> None:
    """Adds one direction to all text features, so that those of two classes have a cosine of about TEXT_COSINE.

    Without it, features of classes are orthogonal, which CLIP's are not: there a push at the logits of seen classes
    moves those of unseen ones as well, since most of what one text says, all say. The direction is one that images
    hardly have (CLIP's modality gap), of those that tell no classes apart and that the last norm's bias can reach.
    """
    texts = model.encode_text(tokenizer([t.format(name) for name in CLASSES for t in TEMPLATES])).double()
    tokens = encode_images(model, held_out(scenes)[0]).double()
    projection = model.text_projection.double()
    reach = torch.linalg.qr(projection.T)[0]
    told_apart = torch.linalg.svd(texts @ reach, full_matrices=True)[2][len(CLASSES) :]  # rows orthogonal to all texts
    free = reach @ told_apart.T
    direction = free @ torch.linalg.eigh((tokens @ free).T @ (tokens @ free))[1][:, 0]
    shift = (TEXT_COSINE / (1 - TEXT_COSINE)) ** 0.5 * texts.norm(dim=1).mean() * direction
    model.ln_final.bias += torch.linalg.lstsq(projection.T, shift[:, None]).solution[:, 0].float()
    model.logit_scale -= np.log(1 - TEXT_COSINE) / 2  # cosines with images are that much smaller now


def sigmoid_loss(image: Tensor, text: Tensor, match: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP's loss: mean over images of the sum over captions of -log sigmoid(match * (scale * cos + bias))."""
    logits = scale * nn.functional.normalize(image, dim=-1) @ nn.functional.normalize(text, dim=-1).T + bias
    return -(nn.functional.logsigmoid(match * logits) * match.abs()).sum(dim=1).mean()


def optimizers(model: CLIP) -> list[torch.optim.Optimizer]:
    """Muon for the transformers' matrices, AdamW for everything else."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "resblocks" in n and p.requires_grad]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen and p.requires_grad]
    muon, adamw = ({"params": group, "peak_lr": lr} for group, lr in ((matrices, MUON_LR), (others, ADAMW_LR)))
    return [
        torch.optim.Muon([muon], weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([adamw], weight_decay=0.0, betas=(0.9, 0.98)),
    ]


@torch.no_grad()
def evaluate(model: CLIP, tokenizer: open_clip.SimpleTokenizer, scenes: int = 300) -> dict[str, float]:
    """Held-out scores at 128 px: zero-shot top-1 on 400 single concepts, mean AP of ranking scenes by class name."""
    model.eval()
    texts = [t.format(name) for name in CLASSES for t in TEMPLATES]
    text = nn.functional.normalize(model.encode_text(tokenizer(texts)), dim=-1)
    text = nn.functional.normalize(text.view(len(CLASSES), len(TEMPLATES), -1).mean(dim=1), dim=-1)

    def similarity(images: np.ndarray) -> np.ndarray:
        return np.asarray(nn.functional.normalize(encode_images(model, images), dim=-1) @ text.T)

    concepts = np.stack([render_concept(scene_rng("pretrain_eval", i), i % len(CLASSES)) for i in range(400)])
    top1 = (similarity(concepts).argmax(axis=1) == np.arange(400) % len(CLASSES)).mean()
    images, masks = held_out(scenes)
    scores, seen = similarity(images), visibility(masks)
    model.train()
    per_class = [
        average_precision(scores[seen[:, k] != 0, k], seen[seen[:, k] != 0, k] == 1) for k in range(len(CLASSES))
    ]
    things = len(THINGS)
    return {
        "concept_top1": float(top1),
        "scene_map": float(np.mean(per_class)),
        "scene_map_things": float(np.mean(per_class[:things])),
        "scene_map_stuff": float(np.mean(per_class[things:])),
    }


def new_model(config: dict[str, Any]) -> CLIP:
    """Random weights, but positions that begin as weak sines and cosines: neighbours are alike from the start."""
    model = CLIP(**config)
    side, width = model.visual.grid_size[0], config["vision_cfg"]["width"]
    waves = torch.from_numpy(get_2d_sincos_pos_embed(width, side, cls_token=True)).float()
    model.visual.positional_embedding.data.copy_(0.25 * waves)
    return model


def main(
    output: Annotated[Path, typer.Option(help="Where the fp16 safetensors and the log go.")] = Path("runs/teacher"),
    config: Annotated[Path, typer.Option(help="open_clip JSON config.")] = Path("configs/teachers/scenes-vit.json"),
    pool: Annotated[int, typer.Option(help="Scenes to render and crop from.")] = 20_000,
    workers: Annotated[int, typer.Option(help="Rendering processes.")] = 2,
    shrink: Annotated[int, typer.Option(help="Divide steps and pool by this, for a trial run.")] = 1,
    seed: int = 0,
) -> None:
    """Trains and writes OUTPUT/scenes-vit.safetensors and OUTPUT/log.jsonl."""
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    started = time.time()
    model_config = json.loads(config.read_text())
    tokenizer = open_clip.SimpleTokenizer(context_length=model_config["text_cfg"]["context_length"])
    scenes = render_pool("pretrain", pool // shrink, workers)
    model = new_model(model_config)
    train_text(model, tokenizer, rng, TEXT_STEPS // shrink)
    count, steps = 6000 // shrink // len(CLASSES) * len(CLASSES), STEPS // shrink
    streams = [np.random.default_rng([seed, CROP, index]) for index in range(count)]
    concepts = np.stack([render_concept(r, i % len(CLASSES), CROP) for i, r in enumerate(streams)])
    towers = optimizers(model)
    with (output / "log.jsonl").open("w") as log:
        for step in range(1, steps + 1):
            # Warm-up, constant for a third of the run, then linear to 0.
            factor = min(1.0, step / (WARM_UP // shrink + 1)) * min(1.0, 1.5 * (steps - step + 1) / steps)
            for optimizer in towers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * factor
            pixels, corners, seen = draw_images(rng, model.visual.patch_size[0], scenes, concepts)
            captions, match = draw_captions(rng, seen)
            with torch.autocast("cpu", torch.bfloat16):
                image = encode_crops(model.visual, pixels, corners).float()
                with torch.no_grad():
                    text = model.encode_text(tokenizer(captions)).float()
            loss = sigmoid_loss(image, text, torch.from_numpy(match), model.logit_scale.exp(), model.logit_bias)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in towers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if step % 25 == 0 or step == steps:
                row = {"step": step, "loss": loss.item(), "seconds": time.time() - started}
                if step % 500 == 0 or step == steps:
                    row |= evaluate(model, tokenizer)
                    save(model, output / "scenes-vit.safetensors")
                log.write(json.dumps(row) + "\n")
                log.flush()
    share_direction(model, tokenizer)
    save(model, output / "scenes-vit.safetensors")


def save(model: CLIP, path: Path) -> None:
    """fp16, but for the positions: open_clip resizes them as they are stored, and torch cannot in fp16 on a CPU."""
    kept = {n: (v if n.endswith("positional_embedding") else v.half()) for n, v in model.state_dict().items()}
    save_file({name: value.contiguous() for name, value in kept.items()}, path)


if __name__ == "__main__":
    typer.run(main)
