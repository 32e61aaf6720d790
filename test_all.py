"""Tests of what users rely on: the mathematics, equivalences, parity with independent implementations, every command.

    python -m pytest                                                       # no network, no GPU; 6 to 12 minutes
    python -m pytest -k slow & python -m pytest -k "not slow" && wait $!   # half as long, on two cores

Published weights, fast forms, runs that are stopped or go wrong, files and optimisers: plumbing/test_*.py.

Tests that compare with another library are skipped where it is not installed. Networks whose weights would have to be
downloaded (VGG-16, DINOv2, Inception) stand here with random weights, given as files.
"""
import atexit
import contextlib
import csv
import errno
import functools
import hashlib
import importlib
import importlib.util
import io
import json
import math
import multiprocessing.connection
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import data
import distill
import evaluate
import fid
import losses
import model as model_module
import sampler
import train
from conftest import SMALLEST_GAN, SMALLEST_SIZE
from encoder import (
    DiagonalGaussian,
    LappedCode,
    lapped_basis,
    lapped_tables,
    make_encoder,
    parse_name,
)
from examples import generate, toy
from losses import EqM, PatchGAN, fm_mix, hinge_loss
from model import (
    DCSSDAE,
    LEAST_CONTRAST,
    OUTPUT_GAIN,
    RIDGES,
    SIZES,
    LatentNorm,
    UViT,
    local_contrast,
    pad_to_multiple,
)
from plumbing import checkpoint as checkpoint_module
from plumbing import process
from plumbing.checkpoint import load_checkpoint
from plumbing.files import WeightsUnavailable
from tools import bench, check, compare, field, latents, proxies, study, sweep

# ---------------------------------------------------------------------------------------------------------------------
# Helpers and fixtures that several sections share

HERE = os.path.dirname(os.path.abspath(__file__))
TOOLS = sorted(f"tools.{path.stem}" for path in Path(HERE, "tools").glob("[!_]*.py"))
EXAMPLE = Path(HERE, "examples", "f32c32.safetensors")
torch.set_num_threads(1)  # a second one wins nothing on small tensors, and beside other work it waits for a core


def slow(test):
    """Marks the longest tests, half of the whole time: pytest -k slow and -k "not slow" can run side by side."""
    test.slow = True
    return test


def relative_error(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def randomise(module, seed=0, scale=1.0):
    """Random values in every parameter and statistic, zero-initialised ones too; sizes that keep activations near 1."""
    g = torch.Generator().manual_seed(seed)
    for name, p in list(module.named_parameters()) + list(module.named_buffers()):
        if p.is_floating_point():
            fan = p[0].numel() if p.ndim > 1 else 4
            p.data.copy_(scale * torch.randn(p.shape, generator=g) / fan ** 0.5)
            if name.endswith("running_var"):
                p.data.abs_().add_(0.5)
            elif p.ndim == 1 and name.endswith("weight"):
                p.data.add_(1.0)
    return module


# Pictures

def photo(w, h, seed=0):
    """A smooth RGB picture with different corners."""
    return Image.fromarray(data.demo_image(64, seed, "val", 0)).resize((w, h), Image.BICUBIC)


def folder_of(path, n=6, size=(48, 40), ext="png"):
    path.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        photo(*size, seed=i).save(path / f"{i:02d}.{ext}")
    return str(path)


def demo_batch(n=3, size=48):
    """Demo images with more in them than noise: (n, 3, size, size) in [-1, 1]."""
    return torch.stack([data.make_dataset("demo", size, train=False, limit=n)[i][0] for i in range(n)])


def take(loader, n):
    """The first n batches. The readers end at once: for one whose error is still held torch would wait, 5 to 10 s."""
    try:
        return [(x.clone(), index.clone()) for _, (x, index) in zip(range(n), loader)]
    finally:
        for child in multiprocessing.active_children():
            if type(child).__name__ != "ForkServerProcess":
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise an error that it is gone
                child.kill()


def same_batches(a, b):
    """Two lists of (x, index) batches are equal, bit by bit."""
    pairs = [(p, q) for one, two in zip(a, b, strict=True) for p, q in zip(one, two, strict=True)]
    return all(torch.equal(p, q) for p, q in pairs)


# Commands

def cli(*args, nproc=None, timeout=300):
    """Run a program in an interpreter of its own, under torchrun with `nproc`; returns its output. `run`, below, starts
    one without the seconds that importing torch takes."""
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={nproc}", "--standalone"] if nproc else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore",
                                "PYTHONPATH": HERE}
    done = subprocess.run([sys.executable, *launch, *map(str, args)], cwd=HERE, env=environment, check=False,
                          capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# aside(function, arguments ...) calls it beside what follows; its .result() waits for the end. For what waits for other
# processes: one of two cores would be idle.
aside = ThreadPoolExecutor().submit


def command(program, *args, ok=True):
    """Run a command line in this process: for what `cli` or `run` has shown to start. program: a file, "tools.NAME", or
    a module. ok=False: it must end with one sentence, which is returned."""
    module = program if isinstance(program, types.ModuleType) else importlib.import_module(program.removesuffix(".py"))
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)}
    text, code = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True), None
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        patch.setattr(sys, "argv", [module.__file__, *map(str, args)])
        try:
            process.guarded(module.main)
        except SystemExit as stop:
            code = stop.code
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)
            while checkpoint_module.held_locks:  # the command's, which would be gone with its process
                checkpoint_module.held_locks.pop().close()
    output = text.buffer.getvalue().decode()
    if ok:
        assert not code, (code, output)
        return output
    assert isinstance(code, str) and code.startswith("error: ") and "\n" not in code, (code, output)
    return code


def sentence(program, *args):
    return command(program, *args, ok=False)


# Models and runs

TINY = ["--preset", "tiny", "--device", "cpu", "--dtype", "float32", "--workers", 0, "--batch_size", 4,
        "--eval_images", 2, "--log_every", 1, "--enc_width", 0.0625, "--depth", 1]
SMALL = [*TINY, "--decay", 0, "--warmup", 2, "--size", 24, "--eval_every", 3, "--save_every", 2, "--eval_steps", 1]
DISTILL = ["--teacher_steps", 2, "--batch_size", 4, "--eval_images", 2, "--log_every", 1, "--device", "cpu", "--dtype",
           "float32", "--workers", 0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny run of train.py in two processes of torchrun's: its folder."""
    out = tmp_path_factory.mktemp("runs") / "eqm"
    output = cli("train.py", *TINY, "--steps", 2, "--eval_every", 1, "--out", out, nproc=2)
    assert "PSNR" in output and "saved" in output
    return out


def latest(folder):
    return load_checkpoint(folder / "latest.pt")


def same_weights(a, b):
    """The newest checkpoints of two runs are equal, bit by bit: weights, average, the optimisers' memory."""
    a, b = latest(a), latest(b)
    parts = ("model", "ema", "gan", "repa", "vf")
    same = [torch.equal(a[part][k], b[part][k]) for part in parts for k in a.get(part) or ()]
    for part in ("optimizer", "muon", "gan_optimizer"):
        for k, state in (a.get(part) or {"state": {}})["state"].items():
            same += [torch.equal(value, b[part]["state"][k][name]) for name, value in state.items()]
    return all(same)


def lines_of(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


def step_lines(folder):
    """The lines of a run's log that hold a training step, without evaluations."""
    return [line for line in lines_of(folder / "log.jsonl") if "loss" in line]


# Networks with random weights

@contextlib.contextmanager
def no_values():
    """Layers start at zero, which saves seconds: where values are replaced or do not count."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("kaiming_uniform_", "kaiming_normal_", "uniform_", "normal_"):
            patch.setattr(nn.init, name, lambda weight, *args, **kwargs: nn.init.zeros_(weight))
        yield


@pytest.fixture(scope="session")
def vgg_file(tmp_path_factory):
    import torchvision
    with torch.device("meta"):  # the classifier, nine tenths of VGG-16, is not needed
        features = torchvision.models.vgg16(weights=None).features
    features.to_empty(device="cpu")
    torch.manual_seed(0)
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight), nn.init.zeros_(layer.bias)
    path = tmp_path_factory.mktemp("nets") / "vgg16.pth"
    torch.save({f"features.{k}": v for k, v in features.state_dict().items()}, path)
    return path


@pytest.fixture(scope="session")
def short_dino_file(tmp_path_factory):
    timm = pytest.importorskip("timm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", functools.partial(timm.create_model, depth=2))
        state = fid.empty_network("vit_base_patch14_dinov2.lvd142m", num_classes=0).state_dict()
    g, path = torch.Generator().manual_seed(0), tmp_path_factory.mktemp("dino") / "dino.pth"
    torch.save({k: torch.randn(v.shape, generator=g) * 0.02 + (".gamma" in k or "norm" in k and "weight" in k)
                for k, v in state.items()}, path)
    return path


@pytest.fixture
def dino_file(short_dino_file, monkeypatch):
    """DINOv2 with two of its twelve blocks, also where timm makes it: the names and the rest are those of the whole."""
    import timm
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, depth=2))
    return short_dino_file


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Random weights in the layout of FID's Inception, scaled so that features neither vanish nor explode."""
    torch.manual_seed(0)
    net = nn.Module()
    for name, conv in {"1a_3x3": (3, 32, 3, 2, 0), "2a_3x3": (32, 32, 3, 1, 0), "2b_3x3": (32, 64, 3),
                       "3b_1x1": (64, 80, 1), "4a_3x3": (80, 192, 3, 1, 0)}.items():
        net.add_module("Conv2d_" + name, fid.Conv(*conv))
    for name, *row in fid.MIXED:
        net.add_module(name, fid.Mixed(*row))
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight)
        elif isinstance(m, nn.BatchNorm2d):
            m.running_mean.uniform_(-0.2, 0.2), m.running_var.uniform_(0.5, 1.5), m.bias.data.uniform_(-0.1, 0.3)
    state = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}  # as in the real file
    state |= {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(state, path)
    return path


class TinyInception(nn.Module):
    """In the place of fid.InceptionFeatures where its size is not the point."""
    dim, sha256 = 16, "0" * 64

    def __init__(self, weights=None):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 16, 8)

    def forward(self, x):
        return self.conv(x).tanh().mean((2, 3)).detach()


# Programs in processes of their own, forked from a server that has imported torch, which takes seconds

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__, "torch._dynamo"])


def child(module, argv, cwd, env, output, sabotage):
    """`python -m module argv` in a child process. sabotage: {step: name of a signal, "nan" or "lost"} for this rank,
    when that step draws its noise, or its images."""
    os.environ.update(env, CUDA_VISIBLE_DEVICES="")
    os.chdir(cwd)
    if "SMALLEST" in env:
        SIZES["XS"], PatchGAN.__init__.__defaults__ = SMALLEST_SIZE, SMALLEST_GAN
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore it
    multiprocessing.set_start_method("fork", force=True)  # of the data loader's workers, as everywhere else
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(output, "w", buffering=1)  # noqa: SIM115 until the process ends
    sys.argv[1:] = map(str, argv)
    draw, next_batch = losses.draw, checkpoint_module.Run.next_batch

    def drawing(seed, step, *rest):
        e, eps, level = draw(seed, step, *rest)
        what = sabotage.get(step, "")
        if what.startswith("SIG"):
            # torchrun and schedulers signal the loader's workers, too
            workers = [] if what == "SIGKILL" else [worker.pid for worker in multiprocessing.active_children()]
            for pid in (*workers, os.getpid()):
                os.kill(pid, getattr(signal, what))
            time.sleep(0.1)
        return (e * math.nan if what == "nan" else e), eps, level

    def losing(run, batches):
        def lost():
            raise OSError(errno.ESTALE, "Stale file handle")
            yield
        return next_batch(run, lost() if sabotage.get(run.done) == "lost" else batches)

    losses.draw = drawing
    checkpoint_module.Run.next_batch = losing
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # which forked children skip


def run(folder, *argv, module="train", world=1, cwd=HERE, env=None, sabotage=None, ok=(0,)):
    """`python -m module argv` on `world` processes; (exit codes, which must be in ok, output of rank 0). sabotage:
    {rank: {step: what}}."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(exist_ok=True)
    shared = dict(env or {})
    if SIZES["XS"] == SMALLEST_SIZE:  # a test's patch holds in its children, too
        shared["SMALLEST"] = "1"
    processes = []
    for rank in range(world):
        own = {}
        if world > 1:
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port)}
        arguments = module, argv, cwd, shared | own, str(folder / f"output{rank}"), (sabotage or {}).get(rank, {})
        processes.append(FORKS.Process(target=child, args=arguments))
        processes[-1].start()
    deadline = time.time() + 300
    while any(p.is_alive() for p in processes):
        multiprocessing.connection.wait([p.sentinel for p in processes if p.is_alive()], timeout=1)
        if time.time() > deadline or any(p.exitcode == -signal.SIGKILL for p in processes):
            for p in processes:  # as torchrun does
                p.kill()
    codes, output = [p.exitcode for p in processes], (folder / "output0").read_text()
    assert all(code in ok for code in codes), (codes, output)
    return codes, output


def pixels(x):
    """(3, H, W) in [-1, 1] -> (H, W, 3) in 0..255."""
    return ((x + 1) * 127.5).permute(1, 2, 0).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# data.py: the built-in images
# The same in every process, varied, and with the statistics of photographs.

def test_demo_is_pure_and_varied():
    a = data.demo_image(32, 0, "train", 5)
    assert a.shape == (32, 32, 3) and a.dtype == np.uint8
    data.demo_image(64, 3, "val", 9)
    assert np.array_equal(a, data.demo_image(32, 0, "train", 5))
    for seed, split, index in ((0, "train", 6), (0, "val", 5), (1, "train", 5)):
        assert np.abs(a.astype(int) - data.demo_image(32, seed, split, index)).mean() > 5
    # the same arrangement at twice the size
    big = np.asarray(Image.fromarray(data.demo_image(64, 0, "train", 5)).reduce(2)).astype(float)
    assert np.corrcoef(big.ravel(), a.ravel())[0, 1] > 0.8


def test_demo_statistics():
    x = np.stack([data.demo_image(64, 0, "train", i) for i in range(100)]).astype(float)
    assert x.min() < 10 and x.max() > 245 and 70 < x.mean() < 180 and x.std((1, 2, 3)).min() > 3
    x = x.mean(-1)
    x = (x - x.mean((1, 2), keepdims=True)) * np.hanning(64)[:, None] * np.hanning(64)
    power = (np.abs(np.fft.fft2(x)) ** 2).mean(0)
    f = np.hypot(*np.meshgrid(np.fft.fftfreq(64) * 64, np.fft.fftfreq(64) * 64)).round()
    slope = np.polyfit(np.log(np.arange(2, 32)), [np.log(power[f == k].mean()) for k in range(2, 32)], 1)[0]
    assert -3.5 < slope < -2.3                             # photographs: about -3 at this size
    assert 0.02 < power[f >= 8].sum() / power.sum() < 0.5  # detail is there and does not dominate


def test_demo_dataset():
    train, val = data.make_dataset("demo", 32, True), data.make_dataset("demo", 32, False)
    assert len(train) == 100_000 and len(val) == 2_000 and train.labels[0] == -1
    x, i = train[7]
    assert i == 7 and x.shape == (3, 32, 32) and x.dtype == torch.float32 and x.is_contiguous()
    assert -1 <= x.min() < x.max() <= 1
    assert torch.equal(x, train[(0, 7)][0])
    plain = torch.from_numpy(data.demo_image(32, 0, "train", 7).copy()).permute(2, 0, 1) / 127.5 - 1
    flips = [torch.equal(train[(e, 7)][0], plain.flip(-1)) for e in range(12)]
    assert any(flips) and not all(flips)                   # the epoch decides
    assert all(torch.allclose(train[(e, 7)][0], plain.flip(-1) if f else plain) for e, f in enumerate(flips))
    unchanged = data.make_dataset("demo", 32, train=False, split="train", limit=3)
    for dataset, split, i in ((val, "val", 3), (unchanged, "train", 1)):
        picture = data.demo_image(32, 0, split, int(dataset.images[i]))
        assert np.allclose(pixels(dataset[i][0]), picture, atol=1e-3)
    with pytest.raises(IndexError):
        val[2000]


def test_preview_command(tmp_path):
    """Another process makes the same built-in images."""
    common = ["--size", 16, "--rows", 3, "--out", tmp_path / "grid.png"]
    run(tmp_path / "o", *common, "--split", "val", module="data")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (3 * 18 + 2, 3 * 18 + 2, 3)
    for i in range(9):
        top, left = 2 + 18 * (i // 3), 2 + 18 * (i % 3)
        assert np.array_equal(grid[top:top + 16, left:left + 16], data.demo_image(16, 0, "val", i))
    assert "train: 100000 images of demo, part train, 9 of them in" in command(data, *common)
    assert not np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), grid)  # training images
    assert "there is no folder" in sentence(data, *common, "--data", tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------------------------------------
# data.py: the stream of batches
# The order of images depends on seed and step alone, whatever the processes and workers.

def test_stream_workers_world_resume(tmp_path):
    train = data.make_dataset(folder_of(tmp_path / "a", 10), 16, True, seed=3)
    one = take(data.make_loader(train, 4, True, seed=3), 7)
    assert all(x.shape == (4, 3, 16, 16) and i.dtype == torch.int64 for x, i in one)
    assert same_batches(one, take(data.make_loader(train, 4, True, seed=3), 7))
    assert same_batches(one, take(data.make_loader(train, 4, True, workers=2, seed=3), 7))
    ranks = [take(data.make_loader(train, 4, True, seed=3, rank=r, world=2), 7) for r in range(2)]
    assert same_batches(one, [tuple(torch.cat(p) for p in zip(a, b, strict=True)) for a, b in zip(*ranks, strict=True)])
    assert same_batches(one[3:], take(data.make_loader(train, 4, True, seed=3, start=3), 4))
    assert not same_batches(one, take(data.make_loader(train, 4, True, seed=4), 7))
    order = torch.cat([i for _, i in one])                 # 28 positions: epochs of 10
    for e in range(2):
        assert sorted(order[10 * e:10 * e + 10].tolist()) == list(range(10))
    assert order[:10].tolist() != order[10:20].tolist()


def test_images_cross_processes_in_8_bit_and_become_numbers_on_the_device():
    dataset = data.make_dataset("demo", 16, train=True)
    (levels, i), = dataset.__getitems__([(0, 3)])
    x, _ = dataset[3]
    assert levels.dtype == np.uint8 and i == 3 and torch.equal(x, torch.from_numpy(levels).float() / 127.5 - 1)
    batch, index = next(iter(data.make_loader(dataset, 4, train=False)))
    assert torch.equal(batch, torch.stack([dataset[int(i)][0] for i in index]))
    assert next(iter(data.make_loader(dataset, 4, train=False, device="meta")))[0].is_meta


def test_batches_need_no_shared_memory(monkeypatch):
    """In a container /dev/shm is small; where it is full, torch prints an error and the batch is lost."""
    dataset = data.make_dataset("demo", 16, True)
    want = take(data.make_loader(dataset, 4, True), 3)

    def full(*args):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device")

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)
    monkeypatch.setattr(torch.UntypedStorage, "_share_filename_cpu_", full)
    assert same_batches(want, take(data.make_loader(dataset, 4, True, workers=2), 3))


def test_readers_without_the_names_of_posix(tmp_path):
    """As on Windows: names that it lacks are hidden, and readers start anew instead of being forked."""
    (tmp_path / "run.py").write_text("""
import os, signal, sys
import torch
for module, names in ((signal, ("SIGCHLD", "SIGUSR1", "SIGHUP", "SIGKILL")), (os, ("sched_getaffinity", "fork"))):
    for name in names:
        vars(module).pop(name, None)
sys.modules["fcntl"] = sys.modules["resource"] = None
torch.utils.data._utils.signal_handling.IS_WINDOWS = True
import data

if __name__ == "__main__":
    dataset = data.make_dataset("demo", 16, True)
    one, other = (data.make_loader(dataset, 4, True, workers=workers) for workers in (0, 1))
    other.multiprocessing_context = "spawn"
    print("same:", torch.equal(next(iter(one))[0], next(iter(other))[0]))
""")
    assert "same: True" in cli(tmp_path / "run.py")


def test_fewer_images_than_batch_and_the_callers_random_state():
    before = torch.get_rng_state()
    (x, index), = take(data.make_loader(data.make_dataset("demo", 16, True, limit=3), 8, True), 1)
    assert x.shape[0] == 8 and sorted(index[:3].tolist()) == [0, 1, 2] == sorted(index[3:6].tolist())
    assert torch.equal(before, torch.get_rng_state())


def test_eval_order_and_ranks():
    dataset = data.make_dataset("demo", 16, False, limit=7)
    assert [i.tolist() for _, i in data.make_loader(dataset, 3, False)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [i.tolist() for _, i in data.make_loader(dataset, 4, False, rank=1, world=2)] == [[1, 3], [5]]
    assert same_batches(list(data.make_loader(dataset, 3, False)), list(data.make_loader(dataset, 3, False, workers=2)))
    assert list(data.make_loader(data.make_dataset("demo", 16, False, limit=1), 4, False, rank=1, world=2)) == []


def test_a_resized_picture_holds_the_crop():
    with pytest.raises(ValueError, match="aug_scale 0.5: below 1"):
        data.make_dataset("demo", 16, True, 0.5)


# ---------------------------------------------------------------------------------------------------------------------
# data.py: from a picture to an item

@pytest.mark.parametrize("crop", ["center", "adm"])
def test_long_pictures_cost_little(crop, monkeypatch):
    size = 32
    for w, h in ((900, 40), (40, 900), (700, 130)):
        monkeypatch.setattr(data, "LONGEST", 100)
        whole = np.asarray(data.prepare_eval(photo(w, h), size, crop)).astype(int)
        monkeypatch.setattr(data, "LONGEST", 2)
        assert np.abs(np.asarray(data.prepare_eval(photo(w, h), size, crop)) - whole).max() <= 1
    for side in range(1, 40):                              # no rounding leads beyond the border
        assert data.prepare_eval(Image.new("RGB", (20 * side, side)), 100, crop).size == (100, 100)
    monkeypatch.undo()
    largest, resize = [0], Image.Image.resize

    def spy(self, *args, **kwargs):
        out = resize(self, *args, **kwargs)
        largest.append(out.width * out.height)
        return out

    monkeypatch.setattr(Image.Image, "resize", spy)
    for shape in ((20_000, 2), (2, 20_000)):
        long = Image.new("RGB", shape)
        prepared = data.prepare_eval(long, 256, crop), data.prepare_train(long, 256, 256, [0.5] * 3)
        assert [image.size for image in prepared] == [(256, 256)] * 2
    assert max(largest) <= 16 * 256**2


def test_jpegs_are_decoded_smaller_in_training_only(tmp_path, monkeypatch):
    photo(1000, 640).save(tmp_path / "a.jpg", quality=95)
    sizes, read = [], data.read_image

    def spy(*args):
        image = read(*args)
        sizes.append(image.size)
        return image

    monkeypatch.setattr(data, "read_image", spy)
    train, val = (data.make_dataset(str(tmp_path), 64, t, aug_scale=2.0) for t in (True, False))
    for epoch in range(12):
        u = np.random.default_rng([data.ITEM, 0, epoch, 0]).random(4)
        reduced = pixels(train[(epoch, 0)][0])
        full = np.asarray(data.prepare_train(read(tmp_path / "a.jpg"), 64, 64 * (1 + u[3]), u)).astype(float)
        assert np.abs(reduced - full).mean() < 4, epoch
    assert set(sizes) == {(125, 80), (250, 160)}           # an eighth, or a quarter where an eighth is not enough
    sizes.clear()
    val[0]
    assert sizes == [(1000, 640)]


def test_training_crops(tmp_path):
    ramp = np.zeros((200, 400, 3), np.uint8)               # red counts columns, green rows
    ramp[..., 0], ramp[..., 1] = np.linspace(0, 255, 400)[None], np.linspace(0, 255, 200)[:, None]
    Image.fromarray(ramp).save(tmp_path / "a.png")
    dataset = data.make_dataset(str(tmp_path), 50, True, aug_scale=2.0)
    heights, flips, starts = [], 0, []
    for epoch in range(200):
        x = pixels(dataset[(epoch, 0)][0])
        heights.append((x[-1, 0, 1] - x[0, 0, 1]) / 255 * 50 / 49)            # the crop's share of the short side
        flips += x[0, 0, 0] > x[0, -1, 0]
        starts.append(min(x[0, 0, 0], x[0, -1, 0]) / 255)
    shares = 1 / np.array(heights)                         # = short / size, uniform in [1, 2]
    assert 0.97 < shares.min() < 1.06 and 1.9 < shares.max() < 2.1 and abs(shares.mean() - 1.5) < 0.08
    assert 60 < flips < 140 and min(starts) < 0.05 and max(starts) > 0.5
    one = data.make_dataset(str(tmp_path), 50, True, aug_scale=1.0)
    assert all(abs(pixels(one[(e, 0)][0])[:, 0, 1].mean() - 127.5) < 1 for e in range(5))


def test_training_crops_end_at_the_pictures_own_pixels(tmp_path, monkeypatch):
    folder_of(tmp_path, 1, (80, 60))
    shorts, prepare = [], data.prepare_train
    monkeypatch.setattr(data, "prepare_train", lambda image, size, short, u: (shorts.append(short),
                                                                              prepare(image, size, short, u))[1])
    for size, enlarge, low, high in ((40, False, 40, 60), (40, True, 60, 80), (64, False, 64, 64), (64, True, 64, 128)):
        shorts.clear()
        dataset = data.make_dataset(str(tmp_path), size, True, enlarge=enlarge)
        for epoch in range(60):
            dataset[(epoch, 0)]
        assert min(shorts) >= size and max(shorts) <= (2 * size if enlarge else max(size, 60))
        assert low <= max(shorts) <= high
        assert enlarge or size > 60 or 10 < shorts.count(60) < 50  # half of the draws lie above


@pytest.mark.parametrize("w,h", [(301, 200), (97, 330), (64, 64), (20, 33), (500, 129), (31, 30)])
def test_prepare_eval_against_references(w, h):
    from torchvision import transforms
    image, size = photo(w, h), 32
    pipe = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size)])
    assert np.array_equal(np.asarray(data.prepare_eval(image, size)), np.asarray(pipe(image)))
    # ADM's center_crop_arr, written out
    small = image
    while min(*small.size) >= 2 * size:
        small = small.resize(tuple(v // 2 for v in small.size), resample=Image.BOX)
    scale = size / min(*small.size)
    small = np.array(small.resize(tuple(round(v * scale) for v in small.size), resample=Image.BICUBIC))
    y, x = (small.shape[0] - size) // 2, (small.shape[1] - size) // 2
    assert np.array_equal(np.asarray(data.prepare_eval(image, size, "adm")), small[y:y + size, x:x + size])
    with pytest.raises(ValueError, match="crop"):
        data.prepare_eval(image, size, "left")


# ---------------------------------------------------------------------------------------------------------------------
# data.py: files that cannot be read
# A broken file is named, counted and replaced; an error of the disk ends the run.

def broken_folder(path):
    folder_of(path, 6, (80, 60), "jpg")
    (path / "01.jpg").write_bytes((path / "01.jpg").read_bytes()[:900])       # truncated
    (path / "02.jpg").write_bytes(b"")
    (path / "05.jpg").unlink()
    (path / "05.jpg").symlink_to(path / "nowhere.jpg")
    return str(path)


def warned(capfd):
    """The last words of each warning's file name, sorted."""
    lines = capfd.readouterr().err.splitlines()
    assert all(line.startswith("warning: skipping unreadable image ") for line in lines), lines
    return sorted(line.split(".jpg: ")[0][-2:] for line in lines)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_in_evaluation(tmp_path, capfd, workers):
    dataset = data.make_dataset(broken_folder(tmp_path / "a"), 24, False)
    assert [i.tolist() for _, i in data.make_loader(dataset, 2, False, workers=workers)] == [[0], [3], [4]]
    assert [i.tolist() for _, i in data.make_loader(dataset, 1, False, workers=workers)] == [[0], [3], [4]]
    assert dataset[1] is None and dataset.skipped.tolist() == [0, 1, 1, 0, 0, 1]
    assert warned(capfd) == ["01", "02", "05"]             # once a file


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_in_training(tmp_path, capfd, workers):
    dataset = data.make_dataset(broken_folder(tmp_path / "a"), 24, True)
    batches = take(data.make_loader(dataset, 6, True, workers=workers), 3)
    assert all(len(x) == 6 and sorted(i.tolist()) == list(range(6)) for x, i in batches)
    assert int(dataset.skipped.sum()) == 3 and set(warned(capfd)) == {"01", "02", "05"}
    again = take(data.make_loader(data.make_dataset(str(tmp_path / "a"), 24, True), 6, True, workers=2 - workers), 3)
    assert same_batches(batches, again)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable(tmp_path, monkeypatch, workers):
    for i in range(5):
        (tmp_path / f"{i:02d}.jpg").write_bytes(b"x")
    val = data.make_dataset(str(tmp_path), 24, False)
    assert list(data.make_loader(val, 2, False, workers=workers)) == [] and val.skipped.all()
    for most in (64, 4):                                   # one item does not walk through a whole set
        monkeypatch.setattr(data, "STAND_INS", most)
        train = data.make_dataset(str(tmp_path), 24, True)
        with pytest.raises(ValueError, match=r"^too few images of .* can be decoded: check the files named above$"):
            take(data.make_loader(train, 2, True, workers=workers), 5)
        assert train.skipped.sum() >= min(5, most)


