"""Image towers: how each kind computes dense tokens and handles images of any size.

The unmodified model computes S. In the same pass, the input of one of its modules (the `tap`) is captured, and D is
computed from it: the embedding of a token is the tower's pooling head applied to that token alone.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from configs.errors import UserError, reason
from configs.schema import Teacher
from pipeline.teacher import blocks
from pipeline.teacher.dense import VARIANTS

Grid = tuple[int, int]  # rows and columns of dense tokens


class Captured(NamedTuple):
    """The call of a tap: its input, and timm's rotary embedding where one is passed along."""

    x: Tensor
    rope: Tensor | None


@contextmanager
def capture(module: nn.Module, method: str) -> Iterator[list[Captured]]:
    """Within it, each call of the module's `method` adds what it was called with to the list.

    torch's hooks see `forward` alone.
    """
    calls: list[Captured] = []
    original = getattr(module, method)

    def keep(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(Captured(x, kwargs.get("rope")))
        return original(x, *args, **kwargs)

    setattr(module, method, keep)  # on the instance: before the class's
    try:
        yield calls
    finally:
        delattr(module, method)


class Positions:
    """Learned position embeddings, resized from the original table to any grid."""

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
        tap, method: the module, and its method, whose input `dense` is computed from.
        stride: pixels along a side of a dense token.
        blocks: the modules before the tap that hold most of the work; the tap itself is not one.
    """

    tap: nn.Module
    method = "forward"
    stride: int
    blocks: Sequence[nn.Module]

    @abstractmethod
    def fit(self, grid: Grid) -> None:
        """Prepares the tower for images of `grid` times `stride` pixels. UserError if it does not accept this size."""

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
    """A timm ViT: EVA (rotary embeddings), SigLIP (attention pooling, no class token), PE, MobileCLIP, ViTamin."""

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


class MapSizes:
    """Which maps a timm tower makes of images of which sizes. Shapes alone are computed."""

    def __init__(self, visual: Any) -> None:
        on_meta = {id(tensor): tensor.to("meta") for tensor in (*visual.parameters(), *visual.buffers())}
        self._visual = copy.deepcopy(visual, on_meta)  # everything but the weights
        self.at = lru_cache(maxsize=1024)(self._at)

    def _at(self, height: int, width: int) -> Grid | None:
        """Rows and columns; None if what the trunk makes is no map. Any exception, if it does not take this size."""
        with torch.no_grad(), capture(self._visual.trunk, TimmMap.method) as calls:
            self._visual(torch.empty(1, 3, height, width, device="meta"))
        features = calls[0].x if calls else None
        if not isinstance(features, Tensor) or features.ndim != 4:
            return None
        first = 1 if channels_last(self._visual.trunk) else 2
        return features.shape[first], features.shape[first + 1]


class TimmMap(Tower):
    """A timm trunk with a feature map: D is the pooling head and projection applied to each location separately.

    Convolutional trunks, and those transformers that keep rows and columns, such as Swin.
    """

    method = "forward_head"  # heads are built in many ways, but this is where each begins

    def __init__(self, visual: Any, name: str, sizes: MapSizes, own_map: Grid) -> None:
        """`own_map` is that of an image of its own size; `name` is what the user calls the model."""
        self._visual, self._name, self._sizes = visual, name, sizes
        trunk = self.tap = visual.trunk
        self.blocks = stages(trunk)
        self.stride, self._lost = trunk.feature_info[-1]["reduction"], 0
        try:
            many = sizes.at(12 * self.stride, 12 * self.stride)
        except Exception:  # it takes its own size only
            many = None
        if many == (10, 10):  # Inception does not pad: it has no places at the border
            self._lost = 2
        elif many != (12, 12):  # what it says of itself may be wrong
            self.stride = own_size(trunk)[0] // own_map[0]

    def fit(self, grid: Grid) -> None:
        """Convolutions take any size, but not all trunks are of convolutions alone."""
        size = grid[0] * self.stride, grid[1] * self.stride
        try:
            found, why = self._sizes.at(*size), "its map has other rows or columns"
        except Exception as error:  # each trunk refuses sizes in its own way
            found, why = None, reason(error)
        if found != (grid[0] - self._lost, grid[1] - self._lost):
            own = own_size(self.tap)
            raise UserError(
                f"teacher.model {self._name}: its image tower ({type(self.tap).__name__}) does not accept images of "
                f"{size[0]} x {size[1]} pixels ({why}); its default size is {own[0]} x {own[1]}"
            )

    def dense(self, captured: Captured, grid: Grid) -> Tensor:
        features = captured.x.permute(0, 3, 1, 2) if channels_last(self.tap) else captured.x
        if self._lost:  # the nearest place there is
            features = nn.functional.pad(features, (self._lost // 2,) * 4, mode="replicate")
        alone = features.permute(0, 2, 3, 1).flatten(0, 2)
        alone = alone[:, None, None] if channels_last(self.tap) else alone[:, :, None, None]
        return self._visual.head(self._visual.trunk.forward_head(alone)).unflatten(0, (len(features), -1))


def channels_last(trunk: Any) -> bool:
    """Whether its maps are (B, rows, columns, C)."""
    return getattr(trunk, "output_fmt", "NCHW") == "NHWC"


def own_size(trunk: Any) -> Grid:
    """Height and width of the images that a timm trunk was made for, whatever the size that open_clip's config says."""
    _, height, width = trunk.default_cfg["input_size"]
    return height, width


def stages(trunk: nn.Module) -> list[nn.Module]:
    """Its stages or blocks; nothing where they go by other names, for they only make torch.compile useful."""
    parts = dict(trunk.named_children())
    for name in ("stages", "blocks", "layers"):
        if name in parts:
            return list(parts[name].children())
    return [parts[name] for name in ("layer1", "layer2", "layer3", "layer4") if name in parts]


def tower_of(visual: Any, config: Teacher) -> Tower:
    """The tower that `visual`, the image side of an open_clip model, is.

    Raises:
        UserError: its dense tokens are not supported, or not with this teacher.dense.
    """
    trunk, kind = getattr(visual, "trunk", None), type(getattr(visual, "trunk", visual)).__name__
    mapped: Tower | None = None
    if isinstance(visual, VisionTransformer):
        if visual.pool_type != "none" and blocks.is_known(visual.transformer.resblocks[-1]):
            return OpenClipVit(visual, config.dense)
    elif isinstance(trunk, (TimmVisionTransformer, Eva)):
        if blocks.is_known(trunk.blocks[-1]):
            return TimmVit(visual, config.dense)
    elif isinstance(visual, ModifiedResNet):
        mapped = OpenClipResNet(visual)
    elif isinstance(visual, TimmModel):
        sizes, own = MapSizes(visual), own_size(trunk)
        try:
            own_map = sizes.at(*own)
        except Exception as error:  # open_clip builds towers that cannot run
            raise UserError(
                f"teacher.model {config.model}: its image tower ({kind}) cannot embed an image of its default size, "
                f"{own[0]} x {own[1]} ({reason(error)}): a trunk whose head widens its features needs timm_proj null"
            ) from error
        mapped = TimmMap(visual, config.model, sizes, own_map) if own_map else None
    if mapped is None:
        raise UserError(
            f"teacher.model {config.model}: dense tokens are not supported for its image tower ({kind}): choose a "
            "ViT-*, EVA*, RN* or convnext_* model"
        )
    if config.dense != "plain":
        raise UserError(
            f"teacher.dense={config.dense} is for ViTs, and the image tower of teacher.model {config.model} is not one "
            f"({kind}): set teacher.dense=plain"
        )
    return mapped
