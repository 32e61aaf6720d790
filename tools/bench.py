"""Speed, with random weights: decoding in one step, encoding, a training step, and reading images.

    python -m tools.bench decode --size 256 --dtype float32 bf16
    python -m tools.bench train --dec S --size 128 --batch_size 24 --dtype bf16
    python -m tools.bench count                          # operations of a decode, on a CPU
    python -m tools.bench gpu --minutes 8 | tee gpu.txt  # in bf16: batches, sizes, graphs, compiled

Without names decode, encode, train and input. Decoders and encoders stand beside diffusers' KL-VAE and DC-AE if that
package is installed. Candidates run in turn, round by round, on a GPU also as CUDA graphs. Times are medians, ratios
are taken within the rounds. MiB is what one call allocates beside the weights. A training step is train.py's, without
its data and bookkeeping.
"""
import argparse
import collections
import copy
import functools
import importlib.util
import itertools
import os
import platform
import random
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from data import make_dataset
from encoder import parse_name
from losses import LPIPSLoss, draw
from model import DCSSDAE, SIZES, compile_blocks
from plumbing import fast, flags, graphs
from plumbing.optim import adamw, step_if
from plumbing.peers import Peer
from plumbing.process import autocast, check_compiler, guarded, now, setup
from train import Objective, weighted_sum

TASKS = ["decode", "encode", "train", "input"]
MORE_TASKS = ["count", "gpu"]                                # only by name
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
NARROW = 0.125                                               # width of the encoder that a timed decoder comes with
W_KL, W_LPIPS = 1e-6, 0.5                                    # train.py's default weights
JPEG_SIDES = ((500, 375), (2000, 1500))                      # as in ImageNet, and as a camera's
JPEG_COUNT, CROP = 16, 128                                   # files of each, and pixels a side of what is made of them
GPU_SIZES, GPU_BATCHES, GPU_TRAIN = (256, 512, 1024), (1, 4, 16), (128, 24)  # the last: pixels a side, images a step


# ---------------------------------------------------------------------------------------------------------------------
# Measuring

def interleaved(runs, device, rounds):
    """{name: callable} -> {name: (rounds,) seconds}, each called before, twice on a GPU to record graphs, then in turn.
    """
    for run in runs.values():
        for _ in range(2 if device.type == "cuda" else 1):
            run()
    seconds = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = now(device)
            run()
            seconds[name].append(now(device) - start)
    return {name: np.array(value) for name, value in seconds.items()}


def bytes_allocated(run, device):
    """Bytes that one call allocates at the same time at most, beside what is there already (weights)."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    allocated = np.cumsum([event.nbytes() for event in events])  # freeing counts as negative
    return int(allocated.max(initial=0))


def compiled(network):
    """A copy of the network that is compiled: ours block by block, as train.py does it, another library's in one."""
    network = copy.deepcopy(network)
    if isinstance(network, DCSSDAE):
        compile_blocks(network)
    else:
        network.encoder.compile()
        network.decoder.compile()
    return network


def replayed(network):
    """A copy of our network whose calls are replayed by CUDA graphs."""
    network = copy.deepcopy(network)
    network.use_graphs = True
    return network


