"""Fixtures of all tests, here and in plumbing/."""
import shutil

import pytest
import torch

SMALLEST_SIZE = 32, (1, 1, 1, 1), 1  # of a decoder


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def tmp_path(tmp_path):
    """pytest's folder, emptied after the test: kept to the end, all checkpoints would come to many gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture
def smallest(monkeypatch):
    """Decoder XS is the smallest possible, also in the processes of test_all.run: for tests where any will do."""
    from model import SIZES
    monkeypatch.setitem(SIZES, "XS", SMALLEST_SIZE)
