"""Gamma of a run: how it is chosen, where it is kept, and who uses it."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from configs.load import resolve
from configs.schema import Config
from pipeline.data.dataset import IGNORE, SegmentationDataset
from pipeline.data.views import normalise
from pipeline.inference import ClassLogits, Cut
from pipeline.metrics import best_of
from stages.apply.evaluate import evaluate, evaluate_predictor, run_gamma
from stages.apply.gamma import calibrate, open_gamma_split
from stages.apply.predict import Segmenter
from stages.apply.predictor import Predictor, student_predictor
from stages.common.runs import Run, load_run, save_student
from tests.conftest import World
from tests.pipeline.draws import as_logits
from tests.pipeline.test_gamma import brute_force


def kept(folder: Path) -> float | None:
    with safe_open(folder / "student.safetensors", framework="pt") as file:
        gamma: float | None = json.loads(file.metadata()["run"])["gamma"]
    return gamma


def scores(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]


def with_gamma(run: Run, gamma: float | str) -> Config:
    return run.config.model_copy(update={"evaluate": run.config.evaluate.model_copy(update={"gamma": gamma})})


def predictor(run: Run) -> Predictor:
    return student_predictor(run.student, run.text_features, run.config)


@pytest.fixture()
def copied(world: World, tmp_path: Path) -> World:
    """The world's data alone, to be changed."""
    shutil.copytree(world.data, tmp_path / "data")
    return World(tmp_path)


