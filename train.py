"""Train the autoencoder: encoder and diffusion decoder together, from scratch or from a pretrained encoder.

    python train.py --preset tiny                                         # two CPU cores, no network: a few minutes
    torchrun train.py --enc dc_f32c32 --loss eqm --data DIR               # one GPU
    torchrun --nproc_per_node=8 train.py --enc dc_f32c32 --loss fm --data DIR --compile    # one node

The objective is SSDD's (arXiv 2510.04961): FM or EqM + 0.5 LPIPS + 0.25 REPA + 1e-6 KL. Everything random - data order,
crops, noise, times, posterior draws - is a function of (seed, step, sample), so a run does not depend on processes,
micro-batches or interruptions.
Writes to --out: model.safetensors (EMA weights), best.safetensors (those of the evaluation with the highest one-step
PSNR), latest.pt and previous.pt (to resume), log.jsonl, reconstructions.png, metrics.json.
"""
import argparse
import atexit
import collections
import copy
import functools
import glob
import inspect
import itertools
import json
import math
import multiprocessing
import os
import secrets
import signal
import sys
import time
import zipfile
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from data import (
    BROKEN_ARCHIVE,
    BROKEN_FILE,
    MANY,
    check_compiler,
    check_numbers,
    default_workers,
    first_line,
    gathered,
    guarded,
    lock_folder,
    make_dataset,
    make_loader,
    only_warns,
    parts_taken,
    ready_folder,
    setup,
    strict,
    warn_of_idle_flags,
    write_whole,
)
from encoder import has_triton, parse_name
from evaluate import REFERENCES, evaluate, print_table, write_results
from fid import SMALLEST, first_reason, wanted_networks
from model import (
    DCSSDAE,
    FORMAT,
    LINEAR_FORMAT,
    SIZES,
    AdaGN,
    check_config,
    check_folder,
    check_size,
    compile_blocks,
    local_file,
)
from sampler import seeded_generator

from losses import (LPIPSLoss, PatchGAN, REPALoss, WeightsUnavailable, eqm_loss, fm_loss, fm_mix,  # isort: skip
                    fm_predict_x, hinge_loss, kl_loss, repa_projection)

# Two cores without GPU or network. Measured results stand in the README's quick start.
TEACHING = {"enc_width": 0.125, "dec": "XS", "depth": 2, "optimizer": "muon", "lr": 1e-3, "warmup": 50, "decay": 0.5,
            "ema": 0.99, "w_lpips": 0.0, "w_repa": 0.0, "compile": False}
PRESETS = {
    "tiny": TEACHING | {"enc": "dc_f8c16", "size": 32, "batch_size": 8, "steps": 1000, "t_mean": 2.0, "g_power": 2.0,
                        "eval_every": 250, "eval_images": 256, "save_every": 500},
    "deep": TEACHING | {"enc": "dc_f32c32", "size": 64, "batch_size": 4, "steps": 1200, "t_mean": 4.0, "g_power": 20.0,
                        "eval_every": 300, "eval_images": 64, "save_every": 600},
}

# DC-AE's decoupled high-resolution adaptation (arXiv 2410.10733): its learning rates; batch and steps are our choice.
PHASES = {
    1: {"size": 256, "lr": 6.4e-5},                                          # everything, at low resolution
    2: {"size": 512, "lr": 1.6e-5, "aug_scale": 1.0, "batch_size": 48, "steps": 25_000,
        "w_repa": 0.0},                                                      # the latent, at high: REPA would cost most
    3: {"size": 256, "lr": 5.4e-5, "steps": 50_000, "w_repa": 0.0},          # details, at low: later layers than REPA's
}
# What --init_from's file decides; and what --resume may change, being neither model nor samples nor objective.
MODEL_FLAGS = ("enc", "enc_width", "dec", "depth", "window", "loss", "c", "a", "b", "lam", "input_skip", "without",
               "linear")
FREE_FLAGS = ("preset", "init_from", "enc_ckpt", "lpips_weights", "repa_weights", "workers", "steps", "lr", "warmup",
              "decay", "weight_decay", "grad_clip", "ema", "ema_start", "micro_batch", "checkpointing", "out", "resume",
              "keep", "dtype", "device", "compile", "eval_every", "eval_steps", "eval_images", "save_every",
              "log_every", "tensorboard", "wandb", "allow_changes", "eval_metrics", "inception")
# With --allow_changes. Not those that add or remove networks that train.
CHANGEABLE_FLAGS = ("data", "size", "aug_scale", "enlarge", "limit", "batch_size", "seed", "w_lpips", "w_kl",
                    "repa_size", "gan_start", "t_mean", "g_power", "teacher_steps", "t_shift", "eta", "mu")


# --linear: does the encoder start as the linear code (encoder.LappedCode), does the decoder start with its transpose?
LINEAR = {"both": (True, True), "encoder": (True, False), "decoder": (False, True), "off": (False, False)}
FITTED_COEFFICIENTS = 8  # for each latent channel, of a decoder fitted to a given encoder: those beyond are too fine to
#                          be guessed linearly
FIT_CELLS, FIT_LEAST, FIT_MOST, FIT_BATCH = 16, 256, 2048, 16  # of that fit: cells for each channel, images
BETAS = (0.9, 0.99)  # AdamW's memory: about 10 steps of the gradient, 100 of its square
ADAM_MOMENTS = ["exp_avg", "exp_avg_sq", "step"]  # of a parameter, as torch names them
MUON_MOMENTUM = 0.95  # Muon's memory: about 20 steps of the gradient
MUON_RMS = 0.2  # of the entries of its steps, over lr
MUON_SMALLEST = 16  # rows and columns of the matrices that it trains
GAN_BETAS = (0.5, 0.9)  # the discriminator's, as VQGAN's: it chases a target that moves
FLAG_TYPES = (str, int, float)  # of values on a command line
OWN_FLAGS = ("data", "out", "init_from", "enc_ckpt", "ckpt", "lpips_weights", "repa_weights", "inception", "features",
             "latents", "workers")  # of a process: they may differ between machines
TRAINED_PARTS = ("model", "repa")  # of a checkpoint: what the main optimisers train, in the order of their parameters
MOST_SKIPPED = 10  # steps in a row that are not finite: what goes wrong so often will not go away
MOST_NAMED = 24  # images of the last of them, in the message
VALIDATION_BATCH = 64  # images at a time in each process
WRITTEN = ("model.safetensors", "best.safetensors", "latest.pt", "previous.pt", "log.jsonl", "metrics.json",
           "reconstructions.png")  # by a run into --out


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def get_args(argv=None):
    p = make_parser(__doc__, "Flags win over --preset, --preset over --phase, and that over the defaults in [].")
    add = p.add_argument
    add("--preset", type=str, choices=sorted(PRESETS), help="named set of defaults")
    add("--phase", type=int, choices=sorted(PHASES), help="DC-AE's training in three: 1 everything at 256 px, 2 the "
        "latent at 512 px, 3 the decoder's last layers at 256 px; without it SSDD's: everything at 128 px")
    add("--init_from", metavar="FILE", type=str, help="start from a run's model.safetensors, which decides the model")

    add = p.add_argument_group("model").add_argument
    add("--enc", metavar="NAME", type=str, default="dc_f32c32",
        help="(vq|dc|dcae)_f<8|16|32|64|128>c<channels>, or dcae_f32c32_sana [%(default)s]")
    add("--enc_width", type=float, default=1.0, help="multiplies the encoder's widths; to teach: 0.125 [%(default)s]")
    add("--enc_ckpt", metavar="FILE", type=str, help="start the encoder from a file or hf://owner/repo/file (README)")
    add("--freeze_enc", action="store_true", help="train the decoder only, on a given encoder")
    add("--dec", type=str, choices=list(SIZES), default="S", help="decoder size [%(default)s]")
    add("--depth", type=int, help="decoder transformer blocks, instead of the size's own")
    add("--window", type=int, default=17, help="tokens of 8 x 8 pixels a side that one attends to: odd [%(default)s]")
    add("--input_skip", action=argparse.BooleanOptionalAction, default=True, help="add the noisy image to the "
        "decoder's output (UViT's skip); off, as published, the network carries the noise itself [on]")
    add("--linear", type=str, choices=list(LINEAR), default="both", help="parts that start as the linear code; a given "
        "encoder stays as it is, and its decoder starts as a least-squares fit; off, as published [%(default)s]")
    add("--without", type=str, nargs="+", default=[], choices=["context", "norm_z"], help="for ablations: no way of "
        "the latent to the adaptive norms, no normalisation of the latent")

    add = p.add_argument_group("objective").add_argument
    add("--loss", type=str, choices=["fm", "eqm"], default="eqm", help="flow or equilibrium matching [%(default)s]")
    add("--c", type=str, choices=["linear", "trunc", "piecewise"], default="linear",
        help="EqM: how the field falls to zero at the data; but for linear with --linear off or encoder [%(default)s]")
    add("--a", type=float, default=0.8, help="EqM: where trunc and piecewise begin to fall to zero [%(default)s]")
    add("--b", type=float, default=1.4, help="EqM: piecewise's value at the noise end [%(default)s]")
    add("--lam", type=float, default=1.0, help="EqM: scale of the field [%(default)s]")
    add("--t_mean", type=float, default=0.0, help="FM: t = sigmoid(n), n ~ N(t_mean, 1); above 0 trains more on the "
        "noise end, where one step begins [%(default)s]")
    add("--g_power", type=float, default=1.0, help="EqM: g = u ** g_power, u ~ U(0, 1); above 1 trains more on the "
        "noise end [%(default)s]")
    add("--w_kl", type=float, default=1e-6, help="weight of the KL term (sum over the latent) [%(default)s]")
    add("--w_gan", type=float, default=0.0, help="weight of a PatchGAN on the one-step estimate; 0: off [%(default)s]")
    add("--gan_start", type=int, default=0, help="first step with the GAN [%(default)s]")

    image_arguments(p)
    run = run_arguments(p)
    run("--eval_steps", type=int, nargs="+", default=[1, 4], help="sampler steps of evaluations %(default)s")

    known = p.parse_known_args(argv)[0]
    p.set_defaults(**PHASES.get(known.phase, {}))
    p.set_defaults(**PRESETS.get(known.preset, {}))
    given = {}
    if known.init_from and not (known.resume and known.out and checkpoint_files(known.out)):  # compare_flags sees to it
        given = model_flags(known.init_from)
    elif known.init_from:
        given = flags_of_run(known.out)
    p.set_defaults(**given)
    args = p.parse_args(argv)
    check_numbers(args)
    differ = [name for name in given if given[name] != getattr(args, name)]
    if differ:
        raise ValueError(f"--init_from {args.init_from} holds a model with{flags(given, differ)}, "
                         f"but{flags(vars(args), differ)} was given: leave it out, the file decides")
    if not args.out:
        name = f"{args.preset or args.enc}_{args.loss}"
        if args.phase:
            name += f"_phase{args.phase}"
        args.out = os.path.join("runs", name)
    warn_of_idle_flags(p, args, idle_of_objective(args) | idle_of_images(args), argv)
    return args


