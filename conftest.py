"""Fixtures of all tests, here and in plumbing/."""
import os
import shutil

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: maps are so small that a second thread only waits

import torch  # noqa: E402

SMALLEST_SIZE = 32, (1, 1, 1, 1), 1  # of a decoder
SMALLEST_GAN = (32,)                 # channels


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
    """Decoder XS and the discriminator are as small as can be, in the processes of test_all.run, too: for tests where
    any will do."""
    from losses import PatchGAN
    from model import SIZES
    monkeypatch.setitem(SIZES, "XS", SMALLEST_SIZE)
    monkeypatch.setattr(PatchGAN.__init__, "__defaults__", SMALLEST_GAN)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No cached networks, and no way to download one."""
    for name in ("TORCH_HOME", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name, value in (("HF_HUB_OFFLINE", "1"), ("no_proxy", ""), ("NO_PROXY", "")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or it tries for most of a minute


@pytest.fixture
def checkpoint(tmp_path_factory, smallest):
    """A small model with random weights: its file."""
    from model import DCSSDAE
    model = DCSSDAE("dc_f8c4", "XS", enc_width=0.0625, depth=1, loss="eqm", notes={"size": 32, "w_lpips": 0})
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    model.save(path)
    return path
