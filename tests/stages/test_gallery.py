"""The gallery of pseudo labels, in a real browser: it fuses as Python does, filters, escapes, and works by keyboard."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cache.reader import open_cache
from configs.load import resolve
from pipeline.data.dataset import IGNORE
from pipeline.metrics import purity
from pipeline.pseudo_labels.fusion import fuse, similarities
from stages.gallery.collect import View, find_regions
from stages.gallery.write import hidden_classes_found, write_gallery
from stages.inspect import describe
from tests import reference
from tests.conftest import World
from tests.stages.browser import CHROMIUM, Browser, chromium

VIEWS, WIDTH, THRESHOLD = 50, 6, 0.8
ODD_IDS = ['a <b> & "c"', "</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\u2028 \udc80", "é/ß"]
NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH: the page cannot be opened")


def draw_tokens(rng: np.random.Generator, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (G, G, C) and K-means labels (G, G) with gaps in their numbers; some views are degenerate."""
    grid = int(rng.choice([4, 8, 12]))
    k = int(rng.integers(2, 40))
    clusters = rng.choice(255, k, replace=False)[rng.integers(0, k, (grid, grid))].astype(np.uint8)
    clusters[rng.random((grid, grid)) < 0.3] = IGNORE
    centres = rng.normal(size=(5, WIDTH))[rng.integers(0, 5, 255)] + 0.4 * rng.normal(size=(255, WIDTH))
    if number % 5 == 1:  # equal similarities: the order of merging is decided by ties
        centres = rng.integers(-1, 2, (255, WIDTH)).astype(float)
    tokens = centres[np.minimum(clusters, 254)]
    if number % 5 == 2:
        tokens += 0.3 * rng.normal(size=tokens.shape)
    if number == 3:
        clusters[:] = IGNORE
    if number == 4:
        clusters[:] = 7
    if number == 5:
        tokens[:] = 0
    return tokens.astype(np.float32), clusters


def reference_centroids(tokens: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """(k, C), of the labels that occur, ascending."""
    found = []
    for label in sorted({*clusters.ravel().tolist()} - {IGNORE}):
        total = np.zeros(WIDTH)
        for token in tokens[clusters == label]:
            total += (token / (np.sqrt((token.astype(float) ** 2).sum()) or 1)).astype(np.float32)
        length = np.sqrt((total**2).sum())
        found.append(total / length if length > 1e-9 else np.zeros(WIDTH))
    return np.array(found).reshape(-1, WIDTH)


def expand(clusters: np.ndarray, group_of: np.ndarray) -> np.ndarray:
    """Groups (G, G) of the tokens."""
    groups = np.full(clusters.shape, IGNORE, np.uint8)
    for label, group in zip(sorted({*clusters.ravel().tolist()} - {IGNORE}), group_of, strict=True):
        groups[clusters == label] = group
    return groups


class Made:
    """Random views, what they are made of, and the gallery of them."""

    def __init__(self, folder: Path, with_tokens: bool = True, views: int = VIEWS) -> None:
        self.config = resolve("scenes").model_copy(deep=True)
        self.hidden = [self.config.dataset.classes.index(name) for name in self.config.dataset.unseen]
        rng = np.random.default_rng(0)
        self.text = rng.normal(size=(len(self.config.dataset.classes), WIDTH))
        self.text = (self.text / np.linalg.norm(self.text, axis=1, keepdims=True)).astype(np.float32)
        self.tokens, self.clusters, self.views = [], [], list[View]()
        for number in range(views):
            tokens, clusters = draw_tokens(rng, number)
            grid = len(clusters)
            groups = self.fused(tokens, clusters, THRESHOLD)
            truth = rng.integers(0, len(self.text), 3)[rng.integers(0, 3, clusters.shape)].astype(np.uint8)
            truth[rng.random(clusters.shape) < 0.2] = IGNORE
            picture = rng.integers(0, 256, (grid * 4, grid * 4, 3), dtype=np.uint8)
            image_id = ODD_IDS[number] if number < len(ODD_IDS) else f"image-{number}"
            self.tokens.append(tokens)
            self.clusters.append(clusters)
            self.views.append(
                View(
                    row=describe(image_id, 0, clusters, groups, truth),
                    picture=picture,
                    mask=truth.repeat(4, axis=0).repeat(4, axis=1),
                    truth=truth,
                    clusters=clusters,
                    groups=groups,
                    regions=find_regions(tokens, clusters, groups, self.text, THRESHOLD) if with_tokens else None,
                )
            )
        self.page = write_gallery(self.config, "caches/<i>odd</i>", self.views, folder)

    @staticmethod
    def fused(tokens: np.ndarray, clusters: np.ndarray, threshold: float) -> np.ndarray:
        centroids = reference_centroids(tokens, clusters)
        return expand(clusters, reference.fuse(centroids, np.ones(len(centroids)), threshold))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("gallery") / "a #1 %20 <folder>")