def idle_of_objective(args):
    """{flag of train.py that has no effect: why}"""
    idle = {}
    if args.loss == "fm":
        idle |= dict.fromkeys(("c", "a", "b", "lam", "g_power"), "with --loss fm")
    else:
        idle["t_mean"] = "with --loss eqm"
        if args.c == "linear":
            idle["a"] = "with --c linear"
        if args.c != "piecewise":
            idle["b"] = f"with --c {args.c}"
    if not args.w_gan:
        idle["gan_start"] = "without --w_gan"
    return idle


def idle_of_images(args):
    """{flag of image_arguments and run_arguments that has no effect: why}"""
    idle = {}
    if args.data == "demo":
        idle |= dict.fromkeys(("aug_scale", "enlarge"), "on built-in images, which are drawn at --size")
    if args.w_lpips == 0 and "lpips" not in args.eval_metrics:
        idle["lpips_weights"] = "without --w_lpips or --eval_metrics lpips"
    if not args.w_repa:
        idle |= dict.fromkeys(("repa_size", "repa_weights"), "without --w_repa")
    if "rfid" not in args.eval_metrics:
        idle["inception"] = "without --eval_metrics rfid"
    if not args.resume:
        idle["allow_changes"] = "without --resume"
    return idle


def model_flags(path):
    """The flags that describe the model in a file: {name: value}."""
    config = DCSSDAE.load(path).config
    values = {name: config[name] for name in MODEL_FLAGS if name != "linear"}
    parts = bool(config["linear_encoder"]), bool(config["linear_decoder"])
    for name, starts in LINEAR.items():
        if starts == parts:
            values["linear"] = name
    return values


def flags_of_run(out):
    """As model_flags, from the newest checkpoint of a run that can be read; {} where none can."""
    for path in checkpoint_files(out):
        try:
            state = map_checkpoint(path)
            problem = checkpoint_problem(state)
        except BROKEN_ARCHIVE:
            continue
        if problem is None:
            return {name: state["args"][name] for name in MODEL_FLAGS if name in state["args"]}
    return {}


def make_parser(doc, epilog):
    formatter = functools.partial(argparse.MetavarTypeHelpFormatter, max_help_position=26)  # float, int: not the name
    return argparse.ArgumentParser(description=doc.split("\n\n")[0], epilog=epilog, usage="%(prog)s [flags]",
                                   formatter_class=formatter)


def flags(values, names):
    """The named values as they stand on a command line, each after a space."""
    return "".join(f" --{name} {values[name]}" for name in names)


def image_arguments(p):
    """The flags of programs that train on images: data, losses and metrics in the features of pretrained networks."""
    add = p.add_argument_group("data").add_argument
    add("--data", metavar="DIR", type=str, default="demo",
        help="demo (built in), imagenette, cifar10, or a folder of images [%(default)s]")
    add("--size", type=int, default=128, help="crop, pixels a side: a multiple of 8 and the encoder's f [%(default)s]")
    add("--aug_scale", type=float, default=2.0,
        help="random resize of the short side in [size, size * aug_scale] before the crop [%(default)s]")
    add("--enlarge", action="store_true", help="resize beyond a picture's own pixels too, as SSDD does; else its short "
        "side is the limit")
    add("--limit", type=int, help="use only N training images, evenly spread over the set")
    add("--workers", type=int, default=default_workers(),
        help="data loading processes per training process [%(default)s]")

    add = p.add_argument_group("losses and metrics in the features of pretrained networks").add_argument
    add("--w_lpips", type=float, default=0.5, help="weight of LPIPS (VGG-16); 0: off [%(default)s]")
    add("--lpips_weights", metavar="FILE", type=str, help="torchvision's VGG-16; else torch hub's cache or a download")
    add("--w_repa", type=float, default=0.25, help="weight of REPA (DINOv2 ViT-B/14); 0: off [%(default)s]")
    add("--repa_size", type=int, default=256, help="DINOv2 sees larger images shrunk to this side: its attention costs "
        "the fourth power [%(default)s]")
    add("--repa_weights", metavar="FILE", type=str, help="DINOv2 ViT-B/14; else Hugging Face's cache or a download")
    add("--eval_metrics", type=str, nargs="*", default=[], choices=["lpips", "rfid"], help="what evaluations measure "
        "too: LPIPS with --lpips_weights' network, Frechet distance in FID's Inception; default: neither")
    add("--inception", metavar="FILE", type=str, help="FID's Inception; else torch hub's cache or a download")

    add = p.add_argument_group("memory and speed").add_argument
    add("--micro_batch", type=int, help="images per forward pass and process; gradients add up to the batch's")
    add("--checkpointing", action="store_true", help="less memory: compute residual blocks twice")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile for the networks' blocks; default: on "
        "NVIDIA's GPUs, where Triton is installed, but with --preset")


def run_arguments(p):
    """The flags of any training run, with the defaults of train.py. -> add_argument of the group "run"."""
    add = p.add_argument_group("optimisation").add_argument
    add("--batch_size", type=int, default=192, help="images per step over all processes [%(default)s]")
    add("--steps", type=int, default=250_000, help="optimiser steps [%(default)s]")
    add("--optimizer", type=str, choices=["adamw", "muon"], default="adamw", help="muon: for the weights of "
        "convolutions and linear layers, AdamW for the others [%(default)s]")
    add("--lr", type=float, default=3e-4, help="learning rate [%(default)s]")
    add("--warmup", type=int, default=1000, help="steps of linear warm-up [%(default)s]")
    add("--decay", type=float, default=0.0, help="last fraction of the steps, in which lr falls to 0 [%(default)s]")
    add("--weight_decay", type=float, default=1e-3, help="weight decay [%(default)s]")
    add("--grad_clip", type=float, default=1.0, help="largest gradient norm; 0: no limit [%(default)s]")
    add("--ema", type=float, default=0.999, help="decay of the weights' average, which is what is saved [%(default)s]")
    add("--ema_start", type=int, default=0, help="until then the average is the weights themselves [%(default)s]")

    add = run = p.add_argument_group("run").add_argument
    add("--out", metavar="DIR", type=str, help="folder of the run; else named after what is trained")
    add("--resume", action="store_true", help="continue the run in --out from its newest checkpoint")
    add("--allow_changes", action="store_true", help="resume with other images, samples, levels or weights of losses")
    add("--keep", type=int, default=2, help="checkpoints: latest.pt, previous.pt, previous2.pt, ... [%(default)s]")
    add("--device", metavar="NAME", type=str, help="cuda, mps or cpu; else the best there is")
    add("--dtype", type=str, choices=["auto", "float32", "bf16"], default="auto",
        help="bf16: autocast; auto: bf16 where the hardware has it [%(default)s]")
    add("--seed", type=int, default=0, help="of everything random [%(default)s]")
    add("--eval_every", type=int, default=5000, help="steps between evaluations; 0: only at the end [%(default)s]")
    add("--eval_images", type=int, default=64, help="validation images of evaluations [%(default)s]")
    add("--save_every", type=int, default=5000, help="steps between checkpoints [%(default)s]")
    add("--log_every", type=int, default=50, help="steps between lines of log.jsonl [%(default)s]")
    add("--tensorboard", action="store_true", help="the log and the pictures for TensorBoard too, in --out")
    add("--wandb", action="store_true", help="the same for Weights & Biases (WANDB_MODE=offline: into --out alone)")
    return run


def check_args(args):
    """Complaints about train.py's own flags and combinations, before anything is built on them."""
    if args.phase in (2, 3) and not (args.init_from or args.resume):
        raise ValueError(f"--phase {args.phase} goes on from a trained model: give --init_from FILE")
    if args.freeze_enc and (args.phase == 2 or not (args.enc_ckpt or args.init_from)):
        raise ValueError("--freeze_enc needs an encoder, given by --enc_ckpt FILE, and not --phase 2, which adapts it")
    if LINEAR[args.linear][1] and args.loss == "eqm" and args.c != "linear" and not args.resume:
        raise ValueError(f"--c {args.c} needs --linear off or encoder: beside a linear decoder the field is "
                         "lam c(0) (x_g - D), and only with --c linear is the target of that form")
    if LINEAR[args.linear][1] and not args.input_skip:
        raise ValueError("--no-input_skip needs --linear off or encoder: a linear decoder is part of the input skip")
    if args.w_gan and args.size < 24:
        raise ValueError(f"--w_gan needs images of at least 24 px, got --size {args.size}")


# ---------------------------------------------------------------------------------------------------------------------
# Pieces that distill.py shares: what is built

