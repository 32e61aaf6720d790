"""Tests of everything users rely on: the mathematics, equivalences, parity with independent implementations, every
command line.

    python -m pytest test_all.py                  # no network, no GPU; 7 to 14 minutes
    python -m pytest test_all.py -k slow & python -m pytest test_all.py -k "not slow" && wait $!    # on two cores

Tests that compare with another library are skipped where it is not installed. Networks whose weights would have to be
downloaded (VGG-16, DINOv2, Inception) stand here with random weights, given as files.
"""
import argparse
import builtins
import contextlib
import copy
import csv
import errno
import functools
import hashlib
import importlib
import importlib.util
import inspect
import io
import json
import math
import multiprocessing.connection
import os
import pickle
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
import types
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import data
import distill
import encoder as encoder_module
import evaluate
import fid
import losses
import model as model_module
import sampler
import train
from encoder import DiagonalGaussian, LappedCode, VQResBlock, lapped_basis, make_encoder, parse_name
from examples import generate
from losses import EqM, PatchGAN, hinge_loss
from model import (
    BROKEN_FILE,
    DCSSDAE,
    LEAST_CONTRAST,
    OUTPUT_GAIN,
    RIDGE,
    SIZES,
    LatentNorm,
    NormSiLU,
    UViT,
    WindowAttention,
    Windows,
    folder_beside,
    local_contrast,
    local_file,
    our_names,
    pad_to_multiple,
    read_weights,
    short,
    spread,
    upsample,
)
from tools import bench, check, compare, field, latents, study, sweep
from tools import hub as hub_tool
from train import load_checkpoint, save_checkpoint

# ---------------------------------------------------------------------------------------------------------------------
# Helpers and fixtures that several sections share

HERE = os.path.dirname(os.path.abspath(__file__))
torch.set_num_threads(1)  # a second one wins nothing on small tensors, and beside other work it waits for a core


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


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)


def offline_environment(folder):
    """Environment variables: no cached networks, and no way to download one."""
    return {"TORCH_HOME": str(folder), "HF_HOME": str(folder), "HF_HUB_OFFLINE": "1", "no_proxy": "", "NO_PROXY": "",
            **dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")}


@pytest.fixture
def offline(monkeypatch, tmp_path):
    for name, value in offline_environment(tmp_path).items():
        monkeypatch.setenv(name, value)


def cli(*args, ok=True, nproc=None, cwd=HERE, env=None, timeout=300):
    """Run a command line of the project, a file or "tools.NAME"; returns its output. ok=False: it must fail with one
    sentence and no traceback."""
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={nproc}", "--standalone"] if nproc else []
    program = [os.path.join(HERE, args[0])]
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONWARNINGS="ignore", **(env or {}))
    if str(args[0]).startswith(("tools.", "examples.")):
        program = ["-m", args[0]]
        environment["PYTHONPATH"] = HERE  # for another cwd than the repository's root
    done = subprocess.run([sys.executable, *launch, *program, *map(str, args[1:])], cwd=cwd, env=environment,
                          check=False, capture_output=True, text=True, timeout=timeout)
    output = done.stdout + done.stderr
    if ok:
        assert done.returncode == 0, output
    else:
        assert done.returncode == 1 and "Traceback" not in output, output
        assert done.stderr.strip().splitlines()[-1].startswith("error: "), output
    return output


# aside(function, arguments ...) calls it beside what follows; its .result() waits for the end. For what waits for other
# processes: one of two cores would be idle.
aside = ThreadPoolExecutor().submit


def command(program, *args, ok=True):
    """As cli, in this process, without the seconds that importing torch takes: for what cli has shown to start."""
    module = importlib.import_module(program.removesuffix(".py"))
    handlers = {s: signal.getsignal(s) for s in train.stop_signals()}  # train.py and distill.py catch them
    text, code = io.StringIO(), None
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        patch.setattr(sys, "argv", [module.__file__, *map(str, args)])
        try:
            data.guarded(module.main)
        except SystemExit as stop:
            code = stop.code
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)
    if ok:
        assert not code, (code, text.getvalue())
        return text.getvalue()
    assert isinstance(code, str) and code.startswith("error: ") and "\n" not in code, (code, text.getvalue())
    return text.getvalue() + code


def slow(test):
    """Marks the longest tests, half of the whole time: pytest -k slow and -k "not slow" can run side by side."""
    test.slow = True
    return test


def lines_of(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


def step_lines(folder):
    """The lines of a run's log that hold a training step, without evaluations."""
    return [line for line in lines_of(folder / "log.jsonl") if "loss" in line]


def small_state(step, **more):
    """The least that a checkpoint holds, of a model with a single tensor."""
    weights = {"w": torch.ones(2)}
    return {"step": step, "args": {}, "model": weights, "ema": weights,
            "optimizer": {"state": {}, "param_groups": [{"params": [0]}]}, **more}


SMALLEST_SIZE = 32, (1, 1, 1, 1), 1  # of a decoder
TINY = ["--preset", "tiny", "--device", "cpu", "--dtype", "float32", "--workers", 0, "--batch_size", 4,
        "--eval_images", 4, "--log_every", 1, "--enc_width", 0.0625, "--depth", 1]


@pytest.fixture
def smallest(monkeypatch):
    """Decoder XS is the smallest possible, also in `run`'s processes: for tests where any will do."""
    monkeypatch.setitem(SIZES, "XS", SMALLEST_SIZE)


def photo(w, h, seed=0):
    """A smooth RGB picture with different corners."""
    image = Image.fromarray(data.demo_image(64, seed, "val", 0))
    return image.resize((w, h), Image.BICUBIC)


def folder_of(path, n=6, size=(48, 40), ext="png"):
    path.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        photo(*size, seed=i).save(path / f"{i:02d}.{ext}")
    return str(path)


def take(loader, n):
    batches = []
    for x, index in loader:
        batches.append((x.clone(), index.clone()))
        if len(batches) == n:
            break
    return batches


def same_batches(a, b):
    """Two lists of (x, index) batches are equal, bit by bit."""
    pairs = [(p, q) for one, two in zip(a, b, strict=True) for p, q in zip(one, two, strict=True)]
    return all(torch.equal(p, q) for p, q in pairs)


@pytest.fixture
def tmp_path(tmp_path):
    """pytest's folder, emptied after the test: kept to the end, all checkpoints would come to many gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


def pixels(x):
    """(3, H, W) in [-1, 1] -> (H, W, 3) in 0..255."""
    return ((x + 1) * 127.5).permute(1, 2, 0).numpy()


def failing_open(monkeypatch, code, times):
    """Let data.py's first `times` attempts to open a file fail with this errno, and not wait in between."""
    left = [times]

    def fail(path, *args):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(code, os.strerror(code), path)
        return open(path, *args)

    monkeypatch.setattr(data, "open", fail, raising=False)
    monkeypatch.setattr(data, "PAUSES", (0, 0, 0))


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    with torch.device("meta"):  # the classifier, nine tenths of VGG-16, is not needed
        features = data.import_torchvision().models.vgg16(weights=None).features
    features.to_empty(device="cpu")
    torch.manual_seed(0)
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight), nn.init.zeros_(layer.bias)
    path = tmp_path_factory.mktemp("nets") / "vgg16.pth"
    torch.save({f"features.{k}": v for k, v in features.state_dict().items()}, path)
    return path


@pytest.fixture
def dino_file(tmp_path, monkeypatch):
    """DINOv2 with two of its twelve blocks, also where timm makes it: the names and the rest are those of the whole."""
    data.import_torchvision()
    timm = pytest.importorskip("timm")
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, depth=2))
    state = fid.empty_network(timm, "vit_base_patch14_dinov2.lvd142m", num_classes=0).state_dict()
    g, path = torch.Generator().manual_seed(0), tmp_path / "dino.pth"
    torch.save({k: torch.randn(v.shape, generator=g) * 0.02 + (".gamma" in k or "norm" in k and "weight" in k)
                for k, v in state.items()}, path)
    return path


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


def demo_batch(n=3, size=48):
    """Demo images with more in them than noise: (n, 3, size, size) in [-1, 1]."""
    return torch.stack([data.make_dataset("demo", size, train=False, limit=n)[i][0] for i in range(n)])


class TinyInception(nn.Module):
    """In the place of fid.InceptionFeatures where its size is not the point."""
    dim, sha256 = 16, "0" * 64

    def __init__(self, weights=None):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 16, 8)

    def forward(self, x):
        return self.conv(x).tanh().mean((2, 3)).detach()


def run_main(module, monkeypatch, *argv):
    """A command in this process, where its parts can be replaced."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, argv)])
    if module in (evaluate, distill) or module.__name__.startswith(("tools.", "examples.")):
        data.guarded(module.main)
    else:  # guards itself
        module.main()


def sentence(module, monkeypatch, *argv):
    """The message with which a command stops; sys.exit(str) prints it on stderr and exits with 1."""
    with pytest.raises(SystemExit) as stop:
        run_main(module, monkeypatch, *argv)
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code and stop.value.code.startswith("error: ")
    return stop.value.code


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = DCSSDAE("dc_f8c4", "XS", enc_width=0.125, depth=1, loss="eqm", notes={"size": 32})
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    model.save(path)
    return path


@pytest.fixture(scope="module", params=["eqm", "fm"])
def trained(request, tmp_path_factory):
    """A tiny run of train.py for either loss: its folder."""
    out = tmp_path_factory.mktemp("runs") / request.param
    launch = cli if request.param == "eqm" else command
    output = launch("train.py", *TINY, "--loss", request.param, "--steps", 6, "--eval_every", 3, "--out", out)
    assert "PSNR" in output and "saved" in output
    return out


def same_weights(a, b):
    a, b = (torch.load(folder / "latest.pt", weights_only=True) for folder in (a, b))
    same = [torch.equal(a[part][k], b[part][k]) for part in ("model", "ema") for k in a[part]]
    for part, moment in (("optimizer", "exp_avg"), ("muon", "momentum")):
        if a[part] or b[part]:
            same += [torch.equal(s[moment], b[part]["state"][k][moment]) for k, s in a[part]["state"].items()]
    return all(same)


TOOLS = sorted(f"tools.{path.stem}" for path in Path(HERE, "tools").glob("[!_]*.py"))


def script(path, dim=5, module=None):
    """A TorchScript file: averages of random linear functions of the pixels, for any size."""
    torch.manual_seed(1)
    net = module or nn.Sequential(nn.Conv2d(3, dim, 8, bias=False), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        torch.jit.trace(net, torch.zeros(2, 3, 16, 16)).save(path)
    return net


def plain_norm_silu(x, scale, shift, eps=1e-5):
    """AdaGN in its plainest form: normalise, enlarge scale and shift to the map, SiLU."""
    scale, shift = (F.interpolate(m, size=x.shape[2:], mode="nearest") for m in (scale, shift))
    return F.silu(F.group_norm(x, 32, eps=eps) * scale + shift)


# Processes that can be killed are forked from a server that has imported torch, which takes seconds.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__, "torch._dynamo"])


def child(module, argv, env, output, sabotage):
    """A command in a child process. sabotage: {step: name of a signal, "reader" (kill the data loader's), "nan" or
    "lost"} for this rank, when that step draws its noise, or its images."""
    os.environ.update(env, CUDA_VISIBLE_DEVICES="")
    if "SMALLEST" in env:
        SIZES["XS"] = SMALLEST_SIZE
    if "FLOAT64" in env:  # rounding out of the way
        torch.set_default_dtype(torch.float64)
        torch.Tensor.float = torch.Tensor.double
        train.evaluate = lambda *a, **kw: sys.exit(0)  # it works in float32
    multiprocessing.set_start_method("fork", force=True)  # of the data loader's workers, as everywhere else
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(output, "w", buffering=1)  # noqa: SIM115 until the process ends
    sys.argv = [module, *map(str, argv)]
    draw = train.draw

    def drawing(seed, step, *rest):
        e, eps, s = draw(seed, step, *rest)
        if str(sabotage.get(step, "nan")).startswith("SIG"):
            # torchrun and schedulers signal the loader's workers too; from another process: torch's workers see who
            workers = (
                [worker.pid for worker in multiprocessing.active_children()] if sabotage[step] != "SIGKILL" else []
            )
            subprocess.run(["kill", "-s", sabotage[step][3:], *map(str, [*workers, os.getpid()])], check=True)
            time.sleep(0.1)
        if sabotage.get(step) == "reader":
            for worker in multiprocessing.active_children():
                worker.kill()
            time.sleep(0.2)
        return (e * float("nan") if sabotage.get(step) == "nan" else e), eps, s

    next_batch = train.next_batch

    def losing(run, batches):
        def lost():
            raise OSError(errno.ESTALE, "Stale file handle")
            yield
        return next_batch(run, lost() if sabotage.get(run.done) == "lost" else batches)

    train.draw = distill.draw = drawing
    train.next_batch = distill.next_batch = losing
    if "TINY_INCEPTION" in env:
        fid.InceptionFeatures = TinyInception
    try:
        data.guarded(importlib.import_module(module).main)
    finally:
        train.kill_workers()  # forked children skip atexit


def run(folder, *argv, module="train", world=1, sabotage=None, env=None, ok=(0,)):
    """Run a command on `world` processes; (exit codes, which must be in ok, output of rank 0). sabotage: {rank: {step:
    what}}."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(exist_ok=True)
    smallest = {"SMALLEST": "1"} if SIZES["XS"] == SMALLEST_SIZE else {}  # a test's patch holds in its children, too
    processes = []
    for rank in range(world):
        names = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        processes.append(
            FORKS.Process(
                target=child,
                args=(
                    module,
                    argv,
                    {**(names if world > 1 else {}), **smallest, **(env or {})},
                    str(folder / f"output{rank}"),
                    (sabotage or {}).get(rank, {}),
                ),
            )
        )
        processes[-1].start()
    deadline = time.time() + 100
    while any(p.is_alive() for p in processes):
        multiprocessing.connection.wait([p.sentinel for p in processes if p.is_alive()], timeout=1)
        if time.time() > deadline or any(p.exitcode == -signal.SIGKILL for p in processes):
            for p in processes:  # as torchrun does
                p.kill()
    codes, output = [p.exitcode for p in processes], (folder / "output0").read_text()
    assert all(code in ok for code in codes), (codes, output)
    return codes, output


KILLED = (0, 1, -signal.SIGKILL)
SMALL = [*TINY, "--decay", 0, "--warmup", 2, "--size", 24, "--eval_every", 3, "--save_every", 2, "--eval_steps", 1]


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


FUZZ_CASES = 100
FUZZ_SECONDS, FUZZ_BYTES = 120, 3 * 2**30  # of a case: how long it may take, how much memory beside what there is
REFUSALS = (ValueError, TypeError, OSError)  # in Python, each with a message
ODD_WORDS = ["", "x", "nan", "inf", "-inf", "-1", "0", "-0", "1.5", "1e400", "1e-30", "1e30", "0x10", "１", "٣", "None",
             str(10**30), "true", "hf:", "hf://o/r", "\udcff", "a" * 300]
ODD_VALUES = [None, True, -1, 0, 1, 2, 1.5, -0.5, math.nan, math.inf, -math.inf, 10**30, "", "x", "vq_f8c4", [], {},
              [None], [[1, 2], [3]], {"x": 1}, b"x", (1, 2)]
# What makes an accepted command line slow or large: of these flags only small numbers, and such that are refused.
COSTLY = {"size", "batch_size", "steps", "eval_steps", "teacher_steps", "limit", "workers", "depth", "window", "rows",
          "calibrate", "eval_images"}
LEFT_OUT = {"help", "compile", "tensorboard", "dreamsim", "dinov2", "enc"}  # slow, or with networks of their own
FUZZ_PROGRAMS = {  # module: flags of a command that ends soon
    train: [*TINY, "--size", 8, "--batch_size", 2, "--steps", 1, "--eval_images", 1, "--eval_steps", 1],
    distill: ["--ckpt", "model.safetensors", "--w_lpips", 0, "--size", 8, "--batch_size", 2, "--steps", 1,
              "--teacher_steps", 1, "--eval_images", 1, "--workers", 0, "--dtype", "float32"],
    evaluate: ["--ckpt", "model.safetensors", "--limit", 1, "--size", 8, "--workers", 0, "--features", "--cache", "",
               "--lpips_net", "vgg"],
    fid: ["--batch_size", 2, "--features", "features.pt", "--size", 8],
    data: ["--size", 8, "--rows", 1],
    bench: ["--size", 8, "--dec", "XS"],
    compare: [],
    field: ["--ckpt", "model.safetensors", "--size", 8],
    latents: ["--ckpt", "model.safetensors", "--size", 8, "--limit", 2, "--workers", 0, "--out", "latents"],
    sweep: ["--ckpt", "model.safetensors", "--size", 8, "--limit", 1, "--calibrate", 1, "--workers", 0, "--features",
            "--lpips_net", "vgg", "--steps", 1],
}


class Payload:
    """Makes a folder where a pickle is executed."""
    def __reduce__(self):
        return os.mkdir, ("executed",)


def odd_tensor(rng, shape, dtype=torch.float32):
    """Mostly of this shape and type; sometimes of another, or with values that are not finite."""
    if rng.random() < 0.25:
        shape = rng.choice([(), (0,), (3,), shape[:-1], (*shape, 1), (0, *shape[1:]), (*shape[:-1], 0), (2, 3, 7, 9),
                            (1,) * 5, (1, *shape[1:]), (shape[0], 1, *shape[2:])])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(rng.getrandbits(32)))
    if x.numel() and rng.random() < 0.2:
        x.view(-1)[0] = rng.choice([math.nan, math.inf, -1e38])
    if rng.random() < 0.15:
        dtype = rng.choice([torch.uint8, torch.int64, torch.bool, torch.float64, torch.float16, torch.bfloat16,
                            torch.complex64])
    return x.nan_to_num(0, 1, -1).to(dtype) if not dtype.is_floating_point else x.to(dtype)


def damaged(rng, value):
    """The same tree of dicts, lists and tensors, but for one part of it."""
    is_tree = isinstance(value, (dict, list)) and len(value) > 0
    if is_tree and rng.random() < 0.95:
        changed = value.copy()
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        what = rng.random()
        if what < 0.1:
            del changed[key]
        elif what < 0.2 and isinstance(value, dict):
            changed[rng.choice(["x", 5, f"{key}2"])] = changed[key]
        else:
            changed[key] = damaged(rng, value[key])
        return changed
    if isinstance(value, torch.Tensor) and rng.random() < 0.8:
        return odd_tensor(rng, value.shape or (1,), value.dtype) if rng.random() < 0.5 else value * math.nan
    return rng.choice([*ODD_VALUES, Payload()])


def averaged(ema, model, decay):
    return train.update_ema(train.paired_tensors(ema, model), decay, 5, torch.tensor(True))


# ---------------------------------------------------------------------------------------------------------------------
# data.py: the built-in images
# The same in every process, varied, and with the statistics of photographs.

def test_demo_is_pure_and_varied():
    a = data.demo_image(32, 0, "train", 5)
    assert a.shape == (32, 32, 3) and a.dtype == np.uint8
    data.demo_image(64, 3, "val", 9)
    assert np.array_equal(a, data.demo_image(32, 0, "train", 5))
    for other in (("train", 6), ("val", 5)):
        assert np.abs(a.astype(int) - data.demo_image(32, 0, *other)).mean() > 5
    assert np.abs(a.astype(int) - data.demo_image(32, 1, "train", 5)).mean() > 5
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


def test_demo_speed():
    data.demo_image(64, 0, "train", 0)
    rates = []
    for k in range(5):
        start = time.process_time()                        # others share the machine: count our own time only
        for i in range(30):
            data.demo_image(64, 0, "train", 30 * k + i)
        rates.append(30 / (time.process_time() - start))
    assert max(rates) >= 150, rates


def test_demo_dataset():
    train, val = data.make_dataset("demo", 32, True), data.make_dataset("demo", 32, False)
    assert len(train) == 100_000 and len(val) == 2_000
    x, i = train[7]
    assert i == 7 and x.shape == (3, 32, 32) and x.dtype == torch.float32 and x.is_contiguous()
    assert -1 <= x.min() < x.max() <= 1
    assert torch.equal(x, train[(0, 7)][0])
    plain = torch.from_numpy(data.demo_image(32, 0, "train", 7).copy()).permute(2, 0, 1) / 127.5 - 1
    flips = [torch.equal(train[(e, 7)][0], plain.flip(-1)) for e in range(12)]
    assert any(flips) and not all(flips)                   # the epoch decides
    assert all(torch.allclose(train[(e, 7)][0], plain.flip(-1) if f else plain) for e, f in enumerate(flips))
    expected = torch.from_numpy(data.demo_image(32, 0, "val", 3).copy()).permute(2, 0, 1) / 127.5 - 1
    assert torch.allclose(val[3][0], expected)
    with pytest.raises(IndexError):
        val[2000]


def test_preview_command(tmp_path):
    """Another process makes the same built-in images."""
    common = ["data.py", "--size", 16, "--rows", 3, "--out", tmp_path / "grid.png"]
    cli(*common, "--split", "val")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (3 * 18 + 2, 3 * 18 + 2, 3)
    for i in range(9):
        top, left = 2 + 18 * (i // 3), 2 + 18 * (i % 3)
        assert np.array_equal(grid[top:top + 16, left:left + 16], data.demo_image(16, 0, "val", i))
    command(*common)
    assert not np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), grid)  # training images
    output = command(*common, "--data", tmp_path / "nowhere", ok=False)
    assert output.startswith("error: there is no folder") and len(output.splitlines()) == 1


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
    assert levels.dtype == torch.uint8 and i == 3 and torch.equal(x, levels.float() / 127.5 - 1)
    loader = data.make_loader(dataset, 4, train=False)
    batch, index = next(iter(loader))
    assert torch.equal(batch, torch.stack([dataset[int(i)][0] for i in index]))
    loader.device = "meta"
    assert next(iter(loader))[0].is_meta


def test_stream_leaves_global_random_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(data.make_loader(data.make_dataset("demo", 16, True), 2, True), 2)
    assert torch.equal(before, torch.get_rng_state())


def test_fewer_images_than_batch():
    dataset = data.make_dataset("demo", 16, True, limit=3)
    assert len(dataset) == 3
    (x, index), = take(data.make_loader(dataset, 8, True), 1)
    assert x.shape[0] == 8 and sorted(index[:3].tolist()) == [0, 1, 2] == sorted(index[3:6].tolist())


def test_eval_order_and_ranks():
    dataset = data.make_dataset("demo", 16, False, limit=7)
    assert [i.tolist() for _, i in data.make_loader(dataset, 3, False)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [i.tolist() for _, i in data.make_loader(dataset, 4, False, rank=1, world=2)] == [[1, 3], [5]]
    assert same_batches(list(data.make_loader(dataset, 3, False)), list(data.make_loader(dataset, 3, False, workers=2)))
    assert list(data.make_loader(data.make_dataset("demo", 16, False, limit=1), 4, False, rank=1, world=2)) == []


def test_bad_batch_size():
    dataset = data.make_dataset("demo", 16, True)
    for args in ({"batch_size": 3, "world": 2}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="batch_size"):
            data.make_loader(dataset, train=True, **args)


def test_default_workers_share_the_processors(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(24)), raising=False)
    assert data.default_workers() == 8
    for processes, workers in ((2, 6), (4, 3), (24, 0)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert data.default_workers() == workers
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    assert data.default_workers() == 0


# ---------------------------------------------------------------------------------------------------------------------
# data.py: single images
# What becomes of a file of any kind: colours, orientation, damaged metadata, crops and their cost.

def test_modes(tmp_path):
    rgba = np.zeros((40, 40, 4), np.uint8)
    rgba[:20] = (255, 0, 0, 255)                           # the lower half is transparent
    Image.fromarray(rgba).save(tmp_path / "a.PNG")
    grey = np.tile(np.linspace(0, 65535, 40), (40, 1)).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "b.png")         # 16 bits
    with Image.open(tmp_path / "b.png") as image:
        assert image.mode.startswith("I")
    Image.fromarray((grey >> 8).astype(np.uint8)).save(tmp_path / "c.bmp")
    Image.new("RGB", (40, 40), (0, 255, 0)).quantize(4).save(tmp_path / "d.png")
    Image.new("CMYK", (40, 40), (0, 255, 255, 0)).save(tmp_path / "e.JPeG")   # red
    Image.new("RGBA", (40, 40), (0, 0, 255, 0)).quantize(4).save(tmp_path / "f.png", transparency=0)
    Image.new("1", (40, 40), 1).save(tmp_path / "g.png")
    Image.new("LA", (40, 40), (0, 0)).save(tmp_path / "h.png")
    Image.new("RGB", (40, 40), (0, 0, 255)).save(tmp_path / "i.webp", lossless=True)
    dataset = data.make_dataset(str(tmp_path), 40, False)
    a, b, c, d, e, f, g, h, i = (pixels(dataset[k][0]) for k in range(9))
    assert np.allclose(a[10, 5], (255, 0, 0)) and np.allclose(a[30, 5], 255)
    assert np.allclose(b[7, :, 0], np.linspace(0, 255, 40), atol=0.6) and np.allclose(b[..., 0], b[..., 2])
    assert np.allclose(c[7, :, 0], np.linspace(0, 255, 40), atol=1)
    assert np.allclose(d[3, 3], (0, 255, 0), atol=2) and np.allclose(e[3, 3], (255, 0, 0), atol=6)
    assert np.allclose(f, 255) and np.allclose(g, 255) and np.allclose(h, 255) and np.allclose(i[3, 3], (0, 0, 255))
    train = data.make_dataset(str(tmp_path), 16, True)
    assert all(train[k][0].shape == (3, 16, 16) for k in range(9)) and int(train.skipped.sum()) == 0
    assert np.allclose(pixels(train[4][0])[3, 3], (255, 0, 0), atol=6)        # CMYK, decoded at half size


@pytest.mark.parametrize("train", [False, True])
def test_exif_orientation(tmp_path, train):
    upright = photo(60, 30)
    exif = Image.Exif()
    exif[0x0112] = 6                                       # stored lying on its side: turn by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.jpg", quality=98, subsampling=0, exif=exif)
    upright.save(tmp_path / "b.jpg", quality=98, subsampling=0)
    dataset = data.make_dataset(str(tmp_path), 24, train)
    images = [dataset.decode(j, 24) for j in range(2)]
    assert images[0].size == images[1].size == (60, 30)
    a, b = (np.asarray(image).astype(float) for image in images)
    assert np.abs(a - b).mean() < 3 < np.abs(a - b[::-1, ::-1]).mean()
    assert train or np.abs(pixels(dataset[0][0]) - pixels(dataset[1][0])).mean() < 3


def exif_block(*entries):
    """An EXIF block of (tag, type, count, 4 bytes of value or offset) in this order."""
    rows = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + rows + bytes(4)