@pytest.fixture
def page(browser: Browser, made: Made) -> Iterator[Browser]:
    """The gallery, just opened. Nothing may go wrong in it, and nothing outside its folder be asked for."""
    browser.errors.clear()
    browser.requests.clear()
    browser.open(made.page)
    yield browser
    assert not browser.errors
    outside = [url for url in browser.requests if not url.startswith(made.page.parent.as_uri())]
    assert not outside


def set_to(page: Browser, control: str, value: str | float) -> None:
    """As a user who moves the slider, types or picks."""
    page.run(
        f"(() => {{ const control = document.getElementById('{control}'); control.value = {json.dumps(str(value))};"
        "control.dispatchEvent(new Event('input', { bubbles: true })); })()"
    )


def shown_ids(page: Browser) -> list[str]:
    return page.run("[...document.querySelectorAll('article h2')].map((title) => title.firstChild.textContent)")


def all_groups(page: Browser) -> list[list[int]]:
    """The groups of every view, once all are loaded and fused."""
    page.until(f"[...Array({VIEWS}).keys()].every((number) => gallery.groups(number))")
    page.until("!document.getElementById('count').textContent.includes('fusing')")
    return page.run(f"[...Array({VIEWS}).keys()].map((number) => gallery.groups(number))")


@NEEDS_CHROMIUM
def test_the_slider_fuses_as_python_does(page: Browser, made: Made) -> None:
    assert sum(view.regions.same for view in made.views if view.regions) == VIEWS
    for threshold in (0.0, 0.35, 0.79, 0.97, 1.0):
        set_to(page, "slider", threshold)
        for number, groups in enumerate(all_groups(page)):
            expected = made.fused(made.tokens[number], made.clusters[number], threshold)
            np.testing.assert_array_equal(groups, expected.ravel(), err_msg=f"view {number} at {threshold}")
    page.run("document.getElementById('as-cached').click()")
    for view, groups in zip(made.views, all_groups(page), strict=True):
        np.testing.assert_array_equal(groups, view.groups.ravel())