def check_shared(args, world):
    """Complaints about the flags that programs have in common."""
    check_same_flags(args, world)
    check_folder(args.out)
    if args.batch_size % world:
        raise ValueError(f"--batch_size {args.batch_size} must be a multiple of the {world} processes")


def check_same_flags(args, world):
    """ValueError where processes were started with different flags. Paths may differ from machine to machine, and so
    may what depends on its processors."""
    mine = {name: value for name, value in vars(args).items() if name not in OWN_FLAGS}
    of_all = gathered(mine, world)
    for rank, theirs in enumerate(of_all):
        differ = [name for name in mine if theirs[name] != of_all[0][name]]
        if differ:
            raise ValueError(f"the processes have different flags: rank 0 has{flags(of_all[0], differ)}, rank {rank} "
                             f"has{flags(theirs, differ)}: start all with the same command")


def pick_dtype(name, device):
    """torch.bfloat16 or None (float32, no autocast)."""
    if name == "auto":
        if device.type == "cuda":
            # Older GPUs say that they support it, too, and emulate it slowly.
            is_fast = torch.cuda.is_bf16_supported() and torch.cuda.get_device_capability(device) >= (8, 0)
        else:
            is_fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
        name = "bf16" if is_fast else "float32"
    return torch.bfloat16 if name == "bf16" else None


def compiles(args, device):
    """Whether to compile: --compile or --no-compile, else where it is known to pay."""
    if args.compile is not None:
        return args.compile
    return device.type == "cuda" and has_triton(device)


def prefer_speed(device):
    """TF32 for what autocast leaves in float32, and the fastest convolutions for maps of one size."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


def autocast(device, dtype):
    return torch.autocast(device.type, dtype=dtype) if dtype else nullcontext()


def perceptual_losses(args, width, rank, world):
    """(LPIPS or None, REPA or None, {name: reason} of those left out).

    A network that cannot be had stops the program, so that an objective never changes silently; only on the built-in
    images, which anybody should be able to try offline, is the term left out, in one visible line.
    """
    networks, left_out = {"lpips": None, "repa": None}, {}
    for name, weight in (("lpips", args.w_lpips), ("repa", args.w_repa)):
        if not weight:
            continue
        file, reason = getattr(args, f"{name}_weights"), None
        try:
            if name == "lpips":
                networks[name] = LPIPSLoss("vgg", local_file(file))
            else:
                networks[name] = REPALoss(width, local_file(file), args.repa_size)
        except WeightsUnavailable as error:
            if args.data != "demo" or file:
                raise
            reason = str(error)
        reason = first_reason(reason, world) if args.data == "demo" else None
        if reason:
            networks[name], left_out[name] = None, reason
            if rank == 0:
                print(f"NOTE: training WITHOUT {name.upper()} on the built-in images: {reason}", flush=True)
    return networks["lpips"], networks["repa"], left_out


def evaluation_networks(args, val, lpips, device, world):
    """({metric: distance}, {metric: features}) of --eval_metrics, on the device, as `evaluate` takes them.

    val  validation images;  lpips  the loss's network, which then serves here too, or None
    ValueError, the same on all ranks, where a network cannot be had, or the images are too small or too few for it:
    who asks for a metric by name should not miss it after days of training.
    """
    nets, files, features = [], [], []
    if "lpips" in args.eval_metrics:
        nets, files = ["vgg"], [args.lpips_weights]
    if "rfid" in args.eval_metrics:
        features = ["inception"]
    wanted = argparse.Namespace(lpips_net=nets, lpips_weights=files, features=features, inception=args.inception,
                                dinov2=None, dreamsim=False)
    networks, problem = {}, None
    try:
        if features and len(val) < 2:
            raise ValueError("a covariance needs at least 2 validation images")
        for metric, (_, build) in wanted_networks(wanted, args.size, device).items():
            least = SMALLEST.get(metric, 0)
            if args.size < least:
                raise ValueError(f"{metric} needs images of at least {least} px, got --size {args.size}")
            is_there = metric == "lpips_vgg" and lpips is not None
            networks[metric] = lpips if is_there else build().to(device)
    except (OSError, ValueError, ImportError) as error:
        problem = " ".join(str(error).split())
    problem = first_reason(problem, world)
    if problem:
        raise ValueError(f"--eval_metrics {' '.join(args.eval_metrics)}: {problem}")
    distances = {metric: network for metric, network in networks.items() if metric != "rfid"}
    return distances, {metric: network for metric, network in networks.items() if metric == "rfid"}


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal, for weights that are matrices: all directions of a weight learn equally
    fast, not only the few that a gradient points to (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    A convolution (out, in, k, k) is a matrix (out, in k k). The entries of a step have the root mean square MUON_RMS,
    about that of Adam's, so that both share one learning rate (Liu et al. 2025, arXiv 2502.16982, section 2.2).
    """

    def __init__(self, parameters, lr, weight_decay):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, good):
        """One step where `good`, a bool tensor, is true, else none; nothing is read back from the device."""
        group = self.param_groups[0]
        by_shape = {}  # matrices of one shape are made orthogonal together
        for p in group["params"]:
            if p.grad is None:
                continue
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            momentum = self.state[p]["momentum"]
            grad = torch.where(good, p.grad, momentum)  # what is not finite would stay in there
            momentum.lerp_(grad, 1 - MUON_MOMENTUM)
            update = grad.lerp(momentum, MUON_MOMENTUM).flatten(1)                    # Nesterov's; (rows, columns)
            by_shape.setdefault(update.shape, []).append((p, update))
        for shape, members in by_shape.items():
            with without_tf32():
                updates = orthogonal(torch.stack([update for _, update in members]))  # (n, rows, columns)
            size = group["lr"] * MUON_RMS * max(shape) ** 0.5  # entries of an orthogonal one: 1 / sqrt(max(shape))
            for (p, _), update in zip(members, updates):
                p.mul_(1 - good * group["lr"] * group["weight_decay"])
                p.sub_(good * size * update.view(p.shape))


def orthogonal(matrices):
    """(n, rows, columns) -> nearly U V' of each U S V': all singular values go to about 1, between 0.7 and 1.2, by five
    Newton-Schulz steps X <- P X, P = a + b X X' + c (X X')^2, with Jordan's coefficients. Zero stays zero.

    The steps are taken by X X' alone, a third of the work where a convolution has 9 times as many columns as rows: as
    all of this commutes, the next X X' is P X X' P.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    tiny = torch.finfo(x.dtype).tiny
    x = x / x.abs().amax(dim=(1, 2), keepdim=True).clamp(min=tiny)                    # or squares would underflow
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=tiny)
    one = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    gram, product = x @ x.mT, one
    for _ in range(5):
        factor = a * one + b * gram + c * gram @ gram                                 # P
        product = factor @ product
        gram = factor @ gram @ factor
    x = product @ x
    return x.mT if is_tall else x


@contextmanager
def without_tf32():
    """Products in float32: where rounding makes an eigenvalue of X X' negative, the steps make it grow."""
    products = torch.backends.cuda.matmul
    before, products.allow_tf32 = products.allow_tf32, False
    try:
        yield
    finally:
        products.allow_tf32 = before


def is_matrix(p):
    """Whether a weight is Muon's: of a linear layer or a convolution, and not so narrow as those at the image."""
    return p.ndim in (2, 4) and min(p.flatten(1).shape) >= MUON_SMALLEST


def make_optimizers(parameters, args, device):
    """{part of a checkpoint: optimiser or None}: AdamW for all weights, or with --optimizer muon for those that are no
    matrices."""
    matrices = []
    if args.optimizer == "muon":
        matrices = [p for p in parameters if is_matrix(p)]
        parameters = [p for p in parameters if not is_matrix(p)]
    adamw = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay, betas=BETAS,
                              fused=device.type != "mps")
    muon = Muon(matrices, args.lr, args.weight_decay) if matrices else None
    return {"optimizer": adamw, "muon": muon}


def data_parallel(objective, world):
    """The objective, with gradients averaged over the processes."""
    if world == 1:
        return objective
    options = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    buffers = "forward_sync_buffers"
    if buffers not in options:  # before torch 2.13
        buffers = "broadcast_buffers"
    return nn.parallel.DistributedDataParallel(objective, gradient_as_bucket_view=True, **{buffers: False})


def training_batches(args, dataset, rank, world, start, device):
    """Endless (x, index) from step `start` on, x on the device. torchrun and schedulers send SIGTERM to every process:
    the workers ignore it, since without them the step at hand would fail, and so must be killed at the end."""
    loader = make_loader(dataset, args.batch_size, train=True, workers=args.workers, seed=args.seed,
                         rank=rank, world=world, start=start, device=device)
    loader.worker_init_fn = ignore_stop
    atexit.register(kill_workers)
    return iter(loader)


def validation_batches(val, args, rank, world, device):
    """This process's share of the validation images, once, as (x, index). Workers where whole batches can be read
    ahead: starting one for less takes longer than it wins."""
    ahead = len(val) // (VALIDATION_BATCH * world) - 1  # whole batches of each process after its first
    loader = make_loader(val, VALIDATION_BATCH * world, train=False, workers=min(args.workers, max(0, ahead)),
                         rank=rank, world=world, device=device)
    loader.worker_init_fn = ignore_stop
    return loader


def ignore_stop(worker):
    for s in stop_signals():
        signal.signal(s, signal.SIG_IGN)


def stop_signals():
    """What asks a run to save and end: Ctrl-C, schedulers' warnings, a lost terminal unless nohup was told to ignore
    it."""
    asked = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGUSR1"):
        asked.append(signal.SIGUSR1)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        asked.append(signal.SIGHUP)
    return asked


def kill_workers():
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where torch would raise an error about them
    for worker in multiprocessing.active_children():
        worker.kill()


# ---------------------------------------------------------------------------------------------------------------------
# Pieces that distill.py shares: a step