def print_bench(title, tasks, networks, part, dtype, device, args, reference=None):
    """Time {name: function(network) -> callable without arguments} on {name: network}, eager, with --compile compiled
    and, on a GPU, replayed, and print a line for each, with `reference`'s throughput as 1. part: "encoder" or
    "decoder", the part of each network that works and whose parameters count, or None for all, which is not replayed.
    """
    forms = {"": lambda network: network}
    if device.type == "cuda" and part:
        forms[" graph"] = replayed
    if args.compile:  # last: a copy would not be compiled
        forms |= {f" compiled{form}": lambda network, make=make: compiled(make(network))
                  for form, make in forms.items()}
    candidates = {}
    for name, task in tasks.items():
        for form, make in forms.items():
            if "graph" in form and not isinstance(networks[name], DCSSDAE):
                continue  # another library's
            candidates[name + form] = name, task(make(networks[name]))
    measured = interleaved({label: run for label, (_, run) in candidates.items()}, device, args.rounds)
    title = f"{title}, {str(dtype).removeprefix('torch.')}, batch {args.batch_size}"
    print(f"{title:36s} {'params':>8s} {'GFLOP':>8s} {'ms':>9s} {'images/s':>9s} {'MiB':>8s}")
    for label, (name, run) in candidates.items():
        seconds = measured[label]
        median = float(np.median(seconds))
        with FlopCounterMode(display=False) as counter:
            candidates[name][1]()  # of a replayed call it sees nothing
        network = getattr(networks[name], part) if part else networks[name]
        millions = sum(p.numel() for p in network.parameters()) / 1e6
        line = (f"{label:36s} {millions:6.1f} M {counter.get_total_flops() / 1e9:8.1f} {1000 * median:9.1f} "
                f"{args.batch_size / median:9.2f} {bytes_allocated(run, device) / 2**20:8.0f}")
        if reference:
            line += f"  {float(np.median(measured[reference] / seconds)):.2f} x {reference}"
        print(line, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Decoding and encoding

def peers():
    """{name: (diffusers' autoencoder with random weights, its factor, its channels)}; empty without diffusers."""
    if importlib.util.find_spec("diffusers") is None:
        return {}
    from diffusers import AutoencoderDC, AutoencoderKL
    kl = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    dc = AutoencoderDC(
        encoder_block_types=blocks, decoder_block_types=blocks, encoder_layers_per_block=(0, 4, 8, 2, 2, 2),
        decoder_layers_per_block=(0, 5, 10, 2, 2, 2), encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6, decoder_norm_types=("batch_norm",) * 3 + ("rms_norm",) * 3,
        decoder_act_fns=("relu",) * 3 + ("silu",) * 3)
    return {"KL-VAE": (kl, 8, 4), "DC-AE f32c32": (dc, 32, 32)}


def named_peers(names):
    """As `peers`, of --peer: with their own weights."""
    others = {name: Peer(name) for name in names}
    return {name: (peer.network, peer.downscale, peer.z_dim) for name, peer in others.items()}


def place(t, dtype, device):
    """A tensor or a network where it is timed."""
    return t.to(device, dtype, memory_format=torch.channels_last)


def our_model(enc, dec, loss, width):
    """As train.py makes it: the network adds to a linear image. Without graphs."""
    _, _, z_dim = parse_name(enc)
    model = DCSSDAE(enc, dec, loss, width, input_skip=True, linear_encoder=True, linear_decoder=z_dim)
    model.use_graphs = False
    return model


def decoding(z, noise=None):
    """A network -> its decoding of z in one step, as a callable; of another library's autoencoder without noise."""
    def prepare(network):
        if noise is None:
            return lambda: network.decode(z).sample
        return lambda: network.decode(z, 1, noise)
    return prepare


def encoding(image):
    """A network -> its encoding of the image, as a callable."""
    def prepare(network):
        return lambda: network.encode(image)
    return prepare


def bench_decode(args, others, size, dtype, device):
    """Decoding in one step."""
    tasks, networks = {}, {}
    for name, (peer, factor, channels) in others.items():
        networks[name] = place(peer, dtype, device).eval()
        z = torch.randn(args.batch_size, channels, size // factor, size // factor)
        tasks[name] = decoding(place(z, dtype, device))
    noise = place(torch.randn(args.batch_size, 3, size, size), dtype, device)
    for dec in args.dec:
        name = f"U-ViT {dec} {args.enc}"
        networks[name] = place(our_model(args.enc, dec, args.loss, NARROW), dtype, device).eval()
        z = torch.randn(args.batch_size, *networks[name].latent_shape(size, size))
        tasks[name] = decoding(place(z, dtype, device), noise)
    print_bench(f"decode, {size} px", tasks, networks, "decoder", dtype, device, args, "KL-VAE" if others else None)


def bench_encode(args, others, size, dtype, device):
    """Encoding, by encoders of full width."""
    image = place(torch.randn(args.batch_size, 3, size, size), dtype, device)
    networks = {name: place(peer, dtype, device).eval() for name, (peer, _, _) in others.items()}
    networks[args.enc] = place(DCSSDAE(args.enc, "XS", args.loss), dtype, device).eval()
    networks[args.enc].use_graphs = False
    tasks = dict.fromkeys(networks, encoding(image))
    print_bench(f"encode, {size} px", tasks, networks, "encoder", dtype, device, args, "KL-VAE" if others else None)


# ---------------------------------------------------------------------------------------------------------------------
# Counting operations

NO_KERNELS = ("empty", "new_empty", "empty_like", "_unsafe_view", "_reshape_alias", "promote_types")


class Operations(TorchDispatchMode):
    """Counts operations below autograd by name, and of these the kernels: no views, nor what only allocates."""

    def __init__(self):
        super().__init__()
        self.all, self.kernels = collections.Counter(), collections.Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        self.all[name] += 1
        if not (function.is_view or name in NO_KERNELS):
            self.kernels[name] += 1
        return function(*arguments, **(options or {}))


@torch.library.custom_op("bench::norm_silu", mutates_args=())
def one_norm(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, groups: int, eps: float = 1e-5) -> torch.Tensor:
    """In the place of plumbing.triton's norm, which is three kernels: no values, but an operation to count."""
    if not x.is_contiguous(memory_format=torch.channels_last) or scale.stride() != shift.stride():
        raise ValueError("the GPU's norm would copy its arguments")
    return torch.empty_like(x)


def counted_decode(enc, dec, loss, size, on_gpu):
    """Operations of a second decode of one image in one step. on_gpu: of the forms that a GPU gets, with Triton."""
    model = place(our_model(enc, dec, loss, NARROW), torch.float32, "cpu").eval()
    z, noise = torch.zeros(1, *model.latent_shape(size, size)), torch.zeros(1, 3, size, size)
    forms = {"eager_cpu": lambda x: False, "norm_silu": one_norm} if on_gpu else {"eager_cpu": lambda x: True}
    with torch.no_grad(), mock.patch.multiple(fast, **forms):
        model.decode(z, 1, noise)
        with Operations() as operations:
            model.decode(z, 1, noise)
    return operations


def bench_count(args, size):
    for dec, on_gpu in itertools.product(args.dec, (False, True)):
        operations = counted_decode(args.enc, dec, args.loss, size, on_gpu)
        print(f"decode {dec}, {size} px, {'GPU' if on_gpu else 'CPU'}: {operations.all.total()} operations, of which "
              f"kernels {operations.kernels.total()}:", flush=True)
        print("  " + ", ".join(f"{name} {count}" for name, count in operations.kernels.most_common()))


# ---------------------------------------------------------------------------------------------------------------------
# Training step

def random_lpips(device):
    """LPIPS with random weights, which costs the same."""
    from torchvision.models import vgg16
    with torch.device("meta"):                               # LPIPS leaves out the classifier, nine tenths of it
        features = vgg16(weights=None).features
    features.to_empty(device="cpu")
    for layer in features:
        if isinstance(layer, torch.nn.Conv2d):
            layer.reset_parameters()
    with tempfile.TemporaryDirectory() as folder:
        torch.save({f"features.{name}": value for name, value in features.state_dict().items()}, f"{folder}/vgg.pt")
        return LPIPSLoss("vgg", f"{folder}/vgg.pt").to(device)


def training_step(model, lpips, batch, size, dtype, device):
    """One step of train.py on a random batch, with a network of LPIPS or None: a callable."""
    objective, loss = Objective(model.train(), None), model.config["loss"]
    optimizer = adamw(objective.parameters(), 1e-4, 1e-3, device)
    weights = {loss: 1.0, "lpips": W_LPIPS, "kl": W_KL}
    x = place(torch.randn(batch, 3, size, size), torch.float32, device)
    e, eps, level = draw(0, 0, range(batch), x.shape[1:], model.latent_shape(size, size), device, loss)
    good = torch.tensor(True, device=device)

    def step():
        with autocast(device, dtype if dtype is torch.bfloat16 else None):
            terms, _, _, estimate = objective(x, e, eps, level)
            if lpips is not None:
                terms["lpips"] = lpips(x, estimate).mean()
        weighted_sum(terms, weights).backward()
        step_if(good, [optimizer])
        optimizer.zero_grad()
    return step


def bench_train(args, lpips, size, dtype, device):
    """A step of train.py, of either loss, with and without LPIPS."""
    tasks, networks = {}, {}
    for dec, loss, perceptual in itertools.product(args.dec, ("fm", "eqm"), (None, lpips)):
        name = f"U-ViT {dec} {loss}" + (" + LPIPS" if perceptual else "")
        networks[name] = place(our_model(args.enc, dec, loss, args.enc_width), torch.float32, device)
        networks[name].decoder.checkpointing = args.checkpointing
        tasks[name] = functools.partial(training_step, lpips=perceptual, batch=args.batch_size, size=size, dtype=dtype,
                                        device=device)
    print_bench(f"training step, {size} px", tasks, networks, None, dtype, device, args)


# ---------------------------------------------------------------------------------------------------------------------
# Reading images

def write_jpegs(folder, width, height):
    """Smooth colours with some grain: about as many bytes a pixel as photographs."""
    rng = np.random.default_rng(0)
    for i in range(JPEG_COUNT):
        coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8))
        coarse.resize((width, height), Image.BICUBIC).save(Path(folder, f"{i}.jpg"), quality=90)


