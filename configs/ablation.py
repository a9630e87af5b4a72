"""A table of rows that differ in a few settings, and the claims about them."""

from typing import Literal

from pydantic import Field, model_validator

from configs.dataset import Section
from configs.load import find_yaml, known, read_yaml, suggest, validate


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
    return known("ablations")


def read_ablation(name_or_file: str) -> tuple[str, Ablation]:
    """A table's name and content, by its name in configs/ablations or by its file.

    Raises:
        UserError: there is no such table, or the file is not a table.
    """
    path = find_yaml("table", "ablations", name_or_file)
    return path.stem, validate(Ablation, read_yaml(path), str(path))