def draw(seed, step, rows, x_shape, z_shape, device, t_mean=None, g_power=1.0):
    """What is random in a step, per sample from (seed, step, row): noise e (B, *x_shape), posterior noise
    (B, *z_shape), level s (B,).

    t_mean   a number: s = sigmoid(n), n ~ N(t_mean, 1), FM's t (SSDD). None: s = u^g_power, u ~ U(0, 1), EqM's g
    """
    e, eps, s = [], [], []
    for row in rows:
        gen = seeded_generator(device, seed, step, row)
        if t_mean is None:
            s.append(torch.rand((), generator=gen, device=device))
        else:
            n = torch.randn((), generator=gen, device=device) + t_mean
            s.append(n.sigmoid())
        eps.append(torch.randn(z_shape, generator=gen, device=device))
        e.append(torch.randn(x_shape, generator=gen, device=device))
    s = torch.stack(s)
    if t_mean is None:
        s = s ** g_power
    return torch.stack(e), torch.stack(eps), s


def matching(network, eqm, x, e, z, s):
    """The decoder's own loss at s (B,), FM's t (1: noise) or EqM's g (1: data), of images x and noise e (B, 3, H, W):
    ({name: scalar}, one-step estimate (B, 3, H, W), the decoder's tokens).

    network  UViT.forward_with_tokens;  eqm  the EqM objective, None for FM
    """
    if eqm is None:
        x_t = fm_mix(x, e, s)
        v, tokens = network(x_t, z, s)
        return {"fm": fm_loss(v, x, e)}, fm_predict_x(x_t, v.float(), s), tokens
    x_g = eqm.mix(x, e, s)
    f, tokens = network(x_g, z)
    return {"eqm": eqm_loss(f, x, e, s, eqm)}, eqm.predict_x(x_g, f.float(), s), tokens


def clip_gradients(parameters, args):
    """Shorten the gradients to --grad_clip. -> their norm before, a number on the device."""
    return clip_grad_norm_(parameters, args.grad_clip or math.inf)


def set_learning_rate(optimizers, step, args):
    for optimizer in optimizers:
        if optimizer is not None:
            optimizer.param_groups[0]["lr"] = args.lr * lr_factor(step, args)


def lr_factor(step, args):
    """Linear warm-up, constant, linear fall to zero over the last `decay` of the steps."""
    rise = (step + 1) / max(1, args.warmup)
    fall = 1.0
    if args.decay:
        fall = (args.steps - step) / max(1.0, args.decay * args.steps)
    return min(1.0, rise, fall)


def paired_tensors(ema, model):
    """What update_ema works on, made once: (tensors of the average, of the model), floats, then all others. ValueError
    for models of other shapes."""
    averages, weights = ema.state_dict(), model.state_dict()
    if shapes_of(averages) != shapes_of(weights):
        raise ValueError("an average has the same weights as its model, of the same shapes")
    pairs = [*zip(averages.values(), weights.values())]
    floats = [pair for pair in pairs if pair[0].is_floating_point()]
    others = [pair for pair in pairs if not pair[0].is_floating_point()]
    return [*zip(*floats)], others


@torch.no_grad()
def update_ema(tensors, decay, step, good):
    """paired_tensors' parameters and float buffers (the latents' statistics too): ema <- decay * ema + (1 - decay) *
    model; faster in the first steps, a copy before step 0; nothing where `good`, a bool tensor, is false. ValueError
    for a decay that is not in [0, 1]."""
    if not 0 <= decay <= 1:
        raise ValueError(f"the decay of an average lies in [0, 1], got {decay}")
    decay = min(decay, (1 + step) / (10 + step)) if step >= 0 else 0.0
    (averages, values), others = tensors
    weight = good.to(averages[0].dtype) * (1 - decay)  # on the device, which alone knows
    if decay == 0:  # a copy to the last bit; slow on GPUs: one kernel for each tensor
        torch._foreach_lerp_(averages, values, [weight] * len(averages))
    else:  # what does not train stays as it is, to the last bit
        changes = torch._foreach_sub(values, averages)
        torch._foreach_mul_(changes, weight)
        torch._foreach_add_(averages, changes)
    for average, value in others:
        average.copy_(value)


def summed(values, world):
    """values (n,), summed over the processes, on their device."""
    if world == 1:
        return values
    there = values.cpu() if values.device.type == "mps" else values  # gloo has no Apple GPUs
    dist.all_reduce(there)
    return there.to(values.device)


def stop_flag(run):
    """1 where this process was asked to stop, else 0: (1,) float64 (float32 on Apple GPUs), filled on the device."""
    return torch.full((1,), float(run.stop.received > 0), dtype=exact_type(run.device), device=run.device)


def exact_type(device):
    """The most exact floating-point type that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64


def step_if(good, optimizers):
    """A step of each optimiser (None: of none), which changes nothing where `good`, a bool tensor, is false. It stays
    on the device."""
    for optimizer in optimizers:
        if isinstance(optimizer, Muon):
            optimizer.step(good)
        elif optimizer is not None and optimizer.param_groups[0]["fused"]:
            optimizer.found_inf = (~good).to(torch.float32)
            optimizer.step()
        elif optimizer is not None and good:  # Apple's GPUs, and checkpoints from before all were fused
            optimizer.step()


# ---------------------------------------------------------------------------------------------------------------------
# Pieces that distill.py shares: the run around the steps

class Run:
    """A run under way: where it logs and saves, and how far it is.

    parts     {name: module, optimiser or None}: what a checkpoint holds
    dataset   the images: content() says whether a resumed run has the same, name_of(i) which one is image i
    networks  evaluation_networks' of --eval_metrics
    done      steps;  skipped  those of them that were not finite
    """

    def __init__(self, args, rank, world, device, log_path, boards, parts, done, skipped, dataset, networks=({}, {})):
        self.args, self.rank, self.world, self.device = args, rank, world, device
        self.log_path, self.boards, self.parts = log_path, boards, parts
        self.done, self.skipped, self.skipped_in_a_row = done, skipped, 0
        self.dataset, self.content, self.networks = dataset, dataset.content(), networks
        self.originals = {}  # {metric: fid.Statistics} of the validation images, from the first evaluation on
        self.reports = collections.deque()  # of steps whose numbers nobody has read yet: see finish_step
        self.save_is_due, self.saved = False, done  # saved: steps done at the last save
        self.started, self.evaluating = time.monotonic(), 0.0  # seconds of all evaluations
        self.logged, self.logged_at = done, 0.0  # steps, and seconds of training, at the last line of the log
        self.stop = StopSignal()
        self.bar = tqdm(total=args.steps, initial=done, disable=rank != 0, unit="step", dynamic_ncols=True)


def restore(parts, checkpoint):
    """Read a checkpoint, or None for a new run, into the parts. -> (steps done, steps skipped). ValueError where they
    are other parts, or of another model."""
    if checkpoint is None:
        return 0, 0
    for name, part in parts.items():
        state = checkpoint.get(name)
        if (part is None) != (state is None):
            then, now = ("with", "without") if part is None else ("without", "with")
            raise ValueError(f"--resume continues a run {then} the part '{name}', and this one is {now} it: use the "
                             "flags of the first call, and give it the same networks")
        if part is None:
            continue
        if isinstance(part, torch.optim.Optimizer):
            # It keeps the tensors that it is given, here maps of the file. Rates and decays are this call's flags.
            own = part.state_dict()["param_groups"]
            if [group["params"] for group in own] != [group["params"] for group in state["param_groups"]]:
                raise ValueError(f"--resume continues a run whose part '{name}' trains other weights: use the flags of "
                                 "the first call")
            state = {"state": copy.deepcopy(state["state"]), "param_groups": own}
        try:
            part.load_state_dict(state)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"--resume continues a run whose part '{name}' is of another model "
                             f"({' '.join(str(error).split())[:200]}): use the flags of the first call") from None
    return checkpoint["step"], checkpoint.get("skipped", 0)


class Report(NamedTuple):
    """The numbers of a step, on their way from the device."""
    done: int                   # steps with this one
    names: list                 # of the loss terms
    values: torch.Tensor        # (n,) on the CPU: loss terms, gradient norm, whether to stop, whether all is finite
    arrived: object             # event of the GPU after which they are there, or None
    lr: float
    index: torch.Tensor         # (b,), which images
    seconds: float              # of training until then, without evaluations


def finish_step(run, totals, norm, stop, good, index):
    """Count a step; save where it is due; where a process was asked to stop, save and end the program.

    totals, norm, stop, good  {name: loss term}, gradient norm, sum of the stop_flags, whether all was finite: of the
                              device. They are read, logged and obeyed one step late, when the device has long been at
                              the next: waiting for them would leave it without work.
    """
    args = run.args
    run.done += 1
    run.bar.update()
    values = torch.stack([value.to(norm.dtype) for value in (*totals.values(), norm, stop, good)])
    values, arrived = values.to("cpu", non_blocking=run.device.type == "cuda"), None
    if run.device.type == "cuda":
        arrived = torch.cuda.Event()
        arrived.record()
    lr = run.parts["optimizer"].param_groups[0]["lr"]
    seconds = time.monotonic() - run.started - run.evaluating
    run.reports.append(Report(run.done, list(totals), values, arrived, lr, index, seconds))
    is_last = run.done == args.steps
    if is_last or run.done % args.save_every == 0:
        run.save_is_due = True
    stopped = read_reports(run, late=0 if run.save_is_due else 1)
    if stopped:
        run.save_is_due = True
        read_reports(run)
    if run.save_is_due and run.skipped_in_a_row == 0:  # a ruined model shows in skipped steps: never save among them
        save_run(run)
    if stopped:
        leave(run)
    if is_last and run.save_is_due:
        raise ValueError(f"the last {run.skipped_in_a_row} steps were skipped, being not finite, so the model at step "
                         f"{run.done} is not saved: lower --lr, use --dtype float32, or give a few --steps more, and "
                         f"{way_on(args.out)}")


def read_reports(run, late=0):
    """Log what the steps have reported, but for the last `late` of them. -> whether a process was asked to stop"""
    stopped = False
    while len(run.reports) > late:
        report = run.reports.popleft()
        if report.arrived:
            report.arrived.synchronize()
        *totals, norm, stop, good = report.values.tolist()
        totals = dict(zip(report.names, totals))
        stopped = stopped or stop > 0
        if good:
            run.skipped_in_a_row = 0
        else:
            count_skipped(run, report, totals, norm)
        if run.rank == 0 and (report.done == run.args.steps or report.done % run.args.log_every == 0):
            log_step(run, report, totals, norm)
    return stopped


def count_skipped(run, report, totals, norm):
    """Count a step that was not finite and say so; ValueError, on all ranks, where too many come in a row."""
    run.skipped += 1
    run.skipped_in_a_row += 1
    step = report.done - 1
    what = f"not finite: gradient norm {norm:.4g}, " + ", ".join(f"{k} {v:.4g}" for k, v in totals.items())
    if run.rank == 0:
        tqdm.write(f"warning: step {step} skipped, {what}")
    if run.skipped_in_a_row == MOST_SKIPPED:
        images = []
        for names in gathered([run.dataset.name_of(i) for i in report.index.tolist()], run.world):
            images += names
        named = ", ".join(images[:MOST_NAMED])
        if len(images) > MOST_NAMED:
            named += f" and {len(images) - MOST_NAMED} others"
        raise ValueError(f"ten steps in a row were skipped, the last is {step}, {what}, images {named}: lower --lr, or "
                         f"use --dtype float32, and {way_on(run.args.out)}")


def save_run(run):
    """A checkpoint and the model, by rank 0. ValueError, on all ranks, where their weights are not finite."""
    for name, part in run.parts.items():
        if isinstance(part, nn.Module) and not has_finite_weights(part):
            raise ValueError(f"after step {run.done} the weights of the part '{name}' are not finite and not saved: "
                             f"lower --lr and {way_on(run.args.out)}")
    run.save_is_due, run.saved = False, run.done
    if run.rank == 0:
        state = {"step": run.done, "format": FORMAT, "skipped": run.skipped, "args": vars(run.args),
                 "content": run.content, "config": getattr(run.parts["ema"], "config", {})}
        for name, part in run.parts.items():
            state[name] = None if part is None else part.state_dict()
        save_checkpoint(run.args.out, state, run.args.keep, run.parts["ema"])


def save_before(run):
    """Before what may fail or take long: log what the steps have reported, and save, unless among skipped steps; where
    a process was asked to stop, end the program."""
    stopped = read_reports(run)
    if run.done > run.saved and run.skipped_in_a_row == 0:
        save_run(run)
    if stopped:
        run.save_is_due = run.done > run.saved
        leave(run)


def has_finite_weights(module):
    """Whether all weights and statistics are."""
    checks = [value.isfinite().all() for value in module.state_dict().values()]
    return bool(torch.stack(checks).all())


def next_batch(run, batches):
    """The loader's (x, index). Where the data of any process is lost, all save first and end: OSError or ValueError."""
    batch, problem = None, None
    try:
        batch = next(batches)
    except (OSError, ValueError) as error:
        problem = error
    is_lost = problem is not None
    if run.world > 1:  # a process without a batch would leave the others waiting for its gradients
        is_lost = summed(torch.tensor([float(is_lost)]), run.world).item() > 0  # between CPUs: no GPU waits
    if not is_lost:
        return batch
    save_before(run)
    messages = gathered(None if problem is None else str(problem), run.world)
    if problem is not None:
        raise problem
    raise OSError(next(message for message in messages if message is not None))