@pytest.mark.parametrize("train,workers", [(False, 0), (True, 0), (True, 1)])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error", "a.png"), PermissionError("no entry"),
                                   ValueError("one sentence: no more")])
def test_what_a_reader_meets_is_raised_in_one_sentence(tmp_path, monkeypatch, train, workers, error):
    dataset = data.make_dataset(folder_of(tmp_path, 8), 16, train)

    def fail(*args):
        raise error

    monkeypatch.setattr(data, "read_image", fail)
    with pytest.raises(type(error)) as raised:
        take(data.make_loader(dataset, 2, train, workers=workers), 9)
    assert str(raised.value) == str(error) and dataset.skipped.sum() == 0


def test_other_errors_of_a_reader_keep_their_traceback(tmp_path, monkeypatch):
    dataset = data.make_dataset(folder_of(tmp_path, 2), 16, True)

    def fail(*args):
        raise RuntimeError("the cause")

    monkeypatch.setattr(data, "read_image", fail)
    with pytest.raises(RuntimeError, match="(?s)Traceback.*in fail.*the cause"):
        take(data.make_loader(dataset, 2, True, workers=1), 9)


@pytest.mark.parametrize("train", [False, True])
def test_a_folder_that_vanishes(tmp_path, train):
    dataset = data.make_dataset(folder_of(tmp_path / "images", 3), 16, train)
    (tmp_path / "images").rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError):
        dataset[0]
    (tmp_path / "images").mkdir()                          # as where it was mounted
    with pytest.raises(FileNotFoundError):
        dataset[0]
    assert dataset.skipped.sum() == 0


# ---------------------------------------------------------------------------------------------------------------------
# data.py: folders and named sets
# Which images a --data names, which of them train and which validate, and their classes.

def test_what_counts_as_an_image(tmp_path, capfd):
    folder_of(tmp_path / "a" / "deep", 2)
    folder_of(tmp_path / "linked", 1, ext="jpg")
    for name in (".ipynb_checkpoints", "__MACOSX", "a/.hidden", "a/@eaDir"):
        folder_of(tmp_path / name, 1)
    for name in ("a/x.gif", "a/y.GIF", "labels.csv", "README", "a/.z.gif", "a/._b.jpg"):
        (tmp_path / name).write_text("")
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "linked")
    names = data.list_images(str(tmp_path / "a"))
    assert [os.path.relpath(name, tmp_path / "a") for name in names] == ["deep/00.png", "deep/01.png", "link/00.jpg"]
    data.list_images(str(tmp_path / "__MACOSX"))           # asked for by name
    capfd.readouterr()
    data.list_images(str(tmp_path)), data.list_images(str(tmp_path))
    note, = capfd.readouterr().err.splitlines()            # said once
    assert note.startswith(f"note: 4 files below {tmp_path} were left out, being of other types: 2 .gif, ")


@pytest.mark.parametrize("names,train,val", [
    (("train", "val"), "train", "val"),
    (("Train", "Validation"), "Train", "Validation"),
    (("training", "valid", "test"), "training", "valid"),  # test/ validates only where nothing else does
    (("train", "test"), "train", "test"),
    (("train", "val", "validation", "other"), "train", "val"),
    (("cat", "dog"), ".", "."),                            # one tree serves both
])
def test_parts_of_a_folder(tmp_path, names, train, val):
    for name in names:
        folder_of(tmp_path / name / "n01", 1, (8, 8))
    parts = [data.make_dataset(str(tmp_path), 8, training) for training in (True, False)]
    for part, name in zip(parts, (train, val), strict=True):
        assert os.path.normpath(part.source) == os.path.normpath(tmp_path / name)
        assert len(part) == (2 if name == "." else 1) and part.name_of(0).startswith(str(part.source))
    assert data.parts_taken(*parts).endswith("which train, too: there are no folders train/ and val/") == (train == ".")


def test_parts_are_named(tmp_path):
    for part in ("train", "test"):
        folder_of(tmp_path / part / "a", 3, (8, 8))
    train, val = data.make_dataset(str(tmp_path), 8, True), data.make_dataset(str(tmp_path), 8, False, limit=2)
    assert data.parts_taken(train, val) == (f"training on 3 images of {tmp_path}/train (1 classes); "
                                            f"validating on 2 of 3 images of {tmp_path}/test (1 classes)")


NFC, NFD = unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")
LABELLED = [
    # images, classes, labels in training, in validation
    ({"train/a": 1, "train/b": 2, "train/c": 1, "val/a": 1, "val/c": 2}, "abc", [0, 1, 1, 2], [0, 2, 2]),
    ({"train/a": 1, "val/a": 1, "val/d": 1}, "ad", [0], [0, 1]),              # a class of validation alone
    ({"train/n02/deep": 1, "train/n01": 1, "train": 1, "val/n02": 1}, ["n01", "n02"], [-1, 0, 1], [1]),
    ({"train/n01": 1, "val/images": 2}, ["n01"], [0], [-1, -1]),              # validation without classes
    ({"train/n01": 1, "val": 2}, ["n01"], [0], [-1, -1]),
    ({"cat": 2, "dog/big": 1}, ["cat", "dog"], [0, 0, 1], [0, 0, 1]),
    ({f"train/{NFC}": 1, f"val/{NFD}": 1, "val/f": 1}, ["f", NFC], [1], [1, 0]),  # one name, spelt in two ways
    ({NFC: 1, NFD: 1}, [NFC], [0, 0], [0, 0]),
]


@pytest.mark.parametrize("images,classes,train,val", LABELLED)
def test_labels(tmp_path, images, classes, train, val):
    for folder, n in images.items():
        folder_of(tmp_path / folder, n, (8, 8))
    for training, want in ((True, train), (False, val)):
        dataset = data.make_dataset(str(tmp_path), 8, training)
        assert dataset.classes == list(classes) and sorted(dataset.labels.tolist()) == sorted(want)
        for name, label in zip(dataset.images.tolist(), dataset.labels, strict=True):
            top = os.path.relpath(os.fsdecode(name), dataset.source).split("/")[0]
            assert label == -1 or unicodedata.normalize("NFC", top) == classes[label]


def test_labels_of_packed_folders(tmp_path):
    """EDM's and REPA's layout: 00000/, 00001/ ... are no classes."""
    for part, folder in (("train", "00000"), ("train", "00001"), ("val", "00000")):
        folder_of(tmp_path / part / folder, 2, (8, 8))
    labels = {"train": [["00000/00.png", 3], ["00000/01.png", 0], ["00001/01.png", 5]], "val": [["00000/01.png", 7]]}
    for part in labels:
        (tmp_path / part / "dataset.json").write_text(json.dumps({"labels": labels[part]}))
    train, val = (data.make_dataset(str(tmp_path), 8, training) for training in (True, False))
    assert train.labels.tolist() == [3, 0, -1, 5] and val.labels.tolist() == [-1, 7]
    assert train.classes == val.classes == [str(k) for k in range(8)]
    alone = data.make_dataset(str(tmp_path / "train"), 8, True)
    assert alone.labels.tolist() == [3, 0, -1, 5] and len(alone.classes) == 6
    for content, words in (('{"labels": null}', None), ('{"labels": [["a.png", [0.5]]]}', "should read"),
                           ("[1, 2]", "should read"), ("no JSON", "should read")):
        (tmp_path / "train" / "dataset.json").write_text(content)
        if words is None:                                  # packed without labels
            assert set(data.make_dataset(str(tmp_path / "train"), 8, True).labels) == {-1}
        else:
            with pytest.raises(ValueError, match=words):
                data.make_dataset(str(tmp_path / "train"), 8, True)


def test_training_images_without_augmentation(tmp_path):
    for part in ("train", "val"):
        folder_of(tmp_path / part / "n01", 2, (50, 40))
    dataset = data.make_dataset(str(tmp_path), 24, train=False, split="train")
    for i in range(2):
        want = np.asarray(data.prepare_eval(Image.open(dataset.name_of(i)), 24))
        assert "/train/" in dataset.name_of(i) and np.allclose(pixels(dataset[i][0]), want, atol=1e-3)


def test_limit_and_subset(tmp_path):
    spec = folder_of(tmp_path / "a", 6)
    dataset = data.make_dataset(spec, 16, False, limit=3)
    assert [os.path.basename(dataset.name_of(i)) for i in range(3)] == ["00.png", "02.png", "04.png"]
    assert len(dataset.skipped) == 3 and dataset.described() == f"3 of 6 images of {spec}"
    assert len(data.make_dataset(spec, 16, False, limit=100)) == 6
    part = dataset.subset(slice(1, 3))
    assert len(part) == 2 and torch.equal(part[0][0], dataset[1][0])


@pytest.mark.parametrize("folders,train,words", [
    ([], True, "there is no folder .*/set: give demo, imagenette, cifar10 or a folder of images"),
    (["train"], False, r"holds train/ but no val/: add it, or give .*/train, whose images then serve"),
    (["valid"], True, r"holds valid/ but no train/"),
    (["empty"], True, r"no images in .*/set: it needs files ending in .bmp"),
])
def test_clear_errors(tmp_path, folders, train, words):
    for folder in folders:
        folder_of(tmp_path / "set" / folder, 0 if folder == "empty" else 1, (8, 8))
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        data.make_dataset(str(tmp_path / "set"), 16, train)
    assert "\n" not in str(error.value)


def fake_sets(failure=None):
    """torchvision's two data sets, made on the spot, or failing."""
    def cifar10(root, train, download):
        if failure:
            raise failure
        n = 9 if train else 5
        images = np.random.default_rng(n).integers(0, 256, (n, 32, 32, 3), np.uint8)
        return types.SimpleNamespace(data=images, targets=[0] * n, classes=["airplane"])

    def imagenette(root, split, size, download):
        if failure:
            raise failure
        for part, n in (("train", 4), ("val", 2)):
            folder_of(Path(root) / f"imagenette2-{size[:3]}" / part / "n01440764", n, (40, 32), "jpeg")

    return types.SimpleNamespace(CIFAR10=cifar10, Imagenette=imagenette)


def test_named_sets(tmp_path, monkeypatch):
    import torchvision
    monkeypatch.setenv("DCSSDAE_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(torchvision, "datasets", fake_sets())
    for spec, sizes in (("cifar10", (9, 5)), ("imagenette", (4, 2))):
        for training, n in zip((True, False), sizes, strict=True):
            dataset = data.make_dataset(spec, 32, training)
            assert len(dataset) == n and dataset.labels.tolist() == [0] * n and len(dataset.classes) == 1
            (x, _), = take(data.make_loader(dataset, 2, training), 1)
            assert x.shape == (2, 3, 32, 32)
    raw = fake_sets().CIFAR10("", False, True).data
    assert np.allclose(pixels(data.make_dataset("cifar10", 32, False)[3][0]), raw[3], atol=1e-3)


@pytest.mark.parametrize("failure", [OSError("<urlopen error\nno network>"), RuntimeError("File not found.")])
def test_failed_download(tmp_path, monkeypatch, failure):
    import torchvision
    monkeypatch.setenv("DCSSDAE_DATA", str(tmp_path))
    monkeypatch.setattr(torchvision, "datasets", fake_sets(failure))
    for spec in ("cifar10", "imagenette"):
        with pytest.raises(OSError, match=f"cannot get {spec}.*check the network") as error:
            data.make_dataset(spec, 32, True)
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# encoder.py: posteriors and encoders
# Sizes, starts and values: against torch.distributions. Published encoders and decoders: plumbing/test_published.py.

def test_kl_against_torch_distributions():
    mean, logvar = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    posterior = DiagonalGaussian(mean, logvar)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (logvar / 2).exp()), normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    assert torch.allclose(posterior.kl(), expected, rtol=1e-5)
    assert losses.kl_loss(posterior) == pytest.approx(float(expected.mean()), rel=1e-5)
    assert DiagonalGaussian(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)).kl() == 0
    wild = DiagonalGaussian(mean, logvar * 1000)
    assert wild.logvar.min() >= -30 and wild.logvar.max() <= 20


def test_posterior_sample_moments_and_noise():
    posterior = DiagonalGaussian(torch.full((1, 1, 200, 200), 2.0), torch.full((1, 1, 200, 200), math.log(0.25)))
    z = posterior.sample(generator=torch.Generator().manual_seed(0))
    assert abs(z.mean() - 2) < 0.02 and abs(z.std() - 0.5) < 0.02
    assert torch.equal(posterior.sample(noise=torch.ones(1, 1, 200, 200)), torch.full((1, 1, 200, 200), 2.5))


def test_encoder_parameter_counts():
    with torch.device("meta"):
        count = {name: sum(p.numel() for p in make_encoder(name).parameters())
                 for name in ("vq_f8c4", "vq_f16c16", "dc_f32c32")}
        bare = sum(p.numel() for p in make_encoder("dc_f32c32", norm=False).parameters())
    assert count == {"vq_f8c4": 34_163_664, "vq_f16c16": 46_078_400, "dc_f32c32": 227_986_240 + 33_280}
    assert bare == 227_986_240


@pytest.mark.parametrize("enc", ["dc_f8c16", "dc_f32c32"])
def test_the_dc_encoder_starts_linear_and_with_what_is_coarse(enc):
    """Untrained, a least-squares fit from each latent pixel to its patch keeps more of smooth images than default
    convolutions leave of them."""
    torch.manual_seed(0)
    encoder = make_encoder(enc, 0.125).eval()
    f = encoder.downscale
    coarse = torch.randn(64, 3, f // 4 + 2, f // 4 + 2)
    images = F.interpolate(coarse, size=2 * f, mode="bicubic", antialias=True)      # little above 1/8 cycle a pixel
    with torch.no_grad():
        a, b, origin = (encoder(x).mean for x in (images[:4], images[4:8], torch.zeros_like(images[:1])))
        assert relative_error(encoder(images[:4] + images[4:8]).mean, a + b - origin) < 1e-5

        def explained(encoder):  # part of the variance of pixels that the latent holds, on images left out of the fit
            z, x = encoder(images).mean.movedim(1, -1), F.pixel_unshuffle(images, f).movedim(1, -1)
            z = F.pad((z - z.mean((0, 1, 2))) / z.std((0, 1, 2)), (0, 1), value=1.0)
            fit = torch.linalg.lstsq(z[16:].flatten(0, 2), x[16:].flatten(0, 2)).solution
            return 1 - (z[:16] @ fit - x[:16]).square().mean() / x[:16].var()

        smooth = explained(encoder)
        for module in encoder.modules():
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()
        assert smooth > 2 * explained(encoder)


@pytest.mark.parametrize("build, words", [
    *((lambda name=name: make_encoder(name), "unknown encoder")
      for name in ("dc_f32", "foo_f8c4", "dc_f12c4", "dc_f8c0", "DC_f8c4", "vq_f8c4x")),
    (lambda: make_encoder("dc_f8c4", 0.3), "width 0.3 turns"),
    (lambda: make_encoder("vq_f8c6", 0.25, kl_f16=True), "for f = 16, not 8"),
    (lambda: LappedCode(8, 193), "have 192 coefficients"),
    (lambda: UViT("XXS"), "unknown decoder size 'XXS'"),
    (lambda: DCSSDAE("vq_f8c4", loss="gan"), "unknown loss 'gan'"),
    *((lambda bad=bad: EqM(**bad), "unknown c 'cubic'|EqM needs")
      for bad in ({"c": "cubic"}, {"a": 1.0}, {"lam": 0.0}, {"b": math.inf})),
    (lambda: DCSSDAE("dc_f8c4", "XS", enc_width=0.0625, linear_decoder=4), "needs the input skip"),
])
def test_unknown_names_and_what_does_not_go_together(build, words):
    with pytest.raises(ValueError, match=words):
        build()


# ---------------------------------------------------------------------------------------------------------------------
# encoder.py, model.py: the linear code
# An untrained model is a linear code, and a trained one adds to it what that code leaves out.

@pytest.mark.parametrize("f", [8, 16, 32, 64, 128])
def test_the_lapped_basis_is_orthonormal_and_ordered(f):
    basis = lapped_basis(f)
    torch.testing.assert_close(basis @ basis.T, torch.eye(f, dtype=torch.float64), rtol=0, atol=1e-12)
    next_cell = basis[:, :f] @ basis[:, f:].T  # with the same vectors f pixels further
    assert next_cell.abs().max() < 1e-12
    pixels = torch.arange(2 * f, dtype=torch.float64)
    variance = ((basis @ 0.98 ** (pixels[:, None] - pixels).abs()) * basis).sum(1)  # of a first-order Markov line
    assert (variance[:8].diff() < 0).all()


@pytest.mark.parametrize("f, size", [(8, (24, 40)), (16, (16, 64)), (32, (64, 32))])
def test_the_lapped_code_is_exact_with_all_vectors_and_a_projection_with_fewer(f, size):
    g = torch.Generator().manual_seed(f)
    x = torch.randn(2, 3, *size, generator=g)
    whole = LappedCode(f, 3 * f * f)
    z = whole.encode(x)
    torch.testing.assert_close(whole.decode(z), x, rtol=0, atol=1e-5)
    part = LappedCode(f, 20)
    torch.testing.assert_close(part.encode(x), z[:, :20], rtol=0, atol=1e-5)
    torch.testing.assert_close(part.encode(part.decode(z[:, :20])), z[:, :20], rtol=0, atol=1e-5)
    # decode is encode's adjoint, but for the deviations that one divides by and the other multiplies with
    y, scaled = torch.randn(2, 20, *z.shape[2:], generator=g), part.on_cpu.deviation.square()
    torch.testing.assert_close((part.decode(y) * x).sum(), (y * scaled * part.encode(x)).sum(), rtol=1e-4, atol=1e-2)


@pytest.fixture(scope="module")
def demo_images():
    """Built-in images to fit to, and others: (400, 3, 64, 64) and (100, 3, 64, 64)."""
    fitted = data.make_dataset("demo", 64, train=True, limit=400)
    return torch.stack([fitted[i][0] for i in range(400)]).double(), demo_batch(100, 64).double()


@pytest.mark.parametrize("f, c", [(8, 4), (8, 16), (16, 16)])
def test_the_lapped_code_is_no_worse_than_principal_components(demo_images, f, c):
    fitted, x = demo_images
    patches = F.unfold(fitted, f, stride=f).mT.flatten(0, 1)
    mean = patches.mean(0)
    vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean)).eigenvectors[:, -c:]
    components = (F.unfold(x, f, stride=f).mT - mean) @ vectors @ vectors.T + mean
    components = F.fold(components.mT, (64, 64), f, stride=f)
    code = LappedCode(f, c)
    z = code.encode(x)
    lapped = code.decode(z).double()

    def quality(y):
        return -10 * ((y - x).square().mean((1, 2, 3)) / 4).log10().mean()  # dB

    assert quality(lapped) > quality(components) - 0.1
    deviations = z.std((0, 2, 3))
    assert deviations.min() > 0.4 and deviations.max() < 2


def test_the_lapped_code_is_the_same_in_a_model_of_bf16_and_under_torchs_defaults():
    """Latents of a file mean the same, whatever the default type and device are and the model is cast to."""
    lapped_basis.cache_clear(), lapped_tables.cache_clear()
    expected = lapped_tables(32, 32)
    lapped_basis.cache_clear(), lapped_tables.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            code = LappedCode(32, 32)
        model = DCSSDAE.load(EXAMPLE)
    finally:
        torch.set_default_dtype(torch.float32)
    for table, same in zip(code.tables(torch.device("cpu")), expected, strict=True):
        assert torch.equal(table, same) and table.dtype is same.dtype
    # In a model, too, and of the model's weights none is rounded.
    other, x = DCSSDAE.load(EXAMPLE), torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        assert torch.equal(model.encode(x).mean, other.encode(x).mean)
        assert torch.equal(model.bfloat16().encoder.code.encode(x), other.encoder.code.encode(x))


def test_a_model_without_memory_is_whole_once_its_weights_are_loaded():
    """No tensor that counts is outside the state dict: also on the meta device, and after to_empty()."""
    model, x = DCSSDAE.load(EXAMPLE), torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.device("meta"):
        empty = DCSSDAE(**model.config)
    empty = empty.to_empty(device="cpu").eval()
    empty.load_state_dict(model.state_dict())
    noise = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(empty(x, steps=2, noise=noise), model(x, steps=2, noise=noise))