def change_masks(world: World, pattern: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    for path in (world.data / "tiny" / "masks").glob(pattern):
        Image.fromarray(change(np.array(Image.open(path)))).save(path)


@pytest.fixture()
def older(world: World, trained: Path, tmp_path: Path) -> Path:
    """The run, as it was before gamma and spread were kept with it."""
    run = load_run(trained)
    shutil.copytree(trained, tmp_path / "older")
    tensors = load_file(trained / "student.safetensors")
    del tensors["spread"]
    save_file(tensors, tmp_path / "older" / "student.safetensors", {"iteration": str(run.iteration)})
    return tmp_path / "older"


def test_it_equals_the_slow_reference(world: World, trained: Path) -> None:
    """On ten images, every fourth pixel down and across."""
    run = load_run(trained)
    seen, unseen = run.config.dataset.seen_indices, run.config.dataset.unseen_indices
    split, predict, margins = SegmentationDataset(run.config.dataset, world.data, "train"), predictor(run), []
    predicted, truth = [], []
    for row in range(len(split)):
        logits = predict(split.image(row)).upsampled(list(range(20))).numpy()
        mask = split.mask(row)
        for y in range(0, 64, 4):
            for x in range(0, 64, 4):
                if mask[y, x] in seen:
                    margins.append(logits[seen, y, x].max() - logits[unseen, y, x].max())
                    predicted.append(seen[logits[seen, y, x].argmax()])
                    truth.append(int(mask[y, x]))
    wanted = brute_force(np.array(margins), np.array(predicted), np.array(truth))
    own = np.array(predicted) == truth
    assert calibrate(predict, "auto", split) == min(np.array(margins)[own & (np.array(margins) >= wanted)]) == run.gamma


def test_the_spread_equals_the_slow_reference(world: World, trained: Path) -> None:
    """Logits are R . T less 0.7 standard deviations of it, at every other position of the training images."""
    run = load_run(trained)
    split, text = SegmentationDataset(run.config.dataset, world.data, "train"), run.text_features.numpy()
    values: list[list[float]] = [[] for _ in text]
    for row in range(len(split)):
        pixels = normalise(split.image(row)[None], run.student.mean, run.student.std)
        with torch.inference_mode():
            found = run.student(pixels)[0, :, ::2, ::2].flatten(1).numpy()
        for word, of_word in zip(values, text @ found, strict=True):
            word.extend(of_word.tolist())
    with torch.inference_mode():
        plain = torch.einsum("bchw,kc->bkhw", run.student(pixels), run.text_features).numpy()
        shown = run.student.classify(pixels, run.text_features).numpy()
    wanted = plain - 0.7 * np.array([np.std(word) for word in values])[None, :, None, None]
    assert np.abs(plain - wanted).max() > 1e-3
    np.testing.assert_allclose(shown, wanted, atol=1e-5)


def test_only_auto_sets_the_spread(world: World, trained: Path, older: Path) -> None:
    """Runs of version 0.2.0 have none, and get it where gamma is chosen anew; a number or `holdout` leaves it alone."""
    run = load_run(older)
    assert not run.student.spread.any()
    for asked in (0.5, "holdout"):
        calibrate(predictor(run), asked, open_gamma_split(with_gamma(run, asked), world.data), run.student)
    assert not run.student.spread.any()
    assert run_gamma(run, world.data) == load_run(trained).gamma
    torch.testing.assert_close(run.student.spread, load_run(trained).student.spread)


def test_no_label_of_an_unseen_class_is_read(copied: World, trained: Path) -> None:
    """Unseen pixels scrambled among the unseen classes and "ignored": the same gamma, to the bit."""
    run = load_run(trained)
    unseen = np.array(run.config.dataset.unseen_indices)
    rng = np.random.default_rng(0)

    def scrambled(mask: np.ndarray) -> np.ndarray:
        hidden = np.isin(mask, unseen)
        mask[hidden] = rng.choice([*unseen, IGNORE], hidden.sum())
        return mask

    change_masks(copied, "train-*.png", scrambled)
    split = open_gamma_split(run.config, copied.data)
    assert split is not None and calibrate(predictor(run), "auto", split, run.student) == run.gamma


@pytest.mark.parametrize(
    ("mask", "lack"),
    [
        (lambda mask: 0 * mask, "no unannotated pixels"),
        (lambda mask: 0 * mask + 255, "no annotated pixels classified correctly"),
    ],
)
def test_nothing_to_choose_by_is_said(
    copied: World, trained: Path, mask: Callable[[np.ndarray], np.ndarray], lack: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = load_run(trained)
    change_masks(copied, "train-*.png", mask)
    split = SegmentationDataset(run.config.dataset, copied.data, "train")
    assert np.isnan(calibrate(predictor(run), "auto", split))
    said = capsys.readouterr().err
    assert said.count("no gamma:") == 1 and lack in said


def test_images_that_cannot_be_read_are_left_out(copied: World, trained: Path) -> None:
    run = load_run(trained)
    (copied.data / "tiny" / "images" / "train-5.png").write_bytes(b"no image")
    broken = SegmentationDataset(run.config.dataset, copied.data, "train")
    found = calibrate(predictor(run), "auto", broken)
    broken.ids.remove("train-5")
    assert found == calibrate(predictor(run), "auto", broken)
    for name in broken.ids:
        (copied.data / "tiny" / "images" / f"{name}.png").unlink()
    assert np.isnan(calibrate(predictor(run), "auto", broken))


def test_one_image_is_enough(world: World, trained: Path) -> None:
    run = load_run(trained)
    config = run.config.dataset.model_copy(update={"limit": 1})
    assert calibrate(predictor(run), "auto", SegmentationDataset(config, world.data, "train")) != 0


def test_without_unseen_classes_it_is_0(world: World, trained: Path) -> None:
    run = load_run(trained)
    dataset = run.config.dataset.model_copy(update={"unseen": ()})
    for asked in ("auto", "holdout"):
        config = with_gamma(run, asked).model_copy(update={"dataset": dataset})
        assert open_gamma_split(config, Path("nowhere")) is None and calibrate(predictor(run), asked, None) == 0


def test_a_number_is_a_number(world: World, trained: Path) -> None:
    run = load_run(trained)
    config = with_gamma(run, -0.7)
    assert evaluate(predictor(run), config, world.data, run)[0] == -0.7
    assert run_gamma(Run(run.path, config, run.student, run.text_features, 0, 0.3), Path("nowhere")) == -0.7


def labelled_gamma(predict: Predictor, config: Config, data_root: Path) -> float:
    """What `evaluate.gamma=auto` was, as it stood."""
    seen, unseen = config.dataset.seen_indices, config.dataset.unseen_indices
    dataset = SegmentationDataset(config.dataset, data_root, "holdout")
    margins = []
    for row in range(0, len(dataset), max(1, len(dataset) // 20)):
        logits = predict(dataset.image(row))
        margins.append((best_of(logits, seen, logits.size)[0] - best_of(logits, unseen, logits.size)[0]).flatten())
    gammas = sorted({0.0, *np.quantile(torch.cat(margins).numpy(), np.linspace(0, 1, 60)).tolist()})
    found = [scores.hiou for scores in evaluate_predictor(predict, dataset, gammas)]
    return gammas[int(np.argmax(found))] if max(found) else float("nan")


def knowing(run: Run, config: Config, data_root: Path) -> Predictor:
    """Logits of which that of the true class is a little higher."""
    truth = {}
    for name in ("holdout", "val"):
        split = SegmentationDataset(config.dataset, data_root, name)
        truth |= {split.image(row).tobytes(): split.mask(row) for row in range(len(split))}

    class Knowing(Predictor):
        def logits(self, cuts: Sequence[Cut]) -> list[ClassLogits]:
            return [of(truth[cut.image.tobytes()]) for cut in cuts]

    def of(mask: np.ndarray) -> ClassLogits:
        logits = torch.randn(20, *mask.shape, generator=torch.Generator().manual_seed(int(mask.sum())))
        logits[torch.from_numpy(np.isin(mask, config.dataset.seen_indices)).expand(20, -1, -1)] += 0.1
        logits.scatter_add_(0, torch.from_numpy(mask.astype(np.int64))[None], torch.ones(1, *mask.shape))
        logits[config.dataset.seen_indices] += 0.5
        return as_logits(logits)

    return Knowing(**vars(predictor(run)))


def test_holdout_is_what_auto_was(world: World, trained: Path) -> None:
    run = load_run(trained)
    config = with_gamma(run, "holdout")
    predict = knowing(run, config, world.data)
    gamma, found = evaluate(predict, config, world.data, run)
    assert gamma == labelled_gamma(predict, config, world.data) > 0.1
    (plain,) = evaluate_predictor(predict, SegmentationDataset(config.dataset, world.data, "val"), [gamma])
    assert (found.hiou, found.miou, found.pixel_accuracy) == (plain.hiou, plain.miou, plain.pixel_accuracy)


def test_holdout_without_an_unseen_pixel_or_a_split_is_one_line(
    world: World, copied: World, trained: Path, tmp_path: Path
) -> None:
    asked = ("--set", "evaluate.gamma=holdout")
    change_masks(copied, "holdout-*.png", lambda mask: 0 * mask)
    line = world.fails("evaluate", "--run", trained, *asked, "--data-root", copied.data)
    assert "no mask of split `holdout` of dataset tiny has a pixel of an unseen class" in line
    settings = yaml.safe_load(world.config.read_text())
    dataset = yaml.safe_load(Path(settings["dataset"]).read_text())
    del dataset["splits"]["holdout"]
    (tmp_path / "without.yaml").write_text(yaml.safe_dump(settings | {"dataset": dataset}))
    line = world.fails("train", "--config", tmp_path / "without.yaml", "--cache", "caches/tiny", *asked,
                       "--run", tmp_path / "run", "--set", "train.validate_on=val")  # fmt: skip
    assert "dataset tiny has no split `holdout`" in line
    assert not (tmp_path / "run").exists()  # before anything is trained


@pytest.fixture(scope="module")
def validated(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of two validations, and what it said."""
    run = tmp_path_factory.mktemp("gamma") / "run"
    done = world.run("train", "--cache", "caches/tiny", "--config", world.config, "--run", run,
                     *(f"--set=train.{text}" for text in ("validate_every=2", "checkpoint_every=1",
                                                          "keep_checkpoints=9")))  # fmt: skip
    return run, done.stderr


def test_validations_choose_it_keep_it_and_score_at_it(world: World, validated: tuple[Path, str]) -> None:
    path, said = validated
    lines = scores(path)
    assert [line["iteration"] for line in lines] == [2, 4]
    for line in lines:
        folder = path / "checkpoints" / f"{line['iteration']:06d}"
        run = load_run(folder)
        assert run.gamma == line["gamma"] == kept(folder) == run_gamma(run, Path("nowhere"))
        assert f"iteration {line['iteration']}, holdout, gamma {line['gamma']:.3g}: miou " in said
        holdout = SegmentationDataset(run.config.dataset, world.data, "holdout")
        own, plain = evaluate_predictor(predictor(run), holdout, [line["gamma"], 0.0])
        assert (line["hiou"], line["miou_seen"]) == pytest.approx((own.hiou, own.miou_seen))
        assert line["hiou_at_0"] == pytest.approx(plain.hiou) and own.miou_unseen != plain.miou_unseen
    assert lines[0]["gamma"] != lines[1]["gamma"]
    assert load_run(path).gamma == lines[1]["gamma"]
    for between in ("000001", "000003"):
        assert kept(path / "checkpoints" / between) is None


def test_the_best_is_best_at_its_gamma(world: World, tmp_path: Path) -> None:
    """The first validation is better at the run's gamma, the second at 0."""
    from pipeline.metrics import Scores

    values = iter([(30.0, 5.0), (20.0, 10.0)])

    def evaluated(*arguments: object) -> list[Scores]:
        return [Scores(value, value, value, value, value, []) for value in next(values)]

    with mock.patch("stages.train.validation.evaluate_predictor", evaluated):
        world.run("train", "--cache", "caches/tiny", "--config", world.config, "--run", tmp_path / "run",
                  "--set", "train.validate_every=2", "--set", "train.iterations=5", "--set", "train.keep_checkpoints=1",
                  "--set", "train.checkpoint_every=9", "--set", "train.validate_every=3")  # fmt: skip
    assert {path.name for path in (tmp_path / "run" / "checkpoints").glob("0*")} == {"000003", "000005"}


def test_a_number_and_holdout_are_kept_too(world: World, tmp_path: Path) -> None:
    for asked, name in ((0.25, "number"), ("holdout", "holdout")):
        run = tmp_path / name
        world.run("train", "--cache", "caches/tiny", "--config", world.config, "--run", run,
                  "--set", f"evaluate.gamma={asked}")  # fmt: skip
        loaded = load_run(run)
        wanted = asked if asked == 0.25 else labelled_gamma(predictor(loaded), loaded.config, world.data)
        np.testing.assert_equal([loaded.gamma, run_gamma(loaded, Path("nowhere"))], [wanted, wanted])
        assert scores(run)[0]["gamma"] == (None if np.isnan(wanted) else wanted)  # type: ignore[arg-type, comparison-overlap]


def test_a_continued_run_keeps_it(world: World, validated: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(validated[0], tmp_path / "run")
    whole = (tmp_path / "run" / "student.safetensors").read_bytes()
    (tmp_path / "run" / "student.safetensors").unlink()
    assert "nothing to do" in world.run("train", "--run", tmp_path / "run").stderr
    assert (tmp_path / "run" / "student.safetensors").read_bytes() == whole


def test_evaluate_takes_the_runs_own(world: World, trained: Path, tmp_path: Path) -> None:
    """Without a look at training images; other ways to choose it are chosen anew."""
    run, report = load_run(trained), tmp_path / "scores.json"
    with mock.patch("stages.apply.evaluate.open_gamma_split", side_effect=AssertionError):
        world.run("evaluate", "--run", trained, "--json", report)
    assert json.loads(report.read_text())["gamma"] == run.gamma
    other = Run(run.path, with_gamma(run, 3.0), run.student, run.text_features, run.iteration, 3.0)
    assert evaluate(predictor(run), with_gamma(run, "auto"), world.data, other)[0] == run.gamma


def test_an_older_run_chooses_it_at_need(
    world: World, older: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = load_run(trained).gamma
    found = json.loads(world.run("evaluate", "--run", older, "--json", "-").stdout)
    assert found["gamma"] == wanted
    assert run_gamma(load_run(older), world.data) == wanted and not capsys.readouterr().err
    assert np.isnan(run_gamma(load_run(older), world.folder / "nowhere"))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "no gamma:" in said[0] and str(older) in said[0] and "nowhere" in said[0]


def test_evaluation_without_training_images_goes_on(copied: World, older: Path) -> None:
    (copied.data / "tiny" / "splits" / "train.txt").unlink()
    done = copied.run("evaluate", "--run", older, "--json", "-")
    assert json.loads(done.stdout)["gamma"] is None and done.stderr.count("no gamma:") == 1


def test_nothing_is_rendered_for_it(trained: Path, tmp_path: Path) -> None:
    """A run on the demo's scenes, which are rendered where they are missing."""
    run = load_run(trained)
    run = Run(run.path, resolve("scenes"), run.student, run.text_features, 0)
    assert np.isnan(run_gamma(run, tmp_path)) and not list(tmp_path.iterdir())


def test_predict_uses_it(world: World, trained: Path) -> None:
    """The mask differs from that at 0 where, and only where, the margin is on the other side of gamma."""
    run = load_run(trained)
    segmenter = Segmenter.load(trained, "cpu")
    assert run.gamma is not None and segmenter.gamma == run.gamma != 0
    image = SegmentationDataset(run.config.dataset, world.data, "val").image(0)
    mask, plain = segmenter(image), Segmenter(run, 0.0)(image)
    seen, unseen = run.config.dataset.seen_indices, run.config.dataset.unseen_indices
    logits = predictor(run)(image)
    margins = (best_of(logits, seen, mask.shape)[0] - best_of(logits, unseen, mask.shape)[0]).numpy()  # type: ignore[arg-type]
    np.testing.assert_array_equal(mask != plain, (margins > 0) != (margins > run.gamma))
    assert (mask != plain).any()


def test_it_survives_the_file(trained: Path, tmp_path: Path) -> None:
    run = load_run(trained)
    shutil.copy(trained / "config.yaml", tmp_path)
    for gamma, alpha in ((0.1 + 0.2, 1.5), (-1e-9, 0.1), (0.0, None), (None, 1.0), (np.nan, 2.0)):
        save_student(tmp_path, run.student, run.text_features, 7, gamma, alpha)
        found = load_run(tmp_path)
        np.testing.assert_equal([found.gamma, found.alpha, found.iteration], [gamma, alpha, 7])
    for name, tensor in load_file(trained / "student.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "student.safetensors")[name])