def log_step(run, report, totals, norm):
    """A line of the log: the step's loss terms, and the speed since the last line, without evaluations."""
    rate = (report.done - run.logged) * run.args.batch_size / (report.seconds - run.logged_at)
    run.logged, run.logged_at = report.done, report.seconds
    run.bar.set_postfix_str(f"loss {totals['loss']:.4f}, {rate:.0f} images/s")
    append_log(run.log_path, run.boards, report.done, images=report.done * run.args.batch_size, **totals,
               lr=report.lr, grad_norm=norm, skipped=run.skipped, images_per_s=rate, peak_mib=peak_memory(run.device))


def peak_memory(device):
    """Most memory held so far, MiB: the GPU's allocations, else this process's resident set (0 where unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if os.name != "posix":
        return 0.0
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


class StopSignal:
    """Turns the stop_signals into a flag that the loop reads at the end of a step."""

    def __init__(self):
        self.received = 0
        for s in stop_signals():
            signal.signal(s, self.handle)

    def handle(self, number, frame):
        self.received = number


def leave(run):
    """End the program after a StopSignal, on all ranks once rank 0 has saved: torchrun kills what outlives another."""
    run.bar.close()
    if run.world > 1:
        dist.barrier()
    if run.rank == 0:
        outcome = "and saved"
        if run.save_is_due:
            outcome = f"without saving, as the last {run.skipped_in_a_row} steps were skipped"
        print(f"stopped after step {run.done} {outcome}: continue with the same command and --resume")
    sys.exit(128 + (run.stop.received or signal.SIGTERM))


# ---------------------------------------------------------------------------------------------------------------------
# Pieces that distill.py shares: files

def save_checkpoint(out, state, keep=2, ema=None):
    """ema, a DCSSDAE, to model.safetensors and state to latest.pt; the ones before it stay as previous.pt,
    previous2.pt, ..., `keep` in all. Through temporary names: at every moment a complete checkpoint is there. OSError
    says that the disk is full, say; nothing is lost."""
    names = ["latest.pt", "previous.pt", *(f"previous{i}.pt" for i in range(2, keep))][:keep]
    names = [os.path.join(out, name) for name in names]
    model, temporary = os.path.join(out, "model.safetensors"), f"{names[0]}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if ema:
            ema.save(model)
        for newer, older in reversed([*itertools.pairwise(names)]):
            if os.path.exists(newer):
                os.replace(newer, older)
        os.replace(temporary, names[0])
    except (OSError, RuntimeError, SafetensorError) as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise OSError(f"could not write a checkpoint to {out} ({first_line(system_error(error))}): make room and "
                      f"{way_on(out)}") from None


def system_error(error):
    """-> the OSError that an exception came of, below those that torch raises on top of it, or the exception itself."""
    below = error
    while below is not None:
        if isinstance(below, OSError) and below.errno:
            return below
        below = below.__context__
    return error


def way_on(out):
    """-> str: what to do once the cause of an end is removed."""
    if checkpoint_files(out):
        return "continue with --resume: the last checkpoint is kept"
    return "start again: there was no checkpoint yet"


def checkpoint_files(out):
    """Paths of latest.pt, previous.pt, previous2.pt, ...: what there is of them, newest first."""
    older = sorted(glob.glob(os.path.join(glob.escape(out), "previous*.pt")), key=lambda path: (len(path), path))
    return [path for path in (os.path.join(out, "latest.pt"), *older) if os.path.isfile(path)]


def load_checkpoint(out, rank=0):
    """The newest readable checkpoint of a run. Damaged ones are set aside, with a warning, or else the next save would
    move them to where the good one is. FileNotFoundError / ValueError where there is none."""
    damaged = {}
    for path in checkpoint_files(out):
        try:
            state = map_checkpoint(path)
            problem = checkpoint_problem(state)
        except FileNotFoundError:  # moved on, by a save that is going on: it is the next one
            continue
        except BROKEN_ARCHIVE as error:
            if getattr(error, "errno", None):  # the disk fails: that says nothing about the file
                raise
            damaged[path] = f"{path} ({type(error).__name__})"
            continue
        if problem:
            damaged[path] = f"{path} ({problem})"
            continue
        if rank == 0:
            for broken, what in damaged.items():
                print(f"warning: damaged: {what}, now {broken}.damaged; going on from {path}", flush=True)
                os.replace(broken, f"{broken}.damaged")
        return state
    if damaged:
        raise ValueError(f"no readable checkpoint, damaged: {', '.join(damaged.values())}; "
                         "start again with another --out")
    raise FileNotFoundError(f"--resume found no checkpoint in {out}: leave --resume out to start a run there")


def checkpoint_problem(state):
    """What is wrong with the contents of a checkpoint, in a few words; None where nothing is. Everything is compared
    with the checkpoint's own configuration, and where it has none, being of an earlier version, with its model."""
    if not isinstance(state, dict) or not is_count(state.get("step")):
        return "no step"
    if not is_count(state.get("format", 0)):
        return "no number of its format"
    if not is_count(state.get("skipped", 0)):
        return "no number of skipped steps"
    if not isinstance(state.get("content", ""), str):
        return "no description of the images"
    for name in ("model", "ema", "optimizer", "args"):
        if not isinstance(state.get(name), dict):
            return f"no {name}"
    for name in (*TRAINED_PARTS, "ema", "gan"):
        problem = table_problem(state.get(name))
        if problem:
            return f"{name}: {problem}"
    try:
        expected = expected_shapes(state)
    except ValueError as error:
        return f"config: {error}"
    for name, shapes in expected.items():
        if state.get(name) is not None and shapes_of(state[name]) != shapes:
            return f"{name} of other shapes than the model asks for"
    trained = []
    for name in TRAINED_PARTS:
        trained += shapes_of(state.get(name) or {}).values()
    judged = shapes_of(state.get("gan") or {}).values()
    for name, shapes, moments in (("optimizer", trained, ADAM_MOMENTS), ("muon", trained, ["momentum"]),
                                  ("gan_optimizer", judged, ADAM_MOMENTS)):
        if state.get(name) is not None and not fits_optimizer(state[name], shapes, moments):
            return f"{name} that does not fit the weights"
    return flags_problem(state["args"], state.get("config", {}))


