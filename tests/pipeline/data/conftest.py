"""Fixtures of the data tests."""

from pathlib import Path

import pytest

from tests.pipeline.data.trees import Tree


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)