@pytest.mark.parametrize("enc, steps", [("dc_f32c32", (1, 4)), ("vq_f8c4", (1, 25)), ("dc_f64c128", (1,))])
@pytest.mark.parametrize("loss", ["fm", "eqm"])
def test_an_untrained_model_is_the_linear_code(enc, steps, loss, smallest):
    torch.manual_seed(0)
    _, f, c = parse_name(enc)
    model = DCSSDAE(enc, "XS", loss, 0.125, depth=1, input_skip=True, linear_encoder=True, linear_decoder=c).eval()
    code = LappedCode(f, c)
    x = torch.rand(1, 3, f, 2 * f, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        z = model.encode(x).mode()
        torch.testing.assert_close(z, code.encode(x), rtol=0, atol=1e-5)
        for n in steps:
            atol = 2e-4 if loss == "fm" and n == 25 else 1e-5  # FM's last steps are from below T_LEAST
            torch.testing.assert_close(model.decode(z, n), code.decode(z), rtol=0, atol=atol)


def rows_and_coefficients(model, batches, code):
    """Latents of all cells with a column of ones, and the cells' lapped coefficients: float64 arrays."""
    with torch.no_grad():
        z = torch.cat([model.encode(x).mode() for x in batches]).double()
        c = torch.cat([code.encode(x) for x in batches]).double()
    z, c = (t.permute(0, 2, 3, 1).flatten(0, 2).numpy() for t in (z, c))
    return np.concatenate([z, np.ones((len(z), 1))], 1), c


def by_ridge(z, c, ridge):
    """Least squares with the ridge as further equations; the last column, ones, is free of it."""
    root = np.sqrt(ridge * np.mean(np.sum(z * z, 0)[:-1])) * np.eye(z.shape[1])
    root[-1, -1] = 0
    found, *_ = np.linalg.lstsq(np.concatenate([z, root]), np.concatenate([c, np.zeros((len(root), c.shape[1]))]))
    return found


def test_the_linear_decoder_is_fitted_by_least_squares():
    """With the ridge that explains held-out images best; what it leaves there is the network's share."""
    torch.manual_seed(0)
    model = DCSSDAE("dcae_f32c32", "XS", "eqm", 0.125, depth=1, input_skip=True, linear_decoder=40).eval()
    dataset = data.make_dataset("demo", 64, train=False, limit=64)
    x = torch.stack([dataset[i][0] for i in range(64)])
    batches, code = [*x.split(8)], LappedCode(32, 40)
    model.fit_linear_decoder(batches)
    z, c = rows_and_coefficients(model, [x for i, x in enumerate(batches) if i % 4 != 3], code)
    z_out, c_out = rows_and_coefficients(model, batches[3::4], code)
    pixels = code.tables(torch.device("cpu")).deviation.flatten().double().numpy()
    errors = {r: np.sum(((z_out @ by_ridge(z, c, r) - c_out) * pixels) ** 2) for r in RIDGES}
    best = min(errors, key=errors.get)
    expected = by_ridge(np.concatenate([z, z_out]), np.concatenate([c, c_out]), best)
    np.testing.assert_allclose(model.decoder.base.weight[:, :, 0, 0].detach().numpy().T, expected[:-1], atol=1e-4)
    np.testing.assert_allclose(model.decoder.base.bias.detach().numpy(), expected[-1], atol=1e-4)
    unexplained = np.mean((z_out @ by_ridge(z, c, best) - c_out) ** 2, 0) / np.var(c_out, 0)
    np.testing.assert_allclose(model.decoder.revision[:, 0, 0].detach().numpy(), unexplained.clip(0, 1), atol=1e-4)
    assert errors[best] < errors[RIDGES[0]]  # 192 cells for 32 channels: without a ridge it would fit their noise
    with pytest.raises(ValueError, match="no linear decoder"):
        DCSSDAE("vq_f8c4", "XS", enc_width=0.125, depth=1).fit_linear_decoder(batches)


def test_the_network_adds_what_the_linear_code_leaves_out():
    torch.manual_seed(0)
    decoder = UViT("XS", 4, time_cond=False, depth=1, field_at_noise=1.0, base=(8, 4))
    out, contrast = torch.randn(2, 3, 32, 48), torch.rand(2, 1, 32, 48)
    scaled = OUTPUT_GAIN * contrast * out
    code = LappedCode(8, 4)
    with torch.no_grad():
        added = decoder.addition(out, contrast)
        torch.testing.assert_close(code.encode(added), torch.zeros(2, 4, 4, 6), rtol=0, atol=1e-5)
        torch.testing.assert_close(added + code.decode(code.encode(scaled)), scaled)
        decoder.revision.fill_(1)
        torch.testing.assert_close(decoder.addition(out, contrast), scaled)
        # and so the estimate of the image has the latent's coefficients, whatever the weights
        decoder.revision.fill_(0)
        torch.nn.init.normal_(decoder.conv_out.weight)
        x, z = torch.randn(2, 3, 32, 48), torch.randn(2, 4, 4, 6)
        estimate = x - decoder(x, z)
        assert (estimate - decoder.base_image(z)).std() > 0.03
        torch.testing.assert_close(code.encode(estimate), z, rtol=0, atol=1e-4)


def test_local_contrast():
    """The deviation over 16 x 16 pixels around each cell's middle, linear between, in float64 and plain loops."""
    halves = torch.zeros(1, 3, 32, 64)
    halves[..., 32:] = 1
    contrast = local_contrast(halves)[0, 0]
    assert contrast.shape == (32, 64)
    torch.testing.assert_close(contrast[:, :20], torch.full((32, 20), LEAST_CONTRAST))
    torch.testing.assert_close(contrast[:, 30:34], torch.full((32, 4), 3 ** 0.5 / 4), rtol=1e-3, atol=0)

    image = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    deviations = np.empty((3, 3))
    for i in range(3):
        for j in range(3):
            around = image[0, :, max(0, 8 * i - 4):8 * i + 12, max(0, 8 * j - 4):8 * j + 12].double().numpy()
            deviations[i, j] = np.sqrt(around.var((1, 2)).mean() + LEAST_CONTRAST ** 2)
    weights = np.array([1, 30, 1]) / 32  # of the cells, for the mean of the two pixels in the middle
    middle = local_contrast(image)[0, 0, 11:13, 11:13].mean()
    np.testing.assert_allclose(middle, weights @ deviations @ weights, rtol=1e-5)


def test_training_passes_the_additions_gradient_unscaled_by_contrast():
    decoder = UViT("XS", 4, time_cond=False, depth=1, field_at_noise=1.0, base=(8, 4))
    out, upstream = torch.randn(2, 3, 32, 48, requires_grad=True), torch.randn(2, 3, 32, 48)
    contrast = torch.rand(2, 1, 32, 48)
    values, gradients = {}, {}
    for mode in (True, False):
        decoder.train(mode)
        values[mode] = decoder.addition(out, contrast)
        gradients[mode], = torch.autograd.grad((values[mode] * upstream).sum(), out)
    torch.testing.assert_close(values[True], values[False])
    unscaled, = torch.autograd.grad((decoder.addition(out, 1 / OUTPUT_GAIN) * upstream).sum(), out)
    torch.testing.assert_close(gradients[True], unscaled)
    torch.testing.assert_close(gradients[False], OUTPUT_GAIN * contrast * unscaled)  # of a decoder in use the exact one


def test_a_new_decoder_sees_the_latent_in_its_base_alone():
    """What the latent gives to the input and the norms hides the base until it is learned, and so starts at zero."""
    torch.manual_seed(0)
    decoder = UViT("XS", 4, time_cond=False, depth=1, field_at_noise=1.0, base=(8, 4))
    torch.nn.init.normal_(decoder.conv_out.weight)
    x, z, other = torch.randn(2, 3, 32, 48), torch.randn(2, 4, 4, 6), torch.randn(2, 4, 4, 6)
    condition, of_other = decoder.condition(z, 32, 48), decoder.condition(other, 32, 48)
    field = decoder(x, condition=condition)
    swapped = condition._replace(base=of_other.base, base_map=of_other.base_map,
                                 contrast=of_other.contrast)
    found = decoder(x, condition=swapped)
    assert torch.equal(found, decoder(x, other)) and not torch.allclose(found, field)
    field.square().mean().backward()  # but it is learned from the first step on
    assert decoder.norm_z.weight.grad.all()


@pytest.mark.parametrize("loss", ["fm", "eqm"])
@pytest.mark.parametrize("steps", [1, 4])
def test_decoding_in_float64_is_that_in_float32_but_for_rounding(loss, steps, smallest):
    torch.manual_seed(0)
    model = DCSSDAE("dc_f8c4", "XS", loss, 0.0625, depth=1, input_skip=True, linear_encoder=True, linear_decoder=4)
    randomise(model, scale=0.5).eval()
    z, noise = torch.randn(1, 4, 2, 3), torch.randn(1, 3, 16, 24)
    with torch.no_grad():
        single = model.decode(z, steps, noise)
        double = model.double().decode(z.double(), steps, noise)
    assert single.dtype is torch.float32 and double.dtype is torch.float64
    assert relative_error(single, double) < 1e-4


@torch.no_grad()
def test_a_model_goes_on_with_another_loss(smallest):
    """As FM it estimates the same image at every level."""
    model = DCSSDAE("dc_f8c4", "XS", "eqm", 0.0625, depth=1, lam=2.0, input_skip=True, linear_decoder=4)
    decoder = randomise(model).eval().decoder
    x, z, t = demo_batch(2, 32), torch.randn(2, 4, 4, 4), torch.tensor([0.3, 1.0])
    estimate = x - decoder(x, z) / 2.0
    as_fm = model.retargeted("fm").decoder
    assert torch.allclose(x + losses.per_image(t) * as_fm(x, z, t), estimate, atol=1e-4)
    with pytest.raises(ValueError, match="only a model with a linear decoder"):
        DCSSDAE("dc_f8c4", "XS", "eqm", 0.0625, depth=1).retargeted("fm")


# ---------------------------------------------------------------------------------------------------------------------
# model.py: the autoencoder
# Every configuration builds, trains and decodes; every parameter matters; any size; clear refusals.

@pytest.mark.parametrize("enc", ["vq_f8c4", "vq_f16c16", "dc_f8c4", "dc_f32c32", "dc_f64c256", "dc_f128c1024"])
def test_every_latent_configuration_builds_and_trains(enc, smallest):
    torch.manual_seed(0)
    model = DCSSDAE(enc, "XS", "eqm", enc_width=0.125 if enc.startswith("dc") else 0.25, depth=1)
    f, c, size = model.downscale, model.encoder.z_dim, max(32, model.downscale)
    assert enc.endswith(f"f{f}c{c}")
    x = torch.rand(1, 3, size, size) * 2 - 1  # one image, one latent pixel: no NaN
    history = []
    for _ in range(2):
        posterior = model.encode(x)
        assert posterior.mean.shape == (1, c, size // f, size // f)
        loss = F.mse_loss(model.decoder(x, posterior.sample(torch.zeros_like(posterior.mean))), torch.zeros_like(x))
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)  # z = mean: logvar has none
        step = 0.02 * loss.detach() / sum(g.square().sum() for g in grads if g is not None)  # to first order -2 %
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                if g is not None:
                    p -= step * g
        history.append(float(loss.detach()))
    assert history[1] < history[0]


@pytest.mark.parametrize("loss", ["fm", "eqm"])
def test_every_parameter_gets_a_gradient_and_matters_at_every_call(loss, smallest):
    """Also after a first call: nothing derived from parameters may be kept between calls."""
    def build(seed):
        return randomise(DCSSDAE("dc_f16c4", "XS", loss, enc_width=0.0625, depth=2, input_skip=True), seed)

    model = build(0)
    torch.manual_seed(0)
    x, t, eps = torch.rand(1, 3, 16, 16), torch.tensor([0.3]) if loss == "fm" else None, torch.randn(1, 4, 1, 1)
    z = model.encode(x).sample(eps)
    with torch.no_grad():
        before = model.decoder(x, z, t)
    model.decoder(x, z, t).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name
    fresh = build(1)
    with torch.no_grad():
        for old, new in ((model.parameters(), fresh.parameters()), (model.buffers(), fresh.buffers())):
            for value, new_value in zip(old, new, strict=True):
                value.copy_(new_value)
        after = model.decoder(x, z, t)
        assert torch.equal(after, fresh.decoder(x, z, t)) and not torch.equal(after, before)
        assert torch.equal(model.encode(x).mean, fresh.encode(x).mean)


def test_samples_do_not_depend_on_each_other_or_on_the_mode():
    model = randomise(DCSSDAE("vq_f8c4", "XS", "eqm", enc_width=0.25, depth=1))
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        together = model.train().decoder(x, model.encode(x).mode())
        alone = model.eval().decoder(x[1:2], model.encode(x[1:2]).mode())
    torch.testing.assert_close(together[1], alone[0], rtol=0, atol=1e-4)  # kernels differ with the batch size


def test_latent_norm_is_batch_norm_in_evaluation():
    # momentum None: plain average, as ours over the first batches
    ours, theirs = LatentNorm(4), nn.BatchNorm2d(4, momentum=None)
    torch.manual_seed(0)
    for _ in range(3):
        z = 3 * torch.randn(5, 4, 2, 2) + 1
        theirs(z)
        ours.update(z.numel() // 4, z.double().sum(dim=(0, 2, 3)), z.double().square().sum(dim=(0, 2, 3)),
                    torch.tensor(True))
    for name, value in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[name].float(), value.float(), rtol=1e-4), name
    ours.load_state_dict(theirs.state_dict())
    assert torch.allclose(ours(z), theirs.eval()(z), atol=1e-6)


def test_what_the_model_refuses(smallest):
    fm, eqm = (DCSSDAE("dc_f16c4", "XS", loss, enc_width=0.0625, depth=1) for loss in ("fm", "eqm"))
    linear = DCSSDAE("dc_f8c4", "XS", "eqm", enc_width=0.0625, depth=1, input_skip=True, linear_decoder=4)
    x, z = torch.zeros(1, 3, 32, 32), torch.zeros(1, 4, 2, 2)
    for call, words in ((lambda: fm.encode(x[..., :24]), "multiples of 16"),
                        (lambda: fm.encode(x.byte()), "127.5"),
                        (lambda: fm.decoder(x[..., :20], z, torch.zeros(1)), "multiples of 8"),
                        (lambda: linear.decoder(x, z), "linear image of a 2x2 latent is 16x16"),
                        (lambda: fm.decoder(x, z), "needs t"),
                        (lambda: eqm.decoder(x, z, torch.zeros(1)), "leave t out"),
                        (lambda: fm.decode(z, eta=0.1), "takes the sampler options method, t_shift"),
                        (lambda: fm.decode(z, method="gd"), "euler alone"),
                        (lambda: eqm.decode(z, shift=1.0), "takes the sampler options eta, last_eta"),
                        (lambda: eqm.decode(z, method="adam"), "unknown sampling method 'adam'"),
                        (lambda: eqm.decode(z, method="gd", mu=0.3), "nesterov takes mu"),
                        (lambda: eqm.decode(z, noise=x.expand(2, -1, -1, -1)), "noise for these latents"),
                        (lambda: eqm.energy(x[..., :16], z), "images for these latents"),
                        (lambda: fm.energy(x, z), "no energy"),
                        (lambda: eqm.normalize(z), "no latent statistics"),
                        (lambda: eqm.fit_linear_decoder([x]), "no linear decoder")):
        with pytest.raises(ValueError, match=words):
            call()
    assert torch.equal(eqm.decode(z, 2, x, mu=0.0), eqm.decode(z, 2, x))


@pytest.mark.parametrize("loss, c", [("fm", "linear"), ("eqm", "linear"), ("eqm", "piecewise")])
def test_input_skip_is_the_field_at_the_noise_end(loss, c, smallest):
    """With skip and a network that outputs the image (up to scale), one step from pure noise returns the image."""
    model = DCSSDAE("dc_f16c4", "XS", loss, enc_width=0.0625, depth=1, c=c, lam=2.0, input_skip=True).eval()
    nn.init.zeros_(model.decoder.conv_out.weight)
    nn.init.constant_(model.decoder.conv_out.bias, 0.5 if loss == "fm" else -0.5 * model.field_at_noise)
    assert torch.allclose(model.decode(torch.randn(2, 4, 2, 2)), torch.full((2, 3, 32, 32), 0.5), atol=1e-5)


def test_a_step_size_alone_keeps_the_last_step(smallest):
    """Which lands on the estimate: without it the noise that a step of eta leaves stays in the image."""
    model = DCSSDAE("dc_f8c4", "XS", "eqm", enc_width=0.0625, depth=1, lam=2.0, input_skip=True, linear_encoder=True,
                    linear_decoder=4).eval()
    z, noise = torch.randn(1, 4, 2, 2), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        alone, landing, without = (model.decode(z, 4, noise, eta=0.1, **options)
                                   for options in ({}, {"last_eta": 0.5}, {"last_eta": 0.1}))
    assert torch.equal(alone, landing) and (alone - without).abs().mean() > 0.1


@pytest.mark.parametrize("c", ["linear", "trunc", "piecewise"])
@pytest.mark.parametrize("lam", [1.0, 4.0])
def test_default_step_sizes_end_on_the_data(c, lam):
    """On a perfect field at most 1 % of the noise is left, whatever the number of steps."""
    model, eqm = DCSSDAE("dc_f8c4", "XS", "eqm", enc_width=0.0625, depth=1, c=c, lam=lam), EqM(c, lam=lam)
    data, noise = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    for n in (1, 2, 3, 4, 8, 25):
        out, _ = sampler.gradient_descent(lambda y, z: eqm.target(data, noise, 1 - y.flatten()), noise, data, n,
                                          sampler.default_eta(model.eqm, n))
        assert abs(out) < 0.0101, (n, out)
        options = sampler.default_steps(model.eqm, n)
        assert ("last_eta" in options) == (c == "linear" and n > 1)
        out, nfe = sampler.gradient_descent(lambda y, z: eqm.target(data, noise, 1 - y.flatten()), noise, data, n,
                                            **options)
        assert nfe.tolist() == [n] and abs(out) < (1e-6 if c == "linear" else 0.0101), (n, out)
    # A sample that the adaptive stop ends lands, too; one that is not a number has not arrived.
    if c == "linear":
        out, nfe = sampler.nesterov(lambda y, z: eqm.target(data, noise, 1 - y.flatten()), noise, data, 16, mu=0.3,
                                    lam=lam, tol=0.2, **sampler.default_steps(model.eqm, 16))
        assert 1 < nfe.item() < 10 and abs(out) < 1e-6
    _, nfe = sampler.gradient_descent(lambda y, z: y * math.nan, noise, data, 3, 1.0, lam, tol=0.2)
    assert nfe.tolist() == [3]


def test_decode_is_reproducible_and_differentiable(smallest):
    model = randomise(DCSSDAE("dc_f16c4", "XS", "eqm", enc_width=0.0625, depth=1)).eval()
    z = torch.randn(2, 4, 2, 3, requires_grad=True)
    a, b = (model.decode(z, steps=2, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert a.shape == (2, 3, 32, 48) and torch.equal(a, b)
    a.sum().backward()
    assert z.grad.abs().sum() > 0
    half = model.bfloat16()  # weights and maps; the image is summed up in float32
    assert half.decode(z[:1, :, :1, :1].detach().bfloat16(), steps=2).dtype == torch.float32


@pytest.mark.parametrize("lam", [1.0, 4.0])
def test_energy_of_a_perfect_linear_field(lam, smallest):
    """An untrained model's field leads straight to the linear code x0: f = lam (x - x0)."""
    model = DCSSDAE("dc_f16c4", "XS", "eqm", enc_width=0.0625, depth=1, lam=lam, input_skip=True, linear_encoder=True,
                    linear_decoder=4).eval()
    x, z = torch.randn(3, 3, 32, 48, requires_grad=True), torch.randn(3, 4, 2, 3)
    x0 = model.decode(z).detach()
    energy = model.energy(x, z)
    assert energy.shape == (3,)
    assert torch.allclose(energy, lam / 2 * (x - x0).square().sum(dim=(1, 2, 3)), rtol=1e-4)
    # It is the energy whose gradient is the field, and zero at the image alone.
    gradient, = torch.autograd.grad(energy.sum(), x)
    assert torch.allclose(gradient, lam * (x - x0), atol=1e-4 * lam)
    assert model.energy(x0, z).max() < 1e-6 * energy.min()
    # What the adaptive stop compares with tol
    rms = (2 * energy / (lam * x[0].numel())).sqrt()
    for tol, stops in ((1.001, True), (0.999, False)):
        _, nfe = model.sample(z[:1], 2, x[:1].detach(), eta=0.1, tol=tol * rms[0].item())
        assert nfe.tolist() == [1 if stops else 2]


@torch.no_grad()
def test_float16():
    """In weights and by autocast, on a grid with several blocks of attention, whose masks must fit."""
    model = DCSSDAE.load(EXAMPLE)
    x, noise = demo_batch(1, 224)[..., 96:128], torch.randn(1, 3, 224, 32)  # 28 x 4 tokens
    z = model.encode(x).mode()
    y = model.decode(z, 1, noise)
    with torch.autocast("cpu", torch.float16):
        assert relative_error(model.decode(model.encode(x).mode(), 1, noise), y) < 0.0012
    half = model.half()
    found = half.encode(x.half()).mode()
    assert relative_error(found, z) < 0.0012
    assert relative_error(half.decode(found.half(), 1, noise), y) < 0.0012


@pytest.mark.parametrize("size", [(1, 1), (5, 70), (64, 32), (33, 47)])
def test_any_size_by_reflection(size, smallest):
    x = torch.rand(1, 3, *size)
    padded = pad_to_multiple(x, 32)
    assert padded.shape[2] % 32 == 0 and padded.shape[3] % 32 == 0 and torch.equal(padded[..., :size[0], :size[1]], x)
    if min(size) > 32:  # within one reflection it is torch's
        pad = (0, padded.shape[3] - size[1], 0, padded.shape[2] - size[0])
        assert torch.equal(padded, F.pad(x, pad, mode="reflect"))
    model = DCSSDAE("dc_f32c8", "XS", "eqm", enc_width=0.125, depth=1).eval()
    with torch.no_grad():
        noise = torch.randn(1, 3, *padded.shape[2:])
        image = model.reconstruct(x, 2, noise)
        assert image.shape == x.shape
        for whole in (model, nn.DataParallel(model)):
            assert torch.equal(whole(x, steps=2, noise=noise), image)


# ---------------------------------------------------------------------------------------------------------------------
# model.py: weight files
# What is saved loads again bit by bit, published files load, and others are refused in one sentence.

@pytest.mark.parametrize("enc,loss,options", [
    ("dc_f16c4", "fm", {"enc_width": 0.0625, "enc_options": {"norm": False}, "c": "trunc", "lam": 4.0}),
    ("vq_f8c4", "eqm", {"enc_width": 0.25, "c": "trunc", "lam": 4.0}),
    ("dc_f8c4", "fm", {"enc_width": 0.0625, "linear_encoder": True, "linear_decoder": 4}),
])
def test_save_and_load_round_trip(tmp_path, enc, loss, options, smallest):
    model = randomise(DCSSDAE(enc, "XS", loss, depth=1, input_skip=True, notes={"size": 64}, **options)).eval()
    model.save(tmp_path / "m.safetensors")
    loaded = DCSSDAE.load(tmp_path / "m.safetensors")
    assert loaded.config == model.config and not loaded.training and os.listdir(tmp_path) == ["m.safetensors"]
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    x, noise = torch.rand(1, 3, 32, 32), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        a, b = (m.decode(m.encode(x).mode(), 2, noise) for m in (loaded, model))
    assert torch.equal(a, b)
    # --enc_ckpt takes our own files; the variant without norms is built, and that with the linear code
    other = DCSSDAE(enc, "XS", "eqm", enc_width=options["enc_width"], depth=1)
    other.load_published(tmp_path / "m.safetensors", part="encoder")
    assert torch.equal(other.encode(x).mean, model.encode(x).mean)
    assert other.config["linear_encoder"] == model.config["linear_encoder"] and not other.config["linear_decoder"]


@pytest.mark.parametrize("part", ["decoder", "all"])
@pytest.mark.parametrize("field", [{"c": "trunc", "a": 0.6, "lam": 4.0}, {"linear_decoder": 4}])
@torch.no_grad()
def test_a_decoder_is_taken_over_with_the_field_that_it_was_trained_as(tmp_path, part, field, smallest):
    stored = {"mean": [0.0] * 4, "std": [1.0] * 4}
    model = DCSSDAE("dc_f8c4", "XS", "eqm", 0.0625, depth=1, input_skip=True, latents=stored, **field)
    randomise(model).eval().save(tmp_path / "m.safetensors")
    other = DCSSDAE("dc_f8c4", "XS", "eqm", 0.0625, depth=1, latents={"mean": [1.0] * 4, "std": [2.0] * 4}).eval()
    other.load_published(tmp_path / "m.safetensors", part=part)
    z, noise = torch.randn(1, 4, 4, 4), torch.randn(1, 3, 32, 32)
    assert torch.equal(other.decode(z, 3, noise), model.decode(z, 3, noise))
    assert other.config["latents"] == (stored if part == "all" else {"mean": [1.0] * 4, "std": [2.0] * 4})
    other.load_published(tmp_path / "m.safetensors", part="encoder")
    assert other.config["latents"] == stored


# ---------------------------------------------------------------------------------------------------------------------
# losses.py: the objectives
# Flow matching, equilibrium matching and the GAN's terms in closed form; what is random in a step.

def test_fm_closed_forms():
    x, e = torch.randn(5, 3, 8, 8), torch.randn(5, 3, 8, 8)
    t = torch.tensor([0.0, 0.25, 0.5, 0.8, 1.0])
    x_t = losses.fm_mix(x, e, t)
    assert torch.equal(x_t[0], x[0]) and torch.equal(x_t[4], e[4])  # t=0 is data, t=1 noise
    assert torch.allclose(losses.fm_predict_x(x_t, x - e, t), x, atol=1e-6)
    assert losses.fm_loss(x - e, x, e).tolist() == [0] * 5  # one for each image
    assert losses.fm_loss(x - e + t[:, None, None, None], x, e).tolist() == pytest.approx(t.square().tolist(), rel=1e-5)


@pytest.mark.parametrize("c", ["linear", "trunc", "piecewise"])
@pytest.mark.parametrize("lam", [1.0, 4.0])
def test_eqm_closed_forms(c, lam):
    eqm = EqM(c, a=0.8, b=1.4, lam=lam)
    g = torch.tensor([0.0, 0.5, 0.8, 0.95, 1.0])
    x, e = torch.randn(5, 3, 8, 8), torch.randn(5, 3, 8, 8)
    x_g = eqm.mix(x, e, g)
    assert torch.equal(x_g[0], e[0]) and torch.equal(x_g[4], x[4])  # g=0 is noise, g=1 data
    target = eqm.target(x, e, g)
    assert target[4].abs().max() == 0  # the data is an equilibrium
    assert torch.allclose(eqm.predict_x(x_g, target, g), x, atol=2e-6)  # perfect field, also at g=1
    expected = {"linear": [1, .5, .2, .05, 0], "trunc": [1, 1, 1, .25, 0], "piecewise": [1.4, 1.15, 1, .25, 0]}[c]
    assert torch.allclose(eqm.c(g), torch.tensor(expected), atol=1e-6)
    assert losses.eqm_loss(target, x, e, g, eqm).tolist() == [0] * 5
    off = losses.eqm_loss(target + lam * g[:, None, None, None], x, e, g, eqm)  # the same for every lam
    assert off.tolist() == pytest.approx(g.square().tolist(), rel=1e-5)
    if c == "linear":
        assert torch.allclose(target, eqm.at_noise * (x_g - x), atol=1e-5)  # the field is the displacement


def test_losses_do_not_broadcast():
    x, wrong, level, eqm = torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 8, 8), torch.zeros(2), EqM("trunc")
    for call in (lambda: losses.fm_loss(wrong, x, x), lambda: losses.eqm_loss(x, wrong, x, level, eqm)):
        with pytest.raises(ValueError, match="one shape"):
            call()


def test_draws_are_a_function_of_seed_step_and_row():
    def draw(rows, seed=0, step=5, loss="eqm", **options):
        return losses.draw(seed, step, rows, (3, 8, 8), (4, 1, 1), torch.device("cpu"), loss, **options)

    whole = draw(range(6))
    assert [part.shape for part in whole] == [(6, 3, 8, 8), (6, 4, 1, 1), (6,)]
    for part, first, last in zip(whole, draw(range(2)), draw(range(2, 6))):  # whichever process, whichever micro-batch
        assert torch.equal(part, torch.cat([first, last]))
    for other in (draw(range(6), seed=1), draw(range(6), step=6), draw(range(6, 12))):
        assert not any(torch.equal(a, b) for a, b in zip(whole, other))
    e, eps, g = draw(range(500))
    assert abs(e.mean()) < 0.02 and abs(e.std() - 1) < 0.02 and abs(eps.std() - 1) < 0.1
    assert g.min() >= 0 and g.max() < 1 and abs(g.mean() - 0.5) < 0.05
    assert torch.equal(draw(range(500), g_power=2.0)[2], g**2)
    n = draw(range(500), loss="fm")[2].logit()
    assert abs(n.mean()) < 0.15 and abs(n.std() - 1) < 0.1
    assert torch.allclose(draw(range(500), loss="fm", t_mean=2.0)[2].logit(), n + 2, atol=1e-3)


@pytest.mark.parametrize("loss", ["fm", "eqm"])
@pytest.mark.parametrize("off", [0.0, 0.5])
def test_matching_of_a_decoder_that_is_right_or_off_by_a_constant(loss, off):
    """Right: loss 0, and an estimate that is the image. FM's network is told t, EqM's is not. FM's loss beside a linear
    base is the estimate's error over max(t, T_MIN)."""
    x, e, z = torch.rand(3, 3, 8, 8), torch.randn(3, 3, 8, 8), torch.randn(3, 4, 1, 1)
    level = torch.tensor([0.01, 0.5, 1.0 if loss == "fm" else 0.0])
    eqm = None if loss == "fm" else EqM("trunc", lam=2.0)
    wanted = x - e if loss == "fm" else eqm.target(x, e, level)

    def forward(noisy, t=None, condition=None):
        assert condition == "condition" and (t is level) == (loss == "fm")
        assert torch.allclose(noisy, losses.fm_mix(x, e, level) if loss == "fm" else eqm.mix(x, e, level))
        return wanted + off, "tokens"

    decoder = types.SimpleNamespace(forward_with_tokens=forward, condition=lambda z, h, w: "condition", base=None)
    each, estimate, tokens = losses.matching(decoder, eqm, x, e, z, level)
    assert tokens == "tokens" and each.shape == (3,)
    assert each.tolist() == pytest.approx([off**2 / (1 if eqm is None else eqm.lam**2)] * 3, rel=1e-4)
    if off == 0:
        assert torch.allclose(estimate, x, atol=1e-5)
    elif loss == "fm":
        decoder.base = "linear"
        error = (estimate - x).square().mean((1, 2, 3))
        clamped, *_ = losses.matching(decoder, eqm, x, e, z, level)
        assert torch.allclose(clamped, error / level.clamp(min=losses.T_MIN).square(), rtol=1e-4)


def test_losses_by_level():
    level = torch.tensor([0.0, 0.24, 0.25, 0.9, 1.0])
    sums, counts = losses.level_sums(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), level, torch.float64)
    assert sums.tolist() == [3, 3, 0, 9] and counts.tolist() == [2, 1, 0, 2]