def is_count(value):
    return type(value) is int and 0 <= value <= MANY


def table_problem(table):
    """What is wrong with a part's weights, {name: tensor} or None; None where nothing is."""
    if table is None:
        return None
    if not isinstance(table, dict) or not all(isinstance(value, torch.Tensor) for value in table.values()):
        return "no tensors"
    if not all(value.layout is torch.strided and not value.is_quantized for value in table.values()):
        return "no plain tensors"
    if not all(value.isfinite().all() for value in table.values()):
        return "weights that are not finite"
    return None


def shapes_of(table):
    return {name: value.shape for name, value in table.items()}


def expected_shapes(state):
    """{part of a checkpoint: {name: shape} of its weights}. ValueError where its configuration is none of a model."""
    model = shapes_of(state["model"])
    config = state.get("config", {})
    if not isinstance(config, dict):
        raise ValueError("no table of arguments")
    with torch.device("meta"):  # shapes alone, without memory
        if config:
            check_config(config)
            model = shapes_of(DCSSDAE(**config).state_dict())
        expected = {"model": model, "ema": model, "gan": shapes_of(PatchGAN().state_dict())}
        if "decoder.mid_in.weight" in model:
            width = model["decoder.mid_in.weight"][0]
            expected["repa"] = shapes_of(repa_projection(width).state_dict())
    return expected


def fits_optimizer(optimizer, shapes, moments):
    """Whether an optimiser's state fits parameters that are some of those of these shapes, in their order: which of
    them a phase trains is not told. moments: the names of its tensors for a parameter."""
    if not isinstance(optimizer, dict):
        return False
    groups, state = optimizer.get("param_groups"), optimizer.get("state")
    if not isinstance(groups, list) or not isinstance(state, dict):
        return False
    if len(groups) != 1 or not isinstance(groups[0], dict) or not isinstance(groups[0].get("params"), list):
        return False
    count = len(groups[0]["params"])
    if groups[0]["params"] != list(range(count)) or count > len(shapes):
        return False
    if not all(is_count(number) and number < count for number in state):
        return False
    remaining = iter(shapes)
    for number in sorted(state):
        tensors = [moment_of(state[number], name) for name in moments]
        if any(tensor is None for tensor in tensors):
            return False
        if moments == ADAM_MOMENTS:
            mean, square, step = tensors
            if step.numel() != 1 or step < 0 or mean.shape != square.shape or (square < 0).any():
                return False
        if tensors[0].shape not in remaining:  # looking for it takes the shapes before it away
            return False
    return True


def moment_of(entry, name):
    """A tensor in an optimiser's state of one parameter; None where there is none that is finite."""
    value = entry.get(name) if isinstance(entry, dict) else None
    is_valid = isinstance(value, torch.Tensor) and value.is_floating_point() and bool(value.isfinite().all())
    return value if is_valid else None


def flags_problem(flags, config):
    """What is wrong with the flags in a checkpoint; None where nothing is."""
    for name, value in flags.items():
        values = value if isinstance(value, list) else [value]
        if not isinstance(name, str) or not all(each is None or isinstance(each, FLAG_TYPES) for each in values):
            return "args that are no flags"
    for name in MODEL_FLAGS:
        if name in flags and name in config and not same_flag(flags[name], config[name]):
            return f"--{name} of another model than its own"
    if flags.get("linear", "off") not in LINEAR:
        return "args that are no flags"
    return None


def same_flag(a, b):
    """Whether two values of a flag are the same; lists in any order."""
    if isinstance(a, list) and isinstance(b, list):
        return sorted(map(str, a)) == sorted(map(str, b))
    return a == b


def map_checkpoint(path):
    """-> the checkpoint's dict, with maps of the file for tensors: all processes of a machine share one copy in memory.
    An error of BROKEN_ARCHIVE."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()  # checksums, which maps go without
    if damaged:
        raise zipfile.BadZipFile(damaged)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def compare_flags(then, args, rank):
    """ValueError that lists the flags which describe another model, other samples or another objective than `then`;
    other changes are printed."""
    # Runs from before there was a linear start, and from when crops could be enlarged.
    then = {"linear": "off", "enlarge": then.get("data") != "demo"} | then
    now = vars(args)
    if "teacher" in then and "teacher" in now:  # the teacher's weights say more than the path of its file
        then = then | {"ckpt": now["ckpt"]}
        if then["teacher"] != now["teacher"]:
            raise ValueError(f"--resume continues a distillation of another model than --ckpt {args.ckpt} holds: give "
                             "the first call's, wherever it lies, or another --out")
    differ = []
    for name in now:
        if name in then and then[name] != now[name] and name not in ("out", "resume"):
            differ.append(name)
    free = FREE_FLAGS
    if args.allow_changes:
        free += CHANGEABLE_FLAGS
    refused = [name for name in differ if name not in free]
    if refused:
        way_out = "use the flags of the first call, or another --out"
        if set(refused) <= set(CHANGEABLE_FLAGS):
            way_out += ", or --allow_changes"
        raise ValueError(f"--resume continues a run with{flags(then, refused)}, but{flags(now, refused)} was given: "
                         f"{way_out}")
    if differ and rank == 0:
        print(f"resuming with{flags(now, differ)} instead of{flags(then, differ)}", flush=True)
    unknown = [name for name in now if name not in then]
    if unknown and rank == 0:
        print(f"resuming a run that does not know the flags{flags(now, unknown)}", flush=True)


def open_data(args, checkpoint, rank, world):
    """(training images, validation images) of --data; ValueError where a resumed run or another process has others."""
    dataset = make_dataset(args.data, args.size, train=True, aug_scale=args.aug_scale, seed=args.seed, limit=args.limit,
                           enlarge=args.enlarge)
    val = make_dataset(args.data, args.size, train=False, seed=args.seed, limit=args.eval_images)
    contents = gathered(f"{dataset.content()} for training, {val.content()} for validation", world)
    for other, content in enumerate(contents):
        if content != contents[0]:
            raise ValueError(f"--data {args.data}: rank 0 finds {contents[0]}, but rank {other} {content}: give all "
                             "machines the same images")
    check_content(checkpoint, dataset, args)
    if rank == 0:
        print(parts_taken(dataset, val), flush=True)
    return dataset, val


def check_content(checkpoint, dataset, args):
    """ValueError where a run would go on with other images than its checkpoint's, wherever they lie."""
    then = checkpoint.get("content") if checkpoint else None
    if then and then != dataset.content() and not args.allow_changes:
        raise ValueError(f"--resume continues a run on {then}, but --data {args.data} holds {dataset.content()}: give "
                         "the same images, or --allow_changes")


def open_run(args, rank, world):
    """(checkpoint to go on from or None, path of log.jsonl, step of the last evaluation in it) of the run in --out.

    Goes on with --resume, and by itself where torchrun has restarted the processes (--max-restarts). Drops the lines of
    the log that will be written again. OSError or ValueError, on all ranks, where there is nothing to go on from,
    nothing left to do, or a run that would be overwritten.
    """
    log = os.path.join(args.out, "log.jsonl")
    checkpoint, lines, problem, missing = None, [], None, False
    try:
        if rank == 0 and os.path.isdir(args.out):
            lock_folder(args.out)
        checkpoint, lines = find_run(args, log, rank)
        if rank == 0:
            ready_folder(args.out, *WRITTEN)
            lock_folder(args.out)
    except (OSError, ValueError) as error:
        problem, missing = str(error), isinstance(error, FileNotFoundError)
    # What one process finds, all must find.
    problems, missing, steps = zip(*gathered((problem, missing, checkpoint and checkpoint["step"]), world))
    if any(problems) and not (any(missing) and any(steps)):
        raise ValueError(next(each for each in problems if each))
    if any(problems) or len(set(steps)) > 1:
        raise ValueError(f"the processes find different checkpoints in {args.out}: all nodes need the same folder")
    if rank == 0:
        for path in unfinished_files(args.out):
            os.remove(path)
        if checkpoint:
            write_whole(log, "".join(lines))
        elif os.path.exists(log):
            os.remove(log)
    return checkpoint, log, last_evaluation(lines)


