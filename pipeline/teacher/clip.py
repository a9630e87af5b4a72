"""The frozen teacher: any open_clip model whose image tower has dense tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from configs.schema import Teacher
from pipeline.precision import autocast
from pipeline.teacher.load import load
from pipeline.teacher.teacher import require_finite, tokens_along
from pipeline.teacher.text import classifier
from pipeline.teacher.towers import capture, tower_of


class FrozenClip:
    """CLS and dense tokens of images, and class features of names. Eval mode, fp32 weights, no gradients.

    Attributes:
        model: the open_clip model. Its position embeddings are those of the last images' grid.
        width: C, width of the joint embedding.
        stride: pixels along a side of a dense token.
        mean, std: the normalisation its images must have.
    """

    def __init__(
        self, config: Teacher, device: str = "cpu", channels_last: bool = False, compile: bool = False
    ) -> None:
        """Loads the model.

        Args:
            channels_last: the image tower's memory format, faster for convolutions on a GPU.
            compile: compile the image tower's blocks with torch.compile, each kind once.

        Raises:
            UserError: unknown model, missing or unfitting weights, a tower without dense tokens of this kind.
        """
        loaded = load(config)
        self.model = loaded.model.to(device).eval().requires_grad_(False)
        self._tower = tower_of(self.model.visual, config)
        self._name, self._device, self._tokenizer = config.model, device, loaded.tokenizer
        self._precision = config.precision
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self.model.visual.to(memory_format=self._format)
        if compile:
            for block in self._tower.blocks:
                block.compile()
        self.width: int = loaded.width
        self.stride: int = self._tower.stride
        self.mean: tuple[float, ...] = tuple(self.model.visual.image_mean)
        self.std: tuple[float, ...] = tuple(self.model.visual.image_std)

    def grid(self, size: int) -> int:
        """Dense tokens along a side of `size` pixels. UserError if `size` is not a multiple of the stride."""
        return tokens_along(size, self.stride, self._name)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """S, the model's `encode_image`, and D as set by `teacher.dense`, in one forward pass.

        Args:
            pixels: (B, 3, H, W) normalised images; H and W are multiples of the stride and need not be equal.

        Returns:
            S (B, C) and D (B, H / stride, W / stride, C), both unnormalised fp32, computed at `teacher.precision`.

        Raises:
            UserError: the tower does not take images of this size, or gives values that are not finite.
        """
        grid = self.grid(pixels.shape[-2]), self.grid(pixels.shape[-1])
        self._tower.fit(grid)
        pixels = pixels.to(self._device, memory_format=self._format)
        with autocast(pixels.device.type, self._precision):
            with capture(self._tower.tap, self._tower.method) as calls:
                cls_token = self.model.encode_image(pixels, normalize=False)
            dense_tokens = self._tower.dense(calls[0], grid)
        require_finite(cls_token.half(), "CLS tokens", self._name)  # caches have float16
        require_finite(dense_tokens, "dense tokens", self._name)
        return cls_token.float(), dense_tokens.float().unflatten(1, grid)

    @torch.inference_mode()
    def text_features(self, names: Sequence[Sequence[str]], templates: str | Sequence[str]) -> Tensor:
        """(K, C) unit-length class features; see `pipeline.teacher.text.classifier`.

        Args:
            names: synonyms of each of K classes.
            templates: `single`, `zegclip`, `imagenet`, or texts that hold {}.

        Raises:
            UserError: the model's tokenizer cannot be had, or values are not finite.
        """
        tokenizer = self._tokenizer()

        def encode(texts: list[str]) -> Tensor:
            return self.model.encode_text(tokenizer(texts).to(self._device))

        features = classifier(encode, names, templates)
        require_finite(features, "text features", self._name)
        return features
