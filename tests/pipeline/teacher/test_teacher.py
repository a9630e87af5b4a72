"""Teachers that packages bring: found among what is installed, checked, and never imported because a config says so."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import UserError
from configs.schema import Teacher as Settings
from pipeline.teacher.teacher import GROUP, fingerprint, load_teacher

PLUG_IN = """
import torch

class Grey:
    width, stride, mean, std = 3, 8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(self, settings, device):
        if settings.pretrained == "absent":
            raise FileNotFoundError("no file\\nabsent")

    @staticmethod
    def fingerprint(settings):
        return f"{settings.pretrained} v1" if settings.pretrained != "absent" else open("absent").read()

    def encode(self, pixels):
        dense = torch.nn.functional.avg_pool2d(pixels, 8).permute(0, 2, 3, 1)
        return dense.mean((1, 2)), dense

    def text_features(self, names, templates):
        return torch.eye(3)[: len(names)]
"""
Register = Callable[..., Settings]


@pytest.fixture
def register(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Register:
    """Installs a package as pip leaves it: a module and its .dist-info, in a folder of sys.path."""

    def install(
        name: str = "grey", package: str = "grey-teacher", code: str = PLUG_IN, entry: str = ":Grey"
    ) -> Settings:
        module, folder = package.replace("-", "_"), tmp_path / package
        info = folder / f"{module}-1.0.dist-info"
        info.mkdir(parents=True)
        (folder / f"{module}.py").write_text(code)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {module}{entry}\n")
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, module, raising=False)
        return Settings(model=name, pretrained="weights")

    return install


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_installed_teacher(register: Register) -> None:
    settings = register()
    teacher = load_teacher(settings)
    assert (teacher.width, teacher.stride, teacher.mean) == (3, 8, (0.5, 0.5, 0.5))
    cls_token, dense = teacher.encode(torch.ones(2, 3, 16, 24))
    assert cls_token.shape == (2, 3) and dense.shape == (2, 2, 3, 3)
    assert fingerprint(settings) == {"model": "grey", "pretrained": "weights v1"}
    assert "views.size 12 is not a multiple of 8" in refused(lambda: teacher.encode(torch.ones(1, 3, 16, 12)))


@pytest.mark.parametrize(
    "model", ["grey_teacher", "grey_teacher:Grey", "grey-teacher", "Grey", "grey_teacher.Grey", ""]
)
def test_a_config_cannot_name_a_module(model: str, register: Register) -> None:
    """The package is installed, but this is not the name of its entry point."""
    register()
    settings = Settings(model=model, pretrained="none")
    fingerprint(settings)
    assert f"unknown teacher.model {model!r}" in refused(lambda: load_teacher(settings))
    assert "grey_teacher" not in sys.modules


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            ", dense\n",
            ", dense[:, 1:]\n",
            "teacher grey gives dense tokens of shape (2, 1, 3, 3): they must be (2, 2, 3, 3)",
        ),
        ("return dense.mean((1, 2))", "return dense", "gives CLS tokens of shape (2, 2, 3, 3): they must be (2, 3)"),
        ("return dense.mean((1, 2))", "return dense.mean((1, 2)) * 1e6", "gives CLS tokens that are not finite"),
        (", dense\n", ", dense / 0\n", "gives dense tokens that are not finite"),
        ("torch.eye(3)[", "torch.eye(4)[", "gives text features of shape (2, 4): they must be (2, 3)"),
        ("torch.eye(3)[", "2 * torch.eye(3)[", "gives text features that are not of length 1"),
        ("= 3, 8,", "= 3, 0,", "teacher grey has width 3, stride 0, "),
        ("(0.25, 0.25, 0.25)", "(0.25, 0.25)", "and std (0.25, 0.25): its package must give"),
    ],
)
def test_what_it_gives_is_checked(old: str, new: str, said: str, register: Register) -> None:
    assert PLUG_IN.count(old) == 1
    settings = register(code=PLUG_IN.replace(old, new))

    def use() -> None:
        teacher = load_teacher(settings)
        teacher.encode(torch.ones(2, 3, 16, 24))
        teacher.text_features([["a"], ["b"]], "single")

    assert said in refused(use)


def test_what_cannot_be_loaded(register: Register) -> None:
    absent = register().model_copy(update={"pretrained": "absent"})
    for call in (load_teacher, fingerprint):
        message = refused(lambda call=call: call(absent))
        assert message.startswith("teacher.model grey cannot be loaded (FileNotFoundError: ")
        assert message.endswith("check teacher.pretrained, which is 'absent'")
    assert "are for open_clip's models" in refused(lambda: load_teacher(absent, compile=True))
    broken = register("broken", "broken-teacher", "import nothing_of_this_name")
    assert "broken_teacher:Grey cannot be imported (No module named" in refused(lambda: load_teacher(broken))
    register("grey", "other-teacher")
    assert "offered by several packages (grey-teacher, other-teacher)" in refused(lambda: fingerprint(absent))
