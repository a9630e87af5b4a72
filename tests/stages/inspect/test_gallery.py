"""The gallery of pseudo labels, in a real browser: it fuses as Python does, filters, escapes, and works by keyboard."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cache.reader import open_cache
from configs.errors import UserError
from pipeline.data.dataset import IGNORE
from pipeline.metrics import purity
from pipeline.pseudo_labels.fusion import fuse, similarities
from stages.inspect.gallery.collect import View, count_seeds
from stages.inspect.gallery.write import hidden_classes_found, write_gallery
from tests import reference
from tests.conftest import World
from tests.stages.inspect.browser import CHROMIUM, Browser, chromium
from tests.stages.inspect.galleries import ODD_IDS, VIEWS, Made, expand, reference_centroids

NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH: the page cannot be opened")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("gallery") / "a #1 %20 <folder>")


@pytest.fixture
def page(browser: Browser, made: Made) -> Iterator[Browser]:
    """The gallery, just opened. Nothing may go wrong in it, and nothing outside its folder be asked for."""
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


def read_folder(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


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
    assert page.run("document.getElementById('missing').hidden")
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
        page.page.keyboard.press("ArrowRight")
        page.until("!document.getElementById('note').hidden")
        note = page.run("document.getElementById('note').textContent")
        tokens = made.tokens[number][groups == group].astype(float)
        assert f"group {group}: {len(tokens)} token" in note
        mean = (tokens / np.linalg.norm(tokens, axis=1, keepdims=True)).sum(axis=0)
        cosine = made.text @ mean / np.linalg.norm(mean)
        found = re.findall(r"([\w ]+?) (-?[01]\.\d\d)", note.partition("looks like: ")[2].partition("\n")[0])
        names = [made.config.dataset.words.index(name.strip()) for name, _ in found]
        assert names == np.argsort(-cosine)[:3].tolist()
        np.testing.assert_allclose([float(value) for _, value in found], cosine[names], atol=0.0051)
    page.page.keyboard.press("Escape")
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
    page.page.keyboard.press("/")
    assert page.run("document.activeElement.id") == "search"
    page.page.keyboard.press("x")
    assert page.run("document.getElementById('search').value") == "x"
    set_to(page, "search", "")
    page.run("document.querySelector('article').focus()")
    for key, number in (("ArrowDown", "1"), ("ArrowDown", "2"), ("ArrowUp", "1"), ("ArrowUp", "0"), ("ArrowUp", "0")):
        page.page.keyboard.press(key)
        assert page.run("document.activeElement.dataset.number") == number
    page.until("gallery.groups(0)")
    page.page.keyboard.press("ArrowLeft")
    page.until("document.getElementById('note').textContent.startsWith('group ')")


@NEEDS_CHROMIUM
def test_the_mouse_asks_for_a_class(page: Browser, made: Made) -> None:
    page.until("gallery.groups(0)")
    page.run("document.querySelector('article').scrollIntoView()")
    page.settle()
    grid = len(made.clusters[0])
    for panel, name_of in (("true mask", lambda label: True), ("seen mask", lambda label: label not in made.hidden)):
        place = f"document.querySelector('article [data-panel=\"{panel}\"]').getBoundingClientRect()"
        box = page.run(f"(() => {{ const box = {place}; return [box.left, box.top, box.width]; }})()")
        for row, column in ((grid // 2, 0), (grid - 1, grid - 1), (grid // 2, grid - 2)):
            page.page.mouse.move(box[0] + (column + 0.5) * box[2] / grid, box[1] + (row + 0.5) * box[2] / grid)
            page.until("!document.getElementById('note').hidden")
            label = made.views[0].truth[row, column]
            note = page.run("document.getElementById('note').textContent")
            if label != IGNORE and name_of(label):
                kind = "hidden" if label in made.hidden else "seen"
                assert note == f"{made.config.dataset.classes[label]} ({kind} class)"
            else:
                assert note in ("no class known", "not annotated")


@NEEDS_CHROMIUM
def test_a_region_tells_its_seed(page: Browser, made: Made) -> None:
    page.until("gallery.groups(0)")
    page.run("document.querySelector('article').scrollIntoView()")
    page.settle()
    box = page.run("""(() => {
        const box = document.querySelector('article [data-panel="K-means regions"]').getBoundingClientRect();
        return [box.left, box.top, box.width];
    })()""")
    clusters, seen = made.clusters[0], set()
    for label in (clusters[clusters < 100].min(), clusters[(clusters >= 100) & (clusters != IGNORE)].max()):
        row, column = np.argwhere(clusters == label)[0] + 0.5
        page.page.mouse.move(box[0] + column * box[2] / len(clusters), box[1] + row * box[2] / len(clusters))
        page.until(f"document.getElementById('note').textContent.startsWith('region {label}:')")
        seen.add((label < 100, page.run("document.getElementById('note').textContent").splitlines()[1]))
    assert seen == {(True, "seeded by a window of 7 × 7 tokens"), (False, "seeded by a window of 3 × 3 tokens")}  # noqa: RUF001


def test_seeds_of_each_window() -> None:
    rng = np.random.default_rng(1)
    for grid, windows in ((8, (3, 2)), (16, (7, 3)), (4, (9, 1)), (12, (3,))):
        for share in (0.9, 0.5, 0.1, 0.02, 0.0):
            free = rng.random((grid, grid)) < share
            tokens = np.where(free[..., None], rng.normal(size=(grid, grid, 2)), 0)
            first = [reference.window_seeds(tokens, free, windows[:1]), reference.window_seeds(tokens, free, windows)]
            found = count_seeds(free, windows)
            if found:
                assert [window for window, _ in found] == list(windows)
                assert sum(count for _, count in found) == len(first[1])
                assert found[0][1] in (len(first[0]), 0)  # alone, a window without a seed takes the mean of all tokens
            else:
                assert free.sum() <= len(first[1])


@NEEDS_CHROMIUM
@pytest.mark.parametrize(
    ("with_tokens", "kmeans", "why", "setting"),
    [
        (0, "joint", "8 views have no dense tokens in the cache", "--set storage.dense_tokens=float16"),
        (5, "joint", "3 views have no dense tokens in the cache", "a higher storage.dense_views"),
        (0, "per-scale", "With pseudo_labels.kmeans=per-scale, the tokens", "--set pseudo_labels.kmeans=joint"),
    ],
)
def test_why_there_is_no_slider(
    browser: Browser, tmp_path: Path, with_tokens: int, kmeans: str, why: str, setting: str
) -> None:
    made = Made(tmp_path / "g", with_tokens, 8, kmeans)
    browser.open(made.page)
    assert browser.run("document.getElementById('fusion').hidden") == (with_tokens == 0)
    shown = browser.run("document.getElementById('missing').innerText")
    assert shown.startswith(why) and shown.endswith(f"class names, precompute with {setting}.")
    browser.until("gallery.groups(0)")
    np.testing.assert_array_equal(browser.run("gallery.groups(0)"), made.views[0].groups.ravel())


@NEEDS_CHROMIUM
def test_similarities_without_a_pair_of_regions(browser: Browser, made: Made, tmp_path: Path) -> None:
    """The chart is empty, from 0 to 1, with its ticks where they belong."""
    alone = [view for view in made.views if view.row.clusters < 2]
    assert alone
    browser.open(write_gallery(made.config, "cache", alone, tmp_path / "g"))
    heights = browser.run("[...document.querySelectorAll('#similarities rect')].map((bar) => bar.height.baseVal.value)")
    assert heights == [0.0] * 50
    ticks = browser.run(
        "[...document.querySelectorAll('#similarities .tick')].map((t) => [t.textContent, t.x.baseVal[0].value])"
    )
    assert dict(ticks) == pytest.approx({"0": 8, "0.5": 160, "1": 312})


def test_a_gallery_is_replaced_and_other_folders_are_not(tmp_path: Path) -> None:
    Made(tmp_path / "g", views=9)
    (tmp_path / "g" / "notes.txt").write_text("my own")
    Made(tmp_path / "g", views=6)
    assert len(list((tmp_path / "g" / "views").iterdir())) == 12
    index = (tmp_path / "g" / "gallery-index.js").read_text()
    assert index.isascii() and "NaN" not in index
    assert (tmp_path / "g" / "notes.txt").read_text() == "my own"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("my own")
    with pytest.raises(UserError, match="other holds other files"):
        Made(tmp_path / "other", views=1)
    assert read_folder(tmp_path / "other") == {"notes.txt": b"my own"}


@pytest.mark.parametrize("error", [UserError("the cache has other settings"), KeyboardInterrupt()])
@pytest.mark.parametrize("done", [0, 3])
def test_what_ends_early_leaves_the_gallery_as_it_was(tmp_path: Path, error: BaseException, done: int) -> None:
    made = Made(tmp_path / "g", views=6)
    before = read_folder(tmp_path / "g")

    def views() -> Iterator[View]:
        yield from made.views[:done]
        raise error

    for folder in (tmp_path / "g", tmp_path / "new"):
        with pytest.raises(type(error)):
            write_gallery(made.config, "cache", views(), folder)
    assert [path.name for path in tmp_path.iterdir()] == ["g"]
    assert read_folder(tmp_path / "g") == before


def test_what_a_kill_leaves_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Made(tmp_path / ".g.partial", views=9)
    made = Made(tmp_path / "g", views=6)
    expected = read_folder(tmp_path / "g")
    assert [path.name for path in tmp_path.iterdir()] == ["g"] and len(expected) == 12 + 8
    shutil.rmtree(tmp_path / "g" / "views")  # a kill while the new one is put in place
    write_gallery(made.config, "caches/<i>odd</i>", made.views, tmp_path / "g")
    assert read_folder(tmp_path / "g") == expected
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_gallery(made.config, "caches/<i>odd</i>", made.views, Path("."))
    assert read_folder(tmp_path / "here") == expected


@NEEDS_CHROMIUM
def test_from_the_command_line(browser: Browser, world: World, tmp_path: Path) -> None:
    done = world.run("inspect-pseudolabels", "--cache", "caches/tiny", "--output", tmp_path / "g", "--count", "99")
    assert done.stdout.splitlines() == [f"gallery: {tmp_path / 'g' / 'index.html'}"]
    command = ("inspect-pseudolabels", "--cache", "caches/tiny", "--output", tmp_path / "g")
    assert "has other settings" in world.fails(*command, "--set", "pseudo_labels.lambda=0.9")
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