def find_run(args, log, rank):
    """(checkpoint to go on from or None, lines of the log up to it); errors as open_run."""
    counts = [os.environ.get(name) or "0" for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")]
    restarted = counts != ["0", "0"]  # by torchrun, or a job that Slurm has put into the queue again
    files = checkpoint_files(args.out)
    if not args.resume and not (restarted and files):
        model, best = (os.path.join(args.out, name) for name in ("model.safetensors", "best.safetensors"))
        killed_in_first_save = restarted and unfinished_files(args.out)
        if files or (os.path.exists(model) and not killed_in_first_save):
            raise ValueError(f"{args.out} already holds a run: continue it with --resume, or choose another --out")
        if os.path.exists(best) and not restarted:
            raise ValueError(f"{best} is of a run that has no checkpoint: move it, or choose another --out")
        return None, []
    checkpoint = load_checkpoint(args.out, rank)
    if checkpoint.get("format", 0) < LINEAR_FORMAT and checkpoint.get("config", {}).get("linear_decoder"):
        raise ValueError(f"the run in {args.out} is of an earlier version, whose network adds to the linear image in "
                         "another way: start anew with another --out")
    then = checkpoint["args"]
    if "content" in checkpoint:  # which says more than the path: check_content
        then = then | {"data": args.data}
    compare_flags(then, args, rank)
    step, lines = checkpoint["step"], []
    if os.path.exists(log):
        with open(log, errors="replace") as file:
            for line in file:
                step_of_line = step_logged(line)
                if step_of_line is None and line.endswith("\n") and rank == 0:  # else it was cut off
                    print(f"warning: {log} holds a damaged line, which is left out", flush=True)
                if step_of_line is not None and step_of_line <= step:
                    lines.append(line)
    if step > args.steps or step == args.steps == last_evaluation(lines):
        raise ValueError(f"the run in {args.out} has done its {step} steps: give a larger --steps to go on")
    return checkpoint, lines


def step_logged(line):
    """The step of a line of log.jsonl, or None where it is no whole line."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    step = entry.get("step") if isinstance(entry, dict) else None
    return step if is_count(step) and line.endswith("\n") else None


def unfinished_files(out):
    """Paths of what a killed run was writing."""
    return glob.glob(os.path.join(glob.escape(out), "*.tmp"))


def last_evaluation(lines):
    """Step of the last evaluation in lines of a log, or None."""
    steps = [json.loads(line)["step"] for line in lines if '"eval"' in line]
    return max(steps, default=None)


def open_boards(args, start):
    """What --tensorboard and --wandb ask for: [show(step, {name: number}, picture (3, h, w) in [0, 1] or None)]."""
    boards = []
    if args.tensorboard:
        boards.append(tensorboard(args, start))
    if args.wandb:
        boards.append(weights_and_biases(args))
    return boards


def tensorboard(args, start):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs the tensorboard package: pip install tensorboard") from None
    writer = SummaryWriter(args.out, purge_step=start + 1)

    def show(step, numbers, picture):
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        if picture is not None:
            writer.add_image("reconstructions", picture, step)
        writer.flush()
    return show


def weights_and_biases(args):
    """A run named after --out; resumed, it goes on there."""
    try:
        import wandb
    except ImportError:
        raise ValueError("--wandb needs the wandb package: pip install wandb") from None
    folder = os.path.abspath(args.out)
    file = os.path.join(folder, "wandb_id")
    if not os.path.exists(file):
        write_whole(file, secrets.token_hex(8))
    with open(file) as text:
        number = text.read()
    try:
        wandb.init(project="dc-ssdae", name=os.path.basename(folder), id=number, resume="allow", dir=folder,
                   config=vars(args), settings=wandb.Settings(console="off"))
    except wandb.errors.Error as error:
        raise ValueError(f"--wandb: {' '.join(str(error).split())}; WANDB_MODE=offline needs no account") from None

    def show(step, numbers, picture):
        shown = numbers if picture is None else numbers | {"reconstructions": wandb.Image(picture)}
        wandb.log(shown, step=step)
    return show


def append_log(path, boards, step, pictures=(), **values):
    """A line of log.jsonl, with null for what is not finite, and the same for the boards. What cannot be written is a
    warning: a full disk ends the run where it saves, if it is still full then."""
    line = json.dumps(strict({"step": step, **values}), allow_nan=False) + "\n"
    try:
        with open(path, "a") as file:
            file.write(line)
    except OSError as error:
        tqdm.write(f"warning: could not write to {path}: {error.strerror}")
    if boards:
        with only_warns("the log for its board"):
            show_on_boards(boards, step, pictures, values)


def show_on_boards(boards, step, pictures, values):
    """The numbers in `values`, also in its rows "eval", and pictures, rows of (n, 3, s, s)."""
    named = dict(values)
    for row in values.get("eval", []):
        for key, value in row.items():
            named[f"{row['name']}/{key}"] = value
    numbers = {name: value for name, value in named.items() if isinstance(value, float)}
    picture = None
    if pictures:
        rows = [torch.cat([*row], dim=2) for row in pictures]                   # (3, s, n * s) each
        picture = torch.cat(rows, dim=1) / 2 + 0.5
    for show in boards:
        show(step, numbers, picture)


# ---------------------------------------------------------------------------------------------------------------------
# The model and what of it is trained

def choose_trained(model, phase=None, freeze_enc=False):
    """Leave gradients on for what a phase trains; the rest gets no gradient, no weight decay, no optimiser state. After
    DC-AE (arXiv 2410.10733), whose phase 2 trains the middle layers and phase 3 the decoder's head."""
    if phase == 2:
        parts = makers_of_the_latent(model.encoder) + readers_of_the_latent(model.decoder)
    elif phase == 3:
        parts = [model.decoder.up[-1], model.decoder.norm_out, model.decoder.conv_out]
    elif freeze_enc:
        parts = [model.decoder]
    else:
        parts = [model.encoder, model.decoder]
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)
    freeze_base(model.decoder)


def freeze_base(decoder):
    """The linear base is right from the start, as the code's transpose or by least squares. Adam makes full steps of
    the noise in its gradients: c^2 weights, each a little off, cost 1.8 dB in 400 steps with c = 512."""
    if decoder.base is not None:
        decoder.base.requires_grad_(False)


def makers_of_the_latent(encoder):
    """The encoder's last layers."""
    if hasattr(encoder, "stages"):
        return [encoder.stages[-1], encoder.conv_out]
    if not hasattr(encoder, "attend"):
        raise ValueError("phase 2 does not know this encoder's last layers: add them to makers_of_the_latent in "
                         "train.py")
    return [encoder.down[-1], encoder.attend[-1], encoder.mid, encoder.norm_out, encoder.conv_out, encoder.quant]


def readers_of_the_latent(decoder):
    """The decoder's layers that see the latent itself."""
    parts = [decoder.norm_z]
    joint_input = isinstance(decoder.conv_in_z, nn.Identity)
    parts.append(decoder.conv_in if joint_input else decoder.conv_in_z)
    if decoder.base is not None:
        parts.append(decoder.revision)
    if decoder.context is not None:
        parts.append(decoder.context)
    for block in decoder.blocks:
        parts.append(block.ada)
    for module in decoder.modules():
        if isinstance(module, AdaGN):
            parts.append(module.proj)
    return parts


def trains(module):
    return any(p.requires_grad for p in module.parameters())


def millions(parameters):
    return sum(p.numel() for p in parameters) / 1e6


def encoder_is_given(args):
    """Whether the latents are somebody's own, which the linear code does not know."""
    return bool(args.enc_ckpt) or args.enc.startswith("dcae_")


def new_model(args):
    """The model that the flags describe, untrained."""
    linear_encoder, linear_decoder = LINEAR[args.linear]
    _, downscale, z_dim = parse_name(args.enc)
    count = z_dim
    if encoder_is_given(args) or not linear_encoder:
        linear_encoder = False
        count = min(FITTED_COEFFICIENTS * z_dim, 3 * downscale**2)
    return DCSSDAE(args.enc, args.dec, args.loss, args.enc_width, depth=args.depth, window=args.window, c=args.c,
                   a=args.a, b=args.b, lam=args.lam, input_skip=args.input_skip, without=args.without,
                   linear_encoder=linear_encoder, linear_decoder=count if linear_decoder else 0)


def first_model(args, checkpoint):
    """The model that training starts with; of a resumed run one that its checkpoint fits, which needs no other file."""
    if checkpoint and "config" in checkpoint:
        return DCSSDAE(**checkpoint["config"])
    model = DCSSDAE.load(args.init_from) if args.init_from else new_model(args)
    if args.enc_ckpt:
        model.load_published(args.enc_ckpt, part="encoder")
    return model