@NEEDS_CHROMIUM
def test_a_lambda_equal_to_a_similarity_separates(page: Browser, made: Made) -> None:
    """Fusion takes what is above lambda: all digits of the similarities must have come to the page."""
    for number in (0, 1, 6, 11):
        centroids = reference_centroids(made.tokens[number], made.clusters[number])
        values = np.unique(similarities(centroids))
        threshold = float(values[len(values) // 2])
        set_to(page, "lambda", repr(threshold))
        for lowered in (threshold, float(np.nextafter(threshold, -2))):
            set_to(page, "lambda", repr(lowered))
            expected = expand(made.clusters[number], fuse(centroids, np.ones(len(centroids)), lowered))
            page.until(f"gallery.groups({number})")
            np.testing.assert_array_equal(page.run(f"gallery.groups({number})"), expected.ravel())


@NEEDS_CHROMIUM
def test_counts_purity_and_hidden_classes_follow_lambda(page: Browser, made: Made) -> None:
    set_to(page, "slider", 0.5)
    fused = [np.reshape(groups, made.clusters[i].shape) for i, groups in enumerate(all_groups(page))]
    page.until("!document.getElementById('count').textContent.includes('fusing')")
    texts = page.run("[...document.querySelectorAll('article small')].map((small) => small.textContent)")
    changed = 0
    totals = {label: np.zeros(2, int) for label in made.hidden}
    for view, groups, text in zip(made.views, fused, texts, strict=True):
        count = len(set(groups[groups != IGNORE].tolist()))
        changed += f"(cache: {view.row.groups})" in text
        assert (f"(cache: {view.row.groups})" in text) == (count != view.row.groups)
        assert re.search(rf"\b{count} groups?\b", text)
        pure = purity(groups, view.truth)
        assert text.endswith("no purity") == np.isnan(pure)
        if not np.isnan(pure):
            assert float(text.rpartition(" ")[2]) == pytest.approx(pure, abs=0.0051)
        for label, tokens, found in hidden_classes_found(groups, view.truth, made.hidden):
            totals[label] += tokens, found
    assert 10 < changed < VIEWS
    shares = page.run("[...document.querySelectorAll('.shares meter')].map((m) => [m.ariaLabel, m.value])")
    assert len(shares) == sum(total[0] > 0 for total in totals.values())
    for text, share in shares:
        tokens, found = totals[made.config.dataset.classes.index(text.split(":")[0])]
        assert share == pytest.approx(found / tokens)
    assert 0 < sum(share for _, share in shares) < len(shares)


@NEEDS_CHROMIUM
def test_names_of_a_group_are_the_nearest_classes(page: Browser, made: Made) -> None:
    number = 10  # an ordinary view
    set_to(page, "slider", 0.6)
    groups = np.reshape(all_groups(page)[number], made.clusters[number].shape)
    page.run(f"document.querySelector('article[data-number=\"{number}\"]').focus()")
    page.until(f"document.querySelector('article[data-number=\"{number}\"] canvas')")
    assert groups[groups != IGNORE].max() >= 1
    for group in sorted({*groups.ravel().tolist()} - {IGNORE}):
        page.press("ArrowRight")
        page.until("!document.getElementById('note').hidden")
        note = page.run("document.getElementById('note').textContent")
        tokens = made.tokens[number][groups == group].astype(float)
        assert f"group {group}: {len(tokens)} token" in note
        mean = (tokens / np.linalg.norm(tokens, axis=1, keepdims=True)).sum(axis=0)
        cosine = made.text @ mean / np.linalg.norm(mean)
        found = re.findall(r"([\w ]+?) (-?[01]\.\d\d)", note.partition("looks like: ")[2].partition("\n")[0])
        names = [made.config.dataset.classes.index(name.strip()) for name, _ in found]
        assert names == np.argsort(-cosine)[:3].tolist()
        np.testing.assert_allclose([float(value) for _, value in found], cosine[names], atol=0.0051)
    page.press("Escape")
    assert page.run("document.getElementById('note').hidden")


@NEEDS_CHROMIUM
def test_filter_and_order(page: Browser, made: Made) -> None:
    rows = [view.row for view in made.views]
    assert shown_ids(page) == [row.image_id for row in rows]
    set_to(page, "groups-least", 3)
    set_to(page, "groups-most", 9)
    expected = {row.image_id for row in rows if 3 <= row.groups <= 9}
    assert set(shown_ids(page)) == expected
    assert 0 < len(expected) < VIEWS
    set_to(page, "coverage-least", 65)
    set_to(page, "purity-most", 0.6)
    expected = {row.image_id for row in rows if 3 <= row.groups <= 9 and row.coverage >= 0.65 and row.purity <= 0.6}
    assert set(shown_ids(page)) == expected
    assert 1 < len(expected) < VIEWS
    set_to(page, "sort", "purity")
    pure = [next(row.purity for row in rows if row.image_id == image_id) for image_id in shown_ids(page)]
    assert pure == sorted(pure)
    page.run("document.getElementById('descending').click()")
    assert len(shown_ids(page)) == len(pure)
    pure = [next(row.purity for row in rows if row.image_id == image_id) for image_id in shown_ids(page)]
    assert pure == sorted(pure, reverse=True)
    set_to(page, "search", "no such image")
    assert shown_ids(page) == []
    page.run("document.getElementById('reset').click()")
    assert len(shown_ids(page)) == VIEWS
    set_to(page, "search", "IMAGE-1")
    assert set(shown_ids(page)) == {f"image-{number}" for number in range(10, 20)}


@NEEDS_CHROMIUM
def test_names_are_text(page: Browser, made: Made) -> None:
    found = shown_ids(page)
    assert found[:3] == ODD_IDS[:3]
    assert "caches/<i>odd</i>" in page.run("document.getElementById('about').textContent")
    assert page.run("document.querySelectorAll('article b, article script, i').length") == 0


@NEEDS_CHROMIUM
def test_only_what_is_near_is_loaded(page: Browser) -> None:
    page.until("document.querySelectorAll('canvas').length > 0")
    assert 0 < sum(url.endswith(".jpg") for url in page.requests) < VIEWS // 2
    page.run("window.scrollTo(0, document.body.scrollHeight)")
    page.until(f"document.querySelector('article[data-number=\"{VIEWS - 1}\"] canvas')")
    page.until("!document.querySelector('article[data-number=\"0\"] canvas')")


@NEEDS_CHROMIUM
def test_keys(page: Browser) -> None:
    page.press("/")
    assert page.run("document.activeElement.id") == "search"
    page.press("x")
    assert page.run("document.getElementById('search').value") == "x"
    set_to(page, "search", "")
    page.run("document.querySelector('article').focus()")
    for key, number in (("ArrowDown", "1"), ("ArrowDown", "2"), ("ArrowUp", "1"), ("ArrowUp", "0"), ("ArrowUp", "0")):
        page.press(key)
        assert page.run("document.activeElement.dataset.number") == number
    page.until("gallery.groups(0)")
    page.press("ArrowLeft")
    page.until("document.getElementById('note').textContent.startsWith('group ')")


@NEEDS_CHROMIUM
def test_the_mouse_asks_for_a_class(page: Browser, made: Made) -> None:
    page.until("gallery.groups(0)")
    page.run("document.querySelector('article').scrollIntoView()")
    grid = len(made.clusters[0])
    for panel, name_of in (("true mask", lambda label: True), ("seen mask", lambda label: label not in made.hidden)):
        place = f"document.querySelector('article [data-panel=\"{panel}\"]').getBoundingClientRect()"
        box = page.run(f"(() => {{ const box = {place}; return [box.left, box.top, box.width]; }})()")
        for row, column in ((grid // 2, 0), (grid - 1, grid - 1), (grid // 2, grid - 2)):
            page.point(box[0] + (column + 0.5) * box[2] / grid, box[1] + (row + 0.5) * box[2] / grid)
            page.until("!document.getElementById('note').hidden")
            label = made.views[0].truth[row, column]
            note = page.run("document.getElementById('note').textContent")
            if label != IGNORE and name_of(label):
                kind = "hidden" if label in made.hidden else "seen"
                assert note == f"{made.config.dataset.classes[label]} ({kind} class)"
            else:
                assert note in ("no class known", "not annotated")


@NEEDS_CHROMIUM
def test_without_dense_tokens_there_is_no_slider(browser: Browser, tmp_path: Path) -> None:
    made = Made(tmp_path / "g", with_tokens=False, views=8)
    browser.open(made.page)
    assert browser.run("document.getElementById('fusion').hidden")
    assert "storage.dense_tokens" in browser.run("document.getElementById('without-tokens').innerText")
    browser.until("gallery.groups(0)")
    np.testing.assert_array_equal(browser.run("gallery.groups(0)"), made.views[0].groups.ravel())


def test_a_gallery_is_replaced_and_other_folders_are_not(tmp_path: Path) -> None:
    Made(tmp_path / "g", views=9)
    Made(tmp_path / "g", views=6)
    assert len(list((tmp_path / "g" / "views").iterdir())) == 12
    index = (tmp_path / "g" / "gallery-index.js").read_text()
    assert index.isascii() and "NaN" not in index


@NEEDS_CHROMIUM
def test_from_the_command_line(browser: Browser, world: World, tmp_path: Path) -> None:
    done = world.run("inspect-pseudolabels", "--cache", "caches/tiny", "--output", tmp_path / "g", "--count", "99")
    assert done.stdout.splitlines() == [f"gallery: {tmp_path / 'g' / 'index.html'}"]
    browser.errors.clear()
    browser.open(tmp_path / "g" / "index.html")
    assert set(shown_ids(browser)) == {f"train-{index}" for index in range(10)}
    cache = open_cache(world.folder / "caches" / "tiny")
    for row in range(10):
        browser.until(f"gallery.groups({row}) || (window.scrollBy(0, 300), false)")
        expected = cache.read("pseudo_labels", row)[0].ravel()
        np.testing.assert_array_equal(browser.run(f"gallery.groups({row})"), expected)
    assert not browser.errors
    shutil.rmtree(tmp_path / "g" / "views")  # what is missing is named in its card
    browser.open(tmp_path / "g" / "index.html")
    browser.until("document.querySelector('.panels').textContent === 'views/0.js cannot be read'")
