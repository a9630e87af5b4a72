"""A table of rows that differ in a few settings, and the claims about them."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from configs.dataset import Section
from configs.errors import UserError
from configs.load import read_yaml, suggest, validate
from configs.schema import CONFIGS

ABLATIONS = CONFIGS / "ablations"


class Sign(Section):
    """A testable claim: row `better` scores higher than row `worse`. `by_paper`: made by the paper, otherwise by us."""

    claim: str
    better: str
    worse: str
    score: Literal["seen", "unseen", "hiou", "purity"] = "hiou"
    by_paper: bool = True


class Ablation(Section):
    """`settings` apply to every row, before the row's own; both are written as for `--set`."""

    title: str
    settings: tuple[str, ...] = ()
    rows: dict[str, tuple[str, ...]] = Field(min_length=1)
    signs: tuple[Sign, ...] = ()

    @model_validator(mode="after")
    def _signs_name_rows(self) -> "Ablation":
        for sign in self.signs:
            for row in (sign.better, sign.worse):
                if row not in self.rows:
                    hint = suggest(row, list(self.rows))
                    raise ValueError(f"sign {sign.claim!r} names {row!r}, which is not a row{hint}")
        return self


def known_ablations() -> list[str]:
    return sorted(path.stem for path in ABLATIONS.glob("*.yaml"))


def read_ablation(name_or_file: str) -> tuple[str, Ablation]:
    """A table's name and content, by its name in configs/ablations or by its file.

    Raises:
        UserError: there is no such table, or the file is not a table.
    """
    names = known_ablations()
    if name_or_file not in names and not name_or_file.endswith((".yaml", ".yml")):
        hint = suggest(name_or_file, names)
        raise UserError(f"unknown table {name_or_file!r}{hint} (known: {', '.join(names)}, or give a YAML file)")
    path = ABLATIONS / f"{name_or_file}.yaml" if name_or_file in names else Path(name_or_file)
    return path.stem, validate(Ablation, read_yaml(path), str(path))