def fit_images(dataset, model, size):
    """Batches (16, 3, size, size) of training images to fit the linear decoder: 16 cells for each channel, but at least
    256 images and at most 2,048."""
    cells = (size // model.downscale) ** 2  # of an image
    images = min(FIT_MOST, max(FIT_LEAST, FIT_CELLS * model.encoder.z_dim // cells))
    batches = make_loader(dataset, FIT_BATCH, train=True, seed=0)
    return (x for x, _ in itertools.islice(batches, images // FIT_BATCH))


class Objective(nn.Module):
    """All that the main optimisers train, and the loss terms: one module, so that one DDP wrap covers it."""

    def __init__(self, model, lpips, repa, gan):
        super().__init__()
        self.model, self.repa = model, repa
        # In lists: LPIPS is neither trained, synchronised nor saved, and the discriminator has its own of each.
        self.lpips, self.gan = [lpips], [gan]
        self.eqm = model.eqm

    def forward(self, x, e, eps, s, with_gan=False):
        """x images, e noise (B, 3, H, W), eps (B, c, h, w) posterior noise, s (B,) level -> ({name: scalar}, latents
        (B, c, h, w), one-step estimate (B, 3, H, W)), the latter two detached."""
        posterior = self.model.encode(x)
        z = posterior.sample(eps)
        terms, estimate, tokens = matching(self.model.decoder.forward_with_tokens, self.eqm, x, e, z, s)
        if self.lpips[0] is not None:
            terms["lpips"] = self.lpips[0](x, estimate).mean()
        if self.repa is not None:
            terms["repa"] = self.repa(tokens, x)
        if with_gan:
            terms["gan"] = -self.gan[0](estimate).mean()
        terms["kl"] = kl_loss(posterior)
        return terms, z.detach(), estimate.detach()


# ---------------------------------------------------------------------------------------------------------------------
# Training

def discriminator_backward(gan, x, estimate, share, device, dtype):
    """Gradients of `share` times the discriminator's loss, which is returned. Its parameters take gradients here
    alone, not from the estimate's own term."""
    gan.requires_grad_(True)
    with autocast(device, dtype):
        loss = hinge_loss(gan(x), gan(estimate))
    (loss * share).backward()
    gan.requires_grad_(False)
    return loss


def average_gradients(module, world):
    """Over the processes, of a module that DDP does not wrap."""
    if world > 1:
        for p in module.parameters():
            dist.all_reduce(p.grad)
            p.grad /= world


def latent_sums(z):
    """Sums of z (B, c, h, w) and of its squares by channel: (2, c) float64 (float32 on Apple GPUs)."""
    z = z.to(exact_type(z.device))
    return torch.stack([z.sum(dim=(0, 2, 3)), z.square().sum(dim=(0, 2, 3))])


def evaluation_is_due(step, args):
    if step == args.steps:
        return True
    return step > 0 and args.eval_every > 0 and step % args.eval_every == 0


def measure(run, ema, val, dtype, steps):
    """evaluate's result on the validation images, decoded in each of `steps`, with the metrics of --eval_metrics."""
    distances, features = run.networks
    loader = validation_batches(val, run.args, run.rank, run.world, run.device)
    options = {"seed": run.args.seed, "dtype": dtype, "rank": run.rank, "world": run.world}
    try:
        result = evaluate(ema, loader, run.device, steps, distances, features, originals=run.originals, **options)
    except ValueError:
        if not run.originals:
            raise
        # An image has become unreadable since: the originals' statistics are of one more.
        result = evaluate(ema, loader, run.device, steps, distances, features, **options)
    run.originals = result["originals"]
    return result


def validate(run, ema, val, dtype, steps):
    """evaluate's result on the validation images, decoded in each of `steps`; printed, written and logged. Does not
    count as time of training."""
    before = time.monotonic()
    save_before(run)  # their disk may be away, a reader be killed
    result = measure(run, ema, val, dtype, steps)
    if run.rank == 0:
        write_results(result, run.args.out)  # before anything else can fail
        append_log(run.log_path, run.boards, run.done, result["pictures"], eval=result["rows"])
        baseline, linear, first, *_ = result["rows"]
        tqdm.write(f"step {run.done}: PSNR {first['psnr']:.2f} dB in {first['name']}, "
                   f"linear code {linear['psnr']:.2f}, baseline {baseline['psnr']:.2f} on {result['images']} images")
        keep_best(run, ema, result)
    run.evaluating += time.monotonic() - before
    return result


def keep_best(run, ema, result):
    """Write best.safetensors where no evaluation before had this PSNR in the fewest steps, usually one. The file says
    which step it is of: its note "best"."""
    path = os.path.join(run.args.out, "best.safetensors")
    row = min(result["rows"][len(REFERENCES):], key=lambda row: row["steps"])
    if not row["psnr"] > best_psnr(path) or not has_finite_weights(ema):  # nor where it is NaN
        return
    notes = ema.config["notes"]
    ema.config["notes"] = notes | {"best": {"step": run.done, "psnr": row["psnr"], "decoding_steps": row["steps"],
                                            "images": result["images"]}}
    try:
        ema.save(path)
    except (OSError, SafetensorError) as error:
        tqdm.write(f"warning: could not write {path} ({error}): the one before is kept")
    finally:
        ema.config["notes"] = notes


def best_psnr(path):
    """dB, as keep_best has noted it in the file; minus infinity where there is none that can be read."""
    try:
        with safe_open(path, framework="pt") as file:
            psnr = json.loads(file.metadata()["config"])["notes"]["best"]["psnr"]
    except BROKEN_FILE:
        return -math.inf
    return psnr if isinstance(psnr, float) else -math.inf


def print_start(args, model, trained, dataset, world, device, dtype):
    precision = "bf16" if dtype else "float32"
    print(f"{args.enc} (x{args.enc_width:g}) {millions(model.encoder.parameters()):.2f} M + "
          f"U-ViT {args.dec} {millions(model.decoder.parameters()):.2f} M parameters, "
          f"{millions(trained):.2f} M of them trained, loss {args.loss}, {len(dataset)} images of '{args.data}' at "
          f"{args.size} px, {world} process(es) on {device.type}, {precision} -> {args.out}")


def print_end(args, dataset, result):
    unreadable = int(dataset.skipped.sum())
    if unreadable:
        print(f"warning: {unreadable} unreadable images were replaced by others in training")
    print_table(result)
    print(f"saved {args.out}/model.safetensors, best.safetensors, reconstructions.png, metrics.json and log.jsonl")


def main():
    args = get_args()
    rank, world, device = setup(args.device)
    prefer_speed(device)
    check_args(args)
    check_shared(args, world)
    if args.compile:
        check_compiler(device)
    dtype = pick_dtype(args.dtype, device)
    torch.manual_seed(args.seed)  # initial weights, the same on every rank

    # Model
    checkpoint, log_path, evaluated = open_run(args, rank, world)
    model = first_model(args, checkpoint)
    check_size(args.size, model)
    choose_trained(model.train(), args.phase, args.freeze_enc)  # a loaded one is in evaluation mode
    encoder_trains, norm_trains = trains(model.encoder), trains(model.decoder.norm_z)
    model.decoder.checkpointing = args.checkpointing

    # Data
    dataset, val = open_data(args, checkpoint, rank, world)
    model_is_new = not args.init_from and checkpoint is None
    if model_is_new and encoder_is_given(args) and model.config["linear_decoder"]:
        model.fit_linear_decoder(fit_images(dataset, model, args.size))

    # Objective and optimisers
    lpips, repa, left_out = perceptual_losses(args, model.decoder.mid_in.out_features, rank, world)
    networks = evaluation_networks(args, val, lpips, device, world)
    gan = PatchGAN().requires_grad_(False) if args.w_gan else None
    model.to(device, memory_format=torch.channels_last)
    if lpips is not None:
        lpips.to(device, memory_format=torch.channels_last)
    if gan is not None:
        gan.to(device, memory_format=torch.channels_last)
    weights = {"fm": 1.0, "eqm": 1.0, "lpips": args.w_lpips, "repa": args.w_repa, "gan": args.w_gan, "kl": args.w_kl}
    model.config["notes"].pop("best", None)  # of --init_from's run
    model.config["notes"] |= {"size": args.size, "data": args.data, "w_lpips": 0.0 if lpips is None else args.w_lpips,
                              "w_repa": 0.0 if repa is None else args.w_repa, "left_out": left_out}
    if encoder_trains:
        model.config["latents"] = None  # --init_from's statistics are of other latents
    else:
        weights["kl"] = 0.0
    objective = Objective(model, lpips, repa, gan).to(device)
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizers, gan_optimizer = make_optimizers(trained, args, device), None
    if gan is not None:
        gan_optimizer = torch.optim.AdamW(gan.parameters(), lr=args.lr, weight_decay=0.0, betas=GAN_BETAS,
                                          fused=device.type != "mps")
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    if compiles(args, device):
        compile_blocks(model)

    # The run
    parts = {"model": model, "ema": ema, "repa": None if repa is None else repa.mlp, **optimizers,
             "gan": gan, "gan_optimizer": gan_optimizer}
    start, skipped = restore(parts, checkpoint)
    del checkpoint
    averaged = paired_tensors(ema, model)
    parallel = data_parallel(objective, world)
    batches = training_batches(args, dataset, rank, world, start, device)
    boards = open_boards(args, start) if rank == 0 else []
    if rank == 0:
        print_start(args, model, trained, dataset, world, device, dtype)
    run = Run(args, rank, world, device, log_path, boards, parts, start, skipped, dataset, networks)
    local = args.batch_size // world                                            # images of this process
    micro = min(args.micro_batch or local, local)                               # images of a forward pass
    z_shape = model.latent_shape(args.size, args.size)
    t_mean = args.t_mean if args.loss == "fm" else None

    for step in range(start, args.steps + 1):
        # Evaluate: here, not after the step, so that a run that is stopped between a checkpoint and its evaluation
        # catches up on it.
        if evaluation_is_due(step, args) and step != evaluated:
            result = validate(run, ema, val, dtype, args.eval_steps)
        if step == args.steps:
            break

        # Draw
        set_learning_rate([*optimizers.values(), gan_optimizer], step, args)
        x, index = next_batch(run, batches)
        x = x.contiguous(memory_format=torch.channels_last)                     # (local, 3, size, size)
        rows = range(rank * local, (rank + 1) * local)                          # of the whole batch
        with_gan = gan is not None and step >= args.gan_start

        # Forward and backward, one micro-batch after the other
        totals, moments = {}, 0
        for i in range(0, local, micro):
            xb = x[i:i + micro]
            e, eps, s = draw(args.seed, step, rows[i:i + micro], xb.shape[1:], z_shape, device, t_mean, args.g_power)
            e = e.contiguous(memory_format=torch.channels_last)
            share = len(xb) / local
            is_last = i + micro >= local
            with nullcontext() if is_last or world == 1 else parallel.no_sync():
                with autocast(device, dtype):
                    terms, z, estimate = parallel(xb, e, eps, s, with_gan)
                terms["loss"] = sum(weights[name] * term for name, term in terms.items())
                (terms["loss"] * share).backward()
            if with_gan:
                terms["gan_d"] = discriminator_backward(gan, xb, estimate, share, device, dtype)
            for name, term in terms.items():
                totals[name] = totals.get(name, 0) + term.detach() * share / world
            moments = moments + latent_sums(z)                                  # (2, c)
        norm = clip_gradients(trained, args)
        if with_gan:
            average_gradients(gan, world)
            totals["gan_grad_norm"] = clip_gradients(gan.parameters(), args) / world

        # One small sum over the processes: loss terms, the latents' moments, and whether anybody was asked to stop
        shared = torch.cat([torch.stack([*totals.values()]).to(moments.dtype), moments.flatten(), stop_flag(run)])
        shared = summed(shared, world)
        moments, stop = shared[len(totals):-1].view(2, -1), shared[-1]
        totals = dict(zip(totals, shared))

        # Step and average, unless something is not finite: on all ranks or none, as they hold the same gradients.
        # Decided on the device, which nobody waits for.
        good = norm.isfinite() & shared.isfinite().all()
        step_if(good, optimizers.values())
        if with_gan:
            step_if(good, [gan_optimizer])
        if norm_trains:
            model.decoder.norm_z.update(args.batch_size * z_shape[1] * z_shape[2], *moments, good)
        update_ema(averaged, args.ema, step - args.ema_start, good)
        for p in trained:
            p.grad = None
        if with_gan:
            gan_optimizer.zero_grad()

        # Log and save
        finish_step(run, totals, norm.to(shared.dtype), stop, good, index)

    run.bar.close()
    if rank == 0:
        print_end(args, dataset, result)


if __name__ == "__main__":
    guarded(main)
