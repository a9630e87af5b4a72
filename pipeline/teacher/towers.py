"""Image towers: where each kind's dense tokens come from, and how it takes images of any size.

The unmodified model makes S; on the way, the input of one of its modules (the `tap`) is captured, and D is computed
from that. A token's own embedding is what the tower's pooling head makes of that token alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.fastvit import FastVit
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import Teacher
from pipeline.teacher import blocks
from pipeline.teacher.dense import VARIANTS

Grid = tuple[int, int]  # rows and columns of dense tokens


class Captured(NamedTuple):
    """The call of a tap: its input, and timm's rotary embedding where one is passed along."""

    x: Tensor
    rope: Tensor | None


@contextmanager
def capture(module: nn.Module) -> Iterator[list[Captured]]:
    """Within it, each call of `module` adds what it was called with to the list."""
    calls: list[Captured] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Captured(args[0], kwargs.get("rope")))

    hook = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


class Positions:
    """A learned table of positions, resized from the original to each grid that is asked for."""

    def __init__(self, table: Tensor, grid: Grid) -> None:
        """Table (N, W): rows of other tokens first, then those of `grid`."""
        self._table, self._grid = table.detach(), grid
        # Whole test images come in a hundred shapes of some megabytes each.
        self.at = lru_cache(maxsize=16)(self._resized)

    def _resized(self, grid: Grid) -> nn.Parameter:
        """The table (N', W) for `grid`: bicubic, antialiased, as open_clip's `resize_pos_embed` does on loading."""
        others = len(self._table) - self._grid[0] * self._grid[1]
        resized = resample_abs_pos_embed(self._table[None], list(grid), list(self._grid), num_prefix_tokens=others)
        return nn.Parameter(resized[0], requires_grad=False)


class Tower(ABC):
    """An image tower as the dense tokens need it.

    Attributes:
        tap: the module whose input `dense` is computed from.
        stride: pixels along a side of a dense token.
        blocks: the modules before the tap that hold most of the work; the tap itself is not one.
    """

    tap: nn.Module
    stride: int
    blocks: Sequence[nn.Module]

    @abstractmethod
    def fit(self, grid: Grid) -> None:
        """Prepares the tower for images of `grid` times `stride` pixels."""

    @abstractmethod
    def dense(self, captured: Captured, grid: Grid) -> Tensor:
        """D (B, rows * columns, C), unnormalised."""


class OpenClipVit(Tower):
    """open_clip's own ViT: OpenAI, LAION, DataComp, MetaCLIP, CLIPA, CoCa."""

    def __init__(self, visual: Any, variant: str) -> None:
        self._visual, self._variant = visual, VARIANTS[variant]
        *self.blocks, self.tap = visual.transformer.resblocks
        self.stride = visual.patch_size[0]
        self._positions = Positions(visual.positional_embedding, visual.grid_size)

    def fit(self, grid: Grid) -> None:
        self._visual.positional_embedding = self._positions.at(grid)

    def dense(self, captured: Captured, grid: Grid) -> Tensor:
        tokens = self._variant(blocks.parts(self.tap, *captured, grid))[:, -grid[0] * grid[1] :]
        visual = self._visual
        if visual.attn_pool is not None:  # CoCa's: over one token, all of its queries find the same
            alone = visual.attn_pool.ln_k(tokens).flatten(0, 1)[:, None]
            query = visual.attn_pool.ln_q(visual.attn_pool.query[:1]).expand(len(alone), 1, -1)
            pooled = visual.attn_pool.attn(query, alone, alone, need_weights=False)[0]
            tokens = pooled.view(*tokens.shape[:2], -1)
        return visual.ln_post(tokens) @ visual.proj


