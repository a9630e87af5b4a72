"""Fixtures of the tests of the learning modules."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Parameters and dropout are the same in every run."""
    torch.manual_seed(0)
