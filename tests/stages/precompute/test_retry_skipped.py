"""`precompute --retry-skipped`: images that can be read again take their place, as if they always could."""

from pathlib import Path

from tests.conftest import World, tree, write_world

CACHE = "caches/skipping"


def test_images_that_can_be_read_again_are_taken_in(tmp_path: Path) -> None:
    here = write_world(tmp_path)
    command = ("precompute", "--config", here.config, "--cache", CACHE, "--on-error", "skip")
    photos = [here.data / "tiny" / "images" / f"train-{row}.png" for row in (1, 9)]
    whole = [photo.read_bytes() for photo in photos]
    for photo in photos:
        photo.write_bytes(bytes(photo.stat().st_size))  # a file of another size would be another dataset
    assert "2 images were skipped" in here.run(*command).stderr
    photos[0].write_bytes(whole[0])
    assert "complete" in here.run(*command).stderr  # nothing is tried without being asked

    said = here.run(*command, "--retry-skipped").stderr
    assert "trying 2 skipped images again" in said and "1 images were skipped" in said
    photos[1].write_bytes(whole[1])
    assert "trying 1 skipped images again" in here.run(*command, "--retry-skipped").stderr
    said = here.run(*command, "--retry-skipped").stderr
    assert "trying 0 skipped images again" in said and "nothing to do" in said
    here.run("precompute", "--config", here.config, "--cache", "caches/undamaged")
    assert tree(here.folder / CACHE) == tree(here.folder / "caches" / "undamaged")


def test_mistakes_are_one_line(world: World) -> None:
    assert "drop --dry-run" in world.fails("precompute", "--config", world.config, "--retry-skipped", "--dry-run")
    line = world.fails("precompute", "--config", world.config, "--retry-skipped", "--cache", "caches/nowhere")
    assert "no cache" in line and not (world.folder / "caches" / "nowhere" / "manifest.json").exists()