def test_patch_gan_and_hinge_loss():
    gan = randomise(PatchGAN(channels=16)).double()
    x = torch.randn(2, 3, 24, 40).double()
    assert gan(x).shape == (2, 1, 1, 3) and sum(p.numel() for p in PatchGAN().parameters()) == 2_766_529
    assert torch.allclose(gan(x)[:1], gan(x[:1])) and torch.equal(gan(3 * x), gan((3 * x).clamp(-1, 1)))
    # receptive field of one logit: 70 pixels
    image = torch.zeros(1, 3, 96, 96, dtype=torch.double, requires_grad=True)
    probe = nn.Sequential(*(m for m in gan.layers if isinstance(m, nn.Conv2d)))
    seen = torch.autograd.grad(probe(image)[0, 0, 5, 5], image)[0][0].abs().sum(0).nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [70, 70]
    real, fake = torch.tensor([2.0, 0.5, -1.0], dtype=torch.double), torch.tensor([-3.0, 0.5, 0.0], dtype=torch.double)
    assert hinge_loss(real, fake) == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1.5 + 1) / 3))
    with pytest.raises(ValueError, match="sides of at least 24"):
        gan(x[..., :16])


# ---------------------------------------------------------------------------------------------------------------------
# losses.py: losses in the features of networks
# LPIPS against its package and REPA against timm's model, with random weights.

@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_lpips_against_the_lpips_package(tmp_path, vgg_file, net):
    import torchvision
    peer = pytest.importorskip("lpips")
    path = vgg_file
    if net == "alex":
        path = tmp_path / "alex.pth"
        torch.save(torchvision.models.alexnet(weights=None).double().state_dict(), path)  # read into float32
    ours = losses.LPIPSLoss(net, weights=path)
    with no_values():
        theirs = peer.LPIPS(net=net, pnet_rand=True, verbose=False)
    features, slices = torch.load(path, weights_only=True), theirs.net
    for k in range(1, 6):
        block = getattr(slices, f"slice{k}")
        block.load_state_dict({name: features[f"features.{name}"] for name in block.state_dict()})
    x, y = torch.rand(3, 3, 64, 64) * 2 - 1, torch.rand(3, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        want = theirs(x, y).flatten()
        assert relative_error(ours(x, y), want) < 1e-5
        with torch.autocast("cpu", dtype=torch.bfloat16):  # stays in float32
            assert ours(x, y).dtype == torch.float32 and relative_error(ours(x, y), want) < 1e-5
    assert ours(x, x).abs().max() == 0 and not any(p.requires_grad for p in ours.parameters())
    with pytest.raises(ValueError, match="sides of at least"):
        ours(x[..., :8], y[..., :8])


def test_lpips_gradient_is_finite_on_constant_images(vgg_file):
    loss = losses.LPIPSLoss("vgg", weights=vgg_file)
    for value in (-1.0, 0.0, 1.0):
        x = torch.full((1, 3, 32, 32), value, requires_grad=True)
        loss(x, torch.full((1, 3, 32, 32), -0.5)).sum().backward()
        assert x.grad.isfinite().all() and x.grad.abs().max() < 1e3


def test_lpips_keeps_only_the_estimates_features_for_the_backward_pass(vgg_file):
    loss, kept = losses.LPIPSLoss("vgg", weights=vgg_file), []
    x, y = torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64).requires_grad_()
    for original in (x, x.clone().requires_grad_()):
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t,
            lambda t: t,
        ):
            loss(original, y)
        kept.append(sum(sizes.values()) - 4 * sum(p.numel() for p in loss.parameters()))
    assert kept[0] < 0.65 * kept[1]


def test_missing_networks_are_reported_in_one_sentence(tmp_path, offline):
    with pytest.raises(WeightsUnavailable, match="vgg16-397923af.pth.*--lpips_weights FILE"):
        losses.LPIPSLoss("vgg")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not hold torchvision's vgg16"):
        losses.LPIPSLoss("vgg", weights=tmp_path / "other.pth")
    with pytest.raises(WeightsUnavailable, match="missing.pth"):
        losses.REPALoss(96, weights=tmp_path / "missing.pth")
    with pytest.raises(ValueError, match="other.pth does not hold DINOv2"):
        losses.REPALoss(96, weights=tmp_path / "other.pth")


