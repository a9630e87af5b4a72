"""The paper in plain, slow NumPy (float64), written from the text alone to check the fast code against.

B images, C channels, (H, W) pixels, (G, G) teacher tokens; K seen classes. 255 marks "none" in uint8 maps, -1 in fused
labels.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[Any]
Pair = tuple[Array, Array]
NONE = 255  # no token, no group, no class (uint8 maps and masks)
NO_LABEL = -1  # no label (fused labels, where 255 may be a class)


def unit(rows: Array) -> Array:
    """(..., C) -> (..., C) of length 1 along the last axis; a zero vector stays zero."""
    rows = np.asarray(rows, dtype=np.float64)
    norm = np.sqrt((rows * rows).sum(axis=-1, keepdims=True))
    return rows / np.where(norm > 0, norm, 1.0)


def binary_cross_entropy(x: float, target: float) -> float:
    """-[t log sigmoid(x) + (1 - t) log(1 - sigmoid(x))], for a logit x of any size."""
    return max(x, 0.0) - x * target + math.log1p(math.exp(-abs(x)))


def glm_attention(features: Array, cls_token: Array) -> Pair:
    """Eq. 1-2. (B, C, H, W), (B, C) -> weights (B, H*W) = softmax(S . R / sqrt(C)), predicted (B, C) = W R^T."""
    batch, channels, height, width = features.shape
    weights = np.zeros((batch, height * width))
    predicted = np.zeros((batch, channels))
    for b in range(batch):
        dense = np.asarray(features[b], dtype=np.float64).reshape(channels, -1)  # (C, L)
        score = np.array([(cls_token[b] * dense[:, i]).sum() / math.sqrt(channels) for i in range(dense.shape[1])])
        weights[b] = np.exp(score - score.max()) / np.exp(score - score.max()).sum()
        predicted[b] = sum(weights[b, i] * dense[:, i] for i in range(dense.shape[1]))
    return weights, predicted


def glm_pool(features: Array, mode: str) -> Array:
    """Table 3. (B, C, H, W) -> (B, C), the "max" or the "mean" over the pixels."""
    features = np.asarray(features, dtype=np.float64)
    return np.asarray(features.max(axis=(2, 3)) if mode == "max" else features.mean(axis=(2, 3)))


def glm_selective(features: Array, cls_token: Array, count: int) -> Array:
    """Of arXiv 2506.22032. (B, C, H, W), (B, C) -> (B, C): mean of the `count` pixels of the largest cosine with S."""
    out = []
    for image, token in zip(np.asarray(features, dtype=np.float64), cls_token, strict=True):
        pixels = [image[:, y, x] for y, x in np.ndindex(image.shape[1:])]
        pixels.sort(key=lambda pixel: -float((unit(pixel) * unit(token)).sum()))
        out.append(np.mean(pixels[:count], axis=0))
    return np.array(out)


def info_nce(predicted: Array, cls_token: Array, bank: Array, tau: float, image_ids: Array, bank_ids: Array) -> float:
    """Eq. 3 with -log, cosines / tau. (B, C), (B, C), (M, C), ids (B,), (M,) -> mean; no negatives of one image."""
    predicted, cls_token, bank = unit(predicted), unit(cls_token), unit(bank)
    others, losses = [*zip(cls_token, image_ids, strict=True), *zip(bank, bank_ids, strict=True)], []
    for i in range(len(predicted)):
        positive = (predicted[i] * cls_token[i]).sum() / tau
        scores = [positive] + [(predicted[i] * token).sum() / tau for token, image in others if image != image_ids[i]]
        top = max(scores)
        losses.append(top + math.log(sum(math.exp(s - top) for s in scores)) - positive)
    return float(np.mean(losses)) if losses else 0.0


def unannotated_tokens(mask: Array, grid: int, shown: Array | None = None) -> Array:
    """(H, W) with 255 ignored -> (G, G) bool: over half of the pixels of the token's H/G x W/G block are ignored.

    `shown` (H, W) is False at padding, which has no class either but is nothing to discover.
    """
    step_y, step_x = mask.shape[0] // grid, mask.shape[1] // grid
    out = np.zeros((grid, grid), dtype=bool)
    for y, x in np.ndindex(grid, grid):
        ignored = 0
        for row in range(y * step_y, (y + 1) * step_y):
            for column in range(x * step_x, (x + 1) * step_x):
                ignored += mask[row, column] == NONE and (shown is None or bool(shown[row, column]))
        out[y, x] = 2 * ignored > step_y * step_x
    return out


def window_seeds(tokens: Array, unannotated: Array, windows: Sequence[int] = (7, 3), everything: bool = False) -> Array:
    """Eq. 4. (G, G, C) unit tokens, (G, G) bool -> (n, C): the unannotated tokens' mean per window, stride window + 1.

    With `everything` all the window's tokens are averaged, as the equation is printed; a window still needs an
    unannotated one.

    When no window holds an unannotated token although some token is one (in a strip between windows), the overall mean
    of the unannotated tokens is the one seed.
    """
    grid, seeds = tokens.shape[0], []
    for window in windows:
        size = min(window, grid)
        starts = range(0, grid - size + 1, window + 1)
        for top in starts:
            for left in starts:
                under = [(y, x) for y in range(top, top + size) for x in range(left, left + size)]
                free = [cell for cell in under if unannotated[cell]]
                cells = under if everything else free
                if free:
                    seeds.append(np.mean([tokens[y, x] for y, x in cells], axis=0, dtype=np.float64))
    if len(seeds) == 0 and unannotated.any():
        seeds.append(np.mean([tokens[y, x] for y, x in np.argwhere(unannotated)], axis=0, dtype=np.float64))
    return np.array(seeds, dtype=np.float64).reshape(-1, tokens.shape[-1])


def nearest(tokens: Array, centroids: Array) -> Array:
    """(n, C), (k, C) -> index (n,) of the largest inner product; those within 1e-12 are equal: the smallest index."""
    similarity = np.array([(centroids * token).sum(axis=1) for token in tokens])
    return np.array([np.flatnonzero(row >= row.max() - 1e-12)[0] for row in similarity])


def kmeans(tokens: Array, seeds: Array, iterations: int) -> Pair:
    """Section 3.3. Unit tokens (n, C), seeds (k, C) -> labels (n,), centroids (k, C), spherical.

    A cluster that runs empty keeps its centroid. With no more tokens than seeds each is a cluster, and they are the
    centroids. Means that cancel out (1e-9) are zero.
    """
    tokens = np.asarray(tokens, dtype=np.float64)
    n, k = len(tokens), len(seeds)
    if n <= k:
        return np.arange(n), unit(tokens)
    centroids = unit(seeds)
    for _ in range(iterations):
        labels = nearest(tokens, centroids)
        for cluster in set(labels.tolist()):
            total = tokens[labels == cluster].sum(axis=0)
            centroids[cluster] = unit(total) if np.sqrt((total**2).sum()) >= 1e-9 else 0
    return nearest(tokens, centroids), centroids


def adjusted_rand(one: Array, other: Array) -> float:
    """Adjusted Rand index of two labellings (n,) of the same tokens: 1 if they pair the same tokens, 0 as by chance."""
    pairs = np.triu_indices(len(one), 1)
    together, with_ = (np.equal.outer(labels, labels)[pairs] for labels in (one, other))
    chance, most = together.sum() * with_.mean(), (together.sum() + with_.sum()) / 2
    return 1.0 if most == chance else float(((together & with_).sum() - chance) / (most - chance))


def fuse(centroids: Array, sizes: Array, threshold: float) -> Array:
    """Section 3.3, mask fusion. (k, C), (k,) -> groups (k,), numbered by smallest member; -1 for an empty cluster."""
    centroids, k = unit(centroids), len(centroids)
    free = {i for i in range(k) if sizes[i] > 0}
    cosine = [[round(float((centroids[i] * centroids[j]).sum()), 12) for j in range(k)] for i in range(k)]
    members = []
    while len(free) > 1:
        pairs = [(i, j) for i in sorted(free) for j in sorted(free) if i != j]
        row, column = max(pairs, key=lambda pair: cosine[pair[0]][pair[1]])  # the first of equals: smallest row
        if not cosine[row][column] > threshold:
            break
        members.append([row] + [j for j in sorted(free) if j != row and cosine[row][j] > threshold])
        free -= set(members[-1])
    members += [[i] for i in free]
    groups = np.full(k, -1, dtype=np.int64)
    for number, group in enumerate(sorted(members, key=min)):
        groups[group] = number
    return groups


def pseudo_labels(
    dense: Array, unannotated: Array, windows: Sequence[int], iterations: int, threshold: float,
    everything: bool = False, per_scale: bool = False,
) -> Pair:  # fmt: skip
    """Section 3.3. (G, G, C), (G, G) bool -> K-means labels, fused groups, both (G, G) uint8, 255 where annotated.

    `per_scale`: each window size has a K-means of its own, and a token the nearest (1e-12) of the clusters it is in.
    """
    tokens = unit(dense)
    clusters = np.full(unannotated.shape, NONE, dtype=np.uint8)
    groups = clusters.copy()
    scales = [
        window_seeds(tokens, unannotated, some, everything)
        for some in ([[w] for w in windows] if per_scale else [windows])
    ]
    if len(scales[0]) == 0:  # no unannotated token: nothing to cluster
        return clusters, groups
    if sum(map(len, scales)) > NONE:
        raise ValueError("so many seeds do not fit in uint8 labels")
    cells = [(int(y), int(x)) for y, x in np.argwhere(unannotated)]
    free = np.array([tokens[cell] for cell in cells])
    found = [kmeans(free, seeds, iterations) for seeds in scales]
    centroids = np.concatenate([own for _, own in found])
    labels = np.zeros(len(free), dtype=np.int64)
    for i, token in enumerate(free):
        start, best = 0, -math.inf
        for of_scale, own in found:
            near = float((token * own[of_scale[i]]).sum())
            if near > best + 1e-12:
                labels[i], best = start + of_scale[i], near
            start += len(own)
    group_of = fuse(centroids, np.bincount(labels, minlength=len(centroids)), threshold)
    for cell, label in zip(cells, labels, strict=True):
        clusters[cell], groups[cell] = label, group_of[label]
    return clusters, groups


def region_tokens(dense: Array, groups: Array, most: int) -> Array:
    """(B, G, G, C), (B, G, G), 255 none -> (B, most, C) int8: of each group the direction of its unit tokens' mean m.

    That is round(127 m / max |m|); 0 for an absent group, and where the unit tokens' sum is shorter than 1e-9.
    """
    out = np.zeros((len(dense), most, dense.shape[-1]), dtype=np.int8)
    for b, group in np.ndindex(len(dense), most):
        total = np.zeros(dense.shape[-1])
        for y, x in np.ndindex(groups.shape[1:]):
            if groups[b, y, x] == group != NONE:
                total += unit(dense[b, y, x])
        if math.sqrt((total * total).sum()) >= 1e-9:
            out[b, group] = np.rint(127 * total / np.abs(total).max())
    return out


def fused_labels(seen: Array, groups: Array, num_seen: int) -> tuple[Array, int]:
    """Section 3.3, F. (B, H, W), 255 ignored, (B, G, G), 255 none -> labels (B, H, W), -1 for none, and their count."""
    batch, height, width = seen.shape
    grid, count = groups.shape[1], num_seen
    labels = np.full(seen.shape, NO_LABEL, dtype=np.int64)
    for b in range(batch):
        for y, x in np.ndindex(height, width):
            group = int(groups[b, y * grid // height, x * grid // width])
            if seen[b, y, x] != NONE:
                labels[b, y, x] = seen[b, y, x]
            elif group != NONE:
                labels[b, y, x] = count + group
        count += max((int(g) + 1 for g in groups[b].ravel() if g != NONE), default=0)
    return labels, count


def at_stride(labels: Array, size: tuple[int, int]) -> Array:
    """Eq. 5, "F brought to R". (B, H, W) -> (B, h, w): the label of the pixel under each cell's centre."""
    (height, width), (rows, columns) = labels.shape[1:], size
    out = np.zeros((len(labels), rows, columns), dtype=labels.dtype)
    for y, x in np.ndindex(size):
        out[:, y, x] = labels[:, (2 * y + 1) * height // (2 * rows), (2 * x + 1) * width // (2 * columns)]
    return out


def bilinear(maps: Array, size: tuple[int, int]) -> Array:
    """(B, N, h, w) -> (B, N, H, W): bilinear between the cells' centres, constant beyond the outermost."""
    maps = np.asarray(maps, dtype=np.float64)
    for axis, wanted in ((2, size[0]), (3, size[1])):
        cells = maps.shape[axis]
        place = np.clip([(i + 0.5) * cells / wanted - 0.5 for i in range(wanted)], 0, cells - 1)
        below = np.floor(place).astype(int)
        share = (place - below).reshape((-1, 1) if axis == 2 else (-1,))
        above = np.minimum(below + 1, cells - 1)
        maps = maps.take(below, axis) * (1 - share) + maps.take(above, axis) * share
    return maps


def class_centroids(features: Array, labels: Array, count: int) -> Pair:
    """Eq. 5. (B, C, H, W), (B, H, W) with -1 none -> mean feature of each label (count, C), present (count,) bool."""
    total, pixels = np.zeros((count, features.shape[1])), np.zeros(count)
    for b, y, x in np.ndindex(labels.shape):
        if labels[b, y, x] != NO_LABEL:
            total[labels[b, y, x]] += features[b, :, y, x]
            pixels[labels[b, y, x]] += 1
    return total / np.maximum(pixels, 1)[:, None], pixels > 0


def bce(prototypes: Array, classes: Array, text_seen: Array) -> float:
    """Eq. 6. (P, C), (P,), (K, C) -> mean over the P K pairs; target 1 where j == classes[i], else 0; 0 for no pair."""
    losses = []
    for prototype, own in zip(np.asarray(prototypes, dtype=np.float64), classes, strict=True):
        for j, text in enumerate(text_seen):
            losses.append(binary_cross_entropy(float((prototype * text).sum()), float(j == own)))
    return float(np.mean(losses)) if losses else 0.0


def classify(features: Array, text_seen: Array, prototypes: Array, alpha: float, beta: float) -> Array:
    """Eq. 7. (B, C, H, W), (K, C), (P, C) -> (B, K + P, H, W): alpha R . T_seen, then beta cos(R, P_pseudo)."""
    batch, _, height, width = features.shape
    out = np.zeros((batch, len(text_seen) + len(prototypes), height, width))
    directions = unit(prototypes)
    for b, y, x in np.ndindex(batch, height, width):
        pixel = np.asarray(features[b, :, y, x], dtype=np.float64)
        seen = [alpha * (pixel * text).sum() for text in text_seen]
        out[b, :, y, x] = seen + [beta * (unit(pixel) * direction).sum() for direction in directions]
    return out


def region_loss(centroids: Array, tokens: Array, tau: float) -> float:
    """Local distillation. (P, C), (P, C) -> Eq. 3 with -log, a mean over the regions whose token is not zero."""
    told = [i for i, token in enumerate(tokens) if any(value != 0 for value in token)]
    losses = []
    for i in told:
        scores = [float((unit(centroids[i]) * unit(tokens[j])).sum()) / tau for j in told]
        total = sum(math.exp(score - max(scores)) for score in scores)
        losses.append(max(scores) + math.log(total) - scores[told.index(i)])
    return float(np.mean(losses)) if losses else 0.0


def cross_entropy(logits: Array, labels: Array) -> float:
    """Eq. 8, CE. (B, N, H, W), (B, H, W) with -1 none -> mean over the labelled pixels, 0 when there is none."""
    losses = []
    for b, y, x in np.ndindex(labels.shape):
        if labels[b, y, x] != NO_LABEL:
            score = np.asarray(logits[b, :, y, x], dtype=np.float64)
            losses.append(score.max() + math.log(np.exp(score - score.max()).sum()) - score[labels[b, y, x]])
    return float(np.mean(losses)) if losses else 0.0


def nel(logits: Array, labels: Array) -> float:
    """Eq. 8, NEL. (B, N, H, W), (B, H, W), -1 negative for all -> (100 focal + dice) / (image, class) pairs present."""
    focal, dice, present = 0.0, 0.0, 0
    for b, n in np.ndindex(logits.shape[:2]):
        loss, inter, total, positives, pixels = 0.0, 0.0, 0.0, 0, 0
        for y, x in np.ndindex(logits.shape[2:]):
            logit, target = float(logits[b, n, y, x]), int(labels[b, y, x] == n)
            p = 0.5 * (1 + math.tanh(logit / 2))  # sigmoid
            miss, weight = (1 - p, 0.25) if target else (p, 0.75)
            loss += weight * miss**2 * binary_cross_entropy(logit, target)
            inter, total, positives, pixels = inter + p * target, total + p, positives + target, pixels + 1
        focal += loss / max(pixels, 1)
        if positives:  # dice runs over the classes in the image only
            dice += 1 - (2 * inter + 1) / (total + positives + 1)
            present += 1
    return (100 * focal + dice) / max(present, 1)


def short_side_size(height: int, width: int, size: int) -> tuple[int, int]:
    """The (height, width) with the short side `size` and the long one in proportion, to the nearest (halves up).

    Of strips beyond 8 : 1 the long side is 8 x `size`, and the short one in proportion.
    """
    short, long = min(height, width), max(height, width)
    other = (2 * long * size + short) // (2 * short)
    if long > 8 * short:
        size, other = max((2 * short * 8 * size + long) // (2 * long), 1), 8 * size
    return (size, other) if height <= width else (other, size)


def window_spans(length: int, side: int, stride: int) -> list[tuple[int, int]]:
    """(start, end) of max(ceil((length - side) / stride), 0) + 1 windows; one beyond the border is pushed back."""
    spans = []
    for number in range(max(math.ceil((length - side) / stride), 0) + 1):
        end = min(number * stride + side, length)
        spans.append((max(end - side, 0), end))
    return spans


def window_logits(features: Array, text: Array, size: tuple[int, int], factor: int = 4) -> Array:
    """R (C, h, w), T (K, C) -> (K, H, W): each pixel's R . T, `factor` times as large, cropped to a window's size."""
    channels, height, width = features.shape
    logits = np.zeros((len(text), height, width))
    for k, c in np.ndindex(len(text), channels):
        logits[k] += features[c].astype(np.float64) * float(text[k, c])
    return np.asarray(bilinear(logits[None], (factor * height, factor * width))[0, :, : size[0], : size[1]])


def image_logits(image: Array, dense: Callable[[Array], Array], text: Array, side: int, stride: int | None) -> Array:
    """(H, W, 3) resized -> (K, H, W): the mean over the windows that hold a pixel; with no stride, one pass.

    `dense` takes a window's pixels, (h, w, 3), to its features (C, ceil(h / 4), ceil(w / 4)).
    """
    height, width = image.shape[:2]
    rows = window_spans(height, side, stride) if stride else [(0, height)]
    columns = window_spans(width, side, stride) if stride else [(0, width)]
    total, count = np.zeros((len(text), height, width)), np.zeros((height, width))
    for top, bottom in rows:
        for left, right in columns:
            size = (bottom - top, right - left)
            total[:, top:bottom, left:right] += window_logits(dense(image[top:bottom, left:right]), text, size)
            count[top:bottom, left:right] += 1
    return np.asarray(total / count)


def evaluate(
    pairs: Sequence[Pair],
    dense: Callable[[Array], Array],
    text: Array,
    seen: Sequence[int],
    gammas: Sequence[float],
    side: int,
    stride: int | None,
    class_of: Sequence[int] | None = None,
) -> Array:
    """Images (H, W, 3) and their masks (H, W) -> the confusion counts at each gamma, (gammas, K, K).

    `class_of` is the class of each row of `text`: a class has the highest logit of its rows.
    """
    class_of = list(range(len(text)) if class_of is None else class_of)
    classes = max(class_of) + 1
    out = np.zeros((len(gammas), classes, classes), dtype=np.int64)
    for image, mask in pairs:
        height, width = short_side_size(*image.shape[:2], side)
        resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
        channels = bilinear(image_logits(resized, dense, text, side, stride)[None], mask.shape)[0]
        logits = np.full((classes, *mask.shape), -np.inf)
        for channel, its_class in zip(channels, class_of, strict=True):
            logits[its_class] = np.maximum(logits[its_class], channel)
        for row, gamma in enumerate(gammas):
            out[row] += confusion(mask, calibrated_argmax(logits, seen, gamma), classes)
    return out


def calibrated_argmax(logits: Array, seen: Sequence[int], gamma: float) -> Array:
    """Calibrated stacking. (N, H, W), seen channels -> (H, W): argmax once gamma is off the seen (ties: smallest)."""
    logits = np.array(logits, dtype=np.float64)
    for channel in seen:
        logits[channel] -= gamma
    return np.asarray(logits.argmax(axis=0))


def confusion(truth: Array, prediction: Array, num_classes: int, ignore: int = NONE) -> Array:
    """Two equal shapes -> (K, K) int64 counts, rows the truth, columns the prediction; ignored truth is left out."""
    out = np.zeros((num_classes, num_classes), dtype=np.int64)
    for t, p in zip(np.ravel(truth), np.ravel(prediction), strict=True):
        if t != ignore:
            out[t, p] += 1
    return out


def scores(matrix: Array, seen: Sequence[int], unseen: Sequence[int]) -> dict[str, Any]:
    """Eq. 9. (K, K) -> pAcc, mIoU, mIoU_seen, mIoU_unseen, hIoU as fractions, IoU (K,); nan where no pixel is."""
    iou = []
    for k in range(len(matrix)):
        union = matrix[k, :].sum() + matrix[:, k].sum() - matrix[k, k]
        iou.append(float(matrix[k, k] / union) if union else math.nan)
    means = []
    for classes in (seen, unseen, range(len(matrix))):
        known = [iou[k] for k in classes if not math.isnan(iou[k])]
        means.append(sum(known) / len(known) if matrix[list(classes)].sum() else math.nan)
    s, u, every = means
    harmonic = 0.0 if s + u == 0 else 2 * s * u / (s + u)
    accuracy = float(np.trace(matrix) / matrix.sum()) if matrix.sum() else math.nan
    return {"pAcc": accuracy, "mIoU": every, "mIoU_seen": s, "mIoU_unseen": u, "hIoU": harmonic, "IoU": np.array(iou)}


def purity(groups: Array, truth: Array) -> float:
    """(G, G) uint8 and (G, G), 255 none -> share of tokens in their group's commonest class; nan if no token."""
    classes: dict[int, list[int]] = {}
    for group, true in zip(np.ravel(groups), np.ravel(truth), strict=True):
        if group != NONE and true != NONE:
            classes.setdefault(int(group), []).append(int(true))
    tokens = sum(len(found) for found in classes.values())
    return sum(max(found.count(c) for c in found) for found in classes.values()) / tokens if tokens else math.nan