def plain_loader(folder):
    """What a loader for training usually is: torchvision's ImageFolder, resized and cropped at random."""
    from torchvision import datasets
    from torchvision import transforms as T

    def resized(image):
        return T.functional.resize(image, int(CROP * (1 + random.random())))

    return datasets.ImageFolder(folder, T.Compose([
        T.Lambda(resized), T.RandomCrop(CROP), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize((0.5,), (0.5,))]))


def bench_input(rounds):
    """Images/s of a loader's worker that prepares JPEG files for training at 128 px, beside torchvision's ImageFolder.
    Ours hands on 8 bit levels, which become floats on the device."""
    for width, height in JPEG_SIDES:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "class").mkdir()
            write_jpegs(Path(folder, "class"), width, height)
            theirs, ours = plain_loader(folder), make_dataset(folder, CROP, train=True, aug_scale=2.0)

            def read_theirs(dataset=theirs):
                return [dataset[i] for i in range(JPEG_COUNT)]

            def read_ours(dataset=ours):
                return dataset.__getitems__(range(JPEG_COUNT))

            seconds = interleaved({"ImageFolder": read_theirs, "ours": read_ours}, torch.device("cpu"), rounds)
        rates = [f"{name} {JPEG_COUNT / float(np.median(t)):.0f} images/s" for name, t in seconds.items()]
        ratio = float(np.median(seconds["ImageFolder"] / seconds["ours"]))
        print(f"input, JPEG {width} x {height} to {CROP} px, one worker: {', '.join(rates)}, {ratio:.2f} x")