def test_repa_with_random_dinov2(dino_file):
    repa = losses.REPALoss(96, weights=dino_file)
    x, tokens = torch.rand(2, 3, 32, 64) * 2 - 1, torch.randn(2, 4 * 8, 96, requires_grad=True)
    target = repa.target(x)
    assert target.shape == (2, 32, 768)  # the decoder's token grid, not square
    assert not torch.allclose(target[:, :-1], target[:, 1:], atol=1e-3)
    exact = nn.Sequential(nn.Identity())
    loss = repa(tokens, x)
    loss.backward()
    assert 0 < float(loss.detach()) < 2 and tokens.grad.abs().sum() > 0
    assert all(p.grad is None for p in repa.dino.parameters())
    repa.mlp = exact
    assert [float(repa(sign * target, x)) for sign in (1, -1)] == pytest.approx([0, 2], abs=1e-5)
    repa.largest = 16  # --repa_size: a token of DINOv2 for 4 x 4 of the decoder's
    coarse = repa.target(x)
    enlarged = coarse.unflatten(1, (1, 2)).repeat_interleave(4, 1).repeat_interleave(4, 2).flatten(1, 2)
    assert coarse.shape == (2, 2, 768) and float(repa(enlarged, x)) == pytest.approx(0, abs=1e-5)
    # The square 518 px input it was made for: the same tokens as timm's model
    dino = fid.empty_network("vit_base_patch14_dinov2.lvd142m", num_classes=0).eval()
    dino.load_state_dict(torch.load(dino_file, weights_only=True), assign=True)
    repa.largest = 296
    with torch.no_grad():
        image = torch.rand(1, 3, 296, 296) * 2 - 1
        resized = F.interpolate((image + 1) / 2, size=(518, 518), mode="bicubic", antialias=True)
        mean, std = (torch.tensor(dino.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
        assert relative_error(repa.target(image), dino.forward_features((resized - mean) / std)[:, 1:]) < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# sampler.py
# Order, exactness, momentum, adaptive stop: against closed forms and torch's SGD.

def test_euler_is_exact_for_a_straight_path():
    x, e, z = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.zeros(4, 1, 1, 1)
    for steps, t_shift in ((1, 4.0), (5, 1.0), (8, 4.0)):
        out, nfe = sampler.euler(lambda x_t, z, t: x - e, e, z, steps, t_shift)
        assert torch.allclose(out, x, atol=1e-5) and nfe.tolist() == [steps] * 4


def test_euler_converges_to_the_exact_flow_of_a_gaussian():
    """Data N(0, s^2): v = E[x - e | x_t] is linear in x_t and the flow maps e to s e.
    First order: half the error with twice the steps."""
    s, e = 0.5, torch.randn(1, 3, 32, 32, dtype=torch.float64)

    def velocity(x_t, z, t):
        t = losses.per_image(t.double())
        return ((1 - t) * s * s - t) / ((1 - t) ** 2 * s * s + t ** 2) * x_t
    error = [relative_error(sampler.euler(velocity, e, e, n, 1.0)[0], s * e) for n in (100, 200)]
    assert error[0] < 0.02 and 1.8 < error[0] / error[1] < 2.2


def test_nesterov_against_torch_sgd():
    """torch's SGD(nesterov=True) holds the look-ahead points y_k; ours returns x_{k+1} = y_k - eta f(y_k)."""
    start, A, eta, mu = torch.randn(1, 3, 4, 4), torch.rand(3, 4, 4), 0.2, 0.7
    p = nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([p], lr=eta, momentum=mu, nesterov=True)
    for steps in range(1, 8):
        y = p.detach().clone()
        ours = sampler.nesterov(lambda y, z: A * y, start, start, steps=steps, eta=eta, mu=mu)[0]
        assert torch.allclose(ours, y - eta * A * y, atol=1e-6)
        p.grad = A * p.detach()
        optimizer.step()


def test_a_size_for_each_step():
    x, z = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    out, nfe = sampler.gradient_descent(lambda y, z: y - z, x, z, 3, eta=[0.5, 0.25, 0.5])
    assert torch.allclose(out - z, 0.5 * 0.75 * 0.5 * (x - z), atol=1e-6) and nfe.tolist() == [3] * 4
    # The default ones, along Euler's times, take the noise from each time to the next, and land in the end.
    assert sampler.noise_times(2, 3.0) == [1, 0.125, 0]
    options = sampler.default_steps(EqM(lam=2.0), 4, 1.5)
    left, times = 1.0, sampler.noise_times(4, 1.5)
    for size, then in zip(options["eta"][:-1], times[1:]):
        left *= 1 - 2.0 * size
        assert left == pytest.approx(then)
    assert options["last_eta"] == 0.5 and times[0] == 1 and times[-1] == 0 and len(times) == 5


def test_adaptive_stop_drops_finished_samples_from_the_batch():
    rates = torch.tensor([1.0, 0.5, 0.01, 1e-4])  # the condition z carries each sample's rate
    z, x, seen = losses.per_image(rates), torch.randn(4, 3, 8, 8), []

    def field(y, z):
        seen.append(len(y))
        return z * y
    out, nfe = sampler.nesterov(field, x, z, steps=50, eta=1.0, mu=0.3, tol=1e-3)
    assert sum(seen) == int(nfe.sum()) and seen[0] == 4 and seen[-1] < 4 and seen == sorted(seen, reverse=True)
    assert nfe[0] < nfe[1] < nfe[2] == 50 and nfe[3] == 1  # the last one is flat from the start
    for i in range(4):  # each as if it were alone
        alone, n = sampler.nesterov(lambda y, z: z * y, x[i:i + 1], z[i:i + 1], steps=50, eta=1.0, mu=0.3, tol=1e-3)
        assert torch.allclose(alone[0], out[i], atol=1e-6) and int(n) == int(nfe[i])
    everything = sampler.nesterov(lambda y, z: z * y, x, z, steps=50, eta=1.0, mu=0.3)
    assert everything[1].tolist() == [50] * 4  # tol = 0 never stops


def test_samplers_refuse_bad_arguments():
    x = torch.zeros(1, 3, 8, 8)
    for call in (lambda: sampler.euler(None, x, x, 0), lambda: sampler.gradient_descent(None, x, x, 1, eta=-1.0),
                 lambda: sampler.nesterov(None, x, x, 1, mu=1.0), lambda: sampler.nesterov(None, x, x, 2.5),
                 lambda: sampler.euler(None, x, x, 2, t_shift=math.nan),
                 lambda: sampler.nesterov(None, x, x, 2, eta=[0.5])):
        with pytest.raises(ValueError):
            call()


# ---------------------------------------------------------------------------------------------------------------------
# train.py: runs
# What a run leaves behind; its phases, objectives and flags; the same steps by any processes and micro-batches.

@slow
def test_train_leaves_model_log_picture_and_metrics(trained):
    files = {"model.safetensors", "best.safetensors", "latest.pt", "log.jsonl", "reconstructions.png", "metrics.json"}
    assert files <= set(os.listdir(trained))
    log = step_lines(trained)
    assert [line["step"] for line in log] == [1, 2]
    assert all(math.isfinite(line[k]) for line in log for k in ("loss", "kl", "lr", "grad_norm", "images_per_s"))
    assert all(line["peak_mib"] > 50 for line in log)
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["images"] == 2 and [row["steps"] for row in metrics["rows"]] == [0, 0, 1, 4]
    assert [line["step"] for line in lines_of(trained / "log.jsonl") if "eval" in line] == [1, 2]
    assert Image.open(trained / "reconstructions.png").height == 5 * 34 + 2  # originals, two references, 1 and 4 steps
    model = DCSSDAE.load(trained / "model.safetensors")
    assert model.config["notes"]["size"] == 32
    averaged, raw = model.state_dict(), latest(trained)["model"]
    name = "decoder.norm_z.running_var"
    assert not torch.equal(averaged[name], torch.ones_like(averaged[name]))
    assert not torch.equal(averaged[name], raw[name])  # the average has buffers


def test_the_deep_preset_and_progress_in_a_log_file(tmp_path, smallest):
    output = command("train.py", "--preset", "deep", "--loss", "fm", "--batch_size", 1, "--steps", 4,
                     "--eval_images", 2, "--log_every", 1, "--enc_width", 0.0625, "--depth", 0, "--device", "cpu",
                     "--dtype", "float32", "--workers", 0, "--out", tmp_path / "r")
    assert "dc_f32c32" in output and "\r" not in output and len(output.splitlines()) < 20
    _, linear, one, _ = json.loads((tmp_path / "r" / "metrics.json").read_text())["rows"]
    assert one["psnr"] > linear["psnr"] - 0.3


@slow
def test_steps_do_not_depend_on_processes_or_micro_batches(tmp_path, smallest):
    """One process, two, one and then two, micro-batches."""
    flags = [*SMALL, "--save_every", 3, "--w_gan", 0.1, "--gan_start", 1, "--eval_every", 0]
    two = aside(run, tmp_path / "two_output", *flags, "--steps", 3, "--out", tmp_path / "two", world=2)
    command(train, *flags, "--steps", 3, "--out", tmp_path / "one")
    command(train, *flags, "--steps", 3, "--out", tmp_path / "micro", "--micro_batch", 3)
    command(train, *flags, "--steps", 2, "--out", tmp_path / "more")
    two.result()
    run(tmp_path / "more_output", *flags, "--steps", 3, "--out", tmp_path / "more", "--resume", world=2)
    one = latest(tmp_path / "one")
    for name in ("two", "micro", "more"):
        other = latest(tmp_path / name)
        for part in ("model", "ema", "gan"):
            a, b = (torch.cat([v.flatten().float() for v in state[part].values()]) for state in (one, other))
            assert relative_error(b, a) < 3e-5, (name, part)  # Adam enlarges tiny gradients' rounding
        for a, b in zip(step_lines(tmp_path / "one"), step_lines(tmp_path / name), strict=True):
            for k in a.keys() - {"images_per_s", "peak_mib"}:
                assert b[k] == pytest.approx(a[k], rel=3e-3), (name, k)


def test_the_plain_command_runs_offline(tmp_path, offline, smallest):
    """No --data, no networks: the built-in images, the missing terms named and recorded. (Full width is the README's
    command.)"""
    common = ["--size", 32, "--enc_width", 0.125, "--dec", "XS", "--device", "cpu", "--workers", 0]
    output = command(train, *common, "--enc", "dc_f32c32", "--loss", "eqm", "--steps", 1, "--batch_size", 2,
                     "--eval_images", 2, "--out", tmp_path / "run")
    assert "training WITHOUT LPIPS" in output and "training WITHOUT REPA" in output
    notes = DCSSDAE.load(tmp_path / "run" / "model.safetensors").config["notes"]
    assert notes["w_lpips"] == notes["w_repa"] == 0
    folder_of(tmp_path / "images", 2)
    message = sentence(train, *common, "--data", tmp_path / "images", "--out", tmp_path / "real")
    assert "vgg16-397923af.pth" in message and "--lpips_weights" in message  # an objective never changes silently


@slow
def test_training_with_lpips_and_repa(tmp_path, vgg_file, dino_file, smallest):
    common = [*TINY, "--size", 24, "--w_lpips", 0.5, "--lpips_weights", vgg_file, "--w_repa", 0.25,
              "--repa_weights", dino_file, "--decay", 0, "--batch_size", 2, "--eval_steps", 1]
    command("train.py", *common, "--steps", 2, "--out", tmp_path / "whole")
    command("train.py", *common, "--steps", 1, "--out", tmp_path / "parts")
    command("train.py", *common, "--steps", 2, "--out", tmp_path / "parts", "--resume")
    assert same_weights(tmp_path / "whole", tmp_path / "parts")  # REPA's MLP and its optimiser state too
    log = step_lines(tmp_path / "whole")[0]
    total = log["eqm"] + 0.5 * log["lpips"] + 0.25 * log["repa"] + 1e-6 * log["kl"]
    assert log["loss"] == pytest.approx(total, rel=1e-5)


def test_evaluations_measure_lpips_and_rfid_as_evaluate_does(tmp_path, vgg_file, monkeypatch, smallest):
    """Without changing a step; the best model is the one of the best rFID."""
    monkeypatch.setattr(fid, "InceptionFeatures", TinyInception)
    common = [*TINY, "--size", 24, "--eval_steps", 1, "--eval_every", 1, "--steps", 2]
    text = command(train, *common, "--lpips_weights", vgg_file, "--eval_metrics", "lpips", "rfid", "--out",
                   tmp_path / "r")
    assert "LPIPS vgg" in text and "rFID" in text
    command(train, *common, "--out", tmp_path / "plain")
    assert same_weights(tmp_path / "plain", tmp_path / "r")
    command("evaluate.py", "--ckpt", tmp_path / "r" / "model.safetensors", "--lpips_weights", vgg_file, "--limit", 2,
            "--device", "cpu", "--workers", 0, "--out", tmp_path / "e")
    ours, theirs = (json.loads((tmp_path / name / "metrics.json").read_text())["rows"] for name in "re")
    evaluations = [line for line in lines_of(tmp_path / "r" / "log.jsonl") if "eval" in line]
    assert evaluations[-1]["eval"] == ours
    for a, b in zip(ours, theirs, strict=True):
        for key in ("psnr", "lpips_vgg", "lpips_vgg_se", "rfid"):
            assert a[key] > 0 and a[key] == pytest.approx(b[key], rel=1e-3), (a["name"], key)
    best = DCSSDAE.load(tmp_path / "r" / "best.safetensors").config["notes"]["best"]
    found = min((line["eval"][-1]["rfid"], line["step"]) for line in evaluations)
    assert (best["metric"], best["value"], best["step"]) == ("rfid", *found)


@slow
def test_a_frozen_encoder_from_a_file(trained, tmp_path):
    command("train.py", *TINY, "--steps", 2, "--eval_steps", 1, "--enc_ckpt", trained / "model.safetensors",
            "--freeze_enc", "--out", tmp_path / "run")
    before, after = (DCSSDAE.load(folder / "model.safetensors") for folder in (trained, tmp_path / "run"))
    assert all(torch.equal(a, b) for a, b in zip(before.encoder.parameters(), after.encoder.parameters()))
    assert not torch.equal(before.decoder.conv_in.weight, after.decoder.conv_in.weight)
    assert after.config["linear_encoder"] and after.config["linear_decoder"] == 128
    _, linear, one = json.loads((tmp_path / "run" / "metrics.json").read_text())["rows"]
    assert one["psnr"] > linear["psnr"] - 0.3  # hardly trained: this is the least-squares fit


@pytest.mark.parametrize("flags,words", [
    (["--data", "/nowhere/at/all"], "/nowhere/at/all"),
    (["--size", 100], "--size 100"),
    (["--enc", "dc_f32"], "unknown encoder 'dc_f32'"),
    (["--freeze_enc"], "--enc_ckpt"),
    (["--enc_ckpt", "missing.safetensors"], "missing.safetensors"),
    (["--init_from", "missing.safetensors"], "missing.safetensors"),
    (["--w_lpips", 1, "--lpips_weights", "missing.pth"], "missing.pth"),
    (["--eval_metrics", "rfid", "--inception", "missing.pth"], "missing.pth"),
    (["--eval_metrics", "lpips", "--lpips_weights", "missing.pth"], "missing.pth"),
    (["--phase", 2], "--phase 2 goes on from a trained model: give --init_from"),
    (["--w_gan", 1, "--size", 16], "sides of at least 24"),
    (["--c", "trunc"], "--c trunc needs --linear off"),
    (["--c", "piecewise", "--linear", "decoder"], "--c piecewise needs --linear off"),
    (["--no-input_skip"], "--no-input_skip needs --linear off"),
])
def test_bad_input_to_train(tmp_path, flags, words, smallest):
    assert words in sentence(train, *TINY, "--out", tmp_path / "run", *flags)
    assert not (tmp_path / "run" / "latest.pt").exists()


def test_bad_files_and_folders(tmp_path, smallest):
    empty, images = tmp_path / "empty", tmp_path / "images"
    empty.mkdir()
    assert "no images" in sentence(train, *TINY, "--data", empty, "--out", tmp_path / "a")
    folder_of(images, 5, ext="jpg")
    broken = (images / "02.jpg").read_bytes()
    (images / "02.jpg").write_bytes(broken[:len(broken) // 3])
    output = command("train.py", *TINY, "--steps", 2, "--data", images, "--eval_images", 5, "--out", tmp_path / "b")
    assert "02.jpg" in output and "1 unreadable images were replaced" in output
    assert json.loads((tmp_path / "b" / "metrics.json").read_text())["images"] == 4
    message = sentence(train, *TINY, "--enc", "dc_f8c4", "--enc_ckpt", tmp_path / "b" / "model.safetensors",
                       "--out", tmp_path / "c")
    assert "model.safetensors" in message  # another configuration's


@slow
@pytest.mark.parametrize("enc,loss,phases", [("dc_f8c4", "eqm", (1, 2, 3)), ("vq_f8c4", "fm", (2,))])
def test_what_each_phase_trains(tmp_path, smallest, enc, loss, phases):
    latent = ("encoder.stages.3.", "encoder.down.3.", "encoder.mid.", "encoder.norm_out.", "encoder.quant.",
              "encoder.conv_out.", "decoder.conv_in_z.", "decoder.norm_z.", "decoder.context.", "decoder.blocks.0.ada.")
    head = ("decoder.up.3.", "decoder.norm_out.", "decoder.conv_out.")
    moving = {1: lambda k: True, 3: lambda k: k.startswith(head),
              2: lambda k: k.startswith(latent) or (k.startswith("decoder.") and "norm1.proj." in k)}
    model = DCSSDAE(enc, "XS", loss, 0.125, depth=1, latents={"mean": [0.0] * 4, "std": [1.0] * 4})
    randomise(model, scale=0.5).save(tmp_path / "start.safetensors")
    before = model.state_dict()
    for phase in phases:
        moves, out = moving[phase], tmp_path / str(phase)
        command(train, "--phase", phase, "--init_from", tmp_path / "start.safetensors", "--size", 16, "--batch_size", 2,
                "--steps", 2, "--warmup", 0, "--w_lpips", 0, "--w_repa", 0, "--device", "cpu", "--dtype", "float32",
                "--workers", 0, "--eval_images", 2, "--eval_steps", 1, "--log_every", 1, "--weight_decay", 0.5,
                "--ema", 0.1, "--out", out)
        state = latest(out)
        for k, v in before.items():
            moved = not torch.equal(v, state["model"][k])
            assert moved == moves(k) or moves(k) and not v.any(), (phase, k)  # what is zero has no decay ...
            assert torch.equal(v, state["ema"][k]) != moved
        assert len(state["optimizer"]["state"]) == len([k for k, _ in model.named_parameters() if moves(k)])
        assert step_lines(out)[0]["lr"] == {1: 6.4e-5, 2: 1.6e-5, 3: 5.4e-5}[phase] and state["args"]["enc"] == enc
        latents_then = DCSSDAE.load(out / "model.safetensors").config["latents"]
        assert (latents_then is None) == (phase < 3)  # statistics of latents that have changed are dropped


def test_defaults_of_phases_and_of_a_model_to_start_from(tmp_path):
    start = tmp_path / "m.safetensors"
    DCSSDAE("dc_f8c4", "XS", "fm", 0.0625, depth=1).save(start)
    args = train.get_args(["--phase", "2", "--init_from", str(start)])
    assert (args.size, args.lr, args.enc, args.loss, args.depth) == (512, 1.6e-5, "dc_f8c4", "fm", 1)
    assert args.w_repa == 0 and "phase2" in args.out
    assert train.get_args(["--phase", "3", "--init_from", str(start), "--size", "64"]).size == 64
    args = train.get_args([])
    assert (args.size, args.aug_scale, args.lr, args.batch_size) == (128, 2.0, 3e-4, 192)  # SSDD's recipe
    for flags, words in ((["--dec", "S"], "holds a model with --dec XS, but S was given"),
                         (["--window", "5"], "holds a model with --window 17, but 5 was given"),
                         (["--phase", "2", "--freeze_enc"], "--freeze_enc needs")):
        with pytest.raises(ValueError, match=words):
            train.get_args(["--init_from", str(start), *flags])


def test_the_linear_base_stays_as_it_is(tmp_path, smallest):
    """In training, and of a student of distillation."""
    command(train, *SMALL, "--enc", "dc_f32c32", "--size", 32, "--steps", 2, "--warmup", 0, "--weight_decay", 0.5,
            "--lr", 0.01, "--out", tmp_path / "r")
    command(distill, *DISTILL, "--ckpt", tmp_path / "r" / "model.safetensors", "--steps", 2, "--warmup", 0,
            "--lr", 0.01, "--out", tmp_path / "d")
    for folder in ("r", "d"):
        decoder = DCSSDAE.load(tmp_path / folder / "model.safetensors").decoder
        assert torch.equal(decoder.base.weight[:, :, 0, 0], torch.eye(32)) and not decoder.base.bias.any()
        assert decoder.conv_out.weight.any()


def test_checkpointing_works_on_a_loaded_model(tmp_path, monkeypatch, smallest):
    """--init_from gives a model in evaluation mode, which would compute without it."""
    calls = []
    monkeypatch.setattr(model_module, "checkpoint", lambda block, *a, **kw: (calls.append(block), block(*a))[1])
    DCSSDAE("dc_f8c4", "XS", enc_width=0.0625, depth=1).save(tmp_path / "m.safetensors")
    command(train, *SMALL, "--init_from", tmp_path / "m.safetensors", "--checkpointing", "--steps", 1, "--out",
            tmp_path / "r")
    assert calls


def test_the_discriminators_gradients_and_when_it_starts(tmp_path, smallest):
    """One step: the discriminator's Adam moment is (1 - beta) times the gradient that autograd gives for the hinge loss
    on the whole batch, whatever the micro-batch; the model's is that of the weighted sum. Before gan_start nothing
    differs from a run without."""
    common = [*SMALL, "--optimizer", "adamw", "--eval_every", 0, "--eval_images", 1, "--grad_clip", 1e9,
              "--ema_start", 2, "--linear", "off"]
    command(train, *common, "--w_gan", 0.5, "--micro_batch", 3, "--steps", 1, "--out", tmp_path / "g")
    state = latest(tmp_path / "g")
    args = train.get_args([*map(str, common), "--w_gan", "0.5"])
    torch.manual_seed(0)
    model, gan = train.new_model(args), PatchGAN()
    x, _ = next(iter(data.make_loader(data.make_dataset("demo", 24, True), 4, True)))
    e, eps, g = losses.draw(0, 0, range(4), x.shape[1:], (16, 3, 3), x.device, "eqm", g_power=args.g_power)
    g = g[:, None, None, None]
    x_g = g * x + (1 - g) * e
    posterior = model.encode(x)
    f = model.decoder(x_g, posterior.mean + (posterior.logvar / 2).exp() * eps)
    estimate = x_g - f  # c linear, lam 1
    hinge = hinge_loss(gan(x), gan(estimate.detach()))
    weights = [p for p in gan.parameters() if p.ndim == 4]                      # AdamW's first group, which decays
    others = [p for p in gan.parameters() if p.ndim != 4]
    for i, gradient in enumerate(torch.autograd.grad(hinge, weights + others)):
        found = state["gan_optimizer"]["state"][i]["exp_avg"] / (1 - 0.5)
        assert (found - gradient).abs().max() <= 1e-3 * gradient.abs().max() + 1e-6
    total = (f - (1 - g) * (e - x)).square().mean() + 1e-6 * posterior.kl().mean() - 0.5 * gan(estimate).mean()
    names = [k for k, p in model.named_parameters() if p.ndim in (2, 4)]  # AdamW's first group, which decays
    for name in ("decoder.conv_out.weight", "encoder.conv_out.weight"):
        gradient = torch.autograd.grad(total, model.get_parameter(name), retain_graph=True)[0]
        assert relative_error(state["optimizer"]["state"][names.index(name)]["exp_avg"] / (1 - 0.9), gradient) < 1e-4
    line = step_lines(tmp_path / "g")[0]
    assert line["loss"] == pytest.approx(total.item(), rel=1e-4)
    assert line["gan_d"] == pytest.approx(hinge.item(), rel=1e-4)

    for name, flags in (("without", []), ("with", ["--w_gan", 0.5, "--gan_start", 2])):
        command(train, *common, *flags, "--steps", 2, "--out", tmp_path / name)
    without, late = latest(tmp_path / "without"), latest(tmp_path / "with")
    assert all(torch.equal(v, late["model"][k]) for k, v in without["model"].items())
    assert "gan" not in step_lines(tmp_path / "with")[1] and late["gan_optimizer"]["state"] == {}
    assert all(torch.equal(v, late["gan"][k]) for k, v in gan.state_dict().items())
    assert all(torch.equal(v, without["ema"][k]) for k, v in without["model"].items())  # until --ema_start: a copy


@slow
def test_boards_show_the_log(tmp_path, monkeypatch, smallest):
    """TensorBoard, also of a run that goes on. Weights & Biases into --out, without an account: numbers and pictures
    under the folder's name, so that a resumed run is the same one; complete when the process has ended."""
    pytest.importorskip("wandb")
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    other = aside(run, tmp_path / "o", *SMALL, "--wandb", "--out", tmp_path / "w", "--steps", 1,
                  env={"WANDB_MODE": "offline", "WANDB_SILENT": "true"})
    flags = [*SMALL, "--tensorboard", "--out", tmp_path / "r"]
    command(train, *flags, "--steps", 2)
    command(train, *flags, "--steps", 3, "--resume")
    board = events.EventAccumulator(str(tmp_path / "r")).Reload()
    log = step_lines(tmp_path / "r")
    for name in ("loss", "lr", "grad_norm", "peak_mib"):
        expected = [(line["step"], pytest.approx(line[name])) for line in log]
        assert [(v.step, v.value) for v in board.Scalars(name)] == expected
    row = lines_of(tmp_path / "r" / "log.jsonl")[-1]["eval"][2]
    assert board.Scalars("1 step/psnr")[-1].value == pytest.approx(row["psnr"])
    assert [v.step for v in board.Images("reconstructions")] == [2, 3]
    other.result()
    (folder,) = (tmp_path / "w" / "wandb").glob("offline-run-*-w")
    content = (folder / "run-w.wandb").read_bytes()
    assert b"grad_norm" in content and b"1 step/psnr" in content
    assert list((folder / "files" / "media").rglob("*.png"))
    for flag, module in (("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, module, None)
        assert f"pip install {flag}" in sentence(train, *SMALL, f"--{flag}", "--out", tmp_path / flag)


# ---------------------------------------------------------------------------------------------------------------------
# distill.py
# One step comes closer to the teacher's several; encoder and latents stay.

@slow
def test_distill(trained, tmp_path):
    _, output = run(tmp_path / "o", "--ckpt", trained / "model.safetensors", *DISTILL, "--steps", 3, "--size", 40,
                    "--out", tmp_path / "d", module="distill")
    assert "mean squared distance of one step to the teacher's 2 steps" in output
    teacher, student = (DCSSDAE.load(folder / "model.safetensors") for folder in (trained, tmp_path / "d"))
    assert all(torch.equal(a, b) for a, b in zip(*(m.encoder.state_dict().values() for m in (teacher, student))))
    assert torch.equal(teacher.decoder.norm_z.running_var, student.decoder.norm_z.running_var)  # latents stay valid
    notes = student.config["notes"]
    assert notes["size"] == 40 and notes["distilled_from_steps"] == 2 and "best" not in notes
    assert DCSSDAE.load(tmp_path / "d" / "best.safetensors").config["notes"]["best"]["step"] == 3
    assert notes["w_lpips"] == 0 and teacher.config["notes"]["size"] == 32
    assert not torch.equal(teacher.decoder.conv_out.weight, student.decoder.conv_out.weight)
    assert [line["step"] for line in step_lines(tmp_path / "d")] == [1, 2, 3]
    assert "mse_to_teacher" in lines_of(tmp_path / "d" / "log.jsonl")[-1]


@slow
def test_distillation_brings_one_step_to_the_teacher(tmp_path, smallest):
    """A student that starts from random weights learns the teacher's several steps: enough steps that it must get
    closer."""
    model = DCSSDAE("dc_f8c4", "XS", "eqm", 0.0625, depth=1, input_skip=True, notes={"size": 16, "w_lpips": 0})
    randomise(model, scale=0.7).save(tmp_path / "t.safetensors")
    command(distill, "--ckpt", tmp_path / "t.safetensors", *DISTILL, "--steps", 10, "--batch_size", 8,
            "--teacher_steps", 4, "--lr", 1e-3, "--warmup", 0, "--decay", 0, "--ema", 0.7, "--eval_images", 8,
            "--out", tmp_path / "d")
    distance = json.loads((tmp_path / "d" / "metrics.json").read_text())["mse_to_teacher"]
    assert distance["distilled"] < 0.8 * distance["undistilled"], distance


def test_distillation_in_micro_batches_with_evaluations_on_the_way(tmp_path, smallest):
    start = tmp_path / "m.safetensors"
    DCSSDAE("dc_f8c4", "XS", "eqm", 0.0625, depth=1, notes={"size": 16, "w_lpips": 0}).save(start)
    common = ["--ckpt", start, *DISTILL, "--steps", 2, "--out"]
    command(distill, *common, tmp_path / "a")
    command(distill, *common, tmp_path / "b", "--micro_batch", 3, "--checkpointing", "--eval_every", 1)
    a, b = (DCSSDAE.load(tmp_path / name / "model.safetensors").state_dict() for name in "ab")
    assert all(torch.allclose(v.float(), b[k].float(), atol=2e-4) for k, v in a.items())
    losses_of = [[line["loss"] for line in step_lines(tmp_path / name)] for name in "ab"]
    assert losses_of[0] == pytest.approx(losses_of[1], rel=1e-4)
    assert [line["step"] for line in lines_of(tmp_path / "b" / "log.jsonl") if "eval" in line] == [1, 2]


def test_distillation_writes_its_metrics_before_it_compares(tmp_path, checkpoint, monkeypatch):
    def lost(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(distill, "closeness", lost)
    flags = [*DISTILL, "--ckpt", checkpoint, "--steps", 1, "--out", tmp_path]
    assert "Input/output error" in sentence(distill, *flags)
    assert json.loads((tmp_path / "metrics.json").read_text())["images"] == 2


# ---------------------------------------------------------------------------------------------------------------------
# fid.py: features and Frechet distances
# Inception and DINOv2 against the original code (random weights), distances against numpy and pytorch-fid.


def test_inception_equals_pytorch_fid(inception_file, monkeypatch):
    peer = pytest.importorskip("pytorch_fid.inception")
    state = torch.load(inception_file, weights_only=True)
    monkeypatch.setattr(peer, "load_state_dict_from_url", lambda *args, **kwargs: state)
    state |= {k: v for k, v in fid.InceptionFeatures(inception_file).state_dict().items() if k.endswith("tracked")}
    theirs, ours = peer.InceptionV3().eval(), fid.InceptionFeatures(inception_file)
    for h, w in ((299, 299), (40, 70)):
        image = torch.randint(0, 256, (1, 3, h, w), dtype=torch.uint8)
        with torch.no_grad():
            want = theirs(image / 255)[0].flatten(1)
        got = ours(image)
        assert got.shape == (1, 2048) and got.dtype == torch.float32 and want.std() > 0.1
        assert (got - want).norm() / want.norm() < 1e-4
        assert torch.equal(ours(image / 127.5 - 1 + 0.001), got)  # floats are rounded to 8 bit
    assert ours.sha256 == hashlib.sha256(inception_file.read_bytes()).hexdigest()
    assert not any(p.requires_grad for p in ours.parameters())


def test_networks_that_cannot_be_had(tmp_path, offline):
    """A file of another network: an error, which names it."""
    assert "at least 16 px" in fid.load_metrics(8, "cpu", features=())[2]["lpips_vgg"]
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    for name in ("text.pth", "other.pth"):
        for network in (fid.InceptionFeatures, fid.DINOv2Features):
            with pytest.raises(ValueError, match=name):
                network(tmp_path / name)
    save_file({"weight": torch.zeros(3)}, tmp_path / "resnet10t.safetensors")
    for name, words in (("resnet10t", "does not hold the weights"), ("nonesuch", "timm knows no network nonesuch")):
        with pytest.raises(ValueError, match=words):
            fid.load_features(str(tmp_path / f"{name}.safetensors"))


def gaussian(rng, d, n):
    f = rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + rng.standard_normal(d)
    return f, f.mean(0), np.cov(f, rowvar=False)


def test_frechet_distance_closed_forms_and_parity():
    assert fid.frechet_distance(1.0, 4.0, 3.0, 9.0) == pytest.approx(4 + (2 - 3) ** 2)
    a, b = np.array([1.0, 4, 9]), np.array([16.0, 1, 0])
    assert fid.frechet_distance(np.zeros(3), np.diag(a), np.ones(3), np.diag(b)) == pytest.approx(
        3 + ((a**0.5 - b**0.5) ** 2).sum())
    rng = np.random.default_rng(0)
    (_, m1, s1), (_, m2, s2) = gaussian(rng, 64, 1000), gaussian(rng, 64, 1000)
    assert fid.frechet_distance(m1, s1, m1, s1) < 1e-9 * np.trace(s1)
    assert fid.frechet_distance(*map(torch.from_numpy, (m1, s1, m2, s2))) == fid.frechet_distance(m1, s1, m2, s2)
    peer = pytest.importorskip("pytorch_fid.fid_score")
    try:
        want = peer.calculate_frechet_distance(m1, s1, m2, s2)
    except TypeError:  # newer scipy: sqrtm has lost the argument that pytorch-fid 0.3 passes
        root = peer.linalg.sqrtm
        peer.linalg.sqrtm = lambda a, disp=True: (root(a), 0.0) if not disp else root(a)
        want = peer.calculate_frechet_distance(m1, s1, m2, s2)
        peer.linalg.sqrtm = root
    assert fid.frechet_distance(m1, s1, m2, s2) == pytest.approx(want, rel=1e-6)


def test_frechet_distance_of_rank_deficient_covariances():
    rng = np.random.default_rng(1)
    for n1, n2 in ((5, 9), (9, 300), (2, 2)):
        (_, m1, s1), (_, m2, s2) = gaussian(rng, 128, n1), gaussian(rng, 128, n2)
        d = fid.frechet_distance(m1, s1, m2, s2)
        assert math.isfinite(d) and d >= 0 and isinstance(d, float)
        assert d == pytest.approx(fid.frechet_distance(m2, s2, m1, s1), rel=1e-9)
        assert 0 <= fid.frechet_distance(m1, s1, m1, s1) < 1e-9 * np.trace(s1)
    zero = np.zeros((3, 3))
    assert fid.frechet_distance(np.zeros(3), zero, np.ones(3), np.eye(3)) == pytest.approx(6)
    with pytest.raises(ValueError, match="finite"):
        fid.frechet_distance(np.zeros(3), zero * np.nan, np.zeros(3), zero)
    with pytest.raises(ValueError, match="sizes"):
        fid.frechet_distance(np.zeros(3), zero, np.zeros(2), np.eye(2))


def test_statistics_equal_numpy_in_any_batches():
    f, mu, sigma = gaussian(np.random.default_rng(2), 32, 101)
    for offset in (0, 1e6):  # at 1e6 a difference of raw sums would lose 12 digits
        for sizes in ((101,), (1, 60, 0, 40), (50, 51)):
            s = fid.Statistics(32)
            for batch in torch.from_numpy(f + offset).split(list(sizes)):
                s.update(batch)
            assert s.n == 101
            np.testing.assert_allclose(s.mu, mu + offset, rtol=1e-12)
            np.testing.assert_allclose(s.sigma, sigma, rtol=1e-6 if offset else 1e-12, atol=1e-6 if offset else 1e-12)
    with pytest.raises(ValueError, match="at least 2"):
        fid.Statistics(32).sigma  # noqa: B018


def test_statistics_files_are_interchangeable(tmp_path):
    f, mu, sigma = gaussian(np.random.default_rng(3), 16, 40)
    s = fid.Statistics(16)
    s.update(torch.from_numpy(f))
    s.save(tmp_path / "a.npz")
    assert os.listdir(tmp_path) == ["a.npz"]
    again = fid.Statistics.load(tmp_path / "a.npz")
    assert again.n == 40 and np.array_equal(again.mu, s.mu) and np.allclose(again.sigma, s.sigma, rtol=1e-14)
    np.savez_compressed(tmp_path / "peer.npz", mu=mu, sigma=sigma)  # what pytorch-fid --save-stats writes
    peers = fid.Statistics.load(tmp_path / "peer.npz")
    assert peers.n is None and np.array_equal(peers.sigma, sigma)
    np.savez(tmp_path / "wrong.npz", x=mu)
    np.savez(tmp_path / "shape.npz", mu=mu, sigma=sigma[:3])
    (tmp_path / "text.npz").write_text("hello")
    for name in ("wrong", "shape", "text"):
        with pytest.raises(ValueError, match=f"{name}.npz does not hold FID statistics"):
            fid.Statistics.load(tmp_path / f"{name}.npz")
    peer = pytest.importorskip("pytorch_fid.fid_score")
    m, c = peer.compute_statistics_of_path(str(tmp_path / "a.npz"), None, 1, 16, "cpu")
    assert np.array_equal(m, s.mu) and np.array_equal(c, s.sigma)


@pytest.fixture(scope="session")
def timm_file(tmp_path_factory):
    """A small network's random weights, under the name that timm knows it by."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("timm") / "resnet10t.c3_in1k.safetensors"
    save_file(timm.create_model("resnet10t.c3_in1k").state_dict(), path)
    return path


def test_fid_command(tmp_path, timm_file):
    rng = np.random.default_rng(4)
    for folder, sizes in (("a", [(40, 30), (30, 40), (40, 30)]), ("b", [(64, 64), (64, 64)])):
        (tmp_path / folder / "sub").mkdir(parents=True)
        for i, (w, h) in enumerate(sizes):
            name = tmp_path / folder / ("sub" if i else "") / f"{i}.png"
            Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(name)
    (tmp_path / "a" / "broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    one = fid.read_pixels(tmp_path / "a" / "0.png", 24)
    want = data.prepare_eval(Image.open(tmp_path / "a" / "0.png"), 24)
    assert torch.equal(one, torch.from_numpy(np.array(want)).permute(2, 0, 1))  # --size is evaluate.py's --crop center

    a, b, saved = tmp_path / "a", tmp_path / "b", tmp_path / "a.npz"
    text = command(fid, a, b, "--features", timm_file, "--save", saved)
    number = float(re.search(r"^FD resnet10t.c3_in1k ([\d.]+)$", text, re.MULTILINE)[1])
    network = fid.load_features(str(timm_file))
    for words in ("N = 3 and 2", "biased", "rank-deficient", network.sha256, "skipped 1 unreadable"):
        assert words in text
    distance = fid.distance_between(fid.Statistics.load(saved), fid.folder_statistics(str(b), network))
    assert number == pytest.approx(distance, abs=6e-5) and number > 0
    small = [tmp_path / "c.npz", tmp_path / "d.npz"]  # pytorch-fid's format, of any dimension
    for path, mean in zip(small, (0, 2), strict=True):
        np.savez(path, mu=np.full(4, float(mean)), sigma=np.eye(4))
    _, text = run(tmp_path / "o", *small, module="fid")
    assert text.startswith("FID 16.0000\nN = unknown and unknown")

    (tmp_path / "empty").mkdir()
    none = ["--inception", tmp_path / "none.pth"]
    for argv, words in (
            ([tmp_path / "nowhere", b, *none], "nowhere"), ([tmp_path / "empty", b, *none], "empty"),
            ([a, b, *none], "none.pth"), ([tmp_path / "no.npz", saved], "no.npz"),
            ([a, *none, "--save", tmp_path / "missing" / "a.npz"], f"there is no folder {tmp_path}/missing")):
        assert words in sentence(fid, *argv)


def test_fid_reads_images_as_training_does(tmp_path):
    """8 and 16 bits of one grey are the same; copies in hidden folders do not count; transparency is over white."""
    grey = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for name, picture in ((".ipynb_checkpoints/a", grey), ("a", grey), ("b", grey.astype(np.uint16) * 257)):
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(tmp_path / "c.png")
    one, two, clear = (fid.read_pixels(path) for path in fid.images_under(tmp_path))
    assert torch.equal(one, two) and (clear == 255).all()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_dinov2_features_are_those_of_the_original_code(tmp_path, monkeypatch):
    """Two of the 24 blocks, random weights: written out here after DINOv2's vision_transformer.py."""
    timm = pytest.importorskip("timm")
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, depth=2))
    state = fid.empty_network("vit_large_patch14_dinov2.lvd142m", num_classes=0).state_dict()
    g = torch.Generator().manual_seed(0)
    p = {k: torch.randn(v.shape, generator=g) * 0.03 + (".gamma" in k or "norm" in k and "weight" in k)
         for k, v in state.items()}
    torch.save(p | {"mask_token": torch.zeros(1, 1024)}, tmp_path / "original.pth")
    image = torch.randint(0, 256, (2, 3, 40, 56), generator=g, dtype=torch.uint8)
    network = fid.DINOv2Features(tmp_path / "original.pth")
    got = network(image)

    x = F.interpolate(image.float(), size=(224, 224), mode="bicubic", antialias=True) / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    x = F.conv2d(x, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=14).flatten(2).transpose(1, 2)
    x = torch.cat([p["cls_token"].expand(2, -1, -1), x], 1)
    grid = p["pos_embed"][:, 1:].reshape(1, 37, 37, 1024).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=((16 + 0.1) / 37, (16 + 0.1) / 37), mode="bicubic")
    x = x + torch.cat([p["pos_embed"][:, :1], grid.permute(0, 2, 3, 1).reshape(1, 256, 1024)], 1)
    for i in range(2):
        def layer(name, y, i=i):
            return F.linear(y, p[f"blocks.{i}.{name}.weight"], p[f"blocks.{i}.{name}.bias"])

        def norm(name, y, i=i):
            return F.layer_norm(y, (1024,), p[f"blocks.{i}.{name}.weight"], p[f"blocks.{i}.{name}.bias"], 1e-6)

        q, k, v = layer("attn.qkv", norm("norm1", x)).reshape(2, 257, 3, 16, 64).permute(2, 0, 3, 1, 4)
        attended = (q @ k.transpose(-1, -2) / 8).softmax(-1) @ v
        x = x + p[f"blocks.{i}.ls1.gamma"] * layer("attn.proj", attended.transpose(1, 2).reshape(2, 257, 1024))
        x = x + p[f"blocks.{i}.ls2.gamma"] * layer("mlp.fc2", F.gelu(layer("mlp.fc1", norm("norm2", x))))
    want = F.layer_norm(x, (1024,), p["norm.weight"], p["norm.bias"], 1e-6)[:, 0]
    assert got.shape == (2, 1024) and got.dtype == torch.float32 and want.std() > 0.1
    assert relative_error(got, want) < 1e-4
    assert torch.equal(network(image / 127.5 - 1 + 0.001), got)  # floats are rounded to 8 bit

    save_file(p, tmp_path / "timm.safetensors")  # timm's layout and format: the same network
    assert torch.equal(fid.load_features("dinov2", dinov2=tmp_path / "timm.safetensors")(image), got)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050.lamb_in1k",           # a layer before the classifier
                                  "eva02_tiny_patch14_224.mim_in22k"])         # tables that no file holds
def test_features_of_a_timm_network_by_name(tmp_path, name):
    timm = pytest.importorskip("timm")
    net = timm.create_model(name, pretrained=False).eval()
    path = str(tmp_path / f"{name}.safetensors")
    save_file(net.state_dict(), path)
    network, images = fid.load_features(path), torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8)
    x = F.interpolate(images / 255, size=net.pretrained_cfg["input_size"][1:], mode="bicubic", antialias=True)
    mean, std = (torch.tensor(net.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        want = net.forward_head(net.forward_features((x - mean) / std), pre_logits=True)
    assert network(images).shape == (2, network.dim) and relative_error(network(images), want) < 1e-5
    assert network.sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# evaluate.py
# Metrics of images against closed forms and scikit-image.

def test_to8bit_and_psnr():
    x = torch.tensor([-3.0, -1, -0.999, 0.0, 0.5, 1, 7])
    levels = (evaluate.to8bit(x) + 1) * 127.5
    torch.testing.assert_close(levels, torch.tensor([0.0, 0, 0, 128, 191, 255, 255]), rtol=0, atol=1e-4)
    assert torch.equal(evaluate.to8bit(evaluate.to8bit(x)), evaluate.to8bit(x))
    one_level = torch.tensor((2 / 255) ** 2)
    assert float(evaluate.psnr(one_level)) == pytest.approx(20 * math.log10(255), abs=1e-5)  # 48.13 dB
    assert float(evaluate.psnr(torch.tensor(0.0))) == pytest.approx(100)


def test_ssim_equals_scikit_image():
    x = evaluate.to8bit(demo_batch())
    noise = 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    assert evaluate.ssim(x, x).tolist() == pytest.approx([1] * 3, abs=1e-6)
    for side in (1, 5, 8):  # smaller than the window
        assert bool(evaluate.ssim(x[..., :side], x[..., :side] * 0.5).isfinite().all())
    peer = pytest.importorskip("skimage.metrics")
    for y in (evaluate.to8bit(x + noise), evaluate.to8bit(F.avg_pool2d(x, 3, 1, 1)), -x, torch.ones_like(x)):
        for k, got in enumerate(evaluate.ssim(x, y)):
            a, b = (((t[k] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy() for t in (x, y))
            want = peer.structural_similarity(a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
                                              data_range=255, channel_axis=2)
            assert float(got) == pytest.approx(want, abs=1e-5)


def test_hf_ratio_sees_blur_and_noise():
    x = demo_batch()
    energy = evaluate.hf_energy(x)
    blurred = evaluate.hf_ratio(evaluate.hf_energy(F.avg_pool2d(x, 3, 1, 1)), energy)[0]
    noisy = evaluate.hf_ratio(evaluate.hf_energy(x + 0.3 * torch.randn_like(x)), energy)[0]
    assert evaluate.hf_ratio(energy, energy) == (pytest.approx(1), pytest.approx(0, abs=1e-6))
    assert blurred < 0.5 and noisy > 1.2
    assert evaluate.hf_ratio(evaluate.hf_energy(0.5 * x), energy)[0] == pytest.approx(0.25, rel=1e-4)  # an energy
    assert evaluate.hf_ratio(evaluate.hf_energy(torch.full((2, 3, 16, 16), 0.3)), torch.zeros(2)) == (None, None)
    ramp = torch.linspace(-1, 1, 48).expand(1, 3, 48, 48)  # low frequencies only, though its borders do not match
    assert float(evaluate.hf_energy(ramp)) < 1e-3 * float(energy.mean())


# The numbers of the tables, in any batches and processes, with and without networks; own pictures.

class FakeAutoencoder:
    """An autoencoder that loses nothing, but for what `damage(image, noise, steps)` does."""
    downscale = 8

    def __init__(self, damage=lambda x, noise, steps: x):
        self.damage = damage

    def encode(self, x):
        return types.SimpleNamespace(mode=lambda: x)

    def sample(self, z, steps=1, noise=None, **options):
        return self.damage(z, noise, steps), torch.arange(len(z)) % 2 + steps


def batches_of(x, batch):
    return list(zip(x.split(batch), torch.arange(len(x)).split(batch), strict=True))


def one_step(damage, batches, **options):
    """The row of one step of an autoencoder with this damage."""
    return evaluate.evaluate(FakeAutoencoder(damage), batches, **options)["rows"][2]


def test_evaluate_gives_the_expected_numbers():
    x = demo_batch(6, 32)
    result = evaluate.evaluate(FakeAutoencoder(), batches_of(x, 4), steps=(1, 4), features={"rfid": TinyInception()},
                               distances={"lpips_vgg": lambda a, b: (a - b).abs().mean((1, 2, 3))})
    baseline, linear, one, four = result["rows"]
    assert result["images"] == 6 and [row["steps"] for row in result["rows"]] == [0, 0, 1, 4]
    assert one["psnr"] == pytest.approx(100) and one["ssim"] == pytest.approx(1) and one["hf"] == pytest.approx(1)
    assert one["lpips_vgg"] == 0 and one["psnr_se"] == 0 and one["ms"] > 0
    assert baseline["rfid"] > 1e-4 and 0 <= one["rfid"] < 1e-9
    assert (one["nfe"], four["nfe"]) == (1.5, 4.5) and one["nfe_se"] == pytest.approx(0.5 * (6 / 5) ** 0.5 / 6**0.5)
    small = F.interpolate(x, (4, 4), mode="bilinear", antialias=True)
    y = ((F.interpolate(small, (32, 32), mode="bilinear") * 127.5 + 127.5).clamp(0, 255).round()).double()
    mse = ((x * 127.5 + 127.5).round().double() - y).square().mean((1, 2, 3))
    db = 10 * torch.log10(255**2 / mse)
    assert baseline["psnr"] == pytest.approx(float(db.mean()), abs=1e-4)
    assert baseline["psnr_se"] == pytest.approx(float(db.std() / 6**0.5), rel=1e-4)
    assert baseline["psnr_pooled"] == pytest.approx(10 * math.log10(255**2 / float(mse.mean())), abs=1e-4)
    assert baseline["hf"] < 0.1 and "nfe" not in baseline
    rows = result["pictures"]
    assert len(rows) == 5 and all(row.shape == (6, 3, 32, 32) for row in rows) and torch.equal(rows[0], rows[3])
    code = LappedCode(8, 3)  # as many numbers as the "latent" here has channels
    mse = (evaluate.to8bit(code.decode(code.encode(x))) - evaluate.to8bit(x)).square().mean((1, 2, 3))
    assert linear["psnr"] == pytest.approx(float(evaluate.psnr(mse).mean()), abs=1e-4)
    assert one["cells"] == pytest.approx(1) and 0.5 < linear["cells"] < 2

    cells = F.avg_pool2d(x, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    whole = batches_of(x, 6)
    assert one_step(lambda *_: cells, whole)["cells"] is None  # no step at all but at the borders: not a number
    assert one_step(lambda z, *_: (z + cells) / 2, whole)["cells"] > 2
    blurred = one_step(lambda z, *_: F.avg_pool2d(z, 3, 1, 1), whole)
    assert baseline["psnr"] < blurred["psnr"] < 60 and blurred["hf"] < 0.5
    bright = one_step(lambda z, *_: z + 2 / 255, batches_of(x.clamp(-1, 0.9), 4))  # by one level
    assert bright["psnr"] == pytest.approx(20 * math.log10(255), abs=0.3)
    with pytest.raises(ValueError, match="not one image"):
        evaluate.evaluate(FakeAutoencoder(), [])
    with pytest.raises(ValueError, match="twice"):
        evaluate.evaluate(FakeAutoencoder(), batches_of(x, 3)[:1] * 2)


def test_noise_depends_on_seed_and_index_alone():
    x = demo_batch(5, 16)
    values = [one_step(lambda z, noise, steps: z + 0.2 * noise, batches_of(x, batch), seed=seed)["psnr"]
              for batch, seed in ((5, 0), (2, 0), (5, 1))]
    assert values[0] == pytest.approx(values[1], rel=1e-7) and values[0] != values[2]
    a, b = sampler.image_noise(0, [3, 2**33], (3, 8, 8))
    assert torch.equal(a, sampler.image_noise(0, torch.tensor([3]), (3, 8, 8))[0]) and not torch.equal(a, b)


@slow
def test_two_processes_equal_one(tmp_path, checkpoint, vgg_file, timm_file):
    """5 images, which 2 processes do not divide, and a broken file: everything but the time is the same, and so are the
    folders of --save_images, of which fid.py makes the same distance."""
    for i in range(6):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.{'bmp' if i == 3 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(data.demo_image(32, 0, "val", i)).save(path)
    (tmp_path / "images" / "a" / "0.png").write_bytes(b"broken")
    runs, reports, saved = [], [], []
    for n in (1, 2):
        # batches of 1: other batch sizes round convolutions differently, and a level may flip
        runs.append(aside(
            run, tmp_path / f"o{n}", "--ckpt", checkpoint, "--data", tmp_path / "images", "--steps", 2, 1,
            "--batch_size", 1, "--workers", 0, "--device", "cpu", "--features", timm_file, "--lpips_net", "vgg",
            "--lpips_weights", vgg_file, "--out", tmp_path / str(n), "--save_images", tmp_path / f"s{n}",
            module="evaluate", world=n))
    for n, each in zip((1, 2), runs, strict=True):
        each.result()
        reports.append(json.loads((tmp_path / str(n) / "metrics.json").read_text()))
        saved.append({str(path.relative_to(tmp_path / f"s{n}")): np.array(Image.open(path))
                      for path in sorted((tmp_path / f"s{n}").rglob("*.png"))})
    one, two = reports
    assert one["images"] == two["images"] == 5 and one["skipped"] == two["skipped"] == 1
    metric = "fd_resnet10t.c3_in1k"
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert a.keys() == b.keys() and {"psnr", "psnr_pooled", "ssim", "hf", metric, "lpips_vgg"} <= a.keys()
        for key in a.keys() - {"ms"}:
            assert b[key] == (a[key] if isinstance(a[key], (str, type(None))) else pytest.approx(a[key], rel=1e-6)), key
    pictures = [np.asarray(Image.open(tmp_path / n / "reconstructions.png")) for n in "12"]
    assert np.array_equal(*pictures)

    names = [f"{folder}/{'ab'[i % 2]}/{i}.png" for folder in ("originals", "reconstructions") for i in range(1, 6)]
    assert saved[0].keys() == saved[1].keys() == set(names)
    assert all(np.array_equal(saved[0][name], saved[1][name]) for name in names)
    pixels = np.array(Image.open(tmp_path / "images" / "b" / "3.bmp"))
    assert np.array_equal(saved[0]["originals/b/3.png"], pixels)
    mse = np.mean([((saved[0][a].astype(float) - saved[0][b]) ** 2).mean() for a, b in zip(names[:5], names[5:])])
    assert one["rows"][2]["name"] == "2 steps"  # the first of --steps
    assert 10 * np.log10(255**2 / mse) == pytest.approx(one["rows"][2]["psnr_pooled"], abs=1e-4)
    text = command(fid, tmp_path / "s1" / "originals", tmp_path / "s2" / "reconstructions", "--features",
                   timm_file)
    distance = float(re.search(r"^FD resnet10t.c3_in1k ([\d.]+)$", text, re.MULTILINE)[1])
    assert distance == pytest.approx(one["rows"][2][metric], abs=1e-3)
    assert "is not empty" in sentence(evaluate, "--ckpt", checkpoint, "--save_images", tmp_path / "s1", "--limit", 1,
                                      "--out", tmp_path / "o3", "--device", "cpu")


def test_evaluate_command_reports_what_is_unavailable(tmp_path, checkpoint, offline, monkeypatch):
    """... and numbers that are not finite, of a sampler that diverged: "-", null, and the other rows stand."""
    out = tmp_path / "o"
    common = ["--ckpt", checkpoint, "--data", "demo", "--limit", 3, "--workers", 0, "--device", "cpu", "--out", out]
    written = []
    table = evaluate.print_table
    monkeypatch.setattr(evaluate, "print_table", lambda result: (written.extend(os.listdir(out)), table(result)))
    text = command(evaluate, *common, "--steps", 1, 2, "--dtype", "bf16")
    assert sorted(written) == ["metrics.json", "reconstructions.png"]  # on the disk before they are shown
    report = json.loads((out / "metrics.json").read_text())
    assert set(report["unavailable"]) == {"lpips_vgg", "lpips_alex", "rfid"}
    for row in report["rows"]:
        assert row["rfid"] is None and row["lpips_vgg"] is None and row["psnr"] > 0
    assert re.search(r"rFID: unavailable: pt_inception-2015-12-05-\w+.pth .*hub/checkpoints.*--inception FILE", text)
    assert "LPIPS alex: unavailable: " in text and "protocol: 3 " in text
    assert "shrink/enlarge x 8" in text and "2 steps" in text
    assert Image.open(out / "reconstructions.png").height == 5 * 34 + 2  # originals, two references, 1 and 2 steps

    monkeypatch.setattr(fid, "InceptionFeatures", TinyInception)
    text = command(evaluate, *common, "--lpips_net", "vgg", "--steps", 1, 2, "--eta", 1e38)
    report = json.loads((out / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    row = report["rows"][3]
    assert report["rows"][0]["rfid"] > 0 and row["psnr"] is row["rfid"] is row["ssim"] is None
    line = next(line for line in text.splitlines() if line.startswith("2 steps"))
    assert set(line.split()[3:-1]) == {"-"} and float(line.split()[-1]) > 0  # NFE and time are there
    for words in ("rFID (biased, N=3)", "sha256 " + "0" * 64, "a Frechet distance is left out"):
        assert words in text


@pytest.mark.parametrize(("argv", "words"), [
    (["--ckpt", "none.safetensors"], "none.safetensors"),
    (["--ckpt", "text.safetensors"], "text.safetensors"),
    (["--size", 100], "--size 100"),
    (["--data", "nowhere"], "nowhere"),
    (["--sampler", "euler"], "--sampler euler"),
    (["--sampler", "gd", "--mu", 0.3, "--limit", 1], "mu"),
    (["--lpips_net", "vgg", "alex", "--lpips_weights", "f.pth"], "--lpips_weights"),
    (["--inception", "none.pth"], "none.pth"),
    (["--features", "a/resnet10t.safetensors", "b/resnet10t.safetensors"], "two of one name"),
    (["--device", "abacus"], "--device"),
    (["--out", "others"], "that no evaluation wrote"),
    (["--out", "text.safetensors"], "text.safetensors"),
    (["--images", "a.png", "sub/a.png"], "one name"),
])
def test_evaluate_command_stops_with_one_sentence(tmp_path, checkpoint, offline, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    Path("text.safetensors").write_text("hello")
    Path("others").mkdir()
    Path("others", "metrics.json").write_text('{"accuracy": 0.9}')
    assert words in sentence(evaluate, "--ckpt", checkpoint, "--workers", 0, "--device", "cpu", *argv)
    assert json.loads(Path("others", "metrics.json").read_text()) == {"accuracy": 0.9}


def test_dreamsim(tmp_path, checkpoint, offline, monkeypatch):
    calls = []

    def dreamsim(pretrained, device, cache_dir):
        assert pretrained and device == "cpu" and cache_dir.startswith(str(tmp_path))

        def network(x, y):
            assert x.shape[1:] == y.shape[1:] == (3, 224, 224) and 0 <= x.min() and y.max() <= 1
            calls.append(len(x))
            return (x - y).abs().mean((1, 2, 3)).squeeze()  # the package gives () for one image
        return network, None

    monkeypatch.setitem(sys.modules, "dreamsim", types.SimpleNamespace(dreamsim=dreamsim))
    common = ["--ckpt", checkpoint, "--limit", 5, "--batch_size", 4, "--workers", 0, "--device", "cpu", "--out",
              tmp_path / "o", "--features", "--dreamsim"]
    text = command(evaluate, *common)
    assert "DreamSim" in text and "; dreamsim; " in text and "FID" not in text
    assert calls == [4, 4, 4, 1, 1, 1]  # baseline, linear code and one step, batches of 4 and 1
    row = json.loads((tmp_path / "o" / "metrics.json").read_text())["rows"][0]
    x = demo_batch(5, 32)
    y = evaluate.to8bit(evaluate.shrink_enlarge(x, 8))
    small = [F.interpolate(v / 2 + 0.5, (224, 224), mode="bicubic", antialias=True).clamp(0, 1) for v in (x, y)]
    want = (small[0] - small[1]).abs().mean((1, 2, 3))
    assert row["dreamsim"] == pytest.approx(float(want.mean()), rel=1e-4)
    assert row["dreamsim_se"] == pytest.approx(float(want.std() / 5**0.5), rel=1e-3)
    monkeypatch.setitem(sys.modules, "dreamsim", None)
    text = command(evaluate, *common)
    assert "DreamSim: unavailable: " in text and "pip install dreamsim" in text


def test_the_model_in_the_tree_is_above_the_linear_code():
    model = DCSSDAE.load(os.path.join(HERE, "examples", "f32c32.safetensors"))
    x = demo_batch(16, 64)
    with torch.no_grad():
        y = model.decode(model.encode(x).mode(), 1, torch.randn_like(x)).clamp(-1, 1)
        linear = evaluate.linear_code(x, 32, 32).clamp(-1, 1)
    errors = [(image - x).square().mean((1, 2, 3)) for image in (linear, y)]
    gain = 10 * torch.log10(errors[0] / errors[1])
    assert gain.mean() > 0.5 and (gain > 0).sum() > 12


def test_own_pictures(tmp_path, checkpoint):
    sizes = {"a.png": (37, 50), "b.jpg": (64, 24), "c.webp": (9, 3)}
    for k, (name, size) in enumerate(sizes.items()):
        photo(*size, seed=k).save(tmp_path / name)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    files = [tmp_path / name for name in ("a.png", "broken.jpg", "b.jpg", "none.png", "c.webp")]
    common = ["--ckpt", checkpoint, "--device", "cpu", "--steps", 2, "--out", tmp_path]
    lines = command(evaluate, *common, "--images", *files[::2]).splitlines()
    model = DCSSDAE.load(checkpoint)
    assert len(lines) == 3
    for line, (name, (w, h)), k in zip(lines, sizes.items(), (0, 1, 2), strict=True):
        x = torch.from_numpy(np.array(Image.open(tmp_path / name).convert("RGB"))).permute(2, 0, 1)[None].float()
        generator = sampler.seeded_generator("cpu", 0, k)
        with torch.no_grad():
            y = model.reconstruct(x / 127.5 - 1, 2, generator=generator)
        y = (y.clamp(-1, 1) * 127.5 + 127.5).round()
        grid = np.asarray(Image.open(tmp_path / f"{name}.reconstruction.png")).astype(int)
        assert grid.shape == (h + 4, 3 * w + 8, 3)
        a, b, error = (grid[2:2 + h, 2 + k * (w + 2):2 + k * (w + 2) + w] for k in range(3))
        assert np.array_equal(a, x[0].permute(1, 2, 0).numpy()) and abs(b - y[0].permute(1, 2, 0).numpy()).max() <= 1
        assert np.array_equal(error, np.minimum(4 * abs(a - b), 255))
        db = 10 * np.log10(255**2 / ((a - b) ** 2).mean())
        rows, columns = -(-h // 8), -(-w // 8)
        assert f"{w} x {h}, PSNR {db:.2f} dB, SSIM " in line and f"latent 4 x {rows} x {columns} of 16 bit" in line
        assert f"{3 * h * w} : {8 * rows * columns} bytes = {3 * h * w / (8 * rows * columns):.1f}" in line
    message = sentence(evaluate, *common, "--images", *files)
    assert message.startswith("error: 2 of 5 --images could not be read: ")
    assert "broken.jpg" in message and "none.png" in message


# ---------------------------------------------------------------------------------------------------------------------
# tools/check.py, tools/bench.py
# A healthy machine is healthy; every task runs and prints its line.


def test_check_command(monkeypatch, smallest):
    monkeypatch.setattr(check, "SIZE", 16)
    text = command(check, "values", "ranks", "--device", "cpu")
    assert text.count("values ") == 4 and "left out" in text and text.rstrip().endswith("\nhealthy")
    monkeypatch.setitem(check.LIMITS, "float32", (1e-9, 1e-9))
    with pytest.raises(AssertionError, match="NOT healthy: dc_f8c4 fm in float"):
        command(check, "values", "--device", "cpu")


@slow
def test_bench_command(monkeypatch, smallest):
    monkeypatch.setattr(bench, "JPEG_COUNT", 2)
    if importlib.util.find_spec("diffusers"):
        import diffusers
        narrow = {"encoder_block_out_channels": 6 * (32,), "decoder_block_out_channels": 6 * (32,)}
        monkeypatch.setattr(diffusers, "AutoencoderDC", functools.partial(diffusers.AutoencoderDC, **narrow))
    quick = ["--rounds", 1, "--dec", "XS", "--device", "cpu"]
    with no_values():
        text = command(bench, "decode", "encode", *quick, "--size", 32, "--enc", "vq_f8c4")
        text += command(bench, "train", *quick, "--size", 16, "--enc", "dc_f8c4", "--checkpointing",
                        "--enc_width", 0.0625)
    text += command(bench, "input", "count", *quick)
    rows = [line for line in text.splitlines() if line.startswith(("U-ViT XS", "vq_f8c4"))]
    assert len(rows) == 2 + 4 and all(float(row.split(" M ")[1].split()[2]) > 0 for row in rows)
    assert len(re.findall(r"^input, JPEG .* x$", text, re.MULTILINE)) == 2
    assert len(re.findall(r"^decode XS, 256 px, [CG]PU: \d+ operations, of which kernels", text, re.MULTILINE)) == 2
    if importlib.util.find_spec("diffusers"):
        assert len(re.findall(r"^(KL-VAE|DC-AE f32c32) .* x KL-VAE$", text, re.MULTILINE)) == 4
    monkeypatch.setattr(bench, "peers", dict)
    text = command(bench, "gpu", *quick, "--size", 32, "--minutes", 0.001)
    assert "decode, 32 px, bfloat16, batch 1" in text and text.count("the time is up") == 9


# ---------------------------------------------------------------------------------------------------------------------
# tools/compare.py
# Groups of seeds, their errors, and the curves of a log.

def write_run(folder, gain, baseline=20.0, rate=None, **more):
    """What tools.compare reads of a run; with `rate` its log too, whose last line is cut off. -> folder"""
    rows = [{"name": "shrink x 8", "steps": 0, "psnr": baseline, "ssim": 0.5, "hf": 0.0, **more},
            {"name": "1 step", "steps": 1, "psnr": baseline + gain, "psnr_se": 9.0, "ssim": 0.25 * gain, **more}]
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps({"images": 7, "rows": rows}))
    if rate:
        lines = [{"step": k, "images": 10 * k, "eqm": k / 10, "images_per_s": rate} for k in (50, 120)]
        lines.insert(1, {"step": 100, "eval": rows})
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"st')
    return folder


def test_compare_runs(tmp_path):
    def table(*argv):
        return [re.split("  +", x.strip()) for x in command(compare, *argv).splitlines()]

    # The error of 1, 2, 3 is 1 / sqrt 3; 1200 images at 20, 10, 5 a second are 1, 2, 4 minutes: 7 / 3 +- sqrt(7 / 9).
    runs = [write_run(tmp_path / name, *values, **more) for name, values, more in (
        ("eqm_s0", [1.0], {"rate": 20.0, "lpips_vgg": 0.1, "fd_a": 1.0}),
        ("eqm_s1", [2.0], {"rate": 10.0, "lpips_vgg": 0.2}), ("eqm_s12", [3.0], {"rate": 5.0, "lpips_vgg": 0.3}),
        ("fm", [0.5], {"lpips_vgg": None, "rfid": 4.0}))]
    assert table(*runs, runs[0])[:4] == [
        ["runs", "gain, dB", "PSNR", "SSIM", "HF ratio", "LPIPS vgg", "rFID (biased, N=7)", "minutes"],
        ["shrink x 8", "4", "-", "20.00", "0.5000", "0.000", "-", "-", "-"],
        [f"{tmp_path}/eqm, 1 step", "3", "2.00 +-0.58", "22.00 +-0.58", "0.5000 +-0.1443", "-", "0.2000 +-0.0577", "-",
         "2.3 +-0.9"], [f"{tmp_path}/fm, 1 step", "1", "0.50", "20.50", "0.1250", "-", "-", "4.000", "-"]]
    assert compare.read_run(runs[2])["curves"] == ([(500, 5), (1200, 12)], [(1000, 3)])
    write_run(tmp_path / "fm", 0.5, baseline=21.0)  # another baseline: one for each group
    assert [line[0][len(str(tmp_path)):] + line[3] for line in table(*runs)[1:5:2]] == [
        "/eqm, shrink x 820.00", "/fm, shrink x 821.00"]
    # A run that diverged has no gain, and fewer points on its curves.
    for path in (runs[0] / "metrics.json", runs[0] / "log.jsonl"):
        path.write_text(path.read_text().replace('"psnr": 21.0', '"psnr": null').replace('"eqm": 12.0', '"eqm": null'))
    read = compare.read_run(runs[0])
    assert read["rows"][-1]["gain"] is None and read["curves"] == ([(500, 5)], [])
    assert "nowhere holds no metrics.json of a finished run" in sentence(compare, tmp_path / "nowhere")


def test_curves_of_runs(tmp_path):
    pytest.importorskip("matplotlib")
    runs = [write_run(tmp_path / "eqm_s0", 1.0, rate=20.0), write_run(tmp_path / "fm", 0.5)]
    _, text = run(tmp_path / "o", *runs, "--plot", module="tools.compare", cwd=tmp_path)
    assert "wrote curves.png" in text
    picture = Image.open(tmp_path / "curves.png")
    assert picture.size == (1500, 600) and np.asarray(picture.convert("RGB")).std() > 1
    assert "needs a log.jsonl" in sentence(compare, runs[1], "--plot")


# ---------------------------------------------------------------------------------------------------------------------
# tools/field.py
# Every tile of the picture and every number beside it.

@pytest.mark.parametrize("loss", ["eqm", "fm"])
@torch.no_grad()
def test_field_picture(tmp_path, loss, smallest):
    model = randomise(DCSSDAE("dc_f8c4", "XS", loss, enc_width=0.0625, depth=1, c="trunc", lam=2.0, input_skip=True), 1)
    model.eval().save(tmp_path / "m.safetensors")
    common = ["--ckpt", tmp_path / "m.safetensors", "--size", 32, "--device", "cpu"]
    flags = [*common, "--image", 3, "--seed", 5]
    text = run(tmp_path / "o", *flags, module="tools.field")[1] if loss == "eqm" else command(field, *flags)
    lines = re.findall(r"^[gt] = .*$", text, re.MULTILINE)
    picture = torch.tensor(np.asarray(Image.open(tmp_path / "field.png")))
    assert picture.shape == (4 * 98 + 2, 6 * 98 + 2, 3)

    def check_tile(row, column, y):  # (1, 3, 32, 32), each pixel three times as high and wide, within one level of 255
        y = (y[0].clamp(-1, 1) * 127.5 + 127.5).repeat_interleave(3, 1).repeat_interleave(3, 2).permute(1, 2, 0)
        tile = picture[2 + 98 * row:98 * (row + 1), 2 + 98 * column:98 * (column + 1)]
        assert (tile - y).abs().max() <= 1, (row, column)

    x = data.make_dataset("demo", 32, train=False)[3][0][None]
    e, z, rms = sampler.image_noise(5, [3], x.shape[1:]), model.encode(x).mode(), None
    fm, path, previous, iterates = loss == "fm", e, e, [e]
    for j, t in enumerate(sampler.noise_times(5, sampler.T_SHIFT)):
        g = 1 - torch.tensor([t])
        mixed = fm_mix(x, e, 1 - g)
        f = model.decoder(mixed, z, *[1 - g] * fm)
        estimate = mixed + (1 - g) * f if fm else EqM("trunc", lam=2.0).predict_x(mixed, f, g)
        rms = rms or float(f.square().mean().sqrt())
        for row, y in enumerate((mixed, estimate, f / rms / 2)):
            check_tile(row, j, y)
        db = evaluate.psnr((evaluate.to8bit(estimate) - evaluate.to8bit(x)).square().mean())
        numbers = [float(v) for v in re.findall(r"^[gt] = (\S+): estimate (\S+) dB, field rms (\S+);", lines[j])[0]]
        wanted = float(1 - g if fm else g), float(db), float(f.square().mean().sqrt())
        assert numbers == pytest.approx(wanted, abs=0.006)
    check_tile(0, 5, x), check_tile(1, 0, model.decode(z, 1, e)), check_tile(1, 5, x if fm else estimate)
    for k in range(16):  # the sampler once more: Euler, or Nesterov with eta lam = 0.3
        t, t_next = (1 - k / 16) ** 4, (1 - (k + 1) / 16) ** 4
        y = path if fm else path + 0.3 * (path - previous)
        f = model.decoder(y, z, *[torch.tensor([t])] * fm)
        previous, path = path, y + (t - t_next) * f if fm else y - 0.15 * f
        iterates.append(path)
    for column, k in enumerate((0, 1, 2, 4, 8, 16)):
        check_tile(3, column, iterates[k])
    assert "no readable image" in sentence(field, *common, "--image", 10**6)


# ---------------------------------------------------------------------------------------------------------------------
# tools/latents.py, and what examples/generate.py makes of them
# Stored latents: the same bytes by any processes and after an interruption; whose they are; statistics in the model.

def test_latent_statistics_are_stored_in_the_model(tmp_path, smallest):
    model = randomise(DCSSDAE("dc_f16c4", "XS", "eqm", enc_width=0.0625, depth=1, notes={"size": 32})).eval()
    path = tmp_path / "m.safetensors"
    model.save(path)
    identity = latents.encoder_sha256(model)
    with pytest.raises(ValueError, match="--z_stats"):
        model.normalize(torch.zeros(1, 4, 2, 2))
    common = ["--z_stats", "--device", "cpu", "--workers", 0, "--ckpt", path]
    command(latents, *common, "--limit", 16)
    loaded = DCSSDAE.load(path)
    x = demo_batch(16, 32)
    with torch.no_grad():
        posterior = loaded.encode(x)
        z = posterior.sample(sampler.image_noise(0, range(16), posterior.mean.shape[1:]))
    stored = loaded.config["latents"]
    assert np.allclose(stored["mean"], z.mean(dim=(0, 2, 3)), rtol=1e-3, atol=1e-4)
    assert np.allclose(stored["std"], z.transpose(0, 1).flatten(1).std(dim=1, correction=0), rtol=1e-3)
    assert stored["std_all"] == pytest.approx(float(z.std(correction=0)), rel=1e-3)
    normal = loaded.normalize(z)
    assert normal.mean(dim=(0, 2, 3)).abs().max() < 1e-3
    assert torch.allclose(loaded.denormalize(normal), z, rtol=1e-4, atol=1e-4)

    before = path.read_bytes()
    assert "the same everywhere" in sentence(latents, *common, "--limit", 1, "--size", 16)
    command(latents, *common, "--limit", 4, "--out", tmp_path / "copy")
    assert path.read_bytes() == before
    other = DCSSDAE.load(tmp_path / "copy" / "model.safetensors")
    assert other.config["latents"] != stored and latents.encoder_sha256(other) == identity  # the same latents
    other.decoder.conv_in.weight.data.add_(1)
    assert latents.encoder_sha256(other) == identity
    next(other.encoder.parameters()).data.view(-1)[0].add_(1e-3)
    assert latents.encoder_sha256(other) != identity


def files_of(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@slow
def test_latents(tmp_path, checkpoint, monkeypatch):
    """Same bytes by one process, by two, and after an interruption; labels; the reader; refusals."""
    for k, name in enumerate(("cat", "dog", "dog/puppy")):
        folder_of(tmp_path / "images" / "train" / name, 3, (40, 32))
    folder_of(tmp_path / "images" / "val", 2)
    for broken in sorted((tmp_path / "images" / "train" / "cat").iterdir())[:2]:  # all of the first shard
        broken.write_bytes(b"broken")
    common = ["--ckpt", checkpoint, "--data", tmp_path / "images", "--shard", 2, "--batch_size", 2, "--workers", 0,
              "--device", "cpu", "--out"]
    two = aside(run, tmp_path / "o", *common, tmp_path / "two", module="tools.latents", world=2)
    assert "mean" in command(latents, *common, tmp_path / "one")
    two.result()
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")

    save, calls = latents.save_array, []

    def interrupted(path, array):
        calls.append(path)
        if len(calls) == 6:  # the third shard's labels are there, its latents are not
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, array)

    with monkeypatch.context() as patch:
        patch.setattr(latents, "save_array", interrupted)
        assert "No space left" in sentence(latents, *common, tmp_path / "three")
    assert "shards" not in json.loads((tmp_path / "three" / "manifest.json").read_text())
    assert "no finished latents" in sentence(generate, "--ckpt", checkpoint, "--latents", tmp_path / "three")
    finished = os.stat(tmp_path / "three" / "latents_00001.npy").st_mtime_ns
    other = DCSSDAE.load(checkpoint)
    next(other.encoder.parameters()).data.mul_(1.01)
    other.save(tmp_path / "other.safetensors")
    for change, word in ((["--size", 40], "size"), (["--data", "demo", "--limit", 9], "data"), (["--flip"], "shape"),
                         (["--sample"], "values"), (["--part", "val"], "part"), (["--shard", 3], "shard"),
                         (["--ckpt", tmp_path / "other.safetensors"], "encoder_sha256")):
        assert word in sentence(latents, *common, tmp_path / "three", *change)
    command(latents, *common, tmp_path / "three")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "three")
    assert os.stat(tmp_path / "three" / "latents_00001.npy").st_mtime_ns == finished
    (tmp_path / "three" / "manifest.json").write_text("[1")
    assert "is damaged" in sentence(latents, *common, tmp_path / "three")
    (tmp_path / "three" / "manifest.json").unlink()  # whose shards these are cannot be told
    assert "without their manifest.json" in sentence(latents, *common, tmp_path / "three")

    assert latents.OPENED <= 256  # a system may let a process open 1024 files
    monkeypatch.setattr(latents, "OPENED", 2)  # of four shards
    stored = latents.Latents(tmp_path / "one")
    dataset = data.make_dataset(str(tmp_path / "images"), 32, train=False, split="train")
    items = [item for item in (dataset[i] for i in range(len(dataset))) if item]
    assert len(stored) == len(items) == len(dataset) - 2 == 7 and len(stored.shards) == 4
    assert stored.labels.tolist() == [dataset.labels[i] for _, i in items] and set(stored.labels.tolist()) == {0, 1}
    with torch.no_grad():
        want = DCSSDAE.load(checkpoint).encode(torch.stack([x for x, _ in items])).mode()
    got = torch.stack([stored[i][0] for i in (*range(7), *range(7))][7:])
    assert len(stored.opened) == 2 and all(isinstance(array, np.memmap) for array in stored.opened.values())
    assert torch.allclose(got, want, atol=2e-3 * float(want.abs().max()))
    m = stored.manifest
    assert np.allclose(m["mean"], got.mean((0, 2, 3)), atol=1e-6)
    assert np.allclose(m["std"], got.transpose(0, 1).flatten(1).std(1, correction=0), rtol=1e-5)
    assert m["classes"] == dataset.classes == ["cat", "dog"] and m["shape"] == [4, 4, 4]


def test_latents_of_samples_flipped_and_beyond_float16(tmp_path, checkpoint, monkeypatch):
    common = ["--ckpt", checkpoint, "--limit", 5, "--workers", 0, "--device", "cpu", "--out"]
    command(latents, *common, tmp_path / "z", "--sample", "--flip", "--shard", 3, "--batch_size", 3)
    z = np.concatenate([np.load(tmp_path / "z" / f"latents_0000{k}.npy", mmap_mode="r") for k in range(2)])
    assert z.shape == (5, 2, 4, 4, 4) and (np.load(tmp_path / "z" / "labels_00000.npy") == -1).all()
    dataset = data.make_dataset("demo", 32, False, limit=5, split="train")
    x = torch.stack([dataset[i][0] for i in range(5)])
    noise = sampler.image_noise(0, range(5), (2, 4, 4, 4))
    model = DCSSDAE.load(checkpoint)
    for k, v in enumerate((x, x.flip(3))):
        with torch.no_grad():
            want = model.encode(v).sample(noise[:, k])
        assert torch.allclose(torch.from_numpy(z[:, k]).float(), want, rtol=2e-3, atol=2e-3)
    assert not np.allclose(z[:, 0], z[:, 1], atol=0.05)
    command(latents, *common, tmp_path / "bf16", "--dtype", "bf16")
    half = torch.from_numpy(np.load(tmp_path / "bf16" / "latents_00000.npy")).float()
    with torch.no_grad():
        want = model.encode(x).mode()
    assert 1e-4 < relative_error(half, want) < 0.05
    whose = [json.loads((tmp_path / name / "manifest.json").read_text())["encoder_sha256"] for name in ("z", "bf16")]
    assert whose == [latents.encoder_sha256(model)] * 2  # whatever they were computed in
    large = types.SimpleNamespace(mode=lambda: torch.full((3, 4, 4, 4), 7e4))
    monkeypatch.setattr(DCSSDAE, "encode", lambda self, x: large)
    assert "float16 ends at 65504" in sentence(latents, *common, tmp_path / "large")
    assert os.listdir(tmp_path / "large") == ["manifest.json"]


def stored_latents(folder, z, labels, model, shard=4):
    """Latents z (n, c, h, w) as tools.latents writes them. -> folder"""
    folder.mkdir()
    shards = []
    for k, (part, of_part) in enumerate(zip(z.half().split(shard), np.array_split(labels, math.ceil(len(z) / shard)))):
        np.save(folder / f"z{k}.npy", part.numpy()), np.save(folder / f"l{k}.npy", of_part)
        shards.append({"latents": f"z{k}.npy", "labels": f"l{k}.npy", "count": len(part)})
    manifest = {"encoder_sha256": latents.encoder_sha256(model), "data": "demo", "part": "train", "size": 32,
                "crop": "center", "shape": list(z.shape[1:]), "classes": ["a", "b", "c"], "shards": shards}
    (folder / "manifest.json").write_text(json.dumps(manifest | latents.moments(latents.channel_sums(z.half()))))
    return folder


def test_the_generator_knows_its_latents(tmp_path, checkpoint):
    """A class that the latents do not hold is not sampled, a channel that is the same everywhere is no NaN, and the
    decoder is of the encoder that made them."""
    model = DCSSDAE.load(checkpoint)
    z = torch.randn(12, 4, 4, 4)
    z[:, 2] = 0.1234                                         # not exactly representable: its variance is rounding
    folder = stored_latents(tmp_path / "z", z, np.array([0, 2] * 6), model)
    stored = latents.Latents(folder)
    assert stored.manifest["std"][2] == 0 and stored.std[2] == 1
    drawn = []

    def ema(x, labels, t):
        drawn.extend(labels.tolist())
        return torch.zeros_like(x)

    args = types.SimpleNamespace(eval_images=5, seed=0, eval_steps=1)
    images = torch.cat([*generate.generate(ema, model, stored, args, 0, 1, torch.device("cpu"), None)])
    assert drawn == [0, 2, 0, 2, 0] and images.shape == (5, 3, 32, 32) and images.isfinite().all()

    common = ["--latents", folder, "--width", 64, "--depth", 1, "--steps", 2, "--batch_size", 4, "--eval_images", 2,
              "--eval_steps", 1, "--log_every", 1, "--device", "cpu", "--dtype", "float32", "--out", tmp_path / "g"]
    run(tmp_path / "o", *common, "--ckpt", checkpoint, module="examples.generate")
    assert all(math.isfinite(line["loss"]) for line in step_lines(tmp_path / "g"))
    other = DCSSDAE.load(checkpoint)
    next(other.encoder.parameters()).data.mul_(1.01)
    other.save(tmp_path / "other.safetensors")
    assert "of another encoder" in sentence(generate, *common, "--ckpt", tmp_path / "other.safetensors")

    network = generate.DiT.load(tmp_path / "g" / "model.safetensors")
    empty = generate.DiT(**network.config).to_empty(device="cpu")  # all that a model is stands in its file
    empty.load_state_dict(network.state_dict())
    inputs = torch.randn(2, 4, 4, 4), torch.tensor([0, 2]), torch.tensor([0.3, 0.6])
    assert torch.equal(empty(*inputs), network(*inputs))


# ---------------------------------------------------------------------------------------------------------------------
# tools/study.py
# The numbers of the results page are those of its commands.

@slow
def test_study(tmp_path, monkeypatch, smallest, offline):
    """What is missing is trained, in its order, and evaluated; the table has the evaluations' numbers; nothing is done
    twice, what was interrupted goes on, and without the runs the CSV still gives the table."""
    small = " ".join(map(str, SMALL))
    monkeypatch.setattr(study, "RUNS", {
        "a": f"train.py {small} --steps 2",
        "b": "distill.py --ckpt {runs}/a_s{seed}/model.safetensors --steps 1 --size 16 --batch_size 2 --eval_images 2 "
             "--workers 0",
        "c": "train.py --data {photos}"})
    monkeypatch.setattr(study, "TABLES", {
        "one": ("--limit 3 --device cpu", [("distilled", "b", ""), ("not", "a", "--steps 1 2")]),
        "two": ("--limit 3", [("photographs", "c", "")])})
    commands = []

    def execute(words):
        commands.append(words)
        command(*words)
    flags = ["one", "--runs", tmp_path / "runs", "--csv", tmp_path / "r.csv"]
    with monkeypatch.context() as patch:
        patch.setattr(study, "execute", execute)
        text = command(study, *flags, "--seeds", 0, 1)
    assert [words[0] for words in commands] == 2 * ["train.py", "distill.py", "evaluate.py", "evaluate.py"]
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 1 + 2
    folders = [tmp_path / "runs" / f"a_s{seed}" / "limit_3_device_cpu_steps_1_2" for seed in (0, 1)]
    rows = [json.loads((folder / "metrics.json").read_text())["rows"] for folder in folders]
    for line, k in zip(table[3:], (2, 3)):
        values = torch.tensor([each[k]["psnr"] for each in rows], dtype=torch.float64)
        gains = torch.tensor([each[k]["psnr"] - each[1]["psnr"] for each in rows], dtype=torch.float64)
        for numbers, sign in ((values, ""), (gains, "+")):
            assert f"| {numbers.mean():{sign}.2f} +- {numbers.std() / 2**0.5:.2f} |" in line
        assert line.endswith("| 2 |")

    (tmp_path / "runs" / "a_s1" / "metrics.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(study, "execute", commands.append)
        command(study, *flags, "--seeds", 0, 1)
    assert commands[8] == commands[4] and commands[4][-1] == "--resume"
    shutil.rmtree(tmp_path / "runs")
    assert [x for x in command(study, *flags, "--print").splitlines() if x.startswith("|")] == table
    assert "needs --photos" in sentence(study, "two", *flags[1:])
    with pytest.raises(ValueError, match="ended with exit code 2; its message stands above"):
        study.execute(["no_such_program.py"])


def test_the_pages_of_results_have_the_numbers_of_the_csv():
    """Every table of the study stands on one of them as `--print` makes it from docs/results.csv, and none is empty."""
    pages = [Path(HERE, "docs", page).read_text() for page in ("results.md", "sampling.md")]
    known = study.read_csv(Path(HERE, "docs", "results.csv"))
    for name in study.TABLES:
        table = study.table_of(name, known)
        labels = {line.split("|")[1].strip() for line in table[2:]}
        assert {label for label, _, _ in study.TABLES[name][1]} == labels - {""}, name
        assert any("\n".join(table) in page for page in pages), name


def test_the_readme_has_the_numbers_of_the_csv():
    known = study.read_csv(Path(HERE, "docs", "results.csv"))

    def mean_of(column, run, row="1 step", evaluation="--limit 200 --steps 1"):
        lines = [known[key] for key in known if (key[0], *key[2:]) == (run, evaluation, row)]  # of all seeds
        return np.mean([float(line[column]) for line in lines])

    def nearer(run):
        one, eight = (mean_of("fd", run, row, "--limit 200 --steps 1 4 8") for row in ("1 step", "8 steps"))
        return f"{100 * (1 - eight / one):.0f} %"
    readme = " ".join(Path(HERE, "README.md").read_text().split())
    for words in (f"f32c64 is {mean_of('psnr', 'deep_f32c64') - mean_of('psnr', 'deep_f8c4'):.2f} dB ahead of f8c4",
                  f"EqM's eight are [{nearer('paint_eqm')} nearer]", f"than one, FM's {nearer('paint_fm')}"):
        assert words in readme


# ---------------------------------------------------------------------------------------------------------------------
# tools/sweep.py
# Calibration finds the best steps, on images apart from those that are reported.

class Quadratic:
    """A model for calibrate: descent on sum of a (x - x*)^2 / 2 over two directions, starting at distance 1."""

    def __init__(self, *curvatures):
        self.a, self.config, self.eqm = curvatures, {"loss": "eqm"}, EqM("trunc")

    def measure(self, runs):
        for n, o in runs.values():
            loss = 0.0
            for a in self.a:
                x = previous = 1.0
                for _ in range(n):
                    y = x + o.get("mu", 0) * (x - previous)
                    previous, x = x, y - o["eta"] * a * y
                loss += x * x
            yield {"psnr_pooled": -10 * np.log10(loss) if loss < 1e30 else float("nan")}


def test_calibration_finds_the_best_step_sizes(monkeypatch):
    model = Quadratic(1.0, 4.0)
    monkeypatch.setattr(sweep, "default_eta", lambda eqm, steps: 1.0)
    best = sweep.calibrate(model, [1, 2, 8], lambda runs: list(model.measure(runs)))
    assert set(best) == {(s, n) for s in ("gd", "nesterov") for n in (1, 2, 8)}
    one = best["gd", 1][1]
    assert one["method"] == "gd" and one["eta"] == pytest.approx(5 / 17, rel=0.05)  # minimum of (1-e)^2 + (1-4e)^2
    for (name, n), (score, options) in best.items():  # no worse than a fine grid, but for the resolution of 2^(1/8)
        fine = [{"eta": eta, "mu": mu} for eta in np.geomspace(0.02, 2, 400)
                for mu in ((0,) if name == "gd" else (0.3, 0.6, 0.9))]
        grid = [row["psnr_pooled"] for row in model.measure({i: (n, o) for i, o in enumerate(fine)})]
        assert score >= np.nanmax(grid) - (0.2 if n < 8 else 2), (name, n, options)
    assert best["nesterov", 8][0] > best["gd", 8][0] + 3  # momentum pays on an ill-conditioned problem
    runs = sweep.sweep_runs(best)
    assert len(runs) == 6 + 4 and runs["gd 1 eta " + f"{one['eta']:.3g}"] == (1, one)
    assert [o for _, o in runs.values()][-1] == best["nesterov", 8][1] | {"tol": 0.02}
    diverging = Quadratic(1e6)
    assert np.isfinite(sweep.calibrate(diverging, [9], lambda r: list(diverging.measure(r)))["gd", 9][1]["eta"])


def test_calibration_by_sharpness_and_distance(smallest):
    """With the noise left before the landing as a stand-in for detail: each measure finds its own best times."""
    model = DCSSDAE("dc_f8c4", "XS", "eqm", enc_width=0.0625, depth=0)

    def measure(runs):
        for steps, options in runs.values():
            left = sampler.noise_times(steps, options["t_shift"])[-2]
            distance = abs(left - 0.25) if left < 0.9 else None  # of what has diverged there is none
            yield {"psnr_pooled": 30 - left, "hf": 2 * left, "rfid": distance}

    found = {}
    for by in ("psnr", "hf", "rfid"):
        _, options = sweep.calibrate(model, [2], measure, by)["gd", 2]
        found[by] = sampler.noise_times(2, options["t_shift"])[-2]
    assert found["psnr"] < 1e-3
    assert found["hf"] == pytest.approx(0.5, abs=0.05) and found["rfid"] == pytest.approx(0.25, abs=0.02)


@slow
def test_sweep_command(tmp_path, monkeypatch, vgg_file, smallest):
    """In two processes as in one; on images apart from the calibration's."""
    DCSSDAE("dc_f8c4", "XS", "eqm", enc_width=0.0625, depth=1).save(tmp_path / "m.safetensors")
    seen, subset = [], data.ImageDataset.subset

    def recorded(self, i):
        seen.append(set(self.images[i].tolist()))
        return subset(self, i)

    monkeypatch.setattr(data.ImageDataset, "subset", recorded)
    pytest.importorskip("matplotlib")
    common = ["--ckpt", tmp_path / "m.safetensors", "--steps", 2, 1, "--calibrate", 2, "--limit", 3, "--batch_size", 2,
              "--workers", 0, "--size", 16, "--device", "cpu", "--features", "--lpips_weights", vgg_file]
    two = aside(run, tmp_path / "o", *common, "--out", tmp_path / "2", module="tools.sweep", world=2)
    text = command(sweep, *common, "--plot", "--out", tmp_path / "1")
    assert len(seen) == 2 and len(seen[0]) == 2 and len(seen[1]) == 3 and not seen[0] & seen[1]
    assert "adaptive " in text and "tol 0.02" in text and "on 2 other images" in text
    assert text.endswith(f"wrote sweep.csv and sweep.png to {tmp_path / '1'}\n")
    assert Image.open(tmp_path / "1" / "sweep.png").width > 600
    two.result()
    tables = []
    for n in "12":
        with open(tmp_path / n / "sweep.csv", newline="") as file:
            tables.append(list(csv.DictReader(file)))
        rows = json.loads((tmp_path / n / "metrics.json").read_text())["rows"]
        assert [row["name"] for row in tables[-1]] == [row["name"] for row in rows] and len(rows) == 2 + 4 + 4
        for line, row in zip(tables[-1], rows, strict=True):
            assert float(line["psnr"]) == row["psnr"] and line["nfe"] == str(row.get("nfe", ""))
    for a, b in zip(*tables, strict=True):
        assert a["name"] == b["name"]
        for key in a.keys() - {"name", "method", "ms"}:
            assert a[key] == b[key] == "" or float(a[key]) == pytest.approx(float(b[key]), rel=1e-5), key  # rounding
    for row in rows[2:]:  # the numbers are evaluate's for these options
        assert row["steps"] in (1, 2) and row["t_shift"] > 0 and row["nfe"] <= row["steps"]
    assert sweep.csv_text([{"name": "a", "psnr": math.nan}, {"name": "b", "psnr": 1.5, "hf": None}]) == (
        "name,psnr,hf\na,,\nb,1.5,\n")
    folder_of(tmp_path / "one", 1)
    assert "at least 2 images" in sentence(sweep, *common, "--data", tmp_path / "one", "--out", tmp_path / "3")


# ---------------------------------------------------------------------------------------------------------------------
# README.md, docs/, --help
# Links, commands and Python of the documents are of what exists, and every flag is explained.

DOCUMENTS = ["README.md", *(f"docs/{path.name}" for path in sorted(Path(HERE, "docs").glob("*.md")))]


def headings_of(path):
    """What follows # in links to the headings of a document, as GitHub makes it."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)  # comments are no headings
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_documents_links_point_at_what_they_name():
    links = []
    for document in DOCUMENTS:
        links += re.findall(r"\[`([\w.]+)`\]\((?:\.\./)?([\w/]+\.py)#L(\d+)\)", Path(HERE, document).read_text())
    assert len(links) > 20
    for name, file, line in links:
        source = Path(HERE, file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"\s*(def|class) {name.split('.')[-1]}\b", source), (name, file, line, source)
    for document in DOCUMENTS:
        targets = re.findall(r"\]\(([^)]*)\)", Path(HERE, document).read_text())
        assert len(targets) > 2
        for target in targets:
            if "://" in target:
                continue
            name, _, anchor = target.partition("#")
            path = Path(HERE, document).parent / name if name else Path(HERE, document)
            assert path.is_file(), (document, target)
            if anchor and path.suffix == ".md":
                assert anchor in headings_of(path), (document, target)


def test_the_readmes_python_runs(tmp_path, monkeypatch, smallest):
    """Every ```python block, in order, in one namespace."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", Path(HERE, "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 2
    namespace = {}
    for block in blocks:
        exec(block, namespace)  # noqa: S102


@pytest.fixture(scope="module")
def helps():
    """{program as it stands after python or python -m: its --help}"""
    programs = ("train.py", "distill.py", "evaluate.py", "fid.py", "data.py", *TOOLS, "examples.generate")
    return {name: command(name, "--help") for name in programs}


def test_every_program_explains_itself(helps):
    for name, text in helps.items():
        lines = text.splitlines()
        for line, following in zip(lines, lines[1:] + [""]):
            if line.startswith("  -"):  # a flag: what it does follows, on the same line or on the next one
                assert re.search(r"\S {2,}\S", line) or following.startswith(" " * 20), (name, line)
    for tool in TOOLS:
        assert f"-m {tool} " in helps[tool], tool


def test_the_documents_commands_are_of_programs_and_flags_that_exist(helps):
    """Of commands in code blocks and between backquotes, up to what follows ; # | or a backquote. A backslash at the
    end of a line continues it."""
    command = re.compile(r"(?:python|torchrun)(?: --[^ ]+)* (?:-m )?(\w+\.\w+)( [^;#`|]*)?")
    found = Counter()
    for document in DOCUMENTS:
        text = Path(HERE, document).read_text().replace("\\\n", "")
        for program, flags in command.findall(text.replace("\n", " ; ")):
            if program in helps:
                found[program] += 1
                for flag in re.findall(r"(?<= )--[\w-]+", flags):
                    assert re.search(rf"{flag}(?![\w-])", helps[program]), (document, program, flag)
    assert {"train.py", "distill.py", "evaluate.py", *TOOLS, "examples.generate"} <= found.keys(), found


# ---------------------------------------------------------------------------------------------------------------------
# examples/
# The generator: resumed = uninterrupted = two processes; labels; refusals. The notebook runs and says what it stores.

@slow
def test_generator_on_latents(tmp_path, checkpoint, monkeypatch):
    """Resumed = uninterrupted = two processes; silent at the start; labels matter; refusals."""
    for k, name in enumerate(("cat", "dog")):
        folder_of(tmp_path / "images" / "train" / name, 7 + k, (40, 32))
    folder_of(tmp_path / "images" / "val", 2)
    command(latents, "--ckpt", checkpoint, "--data", tmp_path / "images", "--shard", 4, "--flip", "--workers", 0,
            "--device", "cpu", "--out", tmp_path / "latents")
    stored = latents.Latents(tmp_path / "latents")
    both = torch.stack([stored[i][0] for i in range(15)])                       # (15, 2, c, h, w)
    drawn, labels = generate.batch_of(stored, [(epoch, i) for epoch in range(20) for i in range(15)], seed=0)
    drawn = (drawn * stored.std + stored.mean).view(20, 15, *stored.shape)
    for i in range(15):
        is_first = (drawn[:, i] - both[i, 0]).abs().amax(dim=(1, 2, 3)) < 1e-3
        is_mirrored = (drawn[:, i] - both[i, 1]).abs().amax(dim=(1, 2, 3)) < 1e-3
        assert (is_first | is_mirrored).all() and is_first.any() and is_mirrored.any()
    assert labels[:15].tolist() == [0] * 7 + [1] * 8

    monkeypatch.setattr(fid, "InceptionFeatures", TinyInception)
    common = ["--latents", tmp_path / "latents", "--ckpt", checkpoint, "--width", 64, "--depth", 1, "--batch_size", 4,
              "--warmup", 1, "--log_every", 1, "--eval_images", 9, "--eval_steps", 2, "--device", "cpu", "--dtype",
              "float32", "--out"]
    two = aside(run, tmp_path / "o", *common, tmp_path / "two", "--steps", 4, module="examples.generate", world=2)
    common = ["--features", "inception", *common]
    command(generate, *common, tmp_path / "whole", "--steps", 4)
    command(generate, *common, tmp_path / "parts", "--steps", 2)
    command(generate, *common, tmp_path / "parts", "--steps", 4, "--resume")
    two.result()
    weights = {name: load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts", "two")}
    for key, value in weights["whole"].items():
        assert torch.equal(value, weights["parts"][key])
        # The mean, as Adam enlarges the rounding of single gradients that are nearly 0; each of 4 steps moves by 3e-4.
        assert (value - weights["two"][key]).abs().mean() < 3e-6, key
    logs = {name: lines_of(tmp_path / name / "log.jsonl") for name in weights}
    assert logs["whole"][-1]["eval"][0]["rfid"] == logs["parts"][-1]["eval"][0]["rfid"] > 0
    sizes = [Image.open(tmp_path / name / "samples.png").size for name in ("whole", "two")]
    assert sizes == [(8 * 34 + 2, 2 * 34 + 2), (5 * 34 + 2, 34 + 2)]  # of the first process's images

    code = Path(HERE, "docs", "training.md").read_text().split("## Reading latents")[1]
    code = code.split("```py\n")[1].split("```")[0]
    for then, now in (('"latents"', f'"{tmp_path}/latents"'), ("runs/deep_eqm/model.safetensors", str(checkpoint)),
                      ("runs/generator", f"{tmp_path}/whole"), ("None, 50", "torch.arange(16) % 2, 2")):
        assert code.count(then) == 1
        code = code.replace(then, now)
    namespace = {}
    exec(code, namespace)  # noqa: S102
    for key, value in namespace["generator"].state_dict().items():
        assert torch.equal(value, weights["whole"][key])
    assert namespace["images"].shape == (16, 3, 32, 32) and namespace["images"].std(dim=0).min() > 0

    keys = next(iter(data.TrainBatches(15, 4, 0, 0, 1, 0)))
    x, _ = generate.batch_of(stored, keys, 0)
    e, _, _ = losses.draw(0, 0, range(4), stored.shape, (), "cpu", "eqm")
    assert logs["whole"][0]["loss"] == pytest.approx((x - e).square().mean().item(), rel=1e-5)  # the network says 0

    model = randomise(generate.DiT(stored.shape, 64, 2, classes=2))
    x, t = torch.randn(2, *stored.shape), torch.tensor([0.3, 0.3])
    of_cat, of_dog = (model(x, torch.full((2,), k), t) for k in range(2))
    assert of_cat.shape == x.shape and (of_cat - of_dog).abs().amax() > 1e-3
    assert (model(x.flip(3), torch.zeros(2).long(), t).flip(3) - of_cat).abs().amax() > 1e-3  # it knows where a cell is

    assert "no finished latents" in sentence(generate, *common, tmp_path / "n", "--latents", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(latents.Latents, "__init__", lambda self, folder: vars(self).update(
            vars(stored) | {"labels": np.where(stored.labels == 0, -1, stored.labels)}))
        assert "7 of the latents" in sentence(generate, *common, tmp_path / "n")


def test_the_method_in_two_dimensions(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "STEPS", 100), monkeypatch.setattr(toy, "STUDENT_STEPS", 30)
    toy.main()
    text = capsys.readouterr().out
    assert Image.open("toy.png").size == (1280, 672)
    for name in ("FM", "EqM"):
        one, distilled = re.findall(rf"^{name}, one step.*: .* off the circle, (.*) from the many steps$", text, re.M)
        assert float(distilled) < float(one)


def printed_by(notebook):
    """All lines that a notebook's cells have printed, as one text."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


@slow
def test_the_notebook_runs_without_a_network(tmp_path, offline, monkeypatch):
    """In a copy, from the root; it was stored from a run in examples/. Numbers are those of the stored run."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    for path in Path(HERE).glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(Path(HERE, "plumbing"), tmp_path / "plumbing", ignore=shutil.ignore_patterns("test_*"))
    for name in ("examples/demo.ipynb", "examples/f32c32.safetensors", "docs/assets/photos_f32c32.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(HERE, name), tmp_path / name)
    path = tmp_path / "examples" / "demo.ipynb"
    assert path.stat().st_size < 500_000
    notebook = nbformat.read(path, 4)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}  # nothing of the machine that it ran on
    stored = printed_by(notebook)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    text = printed_by(notebook)

    for kind in ("photographs", "built-in images"):
        line = rf"{kind}, one step over the linear code: (\S+) dB"
        gain, gain_then = (float(re.search(line, run)[1]) for run in (text, stored))
        assert gain > 0.2 and gain == pytest.approx(gain_then, abs=0.05)
    one, *more = [float(number) for number in re.findall(r"^(?:gd|nesterov) +\d+ +(\S+) dB", text, re.MULTILINE)]
    assert len(more) == 6 and one > max(more) - 0.05
    path = re.search(r"^path .*: (.*) dB$", text, re.MULTILINE)[1].split()
    assert float(path[0]) < float(path[1]) < float(path[2]) < float(path[3])
    at_equal_bytes = dict(re.findall(r"^(latent, 8 bits|JPEG, 514 bytes) +.*bytes +(\S+) dB", text, re.MULTILINE))
    assert float(at_equal_bytes["latent, 8 bits"]) > float(at_equal_bytes["JPEG, 514 bytes"])
    pictures = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
                if "image/jpeg" in output.get("data", {})]
    assert len(pictures) == 8


# ---------------------------------------------------------------------------------------------------------------------
# Latents for generators: noise, nested channels, smaller images, likeness to a vision network

def test_draws_of_latents_are_a_function_of_seed_step_and_row():
    def drawn(rows, seed=0, step=5):
        return losses.draw_latent(seed, step, rows, (4, 2, 2), torch.device("cpu"), 0.8, [1, 2])

    noise, shown = drawn(range(6))
    for part, first, last in zip((noise, shown), drawn(range(2)), drawn(range(2, 6))):
        assert torch.equal(part, torch.cat([first, last]))
    assert not torch.equal(noise, drawn(range(6), step=6)[0]) and not torch.equal(noise, drawn(range(6), seed=1)[0])
    noise, shown = drawn(range(1500))
    assert all(abs((shown == k).float().mean() - 1 / 3) < 0.05 for k in (1, 2, 4))
    assert abs(noise.std() - 0.8) < 0.05  # E sigma^2 = tau^2
    deviation = noise.flatten(1).square().mean(1).sqrt()
    assert abs(deviation.mean() - 0.8 * math.sqrt(2 / math.pi)) < 0.05  # E |N(0, tau^2)|
    assert losses.draw_latent(0, 5, range(2), (4, 2, 2), torch.device("cpu")) == (None, None)

    sides = [losses.draw_side(0, step, 128, 16, 0.5) for step in range(600)]
    assert set(sides) == {32, 64, 96, 128} and abs(sides.count(128) / 600 - 0.5) < 0.07
    assert {losses.draw_side(0, step, 128, 16) for step in range(50)} == {128}
    assert losses.smaller_sides(64, 32) == [32] and losses.smaller_sides(32, 8) == [24]
    assert losses.smaller_sides(32, 32) == []


def test_what_the_decoder_sees_of_a_latent(smallest, monkeypatch):
    model = DCSSDAE("dc_f8c4", "XS", enc_width=0.0625, depth=1, input_skip=True, linear_encoder=True, linear_decoder=4)
    model.decoder.norm_z.running_var.copy_(torch.tensor([4.0, 1.0, 1.0, 9.0]))
    seen = []

    def matching(decoder, eqm, x, e, z, level):
        seen.append((x, z))
        return losses.matching(decoder, eqm, x, e, z, level)

    monkeypatch.setattr(train, "matching", matching)
    objective = train.Objective(model, None)
    x, e, eps = demo_batch(2, 32), torch.randn(2, 3, 32, 32), torch.randn(2, 4, 4, 4)
    noise, level = torch.randn(2, 4, 4, 4), torch.tensor([0.2, 0.7])
    _, _, z, _ = objective(x, e, eps, level)
    _, _, known, _ = objective(x, e, eps, level, noise, torch.tensor([1, 4]))
    assert torch.equal(seen[0][1], z) and torch.equal(z, known)  # what the statistics are of has no noise
    wanted = z + noise * torch.tensor([2.0, 1.0, 1.0, 3.0])[:, None, None]
    wanted[0, 1:] = 0
    assert torch.allclose(seen[1][1], wanted)

    # A linear code of flat images commutes with shrinking them: what is decoded is the code of the smaller image
    flat = torch.tensor([[0.5, -0.25, 0.1], [0.0, 1.0, -1.0]])[:, :, None, None].expand(2, 3, 32, 32).contiguous()
    _, _, _, estimate = objective(flat, e[..., :24, :24], torch.zeros_like(eps), level)
    small, z = seen[2]
    assert torch.allclose(small, flat[..., :24, :24], atol=1e-6)
    assert torch.allclose(z, model.encode(small).mode(), atol=1e-5)
    assert torch.allclose(estimate, model.decode(z, noise=e[..., :24, :24]), atol=1e-5)


def test_fewer_channels_are_a_code_of_their_own(smallest):
    """An untrained model's first k channels are the linear code with k numbers a cell: the order is there at first."""
    model = DCSSDAE("dc_f8c16", "XS", enc_width=0.0625, depth=1, input_skip=True, linear_encoder=True,
                    linear_decoder=16).eval()
    x = demo_batch(4, 32)
    with torch.no_grad():
        z = model.encode(x).mode()
        for k in (1, 3, 6, 12, 16):
            assert torch.allclose(model.decode(z[:, :k]), evaluate.linear_code(x, 8, k), atol=1e-4)


def test_vf_closed_forms():
    """VA-VAE's two terms: nothing within the margins; 1 - m1 for orthogonal features, 1 - m2 for pairs that differ."""
    vf, f = losses.VFLoss(8, 8), F.normalize(torch.randn(2, 8, 2, 3), dim=1)
    nn.init.eye_(vf.proj.weight)
    vf.requires_grad_(False)
    assert float(vf(3 * f, f)) == 0
    axes = torch.eye(8)[:, :6].view(1, 8, 2, 3)
    same = torch.eye(8)[:, 7:].view(1, 8, 1, 1).expand(1, 8, 2, 3)
    pairs = (1 - losses.VF_PAIRS) * (6 * 6 - 6) / 36  # all but those of a place with itself
    assert float(vf(same, axes)) == pytest.approx(1 - losses.VF_COSINE + pairs)
    assert float(vf(f, f.repeat_interleave(2, 2).repeat_interleave(2, 3))) == pytest.approx(0, abs=1e-6)  # a finer grid
    nearly = f + 0.3 * torch.randn_like(f) * f.square().mean().sqrt()
    assert float(vf(nearly, f)) == 0


@slow
def test_training_for_a_generator(tmp_path, dino_file, smallest):
    """All four at once; what is drawn does not depend on processes or micro-batches; resumed as if it had not been
    stopped."""
    flags = [*SMALL, "--size", 32, "--z_noise", 0.5, "--nested", 4, 8, "--p_scale", 0.5]
    two = aside(run, tmp_path / "o", *flags, "--steps", 4, "--out", tmp_path / "two", world=2)
    command(train, *flags, "--steps", 4, "--out", tmp_path / "micro", "--micro_batch", 3)
    with_vf = [*flags, "--w_vf", 0.1, "--repa_weights", dino_file]
    command(train, *with_vf, "--steps", 4, "--out", tmp_path / "whole")
    command(train, *with_vf, "--steps", 2, "--out", tmp_path / "parts")
    command(train, *with_vf, "--steps", 4, "--out", tmp_path / "parts", "--resume")
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    two.result()
    for a, b in zip(step_lines(tmp_path / "two"), step_lines(tmp_path / "micro"), strict=True):
        assert b["eqm"] == pytest.approx(a["eqm"], rel=1e-3) and b["loss"] == pytest.approx(a["loss"], rel=1e-3)
    for a in step_lines(tmp_path / "whole"):
        assert a["vf"] > 0 and a["loss"] == pytest.approx(a["eqm"] + 0.1 * a["vf"] + 1e-6 * a["kl"], rel=1e-5)
    assert "16 channels, of which fewer" in sentence(train, *flags, "--nested", 16, "--out", tmp_path / "n")
    assert "no smaller ones" in sentence(train, *flags, "--size", 24, "--out", tmp_path / "n")


def test_proxies_of_latents(tmp_path, checkpoint):
    """White noise, and an AR(1) field, of which each has its numbers in closed form."""
    white = torch.randn(256, 2, 16, 16)
    n = torch.fft.fftfreq(16)
    share = float((torch.hypot(n[:, None], n) > 0.25).float().mean())
    assert abs(proxies.high_share(white) - share) < 0.01 and abs(proxies.predictability(white)) < 0.01
    r = 0.7
    field = torch.randn(256, 2, 64, 64)
    for dim in (2, 3):  # z_i = r z_(i-1) + sqrt(1 - r^2) e_i along the columns, then along the rows
        line = [field.select(dim, 0)]
        for i in range(1, 64):
            line.append(r * line[-1] + math.sqrt(1 - r * r) * field.select(dim, i))
        field = torch.stack(line, dim)
    field = field[:, :, -16:, -16:]
    # An AR(1) cell between its two neighbours has the variance (1 - r^2) / (1 + r^2) left; a product of two, the square
    left = ((1 - r * r) / (1 + r * r)) ** 2
    assert proxies.predictability(field) == pytest.approx(1 - left, abs=0.01)
    mixed = torch.einsum("dc,bchw->bdhw", torch.tensor([[0.6, 0.8], [-0.8, 0.6]]), field)
    assert proxies.predictability(mixed) == pytest.approx(proxies.predictability(field), abs=1e-4)  # rotated channels
    assert proxies.predictability(field[..., :2]) is None
    lag = torch.arange(-15, 16).double()  # the expected periodogram: sum over lags (16 - |l|) r^|l| cos(2 pi k l / 16)
    power = ((16 - lag.abs()) * r ** lag.abs() * torch.cos(2 * math.pi * n[:, None].double() * lag)).sum(1)
    power = power[:, None] * power
    share = float(power[torch.hypot(n[:, None], n) > 0.25].sum() / power.sum())
    assert proxies.high_share(field) == pytest.approx(share, abs=0.01)
    stored_latents(tmp_path / "latents", white[:40, :, :4, :4], torch.zeros(40).long(), DCSSDAE.load(checkpoint))
    assert "2 x 4 x 4 =   32" in command(proxies, tmp_path / "latents")


def test_the_generator_is_diffusers_dit():
    """With the same weights, and the same sinusoids of time and place, whose order diffusers has another way."""
    diffusers = pytest.importorskip("diffusers")
    ours = randomise(generate.DiT((8, 4, 4), 128, 2, classes=3))
    theirs = diffusers.DiTTransformer2DModel(2, 64, 8, num_layers=2, sample_size=4, patch_size=1, num_embeds_ada_norm=3,
                                             norm_eps=1e-6).eval()

    def copied(layer, weight, bias):
        layer.weight.data.copy_(weight.reshape(layer.weight.shape)), layer.bias.data.copy_(bias)

    copied(theirs.pos_embed.proj, ours.token.weight, ours.token.bias)
    theirs.pos_embed.pos_embed = ours.places(4, 4, "cpu")[None]
    copied(theirs.proj_out_1, ours.ada.weight, ours.ada.bias), copied(theirs.proj_out_2, ours.out.weight, ours.out.bias)
    for block, known in zip(theirs.transformer_blocks, ours.blocks, strict=True):
        embedding = block.norm1.emb
        embedding.time_proj.downscale_freq_shift = 0
        embedding.class_embedder.embedding_table.weight.data[:3] = ours.label.weight
        for layer, mine in ((embedding.timestep_embedder.linear_1, ours.time[0]),
                            (embedding.timestep_embedder.linear_2, ours.time[2]),
                            (block.norm1.linear, known.ada), (block.attn1.to_out[0], known.proj),
                            (block.ff.net[0].proj, known.mlp[0]), (block.ff.net[2], known.mlp[2])):
            copied(layer, mine.weight, mine.bias)
        for layer, weight, bias in zip((block.attn1.to_q, block.attn1.to_k, block.attn1.to_v),
                                       known.qkv.weight.chunk(3), known.qkv.bias.chunk(3), strict=True):
            copied(layer, weight, bias)
    x, labels, t = torch.randn(3, 8, 4, 4), torch.tensor([0, 2, 1]), torch.tensor([0.1, 0.5, 1.0])
    with torch.no_grad():
        assert relative_error(ours(x, labels, t), theirs(x, 1000 * t, labels).sample) < 1e-5
