"""Images of several sizes through a student in batches, and by two processes, beside one after the other."""

import json
import os
import socket
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from configs.errors import UserError
from pipeline.inference import ClassLogits, Cut
from pipeline.metrics import best_of
from stages.apply import predictor
from stages.apply.predictor import Predictor, student_predictor
from stages.common import ranks
from stages.common.ranks import SHARE
from stages.common.runs import load_run
from tests.conftest import World

FEW = 4  # images in a share, so that both processes have some
SIZES = [(64, 64)] * 5 + [(64, 90)] * 4 + [(50, 200), (90, 64), (64, 64), (300, 40)]


def predictor_of(run: Path, mode: str, lanes: int, batches: list[int]) -> Predictor:
    """Notes how many windows each pass has."""
    opened = load_run(run)
    evaluation = opened.config.evaluate.model_copy(update={"mode": mode, "stride": 40})
    config = opened.config.model_copy(update={"evaluate": evaluation})
    predict = student_predictor(opened.student, opened.text_features, config)

    def classify(pixels: Tensor) -> Tensor:
        batches.append(len(pixels))
        return predict.classify(pixels)

    return replace(predict, classify=classify, lanes=lanes)


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_batches_give_what_single_images_give(
    trained: Path, mode: str, lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, batches = np.random.default_rng(0), list[int]()
    images = [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in SIZES]
    monkeypatch.setattr(predictor, "CPU_PIXELS", 3 * 64 * 64)
    predict = predictor_of(trained, mode, lanes, batches)
    threads = torch.get_num_threads()

    def ready(row: int) -> tuple[Cut, int] | None:
        return None if row == 2 else (predict.cut(images[row]), row)

    def finish(row: int, logits: ClassLogits) -> tuple[int, ClassLogits]:
        return row, logits

    found = dict(predict.each(range(len(images)), ready, finish))
    assert sorted(found) == [row for row in range(len(images)) if row != 2]
    assert max(batches) == 3 and torch.get_num_threads() == threads
    monkeypatch.setattr(predictor, "CPU_PIXELS", 1)
    for row, logits in found.items():
        alone = predict(images[row])
        for window, other in zip(logits.windows, alone.windows, strict=True):
            assert window.box == other.box
            torch.testing.assert_close(window.logits, other.logits, rtol=1e-5, atol=1e-5)
        size = SIZES[row]
        assert torch.equal(best_of(logits, list(range(20)), size)[1], best_of(alone, list(range(20)), size)[1])


def test_images_of_rare_sizes_do_not_wait_for_ever(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only images of one share go through the model together, at most as many as it takes at once."""
    predict = predictor_of(trained, "whole", 1, [])
    cuts = [predict.cut(np.zeros((64, 64 + 8 * (row % 50), 3), np.uint8)) for row in range(200)]
    monkeypatch.setattr(predictor, "CPU_PIXELS", 10**5)
    taken = 0

    def images() -> list[tuple[Cut, int]]:
        nonlocal taken
        for row, image in enumerate(cuts):
            taken += 1
            yield image, row

    seen, most = Counter[int](), 0
    for group in predict._in_groups(images()):
        assert len({image.window for image, _ in group}) == 1 and len(group) <= 10**5 // 64**2
        assert len({row // SHARE for _, row in group}) == 1
        seen.update(row for _, row in group)
        most = max(most, taken - sum(seen.values()))
    assert set(seen) == set(range(200)) and set(seen.values()) == {1}
    assert most <= SHARE


def test_an_image_that_cannot_be_read_ends_it(trained: Path) -> None:
    predict = predictor_of(trained, "whole", 2, [])

    def ready(row: int) -> tuple[Cut, int]:
        if row == 7:
            raise UserError("image 7")
        return predict.cut(np.zeros((64, 64, 3), np.uint8)), row

    with pytest.raises(UserError, match="image 7"):
        list(predict.each(range(20), ready, lambda row, logits: row))


def evaluated(folder: Path, run: Path, report: str) -> None:
    """`evaluate` and `predict`, and what they leave."""
    World(folder).run("evaluate", "--run", run, "--set", "evaluate.split=train", "--json", report)
    World(folder).run("predict", folder / "data" / "tiny" / "images", "--run", run, "--output", f"masks-{report}")


def _rank(rank: int, folder: Path, run: Path, port: int) -> None:
    torch.set_num_threads(1)
    predictor.SHARE = ranks.SHARE = FEW
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    World(folder).run("evaluate", "--run", run, "--set", "evaluate.split=train", "--json", "two.json")
    os.environ["MASTER_PORT"] = str(port + 1)
    World(folder).run("predict", folder / "data" / "tiny" / "images", "--run", run, "--output", "masks-two.json")


def test_two_processes_count_what_one_counts(world: World, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every IoU is equal, and so is every mask; each photo is segmented by one of them."""
    for module in (predictor, ranks):
        monkeypatch.setattr(module, "SHARE", FEW)
    evaluated(world.folder, trained, "one.json")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, (world.folder, trained, port), nprocs=2)
    one, two = (json.loads((world.folder / name).read_text()) for name in ("one.json", "two.json"))
    assert one == two
    ours, theirs = ({file.name: file.read_bytes() for file in (world.folder / f"masks-{name}").iterdir()}
                    for name in ("one.json", "two.json"))  # fmt: skip
    assert ours == theirs and len(ours) == 2 * 18