# ---------------------------------------------------------------------------------------------------------------------
# What needs a GPU

def bench_gpu(args, device):
    """Everything in turn, as far as the minutes reach; what is most worth knowing first, the compiler last."""
    others, lpips, begin = peers() | named_peers(args.peer), random_lpips(device), time.monotonic()
    graphs.MOST_VALUES = float("inf")  # to see where graphs no longer help
    sizes = args.size or GPU_SIZES
    jobs = [(bench_decode, others, size, batch, False) for size in sizes for batch in GPU_BATCHES]
    jobs += [(bench_encode, others, sizes[0], batch, False) for batch in GPU_BATCHES]
    jobs += [(bench_train, lpips, min(GPU_TRAIN[0], sizes[0]), GPU_TRAIN[1], True)]
    jobs += [(bench_decode, others, sizes[0], batch, True) for batch in GPU_BATCHES]
    for bench, others_or_lpips, size, batch, compiles in jobs:
        args.batch_size, args.compile = batch, compiles
        if time.monotonic() - begin > 60 * args.minutes:
            print(f"{bench.__name__}, {size} px, batch {args.batch_size}: left out, the time is up")
            continue
        try:
            with torch.set_grad_enabled(bench is bench_train):
                bench(args, others_or_lpips, size, torch.bfloat16, device)
        except torch.OutOfMemoryError:
            print(f"{bench.__name__}, {size} px, batch {args.batch_size}: out of memory", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("tasks", nargs="*", metavar="TASK", help=f"of {' '.join(TASKS + MORE_TASKS)}; default: "
        f"{' '.join(TASKS)}")
    add("--size", type=flags.count, nargs="+", metavar="N", help="image sides in pixels [256; gpu: 256 512 1024]")
    add("--dtype", choices=list(DTYPES), nargs="+", default=["float32"], help="of weights and maps %(default)s; in the "
        "training step of autocast")
    add("--batch_size", type=flags.count, default=1, metavar="N", help="images at a time [%(default)s]")
    add("--rounds", type=flags.count, default=7, metavar="N", help="timed calls of each [%(default)s]")
    add("--device", metavar="NAME", help="default: cuda, mps or cpu, the first that is there")
    add("--dec", nargs="+", choices=list(SIZES), default=["S", "M"], help="decoder sizes [S M]")
    add("--enc", default="dc_f32c32", metavar="NAME", help="encoder, and the latents of the decoders [%(default)s]")
    add("--enc_width", type=flags.positive, default=0.125, metavar="X", help="encoder width in the training step "
        "[%(default)s]")
    add("--peer", nargs="+", default=[], metavar="NAME", help="more autoencoders of diffusers', as in evaluate.py")
    add("--loss", choices=["fm", "eqm"], default="eqm", help="the decoder that is timed [%(default)s]")
    add("--compile", action="store_true", help="also time torch.compile")
    add("--minutes", type=flags.positive, default=8.0, metavar="X", help="gpu: start nothing after these [%(default)s]")
    add("--checkpointing", action="store_true", help="train with activation checkpointing")
    args = parser.parse_args()
    tasks = args.tasks or TASKS
    if not set(tasks) <= set(TASKS + MORE_TASKS):
        parser.error(f"tasks are {' '.join(TASKS + MORE_TASKS)}")
    _, _, device = setup(args.device)
    if args.compile:
        check_compiler(device)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU"
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, channels_last")
    combinations = list(itertools.product([DTYPES[name] for name in args.dtype], args.size or [256]))
    others = peers() | named_peers(args.peer) if "decode" in tasks or "encode" in tasks else {}
    with torch.no_grad():
        for task, bench in (("decode", bench_decode), ("encode", bench_encode)):
            if task in tasks:
                for dtype, size in combinations:
                    bench(args, others, size, dtype, device)
    if "train" in tasks:
        lpips = random_lpips(device)
        for dtype, size in combinations:
            bench_train(args, lpips, size, dtype, device)
    if "input" in tasks:
        bench_input(args.rounds)
    if "count" in tasks:
        for size in args.size or [256]:
            bench_count(args, size)
    if "gpu" in tasks:
        bench_gpu(args, device)


if __name__ == "__main__":
    guarded(main)