class TimmVit(Tower):
    """A ViT of timm's: EVA (rotary embeddings), SigLIP (attention pooling, no class token), PE, MobileCLIP, ViTamin."""

    def __init__(self, visual: Any, variant: str) -> None:
        self._visual, self._variant = visual, VARIANTS[variant]
        trunk = self._trunk = visual.trunk
        *self.blocks, self.tap = trunk.blocks
        self.stride = trunk.patch_embed.feat_ratio()
        self._grid: Grid = trunk.patch_embed.grid_size
        self._positions = None if trunk.pos_embed is None else Positions(trunk.pos_embed[0], self._grid)

    def fit(self, grid: Grid) -> None:
        if grid == self._grid:
            return
        self._trunk.set_input_size(img_size=(grid[0] * self.stride, grid[1] * self.stride))
        if self._positions is not None:  # timm has resized the table of the grid before this one
            self._trunk.pos_embed = nn.Parameter(self._positions.at(grid)[None], requires_grad=False)
        self._grid = grid

    def dense(self, captured: Captured, grid: Grid) -> Tensor:
        trunk = self._trunk
        tokens = trunk.norm(self._variant(blocks.parts(self.tap, *captured, grid)))[:, -grid[0] * grid[1] :]
        # A sequence of nothing but that token: all poolings agree on it, wherever they look for class and patch tokens.
        alone = tokens.flatten(0, 1)[:, None].expand(-1, trunk.num_prefix_tokens + 1, -1)
        return self._visual.head(trunk.forward_head(alone)).unflatten(0, tokens.shape[:2])


class OpenClipResNet(Tower):
    """OpenAI's ResNets: D is MaskCLIP's (Zhou et al. 2022), the attention pool's values of each location."""

    stride = 32

    def __init__(self, visual: Any) -> None:
        self.tap = self._pool = visual.attnpool
        self.blocks = [visual.layer1, visual.layer2, visual.layer3, visual.layer4]
        side = round((len(visual.attnpool.positional_embedding) - 1) ** 0.5)
        self._positions = Positions(visual.attnpool.positional_embedding, (side, side))

    def fit(self, grid: Grid) -> None:
        self._pool.positional_embedding = self._positions.at(grid)

    def dense(self, captured: Captured, grid: Grid) -> Tensor:
        return self._pool.c_proj(self._pool.v_proj(captured.x.flatten(2).transpose(1, 2)))


class TimmConvNet(Tower):
    """A convolutional trunk of timm's: D is what pooling head and projection make of each location alone."""

    def __init__(self, visual: Any) -> None:
        self._visual = visual
        self.tap, self.stride = visual.trunk.head, visual.trunk.feature_info[-1]["reduction"]
        self.blocks = list(visual.trunk.stages)

    def fit(self, grid: Grid) -> None:
        """Convolutions take any size."""

    def dense(self, captured: Captured, grid: Grid) -> Tensor:
        batch, channels = captured.x.shape[:2]
        alone = captured.x.permute(0, 2, 3, 1).reshape(-1, channels, 1, 1)
        return self._visual.head(self.tap(alone)).unflatten(0, (batch, -1))


def tower_of(visual: Any, config: Teacher) -> Tower:
    """The tower that `visual`, the image side of an open_clip model, is.

    Raises:
        UserError: there is no way to its dense tokens, or not the one that teacher.dense asks for.
    """
    trunk = getattr(visual, "trunk", None)
    own_pool = isinstance(visual, TimmModel) and hasattr(visual.head, "pool")
    if isinstance(visual, VisionTransformer):
        if visual.pool_type != "none" and blocks.is_known(visual.transformer.resblocks[-1]):
            return OpenClipVit(visual, config.dense)
    elif isinstance(trunk, (TimmVisionTransformer, Eva)) and not own_pool:
        if blocks.is_known(trunk.blocks[-1]):
            return TimmVit(visual, config.dense)
    elif isinstance(visual, ModifiedResNet) or (isinstance(trunk, (ConvNeXt, FastVit)) and not own_pool):
        if config.dense != "plain":
            raise UserError(
                f"teacher.dense={config.dense} is for ViTs, and teacher.model {config.model} is convolutional: "
                "set teacher.dense=plain"
            )
        return OpenClipResNet(visual) if isinstance(visual, ModifiedResNet) else TimmConvNet(visual)
    raise UserError(
        f"teacher.model {config.model}: no way is known to the dense tokens of its image tower "
        f"({type(trunk or visual).__name__}): choose a ViT-*, EVA*, RN* or convnext_* model"
    )
