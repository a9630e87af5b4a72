"""Exports a run to a folder: ONNX and torch.export programs, weights, class features, and a model card."""

import json
import math
import shutil
import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from string import Template
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError, writing
from pipeline.student.portable import Portable
from stages.apply.evaluate import run_gamma
from stages.common.progress import progress_bar
from stages.common.runs import CONFIG, Run, save_student

ONNX, PROGRAM, FEATURES, CARD, DESCRIPTION = (
    "model.onnx", "model.pt2", "text_features.npy", "README.md", "model.json"
)  # fmt: skip
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
TOLERANCE = {"fp32": 1e-4, "fp16": 3e-2}  # of the largest logit
MOST = 8192  # pixels: how high and wide an image may be
Shape = tuple[int, int, int, int]  # batch, height and width, classes
Inputs = tuple[Tensor, Tensor]


def export(run: Run, output: Path, precision: Literal["fp32", "fp16"] = "fp32") -> dict[str, float]:
    """Write the folder `output`, which must be empty, and check both programs on sizes other than those of tracing.

    Programs take images of any size up to MOST, whose sides are longer than the student's coarsest stride. Swin's take
    one size, views.size x views.size: torch cannot export its window masks for unknown sizes.

    Returns:
        The largest difference of ONNX Runtime's and of the program's logits from the student's, by file.

    Raises:
        UserError: ONNX's packages are missing, `output` holds something, or a program differs by more than TOLERANCE.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ModuleNotFoundError as error:
        raise UserError(f"export needs {error.name}: run pip install -e '.[export]' in the clip-zss folder") from error
    if output.exists() and any(output.iterdir()):
        raise UserError(f"--output {output} is not empty: choose another folder, or delete it")
    output = output.absolute()  # `.` has no name
    aside = output.with_name(f".{output.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        with writing(output):
            found = _write(run, aside, precision)
        if output.exists():  # it may be the working folder
            for file in aside.iterdir():
                file.rename(output / file.name)
        else:
            aside.rename(output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return found


def _write(run: Run, folder: Path, precision: Literal["fp32", "fp16"]) -> dict[str, float]:
    """Write the export to an existing folder."""
    import onnxruntime

    model = Portable(run.student, DTYPES[precision]).eval()
    fixed = run.config.views.size if run.config.student.model.startswith("swin") else None
    traced, *shapes = _shapes(model.multiple, fixed)
    with progress_bar("export"), torch.no_grad():
        program = torch.export.export(
            model, _inputs(model, traced), dynamic_shapes=_dynamic(model, fixed is None),
            prefer_deferred_runtime_asserts_over_guards=True,  # it cannot prove that each side gives a size that works
        )  # fmt: skip
        with warnings.catch_warnings():  # of tensors that share memory; what is saved is compared below
            warnings.filterwarnings("ignore", message="No complete tensor")
            torch.export.save(program, content := BytesIO())  # of a file it ends the process where the disk is full
        (folder / PROGRAM).write_bytes(content.getvalue())
        made = torch.onnx.export(
            program, dynamo=True, input_names=["image", "text_features"], output_names=["logits"], verbose=False
        )
        assert made is not None
        made.save(str(folder / ONNX), external_data=False)
    session = onnxruntime.InferenceSession(str(folder / ONNX), providers=["CPUExecutionProvider"])
    loaded = torch.export.load(folder / PROGRAM).module()

    def in_onnx(image: Tensor, features: Tensor) -> Tensor:
        fed = {"image": image.numpy(), "text_features": features.numpy()}
        return torch.from_numpy(session.run(None, fed)[0])

    reference = Portable(run.student)
    found = {name: _difference(reference, other, shapes) for name, other in ((ONNX, in_onnx), (PROGRAM, loaded))}
    for name, difference in found.items():
        if not difference <= TOLERANCE[precision]:
            raise UserError(
                f"nothing was exported: {name} differs from the student by {difference:.1e} of its largest logit, more "
                f"than {TOLERANCE[precision]:.0e}" + ("; try --precision fp32" if precision == "fp16" else "")
            )
    gamma = run_gamma(run)
    shutil.copy(run.path / CONFIG, folder / CONFIG)
    save_student(folder, run.student, run.text_features, run.iteration, gamma, run.alpha)  # an old run lacks gamma
    np.save(folder / FEATURES, run.text_features.cpu().numpy())
    description = _describe(run, 0.0 if math.isnan(gamma) else gamma, model, precision, fixed)
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
    (folder / CARD).write_text(_card(run, description, found), encoding="utf-8")
    return found


def _shapes(multiple: int, fixed: int | None) -> list[Shape]:
    """The shape to export with, and others to check: sides that are multiples of the stride, and some that are not."""
    sides = [(3 * multiple, 4 * multiple), (multiple + 1, 2 * multiple - 1), (5 * multiple, 3 * multiple - 2),
             (4 * multiple - 3, 7 * multiple)]  # fmt: skip
    counts = [(2, 5), (1, 1), (3, 20), (1, 150)]
    return [(b, fixed or h, fixed or w, k) for (h, w), (b, k) in zip(sides, counts, strict=True)]


def _inputs(model: Portable, shape: Shape) -> Inputs:
    batch, height, width, classes = shape
    draw = torch.Generator().manual_seed(sum(shape))
    size = (batch, height, width, 3)
    channels = model.student.head.project.out_channels
    features = torch.randn(classes, channels, generator=draw)
    return torch.randint(256, size, generator=draw, dtype=torch.uint8), torch.nn.functional.normalize(features, dim=1)


def _dynamic(model: Portable, any_size: bool) -> dict[str, dict[int, Any]]:
    dim = torch.export.Dim
    sides = {axis: dim(name, min=model.multiple + 1, max=MOST) for axis, name in ((1, "height"), (2, "width"))}
    return {
        "image": {0: dim("batch", min=1, max=1024), **(sides if any_size else {})},
        "text_features": {0: dim("classes", min=1, max=100_000)},
    }


def _difference(model: Portable, other: Any, shapes: Sequence[Shape]) -> float:
    """The largest difference, as a fraction of the largest logit."""
    worst = 0.0
    for shape in shapes:
        inputs = _inputs(model, shape)
        with torch.no_grad():
            wanted, got = model(*inputs), other(*inputs)
        worst = max(worst, float((got - wanted).abs().max() / wanted.abs().max()))
    return worst


def _describe(run: Run, gamma: float, model: Portable, precision: str, fixed: int | None) -> dict[str, Any]:
    dataset = run.config.dataset
    return {
        "inputs": {"image": "(B, H, W, 3) uint8 RGB", "text_features": f"(K, {run.text_features.shape[1]}) float32"},
        "outputs": {"logits": "(B, K, H, W) float32"},
        "smallest": fixed or model.multiple + 1,
        "largest": fixed or MOST,
        "short_side": run.config.views.size,
        "padding": [round(255 * value) for value in run.student.mean],
        "precision": precision,
        "classes": list(dataset.classes),
        "class_of_feature": list(dataset.class_of_channel),
        "unseen": list(dataset.unseen),
        "gamma": gamma,
        "teacher": {"model": run.config.teacher.model, "pretrained": run.config.teacher.pretrained},
        "student": run.config.student.model,
        "iteration": run.iteration,
    }


def _card(run: Run, description: dict[str, Any], found: dict[str, float]) -> str:
    dataset = run.config.dataset
    template = Template((Path(__file__).parent / "export_card.md").read_text(encoding="utf-8"))
    return template.substitute(
        student=run.config.student.model,
        dataset=dataset.name,
        seen=len(dataset.seen_indices),
        unseen=", ".join(dataset.unseen) or "none",
        teacher=f"{run.config.teacher.model} ({run.config.teacher.pretrained})",
        iterations=f"{run.iteration:,}",
        count=len(dataset.classes),
        image=description["inputs"]["image"],
        text_features=description["inputs"]["text_features"],
        logits=description["outputs"]["logits"],
        gamma=f"{description['gamma']:.4g}",
        **{name: description[name] for name in ("precision", "smallest", "largest", "short_side")},
        checked="\n".join(f"- `{name}`: {value:.1e}" for name, value in found.items()),
    )