TURNED = (0x0112, 3, 1, b"\6\0\0\0")                      # lying on its side
DAMAGED = {
    "make as rational": (0x010F, 5, 1, b"ab\0\0"),
    "make beyond the end": (0x010F, 2, 2**31, b"\xff\xff\xff\x7f"),
    "unknown type": (0x0110, 99, 7, bytes(4)),
    "resolution as text": (0x011A, 2, 3, b"72\0\0"),
    "unit out of range": (0x0128, 3, 1, b"\xff\xff\0\0"),
    "no directory": (0x8769, 4, 1, b"\xff\xff\xff\xff"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_exif_tags_do_not_hide_the_orientation(damage, tmp_path):
    for entries in ((TURNED, DAMAGED[damage]), (DAMAGED[damage], TURNED)):
        photo(60, 30).save(tmp_path / "a.jpg", exif=exif_block(*entries))
        photo(60, 30).save(tmp_path / "b.png", exif=exif_block(*entries))
        photo(60, 30).save(tmp_path / "c.webp", exif=exif_block(*entries), lossless=True)
        for name in ("a.jpg", "b.png", "c.webp"):
            assert data.read_image(tmp_path / name).size == (30, 60)
            assert data.to_rgb(data.read_image(tmp_path / name)).size == (30, 60)  # turned once, not twice
    for junk in (b"", b"Exif\0\0", b"Exif\0\0MM", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0no TIFF at all"):
        photo(60, 30).save(tmp_path / "a.jpg", exif=junk)
        assert data.read_image(tmp_path / "a.jpg").size == (60, 30)


def png_chunk(kind, content, checksum=None):
    checksum = zlib.crc32(kind + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def test_damaged_metadata_beside_good_pixels(tmp_path):
    """Profiles, comments and text of any kind: damaged, wrong checksum, longer than Pillow takes."""
    buffer = io.BytesIO()
    photo(60, 30).save(buffer, "PNG")
    png, want = buffer.getvalue(), np.asarray(photo(60, 30))
    long = zlib.compress(bytes(2**21))                     # 2 MB of text, packed
    for chunk in (png_chunk(b"zTXt", b"note\0\0" + long), png_chunk(b"iTXt", b"note\0\1\0\0\0" + long),
                  png_chunk(b"iCCP", b"profile\0\0" + long), png_chunk(b"iCCP", b"profile\0\0no zlib"),
                  png_chunk(b"tEXt", b"a\0b", checksum=1), png_chunk(b"pHYs", b"")):
        turned = png_chunk(b"eXIf", exif_block(TURNED)[6:], checksum=2)
        assert np.array_equal(data.decode_image(png[:33] + chunk + png[33:]), want)      # 33: after the header
        assert np.array_equal(data.decode_image(png[:33] + turned + chunk + png[33:]), np.rot90(want, -1))
    with pytest.raises(data.Unreadable):
        data.decode_image(png[:33] + chunk + png[33:-60])  # the pixels themselves are damaged
    buffer = io.BytesIO()
    photo(60, 30).save(buffer, "JPEG", icc_profile=b"no profile", xmp=b"<x tiff:Orientation=", comment=b"\xff\0")
    assert data.decode_image(buffer.getvalue()).size == (60, 30)


def test_tiff_and_pgm(tmp_path):
    grey = np.tile(np.linspace(0, 65535, 40), (30, 1)).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.tif")
    Image.fromarray(grey).save(tmp_path / "b.pgm")
    Image.fromarray(np.tile(np.linspace(0, 255, 40), (30, 1)).astype(np.uint8)).save(tmp_path / "c.ppm")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(60, 30).save(tmp_path / "d.tiff", exif=exif)
    Image.fromarray(grey.astype(np.float32) / 65535).save(tmp_path / "e.tiff")           # what is white in it?
    dataset = data.make_dataset(str(tmp_path), 30, False)
    assert len(dataset) == 5 and dataset.decode(3, 30).size == (30, 60) and dataset[4] is None
    for j in range(3):
        assert np.allclose(np.asarray(dataset.decode(j, 30))[7, :, 1], np.linspace(0, 255, 40), atol=1)


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


def test_draft_only_in_training_and_large_enough(tmp_path, monkeypatch):
    photo(1000, 640).save(tmp_path / "a.jpg", quality=95)
    photo(640, 1000).save(tmp_path / "b.jpg", quality=95)
    sizes, original = [], data.to_rgb

    def spy(image):
        out = original(image)
        sizes.append(out.size)
        return out

    monkeypatch.setattr(data, "to_rgb", spy)
    train, val = (data.make_dataset(str(tmp_path), 64, t, aug_scale=2.0) for t in (True, False))
    seen = set()
    for epoch in range(12):
        u = np.random.default_rng([data.ITEM, 0, epoch, 0]).random(4)
        short = 64 * (1 + u[3])
        sizes.clear()
        reduced = pixels(train[(epoch, 0)][0])
        assert short <= min(sizes[0]) < 320                # 1/4 or 1/8 of 640, and still enough
        seen.add(min(sizes[0]))
        with Image.open(tmp_path / "a.jpg") as image:
            full = np.asarray(data.prepare_train(image.convert("RGB"), 64, short, u)).astype(float)
        assert np.abs(reduced - full).mean() < 4, epoch
    assert seen == {80, 160}
    sizes.clear()
    val[0]
    assert sizes[0] == (1000, 640)
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(160, 2000).save(tmp_path / "a.jpg", exif=exif)   # narrow and turned: 160 // 100 allows no reduction
    assert data.make_dataset(str(tmp_path), 100, True, aug_scale=1)[0][0].shape == (3, 100, 100)
    assert min(sizes[-1]) == 160


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
    image, size = photo(w, h), 32
    # torchvision's Resize + CenterCrop on PIL images, written out
    new = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    small = image.resize(new, Image.BILINEAR)
    left, top = round((new[0] - size) / 2.0), round((new[1] - size) / 2.0)
    expected = small.crop((left, top, left + size, top + size))
    assert np.array_equal(np.asarray(data.prepare_eval(image, size)), np.asarray(expected))
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


def test_prepare_eval_agrees_with_torchvision():
    transforms = data.import_torchvision().transforms
    pipe = transforms.Compose([transforms.Resize(40), transforms.CenterCrop(40)])
    for size in ((301, 200), (97, 330), (41, 40), (20, 33)):
        assert np.array_equal(np.asarray(pipe(photo(*size))), np.asarray(data.prepare_eval(photo(*size), 40)))


def test_small_images_are_enlarged(tmp_path):
    folder_of(tmp_path / "a", 2, (9, 7))
    for training in (True, False):
        assert data.make_dataset(str(tmp_path / "a"), 32, training)[0][0].shape == (3, 32, 32)


def test_save_grid(tmp_path):
    x = torch.zeros(2, 3, 3, 8, 10)
    x[0, 1], x[1, 2] = 1.5, -3.0                           # clipped
    data.save_grid(tmp_path / "g.png", x)
    grid = np.asarray(Image.open(tmp_path / "g.png"))
    assert grid.shape == (2 * 10 + 2, 3 * 12 + 2, 3) and os.listdir(tmp_path) == ["g.png"]
    assert (grid[2:10, 14:24] == 255).all() and (grid[12:20, 26:36] == 0).all() and (grid[2:10, 2:12] == 128).all()
    assert (grid[:2] == 255).all() and (grid[10:12] == 255).all()
    data.save_grid(str(tmp_path / "h.png"), [x[0], x[1, :1]])
    assert np.asarray(Image.open(tmp_path / "h.png")).shape == grid.shape


# ---------------------------------------------------------------------------------------------------------------------
# data.py: files that cannot be read
# A broken file is named and replaced; an error of the system is tried again and is no broken file.

def broken_folder(path):
    folder_of(path, 6, (80, 60), "jpg")
    (path / "01.jpg").write_bytes((path / "01.jpg").read_bytes()[:900])       # truncated
    (path / "02.jpg").write_bytes(b"")
    (path / "05.jpg").write_bytes(b"no picture at all")
    return str(path)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_in_evaluation(tmp_path, capfd, workers):
    dataset = data.make_dataset(broken_folder(tmp_path / "a"), 24, False)
    loader = data.make_loader(dataset, 2, False, workers=workers)
    assert [i.tolist() for _, i in loader] == [[0], [3], [4]]
    assert [i.tolist() for _, i in data.make_loader(dataset, 1, False, workers=workers)] == [[0], [3], [4]]
    assert int(dataset.skipped.sum()) == 3 and dataset.skipped.tolist() == [0, 1, 1, 0, 0, 1]
    err = capfd.readouterr().err
    for name in ("01.jpg", "02.jpg", "05.jpg"):
        assert sum(name in line and "warning" in line for line in err.splitlines()) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_in_training(tmp_path, capfd, workers):
    dataset = data.make_dataset(broken_folder(tmp_path / "a"), 24, True)
    batches = take(data.make_loader(dataset, 6, True, workers=workers), 3)
    assert all(len(x) == 6 and sorted(i.tolist()) == list(range(6)) for x, i in batches)
    assert int(dataset.skipped.sum()) == 3
    err = capfd.readouterr().err
    assert all(name in err for name in ("01.jpg", "02.jpg", "05.jpg"))
    if workers == 0:
        assert err.count("warning") == 3                   # once a file
        fresh = data.make_dataset(str(tmp_path / "a"), 24, True)
        assert same_batches(batches, take(data.make_loader(fresh, 6, True, workers=2), 3))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable(tmp_path, train, workers):
    for name in "abc":
        (tmp_path / f"{name}.jpg").write_bytes(b"x")
    dataset = data.make_dataset(str(tmp_path), 24, train)
    loader = data.make_loader(dataset, 2, train, workers=workers)
    with pytest.raises(ValueError, match="none of the 3 images") as error:
        take(loader, 5)
    assert "\n" not in str(error.value)
    if workers:
        loader._iterator._shutdown_workers()               # pytest keeps the traceback: torch would wait 5 s at its end


def test_a_row_of_broken_images_ends_training(tmp_path, monkeypatch):
    """One item does not walk through the whole set in search of a stand-in."""
    folder_of(tmp_path, 10, (20, 20))
    for i in range(2, 7):
        (tmp_path / f"{i:02d}.png").write_bytes(b"broken")
    monkeypatch.setattr(data, "STAND_INS", 4)
    dataset = data.make_dataset(str(tmp_path), 16, True)
    assert torch.equal(dataset[4][0], dataset[4][0]) and int(dataset.skipped.sum()) == 3
    with pytest.raises(ValueError, match=r"4 images in a row cannot be decoded, .*02.png to .*05.png"):
        dataset[2]
    assert int(dataset.skipped.sum()) == 5
    with pytest.raises(ValueError, match="4 images in a row"):
        list(data.make_loader(data.make_dataset(str(tmp_path), 16, True), 10, True, workers=1))


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.EMFILE, errno.EACCES])
@pytest.mark.parametrize("train", [False, True])
def test_errors_of_the_system_are_tried_again(tmp_path, monkeypatch, capfd, code, train):
    dataset = data.make_dataset(folder_of(tmp_path, 2), 16, train)
    want = dataset[1][0]
    failing_open(monkeypatch, code, times=3)
    assert torch.equal(dataset[1][0], want)
    assert capfd.readouterr().err.count("warning: cannot read") == 1
    failing_open(monkeypatch, code, times=4)
    with pytest.raises(OSError, match="for 0 s: '.*png'") as error:
        dataset[0]
    assert error.value.errno == code and dataset.skipped.sum() == 0


@pytest.mark.parametrize("train", [False, True])
def test_errors_of_the_system_in_a_worker(tmp_path, monkeypatch, train):
    dataset = data.make_dataset(folder_of(tmp_path, 8), 16, train)
    failing_open(monkeypatch, errno.EIO, times=1000)
    loader = data.make_loader(dataset, 2, train, workers=1)
    with pytest.raises(OSError) as error:
        take(loader, 9)
    assert error.value.errno == errno.EIO and "\n" not in str(error.value) and dataset.skipped.sum() == 0
    loader._iterator._shutdown_workers()
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: "a worker")
    assert len(dataset.__getitems__([0, 1, 2])) == 1       # the first error ends it, the others need not wait


@pytest.mark.parametrize("left", ["nothing", "an empty folder"])
@pytest.mark.parametrize("train", [False, True])
def test_a_folder_that_vanishes(tmp_path, monkeypatch, left, train):
    folder, away, waited = tmp_path / "images", tmp_path / "away", []
    dataset = data.make_dataset(folder_of(folder, 3), 16, train)
    want = dataset[2][0]
    folder.rename(away)
    if left != "nothing":                                  # as where it was mounted
        folder.mkdir()

    def wait(seconds):
        waited.append(seconds)
        if len(waited) == 3:                               # it comes back
            away.rename(folder)

    monkeypatch.setattr(data.time, "sleep", wait)
    assert torch.equal(dataset[2][0], want)
    assert waited == list(data.PAUSES[:3]) == sorted(data.PAUSES[:3])
    folder.rename(away)
    waited = [0] * 10
    with pytest.raises(FileNotFoundError):
        dataset[0]
    assert dataset.skipped.sum() == 0 and len(waited) == 10 + len(data.PAUSES)


def test_a_file_that_was_deleted(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(data, "PAUSES", (0, 0))
    folder_of(tmp_path, 3)
    (tmp_path / "03.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "04.png").symlink_to(tmp_path / "04.png")
    train, val = (data.make_dataset(str(tmp_path), 16, training) for training in (True, False))
    (tmp_path / "01.png").unlink()
    assert [i.tolist() for _, i in data.make_loader(val, 5, False)] == [[0, 2]]
    assert val.skipped.tolist() == [0, 1, 0, 1, 1]
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3 and all("skipping unreadable" in line and "no such file" in line for line in lines)
    assert train[1][0].shape == (3, 16, 16) and train.skipped.tolist() == [0, 1, 0, 0, 0]


def test_training_ends_with_the_error_of_the_system(tmp_path, smallest):
    """The folder vanishes in the fourth epoch, for good, under two workers."""
    folder_of(tmp_path / "images", 4)
    (tmp_path / "run.py").write_text(f"""
import os
import data
import train
from data import guarded

data.PAUSES = (0.01, 0.02)
item, folder = data.ImageDataset.item, {str(tmp_path / "images")!r}

def item_until_it_vanishes(self, epoch, i):
    if epoch == 3 and os.path.exists(folder):
        os.rename(folder, folder + "_away")
    return item(self, epoch, i)

data.ImageDataset.item = item_until_it_vanishes
guarded(train.main)
""")
    command = [tmp_path / "run.py", *TINY, "--workers", 2, "--data", tmp_path / "images", "--out", tmp_path / "run"]
    environment = dict(os.environ, PYTHONPATH=HERE, OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, *map(str, command)], env=environment,
                          check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "skipping" not in done.stderr, done.stderr
    said = done.stderr.partition("error: ")[2].splitlines()[0]                # the progress bar's last line may follow
    assert "No such file or directory, for 0.03 s" in said and f"{tmp_path}/images/" in said
    assert "training on 4 images of" in done.stdout and "which train, too" in done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# data.py: folders, named sets, torchvision
# Which images a --data names, which of them train and which validate, and what is refused.

def python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=HERE, check=False, capture_output=True, text=True,
                          timeout=120)


def test_folder_layouts(tmp_path):
    root = tmp_path / "set"
    folder_of(root / "train" / "cat", 3)
    folder_of(root / "train" / "dog" / "deep", 2, ext="jpg")
    assert len(data.make_dataset(str(root), 16, True)) == 5
    folder_of(root / "val" / "cat", 4)
    (root / "val" / "notes.txt").write_text("no image")
    (root / "val" / "._hidden.jpg").write_bytes(b"")
    (root / "val" / "loop").symlink_to(root / "val")
    train, val = (data.make_dataset(str(root), 16, t) for t in (True, False))
    assert len(train) == 5 and len(val) == 4
    (x, index), = list(data.make_loader(val, 8, False))
    assert x.shape == (4, 3, 16, 16) and index.tolist() == [0, 1, 2, 3]
    names = [os.fsdecode(n) for n in train.images]
    assert names == sorted(names) and names[0].endswith("cat/00.png") and names[-1].endswith("deep/01.jpg")


def test_hidden_folders_and_other_types(tmp_path, capfd):
    folder_of(tmp_path / "a", 2)
    for name in (".ipynb_checkpoints", "__MACOSX", ".thumbnails", "a/.hidden", "a/@eaDir"):
        folder_of(tmp_path / name, 1)
    for name in ("a/x.gif", "a/y.GIF", "labels.csv", "README", "a/.z.gif"):
        (tmp_path / name).write_text("")
    assert len(data.list_images(str(tmp_path))) == 2
    data.list_images(str(tmp_path))                        # said once
    data.list_images(str(tmp_path / "__MACOSX"))           # asked for by name
    note, = capfd.readouterr().err.splitlines()
    assert note.endswith("being of other types: 2 .gif, 1 .csv, 1 without extension")
    assert f"4 files below {tmp_path} " in note


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test", "Validation"])
def test_names_of_validation_folders(tmp_path, name):
    for k, c in enumerate("abc"):
        folder_of(tmp_path / "train" / c, 1 + k, (8, 8))
    folder_of(tmp_path / name / "a", 1, (8, 8))
    folder_of(tmp_path / name / "c", 2, (8, 8))
    train, val = (data.make_dataset(str(tmp_path), 8, part) for part in (True, False))
    assert train.labels.tolist() == [0, 1, 1, 2, 2, 2] and val.labels.tolist() == [0, 2, 2]    # no b in validation
    assert train.classes == val.classes == ["a", "b", "c"]
    limited = data.make_dataset(str(tmp_path), 8, False, limit=2)
    assert data.parts_taken(train, limited) == (
        f"training on 6 images of {tmp_path}/train (3 classes); validating on 2 of 3 images of {tmp_path}/{name} "
        "(3 classes)")
    folder_of(tmp_path / name / "d", 1, (8, 8))            # only there: a class all the same, after the others
    assert data.make_dataset(str(tmp_path), 8, False).labels.tolist() == [0, 2, 2, 3]
    if name != "test":
        folder_of(tmp_path / "test", 5, (8, 8))
        assert len(data.make_dataset(str(tmp_path), 8, False)) == 4


def test_unlabelled_validation_images(tmp_path, capfd):
    folder_of(tmp_path / "train" / "n01", 1, (8, 8))
    folder_of(tmp_path / "val" / "images", 2, (8, 8))
    train, val = (data.make_dataset(str(tmp_path), 8, part) for part in (True, False))
    assert train.labels.tolist() == [0] and val.labels.tolist() == [-1, -1] and val.classes == ["n01"]
    assert "have no labels" in capfd.readouterr().err


def test_a_plain_tree_serves_both(tmp_path):
    for name in ("a", "b"):
        folder_of(tmp_path / name, 2, (8, 8))
    train, val = (data.make_dataset(str(tmp_path), 8, part) for part in (True, False))
    assert train.images.tolist() == val.images.tolist() and train.labels.tolist() == [0, 0, 1, 1]
    assert data.parts_taken(train, val).endswith("which train, too: there are no folders train/ and val/")


@pytest.mark.parametrize("folders,train,words", [
    (["train"], False, r"holds train/ but no val/ .* or give .*/train, whose images then serve"),
    (["val"], True, r"holds val/ but no train/"),
    (["train", "val", "validation"], False, r"holds val/ and validation/: keep the one"),
    (["train", "val", "validation"], True, r"holds val/ and validation/: keep the one"),
    (["train", "val", "."], True, r"holds images \(00.png ...\) beside train/ and val/"),
    (["train", "."], True, r"holds images \(00.png ...\) beside train/"),
    (["train", "bus", "car"], True, r"holds train/ beside other folders \(bus/ and car/\)"),
    (["cat", "dog", "test"], False, r"holds test/ beside other folders \(cat/ and dog/\)"),
    (["set/train", "set/val"], True, r"/set holds training and other images"),
    (["cat/train", "cat/test", "dog/train"], False, r"/cat holds training and other images"),
])
def test_unclear_parts_are_refused(tmp_path, folders, train, words):
    for folder in folders:
        folder_of(tmp_path / folder, 1, (8, 8))
    with pytest.raises(ValueError, match=words) as error:
        data.make_dataset(str(tmp_path), 8, train)
    assert "\n" not in str(error.value)


def test_limit(tmp_path):
    spec = folder_of(tmp_path / "a", 6)
    dataset = data.make_dataset(spec, 16, False, limit=3)
    assert [os.path.basename(os.fsdecode(n)) for n in dataset.images] == ["00.png", "02.png", "04.png"]
    assert len(dataset.skipped) == 3
    assert len(data.make_dataset(spec, 16, False, limit=100)) == 6
    assert len(data.make_dataset("demo", 16, True, limit=10)) == 10


def test_clear_errors(tmp_path):
    (tmp_path / "empty" / "train").mkdir(parents=True)
    (tmp_path / "file.txt").write_text("x")
    for spec, kind, words in ((tmp_path / "missing", FileNotFoundError, "no folder"),
                              (tmp_path / "empty", ValueError, "no images in"),
                              (tmp_path / "file.txt", NotADirectoryError, "is a file")):
        with pytest.raises(kind, match=words) as error:
            data.make_dataset(str(spec), 16, True)
        assert str(spec) in str(error.value) and "\n" not in str(error.value)
    for name, value in (("size", 0), ("size", -8), ("size", 1.5), ("aug_scale", 0.5), ("limit", 0), ("seed", -1),
                        ("crop", "x")):
        with pytest.raises(ValueError, match=f"{name} is"):
            data.make_dataset("demo", **{"size": 8, "train": True, name: value})


class FakeTorchvision:
    """Stands in for torchvision: the two data sets, made on the spot."""

    class datasets:
        class CIFAR10:
            def __init__(self, root, train, download):
                assert download
                self.data = np.random.default_rng(int(train)).integers(0, 256, (9 if train else 5, 32, 32, 3), np.uint8)
                self.targets, self.classes = [0] * len(self.data), ["airplane"]

        class Imagenette:
            def __init__(self, root, split, size, download):
                assert download and size == "320px"
                for s, n in (("train", 4), ("val", 2)):
                    folder_of(Path(root) / "imagenette2-320" / s / "n01440764", n, (40, 32), "jpeg")


def test_named_sets(tmp_path, monkeypatch):
    monkeypatch.setenv("DCSSDAE_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "import_torchvision", lambda: FakeTorchvision)
    for spec, sizes in (("cifar10", (9, 5)), ("imagenette", (4, 2))):
        for training, n in zip((True, False), sizes, strict=True):
            dataset = data.make_dataset(spec, 32, training)
            assert len(dataset) == n
            (x, _), = take(data.make_loader(dataset, 2, train, workers=0), 1)
            assert x.shape == (2, 3, 32, 32)
    raw = FakeTorchvision.datasets.CIFAR10("", False, True).data
    assert np.allclose(pixels(data.make_dataset("cifar10", 32, False)[3][0]), raw[3], atol=1e-3)
    assert np.allclose(pixels(data.make_dataset("cifar10", 32, False, limit=1)[0][0]), raw[0], atol=1e-3)


@pytest.mark.parametrize("failure", [OSError("<urlopen error\nno network>"), RuntimeError("File not found.")])
def test_failed_download(tmp_path, monkeypatch, failure):
    def fail(*args, **kwargs):
        raise failure

    datasets = types.SimpleNamespace(CIFAR10=fail, Imagenette=fail)
    monkeypatch.setenv("DCSSDAE_DATA", str(tmp_path))
    monkeypatch.setattr(data, "import_torchvision", lambda: types.SimpleNamespace(datasets=datasets))
    for spec in ("cifar10", "imagenette"):
        with pytest.raises(OSError, match=f"cannot get {spec}.*check the network") as error:
            data.make_dataset(spec, 32, True)
        assert "\n" not in str(error.value)


def test_import_torchvision_without_its_operators():
    """A CPU-only torch cannot load the CUDA build's operators: here every extension library is refused, as there."""
    code = """
import torch
def refuse(path):
    raise OSError("libcudart.so: cannot open shared object file")
torch.ops.load_library = refuse
try:
    import torchvision  # a version that does without its operators has nothing to work around
except RuntimeError as error:
    assert "operator torchvision::nms does not exist" in str(error), error
import data
torchvision = data.import_torchvision()
assert data.import_torchvision() is torchvision
torchvision.models.vgg16, torchvision.datasets.CIFAR10
x = torchvision.transforms.functional.resize(torch.zeros(3, 8, 8), 4)
assert x.shape == (3, 4, 4)
import lpips, timm
print("fine")
"""
    result = python(code)
    assert result.stdout.strip().endswith("fine"), result.stderr


def test_import_torchvision_passes_other_errors_on(monkeypatch):
    real = builtins.__import__

    def broken(name, *args, **kwargs):
        if name == "torchvision":
            raise RuntimeError("something else")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(RuntimeError, match="something else"):
        data.import_torchvision()


def test_training_images_without_augmentation_and_labels(tmp_path, monkeypatch):
    for part in ("train", "val"):
        folder_of(tmp_path / part / "n02" / "x", 2, (50, 40))
        folder_of(tmp_path / part / "n01", 1, (40, 50))
    folder_of(tmp_path / "train", 1, (40, 40))
    for root in (str(tmp_path), f"{tmp_path}/"):
        dataset = data.make_dataset(root, 24, train=False, split="train")
        names = [os.path.relpath(os.fsdecode(f), tmp_path) for f in dataset.images]
        assert dataset.labels.tolist() == [(-1, 0, 1)[f.count("/") - 1] for f in names] and len(names) == 4
        for i, name in enumerate(names):
            want = np.asarray(data.prepare_eval(Image.open(tmp_path / name), 24)).transpose(2, 0, 1)
            assert np.allclose(dataset[i][0] * 127.5 + 127.5, want, atol=1e-3)
    demo = data.make_dataset("demo", 16, train=False, split="train", limit=3)
    assert demo.labels.tolist() == [-1] * 3
    want = data.demo_image(16, 0, "train", int(demo.images[1]))
    assert np.allclose(demo[1][0] * 127.5 + 127.5, want.transpose(2, 0, 1), atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# data.py: processes, ranges and errors that every program shares
# One sentence for what the user can mend, from every rank; numbers out of range are refused before any work.

def test_numbers_out_of_range_are_refused_by_every_program(monkeypatch, checkpoint):
    """Before anything is read or written: NaN, infinity, and what lies beyond an end."""
    given = vars(train.get_args([])) | vars(distill.get_args(["--ckpt", "f"]))
    for name, value in given.items():
        is_number = isinstance(value, int | float | list) and not isinstance(value, bool)
        is_number = is_number and name not in ("without", "eval_metrics")  # lists of names
        assert not is_number or name in data.RANGES, f"--{name} has no range"
    for name, (low, high, _) in data.RANGES.items():
        for program, first in ((train, []), (distill, ["--ckpt", "f"])):
            if name not in vars(program.get_args(first)):
                continue
            whole = abs(high) in (1000, 65536, 10**6, data.MANY, 2**63)
            for bad in [str(low - 1)] if whole else ["nan", "inf", str(low - 1) if low > -math.inf else "-inf"]:
                with pytest.raises(ValueError, match=rf"--{name} \S+ is out of range: give a number in"):
                    program.get_args([*first, f"--{name}={bad}"])
    for flag in (["--keep", "1000000000"], ["--eval_steps", "1", "0"], ["--ema", "1"], ["--mu", "1"]):
        with pytest.raises(ValueError, match=rf"{flag[0]} {flag[-1]}\S* is out of range"):
            program = distill if flag[0] == "--mu" else train
            program.get_args([*(["--ckpt", "f"] if program is distill else []), *flag])
    for flag in (["--mu", 1], ["--eta", "nan"], ["--tol", -1], ["--steps", 1, 0], ["--limit", 0], ["--seed", -1]):
        assert f"{flag[0]} {flag[-1]}" in sentence(evaluate, monkeypatch, "--ckpt", checkpoint, *flag)
    for number, inside in ((0, False), (1e-9, True), (1, True), (1.1, False), (math.nan, False)):
        assert data.lies_within(number, 0, 1, "(]") == inside


def gaussian_statistics():
    statistics = fid.Statistics(2)
    statistics.update(torch.randn(5, 2))
    return statistics


@pytest.mark.skipif(os.name != "posix", reason="permissions and pipes are POSIX's")
def test_files_have_the_permissions_of_others_and_pipes_stay(tmp_path):
    model = DCSSDAE("dc_f8c4", "XS", enc_width=0.0625, depth=1)
    before = os.umask(0o027)
    try:
        model.save(tmp_path / "m.safetensors")
        data.write_whole(tmp_path / "m.json", "{}")
        save_checkpoint(tmp_path, small_state(1))
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == {"0o640"}
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for write in (model.save, functools.partial(data.write_whole, data="x"),
                  functools.partial(data.save_grid, images=[torch.zeros(1, 3, 8, 8)])):
        with pytest.raises(OSError, match="pipe is no ordinary file"):
            write(pipe)
    with pytest.raises(OSError, match="pipe is no ordinary file"):
        gaussian_statistics().save(pipe)
    assert pipe.is_fifo() and not list(tmp_path.glob("*.tmp"))
    with data.whole(tmp_path / "m.json") as temporary:  # of two processes each has its own
        assert str(os.getpid()) in os.path.basename(temporary)
        Path(temporary).write_text("{}")


def test_srun_without_torchrun_is_refused(monkeypatch):
    for name in ("RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "8")
    data.setup("cpu")  # in a job, and not started by srun
    monkeypatch.setenv("SLURM_PROCID", "3")
    with pytest.raises(ValueError, match=r"srun started 8 tasks.*srun --ntasks-per-node=1 torchrun"):
        data.setup("cpu")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    data.setup("cpu")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.setenv("RANK", "0")
    data.setup("cpu")


class Store(dict):
    """The processes' store, without processes."""

    def set(self, key, value):
        self[key] = value.encode()

    def wait(self, keys, timeout):
        if keys[0] not in self:
            raise RuntimeError("timeout")

    def get(self, key):
        return self[key]


def test_errors_are_heard_from_every_rank(monkeypatch, capsys):
    """With rank and host, but only once where the first process says the same; on a line of its own."""
    store = Store()
    monkeypatch.setattr(data, "shared_store", lambda: store)

    def end(rank, message, error=ValueError):
        def main():
            bar = data.tqdm(total=3)
            bar.update()
            raise error(message)
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(SystemExit) as stop:
            data.guarded(main)
        assert capsys.readouterr().err.endswith("\n")
        return stop.value.code

    monkeypatch.setenv("WORLD_SIZE", "4")
    here = socket.gethostname()
    assert end(3, "no folder /data", OSError) == f"error: rank 3 of 4 on {here}: no folder /data"
    assert end(0, "--size 3 is wrong") == "error: --size 3 is wrong"
    assert end(1, "--size 3 is wrong") == 1
    assert end(2, "no folder /data") == f"error: rank 2 of 4 on {here}: no folder /data"
    monkeypatch.setattr(data.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(data.dist, "destroy_process_group", lambda: None)
    assert "another process has ended" in end(0, "[gloo/transport] Connection closed by peer", RuntimeError)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert end(0, "no folder /data") == "error: no folder /data"


# ---------------------------------------------------------------------------------------------------------------------
# encoder.py: posteriors and encoders
# Sizes, starts and values: against torch.distributions and, in the published names, against diffusers.

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
    assert torch.equal(posterior.mode(), posterior.mean)


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
    coarse = torch.randn(128, 3, f // 4 + 2, f // 4 + 2)
    images = F.interpolate(coarse, size=2 * f, mode="bicubic", antialias=True)      # little above 1/8 cycle a pixel
    with torch.no_grad():
        a, b, origin = (encoder(x).mean for x in (images[:4], images[4:8], torch.zeros_like(images[:1])))
        assert relative_error(encoder(images[:4] + images[4:8]).mean, a + b - origin) < 1e-5

        def explained(encoder):  # part of the variance of pixels that the latent holds, on images left out of the fit
            z, x = encoder(images).mean.movedim(1, -1), F.pixel_unshuffle(images, f).movedim(1, -1)
            z = F.pad((z - z.mean((0, 1, 2))) / z.std((0, 1, 2)), (0, 1), value=1.0)
            fit = torch.linalg.lstsq(z[32:].flatten(0, 2), x[32:].flatten(0, 2)).solution
            return 1 - (z[:32] @ fit - x[:32]).square().mean() / x[:32].var()

        smooth = explained(encoder)
        for module in encoder.modules():
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()
        assert smooth > 2 * explained(encoder)


@pytest.mark.parametrize("name", ["dc_f32", "foo_f8c4", "dc_f12c4", "dc_f8c0", "DC_f8c4", "vq_f8c4x"])
def test_unknown_encoder_names(name):
    with pytest.raises(ValueError, match="unknown encoder"):
        make_encoder(name)


def to_latent_diffusion(state, quant):
    """diffusers' AutoencoderKL encoder -> the names of latent-diffusion, with `quant` for its last convolution."""
    names = (("quant_conv", quant), ("down_blocks.", "down."), (".resnets.", ".block."),
             (".downsamplers.0.", ".downsample."), ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"),
             ("mid_block.block.0", "mid.block_1"), ("mid_block.block.1", "mid.block_2"),
             ("mid_block.attentions.0", "mid.attn_1"), (".attentions.", ".attn."),
             ("group_norm", "norm"), ("to_out.0", "proj_out"), (".to_", "."))
    out = {}
    for key, value in state.items():
        if key.startswith(("encoder.", "quant_conv.")):
            for old, new in names:
                key = key.replace(old, new)
            out[key] = value[:, :, None, None] if ".attn" in key and value.ndim == 2 else value
    return out


@pytest.mark.parametrize("layout", ["diffusers", "older diffusers", "latent-diffusion"])
def test_vq_encoder_against_diffusers(tmp_path, layout):
    data.import_torchvision()
    diffusers = pytest.importorskip("diffusers")
    vae = randomise(diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
        block_out_channels=(32, 64, 128, 128), latent_channels=4)).eval()
    state = vae.state_dict()
    if layout == "older diffusers":  # as sd-vae-ft-mse is stored
        for old, new in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            state = {k.replace(old, new): v for k, v in state.items()}
    elif layout == "latent-diffusion":  # and the published DC-SSDAE encoders
        state = to_latent_diffusion(state, "encoder.out_proj")
    torch.save(state, tmp_path / "vq.pt")
    ours = DCSSDAE("vq_f8c4", "XS", enc_width=0.25, depth=1)
    ours.load_published(tmp_path / "vq.pt", part="encoder")
    x = torch.rand(2, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        posterior, expected = ours.encode(x), vae.encode(x).latent_dist
    assert relative_error(posterior.mean, expected.mean) < 1e-5
    assert relative_error(posterior.logvar, expected.logvar) < 1e-5


def same_posterior(ours, theirs):
    assert relative_error(ours.mean, theirs.mean) < 1e-5 and relative_error(ours.logvar, theirs.logvar) < 1e-5


@pytest.mark.parametrize("layout", ["diffusers", "repository"])
def test_flux_encoders_against_diffusers(tmp_path, layout):
    """FLUX's, which has no quant_conv, and FLUX.2's: as its encoder gives them (f8) and as its transformer has them."""
    data.import_torchvision()
    diffusers = pytest.importorskip("diffusers")
    shape = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
             "block_out_channels": (32, 64, 128, 128), "layers_per_block": 2}
    flux = randomise(diffusers.AutoencoderKL(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False,
                                             **shape)).eval()
    flux2 = randomise(diffusers.AutoencoderKLFlux2(latent_channels=32, **shape)).eval()
    files = {"flux": flux.state_dict(), "flux2": flux2.state_dict()}
    if layout == "repository":
        statistics = {key: value for key, value in files["flux2"].items() if key.startswith("bn.")}
        assert len(statistics) == 3
        files = {name: to_latent_diffusion(state, "encoder.quant_conv") for name, state in files.items()}
        files["flux2"] |= statistics
    for name, state in files.items():
        save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / f"{name}.safetensors")
    x = torch.rand(2, 3, 64, 96) * 2 - 1
    for name, vae, enc in (("flux", flux, "vq_f8c16"), ("flux2", flux2, "vq_f8c32")):
        ours = DCSSDAE(enc, "XS", enc_width=0.25, depth=1)
        ours.load_published(tmp_path / f"{name}.safetensors", part="encoder")
        with torch.no_grad():
            same_posterior(ours.encode(x), vae.encode(x).latent_dist)

    ours = DCSSDAE("vq_f16c128", "XS", enc_width=0.25, depth=1)
    ours.load_published(tmp_path / "flux2.safetensors", part="encoder")
    ours.save(tmp_path / "ours.safetensors")
    before = {key: value.clone() for key, value in ours.encoder.named_buffers()}
    with torch.no_grad():
        posterior, z = ours.train().encode(x), flux2.encode(x).latent_dist.mode()  # (2, 32, 8, 12)
        cells = z.view(2, 32, 4, 2, 6, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 128, 4, 6)  # as its pipeline does
        expected = flux2.bn(cells)
        assert relative_error(posterior.mode(), expected) < 1e-5
        assert all(torch.equal(value, before[key]) for key, value in ours.encoder.named_buffers())
        # A draw of the folded posterior is the folded draw: mean and deviation are scaled alike.
        plain = DCSSDAE("vq_f8c32", "XS", enc_width=0.25, depth=1)
        plain.load_published(tmp_path / "flux2.safetensors", part="encoder")
        eps = torch.randn_like(z)
        draw = flux2.bn(F.pixel_unshuffle(plain.encode(x).sample(eps), 2))
        assert relative_error(posterior.sample(F.pixel_unshuffle(eps, 2)), draw) < 1e-5
        assert torch.equal(DCSSDAE.load(tmp_path / "ours.safetensors").encode(x).mean, posterior.mean)
    with pytest.raises(ValueError, match=r"vq_f16c128 \(width 0.25, folded\), expected was an encoder vq_f16c16"):
        DCSSDAE("vq_f16c16", "XS", enc_width=0.25, depth=1).load_published(tmp_path / "flux2.safetensors", "encoder")


@pytest.mark.parametrize("layout", ["diffusers", "latent-diffusion"])
def test_va_vae_encoder_against_diffusers(tmp_path, layout):
    """latent-diffusion's kl-f16, which VA-VAE and MAR have: narrower levels, attention in the last one."""
    data.import_torchvision()
    diffusers = pytest.importorskip("diffusers")
    vae = randomise(diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4, layers_per_block=2,
        block_out_channels=(32, 32, 64, 64, 128), latent_channels=32)).eval()
    state = vae.state_dict()
    if layout == "latent-diffusion":  # with what else VA-VAE's file holds
        state = to_latent_diffusion(state, "quant_conv") | {
            "foundation_model.model.patch_embed.proj.weight": torch.zeros(1), "loss.logvar": torch.zeros(()),
            "linear_proj.weight": torch.zeros(1), "decoder.conv_in.weight": torch.zeros(1)}
    torch.save({"state_dict": state}, tmp_path / "vavae.pt")
    ours = DCSSDAE("vq_f16c32", "XS", enc_width=0.25, depth=1)
    ours.load_published(tmp_path / "vavae.pt", part="encoder")
    assert ours.config["enc_options"] == {"kl_f16": True}
    ours.save(tmp_path / "ours.safetensors")
    x = torch.rand(2, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        same_posterior(ours.encode(x), vae.encode(x).latent_dist)
        assert torch.equal(DCSSDAE.load(tmp_path / "ours.safetensors").encode(x).mean, ours.encode(x).mean)
    with pytest.raises(ValueError, match=r"vq_f16c32 \(width 0.25, kl-f16\), expected was an encoder vq_f8c4"):
        DCSSDAE("vq_f8c4", "XS", enc_width=0.25, depth=1).load_published(tmp_path / "vavae.pt", "encoder")


def test_options_that_no_vq_encoder_has():
    for options, words in (({"kl_f16": True}, "for f = 16, not 8"), ({"fold": True}, "multiple of 4 channels, not 6")):
        with pytest.raises(ValueError, match=words):
            make_encoder("vq_f8c6", 0.25, **options)


@pytest.mark.parametrize("name", ["dc_f8c4", "dc_f32c32", "dc_f64c128"])
def test_dc_encoder_against_diffusers(tmp_path, name):
    data.import_torchvision()
    dc = pytest.importorskip("diffusers.models.autoencoders.autoencoder_dc")
    ours = randomise(DCSSDAE(name, "XS", enc_width=0.125, depth=1))
    levels, z_dim = int(math.log2(ours.downscale)) + 1, ours.encoder.z_dim
    widths = tuple(w // 8 for w in (128, 256, 512, 512, 1024, 1024, 1024, 1024)[:levels])
    theirs = dc.Encoder(3, 2 * z_dim, 32, "ResBlock", widths, (0, 5, 10, 4, 4, 4, 4, 4)[:levels], ((),) * levels,
                        "pixel_unshuffle", out_shortcut=False).eval()
    state = {}
    for key, value in ours.encoder.state_dict().items():
        state[key.replace("stages.", "down_blocks.")] = value
    theirs.load_state_dict(state)
    x = torch.rand(1, 3, 64, 128) * 2 - 1
    with torch.no_grad():
        posterior, expected = ours.encode(x), theirs(x)
    assert relative_error(posterior.mean, expected[:, :z_dim]) < 1e-5
    assert relative_error(posterior.logvar, expected[:, z_dim:].clamp(-30, 20)) < 1e-5


DCAE = {  # name: stage widths (full size), depths, EfficientViT's token scales, downsampling
    "dcae_f32c32": ((128, 256, 512, 512, 1024, 1024), (0, 4, 8, 2, 2, 2), (), "pixel_unshuffle"),
    "dcae_f64c128": ((128, 256, 512, 512, 1024, 1024, 2048), (0, 4, 8, 2, 2, 2, 2), (), "pixel_unshuffle"),
    "dcae_f128c512": ((128, 256, 512, 512, 1024, 1024, 2048, 2048), (0, 4, 8, 2, 2, 2, 2, 2), (), "pixel_unshuffle"),
    "dcae_f32c32_sana": ((128, 256, 512, 512, 1024, 1024), (2, 2, 2, 3, 3, 3), (5,), "conv"),
}


def to_dc_ae_repository(state):
    """diffusers' AutoencoderDC encoder -> the names of the original repository, as its published files have them."""
    out = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "conv_in":
            name = "project_in.conv." + ".".join(parts[1:])
        elif parts[0] == "conv_out":
            name = "project_out.main.op_list.0.conv." + parts[1]
        else:
            stage, block, *rest = parts[1:]
            rest = ".".join(rest)
            if rest.startswith(("attn.to_q.", "attn.to_k.", "attn.to_v.")):
                if "to_q" in rest:
                    qkv = torch.cat([state[key.replace("to_q", f"to_{n}")] for n in "qkv"])
                    out[f"stages.{stage}.op_list.{block}.context_module.main.qkv.conv.weight"] = qkv[:, :, None, None]
                continue
            for old, new in (("attn.to_out.", "context_module.main.proj.conv."),
                             ("attn.norm_out.", "context_module.main.proj.norm."),
                             ("attn.to_qkv_multiscale.0.proj_in.", "context_module.main.aggreg.0.0."),
                             ("attn.to_qkv_multiscale.0.proj_out.", "context_module.main.aggreg.0.1."),
                             ("conv_out.conv_inverted.", "local_module.main.inverted_conv.conv."),
                             ("conv_out.conv_depth.", "local_module.main.depth_conv.conv."),
                             ("conv_out.conv_point.", "local_module.main.point_conv.conv."),
                             ("conv_out.norm.", "local_module.main.point_conv.norm."), ("conv1.", "main.conv1.conv."),
                             ("conv2.", "main.conv2.conv."), ("norm.", "main.conv2.norm."),
                             ("conv.", "main.conv.conv.")):
                if rest.startswith(old):
                    rest = new + rest.removeprefix(old)
                    break
            name = f"stages.{stage}.op_list.{block}.{rest}"
            value = value[:, :, None, None] if value.ndim == 2 and ".proj.conv." in name else value
        out[name] = value
    return out


def diffusers_dc_ae_encoder(name, width, z_dim):
    dc = pytest.importorskip("diffusers.models.autoencoders.autoencoder_dc")
    widths, depths, scales, down = DCAE[name]
    stages = len(widths)
    return dc.Encoder(
        3, z_dim, 32, ("ResBlock",) * 3 + ("EfficientViTBlock",) * (stages - 3), tuple(int(w * width) for w in widths),
        depths, ((),) * 3 + (scales,) * (stages - 3), down)


def published_dc_ae_layouts(name, state):
    """{who publishes it: an encoder's weights in his names} of diffusers' state dict."""
    repository = to_dc_ae_repository(state)
    if name.endswith("sana"):  # its strided convolutions are plain layers in the repository
        repository = {k.replace(".main.conv.conv.", ".main.conv."): v for k, v in repository.items()}
    layouts = {"diffusers": state, "repository": repository}
    return {layout: {f"encoder.{k}": v for k, v in tensors.items()} for layout, tensors in layouts.items()}


@pytest.mark.parametrize("name", DCAE)
def test_official_dc_ae_encoders_have_the_published_names_and_shapes(name):
    """At full size, without values: up to 300 million parameters."""
    data.import_torchvision()
    with torch.device("meta"):
        ours = make_encoder(name)
        theirs = diffusers_dc_ae_encoder(name, 1.0, ours.z_dim)
    want = {f"encoder.{k}": v.shape for k, v in ours.state_dict().items()}
    for layout, tensors in published_dc_ae_layouts(name, theirs.state_dict()).items():
        assert {k: v.shape for k, v in our_names(tensors).items()} == want, layout


@pytest.mark.parametrize("name", DCAE)
def test_official_dc_ae_encoders_against_diffusers(tmp_path, name):
    """An eighth as wide: both published layouts, square and not, float32; and bf16 to its accuracy."""
    data.import_torchvision()
    # no fewer channels than latent channels
    narrow = "dcae_f128c64" if name == "dcae_f128c512" else name
    ours = DCSSDAE(narrow, "XS", enc_width=0.125, depth=1).eval()
    theirs = randomise(diffusers_dc_ae_encoder(name, 0.125, ours.encoder.z_dim)).eval()
    side = max(64, ours.downscale)
    for layout, tensors in published_dc_ae_layouts(name, theirs.state_dict()).items():
        torch.save(tensors | {"decoder.conv_in.weight": torch.zeros(1)}, tmp_path / f"{layout}.pt")
        ours.load_published(tmp_path / f"{layout}.pt", part="encoder")
        for shape in ((1, 3, side, 2 * side), (2, 3, side, side)):
            x = torch.rand(shape) * 2 - 1
            with torch.no_grad():
                expected, posterior = theirs(x), ours.encode(x)
            assert relative_error(posterior.mean, expected) < 1e-4
            assert torch.allclose(posterior.sample(), posterior.mean, atol=1e-5)  # deterministic
    x, expected = x[:1], expected[:1]
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert relative_error(ours.encode(x).mean, expected) < 0.05
        assert relative_error(ours.encoder.bfloat16()(x.bfloat16()).mean, expected) < 0.05


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
    y, scaled = torch.randn(2, 20, *z.shape[2:], generator=g), part.deviation.square()
    torch.testing.assert_close((part.decode(y) * x).sum(), (y * scaled * part.encode(x)).sum(), rtol=1e-4, atol=1e-2)
    with pytest.raises(ValueError, match="have 192 coefficients"):
        LappedCode(8, 193)


@pytest.fixture(scope="module")
def demo_images():
    """Built-in images to fit to, and others: (400, 3, 64, 64) and (100, 3, 64, 64)."""
    images = []
    for train_set, n in ((True, 400), (False, 100)):
        dataset = data.make_dataset("demo", 64, train=train_set, limit=n)
        images.append(torch.stack([dataset[i][0] for i in range(n)]).double())
    return images


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
        return losses.psnr((y - x).square().mean((1, 2, 3))).mean()

    assert quality(lapped) > quality(components) - 0.1
    deviations = z.std((0, 2, 3))
    assert deviations.min() > 0.4 and deviations.max() < 2


def test_the_lapped_code_is_as_exact_in_a_model_of_bf16():
    code, x = LappedCode(32, 32), torch.rand(1, 3, 64, 64) * 2 - 1
    expected = code.decode(code.encode(x))
    model = nn.Sequential(code, nn.Linear(2, 2)).to(torch.bfloat16)
    assert model[1].weight.dtype is torch.bfloat16 and torch.equal(code.decode(code.encode(x)), expected)
    assert model.to("meta")[0].basis.device.type == "meta"


@pytest.mark.parametrize("enc", ["dc_f32c32", "vq_f8c4", "dc_f64c128"])
@pytest.mark.parametrize("loss", ["fm", "eqm"])
def test_an_untrained_model_is_the_linear_code(enc, loss):
    torch.manual_seed(0)
    _, f, c = parse_name(enc)
    model = DCSSDAE(enc, "XS", loss, 0.125, depth=1, input_skip=True, linear_encoder=True, linear_decoder=c).eval()
    code = LappedCode(f, c)
    x = torch.rand(1, 3, 64, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        z = model.encode(x).mode()
        torch.testing.assert_close(z, code.encode(x), rtol=0, atol=1e-5)
        for steps in (1, 4, 25):
            atol = 2e-4 if loss == "fm" and steps == 25 else 1e-5  # FM's last steps are from below T_LEAST
            torch.testing.assert_close(model.decode(z, steps), code.decode(z), rtol=0, atol=atol)


def test_the_linear_decoder_is_fitted_by_least_squares():
    torch.manual_seed(0)
    model = DCSSDAE("dcae_f32c32", "XS", "eqm", 0.125, depth=1, input_skip=True, linear_decoder=40).eval()
    g = torch.Generator().manual_seed(0)
    batches = [torch.rand(8, 3, 64, 64, generator=g) * 2 - 1 for _ in range(4)]
    model.fit_linear_decoder(batches)
    code = LappedCode(32, 40)
    with torch.no_grad():
        z = torch.cat([model.encode(x).mode() for x in batches]).double()
        c = torch.cat([code.encode(x) for x in batches]).double()
    z, c = z.permute(0, 2, 3, 1).reshape(-1, 32).numpy(), c.permute(0, 2, 3, 1).reshape(-1, 40).numpy()
    z = np.concatenate([z, np.ones((len(z), 1))], 1)
    ridge = np.sqrt(RIDGE * np.mean(np.sum(z * z, 0))) * np.eye(33)  # as further equations
    expected, *_ = np.linalg.lstsq(np.concatenate([z, ridge]), np.concatenate([c, np.zeros((33, 40))]), rcond=None)
    np.testing.assert_allclose(model.decoder.base.weight[:, :, 0, 0].detach().numpy().T, expected[:32], atol=1e-4)
    np.testing.assert_allclose(model.decoder.base.bias.detach().numpy(), expected[32], atol=1e-4)
    unexplained = np.mean((z @ expected - c) ** 2, 0) / np.var(c, 0)
    np.testing.assert_allclose(model.decoder.revision[:, 0, 0].detach().numpy(), unexplained, atol=1e-4)
    with pytest.raises(ValueError, match="no image"):
        model.fit_linear_decoder([])
    with pytest.raises(ValueError, match="no linear decoder"):
        DCSSDAE("vq_f8c4", "XS", enc_width=0.125, depth=1).fit_linear_decoder(batches)


def test_the_network_adds_what_the_linear_code_leaves_out():
    torch.manual_seed(0)
    decoder = UViT("XS", 4, time_cond=False, depth=1, skip=1.0, base=(8, 4))
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


def test_what_is_added_is_as_large_as_the_contrast():
    """An image of a tenth of the contrast gets a tenth of the addition: nothing is added to a flat sky."""
    torch.manual_seed(0)
    decoder = UViT("XS", 4, time_cond=False, depth=1, skip=1.0, base=(8, 4))
    out = torch.randn(2, 3, 32, 48)
    base = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        added = decoder.addition(out, local_contrast(base)).std()
        fainter = decoder.addition(out, local_contrast(base / 10 + 0.5)).std()
    torch.testing.assert_close(fainter, added / 10, rtol=0.01, atol=0)


def test_training_passes_the_additions_gradient_unscaled_by_contrast():
    decoder = UViT("XS", 4, time_cond=False, depth=1, skip=1.0, base=(8, 4))
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
    decoder = UViT("XS", 4, time_cond=False, depth=1, skip=1.0, base=(8, 4))
    torch.nn.init.normal_(decoder.conv_out.weight)
    x, z, other = torch.randn(2, 3, 32, 48), torch.randn(2, 4, 4, 6), torch.randn(2, 4, 4, 6)
    condition, of_other = decoder.condition(z, 32, 48), decoder.condition(other, 32, 48)
    field = decoder(x, condition)
    swapped = condition._replace(base=of_other.base, base_map=of_other.base_map,
                                 contrast=of_other.contrast)
    assert torch.equal(decoder(x, swapped), decoder(x, of_other)) and not torch.allclose(decoder(x, swapped), field)
    field.square().mean().backward()  # but it is learned from the first step on
    assert decoder.norm_z.weight.grad.all()


@pytest.mark.parametrize("loss", ["fm", "eqm"])
@pytest.mark.parametrize("steps", [1, 4])
def test_decoding_in_float64_is_that_in_float32_but_for_rounding(loss, steps):
    torch.manual_seed(0)
    model = DCSSDAE("dc_f8c4", "XS", loss, 0.0625, depth=1, input_skip=True, linear_encoder=True, linear_decoder=4)
    randomise(model, scale=0.5).eval()
    z, noise = torch.randn(2, 4, 4, 4), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        single = model.decode(z, steps, noise)
        double = model.double().decode(z.double(), steps, noise)
    assert single.dtype is torch.float32 and double.dtype is torch.float64
    assert relative_error(single, double) < 1e-4


def test_what_the_linear_flag_builds():
    def config(*flags):
        args = train.get_args(["--enc", "dc_f32c32", "--enc_width", "0.125", "--dec", "XS", "--depth", "1", *flags])
        config = train.new_model(args).config
        return config["linear_encoder"], config["linear_decoder"]

    assert config() == (True, 32) and config("--linear", "off") == (False, 0)
    assert config("--linear", "encoder") == (True, 0) and config("--linear", "decoder") == (False, 256)
    assert config("--enc", "dcae_f32c32") == (False, 256)  # given encoders keep their latents: a fit, of more than c
    assert config("--enc", "vq_f8c4", "--enc_ckpt", "some file") == (False, 32)
    with pytest.raises(ValueError, match="--linear off"):
        train.check_args(train.get_args(["--no-input_skip"]))
    train.check_args(train.get_args(["--c", "trunc", "--linear", "encoder"]))


@pytest.mark.parametrize("c", ["linear", "trunc", "piecewise"])
def test_only_a_linear_c_has_the_linear_decoders_field(c):
    """lam c(0) (x_g - D), for the perfect estimate D = x, is the target for c = linear alone."""
    eqm, (x, e), g = EqM(c, lam=2.0), torch.randn(2, 5, 3, 8, 8), torch.linspace(0, 0.95, 5)
    error = eqm.at_noise * (eqm.mix(x, e, g) - x) - eqm.target(x, e, g)
    assert (error.abs().max() < 1e-5) == (c == "linear")


def test_linear_models_are_saved_and_their_encoders_taken_over(tmp_path):
    torch.manual_seed(0)
    model = DCSSDAE("dc_f8c4", "XS", "fm", 0.125, depth=1, input_skip=True, linear_encoder=True, linear_decoder=4)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    model.save(tmp_path / "m.safetensors")
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    again, other = DCSSDAE.load(tmp_path / "m.safetensors"), DCSSDAE("dc_f8c4", "XS", "eqm", 0.125, depth=1).eval()
    other.load_published(tmp_path / "m.safetensors", part="encoder")
    with torch.no_grad():
        z = model.eval().encode(x).mode()
        assert torch.equal(again.encode(x).mode(), z) and torch.equal(other.encode(x).mode(), z)
        noise = torch.randn(1, 3, 32, 32)
        assert torch.equal(again.decode(z, 2, noise), model.decode(z, 2, noise))
    assert other.config["linear_encoder"] and not other.config["linear_decoder"]
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, tmp_path / "old.safetensors", {"format": "4", "config": json.dumps(model.config)})
    with pytest.raises(ValueError, match="format 4"):
        DCSSDAE.load(tmp_path / "old.safetensors")
    other.load_published(tmp_path / "old.safetensors", part="encoder")  # which is as it was
    with pytest.raises(ValueError, match="input skip"):
        DCSSDAE("dc_f8c4", "XS", linear_decoder=4)
    with pytest.raises(ValueError, match="whole number"):
        DCSSDAE("dc_f8c4", "XS", input_skip=True, linear_decoder=True)
    with pytest.raises(ValueError, match="linear image of a 2x2 latent is 16x16"):
        model.decoder(torch.randn(1, 3, 32, 32), torch.randn(1, 4, 2, 2), torch.rand(1))


# ---------------------------------------------------------------------------------------------------------------------
# model.py: the decoder against a reference
# The published names and values: a plain decoder, one functional call after another, in float64.

def published_decoder_shapes(widths, blocks, z_dim, time, window=15, heads=4):
    """Names and shapes of a published DC-SSDAE decoder file (without the prefix decoder.)."""
    c, top, shapes = widths[0], widths[-1], {}

    def layer(name, *weight, bias=True):
        shapes[f"{name}.weight"] = weight
        if bias:
            shapes[f"{name}.bias"] = weight[:1]

    def resnet(name, cin, cout):
        layer(f"{name}.norm1.ctx_proj", 2 * cin, c, 1, 1)
        layer(f"{name}.conv1", cout, cin, 3, 3)
        if time:
            layer(f"{name}.time_emb_proj", 2 * cout, 4 * c)
        layer(f"{name}.norm2", cout)
        layer(f"{name}.conv2", cout, cout, 3, 3)
        if cin != cout:
            layer(f"{name}.conv_shortcut", cout, cin, 1, 1)

    layer("conv_in_img", c // 2, 3, 3, 3)
    layer("conv_in_z", c // 2, z_dim, 3, 3)
    layer("conv_in", c, c, 3, 3)
    layer("batch_norm_z", z_dim)
    shapes |= {"batch_norm_z.running_mean": (z_dim,), "batch_norm_z.running_var": (z_dim,),
               "batch_norm_z.num_batches_tracked": ()}
    layer("ada_ctx_proj.0", c, z_dim, 3, 3)
    layer("ada_ctx_proj.2", c, c, 3, 3)
    if time:
        layer("time_embedding.linear_1", 4 * c, c)
        layer("time_embedding.linear_2", 4 * c, 4 * c)
    skips, cin = [c], c
    for i, cout in enumerate(widths):
        for j in range(2):
            resnet(f"down_blocks.{i}.resnets.{j}", cin, cout)
            skips.append(cout)
            cin = cout
        if i < 3:
            layer(f"down_blocks.{i}.downsamplers.0.conv", cout, cout, 3, 3)
            skips.append(cout)
    for name in ("norm", "proj_in", "proj_out"):
        layer(f"mid_block.{name}", *((top,) if name == "norm" else (top, top)))
    for k in range(blocks):
        b = f"mid_block.transformer_blocks.{k}"
        layer(f"{b}.norm1.linear", 2 * top, c)
        for name in "qkv":
            layer(f"{b}.attn1.to_{name}", top, top, bias=False)
        layer(f"{b}.attn1.out_proj", top, top)
        layer(f"{b}.norm2", top)
        layer(f"{b}.ff.proj_in_act.proj", 8 * top, top)
        layer(f"{b}.ff.proj_out", top, 4 * top)
        shapes[f"{b}.relative_position_bias.relative_bias_table"] = (window, window, heads)
    for i, cout in enumerate(reversed(widths)):
        for j in range(3):
            resnet(f"up_blocks.{i}.resnets.{j}", cin + skips.pop(), cout)
            cin = cout
        if i < 3:
            layer(f"up_blocks.{i}.upsamplers.0.conv", cout, cout, 3, 3)
    layer("conv_norm_out", c)
    layer("conv_out", 3, c, 3, 3)
    return shapes


def published_decoder(seed=0, **kw):
    """A random published-layout state dict."""
    g, state = torch.Generator().manual_seed(seed), {}
    for name, shape in published_decoder_shapes(**kw).items():
        value = torch.randn(shape, generator=g) / (
            math.prod(shape[1:]) ** 0.5 if len(shape) > 1 and "bias_table" not in name else 4)
        if name.endswith(("norm2.weight", "norm.weight", "norm_out.weight", "norm_z.weight")):
            value = 1 + value
        if name.endswith("running_var"):
            value = 0.5 + value.abs()
        state[name] = torch.tensor(0) if name.endswith("tracked") else value
    return state


def reference_decoder(p, x, z, t=None, window=15):
    """The decoder of design and paper, written down naively."""
    p = {k: v.double() for k, v in p.items()}
    x, z = x.double(), z.double()

    def conv(name, h, stride=1):
        w = p[f"{name}.weight"]
        return F.conv2d(h, w, p[f"{name}.bias"], stride=stride, padding=w.shape[-1] // 2)

    def linear(name, h):
        return h @ p[f"{name}.weight"].T + (p.get(f"{name}.bias", 0))

    def resize(h, like):  # nearest
        return h.repeat_interleave(like.shape[2] // h.shape[2], 2).repeat_interleave(like.shape[3] // h.shape[3], 3)

    def resnet(name, h, ctx, temb):
        scale, shift = resize(conv(f"{name}.norm1.ctx_proj", ctx), h).chunk(2, 1)
        u = F.silu(F.group_norm(h, 32) * (1 + scale) + shift)
        u = conv(f"{name}.conv1", u)
        u = F.group_norm(u, 32, p[f"{name}.norm2.weight"], p[f"{name}.norm2.bias"])
        if temb is not None:
            scale, shift = linear(f"{name}.time_emb_proj", F.silu(temb))[:, :, None, None].chunk(2, 1)
            u = u * (1 + scale) + shift
        u = conv(f"{name}.conv2", F.silu(u))
        return u + (conv(f"{name}.conv_shortcut", h) if f"{name}.conv_shortcut.weight" in p else h)

    def attention(name, bias_name, u, rows, cols):
        table = p[bias_name]
        heads, r = table.shape[2], window // 2
        q, k, v = (linear(f"{name}.to_{n}", u).unflatten(-1, (heads, -1)) for n in "qkv")  # (B, N, heads, d)
        out = torch.zeros_like(q)
        for i in range(rows * cols):  # one query at a time
            near = [(j, table[i // cols - j // cols + r, i % cols - j % cols + r]) for j in range(rows * cols)
                    if abs(i // cols - j // cols) <= r and abs(i % cols - j % cols) <= r]
            index, bias = [j for j, _ in near], torch.stack([b for _, b in near])  # bias (n, heads)
            weight = ((q[:, i:i + 1] * k[:, index]).sum(-1) / q.shape[-1] ** 0.5 + bias).softmax(dim=1)
            out[:, i] = (weight[..., None] * v[:, index]).sum(1)
        return linear(f"{name}.out_proj", out.flatten(2))

    joint = "conv_in_img.weight" not in p  # as SSDD has published
    if not joint:
        mean, var = (p[f"batch_norm_z.running_{name}"][:, None, None] for name in ("mean", "var"))
        z = (z - mean) / (var + 1e-5).sqrt()
        z = z * p["batch_norm_z.weight"][:, None, None] + p["batch_norm_z.bias"][:, None, None]
    ctx = conv("ada_ctx_proj.2", F.silu(conv("ada_ctx_proj.0", z)))
    temb = None
    if t is not None:
        half = p["conv_in.weight"].shape[0] // 2  # C / 2
        angle = 1000 * t.double()[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
        temb = linear("time_embedding.linear_1", torch.cat([angle.cos(), angle.sin()], 1))
        temb = linear("time_embedding.linear_2", F.silu(temb))
    h = [x, resize(z, x)] if joint else [conv("conv_in_img", x), conv("conv_in_z", resize(z, x))]
    h = conv("conv_in", torch.cat(h, 1))
    skips = [h]
    for i in range(4):
        for j in range(2):
            h = resnet(f"down_blocks.{i}.resnets.{j}", h, ctx, temb)
            skips.append(h)
        if i < 3:
            h = conv(f"down_blocks.{i}.downsamplers.0.conv", h, stride=2)
            skips.append(h)
    rows, cols = h.shape[2:]
    tokens_ctx = resize(ctx, h).flatten(2).mT
    u = F.group_norm(h, 32, p["mid_block.norm.weight"], p["mid_block.norm.bias"], eps=1e-6)
    u = linear("mid_block.proj_in", u.flatten(2).mT)
    for k in range(sum(name.endswith("bias_table") for name in p)):
        b = f"mid_block.transformer_blocks.{k}"
        shift, scale = linear(f"{b}.norm1.linear", F.silu(tokens_ctx)).chunk(2, -1)
        bias = f"{b}.relative_position_bias.relative_bias_table"
        u = u + attention(f"{b}.attn1", bias, F.layer_norm(u, u.shape[-1:]) * (1 + scale) + shift, rows, cols)
        n = F.layer_norm(u, u.shape[-1:], p[f"{b}.norm2.weight"], p[f"{b}.norm2.bias"])
        value, gate = linear(f"{b}.ff.proj_in_act.proj", n).chunk(2, -1)
        u = u + linear(f"{b}.ff.proj_out", value * F.gelu(gate))
    h = h + linear("mid_block.proj_out", u).mT.unflatten(2, (rows, cols))
    for i in range(4):
        for j in range(3):
            h = resnet(f"up_blocks.{i}.resnets.{j}", torch.cat([h, skips.pop()], 1), ctx, temb)
        if i < 3:
            h = conv(f"up_blocks.{i}.upsamplers.0.conv", h.repeat_interleave(2, 2).repeat_interleave(2, 3))
    return conv("conv_out", F.silu(F.group_norm(h, 32, p["conv_norm_out.weight"], p["conv_norm_out.bias"])))


@pytest.mark.parametrize("loss", ["fm", "eqm"])
@pytest.mark.parametrize("enc,size", [("vq_f8c4", (64, 64)), ("dc_f16c8", (32, 96)), ("dc_f32c8", (32, 160))])
def test_published_decoder_loads_and_equals_the_reference(tmp_path, loss, enc, size):
    """Published names, a 15 x 15 table in a 17 x 17 window, square and not, grids smaller and larger than the
    window."""
    z_dim, f = make_encoder(enc, 0.25).z_dim, make_encoder(enc, 0.25).downscale
    state = published_decoder(widths=[32, 64, 96, 96], blocks=2, z_dim=z_dim, time=loss == "fm")
    torch.save({"state_dict": {f"module.decoder.{k}": v for k, v in state.items()}}, tmp_path / "published.pt")
    model = DCSSDAE(enc, "XS", loss, enc_width=0.25, depth=2, input_skip=True).eval()
    model.load_published(tmp_path / "published.pt", part="decoder")
    assert not model.config["input_skip"]  # published decoders have none
    torch.manual_seed(0)
    x, z = torch.randn(2, 3, *size), torch.randn(2, z_dim, size[0] // f, size[1] // f)
    t = torch.rand(2) if loss == "fm" else None
    with torch.no_grad():
        assert relative_error(model.decoder(x, z, t), reference_decoder(state, x, z, t)) < 1e-5


def test_ssdd_decoder_loads_and_equals_the_reference(tmp_path):
    """One input convolution on image and latent, no normalisation of the latent: the same class, chosen by the file."""
    state = published_decoder(widths=[32, 64, 96, 96], blocks=2, z_dim=4, time=True)
    for name in [k for k in state if k.startswith(("conv_in_img", "conv_in_z", "batch_norm_z"))]:
        del state[name]
    state["conv_in.weight"] = torch.randn(32, 7, 3, 3) / 8
    torch.save({f"module.decoder.{k}": v for k, v in state.items()}, tmp_path / "ssdd.pt")
    model = DCSSDAE("vq_f8c4", "XS", "fm", enc_width=0.25, depth=2, input_skip=True).eval()
    encoder = model.encoder
    model.load_published(tmp_path / "ssdd.pt", part="decoder")
    assert model.encoder is encoder and model.config["joint_input"] and not model.config["input_skip"]
    x, z, t = torch.randn(2, 3, 32, 48), torch.randn(2, 4, 4, 6), torch.rand(2)
    with torch.no_grad():
        assert relative_error(model.decoder(x, z, t), reference_decoder(state, x, z, t)) < 1e-5
    model.save(tmp_path / "m.safetensors")
    assert torch.equal(DCSSDAE.load(tmp_path / "m.safetensors").decoder(x, z, t), model.decoder(x, z, t))


def test_window_attention_equals_reference_at_17(tmp_path):
    state = published_decoder(widths=[32, 64, 96, 96], blocks=1, z_dim=4, time=False, window=17)
    torch.manual_seed(0)
    x, z = torch.randn(1, 3, 80, 160), torch.randn(1, 4, 10, 20)
    model = DCSSDAE("vq_f8c4", "XS", "eqm", enc_width=0.25, depth=1)
    save_file({f"decoder.{k}": v for k, v in state.items()}, tmp_path / "d.safetensors")
    model.load_published(tmp_path / "d.safetensors", part="decoder")
    with torch.no_grad():
        ours, reference = model.decoder(x, z), reference_decoder(state, x, z, window=17)
    assert relative_error(ours, reference) < 1e-5
    assert relative_error(ours, reference_decoder(state, x, z, window=15)) > 1e-5  # the outermost offsets count


MILLIONS = {"XS": (5.00, 4.61), "S": (14.09, 12.78), "B": (21.18, 19.61), "M": (50.36, 46.85), "L": (90.84, 86.59),
            "XL": (161.42, 153.86), "H": (363.01, 346.03)}


@pytest.mark.parametrize("size", SIZES)
def test_decoder_parameter_counts(size):
    """The published counts have 15 x 15 tables; ours of 17 x 17 hold 64 more entries a head and block."""
    for time_cond, expected in zip((True, False), MILLIONS[size]):
        with torch.device("meta"):
            decoder = UViT(size, z_dim=4, time_cond=time_cond)
        extra = sum(64 * block.attn.heads for block in decoder.blocks)
        assert (sum(p.numel() for p in decoder.parameters()) - extra) / 1e6 == pytest.approx(expected, abs=0.0051)


# ---------------------------------------------------------------------------------------------------------------------
# model.py: the fast forms against the simple ones
# Windowed attention, AdaGN, upsampling, conditioning: equal to their plain forms, compiled, linear in pixels.

def dense_attention(attn, x):
    """WindowAttention in its plain form: every pair of tokens, masked."""
    h, w = x.shape[2:]
    r, tokens = attn.window // 2, x.flatten(2).mT
    q, k, v = (p(tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for p in (attn.q, attn.k, attn.v))
    y, x_ = torch.arange(h).repeat_interleave(w), torch.arange(w).repeat(h)
    dy, dx = y[:, None] - y, x_[:, None] - x_                                              # query - key
    bias = attn.bias_table[dy.clamp(-r, r) + r, dx.clamp(-r, r) + r].permute(2, 0, 1)
    bias = bias.masked_fill((dy.abs() > r) | (dx.abs() > r), float("-inf"))
    p = (q @ k.mT / q.shape[-1] ** 0.5 + bias).softmax(-1)
    return attn.out((p @ v).transpose(1, 2).flatten(2)).mT.unflatten(2, (h, w))


@pytest.mark.parametrize("h, w, window", [(1, 1, 17), (3, 40, 17), (24, 25, 17), (33, 26, 17), (41, 32, 17), (19, 9, 9),
                                          (17, 16, 1), (30, 31, 13), (29, 20, 5), (50, 10, 21), (9, 9, 99)])
def test_windowed_attention_equals_the_dense_masked_form(h, w, window):
    torch.manual_seed(0)
    attn = WindowAttention(16, 2, window).double()
    nn.init.normal_(attn.bias_table)
    windows = Windows(h, w, window, "cpu")
    x, grad = torch.randn(2, 2, 16, h, w, dtype=torch.float64).requires_grad_(), torch.randn(2, 16, h, w).double()

    def run(form):
        attn.zero_grad()
        y = form(x[0])
        (dx,) = torch.autograd.grad(y, x, grad, retain_graph=True)
        (y * grad).sum().backward(inputs=list(attn.parameters()))
        return [y, dx, *(p.grad.clone() for p in attn.parameters())]

    fast = run(lambda x: attn(x, windows, windows.bias(attn.bias_table)))
    for a, b in zip(fast, run(lambda x: dense_attention(attn, x)), strict=True):
        assert (a - b).norm() <= 1e-9 * (b.norm() + 1e-3)


@pytest.mark.parametrize("batch, h, w", [(2, 2, 3), (1, 1, 1), (2, 1, 1)])
def test_norm_silu_equals_the_plain_form(batch, h, w):
    torch.manual_seed(0)
    x = (3 * torch.randn(2, 64, 4, 6, dtype=torch.float64) + 1).requires_grad_()
    scale, shift = (torch.randn(batch, 64, h, w, dtype=torch.float64).requires_grad_() for _ in range(2))
    fast, plain = NormSiLU.apply(x, scale, shift), plain_norm_silu(x, scale, shift)
    grad = torch.randn_like(plain)
    assert torch.allclose(fast, plain, rtol=1e-9, atol=1e-9)
    for a, b in zip(*(torch.autograd.grad(y, (x, scale, shift), grad) for y in (fast, plain)), strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-9)
    with torch.no_grad():  # works in place on its own result, never on x
        before = x.clone()
        for y in (x, x.contiguous(memory_format=torch.channels_last)):
            assert torch.allclose(NormSiLU.apply(y, scale, shift), plain) and torch.equal(x, before)
        half = NormSiLU.apply(x.bfloat16(), scale.bfloat16(), shift.bfloat16()).double()
        assert relative_error(half, plain) < 1e-2


def test_upsample_equals_nearest_and_convolution():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(6, 5, 3, padding=1).double(), torch.randn(2, 6, 3, 4, dtype=torch.float64)
    plain = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), conv.weight, conv.bias, padding=1)
    assert torch.allclose(upsample(x, conv), plain, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(y.square().sum(), conv.parameters()) for y in (upsample(x, conv), plain)]
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-10) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (32, 64), (128, 64)])
def test_condition_is_the_plain_input_layer_and_computed_once(joint, size):
    torch.manual_seed(0)
    unet = UViT("XS", 4, time_cond=False, depth=1, joint_input=joint).double().eval()
    x, z = torch.randn(2, 3, *size).double(), torch.randn(2, 4, size[0] // 8, max(1, size[1] // 32)).double()
    up = F.interpolate(unet.norm_z(z), size=size, mode="nearest")
    plain = unet.conv_in(torch.cat([unet.conv_in_x(x), unet.conv_in_z(up)], dim=1))
    x_part = unet.conv_in_x(x)
    fast = F.conv2d(x_part, unet.conv_in.weight[:, :x_part.shape[1]], padding=1)
    fast = fast + spread(unet.condition(z, *size).input_map, *size)
    assert torch.allclose(fast, plain, rtol=1e-10, atol=1e-10)
    assert torch.equal(unet(x, unet.condition(z, *size)), unet(x, z))


def test_latent_work_is_done_once_per_decode_and_in_float32_sums():
    torch.manual_seed(0)
    model, calls = DCSSDAE("dc_f8c4", "XS", "eqm", enc_width=0.0625, depth=1).eval(), []
    for p in model.decoder.parameters():
        nn.init.normal_(p, std=0.05)
    model.decoder.context.register_forward_hook(lambda *a: calls.append(1))
    z, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        x, nfe = model.sample(z, steps=5, noise=noise, method="nesterov", mu=0.3, eta=0.3, tol=1e-6)
        assert len(calls) == 1 and nfe.tolist() == [5] * 3
        # samples that stop leave the prepared condition too: each ends as it does alone
        rms = model.decoder(noise, z).flatten(1).square().mean(1).sqrt().sort().values
        tol = float(rms[:2].mean())
        together = model.sample(z, steps=4, noise=noise, eta=0.1, tol=tol)
        assert len(set(together[1].tolist())) > 1
        for i in range(3):
            alone = model.sample(z[i:i + 1], steps=4, noise=noise[i:i + 1], eta=0.1, tol=tol)
            assert alone[1] == together[1][i] and relative_error(alone[0], together[0][i:i + 1]) < 1e-5
        half = model.bfloat16().sample(z, steps=5, noise=noise, method="nesterov", mu=0.3, eta=0.3, tol=1e-6)[0]
    assert half.dtype == torch.float32 and relative_error(half, x) < 0.05


@slow
def test_compiles_without_graph_breaks():
    """Encoders whole, and a decoder's block with the gradients that the compiler makes of it."""
    x = torch.randn(2, 3, 32, 32)
    for enc in ("dc_f8c4", "vq_f8c4", "dcae_f32c32"):
        encoder = make_encoder(enc, width=0.125)
        for stage in encoder.stages if enc.startswith("dc") else ():
            del stage[1:-1]  # further blocks like the first one, which the compiler would trace again
        fast = torch.compile(lambda x, encoder=encoder: encoder(x).mean, fullgraph=True, backend="eager")
        assert relative_error(fast(x), encoder(x).mean) < 1e-5

    block = randomise(UViT("XS", 4, depth=1).down[0][0])
    h, modulation, temb = torch.randn(2, 32, 8, 8), torch.randn(2, 64, 2, 2), torch.randn(2, 128)
    found = []
    for run in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        y = run(h, modulation, temb)
        gradients = torch.autograd.grad(y.square().sum(), [block.conv1.weight, block.conv2.weight])
        found.append([y.detach(), *gradients])
    for a, b in zip(*found, strict=True):
        assert relative_error(a, b) < 1e-5


def test_checkpointing_changes_no_gradient_and_keeps_half_as_much():
    unet = UViT("XS", 4, depth=1).train()
    x, z, t = torch.randn(2, 3, 32, 32), torch.randn(2, 4, 4, 4), torch.rand(2)
    for p in unet.parameters():
        nn.init.normal_(p, std=0.05)
    gradients, kept = [], []
    for unet.checkpointing in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            y = unet(x, z, t)
        kept.append(sum(sizes))
        gradients.append(torch.autograd.grad(unet(x, z, t).square().sum(), [*unet.parameters()]))
    assert y.isfinite().all() and kept[1] < 0.5 * kept[0]
    largest = max(gradient.norm() for gradient in gradients[0])
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= 1e-5 * (a.norm() + 0.01 * largest)  # some biases have no gradient but rounding


@slow
def test_cost_and_memory_of_decoding_are_linear_in_pixels():
    unet = UViT("XS", 4, time_cond=False, depth=2).eval().to(memory_format=torch.channels_last)
    flop, memory = [], []
    with torch.no_grad():
        for size in (128, 256, 512):  # 16, 32 and 64 tokens a side: one block of attention, then many
            x, z = torch.randn(1, 3, size, size), torch.randn(1, 4, size // 8, size // 8)
            with FlopCounterMode(display=False) as counter:
                unet(x, z)
            flop.append(counter.get_total_flops())
            memory.append(bench.peak_memory(lambda x=x, z=z: unet(x, z), torch.device("cpu")))
    assert 3.5 < flop[1] / flop[0] < 4.3 and 3.5 < flop[2] / flop[1] < 4.3
    assert 3.5 < memory[2] / memory[1] < 4.3
    block = 4 * 64 * 512 * 512  # bytes of one map at full resolution in the widest layer
    assert memory[2] < 16 * block


# ---------------------------------------------------------------------------------------------------------------------
# model.py: the autoencoder
# Every configuration builds, trains and decodes; every parameter matters; any size; clear refusals.

def test_a_constant_latent_decodes_to_a_constant():
    """Why a deep latent is hard to decode: but for the image's borders, nothing tells the decoder where in a patch of
    the latent a pixel lies. It needs noise, or differences between neighbouring latents."""
    torch.manual_seed(0)
    decoder = randomise(UViT("XS", z_dim=32, time_cond=False, depth=1, window=3)).eval()
    z, x = torch.randn(1, 32, 1, 1).expand(1, 32, 10, 10), torch.zeros(1, 3, 320, 320)
    with torch.no_grad():
        image, inside = decoder(x, z), (..., slice(144, 176), slice(144, 176))
        assert image.std() > 0.01 and image[inside].std((2, 3)).max() < 1e-5 * image.std()
        for different in decoder(x + torch.randn(x.shape), z), decoder(x, z + torch.randn(1, 32, 10, 10)):
            assert different[inside].std((2, 3)).min() > 1e-2 * image.std()


@pytest.mark.parametrize("enc", ["vq_f8c4", "vq_f16c16", "dc_f8c4", "dc_f16c16", "dc_f32c32", "dc_f32c64",
                                 "dc_f64c128", "dc_f64c256", "dc_f128c512", "dc_f128c1024"])
def test_every_latent_configuration_builds_and_trains(enc):
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
def test_every_parameter_gets_a_gradient_and_matters_at_every_call(loss):
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


def test_shapes_are_checked():
    model = DCSSDAE("dc_f16c4", "XS", "fm", enc_width=0.0625, depth=1)
    with pytest.raises(ValueError, match="multiples of 16"):
        model.encode(torch.zeros(1, 3, 24, 32))
    with pytest.raises(ValueError, match="multiples of 8"):
        model.decoder(torch.zeros(1, 3, 20, 20), torch.zeros(1, 4, 2, 2), torch.zeros(1))
    with pytest.raises(ValueError, match="needs t"):
        model.decoder(torch.zeros(1, 3, 32, 32), torch.zeros(1, 4, 2, 2))
    for bad in ({"dec": "XXS"}, {"loss": "gan"}, {"window": 4}, {"enc_width": 0.3}):
        with pytest.raises(ValueError):
            DCSSDAE(**{"enc": "dc_f16c4", "dec": "XS", **bad})


@pytest.mark.parametrize("loss", ["fm", "eqm"])
@pytest.mark.parametrize("c", ["linear", "piecewise"])
def test_input_skip_is_the_field_at_the_noise_end(loss, c):
    """With skip and a network that outputs the image (up to scale), one step from pure noise returns the image."""
    model = DCSSDAE("dc_f16c4", "XS", loss, enc_width=0.0625, depth=1, c=c, lam=2.0, input_skip=True).eval()
    nn.init.zeros_(model.decoder.conv_out.weight)
    nn.init.constant_(model.decoder.conv_out.bias, 0.5 if loss == "fm" else -0.5 * model.field_at_noise)
    assert torch.allclose(model.decode(torch.randn(2, 4, 2, 2)), torch.full((2, 3, 32, 32), 0.5), atol=1e-5)


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


def test_decode_is_reproducible_differentiable_and_says_what_it_takes():
    model = randomise(DCSSDAE("dc_f16c4", "XS", "eqm", enc_width=0.0625, depth=1)).eval()
    z = torch.randn(2, 4, 2, 3, requires_grad=True)
    a, b = (model.decode(z, steps=2, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert a.shape == (2, 3, 32, 48) and torch.equal(a, b)
    a.sum().backward()
    assert z.grad.abs().sum() > 0
    _x, nfe = model.sample(z, steps=6, method="nesterov", mu=0.3, eta=0.1, tol=1e9)
    assert nfe.tolist() == [1, 1]
    with pytest.raises(ValueError, match="t_shift"):
        model.decode(z, t_shift=1.0)
    with pytest.raises(ValueError, match="method"):
        model.decode(z, method="adam")
    fm = DCSSDAE("dc_f16c4", "XS", "fm", enc_width=0.0625, depth=1)
    with pytest.raises(ValueError, match="takes the sampler options method, t_shift"):
        fm.decode(z, eta=0.1)
    with pytest.raises(ValueError, match="unknown sampling method 'gd' of flow matching: expected euler"):
        fm.decode(z, method="gd")
    assert torch.equal(fm.decode(z, 2, a, method="euler"), fm.decode(z, 2, a))
    half = model.bfloat16()  # weights and maps; the image is summed up in float32
    assert half.decode(z[:1, :, :1, :1].detach().bfloat16(), steps=2).dtype == torch.float32


@pytest.mark.parametrize("lam", [1.0, 4.0])
def test_energy_of_a_perfect_linear_field(lam):
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


def test_energy_does_not_depend_on_the_batch_and_says_what_it_takes():
    model = randomise(DCSSDAE("dc_f16c4", "XS", "eqm", enc_width=0.0625, depth=1)).eval()
    x, z = torch.randn(3, 3, 32, 48), torch.randn(3, 4, 2, 3)
    with torch.no_grad():
        together = model.energy(x, z)
        for i in range(3):
            torch.testing.assert_close(model.energy(x[i:i + 1], z[i:i + 1]), together[i:i + 1], rtol=1e-4, atol=0)
    assert len(set(together.tolist())) == 3
    for bad in (x[:2], x[..., :32], x[:, :1], x[0], x.long()):
        with pytest.raises(ValueError, match="images for these latents"):
            model.energy(bad, z)
    for bad in (z[:, :2], z[0], z.long()):
        with pytest.raises(ValueError, match="latents of this model"):
            model.energy(x, bad)
    with pytest.raises(ValueError, match="no energy"):
        DCSSDAE("dc_f16c4", "XS", "fm", enc_width=0.0625, depth=1).energy(x, z)
    assert model.bfloat16().energy(x.bfloat16(), z.bfloat16()).dtype == torch.float32


def test_integer_images_and_latents_of_another_shape_are_refused():
    model = DCSSDAE("dc_f16c4", "XS", "eqm", enc_width=0.0625, depth=1)
    for call, words in ((lambda: model.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), "127.5"),
                        (lambda: model.decode(torch.zeros(1, 5, 2, 2)), "latents of this model"),
                        (lambda: model.decode(torch.zeros(1, 4, 2, 2), noise=torch.zeros(1, 3, 8, 8)), "noise for"),
                        (lambda: model.decode(torch.zeros(1, 4, 2, 2), method="gd", mu=0.3), "no momentum")):
        with pytest.raises(ValueError, match=words):
            call()
    noise = torch.randn(1, 3, 32, 32)
    z = torch.randn(1, 4, 2, 2)
    assert torch.equal(model.decode(z, 2, noise, mu=0.0), model.decode(z, 2, noise))


@pytest.mark.parametrize("size", [(1, 1), (5, 130), (64, 64), (33, 47)])
def test_any_size_by_reflection(size):
    x = torch.rand(1, 3, *size)
    padded = pad_to_multiple(x, 32)
    assert padded.shape[2] % 32 == 0 and padded.shape[3] % 32 == 0 and torch.equal(padded[..., :size[0], :size[1]], x)
    if min(size) > 32:  # within one reflection it is torch's
        pad = (0, padded.shape[3] - size[1], 0, padded.shape[2] - size[0])
        assert torch.equal(padded, F.pad(x, pad, mode="reflect"))
    model = DCSSDAE("dc_f32c8", "XS", "eqm", enc_width=0.125, depth=1).eval()
    with torch.no_grad():
        assert model.reconstruct(x, steps=2).shape == x.shape


# ---------------------------------------------------------------------------------------------------------------------
# model.py: weight files
# What is saved loads again bit by bit, published files load, and others are refused in one sentence.

@pytest.mark.parametrize("enc,loss", [("dc_f16c4", "fm"), ("vq_f8c4", "eqm")])
def test_save_and_load_round_trip(tmp_path, enc, loss):
    options = {"norm": False} if enc.startswith("dc") else {}
    width = 0.0625 if enc.startswith("dc") else 0.25
    model = randomise(DCSSDAE(enc, "XS", loss, enc_width=width, enc_options=options, depth=1, c="trunc", lam=4.0,
                              input_skip=True, notes={"size": 64})).eval()
    model.save(tmp_path / "m.safetensors")
    loaded = DCSSDAE.load(tmp_path / "m.safetensors")
    assert loaded.config == model.config and not loaded.training and os.listdir(tmp_path) == ["m.safetensors"]
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    x, noise = torch.rand(1, 3, 32, 32), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        a, b = (m.decode(m.encode(x).mode(), 2, noise) for m in (loaded, model))
    assert torch.equal(a, b)
    other = DCSSDAE(enc, "XS", loss, enc_width=width, depth=1)
    # --enc_ckpt takes our own files; the variant without norms is built
    other.load_published(tmp_path / "m.safetensors", part="encoder")
    assert torch.equal(other.encode(x).mean, model.encode(x).mean)


@pytest.mark.parametrize("part", ["decoder", "all"])
@torch.no_grad()
def test_a_decoder_is_taken_over_with_the_field_that_it_was_trained_as(tmp_path, part):
    stored = {"mean": [0.0] * 4, "std": [1.0] * 4}
    model = DCSSDAE("dc_f8c4", "XS", "eqm", 0.0625, depth=1, c="trunc", a=0.6, lam=4.0, input_skip=True, latents=stored)
    randomise(model).eval().save(tmp_path / "m.safetensors")
    other = DCSSDAE("dc_f8c4", "XS", "eqm", 0.0625, depth=1, latents={"mean": [1.0] * 4, "std": [2.0] * 4}).eval()
    other.load_published(tmp_path / "m.safetensors", part=part)
    z, noise = torch.randn(1, 4, 4, 4), torch.randn(1, 3, 32, 32)
    assert torch.equal(other.decode(z, 3, noise), model.decode(z, 3, noise))
    assert other.config["latents"] == (stored if part == "all" else {"mean": [1.0] * 4, "std": [2.0] * 4})
    other.load_published(tmp_path / "m.safetensors", part="encoder")
    assert other.config["latents"] == stored
    with pytest.raises(ValueError, match="linear_encoder=True"):  # a file would not tell it
        DCSSDAE("dc_f8c4", "XS", enc_width=0.0625, enc_options={"linear": True})


def test_damaged_and_foreign_weight_files(tmp_path):
    model = DCSSDAE("dc_f16c4", "XS", "eqm", enc_width=0.0625, depth=1)
    model.save(tmp_path / "m.safetensors")
    whole = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "junk.pt").write_bytes(b"this is not a checkpoint")
    marker = tmp_path / "executed"

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(marker),)
    torch.save({"state_dict": Malicious()}, tmp_path / "evil.pt")
    torch.save({"w": torch.zeros(1)}, tmp_path / "other.pt")
    for name, words in (("cut.safetensors", "not a readable"), ("junk.pt", "junk.pt"),
                        ("evil.pt", "refused.*convert it once.*'state_dict'"), ("none.pt", "no weight file")):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            read_weights(tmp_path / name)
    assert not marker.exists()
    with pytest.raises(ValueError, match="no DC-SSDAE configuration"):
        DCSSDAE.load(tmp_path / "other.pt")
    with pytest.raises(ValueError, match="does not fit this model.*of another shape"):
        DCSSDAE("dc_f16c8", "XS", "eqm", enc_width=0.0625, depth=1).load_published(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="missing.*time"):
        DCSSDAE("dc_f16c4", "XS", "fm", enc_width=0.0625, depth=1).load_published(tmp_path / "m.safetensors")


@pytest.mark.parametrize("change", [{"depth": 1.5}, {"depth": 10**9}, {"enc_width": 1e29}, {"unknown": 1}, {"dec": [1]},
                                    {"enc": "dc_f16c99999999"}, {"without": 3}, {"lam": None}, {"depth": 300},
                                    {"latents": {"mean": [0], "std": [0]}}, {"enc_options": {"kind": "dc"}}, [],
                                    "text"])
def test_configurations_that_no_model_has(tmp_path, change):
    model = DCSSDAE("dc_f16c4", "XS", "eqm", enc_width=0.0625, depth=1)
    config = model.config | change if isinstance(change, dict) else change
    meta = {"format": "4", "config": json.dumps(config)}
    save_file(model.state_dict(), tmp_path / "m.safetensors", metadata=meta)
    start = time.process_time()  # others share the machine: count our own time only
    with pytest.raises(ValueError, match="m.safetensors") as stop:
        DCSSDAE.load(tmp_path / "m.safetensors")
    assert "\n" not in str(stop.value) and time.process_time() - start < 7


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = DCSSDAE("dc_f16c4", "XS", "eqm", enc_width=0.0625, depth=1)
    model.decoder.conv_in.weight.data[0] = math.nan
    model.save(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="not finite in 1 tensors"):
        DCSSDAE.load(tmp_path / "m.safetensors")


def test_a_vq_encoder_without_quant_conv_under_prefixes(tmp_path):
    model = randomise(DCSSDAE("vq_f8c16", "XS", enc_width=0.25, depth=1, enc_options={"quant": False})).eval()
    x = torch.rand(1, 3, 32, 32)
    for prefix in ("first_stage_model.", "vae."):
        state = {f"{prefix}{k}": v for k, v in model.state_dict().items() if k.startswith("encoder.")}
        torch.save({"state_dict": {"model": state}}, tmp_path / "vae.pt")
        other = DCSSDAE("vq_f8c16", "XS", enc_width=0.25, depth=1)
        other.load_published(tmp_path / "vae.pt", part="encoder")
        assert torch.equal(other.encode(x).mean, model.encode(x).mean)


def test_a_whole_published_file_needs_no_configuration(tmp_path):
    model = randomise(DCSSDAE("dc_f16c8", "XS", "fm", enc_width=0.125, enc_options={"norm": False})).eval()
    torch.save(model.state_dict(), tmp_path / "published.pt")  # names as ours: as good a layout as any
    loaded = DCSSDAE.load(tmp_path / "published.pt")
    assert {k: loaded.config[k] for k in ("enc", "enc_width", "dec", "loss", "depth")} == {
        "enc": "dc_f16c8", "enc_width": 0.125, "dec": "XS", "loss": "fm", "depth": None}
    x, noise = torch.rand(1, 3, 32, 32), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(*(m.decode(m.encode(x).mode(), 2, noise) for m in (loaded, model)))


def test_a_forks_modules_keep_their_names(tmp_path, monkeypatch):
    """Our own files are read as they are, though a module may be called as one of a published file."""
    class Fork(nn.Module):
        def __init__(self, downscale, z_dim, width):
            super().__init__()
            self.downscale, self.z_dim = downscale, z_dim
            self.stem, self.head = nn.Conv2d(3, 8, 16, 16), nn.Conv2d(8, 2 * z_dim, 1)
            self.to_q = nn.Linear(8, 8)

        def forward(self, x):
            mean, logvar = self.head(self.stem(x)).chunk(2, 1)
            return DiagonalGaussian(mean, logvar)

    monkeypatch.setitem(encoder_module.FAMILIES, "fork2", Fork)
    monkeypatch.setitem(encoder_module.OPTIONS, "fork2", ())
    model = DCSSDAE("fork2_f16c4", "XS", depth=1).eval()
    model.save(tmp_path / "m.safetensors")
    loaded, x = DCSSDAE.load(tmp_path / "m.safetensors"), torch.rand(1, 3, 32, 32)
    assert torch.equal(loaded.encode(x).mean, model.encode(x).mean)
    with pytest.raises(ValueError, match="cannot start as the linear code"):
        DCSSDAE("fork2_f16c4", "XS", depth=1, linear_encoder=True)


def test_our_names_stay_as_they_are():
    for enc in ("vq_f8c4", "dc_f32c32", "dcae_f64c128", "dcae_f32c32_sana"):
        for loss in ("fm", "eqm"):
            with torch.device("meta"):
                state = DCSSDAE(enc, "XS", loss).state_dict()
            assert list(our_names(state)) == list(state)


def test_refusals_name_what_the_file_holds(tmp_path):
    with torch.device("meta"):
        files = {"m": DCSSDAE("vq_f8c4", "M", "fm", enc_width=0.25),
                 "dc": DCSSDAE("dc_f32c32", "XS", "eqm", enc_width=0.25)}
    for name, model in files.items():
        state = {k: torch.zeros((), dtype=v.dtype).expand(v.shape) for k, v in model.state_dict().items()}
        torch.save(state, tmp_path / f"{name}.pt")
    model = DCSSDAE("vq_f8c4", "XS", "fm", enc_width=0.25)
    for part, file, words in (("decoder", "m", "holds.* a decoder of size M .*expected was a decoder of size XS"),
                              ("decoder", "dc", r"\(eqm, latents of 32 channels\).*\(fm, latents of 4 channels\)"),
                              ("encoder", "dc", r"an encoder dc_f32c32 \(width 0.25\), expected was an encoder vq_")):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(ValueError, match=words):
            model.load_published(tmp_path / f"{file}.pt", part=part)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # nothing has changed


def test_files_of_format_1_load(tmp_path):
    """Format 1 called the dc encoder's first and last convolution stem and head."""
    model = randomise(DCSSDAE("dc_f16c4", "XS", "eqm", enc_width=0.0625, depth=1)).eval()
    old = {k.replace("encoder.conv_in.", "encoder.stem.").replace("encoder.conv_out.", "encoder.head."): v
           for k, v in model.state_dict().items()}
    config = {k: v for k, v in model.config.items() if k != "joint_input"}
    save_file(old, tmp_path / "old.safetensors", metadata={"format": "1", "config": json.dumps(config)})
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(DCSSDAE.load(tmp_path / "old.safetensors").encode(x).mean, model.encode(x).mean)
    save_file(old, tmp_path / "new.safetensors", metadata={"format": "99", "config": json.dumps(config)})
    with pytest.raises(ValueError, match="format 99, newer"):
        DCSSDAE.load(tmp_path / "new.safetensors")


def test_files_from_the_hub(tmp_path, monkeypatch):
    """hf:// addresses go through huggingface_hub, here with a stand-in for its download."""
    hub = pytest.importorskip("huggingface_hub")
    model = randomise(DCSSDAE("dc_f16c4", "XS", "eqm", enc_width=0.0625, depth=1)).eval()
    model.save(tmp_path / "m.safetensors")
    asked = []

    def download(repo, filename):
        asked.append((repo, filename))
        if repo != "owner/repo":
            raise ConnectionError("no network")
        return str(tmp_path / "m.safetensors")
    monkeypatch.setattr(hub, "hf_hub_download", download)
    loaded = DCSSDAE.load("hf://owner/repo/folder/m.safetensors")
    assert torch.equal(loaded.decoder.conv_in.weight, model.decoder.conv_in.weight)
    assert asked == [("owner/repo", "folder/m.safetensors")]
    with pytest.raises(FileNotFoundError, match="model.safetensors.*huggingface.co/mit-han-lab/dc.*give its path"):
        local_file("hf://mit-han-lab/dc/model.safetensors")
    with pytest.raises(ValueError, match="hf://owner/repo/file"):
        local_file("hf://owner/repo")
    assert local_file("some/file.pt") == "some/file.pt" and local_file(None) is None


def test_runs_to_the_hub_and_back(tmp_path, monkeypatch, capsys):
    """tools.hub, with a folder in the place of the hub: models, log, numbers, pictures travel, checkpoints do not."""
    hub = pytest.importorskip("huggingface_hub")
    store, run_folder = tmp_path / "store", tmp_path / "run"
    travels = {"model.safetensors", "log.jsonl", "metrics.json", "reconstructions.png"}
    run_folder.mkdir()
    for name in (*travels, "latest.pt", "features.npz"):
        (run_folder / name).write_text(name)

    def copy(source, target, allow_patterns):
        for path in Path(source).iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                Path(target).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)

    def create(name, exist_ok):
        (store / name).mkdir(parents=True, exist_ok=exist_ok)
    monkeypatch.setattr(hub, "create_repo", create)
    monkeypatch.setattr(hub, "upload_folder", lambda folder_path, repo_id, allow_patterns: copy(
        folder_path, store / repo_id, allow_patterns))
    monkeypatch.setattr(hub, "snapshot_download", lambda repo, local_dir, allow_patterns: copy(
        store / repo, local_dir, allow_patterns))
    run_main(hub_tool, monkeypatch, "upload", run_folder, "owner/name")
    run_main(hub_tool, monkeypatch, "download", "owner/name", tmp_path / "back")
    assert set(os.listdir(tmp_path / "back")) == travels == set(os.listdir(store / "owner" / "name"))
    assert "uploaded" in capsys.readouterr().out
    assert "holds no model.safetensors" in sentence(hub_tool, monkeypatch, "upload", tmp_path / "none", "owner/name")
    message = sentence(hub_tool, monkeypatch, "download", "owner/other", tmp_path / "back")
    assert message.startswith("error: download failed (FileNotFoundError")


def test_an_address_of_the_hub_is_no_folder():
    assert distill.get_args(["--ckpt", "hf://owner/repo/m.safetensors"]).out == os.path.join("runs", "repo_distilled")
    assert folder_beside("hf://owner/repo/m.safetensors") == "." == folder_beside("m.safetensors")
    assert folder_beside("runs/a/m.safetensors") == "runs/a"


def test_addresses_are_no_folders_to_write_into(monkeypatch, checkpoint):
    for module, flags in ((train, []), (distill, ["--ckpt", checkpoint]), (evaluate, ["--ckpt", checkpoint]),
                          (latents, ["--ckpt", checkpoint]), (field, ["--ckpt", checkpoint])):
        address = ["--device", "cpu", "--out", "hf://owner/repo"]
        if module is train:
            with pytest.raises(ValueError, match="hf://owner/repo is an address"):
                run_main(module, monkeypatch, *flags, *address)
        else:
            assert "hf://owner/repo is an address" in sentence(module, monkeypatch, *flags, *address)
    assert not os.path.exists("hf:")


# ---------------------------------------------------------------------------------------------------------------------
# losses.py: the objectives
# Flow matching, equilibrium matching and the GAN's terms in closed form.

def test_fm_closed_forms():
    x, e = torch.randn(5, 3, 8, 8), torch.randn(5, 3, 8, 8)
    t = torch.tensor([0.0, 0.25, 0.5, 0.8, 1.0])
    x_t = losses.fm_mix(x, e, t)
    assert torch.equal(x_t[0], x[0]) and torch.equal(x_t[4], e[4])  # t=0 is data, t=1 noise
    assert torch.allclose(losses.fm_predict_x(x_t, x - e, t), x, atol=1e-6)
    assert losses.fm_loss(x - e, x, e) == 0
    assert losses.fm_loss(x - e + 0.5, x, e) == pytest.approx(0.25, rel=1e-5)


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
    assert losses.eqm_loss(target, x, e, g, eqm) == 0
    if c == "linear" and lam == 1:
        assert torch.allclose(target, x_g - x, atol=1e-6)  # the field is the displacement


def test_eqm_refuses_bad_values():
    for bad in ({"c": "cubic"}, {"a": 1.0}, {"lam": 0.0}):
        with pytest.raises(ValueError):
            EqM(**bad)


def test_losses_do_not_broadcast():
    x, wrong = torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    for call in (lambda: losses.fm_loss(wrong, x, x), lambda: losses.eqm_loss(x, wrong, x, torch.zeros(2), EqM()),
                 lambda: losses.eqm_loss(x, x, x, torch.zeros(1), EqM())):
        with pytest.raises(ValueError, match="shape"):
            call()


def test_levels_and_sampler_options_are_checked():
    x, t = torch.zeros(2, 3, 8, 8), torch.zeros(2)
    eqm = EqM("trunc")
    for call in (losses.fm_mix, losses.fm_predict_x, None):
        for first, second, level in ((x, x[:1], t), (x, x, t[:1]), (x, x, t[0]), (x[0], x[0], t), (x, x, t.long())):
            for function in [call] if call else [lambda a, b, s: eqm.mix(a, b, s), lambda a, b, s: eqm.target(a, b, s),
                                                 lambda a, b, s: eqm.predict_x(a, b, s)]:
                with pytest.raises(ValueError, match="shape|floating-point"):
                    function(first, second, level)
    with pytest.raises(ValueError, match="floating-point"):
        losses.fm_loss(x.byte(), x.byte(), x.byte())
    for t_shift in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="t_shift"):
            sampler.euler(lambda x, z, t: x, x, None, 2, t_shift)


def test_patch_gan_and_hinge_loss():
    torch.manual_seed(0)
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


# ---------------------------------------------------------------------------------------------------------------------
# losses.py: losses in the features of networks, image metrics
# LPIPS, REPA and SSIM against their packages (networks with random weights), PSNR and HF ratio in closed form.

@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_lpips_against_the_lpips_package(tmp_path, vgg_file, net, monkeypatch):
    torchvision = data.import_torchvision()
    peer = pytest.importorskip("lpips")
    torch.manual_seed(0)
    path = vgg_file
    if net == "alex":
        path = tmp_path / "alex.pth"
        torch.save(torchvision.models.alexnet(weights=None).state_dict(), path)
    ours = losses.LPIPSLoss(net, weights=path)
    for name in ("kaiming_uniform_", "kaiming_normal_", "normal_"):  # seconds for values that are replaced below
        monkeypatch.setattr(nn.init, name, lambda weight, *args, **kwargs: weight)
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
    with pytest.raises(losses.WeightsUnavailable, match="vgg16-397923af.pth.*--lpips_weights FILE.*--w_lpips 0"):
        losses.LPIPSLoss("vgg")
    with pytest.raises(losses.WeightsUnavailable, match="missing.pth"):
        losses.LPIPSLoss("vgg", weights=tmp_path / "missing.pth")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    with pytest.raises(ValueError, match="junk.pth"):
        losses.LPIPSLoss("vgg", weights=tmp_path / "junk.pth")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not hold torchvision's vgg16"):
        losses.LPIPSLoss("vgg", weights=tmp_path / "other.pth")
    with pytest.raises(losses.WeightsUnavailable, match="--repa_weights FILE.*--w_repa 0"):
        losses.REPALoss(96, weights=tmp_path / "missing.pth")


def test_damaged_networks_of_the_losses_are_refused(tmp_path, monkeypatch):
    features = data.import_torchvision().models.alexnet(weights=None).features.state_dict()
    state, first = {f"features.{name}": value for name, value in features.items()}, "features.0.weight"
    broken = state[first] * math.nan
    for change in (state | {first: broken}, [1, 2], state | {first: "text"}, state | {5: state[first]}):
        torch.save(change, tmp_path / "alex.pth")
        with pytest.raises(ValueError, match="alex.pth"):
            losses.LPIPSLoss("alex", tmp_path / "alex.pth")
    torch.save({key: value.double() for key, value in state.items()}, tmp_path / "alex.pth")
    x = torch.zeros(1, 3, 32, 32)
    assert losses.LPIPSLoss("alex", tmp_path / "alex.pth")(x, x) == 0
    broken = nn.Linear(2, 2)
    broken.bias.data[0] = math.nan
    monkeypatch.setattr(pytest.importorskip("timm"), "create_model", lambda *args, **kwargs: broken)
    with pytest.raises(ValueError, match="alex.pth holds weights that are not finite"):
        losses.REPALoss(96, tmp_path / "alex.pth")


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
    repa.train()
    assert not repa.dino.training and repa.mlp.state_dict().keys() == exact.state_dict().keys()
    # The square 518 px input it was made for: the same tokens as timm's model
    import timm
    dino = fid.empty_network(timm, "vit_base_patch14_dinov2.lvd142m", num_classes=0).eval()
    dino.load_state_dict(torch.load(dino_file, weights_only=True), assign=True)
    repa.largest = 296
    with torch.no_grad():
        image = torch.rand(1, 3, 296, 296) * 2 - 1
        resized = F.interpolate((image + 1) / 2, size=(518, 518), mode="bicubic", antialias=True)
        mean, std = (torch.tensor(dino.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
        assert relative_error(repa.target(image), dino.forward_features((resized - mean) / std)[:, 1:]) < 1e-4


def test_to8bit_and_psnr():
    x = torch.tensor([-3.0, -1, -0.999, 0.0, 0.5, 1, 7])
    levels = (losses.to8bit(x) + 1) * 127.5
    torch.testing.assert_close(levels, torch.tensor([0.0, 0, 0, 128, 191, 255, 255]), rtol=0, atol=1e-4)
    assert torch.equal(losses.to8bit(losses.to8bit(x)), losses.to8bit(x))
    one_level = torch.tensor((2 / 255) ** 2)
    assert float(losses.psnr(one_level)) == pytest.approx(20 * math.log10(255), abs=1e-5)  # 48.13 dB
    assert float(losses.psnr(torch.tensor(0.0))) == pytest.approx(100)


def test_ssim_equals_scikit_image():
    x = losses.to8bit(demo_batch())
    noise = 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    assert losses.ssim(x, x).tolist() == pytest.approx([1] * 3, abs=1e-6)
    for side in (1, 5, 8):  # smaller than the window
        assert bool(losses.ssim(x[..., :side], x[..., :side] * 0.5).isfinite().all())
    peer = pytest.importorskip("skimage.metrics")
    for y in (losses.to8bit(x + noise), losses.to8bit(F.avg_pool2d(x, 3, 1, 1)), -x, torch.ones_like(x)):
        for k, got in enumerate(losses.ssim(x, y)):
            a, b = (((t[k] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy() for t in (x, y))
            want = peer.structural_similarity(a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
                                              data_range=255, channel_axis=2)
            assert float(got) == pytest.approx(want, abs=1e-5)


def test_hf_ratio_sees_blur_and_noise():
    x = demo_batch()
    energy = losses.hf_energy(x)
    blurred = losses.hf_ratio(losses.hf_energy(F.avg_pool2d(x, 3, 1, 1)), energy)[0]
    noisy = losses.hf_ratio(losses.hf_energy(x + 0.3 * torch.randn_like(x)), energy)[0]
    assert losses.hf_ratio(energy, energy) == (pytest.approx(1), pytest.approx(0, abs=1e-6))
    assert blurred < 0.5 and noisy > 1.2
    assert losses.hf_ratio(losses.hf_energy(0.5 * x), energy)[0] == pytest.approx(0.25, rel=1e-4)  # an energy
    flat = losses.hf_energy(torch.full((2, 3, 16, 16), 0.3))
    assert losses.hf_ratio(flat, torch.zeros(2)) == (None, None)
    ramp = torch.linspace(-1, 1, 48).expand(1, 3, 48, 48)  # low frequencies only, though its borders do not match
    assert float(losses.hf_energy(ramp)) < 1e-3 * float(energy.mean())


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


def test_gradient_descent_lands_in_one_step_on_a_perfect_linear_field():
    x, e = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    for lam in (1.0, 4.0):
        out, nfe = sampler.gradient_descent(lambda y, z, lam=lam: lam * (y - z), e, x, steps=1, eta=1 / lam, lam=lam)
        assert torch.allclose(out, x, atol=1e-6) and nfe.tolist() == [1] * 4


def test_nesterov_without_momentum_is_gradient_descent():
    torch.manual_seed(0)
    e, A = torch.randn(3, 3, 4, 4), torch.rand(3, 4, 4)
    a = sampler.gradient_descent(lambda y, z: A * y, e, e, steps=7, eta=0.3)[0]
    b = sampler.nesterov(lambda y, z: A * y, e, e, steps=7, eta=0.3, mu=0.0)[0]
    assert torch.equal(a, b)


def test_nesterov_against_torch_sgd():
    """torch's SGD(nesterov=True) holds the look-ahead points y_k; ours returns x_{k+1} = y_k - eta f(y_k)."""
    torch.manual_seed(0)
    start, A, eta, mu = torch.randn(1, 3, 4, 4), torch.rand(3, 4, 4), 0.2, 0.7
    p = nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([p], lr=eta, momentum=mu, nesterov=True)
    for steps in range(1, 8):
        y = p.detach().clone()
        ours = sampler.nesterov(lambda y, z: A * y, start, start, steps=steps, eta=eta, mu=mu)[0]
        assert torch.allclose(ours, y - eta * A * y, atol=1e-6)
        p.grad = A * p.detach()
        optimizer.step()


def test_nesterov_accelerates_on_an_ill_conditioned_quadratic():
    curvature = torch.logspace(-3, 0, 48, dtype=torch.float64).view(1, 3, 4, 4)  # condition number 1000
    start = torch.ones_like(curvature)
    nfe = {mu: int(sampler.nesterov(lambda y, z: curvature * y, start, start, steps=20000, eta=1.0, mu=mu, tol=1e-6)[1])
           for mu in (0.0, 0.9)}
    assert nfe[0.9] < nfe[0.0] / 5, nfe


def test_adaptive_stop_drops_finished_samples_from_the_batch():
    torch.manual_seed(0)
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
                 lambda: sampler.nesterov(None, x, x, 1, mu=1.0), lambda: sampler.nesterov(None, x, x, 2.5)):
        with pytest.raises(ValueError):
            call()


# ---------------------------------------------------------------------------------------------------------------------
# train.py: runs
# What a run leaves behind; its phases, objectives and flags; the same steps by any processes and micro-batches.

def test_bf16_only_where_the_gpu_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    for capability, dtype in (((7, 5), None), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert train.pick_dtype("auto", torch.device("cuda")) is dtype
        assert train.pick_dtype("bf16", torch.device("cuda")) is torch.bfloat16


def test_train_leaves_model_log_picture_and_metrics(trained):
    files = {"model.safetensors", "latest.pt", "log.jsonl", "reconstructions.png", "metrics.json"}
    assert files <= set(os.listdir(trained))
    log = step_lines(trained)
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(line[k]) for line in log for k in ("loss", "kl", "lr", "grad_norm", "images_per_s"))
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["images"] == 4 and [row["steps"] for row in metrics["rows"]] == [0, 0, 1, 4]
    assert Image.open(trained / "reconstructions.png").size[1] > 4 * 32  # original, baseline, 1 step, 4 steps
    model = DCSSDAE.load(trained / "model.safetensors")
    assert model.config["notes"]["size"] == 32
    averaged, raw = model.state_dict(), torch.load(trained / "latest.pt", weights_only=True)["model"]
    name = "decoder.norm_z.running_var"
    assert not torch.equal(averaged[name], torch.ones_like(averaged[name]))
    assert not torch.equal(averaged[name], raw[name])  # EMA has buffers


@slow
def test_processes_and_micro_batches_do_not_change_the_run(tmp_path, smallest):
    common = [*TINY, "--steps", 4, "--loss", "fm"]
    in_two = aside(run, tmp_path / "o", *common, "--out", tmp_path / "two", world=2)
    command("train.py", *common, "--out", tmp_path / "one")
    command("train.py", *common, "--out", tmp_path / "micro", "--micro_batch", 3)
    in_two.result()
    one, two, micro = (step_lines(tmp_path / name) for name in ("one", "two", "micro"))
    for other in (two, micro):
        for a, b in zip(one, other, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
    weights = [torch.load(tmp_path / name / "latest.pt", weights_only=True)["model"]
               for name in ("one", "two", "micro")]
    one, two, micro = (torch.cat([v.flatten() for v in w.values() if v.is_floating_point()]) for w in weights)
    assert max(relative_error(two, one), relative_error(micro, one)) < 3e-5  # Adam enlarges tiny gradients' rounding


@slow
def test_the_plain_command_runs_offline_under_torchrun(tmp_path, offline):
    """No --data, no networks: the built-in images, the missing terms named and recorded.
    (Full width is the README's command.)"""
    plain = aside(cli, "train.py", "--enc", "dc_f32c32", "--loss", "eqm", "--steps", 1, "--batch_size", 2, "--size", 32,
                  "--enc_width", 0.125, "--dec", "XS", "--eval_images", 2, "--out", tmp_path / "run", "--device", "cpu",
                  nproc=2)
    images = tmp_path / "images"
    images.mkdir()
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(images / "a.png")
    output = command("train.py", "--data", images, "--size", 32, "--enc_width", 0.125, "--dec", "XS",
                     "--out", tmp_path / "real", "--device", "cpu", ok=False)
    # on real data an objective never changes silently
    assert "vgg16-397923af.pth" in output and "--w_lpips 0" in output
    output = plain.result()
    assert "training WITHOUT LPIPS" in output and "training WITHOUT REPA" in output
    notes = DCSSDAE.load(tmp_path / "run" / "model.safetensors").config["notes"]
    assert set(notes["left_out"]) == {"lpips", "repa"} and notes["w_lpips"] == 0


@slow
def test_training_with_lpips_and_repa(tmp_path, vgg_file, dino_file, smallest):
    common = [*TINY, "--w_lpips", 0.5, "--lpips_weights", vgg_file, "--w_repa", 0.25,
              "--repa_weights", dino_file, "--decay", 0]
    command("train.py", *common, "--steps", 2, "--out", tmp_path / "whole")
    command("train.py", *common, "--steps", 1, "--out", tmp_path / "parts")
    command("train.py", *common, "--steps", 2, "--out", tmp_path / "parts", "--resume")
    assert same_weights(tmp_path / "whole", tmp_path / "parts")  # REPA's MLP and its optimiser state too
    log = lines_of(tmp_path / "whole" / "log.jsonl")[0]
    total = log["eqm"] + 0.5 * log["lpips"] + 0.25 * log["repa"] + 1e-6 * log["kl"]
    assert log["loss"] == pytest.approx(total, rel=1e-5)


# What an evaluation of two images and one number of steps takes.
MEASURED = [*TINY, "--eval_images", 2, "--eval_steps", 1, "--eval_every", 1]


def test_evaluations_measure_lpips_and_rfid_as_evaluate_does(tmp_path, vgg_file, inception_file, monkeypatch, smallest):
    forward = fid.InceptionFeatures.forward
    monkeypatch.setattr(fid.InceptionFeatures, "dim", 64)  # of 2048, whose eigenvalues take seconds
    monkeypatch.setattr(fid.InceptionFeatures, "forward", lambda self, x: forward(self, x)[:, :64])
    files = ["--lpips_weights", vgg_file, "--inception", inception_file]
    text = command("train.py", *MEASURED, *files, "--steps", 1, "--eval_metrics", "lpips", "rfid", "--out",
                   tmp_path / "r")
    assert "LPIPS vgg" in text and "rFID (biased, N=2)" in text
    command("evaluate.py", "--ckpt", tmp_path / "r" / "model.safetensors", *files, "--limit", 2, "--cache", "",
            "--device", "cpu", "--workers", 0, "--out", tmp_path / "e")
    ours, theirs = (json.loads((tmp_path / name / "metrics.json").read_text())["rows"] for name in "re")
    assert lines_of(tmp_path / "r" / "log.jsonl")[-1]["eval"] == ours
    for a, b in zip(ours, theirs, strict=True):
        for key in ("psnr", "lpips_vgg", "lpips_vgg_se", "rfid"):
            assert math.isfinite(a[key]) and a[key] == pytest.approx(b[key], rel=1e-3), (a["name"], key)
        assert a["lpips_vgg"] > 0 and a["rfid"] > 0


@slow
def test_eval_metrics_change_no_step_and_read_the_originals_once(tmp_path, vgg_file, monkeypatch, smallest):
    """Also given on --resume alone; and in two processes the same numbers."""
    seen = []
    forward = TinyInception.forward
    monkeypatch.setattr(TinyInception, "forward", lambda self, x: (seen.append(len(x)), forward(self, x))[1])
    monkeypatch.setattr(fid, "InceptionFeatures", TinyInception)
    metrics = ["--lpips_weights", vgg_file, "--eval_metrics", "lpips", "rfid"]
    in_two = aside(run, tmp_path / "o", *MEASURED, *metrics, "--eval_every", 0, "--steps", 3, "--out", tmp_path / "two",
                   world=2, env={"TINY_INCEPTION": "1"})
    command("train.py", *MEASURED, "--eval_every", 0, "--steps", 3, "--out", tmp_path / "plain")
    command("train.py", *MEASURED, "--steps", 1, "--out", tmp_path / "r")
    assert not seen
    text = command("train.py", *MEASURED, *metrics, "--steps", 3, "--resume", "--out", tmp_path / "r")
    assert "resuming with" in text and same_weights(tmp_path / "plain", tmp_path / "r")
    assert seen == [2] * (4 + 3)  # baseline, linear code, one step; and in the first of two evaluations the originals
    rows = [line["eval"][2] for line in lines_of(tmp_path / "r" / "log.jsonl") if "eval" in line]
    assert "rfid" not in rows[0] and all(row["rfid"] > 0 and row["lpips_vgg"] > 0 for row in rows[1:])
    in_two.result()
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text())["rows"] for name in ("r", "two"))
    for a, b in zip(one, two, strict=True):
        assert all(a[key] == pytest.approx(b[key], rel=1e-2) for key in ("psnr", "lpips_vgg", "rfid"))


def test_an_image_that_breaks_between_evaluations_does_not_end_the_run(monkeypatch):
    images = data.make_dataset("demo", 8, train=False, limit=2)
    run = types.SimpleNamespace(args=types.SimpleNamespace(seed=0, workers=0), rank=0, world=1, device="cpu",
                                networks=({}, {}), originals={"rfid": "of three images"})
    given = []

    def evaluate_two(*arguments, originals=None, **options):
        given.append(originals)
        if originals:
            raise ValueError("statistics of 3 originals for 2 images")
        return {"originals": {"rfid": "of two"}}

    monkeypatch.setattr(train, "evaluate", evaluate_two)
    train.measure(run, None, images, None, [1])
    assert given == [{"rfid": "of three images"}, None] and run.originals == {"rfid": "of two"}


def test_the_losses_lpips_serves_evaluations_too(tmp_path, checkpoint, vgg_file, monkeypatch):
    monkeypatch.setattr(fid, "InceptionFeatures", TinyInception)
    monkeypatch.setattr(fid, "LPIPSLoss", lambda **kwargs: pytest.fail("a second network"))
    command("distill.py", "--ckpt", checkpoint, "--steps", 2, "--batch_size", 2, "--teacher_steps", 2, "--eval_images",
            2, "--eval_every", 1, "--device", "cpu", "--dtype", "float32", "--workers", 0, "--w_lpips", 0.5,
            "--lpips_weights", vgg_file, "--eval_metrics", "lpips", "rfid", "--out", tmp_path)
    rows = [line["eval"] for line in lines_of(tmp_path / "log.jsonl") if "eval" in line]
    assert len(rows) == 2 and rows[1] == json.loads((tmp_path / "metrics.json").read_text())["rows"]
    assert all(row["rfid"] > 0 and row["lpips_vgg"] > 0 for each in rows for row in each)


def test_a_metric_that_cannot_be_had_stops_before_training(tmp_path, offline, vgg_file, monkeypatch, capsys):
    for flags, words in (
        (["rfid"], "--eval_metrics rfid: pt_inception-2015-12-05-6726825d.pth is neither in"),
        (["rfid", "--inception", tmp_path / "none.pth"], "none.pth"),
        (["rfid", "--inception", vgg_file], "does not hold FID's Inception-v3"),
        (["rfid", "--eval_images", 1], "at least 2 validation images"),
        (["lpips"], "vgg16-397923af.pth"),
        (["lpips", "rfid", "--lpips_weights", vgg_file, "--size", 8], "at least 16 px, got --size 8"),
    ):
        output = command("train.py", *MEASURED, "--out", tmp_path / "r", "--eval_metrics", *flags, ok=False)
        assert words in output.splitlines()[-1] and not os.path.exists(tmp_path / "r" / "log.jsonl")
    with pytest.raises(SystemExit):
        train.get_args(["--eval_metrics", "fid"])
    assert "invalid choice: 'fid'" in capsys.readouterr().err
    # What another process has not, this one does not use either.
    monkeypatch.setattr(fid, "gathered", lambda value, world: [value, "no file there"])
    args = train.get_args(["--eval_metrics", "lpips", "--lpips_weights", str(vgg_file)])
    with pytest.raises(ValueError, match="--eval_metrics lpips: no file there"):
        train.evaluation_networks(args, range(4), None, torch.device("cpu"), 2)


def test_evaluations_read_whole_batches_ahead(monkeypatch):
    monkeypatch.setattr(train, "VALIDATION_BATCH", 2)
    val, before = data.make_dataset("demo", 16, train=False, limit=7), set(multiprocessing.active_children())
    alone = train.validation_batches(val, train.get_args(["--workers", "0"]), 0, 1, "cpu")
    args = train.get_args(["--workers", "2"])
    loader = train.validation_batches(val, args, 0, 1, "cpu")
    assert [alone.num_workers, loader.num_workers] == [0, 2]
    assert train.validation_batches(val, train.get_args(["--workers", "9"]), 0, 1, "cpu").num_workers == 2
    assert train.validation_batches(val, args, 1, 2, "cpu").num_workers == 0  # one whole batch for each process
    assert same_batches(list(alone), list(loader))
    assert len(set(multiprocessing.active_children()) - before) == 2
    del loader
    assert set(multiprocessing.active_children()) == before


def test_frozen_encoder_from_a_checkpoint(trained, tmp_path):
    loss = DCSSDAE.load(trained / "model.safetensors").config["loss"]
    command("train.py", *TINY, "--loss", loss, "--steps", 2, "--enc_ckpt", trained / "model.safetensors",
            "--freeze_enc", "--out", tmp_path / "run")
    before, after = (DCSSDAE.load(folder / "model.safetensors") for folder in (trained, tmp_path / "run"))
    assert all(torch.equal(a, b) for a, b in zip(before.encoder.parameters(), after.encoder.parameters()))
    assert not torch.equal(before.decoder.conv_in.weight, after.decoder.conv_in.weight)
    assert after.config["linear_encoder"] and after.config["linear_decoder"] == 128
    _, linear, one, *_ = json.loads((tmp_path / "run" / "metrics.json").read_text())["rows"]
    assert one["psnr"] > linear["psnr"] - 0.3  # hardly trained: this is the least-squares fit


def test_ablations_from_the_command_line(tmp_path):
    command("train.py", *TINY, "--steps", 2, "--without", "norm_z", "context", "--window", 5, "--out", tmp_path / "run")
    model = DCSSDAE.load(tmp_path / "run" / "model.safetensors")
    decoder, torch_z = randomise(model.decoder), torch.randn(2, model.encoder.z_dim, 4, 4)
    assert isinstance(decoder.norm_z, nn.Identity) and decoder.context is None
    assert decoder.blocks[0].attn.bias_table.shape[:2] == (5, 5)
    one, other = (decoder.condition(z, 32, 32) for z in (torch_z, -torch_z))
    assert not torch.equal(one.input_map, other.input_map)  # the latent still enters beside the image
    assert torch.equal(one.adagn, other.adagn) and torch.equal(one.adaln, other.adaln)  # scales and shifts
    with pytest.raises(ValueError, match="norm_z and context"):
        UViT("XS", 4, without=["attention"])


@pytest.mark.parametrize("flags,words", [
    (["--data", "/nowhere/at/all"], "/nowhere/at/all"),
    (["--size", 100], "--size 100 is not a multiple"),
    (["--enc", "dc_f32"], "unknown encoder 'dc_f32'"),
    (["--freeze_enc"], "--enc_ckpt"),
    (["--enc_ckpt", "missing.safetensors"], "missing.safetensors"),
    (["--w_lpips", 1, "--lpips_weights", "missing.pth"], "missing.pth"),
    (["--resume"], "no checkpoint"),
    (["--batch_size", 0], "--batch_size 0"),
    (["--g_power", 0], "--g_power"),
    (["--window", 8], "must be odd"),
    (["--lr", 1e30, "--grad_clip", 1e30, "--warmup", 0, "--steps", 40], "not finite"),
])
def test_bad_input_to_train(tmp_path, flags, words, smallest):
    output = command("train.py", *TINY, "--out", tmp_path / "run", *flags, ok=False)
    assert words in output.strip().splitlines()[-1]


def test_grad_clip_0_is_no_limit():
    layer = nn.Linear(3, 3)
    layer.weight.grad, layer.bias.grad = torch.full((3, 3), 100.0), torch.zeros(3)
    norm = train.clip_gradients(layer.parameters(), types.SimpleNamespace(grad_clip=0.0))
    assert norm == 300 and (layer.weight.grad == 100).all()
    train.clip_gradients(layer.parameters(), types.SimpleNamespace(grad_clip=3.0))
    assert torch.allclose(layer.weight.grad, torch.ones(3, 3))


def test_bad_files_and_folders(tmp_path):
    empty, images = tmp_path / "empty", tmp_path / "images"
    empty.mkdir(), images.mkdir()
    assert "no images" in command("train.py", *TINY, "--data", empty, "--out", tmp_path / "a", ok=False)
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(images / f"{i}.jpg")
    broken = (images / "2.jpg").read_bytes()
    (images / "2.jpg").write_bytes(broken[:len(broken) // 3])
    output = command("train.py", *TINY, "--steps", 3, "--data", images, "--eval_images", 5, "--out", tmp_path / "b")
    assert "2.jpg" in output and "1 unreadable images were replaced" in output
    output = command("evaluate.py", "--ckpt", tmp_path / "b" / "model.safetensors", "--data", images,
                     "--out", tmp_path / "e", "--device", "cpu", "--workers", 0)
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert metrics["images"] == 4 and metrics["skipped"] == 1 and "2.jpg" in output
    # another configuration's checkpoint, and a folder that already holds a run
    output = command("train.py", *TINY, "--enc", "dc_f8c4", "--enc_ckpt", tmp_path / "b" / "model.safetensors",
                     "--out", tmp_path / "c", ok=False)
    assert "does not fit" in output
    assert "already holds a run" in command("train.py", *TINY, "--out", tmp_path / "b", ok=False)
    output = command("train.py", *TINY, "--batch_size", 2, "--data", images, "--out", tmp_path / "b", "--resume",
                     ok=False)
    assert "--resume continues a run with --batch_size" in output
    finished = [*TINY, "--steps", 3, "--data", images, "--eval_images", 5, "--out", tmp_path / "b", "--resume"]
    assert "has done its 3 steps" in command("train.py", *finished, ok=False)
    assert "no weight file" in command("distill.py", "--ckpt", tmp_path / "missing.safetensors", ok=False)


@slow
def test_steps_do_not_depend_on_processes_or_micro_batches(tmp_path, smallest):
    """In float64, so that Adam has no differences of rounding to enlarge where gradients should be 0; with the GAN."""
    flags = [*SMALL, "--steps", 4, "--save_every", 4, "--w_gan", 0.1, "--gan_start", 2, "--eval_every", 0, "--lr", 3e-4,
             "--optimizer", "muon"]
    runs = []
    for name, more, world in (("one", [], 1), ("two", [], 2), ("micro", ["--micro_batch", 3], 1)):
        runs.append(aside(run, tmp_path / f"{name}_output", *flags, *more, "--out", tmp_path / name, world=world,
                          env={"FLOAT64": "1"}))
    for each in runs:
        each.result()
    one = load_checkpoint(tmp_path / "one")
    for name in ("two", "micro"):
        other = load_checkpoint(tmp_path / name)
        for part in ("model", "ema", "gan"):
            for k, v in one[part].items():
                assert (v - other[part][k]).abs().max() <= 1e-9 * (1 + v.abs().max()), (name, k)
        for a, b in zip(step_lines(tmp_path / "one"), step_lines(tmp_path / name), strict=True):
            assert all(b[k] == pytest.approx(a[k], rel=1e-9) for k in a.keys() - {"images_per_s", "peak_mib"})


def test_muons_step():
    """Against the singular value decomposition in float64, and torch's own Muon where there is one."""
    g = torch.Generator().manual_seed(0)
    for shape in ((3, 16, 16), (2, 24, 216), (2, 216, 24)):
        m = torch.randn(shape, generator=g, dtype=torch.float64)
        u, _, vh = torch.linalg.svd(m, full_matrices=False)
        inside = u.mT @ train.orthogonal(m) @ vh.mT  # diagonal, about 1: the same directions, of equal length
        values = inside.diagonal(dim1=1, dim2=2)
        assert (inside - torch.diag_embed(values)).abs().max() < 1e-12
        assert values.max() < 1.21 and values.median() > 0.68 and values.min() > 0
    assert not train.orthogonal(torch.zeros(1, 16, 16)).any()
    # Gradients of any size, also where their squares are no more float32: behind layers that start at zero.
    m = m.float()
    for size in (1e-38, 1e-30, 1e30):
        torch.testing.assert_close(train.orthogonal(size * m), train.orthogonal(m), rtol=0, atol=1e-3)
    # In float32, with singular values from 1 to 1e-6: the small ones are still small, none has grown beyond.
    ill = (u * torch.logspace(0, -6, u.shape[2])).matmul(vh).float()
    values = torch.linalg.svdvals(train.orthogonal(ill))
    assert values.max() < 1.21 and values[:, 0].min() > 0.68

    lr, decay = 0.1, 0.25
    weights = [torch.randn(shape, generator=g) for shape in ((16, 32), (32, 16, 3, 3))]
    ours = [nn.Parameter(w.clone().contiguous(memory_format=torch.channels_last) if w.ndim == 4 else w.clone())
            for w in weights]
    muon, moments = train.Muon(ours, lr, decay), [torch.zeros_like(w) for w in weights]
    theirs = [nn.Parameter(w.flatten(1).clone()) for w in weights]
    if hasattr(torch.optim, "Muon"):  # torch 2.9
        peer = torch.optim.Muon(theirs, lr=lr, weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        good = torch.tensor(step != 2)
        before, expected = [p.detach().clone() for p in ours], list(ours)
        for k, (p, q) in enumerate(zip(ours, theirs)):
            grad = torch.randn(p.shape, generator=g)
            p.grad, q.grad = grad if good else grad / 0, grad.flatten(1)
            if good:
                moments[k] = 0.95 * moments[k] + 0.05 * grad
                update = (0.05 * grad + 0.95 * moments[k]).flatten(1)
                direction = train.orthogonal(update[None])[0].view(p.shape)
                expected[k] = before[k] * (1 - lr * decay) - lr * 0.2 * max(update.shape) ** 0.5 * direction
        muon.step(good)
        for k, p in enumerate(ours):
            if good:
                assert relative_error(p.detach(), expected[k]) < 1e-6
            else:  # a step that is not finite leaves no trace
                assert torch.equal(p, before[k]) and muon.state[p]["momentum"].isfinite().all()
        if good and hasattr(torch.optim, "Muon"):
            peer.step()
    if hasattr(torch.optim, "Muon"):  # its products are in bf16
        for w, p, q in zip(weights, ours, theirs):
            assert relative_error(p.detach().flatten(1) - w.flatten(1), q.detach() - w.flatten(1)) < 0.03


@slow
def test_what_each_phase_trains(tmp_path, monkeypatch, smallest):
    latent = ("encoder.stages.3.", "encoder.down.3.", "encoder.mid.", "encoder.norm_out.", "encoder.quant.",
              "encoder.conv_out.", "decoder.conv_in_z.", "decoder.norm_z.", "decoder.context.", "decoder.blocks.0.ada.")
    head = ("decoder.up.3.", "decoder.norm_out.", "decoder.conv_out.")
    moving = {1: lambda k: True, 3: lambda k: k.startswith(head),
              2: lambda k: k.startswith(latent) or (k.startswith("decoder.") and "norm1.proj." in k)}
    for enc, loss in (("dc_f8c4", "eqm"), ("vq_f8c4", "fm")):
        start = tmp_path / f"{enc}.safetensors"
        latents = {"mean": [0.0] * 4, "std": [1.0] * 4}
        model = randomise(DCSSDAE(enc, "XS", loss, 0.125, depth=1, latents=latents), scale=0.5)
        model.save(start)
        before = model.state_dict()
        for phase, moves in moving.items():
            out = tmp_path / f"{enc}{phase}"
            run_main(train, monkeypatch, "--phase", phase, "--init_from", start, "--size", 16, "--batch_size", 2,
                     "--steps", 2, "--warmup", 0, "--w_lpips", 0, "--w_repa", 0, "--device", "cpu", "--dtype",
                     "float32", "--workers", 0, "--eval_images", 2, "--eval_steps", 1, "--log_every", 1,
                     "--weight_decay", 0.5, "--ema", 0.1, "--out", out)
            state = load_checkpoint(out)
            for k, v in before.items():
                moved = not torch.equal(v, state["model"][k])
                assert moved == moves(k) or moves(k) and not v.any(), (enc, phase, k)  # what is zero has no decay ...
                assert torch.equal(v, state["ema"][k]) != moved
            names = [k for k, _ in model.named_parameters() if moves(k)]
            assert len(state["optimizer"]["state"]) == len(names)
            log = step_lines(out)
            assert log[0]["lr"] == {1: 6.4e-5, 2: 1.6e-5, 3: 5.4e-5}[phase] and state["args"]["enc"] == enc
            latents = DCSSDAE.load(out / "model.safetensors").config["latents"]
            assert (latents is None) == (phase < 3)  # statistics of latents that have changed are dropped


def test_the_linear_base_stays_as_it_is(tmp_path, monkeypatch, smallest):
    """In training, and of a student of distillation."""
    out = tmp_path / "r"
    run_main(train, monkeypatch, *SMALL, "--enc", "dc_f32c32", "--size", 32, "--steps", 2, "--warmup", 0,
             "--weight_decay", 0.5, "--lr", 0.01, "--out", out)
    run_main(distill, monkeypatch, "--ckpt", out / "model.safetensors", "--teacher_steps", 2, "--batch_size", 2,
             "--device", "cpu", "--steps", 2, "--warmup", 0, "--lr", 0.01, "--eval_images", 2, "--out", tmp_path / "d")
    for folder in ("r", "d"):
        decoder = DCSSDAE.load(tmp_path / folder / "model.safetensors").decoder
        assert torch.equal(decoder.base.weight[:, :, 0, 0], torch.eye(32)) and not decoder.base.bias.any()
        assert decoder.conv_out.weight.any()


def test_checkpointing_works_on_a_loaded_model(tmp_path, monkeypatch):
    """--init_from gives a model in evaluation mode, which would compute without it."""
    calls = []
    monkeypatch.setattr(model_module, "checkpoint", lambda block, *a, **kw: (calls.append(block), block(*a))[1])
    DCSSDAE("dc_f8c4", "XS", enc_width=0.0625, depth=1).save(tmp_path / "m.safetensors")
    run_main(train, monkeypatch, *SMALL, "--init_from", tmp_path / "m.safetensors", "--checkpointing", "--steps", 1,
             "--out", tmp_path / "r")
    assert calls


def test_phase_defaults_and_refusals(tmp_path):
    start = tmp_path / "m.safetensors"
    DCSSDAE("dc_f8c4", "XS", "fm", 0.0625, depth=1).save(start)
    args = train.get_args(["--phase", "2", "--init_from", str(start)])
    assert (args.size, args.lr, args.enc, args.loss, args.depth) == (
        512,
        1.6e-5,
        "dc_f8c4",
        "fm",
        1,
    ) and "phase2" in args.out
    assert args.w_repa == 0
    assert train.get_args(["--phase", "3", "--size", "64"]).size == 64 and train.get_args(["--phase", "1"]).size == 256
    args = train.get_args([])
    assert (args.size, args.aug_scale, args.lr, args.batch_size) == (128, 2.0, 3e-4, 192)  # SSDD's recipe
    with pytest.raises(ValueError, match="holds a model with --dec XS --loss fm, but --dec S --loss eqm was given"):
        train.get_args(["--init_from", str(start), "--dec", "S", "--loss", "eqm", "--enc", "dc_f8c4"])
    for flags, words in (
        (["--phase", "2"], "--init_from"),
        (["--phase", "2", "--freeze_enc", "--init_from", str(start)], "--freeze_enc needs"),
        (["--w_gan", "1", "--size", "16"], "24 px"),
        (["--c", "trunc"], "--c trunc needs --linear off"),
        (["--c", "piecewise", "--linear", "decoder"], "--c piecewise needs --linear off"),
    ):
        with pytest.raises(ValueError, match=words):
            train.check_args(train.get_args(flags))
    with pytest.raises(FileNotFoundError, match="no weight file"):
        train.get_args(["--init_from", str(tmp_path / "none")])


def test_ema_starts_late(tmp_path, monkeypatch, smallest):
    command = [*SMALL, "--ema_start", 3, "--ema", 0.9, "--out", tmp_path / "r"]
    run_main(train, monkeypatch, *command, "--steps", 3)
    state = load_checkpoint(tmp_path / "r")
    assert all(torch.equal(v, state["ema"][k]) for k, v in state["model"].items())
    run_main(train, monkeypatch, *command, "--steps", 4, "--resume")
    new = load_checkpoint(tmp_path / "r")
    for name in ("decoder.conv_out.weight", "decoder.norm_z.running_var"):  # decay (1 + 0) / (10 + 0) in the first step
        assert torch.allclose(new["ema"][name], 0.1 * state["model"][name] + 0.9 * new["model"][name], rtol=1e-5)


def test_the_discriminators_gradients_and_when_it_starts(tmp_path, monkeypatch, smallest):
    """One step: the discriminator's Adam moment is (1 - beta) times the gradient that autograd gives for the hinge loss
    on the whole batch, whatever the micro-batch; the model's is that of the weighted sum. Before gan_start nothing
    differs from a run without."""
    common = [*SMALL, "--optimizer", "adamw", "--eval_every", 0, "--grad_clip", 1e9]
    run_main(train, monkeypatch, *common, "--w_gan", 0.5, "--micro_batch", 3, "--steps", 1, "--out", tmp_path / "g")
    state = load_checkpoint(tmp_path / "g")
    args = train.get_args([*map(str, common), "--w_gan", "0.5"])
    torch.manual_seed(0)
    model = train.new_model(args)
    gan = PatchGAN()
    x, _ = next(iter(data.make_loader(data.make_dataset("demo", 24, True), 4, True)))
    e, eps, s = train.draw(0, 0, range(4), x.shape[1:], (16, 3, 3), x.device)
    g = s[:, None, None, None] ** args.g_power
    x_g = g * x + (1 - g) * e
    posterior = model.encode(x)
    f = model.decoder(x_g, posterior.mean + (posterior.logvar / 2).exp() * eps)
    estimate = x_g - f  # c linear, lam 1
    hinge = hinge_loss(gan(x), gan(estimate.detach()))
    weights = list(gan.parameters())
    for i, gradient in enumerate(torch.autograd.grad(hinge, weights)):
        found = state["gan_optimizer"]["state"][i]["exp_avg"] / (1 - 0.5)
        assert (found - gradient).abs().max() <= 1e-3 * gradient.abs().max() + 1e-6
    total = (f - (1 - g) * (e - x)).square().mean() + 1e-6 * posterior.kl().mean() - 0.5 * gan(estimate).mean()
    names = [k for k, _ in model.named_parameters()]
    for name in ("decoder.conv_out.weight", "encoder.conv_out.weight"):
        gradient = torch.autograd.grad(total, model.get_parameter(name), retain_graph=True)[0]
        assert relative_error(state["optimizer"]["state"][names.index(name)]["exp_avg"] / (1 - 0.9), gradient) < 1e-4
    line = step_lines(tmp_path / "g")[0]
    assert line["loss"] == pytest.approx(total.item(), rel=1e-4) and line["gan_d"] == pytest.approx(
        hinge.item(), rel=1e-4
    )

    for name, flags in (("without", []), ("with", ["--w_gan", 0.5, "--gan_start", 2])):
        run_main(train, monkeypatch, *common, *flags, "--steps", 2, "--out", tmp_path / name)
    assert same_weights(tmp_path / "without", tmp_path / "with") and "gan" not in step_lines(tmp_path / "with")[1]
    state = load_checkpoint(tmp_path / "with")
    assert state["gan_optimizer"]["state"] == {} and all(
        torch.equal(v, state["gan"][k]) for k, v in gan.state_dict().items()
    )


def test_tensorboard_shows_the_log(tmp_path, monkeypatch, smallest):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    command = [*SMALL, "--tensorboard", "--out", tmp_path / "r"]
    run_main(train, monkeypatch, *command, "--steps", 2)
    run_main(train, monkeypatch, *command, "--steps", 3, "--resume")
    board = events.EventAccumulator(str(tmp_path / "r")).Reload()
    log = step_lines(tmp_path / "r")
    for name in ("loss", "lr", "grad_norm", "peak_mib"):
        assert [(v.step, v.value) for v in board.Scalars(name)] == [
            (line["step"], pytest.approx(line[name])) for line in log
        ]
    row = lines_of(tmp_path / "r" / "log.jsonl")[-1]["eval"][2]
    assert board.Scalars("1 step/psnr")[-1].value == pytest.approx(row["psnr"]) and [
        v.step for v in board.Images("reconstructions")
    ] == [2, 3]
    assert all(line["peak_mib"] > 50 for line in log)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        run_main(train, monkeypatch, *SMALL, "--tensorboard", "--out", tmp_path / "q")


@slow
def test_weights_and_biases_offline(tmp_path, monkeypatch):
    """Into --out, without an account: the numbers, the pictures; a resumed run is the same one."""
    pytest.importorskip("wandb")
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    for steps, more in ((1, []), (2, ["--resume"])):
        cli("train.py", *SMALL, "--wandb", "--out", tmp_path / "r", "--steps", steps, *more, env=offline)
    folders = sorted((tmp_path / "r" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and folders[0].name.rsplit("-", 1)[1] == folders[1].name.rsplit("-", 1)[1]
    for steps, folder in enumerate(folders, start=1):
        (record,) = folder.glob("*.wandb")
        content = record.read_bytes()
        assert b"grad_norm" in content and b"1 step/psnr" in content
        assert list((folder / "files" / "media" / "images").glob(f"reconstructions_{steps}_*.png"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        run_main(train, monkeypatch, *SMALL, "--wandb", "--out", tmp_path / "q")


# ---------------------------------------------------------------------------------------------------------------------
# train.py: runs that are stopped, resumed or go wrong
# No signal, crash, full disk or bad step costs more than the steps since the last checkpoint, or changes a bit.

def log_of(folder):
    """A run's log without what a clock or the memory measures."""
    lines = [
        {k: v for k, v in line.items() if k not in ("images_per_s", "peak_mib")}
        for line in lines_of(folder / "log.jsonl")
    ]
    return [
        dict(line, eval=[{k: v for k, v in row.items() if k != "ms"} for row in line["eval"]])
        if "eval" in line
        else line
        for line in lines
    ]


@slow
@pytest.mark.parametrize("world,workers,module", [(1, 2, "train"), (2, 0, "train"), (1, 0, "distill")])
def test_a_stopped_run_ends_as_if_it_had_not_been(tmp_path, world, workers, module, smallest):
    """kill -9 before the first checkpoint and after one, then a polite signal to one rank and its data loader: weights,
    EMA, optimiser and log are bit-identical in the end."""
    flags, steps = [*SMALL, "--optimizer", "muon", "--w_gan", 0.1, "--gan_start", 2], 7
    if module == "distill":
        DCSSDAE("dc_f8c4", "XS", "fm", 0.0625, depth=1, notes={"size": 16, "w_lpips": 0}).save(
            tmp_path / "teacher.safetensors"
        )
        flags = [
            "--ckpt",
            tmp_path / "teacher.safetensors",
            "--teacher_steps",
            2,
            "--batch_size",
            4,
            "--eval_images",
            4,
            "--log_every",
            1,
            "--save_every",
            2,
            "--device",
            "cpu",
            "--dtype",
            "float32",
        ]
    flags += ["--workers", workers, "--steps", steps]

    def parts(*more, **kw):
        return run(tmp_path / "o", *flags, "--out", tmp_path / "parts", *more, world=world, module=module, **kw)

    whole = aside(run, tmp_path / "w", *flags, "--out", tmp_path / "whole", world=world, module=module)
    restarted = {"TORCHELASTIC_RESTART_COUNT": "1"}  # what torchrun sets: it goes on by itself
    parts(sabotage={world - 1: {1: "SIGKILL"}}, ok=KILLED)
    assert not (tmp_path / "parts" / "latest.pt").exists()
    parts(env=restarted, sabotage={0: {3: "SIGKILL"}}, ok=KILLED)
    # Of every second step there is a checkpoint, and before an evaluation, which distill.py has at the end alone.
    assert load_checkpoint(tmp_path / "parts")["step"] == (2 if module == "distill" else 3)
    name = "SIGINT" if module == "distill" else "SIGTERM"
    _, output = parts(
        env=restarted, sabotage={world - 1: {4: name}}, ok=(128 + getattr(signal, name), 128 + signal.SIGTERM)
    )
    assert "stopped after step 6 and saved" in output and load_checkpoint(tmp_path / "parts")["step"] == 6
    parts("--resume")
    whole.result()
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")
    a, b = (load_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    if module == "train":
        assert all(torch.equal(v, b["gan"][k]) for k, v in a["gan"].items())
        assert a["gan_optimizer"]["state"][0]["step"] == steps - 2
    _, output = parts("--resume", ok=(1,))
    assert f"has done its {steps} steps" in output


def test_a_run_that_dies_in_its_last_evaluation_catches_up(tmp_path, monkeypatch, smallest):
    command = [*SMALL, "--steps", 3, "--out", tmp_path / "r"]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train, "evaluate", lambda *a, **kw: 1 / 0)
        run_main(train, monkeypatch, *command)
    assert load_checkpoint(tmp_path / "r")["step"] == 3 and len(lines_of(tmp_path / "r" / "log.jsonl")) == 3
    run_main(train, monkeypatch, *command, "--resume")
    assert "eval" in lines_of(tmp_path / "r" / "log.jsonl")[-1] and (tmp_path / "r" / "metrics.json").exists()


@slow
def test_torchrun_restarts_go_on_by_themselves(tmp_path, smallest):
    """The first attempt dies by kill -9 after a checkpoint, on the other rank; the command is not changed."""
    (tmp_path / "run.py").write_text(
        "import os, signal, sys\nsys.path.insert(0, os.environ['HERE'])\nimport train\ndraw = train.draw\n"
        f"train.SIZES['XS'] = {SMALLEST_SIZE}\n\n\n"
        "def dying(seed, step, *rest):\n"
        "    if step == 3 and os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return draw(seed, step, *rest)\n\n\ntrain.draw = dying\ntrain.guarded(train.main)\n"
    )
    command = [*map(str, SMALL), "--steps", "5", "--out", str(tmp_path / "r")]
    whole = aside(run, tmp_path / "o", *SMALL, "--steps", 5, "--out", tmp_path / "whole", world=2)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            "--max-restarts=1",
            tmp_path / "run.py",
            *command,
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env=dict(os.environ, HERE=HERE, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    whole.result()
    assert same_weights(tmp_path / "whole", tmp_path / "r") and log_of(tmp_path / "whole") == log_of(tmp_path / "r")


def test_a_bad_step_of_one_rank_is_skipped_on_all(tmp_path, smallest):
    flags = [*SMALL, "--steps", 4, "--w_gan", 0.1]
    _, output = run(tmp_path / "o", *flags, "--out", tmp_path / "a", world=2, sabotage={1: {1: "nan"}})
    assert output.count("step 1 skipped") == 1
    log = step_lines(tmp_path / "a")
    assert [line["skipped"] for line in log] == [0, 1, 1, 1] and log[1]["grad_norm"] is None
    state = load_checkpoint(tmp_path / "a")
    assert (
        state["skipped"] == 1
        and state["optimizer"]["state"][0]["step"] == 3 == state["gan_optimizer"]["state"][0]["step"]
    )
    assert state["model"]["decoder.norm_z.num_batches_tracked"] == 3
    assert all(v.isfinite().all() for part in ("model", "ema", "gan") for v in state[part].values())
    _, output = run(tmp_path / "o", *SMALL, "--steps", 20, "--out", tmp_path / "b", world=2, ok=(1,),
                    sabotage={0: dict.fromkeys(range(1, 20), "nan")})
    batches = data.make_loader(data.make_dataset("demo", 24, True), 4, True, start=10)
    images = next(iter(batches))[1].tolist()
    last = output[output.index("error: ") :]
    assert last.startswith("error: ten steps in a row") and "the last is 10," in last and "eqm nan" in last
    assert f"images {', '.join(map(str, images))}:" in last


def test_an_infinite_loss_with_finite_gradients_skips_the_step(tmp_path, monkeypatch, smallest):
    """KL may overflow where the encoder is frozen: no gradient shows it. Nothing is saved before a good step."""
    values, saves = iter([math.inf, math.inf, 0.0]), []
    monkeypatch.setattr(train, "kl_loss", lambda posterior: torch.tensor(next(values)))
    save = train.save_checkpoint
    monkeypatch.setattr(train, "save_checkpoint", lambda out, state, *a: (saves.append(state["step"]),
                                                                          save(out, state, *a)))
    DCSSDAE("dc_f8c4", "XS", enc_width=0.0625, depth=1).save(tmp_path / "m.safetensors")
    run_main(train, monkeypatch, *SMALL, "--init_from", tmp_path / "m.safetensors", "--freeze_enc", "--steps", 3,
             "--save_every", 1, "--out", tmp_path / "r")
    state = load_checkpoint(tmp_path / "r")
    assert state["optimizer"]["state"][0]["step"] == 1 and state["skipped"] == 2 and saves == [3]


def test_a_run_that_goes_wrong_leaves_its_good_state(tmp_path, monkeypatch, smallest):
    """Skipped steps, weights that are not finite, weights that are finite and ruined."""
    good = tmp_path / "r"
    command = [*SMALL, "--warmup", 0, "--eval_every", 1, "--save_every", 1, "--out", good, "--resume"]
    run_main(train, monkeypatch, *command[:-1], "--steps", 2)
    kept = {name: (good / name).read_bytes() for name in ("latest.pt", "previous.pt", "model.safetensors")}
    best = DCSSDAE.load(good / "best.safetensors")
    rows = [line["eval"][-1] for line in lines_of(good / "log.jsonl") if "eval" in line]
    note = best.config["notes"]["best"]
    assert note["psnr"] == max(row["psnr"] for row in rows) and note["images"] == 4 and note["decoding_steps"] == 1

    def unchanged():
        return all((good / name).read_bytes() == content for name, content in kept.items())

    with monkeypatch.context() as patch:
        patch.setattr(train, "kl_loss", lambda posterior: torch.tensor(math.nan))
        with pytest.raises(ValueError, match=r"the last 2 steps were skipped.*last checkpoint is kept"):
            run_main(train, patch, *command, "--steps", 4)
    assert unchanged()
    with monkeypatch.context() as patch:
        patch.setattr(train, "update_ema", lambda tensors, *a: tensors[0][0][0].fill_(math.nan))
        with pytest.raises(ValueError, match=r"after step 3 the weights of the part 'ema' are not finite"):
            run_main(train, patch, *command, "--steps", 4)
    assert unchanged()
    with monkeypatch.context() as patch:
        patch.setattr(train, "update_ema", lambda tensors, *a: [p.fill_(9.0) for p in tensors[0][0]])
        run_main(train, patch, *command, "--steps", 3)
    assert not unchanged()
    after = DCSSDAE.load(good / "best.safetensors")
    assert after.config == best.config
    assert all(torch.equal(a, b) for a, b in zip(after.state_dict().values(), best.state_dict().values()))
    (good / "latest.pt").unlink(), (good / "previous.pt").unlink(), (good / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"best.safetensors is of a run that has no checkpoint"):
        run_main(train, monkeypatch, *command[:-1], "--steps", 2)


def test_resuming_with_other_flags_lists_them(tmp_path, capsys):
    args = train.get_args(["--out", str(tmp_path), "--steps", "9"])
    save_checkpoint(tmp_path, small_state(4) | {"args": vars(args)})
    again = train.get_args(["--out", str(tmp_path), "--steps", "12", "--lr", "0.1", "--resume"])
    assert train.open_run(again, 0, 1)[0]["step"] == 4
    assert "resuming with --steps 12 --lr 0.1 instead of --steps 9 --lr 0.0003" in capsys.readouterr().out
    other = train.get_args(
        ["--out", str(tmp_path), "--size", "64", "--c", "trunc", "--lr", "1", "--resume", "--phase", "1"]
    )
    with pytest.raises(
        ValueError, match="run with --phase None --c linear --size 128, but --phase 1 --c trunc --size 64 was given"
    ):
        train.open_run(other, 0, 1)


def test_a_run_of_an_earlier_network_is_not_resumed(tmp_path):
    args = train.get_args(["--out", str(tmp_path), "--steps", "9", "--resume"])
    for config, is_refused in (({"linear_decoder": 32}, True), ({"linear_decoder": 0}, False)):
        state = small_state(4) | {"args": vars(args), "config": config}
        for more in ({}, {"format": 4}, {"format": model_module.FORMAT}):
            save_checkpoint(tmp_path, state | more)
            is_old = more != {"format": model_module.FORMAT}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(train, "checkpoint_problem", lambda state: None)  # its model is another
                if is_refused and is_old:
                    with pytest.raises(ValueError, match="of an earlier version"):
                        train.open_run(args, 0, 1)
                else:
                    assert train.open_run(args, 0, 1)[0]["step"] == 4


@pytest.mark.parametrize("module", [train, distill])
def test_a_run_that_loses_its_data_saves_first(tmp_path, monkeypatch, module):
    draw, flags = module.next_batch, [*SMALL, "--save_every", 100, "--eval_every", 0]
    if module is distill:
        DCSSDAE("dc_f8c4", "XS", "fm", 0.0625, depth=1, notes={"size": 16, "w_lpips": 0}).save(
            tmp_path / "t.safetensors")
        flags = ["--ckpt", tmp_path / "t.safetensors", "--teacher_steps", 2, "--batch_size", 4, "--eval_images", 4,
                 "--device", "cpu", "--dtype", "float32", "--workers", 0]

    def batches_until_step_2(run, batches):
        def lost():
            raise OSError(errno.ESTALE, "Stale file handle")
            yield
        return draw(run, batches if run.done < 2 else lost())

    monkeypatch.setattr(module, "next_batch", batches_until_step_2)
    with pytest.raises((OSError, SystemExit), match="Stale"):
        run_main(module, monkeypatch, *flags, "--steps", 5, "--out", tmp_path / "r")
    assert load_checkpoint(tmp_path / "r")["step"] == 2 and (tmp_path / "r" / "model.safetensors").exists()


@pytest.mark.parametrize("error", [RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
                                   ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), EOFError()])
def test_a_killed_reader_of_images_is_one_sentence(monkeypatch, error):
    """Whatever torch makes of it; without readers the error is another one."""
    def cut_off(loader):
        yield torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.arange(2)
        raise error

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", cut_off)
    for workers in (1, 0):
        batches = iter(data.make_loader(data.make_dataset("demo", 16, train=True), 2, train=True, workers=workers))
        next(batches)
        expected = OSError if workers or isinstance(error, RuntimeError) else type(error)
        with pytest.raises(expected, match="was killed" if expected is OSError else None):
            next(batches)
    if isinstance(error, RuntimeError):  # torch may also tell in the midst of other work
        def fail():
            raise error
        with pytest.raises(SystemExit, match="was killed"):
            data.guarded(fail)


def test_data_that_one_process_loses_ends_all(tmp_path, smallest):
    """Both save what they have done, and say it once."""
    codes, output = run(tmp_path / "o", *SMALL, "--save_every", 100, "--eval_every", 0, "--steps", 5, "--out",
                        tmp_path / "r", world=2, ok=(1,), sabotage={1: {2: "lost"}})
    assert codes == [1, 1] and output.count("error: ") == 1 and "Stale file handle" in output
    assert load_checkpoint(tmp_path / "r")["step"] == 2 and "Traceback" not in (tmp_path / "o" / "output1").read_text()


def test_processes_have_the_same_flags_and_images(tmp_path, monkeypatch):
    args = train.get_args(["--out", str(tmp_path), "--limit", "8", "--batch_size", "2", "--size", "32"])
    others = {}
    monkeypatch.setattr(train, "gathered", lambda value, world: [value, others.get(type(value), value)])
    train.check_shared(args, 2)
    mine = {name: value for name, value in vars(args).items() if name not in train.OWN_FLAGS}
    others[dict] = mine | {"lr": 0.1, "seed": 5}
    with pytest.raises(ValueError, match=r"rank 0 has --lr 0.0003 --seed 0, rank 1 has --lr 0.1 --seed 5: start all"):
        train.check_shared(args, 2)
    others[str] = "7 images"
    with pytest.raises(ValueError, match=r"rank 0 finds 8 images.* but rank 1 7 images: give all machines the same"):
        train.open_data(args, None, 0, 2)


def test_a_node_without_the_folder_of_the_run_is_told_so(tmp_path, monkeypatch):
    args = train.get_args(["--out", str(tmp_path / "r"), "--resume"])
    monkeypatch.setattr(train, "gathered", lambda value, world: [(None, False, 5), value])
    with pytest.raises(ValueError, match="all nodes need the same folder"):
        train.open_run(args, 1, 2)


def test_a_requeued_slurm_job_goes_on_by_itself(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, small_state(2))
    args = train.get_args(["--out", str(tmp_path), "--steps", "10", "--linear", "off", "--enlarge"])
    with pytest.raises(ValueError, match="already holds a run"):
        train.find_run(args, tmp_path / "log.jsonl", 0)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    checkpoint, _ = train.find_run(args, tmp_path / "log.jsonl", 0)
    assert checkpoint["step"] == 2


def test_damaged_lines_of_the_log_are_left_out(tmp_path, capsys):
    save_checkpoint(tmp_path, small_state(2))
    log, good = tmp_path / "log.jsonl", '{"step": 1, "loss": 0.5}\n'
    log.write_bytes(good.encode() + b'\n{}\n[1]\n\x00\xff\n{"step": "x"}\n{"step": 3}\n{"step": 2')
    args = train.get_args(["--out", str(tmp_path), "--resume", "--steps", "10", "--linear", "off", "--enlarge"])
    _, lines = train.find_run(args, log, 0)
    assert lines == [good]
    assert capsys.readouterr().out.count(f"warning: {log} holds a damaged line") == 5


def test_a_log_on_a_full_disk_is_a_warning(capsys):
    train.append_log("/dev/full", [], 3, loss=1.0)
    assert "warning: could not write to /dev/full: No space left on device" in capsys.readouterr().out


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")])
def test_out_of_memory_is_one_sentence(error):
    def main():
        raise error
    with pytest.raises(SystemExit, match=r"error: out of memory \(.*smaller --batch_size"):
        data.guarded(main)


def test_flags_without_effect_are_named(tmp_path, monkeypatch, capsys):
    def named():
        return re.findall(r"warning: --(\w+) has no effect", capsys.readouterr().err)

    def warned(*flags):
        train.get_args([*flags, "--out", str(tmp_path)])
        return named()
    assert warned("--loss", "fm", "--lam", "2", "--g_power", "3", "--t_mean", "1") == ["lam", "g_power"]
    assert warned("--loss", "eqm", "--c", "trunc", "--a", "0.5", "--b", "2", "--t_mean", "1") == ["t_mean", "b"]
    assert warned("--preset", "tiny", "--enlarge", "--inception", "f") == ["enlarge", "inception"]
    assert warned("--data", "d", "--enlarge", "--aug_scale", "3", "--w_gan", "1", "--gan_start", "5") == []
    distill.get_args(["--ckpt", "m", "--repa_size", "64", "--w_lpips", "0", "--lpips_weights", "f"])
    assert named() == ["lpips_weights", "repa_size"]
    for flags, expected in ((["--images", "a.png", "--data", "d", "--limit", "3"], ["data", "limit"]),
                            (["--data", "d", "--features", "dinov2", "--inception", "f"], ["inception"]),
                            (["--data", "d", "--features", "dinov2", "--dinov2", "f"], [])):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--ckpt", "m", *flags])
        evaluate.parse_arguments()
        assert named() == expected


def test_a_reader_killed_in_the_midst_of_a_step_costs_no_work(tmp_path, smallest):
    _, output = run(tmp_path / "o", *SMALL, "--save_every", 100, "--eval_every", 0, "--steps", 50, "--workers", 1,
                    "--out", tmp_path / "r", ok=(1,), sabotage={0: {2: "reader"}})
    assert "error: a process that reads images was killed" in output and "Traceback" not in output
    assert load_checkpoint(tmp_path / "r")["step"] >= 3


@pytest.mark.parametrize("is_good", [True, False])
def test_what_is_saved_before_an_evaluation(tmp_path, monkeypatch, is_good):
    """All steps, but not among skipped ones; and a signal is obeyed there, too."""
    args = train.get_args(["--out", str(tmp_path), "--steps", "10"])
    weights = nn.Linear(1, 1)
    ema = types.SimpleNamespace(state_dict=weights.state_dict, save=lambda path: None)
    monkeypatch.setattr(train, "StopSignal", lambda: types.SimpleNamespace(received=0))
    run = train.Run(args, 0, 1, torch.device("cpu"), tmp_path / "log.jsonl", [], {"model": weights, "ema": ema}, 0, 0,
                    types.SimpleNamespace(content=lambda: "images"))
    saved = []
    monkeypatch.setattr(train, "save_checkpoint", lambda out, state, keep, ema: saved.append(state["step"]))

    def report(stop):
        run.done += 1
        values = torch.tensor([1.0, 1.0, stop, float(is_good)])
        run.reports.append(train.Report(run.done, ["loss"], values, None, 1e-3, torch.zeros(1), 0.0))

    report(0.0)
    train.save_before(run)
    train.save_before(run)
    assert saved == ([1] if is_good else [])
    report(1.0)
    with pytest.raises(SystemExit) as end:
        train.save_before(run)
    assert end.value.code == 128 + signal.SIGTERM and saved == ([1, 2] if is_good else [])
    run.bar.close()


@pytest.mark.skipif(os.name != "posix", reason="signals and locks are POSIX's")
def test_signals_that_save_and_end(monkeypatch):
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)             # nohup may have started the tests
    try:
        for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            stop = train.StopSignal()
            os.kill(os.getpid(), s)
            assert stop.received == s
        signal.signal(signal.SIGHUP, signal.SIG_IGN)         # as nohup does
        stop = train.StopSignal()
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received == 0
        train.ignore_stop(0)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def lock_and_wait(folder, locked):
    data.lock_folder(folder)
    locked.set()
    time.sleep(60)


@pytest.mark.skipif(os.name != "posix", reason="signals and locks are POSIX's")
def test_two_runs_into_one_folder(tmp_path):
    """Refused while the first lives, and not a moment longer, even if it is killed."""
    out = tmp_path / "r"
    out.mkdir()
    args = train.get_args(["--out", str(out)])
    locked = FORKS.Event()
    other = FORKS.Process(target=lock_and_wait, args=(str(out), locked))
    other.start()
    try:
        assert locked.wait(60)
        with pytest.raises(ValueError, match="another run is writing into"):
            train.open_run(args, 0, 1)
    finally:
        other.kill()
        other.join()
    assert train.open_run(args, 0, 1)[0] is None
    assert train.open_run(args, 0, 1)[0] is None  # the same process, again


@slow
def test_resuming_depends_on_content_not_on_paths(tmp_path, monkeypatch, smallest):
    """The same images elsewhere, and no --init_from file any more; other images only with a flag that says so."""
    for name, n in (("here", 6), ("there", 6), ("other", 7)):
        folder_of(tmp_path / name, n)
    DCSSDAE("dc_f8c4", "XS", enc_width=0.0625, depth=1).save(tmp_path / "m.safetensors")
    flags = [*SMALL, "--init_from", tmp_path / "m.safetensors", "--out", tmp_path / "r"]
    run_main(train, monkeypatch, *flags, "--data", tmp_path / "here", "--steps", 1)
    (tmp_path / "m.safetensors").unlink()
    run_main(train, monkeypatch, *flags, "--data", tmp_path / "there", "--steps", 2, "--resume")
    for change, words in ((["--data", tmp_path / "other"], r"a run on 6 images.*other holds 7 images"),
                          (["--data", tmp_path / "here", "--w_kl", 1], r"--w_kl 1.0 was given.*--allow_changes")):
        with pytest.raises(ValueError, match=words):
            run_main(train, monkeypatch, *flags, *change, "--steps", 3, "--resume")
    run_main(train, monkeypatch, *flags, "--data", tmp_path / "other", "--w_kl", 1, "--steps", 3, "--resume",
             "--allow_changes")
    checkpoint = load_checkpoint(tmp_path / "r")
    assert checkpoint["step"] == 3 and DCSSDAE.load(tmp_path / "r" / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    contents = {data.make_dataset(name, 16, True).content() for name in ("here", "./here/", f"{tmp_path}//here")}
    monkeypatch.chdir(tmp_path / "here")
    assert len(contents | {data.make_dataset(".", 16, True).content()}) == 1
    args = train.get_args([*map(str, SMALL), "--enc_ckpt", str(tmp_path / "gone.pt")])
    assert train.first_model(args, checkpoint).config == checkpoint["config"]  # nor any --enc_ckpt file


def test_distillation_resumes_with_the_same_teacher_wherever_it_lies(tmp_path, monkeypatch, smallest):
    here, there, other = (tmp_path / name / "t.safetensors" for name in ("here", "there", "other"))
    for path in (here, there, other):
        path.parent.mkdir()
    teacher = DCSSDAE("dc_f8c4", "XS", "fm", 0.0625, depth=1, notes={"size": 16, "w_lpips": 0})
    teacher.save(here)
    flags = ["--teacher_steps", 1, "--batch_size", 2, "--eval_images", 2, "--device", "cpu", "--dtype", "float32",
             "--workers", 0, "--out", tmp_path / "r"]
    run_main(distill, monkeypatch, "--ckpt", here, *flags, "--steps", 1)
    teacher.config["latents"] = {"mean": [0.0] * 4, "std": [1.0] * 4}  # as tools.latents leaves it
    teacher.save(there)
    here.unlink()
    run_main(distill, monkeypatch, "--ckpt", there, *flags, "--steps", 2, "--resume")
    assert load_checkpoint(tmp_path / "r")["step"] == 2
    randomise(teacher).save(other)
    message = sentence(distill, monkeypatch, "--ckpt", other, *flags, "--steps", 3, "--resume")
    assert "of another model than --ckpt" in message and str(other) in message


def test_restarts_do_not_overwrite_a_model(tmp_path, monkeypatch):
    """A restart goes on from a checkpoint, or starts again where there is nothing; somebody's model stays."""
    args = train.get_args(["--out", str(tmp_path)])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train.open_run(args, 0, 1)[0] is None
    (tmp_path / "model.safetensors").write_bytes(b"a model")
    with pytest.raises(ValueError, match="already holds a run"):
        train.open_run(args, 0, 1)
    (tmp_path / "latest.pt.tmp").write_bytes(b"the first save of this run, killed between its two files")
    assert train.open_run(args, 0, 1)[0] is None


# ---------------------------------------------------------------------------------------------------------------------
# train.py: checkpoints
# A checkpoint is whole or is not there: damaged files, full disks, kills in the midst of saving.

def test_statistics_and_checkpoints_with_wrong_contents(tmp_path, capsys):
    good = {"mu": np.zeros(3), "sigma": np.eye(3)}
    for change in ({"mu": np.full(3, np.nan)}, {"n": np.ones(2)}, {"n": 0}, {"sigma": np.eye(3).astype("U3")}):
        np.savez(tmp_path / "s.npz", **(good | change))
        with pytest.raises(ValueError, match="does not hold FID statistics"):
            fid.Statistics.load(tmp_path / "s.npz")
    for change in ({"ema": None}, {"ema": {"w": torch.ones(3)}}, {"model": {"w": torch.full((2,), math.nan)}},
                   {"model": None}, {"optimizer": {}}, {"skipped": -1}, {"args": {"enc": [[]]}}):
        folder = tmp_path / str(len(os.listdir(tmp_path)))
        folder.mkdir()
        torch.save(small_state(1), folder / "previous.pt")
        torch.save(small_state(2) | change, folder / "latest.pt")
        assert load_checkpoint(folder)["step"] == 1 and "damaged" in capsys.readouterr().out


def test_a_full_disk_or_damaged_checkpoint_loses_nothing(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, small_state(1))
    save_checkpoint(tmp_path, small_state(2))

    def full(state, file):
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"No space left.*last checkpoint is kept"):
        save_checkpoint(tmp_path, small_state(3))
    assert load_checkpoint(tmp_path)["step"] == 2 and sorted(os.listdir(tmp_path)) == ["latest.pt", "previous.pt"]
    (tmp_path / "latest.pt").write_bytes(b"damaged")
    assert load_checkpoint(tmp_path)["step"] == 1


def test_without_a_checkpoint_none_is_promised(tmp_path, monkeypatch):
    def full(state, file):  # as torch does: two exceptions on top of the system's
        try:
            try:
                raise OSError(28, "No space left on device")
            except OSError:
                raise RuntimeError("unexpected pos 64 vs 0")
        except RuntimeError:
            raise OSError("write failed")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"No space left on device\): make room and start again: there was no checkpoint"):
        save_checkpoint(tmp_path, small_state(1))


def test_a_checkpoint_is_mapped_and_its_checksums_count(tmp_path):
    """Maps of the file, not copies; a flipped bit in the midst of the weights is still seen."""
    save_checkpoint(tmp_path, small_state(1, weights=torch.ones(100_000)))
    save_checkpoint(tmp_path, small_state(2, weights=torch.ones(100_000)))
    if os.path.exists("/proc/self/maps"):
        state = load_checkpoint(tmp_path)
        assert "latest.pt" in Path("/proc/self/maps").read_text() and state["weights"].sum() == 100_000
    content = bytearray((tmp_path / "latest.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "latest.pt").write_bytes(content)
    assert load_checkpoint(tmp_path)["step"] == 1


def test_keep_checkpoints_and_fall_back_to_each(tmp_path, capsys, monkeypatch):
    for step in range(1, 7):
        save_checkpoint(tmp_path, small_state(step), keep=4)
    names = ["latest.pt", "previous.pt", "previous2.pt", "previous3.pt"]
    assert sorted(os.listdir(tmp_path)) == names
    assert [torch.load(tmp_path / name)["step"] for name in names] == [6, 5, 4, 3]
    for name in names[:2]:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:300])
    assert load_checkpoint(tmp_path)["step"] == 4 and "latest.pt" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["latest.pt.damaged", "previous.pt.damaged", *names[2:]]
    save_checkpoint(tmp_path, small_state(7), keep=1)
    assert load_checkpoint(tmp_path)["step"] == 7

    # A file that a save moves away meanwhile, or that the disk does not give, is not a damaged one.
    def gone(path):
        if path.endswith("latest.pt"):
            raise FileNotFoundError(errno.ENOENT, "No such file", path)
        return read(path)

    def fails(path):
        raise OSError(errno.EIO, "Input/output error", path)
    read, there = train.map_checkpoint, sorted(os.listdir(tmp_path))
    monkeypatch.setattr(train, "map_checkpoint", gone)
    assert load_checkpoint(tmp_path)["step"] == 4
    monkeypatch.setattr(train, "map_checkpoint", fails)
    with pytest.raises(OSError, match="Input/output error"):
        load_checkpoint(tmp_path)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == there
    for name in ["latest.pt", *names[2:]]:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match="no readable checkpoint"):
        load_checkpoint(tmp_path)


def damaged_states(state):
    """{what: a checkpoint that is wrong in this way}, from a good one of train.py with a GAN."""
    def other_moment(**change):
        moments = state["optimizer"]["state"]
        first = {**moments[0], **change}
        return {"optimizer": {**state["optimizer"], "state": {**moments, 0: first}}}

    weights, muon = state["optimizer"]["state"][0], state["muon"]
    gan = dict(state["gan"])
    name = next(iter(gan))
    return {
        "moment of another shape": other_moment(exp_avg=torch.zeros(7), exp_avg_sq=torch.zeros(7)),
        "moment that is not finite": other_moment(exp_avg=weights["exp_avg"] * math.nan),
        "moment without its square": other_moment(exp_avg_sq=None),
        "negative square": other_moment(exp_avg_sq=weights["exp_avg_sq"] - 1),
        "muon's moment of another shape": {"muon": muon | {"state": muon["state"] | {0: {"momentum": torch.zeros(7)}}}},
        "muon without a moment": {"muon": muon | {"state": muon["state"] | {0: {}}}},
        "muon of another type": {"muon": [muon]},
        "no groups": {"optimizer": {**state["optimizer"], "param_groups": []}},
        "other numbers": {"optimizer": {**state["optimizer"], "param_groups": [{"params": [5]}]}},
        "gan of another shape": {"gan": gan | {name: gan[name][:1]}},
        "gan without a tensor": {"gan": {key: value for key, value in gan.items() if key != name}},
        "gan's optimizer": {"gan_optimizer": state["optimizer"]},
        "repa": {"repa": {"0.weight": torch.zeros(3)}},
        "another configuration": {"config": state["config"] | {"enc": "dc_f8c8"}},
        "an unknown argument": {"config": state["config"] | {"wings": 2}},
        "other flags": {"args": state["args"] | {"dec": "S"}},
    }


def test_each_part_of_a_checkpoint_is_checked_and_the_one_before_it_tried(tmp_path, monkeypatch, capsys, smallest):
    monkeypatch.setattr(train, "PatchGAN", lambda: PatchGAN(16))
    out = tmp_path / "r"
    flags = [*SMALL, "--size", 24, "--w_gan", 0.1, "--optimizer", "muon", "--eval_every", 0, "--save_every", 1,
             "--out", out]
    run_main(train, monkeypatch, *flags, "--steps", 2)
    state = torch.load(out / "latest.pt", weights_only=True)
    assert train.checkpoint_problem(state) is None
    for what, change in damaged_states(state).items():
        assert train.checkpoint_problem(state | change), what
    torch.save(state | change, out / "latest.pt")
    # The whole command goes on from the one before, and with this call's weight decay.
    run_main(train, monkeypatch, *flags, "--steps", 2, "--weight_decay", 0.5, "--resume")
    assert f"{out}/latest.pt (--dec of another model" in capsys.readouterr().out
    assert load_checkpoint(out)["optimizer"]["param_groups"][0]["weight_decay"] == 0.5
    # What no checkpoint can tell of itself: another run's parts.
    parts = {"model": nn.Linear(2, 2), "repa": None, "optimizer": None}
    for checkpoint in ({"model": {"weight": torch.ones(3)}}, {"model": parts["model"].state_dict(), "repa": {}}):
        with pytest.raises(ValueError, match="--resume continues a run"):
            train.restore(parts, {"step": 1, **checkpoint})


@pytest.mark.skipif(os.name != "posix", reason="limits of a process are POSIX's")
def test_a_full_disk_in_either_file_leaves_the_old_ones(tmp_path):
    """A limit on the size of files stands for the full disk: the system's error, in the midst of writing."""
    ema = DCSSDAE("dc_f8c4", "XS", enc_width=0.0625, depth=1)
    save_checkpoint(tmp_path, small_state(1), ema=ema)
    old = (tmp_path / "model.safetensors").read_bytes()
    import resource

    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for state in (
            small_state(2),
            small_state(2, weights=torch.zeros(300_000)),
        ):  # the limit meets the model, the checkpoint
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
            with pytest.raises(OSError, match=r"File too large.*last checkpoint is kept"):
                save_checkpoint(tmp_path, state, ema=ema)
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert load_checkpoint(tmp_path)["step"] == 1 and (tmp_path / "model.safetensors").read_bytes() == old
            assert sorted(os.listdir(tmp_path)) == ["latest.pt", "model.safetensors"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def saver(out, step):
    """Save as fast as possible; the checkpoint and the model carry the same number. Pauses around the renaming, or no
    kill would ever come there."""
    torch.set_num_threads(1)
    model, replace = DCSSDAE("dc_f8c4", "XS", enc_width=0.0625, depth=1), os.replace

    def slowly(a, b):
        time.sleep(0.01)
        replace(a, b)
        time.sleep(0.01)

    os.replace = slowly
    while True:
        step += 1
        model.config["notes"]["step"] = step
        save_checkpoint(out, small_state(step, weights=torch.full((500_000,), float(step))), keep=3, ema=model)


def test_kill_at_random_moments_of_saving(tmp_path):
    """KILLS=50 python -m pytest test_all.py -k kill_at_random -s"""
    rng, step, states = random.Random(0), 0, Counter()
    for kills in range(1, int(os.environ.get("KILLS", "3")) + 1):
        process = FORKS.Process(target=saver, args=(str(tmp_path), step))
        process.start()
        saved = step
        while saved == step:
            assert process.is_alive(), "the saving process failed"
            time.sleep(0.01)
            with contextlib.suppress(FileNotFoundError):  # before the first save, and between its two renames
                saved = load_checkpoint(tmp_path)["step"]
        time.sleep(0.3 * rng.random())
        process.kill()
        process.join()
        states[" ".join(sorted(os.listdir(tmp_path)))] += 1
        state = load_checkpoint(tmp_path)
        assert (
            not list(tmp_path.glob("*.damaged")) and (state["weights"] == state["step"]).all() and state["step"] > step
        )
        assert DCSSDAE.load(tmp_path / "model.safetensors").config["notes"]["step"] in (
            state["step"],
            state["step"] + 1,
        )
        step = state["step"]
    print(f"\n{kills} kills, {step} saves; what the folder held: {dict(states)}")


# ---------------------------------------------------------------------------------------------------------------------
# distill.py
# One step comes closer to the teacher's several; encoder and latents stay.

@slow
def test_distill_then_evaluate(trained, tmp_path):
    launch = cli if trained.name == "fm" else command  # each program once in a process of its own
    output = launch("distill.py", "--ckpt", trained / "model.safetensors", "--steps", 3, "--batch_size", 4,
                    "--teacher_steps", 3, "--eval_images", 4, "--log_every", 1, "--out", tmp_path / "d",
                    "--device", "cpu", "--workers", 0, "--size", 40)
    assert "mean squared distance of one step to the teacher's 3 steps" in output
    teacher, student = (DCSSDAE.load(folder / "model.safetensors") for folder in (trained, tmp_path / "d"))
    assert all(torch.equal(a, b) for a, b in zip(*(m.encoder.state_dict().values() for m in (teacher, student))))
    assert torch.equal(teacher.decoder.norm_z.running_var, student.decoder.norm_z.running_var)  # latents stay valid
    notes = student.config["notes"]
    assert notes["size"] == 40 and notes["distilled_from_steps"] == 3 and "best" not in notes
    best = DCSSDAE.load(tmp_path / "d" / "best.safetensors")
    assert best.config["notes"]["best"]["step"] == 3
    assert notes["w_lpips"] == 0 and teacher.config["notes"]["size"] == 32
    assert not torch.equal(teacher.decoder.conv_out.weight, student.decoder.conv_out.weight)
    assert [line["step"] for line in step_lines(tmp_path / "d")] == [1, 2, 3]
    assert "mse_to_teacher" in lines_of(tmp_path / "d" / "log.jsonl")[-1]
    output = launch("evaluate.py", "--ckpt", tmp_path / "d" / "model.safetensors", "--data", "demo", "--limit", 4,
                    "--out", tmp_path / "e", "--device", "cpu", "--workers", 0)
    assert "PSNR" in output and "HF ratio" in output


def test_distillation_writes_its_metrics_before_it_compares(tmp_path, checkpoint, monkeypatch):
    def lost(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(distill, "closeness", lost)
    assert "Input/output error" in sentence(
        distill, monkeypatch, "--ckpt", checkpoint, "--steps", 1, "--batch_size", 2, "--teacher_steps", 1,
        "--eval_images", 2, "--device", "cpu", "--dtype", "float32", "--workers", 0, "--w_lpips", 0, "--out", tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text())["images"] == 2


@slow
def test_distillation_brings_one_step_to_the_teacher(tmp_path, smallest):
    """A student that starts from random weights learns the teacher's several steps: enough steps that
    it must get closer."""
    for loss in ("fm", "eqm"):
        torch.manual_seed(0)
        model = randomise(DCSSDAE("dc_f8c4", "XS", loss, enc_width=0.0625, depth=1, input_skip=True,
                                  notes={"size": 16, "w_lpips": 0}), scale=0.7)
        model.save(tmp_path / f"{loss}.safetensors")
        command("distill.py", "--ckpt", tmp_path / f"{loss}.safetensors", "--steps", 14, "--batch_size", 8,
                "--teacher_steps", 4, "--lr", 1e-3, "--warmup", 0, "--decay", 0, "--ema", 0.8, "--eval_images", 8,
                "--out", tmp_path / loss, "--device", "cpu", "--workers", 0)
        distance = json.loads((tmp_path / loss / "metrics.json").read_text())["mse_to_teacher"]
        assert distance["distilled"] < 0.8 * distance["undistilled"], (loss, distance)


@slow
def test_distillation_in_micro_batches_with_evaluations_on_the_way(tmp_path, checkpoint, monkeypatch):
    common = ["--ckpt", checkpoint, "--teacher_steps", 2, "--batch_size", 4, "--steps", 2, "--eval_images", 4,
              "--log_every", 1, "--device", "cpu", "--dtype", "float32", "--workers", 0]
    run_main(distill, monkeypatch, *common, "--out", tmp_path / "a")
    run_main(distill, monkeypatch, *common, "--micro_batch", 3, "--checkpointing", "--eval_every", 1,
             "--out", tmp_path / "b")
    a, b = (DCSSDAE.load(tmp_path / name / "model.safetensors").state_dict() for name in "ab")
    assert all(torch.allclose(v.float(), b[k].float(), atol=2e-4) for k, v in a.items())
    losses_of = [[line["loss"] for line in lines_of(tmp_path / name / "log.jsonl") if "loss" in line] for name in "ab"]
    assert losses_of[0] == pytest.approx(losses_of[1], rel=1e-4)
    assert [line["step"] for line in lines_of(tmp_path / "b" / "log.jsonl") if "eval" in line] == [1, 2]


# ---------------------------------------------------------------------------------------------------------------------
# fid.py: features and Frechet distances
# Inception and DINOv2 against the original code (random weights), distances against numpy and pytorch-fid.

def test_inception_equals_pytorch_fid(inception_file, monkeypatch):
    data.import_torchvision()
    peer = pytest.importorskip("pytorch_fid.inception")
    state = torch.load(inception_file, weights_only=True)
    monkeypatch.setattr(peer, "load_state_dict_from_url", lambda *args, **kwargs: state)
    state |= {k: v for k, v in fid.InceptionFeatures(inception_file).state_dict().items() if k.endswith("tracked")}
    theirs, ours = peer.InceptionV3().eval(), fid.InceptionFeatures(inception_file)
    for h, w in ((64, 64), (256, 256), (299, 299), (40, 70)):
        image = torch.randint(0, 256, (1, 3, h, w), dtype=torch.uint8)
        with torch.no_grad():
            want = theirs(image / 255)[0].flatten(1)
        got = ours(image)
        assert got.shape == (1, 2048) and got.dtype == torch.float32 and want.std() > 0.1
        assert (got - want).norm() / want.norm() < 1e-4
        assert torch.equal(ours(image / 127.5 - 1 + 0.001), got)  # floats are rounded to 8 bit
    assert len(ours.sha256) == 64 and not any(p.requires_grad for p in ours.parameters())


def test_inception_weights_that_cannot_be_had(tmp_path, offline):
    with pytest.raises(FileNotFoundError, match=r"pt_inception-2015-12-05-\w+.pth .*hub/checkpoints.*--inception FILE"):
        fid.InceptionFeatures()
    with pytest.raises(FileNotFoundError, match="missing.pth"):
        fid.InceptionFeatures(tmp_path / "missing.pth")
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save([1], tmp_path / "list.pth")
    for name in ("text.pth", "other.pth", "list.pth"):
        with pytest.raises(ValueError, match=name):
            fid.InceptionFeatures(tmp_path / name)


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
    data.import_torchvision()
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
    (tmp_path / "zip.npz").write_bytes(b"PK\x03\x04 not really")
    for name in ("wrong", "shape", "text", "zip"):
        with pytest.raises(ValueError, match=name):
            fid.Statistics.load(tmp_path / f"{name}.npz")
    data.import_torchvision()
    peer = pytest.importorskip("pytorch_fid.fid_score")
    m, c = peer.compute_statistics_of_path(str(tmp_path / "a.npz"), None, 1, 16, "cpu")
    assert np.array_equal(m, s.mu) and np.array_equal(c, s.sigma)


def test_statistics_that_are_none(tmp_path):
    rng = np.random.default_rng(0)
    skew, negative = np.eye(3), np.eye(3)
    skew[0, 1], negative[2, 2] = 0.5, -1.0
    for sigma in (skew, negative):
        np.savez(tmp_path / "s.npz", mu=np.zeros(3), sigma=sigma)
        with pytest.raises(ValueError, match="no covariance"):
            fid.Statistics.load(tmp_path / "s.npz")
    features = rng.standard_normal((5, 3)).astype(np.float32)
    np.savez(tmp_path / "s.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False).astype(np.float32))
    assert fid.Statistics.load(tmp_path / "s.npz").n is None
    indefinite = np.array([[1.0, 2.0], [2.0, 1.0]])
    with pytest.raises(ValueError, match="negative eigenvalues"):
        fid.frechet_distance(np.zeros(2), indefinite, np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="too large"):
        fid.frechet_distance(np.full(2, 1e300), np.eye(2), np.zeros(2), np.eye(2))


@slow
def test_fid_command(tmp_path, inception_file, monkeypatch, capsys):
    rng = np.random.default_rng(4)
    for folder, sizes in (("a", [(40, 30), (30, 40), (40, 30)]), ("b", [(64, 64), (64, 64)])):
        (tmp_path / folder / "sub").mkdir(parents=True)
        for i, (w, h) in enumerate(sizes):
            name = tmp_path / folder / ("sub" if i else "") / f"{i}.png"
            Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(name)
    (tmp_path / "a" / "broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    one = fid.read_image(tmp_path / "a" / "0.png", 24)
    want = data.prepare_eval(Image.open(tmp_path / "a" / "0.png"), 24)
    assert torch.equal(one, torch.from_numpy(np.array(want)).permute(2, 0, 1))  # --size is evaluate.py's --crop center

    a, b, saved = tmp_path / "a", tmp_path / "b", tmp_path / "a.npz"
    run_main(fid, monkeypatch, a, b, "--inception", inception_file, "--save", saved)
    text, errors = capsys.readouterr()
    number = float(text.split()[1])
    assert number > 0 and "N = 3 and 2" in text and "biased" in text and "rank-deficient" in text
    assert fid.InceptionFeatures(inception_file).sha256 in text and "skipped 1 unreadable" in errors
    assert fid.Statistics.load(saved).n == 3
    small = [tmp_path / "c.npz", tmp_path / "d.npz"]  # pytorch-fid's format, of any dimension
    for path, mean in zip(small, (0, 2), strict=True):
        np.savez(path, mu=np.full(4, float(mean)), sigma=np.eye(4))
    run_main(fid, monkeypatch, *small)
    assert capsys.readouterr().out.startswith("FID 16.0000\nN = unknown and unknown")

    (tmp_path / "empty").mkdir()
    assert "nowhere" in sentence(fid, monkeypatch, tmp_path / "nowhere", b, "--inception", inception_file)
    assert "empty" in sentence(fid, monkeypatch, tmp_path / "empty", b, "--inception", inception_file)
    assert "none.pth" in sentence(fid, monkeypatch, a, b, "--inception", tmp_path / "none.pth")
    assert "no.npz" in sentence(fid, monkeypatch, tmp_path / "no.npz", saved)
    assert cli("fid.py", tmp_path / "no.npz", saved, ok=False).startswith("error: ")
    none = ["--inception", tmp_path / "none.pth"]  # what is said before it is looked for is said before any work
    assert "--batch_size 0" in sentence(fid, monkeypatch, a, b, *none, "--batch_size", 0)
    assert "--size -1" in sentence(fid, monkeypatch, a, b, *none, "--size", -1)
    missing = tmp_path / "missing" / "a.npz"
    assert f"there is no folder {missing.parent}" in sentence(fid, monkeypatch, a, *none, "--save", missing)
    assert "is a folder" in sentence(fid, monkeypatch, a, *none, "--save", tmp_path)
    assert not missing.parent.exists()


def test_fid_reads_images_as_training_does(tmp_path, monkeypatch, capsys):
    """8 and 16 bits of the same grey have distance 0; copies in hidden folders do not count; nor do errors pass."""
    rng = np.random.default_rng(0)
    for folder in ("grey8", "grey16"):
        (tmp_path / folder / ".ipynb_checkpoints").mkdir(parents=True)
    for i in range(4):
        grey = rng.integers(0, 256, (40, 40), dtype=np.uint8)
        Image.fromarray(grey).save(tmp_path / "grey8" / f"{i}.png")
        Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "grey16" / f"{i}.png")
        Image.fromarray(255 - grey).save(tmp_path / "grey8" / ".ipynb_checkpoints" / f"{i}.png")
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (fid.read_image(tmp_path / "clear.png") == 255).all()  # transparency over white
    network = TinyInception()
    network.forward = functools.partial(fid.on_8bit(TinyInception.forward), network)
    one, two = (fid.folder_statistics(str(tmp_path / folder), network) for folder in ("grey8", "grey16"))
    assert one.n == two.n == 4 and fid.frechet_distance(one.mu, one.sigma, two.mu, two.sigma) < 1e-9
    assert one.mu.std() > 0
    failing_open(monkeypatch, errno.ESTALE, times=1000)
    monkeypatch.setattr(fid, "InceptionFeatures", TinyInception)
    assert os.strerror(errno.ESTALE) in sentence(fid, monkeypatch, tmp_path / "grey8", tmp_path / "grey16",
                                                 "--save", tmp_path / "a.npz")
    assert not (tmp_path / "a.npz").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_dinov2_features_are_those_of_the_original_code(tmp_path, monkeypatch, offline):
    """Two of the 24 blocks, random weights: written out here after DINOv2's vision_transformer.py."""
    data.import_torchvision()
    timm = pytest.importorskip("timm")
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, depth=2))
    state = fid.empty_network(timm, "vit_large_patch14_dinov2.lvd142m", num_classes=0).state_dict()
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
    digest = hashlib.sha256((tmp_path / "original.pth").read_bytes()).hexdigest()
    assert network.dim == 1024 and network.sha256 == digest

    save_file(p, tmp_path / "timm.safetensors")  # timm's layout and format: the same network
    assert torch.equal(fid.load_features("dinov2", dinov2=tmp_path / "timm.safetensors")(image), got)
    torch.save({k: v for k, v in p.items() if k != "norm.bias"}, tmp_path / "part.pth")
    with pytest.raises(ValueError, match="part.pth does not hold the weights of DINOv2"):
        fid.DINOv2Features(tmp_path / "part.pth")
    with pytest.raises(FileNotFoundError, match="missing.pth"):
        fid.DINOv2Features(tmp_path / "missing.pth")
    with pytest.raises(FileNotFoundError, match=r"dinov2_vitl14_pretrain.pth .*fbaipublicfiles.*--dinov2 FILE"):
        fid.DINOv2Features()
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="timm"):
        fid.DINOv2Features(tmp_path / "original.pth")


@pytest.mark.parametrize("name", ["resnet10t.c3_in1k",
                                  "mobilenetv3_small_050.lamb_in1k",           # a layer before the classifier
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
    for name, tensors, words in (("nonesuch", net.state_dict(), "timm knows no network nonesuch"),
                                 ("resnet10t", {"weight": torch.zeros(3)}, "does not hold the weights")):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=words):
            fid.load_features(str(tmp_path / f"{name}.safetensors"))


class Bomb(nn.Module):
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_features_from_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    net = script(tmp_path / "mine.ts")
    network = fid.load_features("mine.ts", size=24)
    image = torch.randint(0, 256, (3, 3, 24, 24), dtype=torch.uint8)
    with torch.no_grad():
        want = net(image / 255 * 2 - 1)
    assert network.dim == 5 and torch.allclose(network(image), want, atol=1e-6)
    assert network.sha256 == hashlib.sha256((tmp_path / "mine.ts").read_bytes()).hexdigest()

    torch.save(Bomb(), "bomb.ts")
    (tmp_path / "text.ts").write_text("hello")
    script("map.ts", module=nn.Conv2d(3, 4, 3))
    script("fixed.ts", module=nn.Sequential(nn.Flatten(0), nn.Linear(2 * 3 * 16 * 16, 4)))
    for name in ("bomb.ts", "text.ts", "map.ts", "fixed.ts"):
        with pytest.raises(ValueError, match=f"{name} is refused.*TorchScript") as stop:
            fid.load_features(name, size=16)
        assert "\n" not in str(stop.value)
    assert not os.path.exists("exploded")
    with pytest.raises(FileNotFoundError, match="neither inception nor dinov2 nor a file"):
        fid.load_features("none.ts")

    for name, n in (("a", 6), ("b", 5)):
        folder_of(tmp_path / name, n, (24, 24))
    Image.fromarray(np.zeros((24, 24, 3), np.uint8)).save(tmp_path / "b" / "black.png")
    run_main(fid, monkeypatch, "a", "b", "--features", "mine.ts")
    text = capsys.readouterr().out
    images = [[np.array(Image.open(file)) for file in sorted((tmp_path / name).iterdir())] for name in "ab"]
    f = [net(torch.from_numpy(np.stack(x)).permute(0, 3, 1, 2) / 127.5 - 1).detach().numpy() for x in images]
    want = fid.frechet_distance(*(s for x in f for s in (x.mean(0), np.cov(x, rowvar=False))))
    assert want > 1e-3 and float(re.match(r"FD mine ([\d.]+)\n", text)[1]) == pytest.approx(want, abs=6e-5)
    assert f"mine.ts sha256 {network.sha256}" in text and "N = 6 and 6" in text and "biased" in text
    assert "refused" in sentence(fid, monkeypatch, "a", "b", "--features", "text.ts")


# ---------------------------------------------------------------------------------------------------------------------
# evaluate.py
# The numbers of the tables, in any batches and processes, with and without networks; own pictures.

def test_size_0_and_a_damaged_manifest_are_refused(tmp_path, checkpoint, monkeypatch):
    common = ["--ckpt", checkpoint, "--device", "cpu"]
    assert "--size 0" in sentence(distill, monkeypatch, *common, "--size", 0, "--out", tmp_path / "d")
    assert "--size 0" in sentence(evaluate, monkeypatch, *common, "--size", 0, "--workers", 0)
    (tmp_path / "manifest.json").write_text("[1")
    assert "is damaged" in sentence(latents, monkeypatch, *common, "--limit", 2, "--workers", 0, "--out", tmp_path)


def refuse(name):
    """For json.loads: strict JSON has no such number."""
    raise AssertionError(name)


class FailingInception(nn.Module):
    """A network that is found but fails in the pass."""
    dim, sha256 = 4, "1" * 64

    def __init__(self, weights=None):
        super().__init__()

    def forward(self, x):
        raise RuntimeError("no kernel for this image")


def test_results_survive_a_cache_and_a_row_that_fail(tmp_path, checkpoint, offline, monkeypatch, capsys):
    monkeypatch.setattr(fid, "InceptionFeatures", TinyInception)
    run_main(evaluate, monkeypatch, "--ckpt", checkpoint, "--limit", 3, "--workers", 0, "--device", "cpu", "--steps", 1,
             2, "--eta", 1e38, "--cache", "/dev/null/cache", "--lpips_net", "vgg", "--out", tmp_path / "o")
    shown = capsys.readouterr()
    report = json.loads((tmp_path / "o" / "metrics.json").read_text(), parse_constant=refuse)
    assert report["rows"][0]["rfid"] is not None and "not kept in --cache" in shown.err
    row = report["rows"][3]
    assert row["name"] == "2 steps" and row["psnr"] is row["rfid"] is row["ssim"] is None
    line = next(line for line in shown.out.splitlines() if line.startswith("2 steps"))
    assert set(line.split()[3:-1]) == {"-"} and float(line.split()[-1]) > 0  # NFE and time are there


def test_results_survive_a_picture_a_metric_and_a_terminal_that_fail(tmp_path, checkpoint, offline, monkeypatch,
                                                                     capsys):
    """Metrics are on the disk before anything is shown, and what cannot be shown is a warning."""
    def no_space(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(fid, "InceptionFeatures", FailingInception)
    monkeypatch.setattr(evaluate, "save_grid", no_space)
    monkeypatch.setattr(sys, "stdout", Gone())
    written = []
    monkeypatch.setattr(evaluate, "print_table", lambda result: written.extend(os.listdir(tmp_path / "o")))
    run_main(evaluate, monkeypatch, "--ckpt", checkpoint, "--limit", 3, "--workers", 0, "--device", "cpu",
             "--cache", tmp_path / "c", "--lpips_net", "vgg", "--out", tmp_path / "o")
    errors = capsys.readouterr().err
    report = json.loads((tmp_path / "o" / "metrics.json").read_text(), parse_constant=refuse)
    assert all(row["rfid"] is None and row["psnr"] > 0 for row in report["rows"]) and written == ["metrics.json"]
    for words in ("could not write reconstructions.png: [Errno 28] No space left", "what follows is not shown: ",
                  "a metric is left out, FailingInception fails: no kernel", "not kept in --cache"):
        assert words in errors
    assert not list(tmp_path.glob("c/*")) and not list(tmp_path.glob("o/*.tmp"))


def test_a_network_that_fails_gives_nan_and_is_named_once(capsys):
    def broken(*images):
        raise RuntimeError("out of luck\nand more")

    broken.dim = 5
    x = torch.zeros(2, 3, 8, 8)
    for _ in range(2):
        assert fid.or_nan(broken, x, x).isnan().all() and fid.or_nan(broken, x, x).shape == (2,)
        assert fid.or_nan(broken, x).isnan().all() and fid.or_nan(broken, x).shape == (2, 5)
    assert capsys.readouterr().err == "warning: a metric is left out, function fails: out of luck\n"
    statistics = fid.Statistics(5)
    statistics.update(fid.or_nan(broken, x))
    assert fid.distance_or_none(statistics, statistics) is None
    assert fid.or_nan(lambda x, y: (x - y).sum((1, 2, 3)), x, x).tolist() == [0, 0]


@pytest.mark.skipif(os.name != "posix", reason="shells are POSIX's")
@pytest.mark.parametrize("shell", ["{} | true", "{} >&- 2>&-"])
def test_a_program_without_a_terminal_does_its_work(tmp_path, shell):
    """A pipe that nobody reads, and nothing at all: to the very end, where buffers are emptied."""
    program = f"{sys.executable} {HERE}/data.py --size 8 --rows 2 --out {tmp_path}/grid.png"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", shell.format(program)], capture_output=True, text=True,
                          check=False, env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore"))
    assert done.returncode == 0 and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert Image.open(tmp_path / "grid.png").size == (22, 22)


def test_names_that_the_terminal_cannot_encode_are_escaped():
    inner = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    print("a\u2192\udcff", file=data.Terminal(inner), flush=True)
    assert inner.buffer.getvalue() == b"a\\u2192\\udcff\n"


def test_targets_that_cannot_be_written_are_found_before_the_work(tmp_path, checkpoint, monkeypatch):
    """A folder that cannot be made, and a folder in the place of a file: said before the data is looked for."""
    (tmp_path / "file").write_text("")
    common = ["--ckpt", checkpoint, "--device", "cpu", "--data", tmp_path / "nowhere"]
    training = ["--device", "cpu", "--data", tmp_path / "nowhere", "--w_lpips", 0, "--w_repa", 0]
    picture = tmp_path / "a.png"
    programs = [  # module, arguments, a file that it would write
        (evaluate, common, "metrics.json"), (evaluate, common, "reconstructions.png"),
        (evaluate, [*common[:4], "--images", picture], "a.png.reconstruction.png"), (sweep, common, "sweep.csv"),
        (field, common, "field.png"), (latents, common, "manifest.json"),
        (train, ["--preset", "tiny", *training], "reconstructions.png"),
        (distill, ["--ckpt", checkpoint, *training], "metrics.json")]
    if importlib.util.find_spec("matplotlib"):
        programs.append((compare, [tmp_path / "nowhere", "--plot"], "curves.png"))
    for module, argv, name in programs:
        def stop(out, module=module, argv=argv):
            if module is train:
                with pytest.raises((OSError, ValueError)) as stop:
                    run_main(module, monkeypatch, *argv, "--out", out)
                return str(stop.value)
            return sentence(module, monkeypatch, *argv, "--out", out)

        assert f"nothing can be written into {tmp_path}/file/out (Not a directory)" in stop(tmp_path / "file" / "out")
        out = tmp_path / f"{module.__name__}_{name}"
        (out / name).mkdir(parents=True)
        assert f"{out}/{name} is no ordinary file" in stop(out)
        assert {path.name for path in out.iterdir()} <= {name, ".lock"}
    for out, words in ((tmp_path / "file" / "g.png", "Not a directory"), (tmp_path, "is no ordinary file"),
                       ("/dev/null", "is no ordinary file")):
        with pytest.raises(OSError, match=words):
            run_main(data, monkeypatch, "--data", tmp_path / "nowhere", "--out", out)
    assert "/dev/null is no ordinary file" in sentence(fid, monkeypatch, tmp_path, "--save", "/dev/null")
    assert os.path.exists("/dev/null") and not os.path.isfile("/dev/null")


def test_numbers_that_are_not_finite_are_empty_in_every_file(tmp_path, monkeypatch):
    rows = [{"name": "a", "psnr": math.nan, "hf": math.inf}, {"name": "b", "psnr": 1.5, "hf": None}]
    assert sweep.csv_text(rows) == "name,psnr,hf\na,,\nb,1.5,\n"
    log = tmp_path / "log.jsonl"
    train.append_log(log, None, 3, loss=math.nan, eval=[{"name": "a", "psnr": -math.inf}])
    line = json.loads(log.read_text(), parse_constant=refuse)
    assert line == {"step": 3, "loss": None, "eval": [{"name": "a", "psnr": None}]}
    data.write_json(tmp_path / "m.json", {"a": [math.nan, 1], "b": {"c": math.inf}})
    assert json.loads((tmp_path / "m.json").read_text(), parse_constant=refuse) == {"a": [None, 1], "b": {"c": None}}
    # What reads them knows: a run that diverged has no gain, and fewer points on its curves.
    run = write_run(tmp_path / "run", 1.0, rate=20.0)
    for path in (run / "metrics.json", run / "log.jsonl"):
        path.write_text(path.read_text().replace('"psnr": 21.0', '"psnr": null').replace('"eqm": 12.0', '"eqm": null'))
    read = compare.read_run(run)
    assert read["rows"][-1]["gain"] is None and read["curves"] == ([(500, 5)], [])


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


def test_evaluate_gives_the_expected_numbers():
    x = demo_batch(6, 32)
    result = evaluate.evaluate(FakeAutoencoder(), batches_of(x, 4), steps=(1, 4),
                               distances={"lpips_vgg": lambda a, b: (a - b).abs().mean((1, 2, 3))})
    baseline, linear, one, four = result["rows"]
    assert result["images"] == 6 and [row["steps"] for row in result["rows"]] == [0, 0, 1, 4]
    assert one["psnr"] == pytest.approx(100) and one["ssim"] == pytest.approx(1) and one["hf"] == pytest.approx(1)
    assert one["lpips_vgg"] == 0 and one["psnr_se"] == 0 and one["ms"] > 0 and "rfid" not in one
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
    mse = (losses.to8bit(code.decode(code.encode(x))) - losses.to8bit(x)).square().mean((1, 2, 3))
    assert linear["psnr"] == pytest.approx(float(losses.psnr(mse).mean()), abs=1e-4)
    assert one["cells"] == pytest.approx(1) and 0.5 < linear["cells"] < 2
    cells = F.avg_pool2d(x, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    flat = evaluate.evaluate(FakeAutoencoder(lambda z, *_: cells[:len(z)]), [(x, torch.arange(6))])["rows"][2]
    assert flat["cells"] is None  # no step at all but at the borders: not a number
    mixed = evaluate.evaluate(FakeAutoencoder(lambda z, *_: (z + cells) / 2), [(x, torch.arange(6))])["rows"][2]
    assert mixed["cells"] > 2

    blurred = evaluate.evaluate(FakeAutoencoder(lambda z, *_: F.avg_pool2d(z, 3, 1, 1)), batches_of(x, 4))["rows"][2]
    assert baseline["psnr"] < blurred["psnr"] < 60 and blurred["hf"] < 0.5
    brighter = FakeAutoencoder(lambda z, *_: z + 2 / 255)  # by one level
    bright = evaluate.evaluate(brighter, batches_of(x.clamp(-1, 0.9), 4))["rows"][2]
    assert bright["psnr"] == pytest.approx(20 * math.log10(255), abs=0.3)
    with pytest.raises(ValueError, match="not one image"):
        evaluate.evaluate(FakeAutoencoder(), [])
    with pytest.raises(ValueError, match="twice"):
        evaluate.evaluate(FakeAutoencoder(), batches_of(x, 3)[:1] * 2)


def test_noise_depends_on_seed_and_index_alone():
    x = demo_batch(5, 16)
    noisy = FakeAutoencoder(lambda z, noise, steps: z + 0.2 * noise)
    values = [evaluate.evaluate(noisy, batches_of(x, batch), seed=seed)["rows"][2]["psnr"]
              for batch, seed in ((5, 0), (2, 0), (5, 1))]
    assert values[0] == pytest.approx(values[1], rel=1e-7) and values[0] != values[2]
    a, b = sampler.image_noise(0, [3, 2**33], (3, 8, 8))
    assert torch.equal(a, sampler.image_noise(0, torch.tensor([3]), (3, 8, 8))[0]) and not torch.equal(a, b)


def test_rfid_of_a_perfect_decoder_is_zero_and_originals_are_reused():
    x, network = demo_batch(3, 16), TinyInception()
    result = evaluate.evaluate(FakeAutoencoder(), batches_of(x, 2), features={"rfid": network})
    baseline, _, one = (row["rfid"] for row in result["rows"])
    assert baseline > 1e-4 and 0 <= one < 1e-9
    again = evaluate.evaluate(FakeAutoencoder(), batches_of(x, 2), features={"rfid": network},
                              originals=result["originals"])
    assert again["rows"][0]["rfid"] == pytest.approx(baseline, rel=1e-6)
    with pytest.raises(ValueError, match="3 originals for 2 images"):
        evaluate.evaluate(FakeAutoencoder(), batches_of(x[:2], 2), features={"rfid": network},
                          originals=result["originals"])


def test_two_processes_equal_one(tmp_path, checkpoint):
    """7 images, which 2 processes do not divide, and a broken file: everything but the time is the same."""
    (tmp_path / "images").mkdir()
    for i in range(8):
        Image.fromarray(data.demo_image(32, 0, "val", i)).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "images" / "0.png").write_bytes((tmp_path / "images" / "0.png").read_bytes()[:200])
    runs, reports = [], []
    for n in (1, 2):
        # batches of 1: other batch sizes round convolutions differently, and a level may flip
        runs.append(aside(
            run, tmp_path / f"o{n}", "--ckpt", checkpoint, "--data", tmp_path / "images", "--steps", 1, 3,
            "--batch_size", 1, "--workers", 0, "--device", "cpu", "--cache", tmp_path / f"cache{n}", "--out",
            tmp_path / str(n), module="evaluate", world=n,
            env={**offline_environment(tmp_path), "TINY_INCEPTION": "1"}))
    for n, each in zip((1, 2), runs, strict=True):
        each.result()
        reports.append(json.loads((tmp_path / str(n) / "metrics.json").read_text()))
    one, two = reports
    assert one["images"] == two["images"] == 7 and one["skipped"] == two["skipped"] == 1
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert a.keys() == b.keys() and {"psnr", "psnr_pooled", "ssim", "hf", "rfid", "psnr_se"} <= a.keys()
        for key in a.keys() - {"ms"}:
            assert b[key] == (a[key] if isinstance(a[key], (str, type(None))) else pytest.approx(a[key], rel=1e-6)), key
    pictures = [np.asarray(Image.open(tmp_path / n / "reconstructions.png")) for n in "12"]
    assert np.array_equal(*pictures)


def test_evaluate_command_reports_what_is_unavailable(tmp_path, checkpoint, offline, monkeypatch, capsys):
    common = ["--ckpt", checkpoint, "--data", "demo", "--limit", 3, "--workers", 0, "--device", "cpu",
              "--out", tmp_path / "o"]
    run_main(evaluate, monkeypatch, *common, "--steps", 1, 2, "--dtype", "bf16")
    text = capsys.readouterr().out
    report = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert set(report["unavailable"]) == {"lpips_vgg", "lpips_alex", "rfid"}
    for row in report["rows"]:
        assert row["rfid"] is None and row["lpips_vgg"] is None and row["psnr"] > 0
    assert "rFID: unavailable: pt_inception" in text and "LPIPS alex: unavailable: " in text and "protocol: 3 " in text
    assert "shrink/enlarge x 8" in text and "2 steps" in text
    assert Image.open(tmp_path / "o" / "reconstructions.png").height > 4 * 32  # originals, baseline, 1 and 2 steps

    # With a network, and twice: the second run takes the originals' statistics from the cache.
    monkeypatch.setattr(fid, "InceptionFeatures", TinyInception)
    rfid = []
    for _ in range(2):
        run_main(evaluate, monkeypatch, *common, "--cache", tmp_path / "c", "--lpips_net", "vgg")
        rfid.append([row["rfid"] for row in json.loads((tmp_path / "o" / "metrics.json").read_text())["rows"]])
        assert len(os.listdir(tmp_path / "c")) == 1
    assert rfid[0] == pytest.approx(rfid[1], rel=1e-6) and rfid[0][1] > 0
    text = capsys.readouterr().out
    assert "rFID (biased, N=3)" in text and "sha256 " + "0" * 64 in text
    run_main(evaluate, monkeypatch, *common[:4], "--limit", 2, *common[6:], "--cache", tmp_path / "c",
             "--lpips_net", "vgg")
    assert len(os.listdir(tmp_path / "c")) == 2  # other originals, another file


def test_statistics_of_an_incomplete_pass_are_not_kept(tmp_path, checkpoint, offline, monkeypatch, capsys):
    monkeypatch.setattr(fid, "InceptionFeatures", TinyInception)
    monkeypatch.setattr(data, "PAUSES", (0,))
    images, cache = Path(folder_of(tmp_path / "images", 4, (32, 32))), tmp_path / "c"
    (images / "04.png").symlink_to(tmp_path / "deleted.png")
    command = ["--ckpt", checkpoint, "--data", images, "--workers", 0, "--device", "cpu", "--cache", cache,
               "--lpips_net", "vgg", "--out", tmp_path / "o"]
    run_main(evaluate, monkeypatch, *command)
    assert not cache.exists() and "1 images are missing" in capsys.readouterr().out
    photo(32, 32, 4).save(tmp_path / "deleted.png")
    run_main(evaluate, monkeypatch, *command)
    (entry,) = cache.iterdir()
    whole = fid.Statistics.load(entry)
    entry.write_bytes(entry.read_bytes()[:-100])  # and damaged ones are replaced
    capsys.readouterr()
    run_main(evaluate, monkeypatch, *command)
    again = fid.Statistics.load(entry)
    assert "computed again" in capsys.readouterr().err and np.array_equal(again.sigma, whole.sigma)


def test_evaluate_command_stops_with_one_sentence(tmp_path, checkpoint, offline, monkeypatch):
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "empty").mkdir()
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")

    def stop(*argv):
        return sentence(evaluate, monkeypatch, *argv, "--workers", 0, "--device", "cpu")

    assert "none.safetensors" in stop("--ckpt", tmp_path / "none.safetensors")
    assert "text.safetensors" in stop("--ckpt", tmp_path / "text.safetensors")
    assert "other.pt" in stop("--ckpt", tmp_path / "other.pt")
    assert "--size 100" in stop("--ckpt", checkpoint, "--size", 100)
    assert "nowhere" in stop("--ckpt", checkpoint, "--data", tmp_path / "nowhere")
    assert "empty" in stop("--ckpt", checkpoint, "--data", tmp_path / "empty")
    assert "--sampler euler" in stop("--ckpt", checkpoint, "--sampler", "euler")
    assert "t_shift" in stop("--ckpt", checkpoint, "--t_shift", 2, "--limit", 1)
    assert "--lpips_weights" in stop("--ckpt", checkpoint, "--lpips_net", "vgg", "alex", "--lpips_weights", "f.pth")
    assert "none.pth" in stop("--ckpt", checkpoint, "--inception", tmp_path / "none.pth")
    assert "--device" in sentence(evaluate, monkeypatch, "--ckpt", checkpoint, "--device", "abacus")
    assert cli("evaluate.py", "--ckpt", tmp_path / "none", ok=False).startswith("error: ")


@pytest.mark.parametrize(("argv", "words"), [
    (["--bench", "decode", "--size", 256], "--bench is now python -m tools.bench"),
    (["--bench"], "--bench is now python -m tools.bench"),
    (["--ckpt", "f", "--sweep", 1, 2, "--plot"], "--sweep is now python -m tools.sweep"),
    (["--compare", "runs/a", "--plot"], "--compare is now python -m tools.compare"),
    (["--ckpt", "f", "--field"], "--field is now python -m tools.field"),
    (["--latents=d", "--ckpt", "f", "--flip"], "--latents is now python -m tools.latents --out"),
    (["--latents_sample"], "--latents_sample is now python -m tools.latents --sample"),
    (["--z_stats"], "--z_stats is now python -m tools.latents --z_stats"),
    (["--flip"], "--flip is now an option of python -m tools.latents"),
    (["--dec", "S"], "--dec is now an option of python -m tools.bench"),
    (["--plot"], "--plot is now an option of python -m tools.sweep and of python -m tools.compare"),
])
def test_flags_that_moved_say_where_they_are(monkeypatch, argv, words):
    assert sentence(evaluate, monkeypatch, *argv) == f"error: {words}"


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_several_features_and_dreamsim_in_one_pass(tmp_path, checkpoint, offline, monkeypatch, capsys):
    script(tmp_path / "mine.ts")
    calls = []

    def dreamsim(pretrained, device, cache_dir):
        assert pretrained and device == "cpu" and cache_dir.startswith(str(tmp_path))

        def network(x, y):
            assert x.shape[1:] == y.shape[1:] == (3, 224, 224) and 0 <= x.min() and y.max() <= 1
            calls.append(len(x))
            return (x - y).abs().mean((1, 2, 3)).squeeze()  # the package gives () for one image
        return network, None

    monkeypatch.setitem(sys.modules, "dreamsim", types.SimpleNamespace(dreamsim=dreamsim))
    monkeypatch.setattr(fid, "InceptionFeatures", TinyInception)
    command = ["--ckpt", checkpoint, "--limit", 5, "--batch_size", 4, "--workers", 0, "--device", "cpu", "--out",
               tmp_path / "o", "--cache", tmp_path / "c", "--features", "inception", tmp_path / "mine.ts", "dinov2",
               "--dreamsim"]
    rows = []
    for _ in range(2):  # the second time with the cached statistics of the originals: one file a network
        run_main(evaluate, monkeypatch, *command)
        report = json.loads((tmp_path / "o" / "metrics.json").read_text())
        rows.append(report["rows"])
        assert len(os.listdir(tmp_path / "c")) == 2
    text = capsys.readouterr().out
    for head in ("rFID (biased, N=5)", "FD mine (biased, N=5)", "FD-DINOv2: unavailable: dinov2_vitl14", "DreamSim",
                 "inception features sha256 " + "0" * 64, "mine.ts features sha256 ", "; dreamsim; "):
        assert head in text
    for a, b in zip(*rows, strict=True):
        assert a["rfid"] > 0 and a["fd_mine"] > 0 and a["fd_dinov2"] is None
        assert (a["rfid"], a["fd_mine"]) == (pytest.approx(b["rfid"], rel=1e-6), pytest.approx(b["fd_mine"], rel=1e-6))
    assert calls == [4, 4, 4, 1, 1, 1] * 2  # baseline, linear code and one step, batches of 4 and 1
    x = torch.stack([data.make_dataset("demo", 32, False, limit=5)[i][0] for i in range(5)])
    y = losses.to8bit(losses.shrink_enlarge(x, 8))
    small = [F.interpolate(v / 2 + 0.5, (224, 224), mode="bicubic", antialias=True).clamp(0, 1) for v in (x, y)]
    want = (small[0] - small[1]).abs().mean((1, 2, 3))
    assert rows[0][0]["dreamsim"] == pytest.approx(float(want.mean()), rel=1e-4)
    assert rows[0][0]["dreamsim_se"] == pytest.approx(float(want.std() / 5**0.5), rel=1e-3)
    monkeypatch.setitem(sys.modules, "dreamsim", None)
    run_main(evaluate, monkeypatch, *command[:-5], "--dreamsim", "--features")
    text = capsys.readouterr().out
    assert "DreamSim: unavailable: " in text and "pip install dreamsim" in text and "FID" not in text
    assert "two of one name" in sentence(evaluate, monkeypatch, *command, "--features", "a/x.ts", "b/x.ts")


def test_the_model_in_the_tree_is_above_the_linear_code():
    model = DCSSDAE.load(os.path.join(HERE, "examples", "f32c32.safetensors"))
    dataset = data.make_dataset("demo", 64, train=False, limit=16)
    x = torch.stack([dataset[i][0] for i in range(16)])
    with torch.no_grad():
        z = model.encode(x).mode()
        y = model.decode(z, 1, torch.randn_like(x)).clamp(-1, 1)
        code = LappedCode(32, 32)
        linear = code.decode(code.encode(x)).clamp(-1, 1)
    errors = [(image - x).square().mean((1, 2, 3)) for image in (linear, y)]
    gain = 10 * torch.log10(errors[0] / errors[1])
    assert gain.mean() > 0.5 and (gain > 0).sum() > 12


def test_own_pictures(tmp_path, checkpoint, monkeypatch, capsys):
    sizes = {"a.png": (37, 50), "b.jpg": (64, 24), "c.webp": (5, 3)}
    for k, (name, size) in enumerate(sizes.items()):
        photo(*size, seed=k).save(tmp_path / name)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    files = [tmp_path / name for name in ("a.png", "broken.jpg", "b.jpg", "none.png", "c.webp")]
    before = (tmp_path / "a.png").read_bytes()
    run_main(evaluate, monkeypatch, "--ckpt", checkpoint, "--images", files[0], "--out", tmp_path / "bf16", "--device",
             "cpu", "--dtype", "bf16")
    assert "PSNR" in capsys.readouterr().out and os.listdir(tmp_path / "bf16") == ["a.png.reconstruction.png"]
    message = sentence(evaluate, monkeypatch, "--ckpt", checkpoint, "--images", *files, "--steps", 2, "--out", tmp_path,
                       "--device", "cpu")
    assert message.startswith("error: 2 of 5 --images could not be read: ")
    assert "broken.jpg" in message and "none.png" in message
    lines = capsys.readouterr().out.splitlines()
    model = DCSSDAE.load(checkpoint)
    assert len(lines) == 3 and (tmp_path / "a.png").read_bytes() == before
    for line, (name, (w, h)), k in zip(lines, sizes.items(), (0, 2, 4), strict=True):
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
    assert "one name" in sentence(evaluate, monkeypatch, "--ckpt", checkpoint, "--images", "a.png", "sub/a.png",
                                  "--device", "cpu")


def test_evaluate_help_is_in_groups(monkeypatch, capsys):
    with contextlib.suppress(SystemExit):
        run_main(evaluate, monkeypatch, "--help")
    text = capsys.readouterr().out
    for title in ("data:", "sampler:", "metrics that need a network:"):
        assert f"\n{title}\n" in text
    assert all(flag in text for flag in ("--features", "--dreamsim", "--images"))
    assert not any(flag in text for flag in evaluate.MOVED)


# ---------------------------------------------------------------------------------------------------------------------
# model.py, train.py: what GPUs need, shown on a CPU
# Maps stay channels last, nothing is copied from the host, one late read a step, compiled block by block.

@pytest.mark.parametrize("name", ["forward_sync_buffers", "broadcast_buffers"])
def test_ddp_gets_no_deprecated_options(monkeypatch, name):
    def ddp(module, gradient_as_bucket_view=False, **options):
        return gradient_as_bucket_view, options

    parameters = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in ("gradient_as_bucket_view", name)]
    ddp.__signature__ = inspect.Signature(parameters)
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", ddp)
    assert train.data_parallel(None, 2) == (True, {name: False})


class GpuLayouts(TorchDispatchMode):
    """Layouts as on a GPU, whose pixel_unshuffle and group norm return NCHW; the convolutions that get NCHW, and those
    whose backward pass does."""

    def __init__(self):
        super().__init__()
        self.convolutions, self.forward, self.backward = 0, [], []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        name = function.overloadpacket.__name__
        if name == "pixel_unshuffle":
            out = out.contiguous()
        elif name == "native_group_norm":
            out = (out[0].contiguous(), *out[1:])
        elif name == "convolution":
            self.convolutions += 1
            if not arguments[0].is_contiguous(memory_format=torch.channels_last):
                self.forward.append(arguments[0].shape)
        elif name == "convolution_backward":
            for t in arguments[:2]:
                if t.stride(1) != 1 and not t.is_contiguous(memory_format=torch.channels_last):
                    self.backward.append(t.shape)
        return out


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The forms that GPUs and compilers get, on the CPU."""
    for module in (encoder_module, model_module):
        monkeypatch.setattr(module, "eager_cpu", lambda x: False)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("part", ["dc_f32c32", "vq_f8c4", "dcae_f32c32", "dcae_f32c32_sana", "fm", "eqm"])
def test_no_convolution_turns_a_map_round_on_a_gpu(part, trains, as_on_a_gpu):
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    if part in ("fm", "eqm"):
        network = UViT("XS", 4, part == "fm", depth=1, base=(8, 4) if part == "eqm" else None)
        arguments = (x, torch.randn(2, 4, 8, 8), *([torch.rand(2)] if part == "fm" else []))
        outputs = network
    else:
        network, arguments = make_encoder(part, 0.125), (x,)
        outputs = lambda x: network(x).mean  # noqa: E731
    network.to(memory_format=torch.channels_last).requires_grad_(trains)
    with GpuLayouts() as layouts:
        y = outputs(*arguments)
        if trains:
            y.square().sum().backward()
    assert layouts.convolutions > 30 and layouts.forward == []
    # what is left are gradients of latents, and of an attention's q, k and v
    is_attention = part.startswith("dcae")
    assert all(max(shape[2:]) <= 8 for shape in layouts.backward) and (is_attention or len(layouts.backward) <= 1)


@pytest.mark.parametrize("name", ["vq_f8c4", "dc_f16c4"])
def test_the_forms_for_gpus_equal_those_for_cpus(name, monkeypatch):
    x = torch.randn(1, 3, 32, 48, dtype=torch.float64)
    network = randomise(make_encoder(name, 0.25 if name == "vq_f8c4" else 0.0625)).double()
    decoder = randomise(UViT("XS", 4, depth=1)).double()
    found = []
    for is_cpu in (True, False):
        for module in (encoder_module, model_module):
            monkeypatch.setattr(module, "eager_cpu", lambda x, is_cpu=is_cpu: is_cpu)
        parameters = [*network.parameters(), *decoder.parameters()]
        z = network(x).mode().double()
        y = decoder(x, z, torch.tensor([0.3]).double())
        found.append([z, y, *torch.autograd.grad(y.square().sum() + z.sum(), parameters, allow_unused=True)])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).norm() <= 1e-6 * (b.norm() + 1e-3)  # some are 0 but for rounding


@slow
def test_the_gpus_norm_equals_the_plain_form():
    """On a GPU, or in Triton's interpreter, which is chosen before anything imports Triton."""
    pytest.importorskip("triton")
    env = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    checks = []
    for name in ("check_gpu_norm", "check_blocks_with_gpu_norm"):
        command = [sys.executable, "-c", f"import test_all; test_all.{name}()"]
        checks.append(aside(subprocess.run, command, cwd=HERE, env=env, check=True, timeout=300))
    for each in checks:
        each.result()


def check_gpu_norm():
    """Tiles that do not divide the map, groups of any width, large means, and scales for all images or for each."""
    from kernels import GpuNormSiLU
    torch.manual_seed(0)
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    for batch, channels, groups, h, w, cells, offset in (
            (2, 64, 32, 4, 6, (2, 2, 3), 0.0), (2, 64, 8, 4, 6, (1, 1, 1), 3.0), (2, 40, 5, 8, 8, (2, 8, 8), 0.0),
            (1, 160, 20, 5, 6, (1, 1, 1), 5.0), (1, 32, 4, 33, 10, (1, 1, 1), 0.0)):
        x = torch.randn(batch, channels, h, w) + offset * torch.randn(1, channels, 1, 1)
        x = x.to(memory_format=torch.channels_last)
        scale = 1 + torch.randn(cells[0], channels, *cells[1:]) / 2
        shift, grad = torch.randn_like(scale), torch.randn_like(x)
        for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 5e-3)):
            inputs = [t.to(dtype).requires_grad_() for t in (x, scale, shift)]
            y = GpuNormSiLU.apply(*inputs, groups, 1e-5)
            exact = [t.detach().double().requires_grad_() for t in inputs]
            plain = model_module.plain_norm_silu(*exact, groups, 1e-5)
            assert y.dtype is dtype and y.is_contiguous(memory_format=torch.channels_last)
            found = [y, *torch.autograd.grad(y, inputs, grad.to(dtype))]
            expected = [plain, *torch.autograd.grad(plain, exact, grad.to(dtype).double())]
            for a, b in zip(found, expected, strict=True):
                assert relative_error(a, b) < limit
    x = torch.randn(1, 32, 2, 2, requires_grad=True)
    y = GpuNormSiLU.apply(x, torch.ones(1, 32, 1, 1), torch.zeros(1, 32, 1, 1), 8, 1e-5)
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):  # rather than a gradient without this part
        slope.square().sum().backward()


def check_blocks_with_gpu_norm():
    """Outputs and gradients of the blocks that have such norms stay what they are."""
    import kernels
    calls = []

    def counted(x):
        calls.append(x.shape)
        return kernels

    x, modulation = torch.randn(1, 64, 4, 6), torch.randn(1, 128, 2, 3)
    for block, arguments in ((model_module.ResBlock(64, 96, 8, 16), (x, modulation)), (VQResBlock(64, 32), (x,))):
        randomise(block).to(x.device)
        found = []
        for chosen in (counted, lambda x: None):
            for module in (encoder_module, model_module):
                module.eager_cpu, module.gpu_kernels = (lambda x: False), chosen
            y = block(*arguments)
            found.append([y, *torch.autograd.grad(y.square().sum(), block.parameters(), allow_unused=True)])
        for a, b in zip(*found, strict=True):
            assert a is None or (a - b).norm() <= 1e-5 * (b.norm() + 10)  # some are 0 but for rounding
    assert len(calls) == 4


@pytest.mark.parametrize("enc", ["vq_f8c4", "dc_f8c4", "dcae_f32c32"])
def test_half_precision_weights_on_a_gpu(as_on_a_gpu, enc):
    model = DCSSDAE(enc, "XS", "eqm", enc_width=0.125, depth=1, input_skip=True).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        z = model.encode(x).mode()
        exact = model.decode(z, 1, x)
        model.bfloat16()
        half = model.encode(x.bfloat16()).mode()
        y = model.decode(half.bfloat16(), 1, x.bfloat16())
    assert relative_error(half, z) < 0.1 and relative_error(y, exact) < 0.1


@pytest.mark.parametrize("form", [NormSiLU.apply, model_module.plain_norm_silu])
@pytest.mark.parametrize("offset", [0.0, 4.0])
def test_bf16_gradients_of_the_norms_are_as_exact_as_autocasts(form, offset):
    """Also where a group's mean is large beside its deviation, and constants cancel."""
    x = torch.randn(2, 64, 24, 24) + offset * torch.randn(1, 64, 1, 1)
    x = x.bfloat16().to(memory_format=torch.channels_last)
    scale, shift, grad = 1 + torch.randn(2, 64, 3, 3) / 2, torch.randn(2, 64, 3, 3), torch.randn(2, 64, 24, 24)

    def gradients(form, dtype):
        inputs = [t.bfloat16().to(dtype).requires_grad_() for t in (x, scale, shift)]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            y = form(*inputs).to(dtype)
        return torch.autograd.grad(y, inputs, grad.bfloat16().to(dtype))

    exact = gradients(plain_norm_silu, torch.float64)
    ours, autocasts = (gradients(f, torch.bfloat16) for f in (lambda *a: form(*a, 32, 1e-5), plain_norm_silu))
    for a, b, c in zip(ours, autocasts, exact, strict=True):
        assert relative_error(a, c) <= 1.2 * relative_error(b, c)


@pytest.mark.parametrize("name", ["dc_f32c32", "dcae_f32c32"])
def test_autocast_keeps_the_dc_encoders_maps_in_half_precision(name):
    network, kinds = make_encoder(name, 0.125), set()
    for module in network.modules():
        if type(module).__name__ in ("DCResBlock", "DCDown", "LinearAttention", "GatedConv"):
            module.register_forward_hook(lambda module, inputs, output: kinds.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        network(torch.randn(1, 3, 32, 32))
    assert kinds == {torch.bfloat16}


@pytest.mark.parametrize("loss", ["fm", "eqm"])
def test_a_decode_after_the_first_needs_nothing_of_the_host(loss):
    model = DCSSDAE("dc_f32c32", "XS", loss, enc_width=0.125, depth=2, input_skip=True, linear_decoder=32).eval()
    z, noise = torch.randn(1, 32, 9, 1), torch.randn(1, 3, 288, 32)  # 36 x 4 tokens: several blocks of attention
    model_module.cached_windows.cache_clear()
    counts = []
    with torch.no_grad():
        for _ in range(2):
            with check.HostTraffic() as traffic:
                model.decode(z, 3, noise)
            counts.append((len(traffic.copies), len(traffic.reads)))
    assert counts[0][0] > 5 and counts[1] == (0, 0)


@pytest.mark.parametrize("module", [train, distill])
def test_a_training_step_waits_for_the_device_once(tmp_path, checkpoint, monkeypatch, module):
    traffic, at_start = check.HostTraffic(), []
    draw, next_batch, tolist = module.draw, module.next_batch, torch.Tensor.tolist

    def counting_draw(*arguments):
        at_start.append((len(traffic.copies), len(traffic.reads)))
        return draw(*arguments)

    def uncounted_batch(*arguments):
        traffic.paused = True
        batch = next_batch(*arguments)
        traffic.paused = False
        return batch

    def counting_tolist(t):  # of a CPU tensor no operation shows it
        if not traffic.paused:
            traffic.reads.append("tolist")
        return tolist(t)

    monkeypatch.setattr(module, "draw", counting_draw)
    monkeypatch.setattr(module, "next_batch", uncounted_batch)
    monkeypatch.setattr(torch.Tensor, "tolist", counting_tolist)
    monkeypatch.setattr(train, "evaluate", lambda *a, **kw: sys.exit(0))
    flags = [*SMALL, "--steps", 4, "--save_every", 4, "--out", tmp_path / "r"]
    if module is train:
        flags += ["--eval_every", 0, "--w_gan", 0.1]
    else:
        flags = ["--ckpt", checkpoint, "--teacher_steps", 2, "--batch_size", 4, "--device", "cpu", "--save_every", 4,
                 "--steps", 4, "--out", tmp_path / "r"]
    with traffic, pytest.raises(SystemExit):
        run_main(module, monkeypatch, *flags)
    (copies, reads), (copies_after, reads_after) = at_start[2:4]
    assert traffic.copies[copies:copies_after] == [] and traffic.reads[reads:reads_after] == ["tolist"]


@slow
def test_compile_without_a_compiler_is_one_sentence(tmp_path, monkeypatch):
    """Before the data is looked for, and before anything is timed."""
    output = cli("train.py", *TINY, "--compile", "--data", tmp_path / "nowhere", "--out", tmp_path / "r", ok=False,
                 env={"CXX": "/nonexistent"})
    assert "error: --compile does not work here (" in output and "/nonexistent" in output
    assert not (tmp_path / "r").exists()

    def broken(*args, **options):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(torch, "compile", broken)
    assert "does not work here (no compiler): install" in sentence(bench, monkeypatch, "decode", "--compile",
                                                                   "--device", "cpu")


def test_blocks_are_compiled_one_by_one(monkeypatch):
    """Each in one graph, once for every shape of its weights; in eager code between them nothing changes."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    decoder = randomise(UViT("XS", 4, depth=2)).requires_grad_(False)
    x, z, t = torch.randn(1, 3, 16, 16), torch.randn(1, 4, 2, 2), torch.rand(1)
    plain, names = decoder(x, z, t), list(decoder.state_dict())
    model_module.compile_blocks(decoder, backend=backend, fullgraph=True)
    assert relative_error(decoder(x, z, t), plain) < 1e-4 and list(decoder.state_dict()) == names
    made = len(graphs)
    decoder(2 * x, z, t)
    blocks = sum(isinstance(m, model_module.BLOCKS) for m in decoder.modules())
    assert len(graphs) == made and 8 < made < blocks == 22  # beyond 8, the compiler's own limit
    torch._dynamo.reset()


def test_what_is_compiled_by_default(monkeypatch):
    for there, device, flags, expected in ((True, "cuda", [], True), (False, "cuda", [], False),
                                           (True, "cpu", [], False), (True, "cuda", ["--no-compile"], False),
                                           (False, "cpu", ["--compile"], True)):
        monkeypatch.setattr(train, "has_triton", lambda device, there=there: there)
        assert train.compiles(train.get_args(flags), torch.device(device)) == expected


def test_kernels_of_our_own_need_a_compiler(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(encoder_module.sysconfig, "get_path", lambda *names: HERE)
    monkeypatch.setattr(os.path, "exists", lambda path: path == os.path.join(HERE, "Python.h"))
    monkeypatch.delenv("CC", raising=False)
    there = encoder_module.has_triton.__wrapped__
    for compiler in ("gcc", "clang", None):
        monkeypatch.setattr(encoder_module.shutil, "which", lambda name, compiler=compiler: name == compiler or None)
        assert there("cuda") == (compiler is not None)


# ---------------------------------------------------------------------------------------------------------------------
# tools/check.py
# A healthy machine is healthy, a slow decode is not.

def test_check_command(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run_main(check, monkeypatch, "values", "traffic", "ranks", "--device", "cpu")
    text = capsys.readouterr().out
    assert end.value.code == 0 and text.count("values ") == 4 and text.rstrip().endswith("\nhealthy")
    assert text.count("0 copies from the host, 0 reads by it") == 2
    monkeypatch.setattr(DCSSDAE, "decode", lambda self, z, steps, noise: noise * z.mean().item())
    with pytest.raises(SystemExit) as end:
        run_main(check, monkeypatch, "traffic", "--device", "cpu")
    assert end.value.code == 1 and "a decode waits for the host or the device" in capsys.readouterr().out
    assert "there is no sped to check" in sentence(check, monkeypatch, "sped")


# ---------------------------------------------------------------------------------------------------------------------
# tools/bench.py
# Every task runs and prints its line.

@slow
def test_bench_command(monkeypatch, capsys, smallest):
    """Every task: in float32, the training step in bfloat16."""
    quick = ["--rounds", 1, "--dec", "XS", "--device", "cpu"]
    text = command("tools.bench", "decode", "encode", *quick, "--size", 32, "--enc", "vq_f8c4")
    text += command("tools.bench", "train", *quick, "--size", 16, "--enc", "dc_f8c4", "--enc_width", 0.125, "--dtype",
                    "bf16", "--checkpointing")
    monkeypatch.setattr(bench, "JPEG_COUNT", 4)
    text += command("tools.bench", "input", *quick)
    rows = [line for line in text.splitlines() if line.startswith(("U-ViT XS", "vq_f8c4"))]
    assert len(rows) == 2 + 4 and all(float(row.split(" M ")[1].split()[2]) > 0 for row in rows)
    assert len(re.findall(r"^input, JPEG .* x$", text, re.MULTILINE)) == 2
    if importlib.util.find_spec("diffusers"):
        assert len(re.findall(r"^(KL-VAE|DC-AE f32c32) .* x KL-VAE$", text, re.MULTILINE)) == 4
    assert "there is no encoding to time" in sentence(bench, monkeypatch, "decode", "encoding")
    assert "--rounds 0 is out of range" in sentence(bench, monkeypatch, "--rounds", 0)
    monkeypatch.setattr(bench, "main", lambda: print(bench.parse_arguments().tasks))
    assert command("tools.bench") == f"{bench.TASKS}\n"  # without names all four


# ---------------------------------------------------------------------------------------------------------------------
# tools/compare.py
# Groups of seeds, their errors, and the curves of a log.

def test_compare_runs(tmp_path, monkeypatch):
    def run(name, *args, **more):
        return write_run(tmp_path / name, *args, **more)

    def table(*argv):
        return [re.split("  +", x.strip()) for x in command("tools.compare", *argv).splitlines()]

    # The error of 1, 2, 3 is 1 / sqrt 3; 1200 images at 20, 10, 5 a second are 1, 2, 4 minutes: 7 / 3 +- sqrt(7 / 9).
    runs = [run("eqm_s0", 1.0, rate=20.0, lpips_vgg=0.1, fd_a=1.0), run("eqm_s1", 2.0, rate=10.0, lpips_vgg=0.2),
            run("eqm_s12", 3.0, rate=5.0, lpips_vgg=0.3), run("fm", 0.5, lpips_vgg=None, rfid=4.0)]
    assert table(*runs, runs[0])[:4] == [
        ["runs", "gain, dB", "PSNR", "SSIM", "HF ratio", "LPIPS vgg", "rFID (biased, N=7)", "minutes"],
        ["shrink x 8", "4", "-", "20.00", "0.5000", "0.000", "-", "-", "-"],
        [f"{tmp_path}/eqm, 1 step", "3", "2.00 +-0.58", "22.00 +-0.58", "0.5000 +-0.1443", "-", "0.2000 +-0.0577", "-",
         "2.3 +-0.9"], [f"{tmp_path}/fm, 1 step", "1", "0.50", "20.50", "0.1250", "-", "-", "4.000", "-"]]
    assert compare.read_run(runs[2])["curves"] == ([(500, 5), (1200, 12)], [(1000, 3)])
    run("fm", 0.5, baseline=21.0)  # another baseline: one for each group
    assert [line[0][len(str(tmp_path)):] + line[3] for line in table(*runs)[1:5:2]] == [
        "/eqm, shrink x 820.00", "/fm, shrink x 821.00"]
    assert "nowhere/metrics.json" in sentence(compare, monkeypatch, tmp_path / "nowhere")
    for name, text in (("log.jsonl", "{}\n[1\n"), ("metrics.json", "{"), ("metrics.json", '{"images": 7, "rows": []}')):
        (run("bad", 1.0) / name).write_text(text)
        assert f"cannot read {tmp_path}/bad/{name} (" in sentence(compare, monkeypatch, tmp_path / "bad")
        (tmp_path / "bad" / name).unlink()


def test_compare_refuses_values_of_other_kinds(tmp_path, monkeypatch):
    good = json.loads((write_run(tmp_path / "r", 1.0, rate=10.0) / "metrics.json").read_text())
    row = good["rows"][1]
    for change in ({"ssim": "0.5"}, {"psnr": [1]}, {"hf": True}, {"psnr": math.inf}, {"name": 3}, {"steps": 1.5},
                   {"psnr": 10**400}):
        (tmp_path / "r" / "metrics.json").write_text(json.dumps(good | {"rows": [good["rows"][0], row | change]}))
        assert "cannot read" in sentence(compare, monkeypatch, tmp_path / "r")
    for images in ("7", 7.5, None, -1):
        (tmp_path / "r" / "metrics.json").write_text(json.dumps(good | {"images": images}))
        assert "cannot read" in sentence(compare, monkeypatch, tmp_path / "r")
    (tmp_path / "r" / "metrics.json").write_text(json.dumps(good))
    for change in ({"images_per_s": "1"}, {"images": 1.5}, {"eqm": "x"}, {"eqm": 10**400}, {"step": 0}):
        line = {"step": 50, "images": 500, "eqm": 0.5, "images_per_s": 3.0} | change
        (tmp_path / "r" / "log.jsonl").write_text(json.dumps(line) + "\n")
        assert "log.jsonl" in sentence(compare, monkeypatch, tmp_path / "r")
    (tmp_path / "r" / "log.jsonl").write_text('{"step": 1, "images": 4, "eqm": NaN, "images_per_s": 3.0}\n')
    assert compare.read_run(tmp_path / "r")["curves"] == ([], [])


def test_curves_of_runs(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    runs = [write_run(tmp_path / "eqm_s0", 1.0, rate=20.0), write_run(tmp_path / "fm", 0.5)]
    assert "wrote curves.png" in cli("tools.compare", *runs, "--plot", cwd=tmp_path)
    picture = Image.open(tmp_path / "curves.png")
    assert picture.size == (1500, 600) and np.asarray(picture.convert("RGB")).std() > 1
    assert "needs a log.jsonl" in sentence(compare, monkeypatch, runs[1], "--plot")


# ---------------------------------------------------------------------------------------------------------------------
# tools/field.py
# Every tile of the picture and every number beside it.

@pytest.mark.parametrize("loss", ["eqm", "fm"])
@torch.no_grad()
def test_field_picture(tmp_path, monkeypatch, loss):
    model = randomise(DCSSDAE("dc_f8c4", "XS", loss, enc_width=0.0625, depth=1, c="trunc", lam=2.0, input_skip=True), 1)
    model.eval().save(tmp_path / "m.safetensors")
    common = ["--ckpt", tmp_path / "m.safetensors", "--size", 32, "--device", "cpu"]
    launch = cli if loss == "eqm" else command
    text = launch("tools.field", *common, "--image", 3, "--seed", 5).splitlines()
    picture = torch.tensor(np.asarray(Image.open(tmp_path / "field.png")))
    assert picture.shape == (4 * 98 + 2, 6 * 98 + 2, 3)

    def check(row, column, y):  # (1, 3, 32, 32), each pixel three times as high and wide, within one level of 255
        y = (y[0].clamp(-1, 1) * 127.5 + 127.5).repeat_interleave(3, 1).repeat_interleave(3, 2).permute(1, 2, 0)
        tile = picture[2 + 98 * row:98 * (row + 1), 2 + 98 * column:98 * (column + 1)]
        assert (tile - y).abs().max() <= 1, (row, column)

    x = data.make_dataset("demo", 32, train=False)[3][0][None]
    e, z, rms = sampler.image_noise(5, [3], x.shape[1:]), model.encode(x).mode(), None
    fm, path, previous, iterates = loss == "fm", e, e, [e]
    for j, g in enumerate(torch.tensor([[0.0], [0.2], [0.4], [0.6], [0.8], [1.0]])):
        mixed = g * x + (1 - g) * e
        f = model.decoder(mixed, z, *[1 - g] * fm)
        estimate = mixed + (1 - g) * f if fm else EqM("trunc", lam=2.0).predict_x(mixed, f, g)
        rms = rms or float(f.square().mean().sqrt())
        for row, y in enumerate((mixed, estimate, f / rms / 2)):
            check(row, j, y)
        db = losses.psnr((losses.to8bit(estimate) - losses.to8bit(x)).square().mean())
        numbers = [float(v) for v in re.findall(r"^[gt] = (\S+): estimate (\S+) dB, field rms (\S+);", text[j])[0]]
        wanted = float(1 - g if fm else g), float(db), float(f.square().mean().sqrt())
        assert numbers == pytest.approx(wanted, abs=0.006)
    check(0, 5, x), check(1, 0, model.decode(z, 1, e)), check(1, 5, x if fm else estimate)
    for k in range(16):  # the sampler once more: Euler, or Nesterov with eta lam = 0.3
        t, t_next = (1 - k / 16) ** 4, (1 - (k + 1) / 16) ** 4
        y = path if fm else path + 0.3 * (path - previous)
        f = model.decoder(y, z, *[torch.tensor([t])] * fm)
        previous, path = path, y + (t - t_next) * f if fm else y - 0.15 * f
        iterates.append(path)
    for column, k in enumerate((0, 1, 2, 4, 8, 16)):
        check(3, column, iterates[k])
    for n in (-1, 10**6):
        assert "no readable image" in sentence(field, monkeypatch, *common, "--image", n)
    with pytest.raises(SystemExit, match="2"):  # it chooses the sampler's options itself
        run_main(field, monkeypatch, *common, "--mu", 0.3)


# ---------------------------------------------------------------------------------------------------------------------
# tools/latents.py
# Stored latents: the same bytes by any processes and after an interruption; their statistics in the model.

def test_latent_statistics_are_stored_in_the_model(tmp_path):
    model = randomise(DCSSDAE("dc_f16c4", "XS", "eqm", enc_width=0.0625, depth=1, notes={"size": 32})).eval()
    model.save(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="--z_stats"):
        model.normalize(torch.zeros(1, 4, 2, 2))
    command("tools.latents", "--ckpt", tmp_path / "m.safetensors", "--limit", 16, "--z_stats", "--device", "cpu",
            "--workers", 0)
    loaded = DCSSDAE.load(tmp_path / "m.safetensors")
    dataset = data.make_dataset("demo", 32, train=False, limit=16)
    x = torch.stack([dataset[i][0] for i in range(16)])
    with torch.no_grad():
        posterior = loaded.encode(x)
        z = posterior.sample(sampler.image_noise(0, range(16), posterior.mean.shape[1:]))
    stored = loaded.config["latents"]
    assert np.allclose(stored["mean"], z.mean(dim=(0, 2, 3)), rtol=1e-3, atol=1e-4)
    assert np.allclose(stored["std"], z.transpose(0, 1).flatten(1).std(dim=1, correction=0), rtol=1e-3)
    assert stored["std_all"] == pytest.approx(float(z.std(correction=0)), rel=1e-3)
    before = (tmp_path / "m.safetensors").read_bytes()
    assert "the same everywhere" in command("tools.latents", "--ckpt", tmp_path / "m.safetensors", "--limit", 1,
                                            "--size", 16, "--z_stats", "--device", "cpu", "--workers", 0, ok=False)
    assert (tmp_path / "m.safetensors").read_bytes() == before
    command("tools.latents", "--ckpt", tmp_path / "m.safetensors", "--limit", 4, "--z_stats", "--device", "cpu",
            "--workers", 0, "--out", tmp_path / "copy")
    assert DCSSDAE.load(tmp_path / "copy" / "model.safetensors").config["latents"] != stored
    assert (tmp_path / "m.safetensors").read_bytes() == before
    normal = loaded.normalize(z)
    assert normal.mean(dim=(0, 2, 3)).abs().max() < 1e-3
    assert torch.allclose(loaded.denormalize(normal), z, rtol=1e-4, atol=1e-4)


def files_of(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@slow
def test_latents(tmp_path, checkpoint, monkeypatch, capsys):
    """Same bytes by one process, by two, and after an interruption; labels; the reader; refusals."""
    for k, name in enumerate(("cat", "dog", "dog/puppy")):
        folder_of(tmp_path / "images" / "train" / name, 3, (40, 32))
    folder_of(tmp_path / "images" / "val", 2)
    for broken in sorted((tmp_path / "images" / "train" / "cat").iterdir())[:2]:  # all of the first shard
        broken.write_bytes(b"broken")
    common = ["--ckpt", checkpoint, "--data", tmp_path / "images", "--shard", 2, "--batch_size", 2, "--workers", 0,
              "--device", "cpu", "--out"]
    two = aside(run, tmp_path / "o", *common, tmp_path / "two", module="tools.latents", world=2)
    run_main(latents, monkeypatch, *common, tmp_path / "one")
    assert "mean" in capsys.readouterr().out
    two.result()
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")

    write, calls = latents.write_whole, []

    def interrupted(path, content):
        calls.append(path)
        if len(calls) == 6:  # the second shard's labels are there, its latents half written
            (tmp_path / "three" / "latents_00002.npy.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(latents, "write_whole", interrupted)
    with pytest.raises(SystemExit, match="130"):
        run_main(latents, monkeypatch, *common, tmp_path / "three")
    monkeypatch.setattr(latents, "write_whole", write)
    assert "latents_00001.npy" in files_of(tmp_path / "three")
    assert "latents_00002.npy" not in files_of(tmp_path / "three")
    assert "shards" not in json.loads((tmp_path / "three" / "manifest.json").read_text())
    finished = os.stat(tmp_path / "three" / "latents_00001.npy").st_mtime_ns
    for change, word in ((["--size", 40], "size"), (["--data", "demo", "--limit", 9], "data"), (["--flip"], "shape"),
                         (["--sample"], "values"), (["--part", "val"], "part"), (["--shard", 3], "shard")):
        assert word in sentence(latents, monkeypatch, *common, tmp_path / "three", *change)
    run_main(latents, monkeypatch, *common, tmp_path / "three")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "three")
    assert os.stat(tmp_path / "three" / "latents_00001.npy").st_mtime_ns == finished

    whole = np.load(tmp_path / "three" / "latents_00001.npy")
    for damaged in (whole[:0], np.concatenate([whole, whole]), whole * np.nan, None, "no labels"):
        if isinstance(damaged, np.ndarray):
            np.save(tmp_path / "three" / "latents_00001.npy", damaged)
        elif damaged is None:
            (tmp_path / "three" / "latents_00001.npy").write_bytes(b"half")
        else:
            (tmp_path / "three" / "labels_00001.npy").unlink()
        run_main(latents, monkeypatch, *common, tmp_path / "three")
        assert files_of(tmp_path / "one") == files_of(tmp_path / "three")

    stored = latents.Latents(tmp_path / "one")
    assert isinstance(stored.shards[0], np.memmap) and stored.shards[0].dtype == np.float16
    dataset = data.make_dataset(str(tmp_path / "images"), 32, train=False, split="train")
    items = [item for item in (dataset[i] for i in range(len(dataset))) if item]
    assert len(stored) == len(items) == len(dataset) - 2 == 7 and len(stored.shards) == 4
    assert stored.labels.tolist() == [dataset.labels[i] for _, i in items] and set(stored.labels.tolist()) == {0, 1}
    with torch.no_grad():
        want = DCSSDAE.load(checkpoint).encode(torch.stack([x for x, _ in items])).mode()
    got = torch.stack([stored[i][0] for i in range(len(stored))])
    assert torch.allclose(got, want, atol=2e-3 * float(want.abs().max()))
    m = stored.manifest
    assert np.allclose(m["mean"], got.mean((0, 2, 3)), atol=1e-6)
    assert np.allclose(m["std"], got.transpose(0, 1).flatten(1).std(1, correction=0), rtol=1e-5)
    assert m["classes"] == dataset.classes == ["cat", "dog"]
    assert m["model_sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest() and m["shape"] == [4, 4, 4]


def test_statistics_that_are_not_finite_stay_out_of_the_model(tmp_path, checkpoint):
    model, before = DCSSDAE.load(checkpoint), Path(checkpoint).read_bytes()
    args = types.SimpleNamespace(ckpt=str(checkpoint), data="demo", out=None)
    with pytest.raises(ValueError, match="latents are not finite: the model's file stays as it is"):
        latents.store_in_model(model, args, {"mean": [0.0, math.nan], "std": [1.0, 1.0]})
    assert Path(checkpoint).read_bytes() == before


def test_latents_of_samples_flipped_and_beyond_float16(tmp_path, checkpoint, monkeypatch):
    common = ["--ckpt", checkpoint, "--limit", 5, "--workers", 0, "--device", "cpu", "--out"]
    run_main(latents, monkeypatch, *common, tmp_path / "z", "--sample", "--flip", "--shard", 3,
             "--batch_size", 3)
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
    run_main(latents, monkeypatch, *common, tmp_path / "bf16", "--dtype", "bf16")
    half = torch.from_numpy(np.load(tmp_path / "bf16" / "latents_00000.npy")).float()
    with torch.no_grad():
        want = model.encode(x).mode()
    assert 1e-4 < relative_error(half, want) < 0.05
    large = types.SimpleNamespace(mode=lambda: torch.full((3, 4, 4, 4), 7e4))
    monkeypatch.setattr(DCSSDAE, "encode", lambda self, x: large)
    assert "float16 ends at 65504" in sentence(latents, monkeypatch, *common, tmp_path / "large")
    assert sorted(os.listdir(tmp_path / "large")) in ([".lock", "manifest.json"], ["manifest.json"])
    assert "--out" in sentence(latents, monkeypatch, "--ckpt", checkpoint)  # nothing to do


# ---------------------------------------------------------------------------------------------------------------------
# tools/study.py
# The numbers of the results page are those of its commands.

@slow
def test_study(tmp_path, monkeypatch, capsys, smallest):
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
    failing = aside(cli, "tools.study", "samplers", "--runs", "/dev/null/runs", "--csv", tmp_path / "f.csv", ok=False)

    def execute(words):
        commands.append(words)
        command(*words)
    monkeypatch.setattr(study, "execute", execute)
    flags = ["one", "--runs", tmp_path / "runs", "--csv", tmp_path / "r.csv"]
    run_main(study, monkeypatch, *flags, "--seeds", 0, 1)
    assert [words[0] for words in commands] == 2 * ["train.py", "distill.py", "evaluate.py", "evaluate.py"]
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
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
    monkeypatch.setattr(study, "execute", commands.append)
    run_main(study, monkeypatch, *flags, "--seeds", 0, 1)
    assert commands[8] == [*commands[4], "--resume"]
    capsys.readouterr()
    shutil.rmtree(tmp_path / "runs")
    run_main(study, monkeypatch, *flags, "--print")
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")] == table
    assert "needs --photos" in sentence(study, monkeypatch, "two", *flags[1:])
    message = failing.result()
    assert "train.py --preset tiny" in message and "ended with exit code 1; its message stands above" in message


def test_the_results_page_has_the_numbers_of_its_csv():
    """Every table of the study stands on the page as `--print` makes it from docs/results.csv, and none is empty."""
    page, known = Path(HERE, "docs", "results.md").read_text(), study.read_csv(Path(HERE, "docs", "results.csv"))
    for name in study.TABLES:
        table = study.table_of(name, known)
        labels = {line.split("|")[1].strip() for line in table[2:]}
        assert {label for label, _, _ in study.TABLES[name][1]} == labels - {""}, name
        assert "\n".join(table) in page, name


def test_the_readme_has_the_numbers_of_the_csv():
    known = study.read_csv(Path(HERE, "docs", "results.csv"))

    def psnr_of(run, row="1 step", evaluation="--limit 200 --steps 1"):
        lines = [known[key] for key in known if (key[0], *key[2:]) == (run, evaluation, row)]  # of all seeds
        return np.mean([float(line["psnr"]) for line in lines])
    many = ("2 steps", "--limit 200 --steps 1 2 4 8 25")
    eight, distilled = psnr_of("tiny_eqm", "8 steps", "--limit 200 --steps 1 8"), psnr_of("distilled_eqm")
    assert 0 < eight - distilled < 0.05
    readme = " ".join(Path(HERE, "README.md").read_text().split())
    for sentence in (
        f"f32c64 is {psnr_of('deep_f32c64') - psnr_of('deep_f8c4'):.2f} dB ahead of f8c4",
        f"after 2 evaluations, {psnr_of('tiny_eqm', *many) - psnr_of('tiny_fm', *many):.2f} dB ahead of FM",
    ):
        assert sentence in readme


# ---------------------------------------------------------------------------------------------------------------------
# tools/sweep.py
# Calibration finds the best steps, on images apart from those that are reported.

class Quadratic:
    """A model for calibrate: descent on sum of a (x - x*)^2 / 2 over two directions, starting at distance 1."""

    def __init__(self, *curvatures):
        self.a, self.config, self.eqm = curvatures, {"loss": "eqm"}, EqM()

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
    assert sweep.starting_options("gd", 4, model)[0] == {"method": "gd"} | sampler.default_steps(model.eqm, 4)
    assert all(options["last_eta"] == 1 for options in sweep.starting_options("nesterov", 4, model))
    monkeypatch.setattr(sweep, "default_steps", lambda eqm, steps: {"eta": 1.0})
    best = sweep.calibrate(model, [1, 2, 8], lambda runs: list(model.measure(runs)))
    assert set(best) == {(s, n) for s in ("gd", "nesterov") for n in (1, 2, 8)}
    one = best["gd", 1][1]
    assert one["method"] == "gd" and one["eta"] == pytest.approx(5 / 17, rel=0.05)  # minimum of (1-e)^2 + (1-4e)^2
    for (name, n), (score, options) in best.items():  # no worse than a fine grid, but for the resolution of 2^(1/8)
        fine = [{"eta": eta, "mu": mu} for eta in np.geomspace(0.02, 2, 400)
                for mu in ((0,) if name == "gd" else (0.3, 0.6, 0.9))]
        grid = [row["psnr_pooled"] for row in model.measure({i: (n, o) for i, o in enumerate(fine)})]
        assert score >= np.nanmax(grid) - (0.2 if n < 8 else 2), (sampler, n, options)
    assert best["nesterov", 8][0] > best["gd", 8][0] + 3  # momentum pays on an ill-conditioned problem
    runs = sweep.sweep_runs(best)
    assert len(runs) == 6 + 4 and runs["gd 1 eta " + f"{one['eta']:.3g}"] == (1, one)
    assert [o for _, o in runs.values()][-1] == best["nesterov", 8][1] | {"tol": 0.02}
    diverging = Quadratic(1e6)
    assert np.isfinite(sweep.calibrate(diverging, [9], lambda r: list(diverging.measure(r)))["gd", 9][1]["eta"])


@slow
def test_sweep_command(tmp_path, checkpoint, offline, monkeypatch, capsys):
    """In two processes as in one; on images apart from the calibration's."""
    seen, subset = [], data.ImageDataset.subset

    def recorded(self, i):
        seen.append(set(self.images[i].tolist()))
        return subset(self, i)

    monkeypatch.setattr(data.ImageDataset, "subset", recorded)
    pytest.importorskip("matplotlib")
    common = ["--ckpt", checkpoint, "--steps", 2, 1, "--calibrate", 2, "--limit", 3, "--batch_size", 2, "--workers", 0,
              "--size", 16, "--device", "cpu", "--features", "--lpips_net", "vgg"]
    refused = aside(cli, "tools.sweep", *common, "--calibrate", 0, ok=False)
    two = aside(run, tmp_path / "o", *common, "--out", tmp_path / "2", module="tools.sweep", world=2)
    run_main(sweep, monkeypatch, *common, "--plot", "--out", tmp_path / "1")
    text = capsys.readouterr().out
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
            assert float(line["psnr"]) == row["psnr"] and line["lpips_vgg"] == ""
            assert line["nfe"] == str(row.get("nfe", ""))
    for a, b in zip(*tables, strict=True):
        assert a["name"] == b["name"]
        for key in a.keys() - {"name", "method", "ms"}:
            assert a[key] == b[key] == "" or float(a[key]) == pytest.approx(float(b[key]), rel=1e-6), key
    for row in rows[2:]:  # the numbers are evaluate's for these options
        assert row["steps"] in (1, 2) and row["eta"] > 0 and row["nfe"] <= row["steps"]
    with pytest.raises(SystemExit, match="2"):  # it chooses the sampler's options itself
        run_main(sweep, monkeypatch, *common, "--eta", 1)
    assert "unrecognized arguments: --eta" in capsys.readouterr().err
    folder_of(tmp_path / "one", 1)
    assert "at least 2 images" in sentence(sweep, monkeypatch, *common, "--data", tmp_path / "one")
    assert "--calibrate 0 is out of range" in refused.result()
    monkeypatch.setattr(sweep.importlib.util, "find_spec", lambda name: None)
    assert "matplotlib" in sentence(sweep, monkeypatch, *common, "--plot")


# ---------------------------------------------------------------------------------------------------------------------
# README.md, docs/, --help
# Links, commands and Python of the documents are of what exists, and every flag is explained.

DOCUMENTS = ("README.md", "docs/results.md", "docs/training.md")


def headings_of(path):
    """What follows # in links to the headings of a document, as GitHub makes it."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)  # comments are no headings
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_documents_links_point_at_what_they_name():
    readme = Path(HERE, "README.md").read_text()
    links = re.findall(r"\[`([\w.]+)`\]\((\w+\.py)#L(\d+)\)", readme)
    assert len(links) > 20
    for name, file, line in links:
        source = Path(HERE, file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"\s*(def|class) {name.split('.')[-1]}\b", source), (name, file, line, source)
    for document in DOCUMENTS:
        targets = re.findall(r"\]\(([^)]*)\)", Path(HERE, document).read_text())
        assert len(targets) > 2
        for target in targets:
            name, _, anchor = target.partition("#")
            path = Path(HERE, document).parent / name if name else Path(HERE, document)
            assert path.is_file(), (document, target)
            if anchor and path.suffix == ".md":
                assert anchor in headings_of(path), (document, target)


def test_the_readmes_python_runs(tmp_path, monkeypatch):
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


def test_help_explains_every_flag(helps):
    assert all("--" in text for text in helps.values())
    text = helps["train.py"]
    for flag in ["--enc", "--enc_width", "--enc_ckpt", "--freeze_enc", "--dec", "--loss", "--c", "--lam", "--w_lpips",
                 "--w_repa", "--w_kl", "--data", "--size", "--aug_scale", "--batch_size", "--micro_batch", "--steps",
                 "--lr", "--weight_decay", "--grad_clip", "--ema", "--dtype", "--compile", "--seed", "--out",
                 "--resume", "--eval_every", "--save_every", "--log_every"]:
        assert flag in text


def test_every_tool_explains_itself_as_a_module(helps):
    names = ["bench", "check", "compare", "field", "hub", "latents", "study", "sweep"]
    assert TOOLS == [f"tools.{name}" for name in names]
    for tool in TOOLS:
        assert f"-m {tool} " in helps[tool] and f"usage: {tool.split('.')[1]}.py" in helps[tool]
    for title in ("data:", "metrics that need a network:"):
        assert f"\n{title}\n" in helps["tools.sweep"]
    assert all(flag in helps["tools.latents"] for flag in ("--out", "--z_stats", "--sample", "--flip", "--shard"))


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
                for flag in re.findall(r"(?<= )--\w+", flags):
                    assert re.search(rf"{flag}\b", helps[program]), (document, program, flag)
    assert {"train.py", "distill.py", "evaluate.py", *TOOLS, "examples.generate"} <= found.keys(), found


# ---------------------------------------------------------------------------------------------------------------------
# examples/
# The generator: resumed = uninterrupted = two processes; labels; refusals. The notebook runs and says what it stores.

@slow
def test_generator_on_latents(tmp_path, checkpoint, monkeypatch, capsys):
    """Resumed = uninterrupted = two processes; silent at the start; labels matter; refusals."""
    for k, name in enumerate(("cat", "dog")):
        folder_of(tmp_path / "images" / "train" / name, 7 + k, (40, 32))
    folder_of(tmp_path / "images" / "val", 2)
    run_main(latents, monkeypatch, "--ckpt", checkpoint, "--data", tmp_path / "images", "--shard", 4, "--flip",
             "--workers", 0, "--device", "cpu", "--out", tmp_path / "latents")
    stored = latents.Latents(tmp_path / "latents")
    both = torch.cat([torch.from_numpy(np.array(shard)) for shard in stored.shards]).float()  # (15, 2, c, h, w)
    drawn, labels = generate.batch_of(stored, [(epoch, i) for epoch in range(20) for i in range(15)], seed=0)
    drawn = (drawn * stored.std + stored.mean).view(20, 15, *stored.shape)
    for i in range(15):
        is_first = (drawn[:, i] - both[i, 0]).abs().amax(dim=(1, 2, 3)) < 1e-3
        is_mirrored = (drawn[:, i] - both[i, 1]).abs().amax(dim=(1, 2, 3)) < 1e-3
        assert (is_first | is_mirrored).all() and is_first.any() and is_mirrored.any()
    assert labels[:15].tolist() == [0] * 7 + [1] * 8

    torch.jit.trace(nn.Sequential(nn.AvgPool2d(8), nn.Flatten()), torch.zeros(1, 3, 32, 32)).save(tmp_path / "f.ts")
    common = ["--latents", tmp_path / "latents", "--ckpt", checkpoint, "--width", 64, "--depth", 1, "--batch_size", 4,
              "--warmup", 1, "--log_every", 1, "--eval_images", 9, "--eval_steps", 2, "--features", tmp_path / "f.ts",
              "--device", "cpu", "--out"]
    two = aside(cli, "examples.generate", *common, tmp_path / "two", "--steps", 4, nproc=2)
    run_main(generate, monkeypatch, *common, tmp_path / "whole", "--steps", 4)
    run_main(generate, monkeypatch, *common, tmp_path / "parts", "--steps", 2)
    run_main(generate, monkeypatch, *common, tmp_path / "parts", "--steps", 4, "--resume")
    two.result()
    weights = {name: load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts", "two")}
    logs = {name: [json.loads(line) for line in open(tmp_path / name / "log.jsonl")] for name in weights}
    for key, value in weights["whole"].items():
        assert torch.equal(value, weights["parts"][key])
        # The mean, as Adam enlarges the rounding of single gradients that are nearly 0; each of 4 steps moves by 3e-4.
        assert (value - weights["two"][key]).abs().mean() < 3e-6
    distances = {name: logs[name][-1]["eval"][0]["fd_f"] for name in weights}
    assert distances["whole"] == distances["parts"] == pytest.approx(distances["two"], rel=1e-3)
    assert Image.open(tmp_path / "whole" / "samples.png").size == (8 * 34 + 2, 2 * 34 + 2)

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
    e, _, _ = train.draw(0, 0, range(4), stored.shape, (), "cpu")
    assert logs["whole"][0]["loss"] == pytest.approx((x - e).square().mean().item(), rel=1e-5)  # the network says 0

    model = randomise(generate.DiT(stored.shape, 64, 2, classes=2))
    x, t = torch.randn(2, *stored.shape), torch.tensor([0.3, 0.3])
    of_cat, of_dog = (model(x, torch.full((2,), k), t) for k in range(2))
    assert of_cat.shape == x.shape and (of_cat - of_dog).abs().amax() > 1e-3
    assert (model(x.flip(3), torch.zeros(2).long(), t).flip(3) - of_cat).abs().amax() > 1e-3  # it knows where a cell is

    assert "no finished latents" in sentence(generate, monkeypatch, *common, tmp_path / "n", "--latents", tmp_path)
    assert "multiple of 64" in sentence(generate, monkeypatch, *common, tmp_path / "n", "--width", 100)
    with monkeypatch.context() as patch:
        patch.setattr(latents.Latents, "__init__", lambda self, folder: vars(self).update(
            vars(stored) | {"labels": np.where(stored.labels == 0, -1, stored.labels)}))
        assert "7 of the latents" in sentence(generate, monkeypatch, *common, tmp_path / "n")
    other = DCSSDAE("dc_f8c8", "XS", enc_width=0.0625, depth=0, loss="fm")
    other.save(tmp_path / "other.safetensors")
    assert "makes" in sentence(generate, monkeypatch, *common, tmp_path / "n", "--ckpt", tmp_path / "other.safetensors")


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
# Fuzzing: whatever command line, file or argument comes, it works or it ends in one sentence
# FUZZ=10000 python -m pytest test_all.py -k fuzz -s runs the cases 0 ... 9999, FUZZ_FIRST=N begins at another;
# FUZZ_CASE=1234 runs this one alone: a case depends on its number alone.

FUZZ_RUN = ["--w_gan", 0.1, "--size", 24, "--save_every", 1, "--eval_every", 0, "--out", "run"]


def actions_of(module, monkeypatch):
    """argparse's description of a program's flags."""
    def stop(parser, *args, **kwargs):
        raise InterruptedError(parser)

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["x"])
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        try:
            module.main()
        except InterruptedError as found:
            return [action for action in found.args[0]._actions if action.dest not in LEFT_OUT]
        except SystemExit:  # fid.py and data.py turn errors into one
            raise AssertionError(module) from None


def odd_word(rng, action):
    """A word for a flag: one that it takes, or any other."""
    if rng.random() < 0.1:
        word = rng.choice(ODD_WORDS)
    elif action.choices:
        word = str(rng.choice([*action.choices]))
    elif action.type in (int, float):
        small = [0, 1, 2, 3, 8, 16] if action.type is int else [0, 0.5, 1, 1.5, 2]
        word = str(rng.choice(small)) if rng.random() < 0.5 else rng.choice(ODD_WORDS)
        if action.type is int and action.dest not in COSTLY and rng.random() < 0.1:
            word = str(rng.choice([2**31, 2**63 - 1, 2**63, 10**12]))
    else:
        word = rng.choice([*sorted(os.listdir(".")), "new", "demo", "images/0.png", "nowhere/x", "/dev/null", "."])
    return word


def fuzz_command(rng, box):
    """A program with random flags after those that keep it short."""
    module = rng.choice(list(FUZZ_PROGRAMS))
    argv = list(FUZZ_PROGRAMS[module])
    if module is fid:
        argv += [rng.choice(["images", "s.npz", "nowhere"]), rng.choice(["images", "s.npz", "r"])]
    if module is compare:
        argv += rng.sample(["r", "r_s1", "images", "nowhere"], rng.randint(1, 2))
    for action in rng.choices(box.actions[module], k=rng.randint(1, 3)):
        flag = rng.choice(action.option_strings or [None])
        count = {0: 0, "+": rng.randint(0, 3), "*": rng.randint(0, 2)}.get(action.nargs, 1)
        words = [odd_word(rng, action) for _ in range(count)]
        argv += ([flag] if flag else []) + words
    if module is bench:
        argv += ["--size", rng.choice(["0", "x"])]  # to time anything takes long
    call_main(module, argv)


def call_main(module, argv):
    """A command in this process. AssertionError unless it works, or ends in one sentence or with argparse's."""
    sys.argv = [module.__name__, *map(str, argv)]
    print("  ", " ".join(map(repr, sys.argv)))
    try:
        data.guarded(module.main)
    except SystemExit as stop:
        is_sentence = isinstance(stop.code, str) and stop.code.startswith("error: ") and "\n" not in stop.code
        assert is_sentence or stop.code in (0, 2), f"ends with {stop.code!r}"
    except Exception as error:  # noqa: BLE001 whatever it is, users would see a traceback
        raise AssertionError(f"ends in a traceback: {error!r}") from error


def damage_file(rng, path):
    """Change a file's bytes, or what they mean; of some kinds of file only the former."""
    content = bytearray(path.read_bytes())
    path.unlink(), path.write_bytes(content)  # it was a link to the good one
    how = rng.random()
    if how < 0.2 and content:
        for _ in range(rng.choice([1, 1, 5, 50])):
            content[rng.randrange(min(len(content), rng.choice([64, 1000, len(content)])))] ^= 1 << rng.randrange(8)
    elif how < 0.35:
        content = content[:rng.randrange(len(content) + 1)]
    elif how < 0.4:
        content = rng.choice([b"", b"{}", b"[]", b"null", b"\0" * 100, b"[" * 100_000, pickle.dumps(Payload())])
    else:
        with contextlib.suppress(*BROKEN_FILE):  # it cannot be written
            rewrite(rng, path)
        return
    path.write_bytes(content)


def rewrite(rng, path):
    """Damage what a file means."""
    if path.suffix in (".pt", ".pth"):
        torch.save(damaged(rng, torch.load(path, weights_only=True)), path)
    elif path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            meta = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 it is no dict
        config = json.loads(meta["config"])
        if rng.random() < 0.5:
            tensors = damaged(rng, tensors)
        else:
            config = damaged(rng, config)
        number = rng.choice(["4", "4", "4", "3", "9", "x"])
        save_file(tensors, path, {"format": number, "config": json.dumps(config)})
    elif path.suffix in (".json", ".jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.suffix == ".jsonl" else None
        tree = damaged(rng, lines or json.loads(path.read_text()))
        path.write_text("".join(json.dumps(line) + "\n" for line in tree) if lines else json.dumps(tree))
    elif path.suffix in (".npz", ".npy"):
        found = np.load(path)
        arrays = dict(found) if path.suffix == ".npz" else {"only": found}
        arrays = damaged(rng, {name: torch.from_numpy(array) for name, array in arrays.items()})
        arrays = {name: np.array(value, object) if isinstance(value, Payload) else np.array(value)
                  for name, value in arrays.items()}
        np.savez(path, **arrays) if path.suffix == ".npz" else np.save(path, arrays["only"])
    else:
        path.write_bytes(path.read_bytes()[:-5])


def fuzz_file(rng, box):
    """One damaged file, and a program or a function that reads it."""
    kind = rng.choice(list(FUZZ_FILES))
    if kind in ("alex", "inception"):
        shutil.copy(box.alex, "alex.pth")
    paths = sorted(path for path in Path(".").glob(FUZZ_FILES[kind]) if path.is_file())
    for path in rng.sample(paths, min(len(paths), rng.choice([1, 1, 2]))):
        damage_file(rng, path)
        print("  ", kind, path)
    if kind == "model":
        read_model(rng)
    elif kind == "checkpoint":
        read_checkpoint(rng)
    elif kind == "features":
        network = fid.FileFeatures("features.pt", 8)
        assert network(torch.zeros(1, 3, 8, 8)).shape == (1, network.dim)
    elif kind == "alex":
        assert all(p.isfinite().all() for p in losses.LPIPSLoss("alex", "alex.pth").parameters())
    elif kind == "inception":
        assert fid.InceptionFeatures("alex.pth") is None  # which it never is
    elif kind == "image" and rng.random() < 0.5:
        call_main(data, ["--data", "images", "--size", 8, "--rows", 2])
    elif kind == "image":
        for path in paths:
            with contextlib.suppress(data.Unreadable):
                assert data.read_image(path, retry=False).mode == "RGB"
    else:
        module, *argv = {"latents": (latents, *FUZZ_PROGRAMS[latents]), "run": (compare, "r", "r_s1"),
                         "statistics": (fid, "s.npz", "s2.npz")}[kind]
        call_main(module, argv)


FUZZ_FILES = {"model": "model.safetensors", "checkpoint": "run/*.pt", "latents": "latents/*", "run": "r/*",
              "statistics": "s.npz", "features": "features.pt", "alex": "alex.pth", "inception": "alex.pth",
              "image": "images/*"}


def read_model(rng):
    if rng.random() < 0.15:
        module = rng.choice([evaluate, field, latents])
        return call_main(module, FUZZ_PROGRAMS[module])
    if rng.random() < 0.5:
        model = DCSSDAE.load("model.safetensors")
        x = torch.zeros(1, 3, model.downscale, model.downscale)
        assert model.decode(model.encode(x).mode()).shape == x.shape
    else:
        model = DCSSDAE("dc_f8c4", "XS", enc_width=0.0625, depth=1)
        model.load_published("model.safetensors", rng.choice(["all", "encoder", "decoder"]))
    assert all(value.isfinite().all() for value in model.state_dict().values()), "accepted weights that are not finite"


def read_checkpoint(rng):
    if rng.random() < 0.15:
        call_main(train, [*FUZZ_PROGRAMS[train], *FUZZ_RUN, "--steps", 3, "--resume"])
        return
    state = load_checkpoint("run")
    assert state["step"] in (1, 2) and train.DCSSDAE(**state["config"])
    assert all(value.isfinite().all() for name in ("model", "ema") for value in state[name].values())


def fuzz_python(rng, box):
    """A call of the Python interface with odd arguments."""
    model, eqm = rng.choice(box.models), EqM(rng.choice(["linear", "trunc", "piecewise"]))
    x, e, s = (odd_tensor(rng, shape) for shape in ((2, 3, 16, 16), (2, 3, 16, 16), (2,)))
    z, number = odd_tensor(rng, (2, 4, 2, 2)), rng.choice([*ODD_VALUES, 3, 10**9])
    width = 0.125 if number in (2, 3) and type(number) is int else number  # an encoder of three times the width is huge
    names = rng.sample(["eta", "last_eta", "mu", "tol", "t_shift", "method"], rng.randint(0, 2))
    options = {name: rng.choice(ODD_VALUES) for name in names}
    descent = rng.choice([sampler.gradient_descent, sampler.nesterov])
    config = damaged(rng, dict(model.config))
    square = odd_tensor(rng, (3, 3), torch.float64)
    large, larger = odd_tensor(rng, (2, 3, 32, 32)), odd_tensor(rng, (2, 3, 32, 32))
    folder = [rng.choice(["demo", "images", "r", number]), *rng.choices([8, 8, 8, *ODD_VALUES], k=4)]
    calls = {
        "encode": lambda: model.encode(x).mean.shape == (len(x), 4, x.shape[2] // 8, x.shape[3] // 8),
        "decode": lambda: model.decode(z, steps=number, **options).shape[1] == 3,
        "noise": lambda: model.decode(z, noise=e).shape == e.shape,
        "reconstruct": lambda: model.reconstruct(x).shape == x.shape,
        "energy": lambda: model.energy(x, z).shape == x.shape[:1],
        "normalize": lambda: model.denormalize(model.normalize(z)).shape == z.shape,
        "decoder": lambda: model.decoder(x, z, *[s] * rng.randint(0, 1)).shape == x.shape,
        "fm": lambda: losses.fm_loss(losses.fm_mix(x, e, s), x, e).ndim == 0,
        "fm_predict_x": lambda: losses.fm_predict_x(x, e, s).shape == x.shape,
        "eqm": lambda: losses.eqm_loss(eqm.mix(x, e, s), x, e, s, eqm).ndim == 0,
        "eqm_predict_x": lambda: eqm.predict_x(x, e, s).shape == eqm.target(x, e, s).shape,
        "EqM": lambda: EqM(*rng.choices(ODD_VALUES, k=4)).lam > 0,
        "lpips": lambda: box.lpips(large, larger).shape == large.shape[:1],
        "gan": lambda: PatchGAN(32)(large).shape[1] == 1,
        "ema": lambda: averaged(copy.deepcopy(model), rng.choice(box.models), number) is None,
        "descent": lambda: descent(lambda y, z: y, x, z, number)[0].shape == x.shape,
        "euler": lambda: sampler.euler(lambda y, z, t: y, x, z, 2, number)[0].shape == x.shape,
        "config": lambda: DCSSDAE(**config).config["enc"] == config.get("enc", "dc_f32c32"),
        "encoder": lambda: make_encoder(rng.choice(["dc_f8c4", "vq_f8c0", "x", 5, "dc_f8c999999"]), width).z_dim > 0,
        "dataset": lambda: len(data.make_dataset(*folder, limit=rng.choice([1, None, number]))) > 0,
        "loader": lambda: len(next(iter(data.make_loader(box.dataset, number, rng.random() < 0.5)))[0]) > 0,
        "frechet": lambda: fid.frechet_distance(s.numpy(), square.numpy(), s.numpy(), square.numpy()) >= 0,
        "statistics": lambda: fid.Statistics(3).update(rng.choice([square, x, s])) is None,
        "save": lambda: model.save(rng.choice(["m", "images", "nowhere/m", "/dev/null", "a" * 300])) is None}
    name = rng.choice(list(calls))
    shapes = [f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in (x, e, s, z)]
    print("  ", name, *shapes, short(number), options)
    assert calls[name](), "another result than documented"


def fuzz_folder(folder):
    """Good files of every kind that is read."""
    (folder / "run").mkdir()
    for k, model in enumerate(fuzz_models()):
        model.save(folder / ["model.safetensors", "fm.safetensors"][k])
    with contextlib.chdir(folder):
        call_main(train, [*FUZZ_PROGRAMS[train], *FUZZ_RUN, "--steps", 2])
        call_main(latents, FUZZ_PROGRAMS[latents])
    write_run(folder / "r", 1.0, rate=10.0), write_run(folder / "r_s1", 2.0)
    for name in ("s.npz", "s2.npz"):
        statistics = fid.Statistics(4)
        statistics.update(torch.randn(9, 4))
        statistics.save(folder / name)
    script(folder / "features.pt")
    folder_of(folder / "images", 2)
    for k, ext in enumerate(("jpg", "tif", "webp", "bmp", "pgm")):
        photo(20, 12, k).save(folder / "images" / f"p.{ext}")


def fuzz_models():
    statistics = {"mean": [0.5] * 4, "std": [2.0] * 4}
    return [DCSSDAE("dc_f8c4", "XS", loss, 0.0625, depth=1, notes={"size": 8, "w_lpips": 0}, latents=statistics,
                    input_skip=True, linear_encoder=True, linear_decoder=4).eval() for loss in ("eqm", "fm")]


def out_of_time(number, frame):
    raise AssertionError(f"a case took longer than {FUZZ_SECONDS} s")


def fuzz_one(number, box, folder):
    """Case `number` in a folder of its own. -> None, or what went wrong."""
    rng = random.Random(f"fuzz {number}")
    torch.manual_seed(number)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(box.good, folder, copy_function=os.link)
    data.lock_folder.cache_clear()
    output, problem = io.StringIO(), None
    signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(FUZZ_SECONDS)
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            rng.choices([fuzz_command, fuzz_file, fuzz_python], [2, 3, 5])[0](rng, box)
    except REFUSALS as error:
        if not str(error) or isinstance(error, InterruptedError):
            problem = traceback.format_exc(limit=-3)
    except BaseException:  # noqa: BLE001 all others are what is looked for
        problem = traceback.format_exc(limit=-3)
    finally:
        signal.alarm(0)
        torch.set_grad_enabled(True)
    if (folder / "executed").exists():
        problem = "a pickle was executed"
    return problem and f"case {number} (FUZZ_CASE={number}):\n{output.getvalue()[-1500:]}\n{problem}"


@slow
@pytest.mark.skipif(os.name != "posix", reason="limits of a process are POSIX's")
@pytest.mark.filterwarnings("ignore")
def test_fuzz(tmp_path, monkeypatch, offline):
    import resource
    for size in SIZES:
        monkeypatch.setitem(SIZES, size, SMALLEST_SIZE)
    monkeypatch.setattr(train, "PatchGAN", lambda: PatchGAN(16))
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(sys, "argv", [])
    (tmp_path / "good").mkdir()
    fuzz_folder(tmp_path / "good")
    box = types.SimpleNamespace(good=tmp_path / "good", alex=tmp_path / "alex.pth", models=fuzz_models(),
                                dataset=data.make_dataset("demo", 8, True),
                                actions={module: actions_of(module, monkeypatch) for module in FUZZ_PROGRAMS})
    features = data.import_torchvision().models.alexnet(weights=None).features.state_dict()
    torch.save({f"features.{name}": value for name, value in features.items()}, box.alex)
    box.lpips = losses.LPIPSLoss("alex", box.alex)
    first, count = int(os.environ.get("FUZZ_FIRST", 0)), int(os.environ.get("FUZZ", FUZZ_CASES))
    numbers = range(first, first + count)
    if "FUZZ_CASE" in os.environ:
        numbers = [int(os.environ["FUZZ_CASE"])]
    handlers = {s: signal.getsignal(s) for s in [*train.stop_signals(), signal.SIGALRM]}
    limits = resource.getrlimit(resource.RLIMIT_AS)
    problems, before = [], {path: path.stat().st_mtime_ns for path in box.good.rglob("*")}
    try:
        for number in numbers:
            if sys.platform == "linux":
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + FUZZ_BYTES, limits[1]))
            problem = fuzz_one(number, box, tmp_path / "case")
            if problem:
                print(problem, flush=True)
                problems.append(problem)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        for s, handler in handlers.items():
            signal.signal(s, handler)
    assert before == {path: path.stat().st_mtime_ns for path in box.good.rglob("*")}, "written in place"
    assert not problems, f"{len(problems)} of {len(numbers)} cases: " + "\n\n".join(problems[:20])
