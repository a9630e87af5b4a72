"""Pictures for people: class and group colours, overlays, contact sheets. No step of the method uses them."""

import colorsys
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from pipeline.data.dataset import IGNORE

IGNORED_COLOUR = (40, 40, 40)
_NUMBER_HEIGHT, _NUMBER_LEAST = 0.07, 12  # of a picture's longer side; pixels
_GOLDEN = 0.61803398875
_NAME = 48  # letters of a name in a legend
_CELLS = 64  # along the longer side, when places for numbers are looked for


@cache
def palette(none: int = IGNORE) -> np.ndarray:
    """(none + 1, 3) uint8, read-only: neighbours in number are far apart in hue and lightness; `none` is dark grey."""
    colours = np.full((none + 1, 3), IGNORED_COLOUR, np.uint8)
    for index in range(none):
        hue, value = (index * _GOLDEN) % 1, (1.0, 0.75, 0.5)[index % 3]
        colours[index] = [round(255 * part) for part in colorsys.hsv_to_rgb(hue, (0.65, 0.9)[index % 2], value)]
    colours.flags.writeable = False
    return colours


def colourise(labels: np.ndarray) -> np.ndarray:
    """(H, W) labels, uint8 or uint16 -> (H, W, 3) uint8."""
    return np.asarray(palette(np.iinfo(labels.dtype).max)[labels])


def overlay(image: np.ndarray, labels: np.ndarray, strength: float = 0.65) -> np.ndarray:
    """Labels in colour over the image, and their numbers; ignored pixels are darkened.

    (H, W, 3), (H, W) -> (H, W, 3) uint8.
    """
    mixed = (1 - strength) * image + strength * colourise(labels)
    return numbered(mixed.round().astype(np.uint8), labels)


def numbered(picture: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Each patch's label as a number where it is thickest, if there is room: not every eye tells the colours apart.

    (H, W, 3), (H, W) -> (H, W, 3) uint8.
    """
    step, none = -(-max(labels.shape) // _CELLS), np.iinfo(labels.dtype).max
    cells = labels[::step, ::step].astype(np.int32)
    patches, room = Image.fromarray(cells).copy(), 2 * step * _depths(cells)  # floodfill needs memory of its own
    shown, size = Image.fromarray(picture), max(_NUMBER_LEAST, round(_NUMBER_HEIGHT * max(labels.shape)))
    draw, font = ImageDraw.Draw(shown), ImageFont.load_default(size)
    while (left := np.where(np.asarray(patches) == none, 0, room)).max() >= size:
        y, x = divmod(int(left.argmax()), patches.width)
        width = font.getlength(str(cells[y, x]))
        if room[y, x] >= 0.85 * width:  # a little may hang over
            middle = min(max((x + 0.5) * step, width / 2), shown.width - width / 2)  # not cut off by the edge
            _number(draw, int(cells[y, x]), (middle, (y + 0.5) * step), size)
        ImageDraw.floodfill(patches, (x, y), none)
    return np.asarray(shown)


def _depths(labels: np.ndarray) -> np.ndarray:
    """How far, in squares around it, each pixel is from another label or the edge, at least 1.

    (H, W) int32 -> (H, W) int.
    """
    least, most = (Image.fromarray(np.pad(labels, 1, constant_values=value)) for value in (-1, 2**16))
    depths = np.zeros((least.height, least.width), int)
    while (same := np.asarray(least) == np.asarray(most)).any():
        depths += same
        least, most = least.filter(ImageFilter.MinFilter(3)), most.filter(ImageFilter.MaxFilter(3))
    return depths[1:-1, 1:-1]


def _number(draw: ImageDraw.ImageDraw, number: int, centre: tuple[float, float], size: int) -> None:
    """White with a dark outline, to be read on any colour."""
    font = ImageFont.load_default(size)
    draw.text(centre, str(number), "white", font, "mm", stroke_width=size // 8, stroke_fill="black")


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], names: Sequence[str], side: int = 192
) -> Image.Image:
    """A table of pictures, the longest side of each `side`, with a title above each column, a name beside each row."""
    font = ImageFont.load_default(14)
    gap, top, left = 6, 26, 12 + max(int(font.getlength(name)) for name in names)
    shown = [[_fitted(Image.fromarray(picture), side) for picture in row] for row in rows]
    widths = [
        max(int(font.getlength(title)), *(picture.width for picture in column)) + gap
        for title, *column in zip(titles, *shown, strict=True)
    ]
    heights = [max(20, *(picture.height for picture in row)) + gap for row in shown]  # names want 20
    sheet = Image.new("RGB", (left + sum(widths), top + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((left + sum(widths[:column]), 5), title, "black", font)
    for line, (row, name) in enumerate(zip(shown, names, strict=True)):
        y = top + sum(heights[:line])
        draw.text((4, y + heights[line] // 2 - 13), name, "black", font)
        for column, picture in enumerate(row):
            sheet.paste(picture, (left + sum(widths[:column]), y))
    return sheet


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    """Its longest side is `side`; the pixels of a small one stay sharp."""
    scale = side / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    if scale < 1:
        picture.thumbnail((side, side))
        return picture
    return picture.resize(size, Image.Resampling.NEAREST)


def lit(image: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The image (H, W, 3), dark where the weights (h, w) are low; full light is the highest one."""
    light = Image.fromarray(np.asarray(weights / weights.max(), np.float32))
    light = light.resize((image.shape[1], image.shape[0]), Image.Resampling.BILINEAR)
    return np.asarray((image * (0.15 + 0.85 * np.asarray(light)[..., None])).round().astype(np.uint8))


def legend(names: Mapping[int, str], columns: int = 10, none: int = IGNORE) -> Image.Image:
    """A strip of colour swatches, each with its class index on it, and class names. `none`: that of no class."""
    font = ImageFont.load_default(14)
    names = {index: name if len(name) <= _NAME else f"{name[:_NAME]}…" for index, name in names.items()}
    width = 46 + max(int(font.getlength(name)) for name in names.values())
    lines = -(-len(names) // columns)
    strip = Image.new("RGB", (width * min(columns, len(names)) + 6, 24 * lines + 6), "white")
    draw = ImageDraw.Draw(strip)
    for place, (index, name) in enumerate(names.items()):
        x, y = 6 + width * (place % columns), 6 + 24 * (place // columns)
        draw.rectangle((x, y, x + 28, y + 16), fill=tuple(int(part) for part in palette(none)[index]))
        _number(draw, index, (x + 14.5, y + 8.5), 13 if index < 1000 else 9)
        draw.text((x + 34, y), name, "black", font)
    return strip


def stacked(parts: Sequence[Image.Image]) -> Image.Image:
    """Pictures below each other on white."""
    sheet = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    y = 0
    for part in parts:
        sheet.paste(part, (0, y))
        y += part.height
    return sheet
