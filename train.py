"""Train the autoencoder: encoder and diffusion decoder together, from scratch or from a pretrained encoder.

    python train.py --preset tiny                                         # two CPU cores, no network: a few minutes
    torchrun train.py --enc dc_f32c32 --loss eqm --data DIR               # one GPU
    torchrun --nproc_per_node=8 train.py --enc dc_f32c32 --loss fm --data DIR --compile    # one node

The objective is SSDD's (arXiv 2510.04961), with EqM in the place of FM if you like: FM or EqM + 0.5 LPIPS + 0.25 REPA
+ 1e-6 KL. Everything random (data order, crops, noise, levels, posterior draws) is a function of (seed, step, sample),
so that a run does not depend on processes, micro-batches or interruptions.

Writes to --out: model.safetensors (EMA weights), best.safetensors (those of the best evaluation), latest.pt and
previous.pt (for --resume), log.jsonl, reconstructions.png, metrics.json.
"""
import argparse
import copy
import itertools
import os
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from data import make_dataset, make_loader, parts_taken
from encoder import TIMM, parse_name
from evaluate import REFERENCES, evaluate, print_table, write_results
from fid import load_metrics
from losses import (
    LPIPSLoss,
    PatchGAN,
    REPALoss,
    VFLoss,
    draw,
    draw_latent,
    draw_side,
    first_channels,
    hinge_loss,
    kl_loss,
    level_sums,
    matching,
    resized,
    smaller_sides,
)
from model import DCSSDAE, SIZES, AdaGN, check_size, compile_blocks
from plumbing.checkpoint import Run, compare_flags, keep_best, open_run
from plumbing.files import WeightsUnavailable, local_file
from plumbing.flags import below_one, count, fraction, make_parser, natural, not_negative, positive
from plumbing.optim import Average, adamw, make_optimizers, set_learning_rate, step_if
from plumbing.process import (
    autocast,
    average_gradients,
    data_parallel,
    default_workers,
    gathered,
    guarded,
    same_everywhere,
    say,
    start,
    summed,
)

# Two cores without GPU or network. Measured results stand in the README's quick start.
TEACHING = {"enc_width": 0.125, "dec": "XS", "depth": 2, "optimizer": "muon", "lr": 1e-3, "warmup": 50, "decay": 0.5,
            "ema": 0.99, "w_lpips": 0.0, "w_repa": 0.0, "compile": False, "t_mean": 2.0, "g_power": 2.0}
PRESETS = {
    "tiny": TEACHING | {"enc": "dc_f8c16", "size": 32, "batch_size": 8, "steps": 500,
                        "eval_every": 250, "eval_images": 256, "save_every": 250},
    "deep": TEACHING | {"enc": "dc_f32c32", "size": 64, "batch_size": 4, "steps": 1200,
                        "eval_every": 300, "eval_images": 64, "save_every": 600},
}
# DC-AE's decoupled high-resolution adaptation (arXiv 2410.10733): its learning rates; batch and steps are our choice.
PHASES = {
    1: {"size": 256, "lr": 6.4e-5},                                          # everything, at low resolution
    2: {"size": 512, "lr": 1.6e-5, "aug_scale": 1.0, "batch_size": 48, "steps": 25_000,
        "w_repa": 0.0},                                                      # the latent, at high: REPA would cost most
    3: {"size": 256, "lr": 5.4e-5, "steps": 50_000, "w_repa": 0.0},          # details, at low: later layers than REPA's
}
# --linear: does the encoder start as the linear code (encoder.LappedCode), does the decoder start with its transpose?
LINEAR = {"both": (True, True), "encoder": (True, False), "decoder": (False, True), "off": (False, False)}
# What describes the model: a file of --init_from decides it, and --resume may not change it.
MODEL_FLAGS = ("enc", "enc_width", "dec", "depth", "window", "loss", "c", "a", "b", "lam", "input_skip", "linear")

FITTED_COEFFICIENTS = 8  # for each latent channel, of a decoder fitted to a given encoder: more are too fine to guess
FIT_CELLS = 64           # for each latent channel, to fit it on; but at least 256 and at most 8192 images
FIT_BATCH = 16
GAN_BETAS = (0.5, 0.9)   # the discriminator's, as VQGAN's: it chases a target that moves
VALIDATION_BATCH = 64    # images at a time in each process


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
        help="(vq|dc|dcae)_f<8|16|32|64|128>c<channels>, dcae_f32c32_sana, or timm_NAME, a frozen vision transformer "
        "with the weights of --enc_ckpt or timm [%(default)s]")
    add("--enc_width", type=positive, default=1.0,
        help="multiplies the encoder's widths; to teach: 0.125 [%(default)s]")
    add("--enc_ckpt", metavar="FILE", type=str, help="start the encoder from a file or hf://owner/repo/file (README)")
    add("--freeze_enc", action="store_true", help="train the decoder only, on a given encoder")
    add("--dec", type=str, choices=list(SIZES), default="S", help="decoder size [%(default)s]")
    add("--depth", type=natural, help="decoder transformer blocks, instead of the size's own")
    add("--window", type=count, default=17, help="tokens of 8 x 8 pixels a side that one attends to: odd [%(default)s]")
    add("--input_skip", action=argparse.BooleanOptionalAction, default=True, help="add the noisy image to the "
        "decoder's output (UViT's skip); off, as published, the network carries the noise itself [on]")
    add("--linear", type=str, choices=list(LINEAR), default="both", help="parts that start as the linear code; a given "
        "encoder stays as it is, and its decoder starts as a least-squares fit; off, as published [%(default)s]")

    add = p.add_argument_group("objective").add_argument
    add("--loss", type=str, choices=["fm", "eqm"], default="eqm", help="flow or equilibrium matching [%(default)s]")
    add("--c", type=str, choices=["linear", "trunc", "piecewise"], default="linear",
        help="EqM: how the field falls to zero at the data; trunc and piecewise need --linear off or encoder "
        "[%(default)s]")
    add("--a", type=fraction, default=0.8, help="EqM: where trunc and piecewise begin to fall to zero [%(default)s]")
    add("--b", type=positive, default=1.4, help="EqM: piecewise's value at the noise end [%(default)s]")
    add("--lam", type=positive, default=1.0, help="EqM: scale of the field [%(default)s]")
    add("--t_mean", type=float, default=0.0, help="FM: t = sigmoid(n), n ~ N(t_mean, 1); above 0 trains more on the "
        "noise end, where one step begins [%(default)s]")
    add("--g_power", type=positive, default=1.0, help="EqM: g = u ** g_power, u ~ U(0, 1); above 1 trains more on the "
        "noise end [%(default)s]")
    add("--w_kl", type=not_negative, default=1e-6, help="weight of the KL term (sum over the latent) [%(default)s]")
    add("--w_gan", type=not_negative, default=0.0, help="weight of a PatchGAN on the one-step estimate [%(default)s]")
    add("--gan_start", type=natural, default=0, help="steps without the GAN at first [%(default)s]")

    add = p.add_argument_group("latents for generators").add_argument
    add("--z_noise", type=not_negative, default=0.0, help="the decoder sees latents with noise of deviation |N(0, 1)| "
        "times this, in units of their own; RAE's: 0.8 [%(default)s]")
    add("--nested", type=count, nargs="+", default=[], help="numbers of channels: a sample keeps its first so many, or "
        "all, so that these are codes of their own; default: all")
    add("--p_scale", type=fraction, default=0.0, help="share of the steps that decode the shrunk latent, compared with "
        "the shrunk image; EQ-VAE's: 0.5 [%(default)s]")
    add("--w_vf", type=not_negative, default=0.0, help="weight of the latent's likeness to DINOv2's tokens, from "
        "--repa_weights; VA-VAE's is 0.1 times a ratio of gradients [%(default)s]")

    image_arguments(p)
    run_arguments(p)
    p.add_argument("--eval_steps", type=count, nargs="+", default=[1, 4],
                   help="sampler steps of evaluations %(default)s")

    known = p.parse_known_args(argv)[0]
    p.set_defaults(**PHASES.get(known.phase, {}))
    p.set_defaults(**PRESETS.get(known.preset, {}))
    given = model_flags(known.init_from) if known.init_from else {}
    p.set_defaults(**given)
    args = p.parse_args(argv)
    for name, value in given.items():
        if getattr(args, name) != value and name != "loss":  # DCSSDAE.retargeted
            raise ValueError(f"--init_from {args.init_from} holds a model with --{name} {value}, but "
                             f"{getattr(args, name)} was given: leave it out, the file decides")
    args.freeze_enc |= args.enc.startswith(TIMM)
    if not args.out:
        name = f"{args.preset or args.enc}_{args.loss}"
        if args.phase:
            name += f"_phase{args.phase}"
        args.out = os.path.join("runs", name)
    check_args(args)
    return args


def model_flags(path):
    """The flags that describe the model in a file: {name: value}."""
    config = DCSSDAE.load(path).config
    parts = bool(config["linear_encoder"]), bool(config["linear_decoder"])
    values = {name: config[name] for name in MODEL_FLAGS if name != "linear"}
    for name, starts in LINEAR.items():
        if starts == parts:
            values["linear"] = name
    return values


def image_arguments(p):
    """The flags of programs that train on images: data, losses and metrics in the features of pretrained networks."""
    add = p.add_argument_group("data").add_argument
    add("--data", metavar="DIR", type=str, default="demo",
        help="demo (built in), imagenette, cifar10, or a folder of images [%(default)s]")
    add("--size", type=count, default=128,
        help="crop, pixels a side: a multiple of 8 and the encoder's f [%(default)s]")
    add("--aug_scale", type=positive, default=2.0,
        help="random resize of the short side in [size, size * aug_scale] before the crop [%(default)s]")
    add("--enlarge", action="store_true", help="resize beyond a picture's own pixels too, as SSDD does; else its short "
        "side is the limit")
    add("--limit", type=count, help="use only N training images, evenly spread over the set")
    add("--workers", type=natural, default=default_workers(),
        help="data loading processes per training process [%(default)s]")

    add = p.add_argument_group("losses and metrics in the features of pretrained networks").add_argument
    add("--w_lpips", type=not_negative, default=0.5, help="weight of LPIPS (VGG-16); 0: off [%(default)s]")
    add("--lpips_weights", metavar="FILE", type=str, help="torchvision's VGG-16; else torch hub's cache or a download")
    add("--w_repa", type=not_negative, default=0.25, help="weight of REPA (DINOv2 ViT-B/14); 0: off [%(default)s]")
    add("--repa_size", type=count, default=256, help="DINOv2 sees larger images shrunk to this side: its attention "
        "costs the fourth power [%(default)s]")
    add("--repa_weights", metavar="FILE", type=str, help="DINOv2 ViT-B/14; else Hugging Face's cache or a download")
    add("--eval_metrics", type=str, nargs="*", default=[], choices=["lpips", "rfid"], help="what evaluations measure "
        "too: LPIPS with --lpips_weights' network, Frechet distance in FID's Inception; default: neither")
    add("--inception", metavar="FILE", type=str, help="FID's Inception; else torch hub's cache or a download")

    add = p.add_argument_group("memory and speed").add_argument
    add("--micro_batch", type=count, help="images per forward pass and process; gradients add up to the batch's")
    add("--checkpointing", action="store_true", help="less memory: compute residual blocks twice")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile for the networks' blocks; default: on "
        "GPUs that Triton serves, where a C compiler is installed, but not with --preset")


def run_arguments(p):
    """The flags of any training run, with the defaults of train.py."""
    add = p.add_argument_group("optimisation").add_argument
    add("--batch_size", type=count, default=192, help="images per step over all processes [%(default)s]")
    add("--steps", type=count, default=250_000, help="optimiser steps [%(default)s]")
    add("--optimizer", type=str, choices=["adamw", "muon"], default="adamw", help="muon: for the weights of "
        "convolutions and linear layers, AdamW for the others [%(default)s]")
    add("--lr", type=positive, default=3e-4, help="learning rate [%(default)s]")
    add("--warmup", type=natural, default=1000, help="steps of linear warm-up [%(default)s]")
    add("--decay", type=fraction, default=0.0, help="last fraction of the steps, in which lr falls to 0 [%(default)s]")
    add("--weight_decay", type=not_negative, default=1e-3, help="weight decay [%(default)s]")
    add("--grad_clip", type=not_negative, default=1.0, help="largest gradient norm; 0: no limit [%(default)s]")
    add("--ema", type=below_one, default=0.999, help="decay of the weights' average, which is saved [%(default)s]")
    add("--ema_start", type=natural, default=0, help="until then the average is the weights themselves [%(default)s]")

    add = p.add_argument_group("run").add_argument
    add("--out", metavar="DIR", type=str, help="folder of the run; else in runs/, named after what is trained")
    add("--resume", action="store_true", help="continue the run in --out from its newest checkpoint, if there is one")
    add("--device", metavar="NAME", type=str, help="cuda, mps or cpu; else the best there is")
    add("--dtype", type=str, choices=["auto", "float32", "bf16"], default="auto",
        help="bf16: autocast; auto: bf16 where the hardware has it [%(default)s]")
    add("--seed", type=natural, default=0, help="decides everything random [%(default)s]")
    add("--eval_every", type=natural, default=5000, help="steps between evaluations; 0: only at the end [%(default)s]")
    add("--eval_images", type=count, default=64, help="images of evaluations: for validation, or those that a "
        "generator draws [%(default)s]")
    add("--save_every", type=count, default=5000, help="steps between checkpoints [%(default)s]")
    add("--log_every", type=count, default=50, help="steps between lines of log.jsonl [%(default)s]")
    add("--tensorboard", action="store_true", help="the log and the pictures for TensorBoard too, in --out")
    add("--wandb", action="store_true", help="the same copied to Weights & Biases (WANDB_MODE=offline: into --out)")


def check_args(args):
    if args.freeze_enc and (args.phase == 2 or not (encoder_is_given(args) or args.init_from)):
        raise ValueError("--freeze_enc needs an encoder, given by --enc_ckpt FILE, and not --phase 2, which adapts it")
    if LINEAR[args.linear][1] and args.loss == "eqm" and args.c != "linear":
        raise ValueError(f"--c {args.c} needs --linear off or encoder: beside a linear decoder the field is "
                         "lam c(0) (x_g - D), and only with --c linear is the target of that form")
    if LINEAR[args.linear][1] and not args.input_skip:
        raise ValueError("--no-input_skip needs --linear off or encoder: a linear decoder is part of the input skip")
    _, downscale, z_dim = parse_name(args.enc)
    if args.nested and max(args.nested) >= z_dim:
        raise ValueError(f"--nested {max(args.nested)}: {args.enc} has {z_dim} channels, of which fewer are kept")
    if args.p_scale and not smaller_sides(args.size, downscale):
        raise ValueError(f"--p_scale: images of {args.size} px have no smaller ones of whole cells of {downscale} px: "
                         "give a larger --size")


def encoder_is_given(args):
    """Latents of somebody's own, which the linear code does not know: the decoder is fitted to them."""
    return bool(args.enc_ckpt) or args.enc.startswith(TIMM)


# ---------------------------------------------------------------------------------------------------------------------
# Pieces that distill.py shares

def open_data(args, world):
    """(training images, validation images) of --data."""
    dataset = make_dataset(args.data, args.size, train=True, aug_scale=args.aug_scale, seed=args.seed, limit=args.limit,
                           enlarge=args.enlarge)
    val = make_dataset(args.data, args.size, train=False, limit=args.eval_images)  # the same with every --seed
    same_everywhere((len(dataset), len(val)), "images", world)
    say(parts_taken(dataset, val))
    return dataset, val


def perceptual_losses(args, width, device, world, w_vf=0.0):
    """LPIPS and REPA, on the device, each None where its weight is 0; REPA's DINOv2 also serves VF.

    A network that cannot be had ends the program, so that an objective never changes silently; only on the built-in
    images, which anybody should be able to try offline, and where neither a file nor VF is asked for, is the term left
    out, in one visible line.
    """
    losses = {"lpips": None, "repa": None}
    for name, weight in (("lpips", args.w_lpips), ("repa", args.w_repa or w_vf)):
        if not weight:
            continue
        reason = None
        try:
            if name == "lpips":
                losses[name] = LPIPSLoss("vgg", args.lpips_weights)
            else:
                losses[name] = REPALoss(width, args.repa_weights and local_file(args.repa_weights), args.repa_size)
        except WeightsUnavailable as error:
            if args.data != "demo" or args.lpips_weights or args.repa_weights or w_vf:
                raise
            reason = str(error)
        reasons = [found for found in gathered(reason, world) if found]
        if reasons:
            losses[name] = None
            say(f"NOTE: training WITHOUT {name.upper()} on the built-in images: {reasons[0]}")
    if losses["lpips"] is not None:
        losses["lpips"].to(device, memory_format=torch.channels_last)
    return losses["lpips"], losses["repa"]


def evaluation_networks(args, device, world):
    """({metric: distance}, {metric: features}) of --eval_metrics, on the device. ValueError where one cannot be had:
    who asks for a metric by name should not miss it after days of training."""
    lpips = ["vgg"] if "lpips" in args.eval_metrics else []
    features = ["inception"] if "rfid" in args.eval_metrics else []
    distances, features, unavailable = load_metrics(args.size, device, world, lpips, [args.lpips_weights] * len(lpips),
                                                    features, args.inception)
    for metric, reason in unavailable.items():
        raise ValueError(f"--eval_metrics: {metric}: {reason}")
    return distances, features


def learning_rate(step, args):
    """Linear warm-up, constant, linear fall to zero over the last `decay` of the steps."""
    rise = (step + 1) / max(1, args.warmup)
    fall = 1.0
    if args.decay:
        fall = (args.steps - step) / max(1.0, args.decay * args.steps)
    return args.lr * min(1.0, rise, fall)


def exact_type(device):
    """The most exact floating-point type that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64


def evaluation_is_due(step, args):
    if step == args.steps:
        return True
    return step > 0 and args.eval_every > 0 and step % args.eval_every == 0


def validate(run, ema, val, networks, dtype, steps):
    """evaluate's result on the validation images, decoded in each of `steps`: written, logged, and printed."""
    with run.evaluating():
        ahead = len(val) // (VALIDATION_BATCH * run.world) - 1  # a worker for less takes longer than it wins
        loader = make_loader(val, VALIDATION_BATCH * run.world, train=False,
                             workers=min(run.args.workers, max(0, ahead)), rank=run.rank, world=run.world,
                             device=run.device)
        result = evaluate(ema, loader, run.device, steps, *networks, seed=run.args.seed, dtype=dtype, rank=run.rank,
                          world=run.world)
        if run.rank == 0:
            write_results(result, run.args.out)  # before anything else can fail
            keep_best(run, ema, result["rows"][len(REFERENCES):], result["images"])
            run.log.write(run.done, result["pictures"], eval=result["rows"])  # now a resumed run takes it for done
            baseline, linear, first, *_ = result["rows"]
            tqdm.write(f"step {run.done}: PSNR {first['psnr']:.2f} dB in {first['name']}, linear code "
                       f"{linear['psnr']:.2f}, baseline {baseline['psnr']:.2f} on {result['images']} images")
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The model, what of it is trained, and its objective

def new_model(args):
    """The model that the flags describe, untrained."""
    linear_encoder, linear_decoder = LINEAR[args.linear]
    _, downscale, z_dim = parse_name(args.enc)
    coefficients = z_dim
    if encoder_is_given(args):
        linear_encoder = False
        coefficients = min(FITTED_COEFFICIENTS * z_dim, 3 * downscale**2)
    return DCSSDAE(args.enc, args.dec, args.loss, args.enc_width, depth=args.depth, window=args.window, c=args.c,
                   a=args.a, b=args.b, lam=args.lam, input_skip=args.input_skip, linear_encoder=linear_encoder,
                   linear_decoder=coefficients if linear_decoder else 0)


def first_model(args, checkpoint):
    """The model that training starts with; of a resumed run one that its checkpoint fits."""
    if checkpoint:
        return DCSSDAE(**checkpoint["config"])
    model = DCSSDAE.load(args.init_from) if args.init_from else new_model(args)
    if model.config["loss"] != args.loss:
        model = model.retargeted(args.loss)
    if args.enc.startswith(TIMM) and not args.init_from:
        model.encoder.read_weights(args.enc_ckpt and local_file(args.enc_ckpt))
    elif args.enc_ckpt:
        model.load_published(args.enc_ckpt, part="encoder")
    return model


def fit_images(dataset, model, args, device):
    """Batches (16, 3, size, size) of training images to fit the linear decoder on."""
    cells = (args.size // model.downscale) ** 2  # of an image
    images = min(8192, max(256, FIT_CELLS * model.encoder.z_dim // cells))
    batches = make_loader(dataset, FIT_BATCH, train=True, workers=args.workers, device=device)
    say(f"fitting the linear decoder to {images} images")
    for x, _ in itertools.islice(batches, images // FIT_BATCH):
        yield x


def choose_trained(model, phase, freeze_enc):
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
    """The encoder's last layers. A new family of encoders has its own."""
    if hasattr(encoder, "stages"):
        return [encoder.stages[-1], encoder.conv_out]
    return [encoder.down[-1], encoder.attend[-1], encoder.mid, encoder.norm_out, encoder.conv_out, encoder.quant]


def readers_of_the_latent(decoder):
    """The decoder's layers that see the latent itself."""
    parts = [decoder.norm_z, decoder.context]
    joint_input = isinstance(decoder.conv_in_z, nn.Identity)
    parts.append(decoder.conv_in if joint_input else decoder.conv_in_z)
    if decoder.base is not None:
        parts.append(decoder.revision)
    for block in decoder.blocks:
        parts.append(block.ada)
    for module in decoder.modules():
        if isinstance(module, AdaGN):
            parts.append(module.proj)
    return parts


def trains(module):
    return any(p.requires_grad for p in module.parameters())


class Objective(nn.Module):
    """All that the main optimisers train, and the loss terms of its outputs: one module, so that one DDP wrap covers
    it. Losses in the features of networks that do not train here, LPIPS and the GAN's, are added in the loop."""

    def __init__(self, model, repa, vf=None):
        super().__init__()
        self.model, self.repa, self.vf = model, repa, vf

    def forward(self, x, e, eps, level, z_noise=None, shown=None):
        """x images (B, 3, H, W), e noise, as large or smaller (--p_scale), eps (B, c, h, w) posterior noise, level
        (B,); z_noise, shown: draw_latent's -> ({name: scalar}, each image's FM or EqM loss (B,), latents (B, c, h, w),
        both without gradient, one-step estimate, as large as e)."""
        posterior = self.model.encode(x)
        z = posterior.sample(eps)
        # What the decoder sees of z: all of it, unless --p_scale, --z_noise or --nested say otherwise.
        x = resized(x, *e.shape[2:])
        seen = resized(z, *(side // self.model.downscale for side in e.shape[2:]))
        terms, theirs = {}, None
        if self.vf is not None:
            theirs = self.repa.target(x)
            terms["vf"] = self.vf(seen, theirs.mT.unflatten(2, self.repa.grid(x)))
        if z_noise is not None:
            seen = seen + z_noise * self.model.decoder.norm_z.running_var.sqrt()[:, None, None]
        if shown is not None:
            seen = first_channels(seen, shown)
        losses, estimate, tokens = matching(self.model.decoder, self.model.eqm, x, e, seen, level)
        terms[self.model.config["loss"]] = losses.mean()
        if self.repa is not None:
            terms["repa"] = self.repa(tokens, x, theirs)
        terms["kl"] = kl_loss(posterior)
        return terms, losses.detach(), z.detach(), estimate


def weighted_sum(terms, weights):
    """The loss that trains. KeyError for a term without a weight."""
    return sum(weights[name] * term for name, term in terms.items())


def discriminator_backward(gan, x, estimate, share, device, dtype):
    """Gradients of `share` times the discriminator's loss, which is returned. Its parameters take gradients here
    alone, not from the estimate's own term."""
    gan.requires_grad_(True)
    with autocast(device, dtype):
        loss = hinge_loss(gan(x), gan(estimate))
    (loss * share).backward()
    gan.requires_grad_(False)
    return loss


def latent_sums(z):
    """Sums of z (B, c, h, w) and of its squares by channel: (2, c)."""
    z = z.to(exact_type(z.device))
    return torch.stack([z.sum(dim=(0, 2, 3)), z.square().sum(dim=(0, 2, 3))])


# ---------------------------------------------------------------------------------------------------------------------
# Training

def main():
    args = get_args()
    rank, world, device, dtype = start(args)

    # Model
    checkpoint, evaluated = open_run(args, rank, world)
    if args.phase in (2, 3) and not (checkpoint or args.init_from):
        raise ValueError(f"--phase {args.phase} goes on from a trained model: give --init_from FILE")
    model = first_model(args, checkpoint)
    check_size(args.size, model)
    model.to(device, memory_format=torch.channels_last)
    choose_trained(model.train(), args.phase, args.freeze_enc)  # a loaded one is in evaluation mode
    encoder_trains, norm_trains = trains(model.encoder), trains(model.decoder.norm_z)
    model.decoder.checkpointing = args.checkpointing

    # Data
    dataset, val = open_data(args, world)
    if checkpoint:
        compare_flags(checkpoint, args, MODEL_FLAGS, len(dataset))
    elif encoder_is_given(args) and not args.init_from and model.config["linear_decoder"]:
        model.fit_linear_decoder(fit_images(dataset, model, args, device))

    # Objective and optimisers
    w_vf = args.w_vf if encoder_trains else 0.0
    lpips, repa = perceptual_losses(args, model.decoder.mid_in.out_features, device, world, w_vf)
    vf = VFLoss(model.encoder.z_dim) if w_vf else None
    networks = evaluation_networks(args, device, world)
    gan = gan_optimizer = None
    if args.w_gan:
        gan = PatchGAN().requires_grad_(False).to(device, memory_format=torch.channels_last)
        gan_optimizer = adamw(gan.parameters(), args.lr, 0.0, device, GAN_BETAS)
    weights = {args.loss: 1.0, "lpips": args.w_lpips, "repa": args.w_repa, "gan": args.w_gan,
               "kl": args.w_kl if encoder_trains else 0.0, "vf": w_vf}
    model.config["notes"] = {"size": args.size, "data": args.data, "w_lpips": 0.0 if lpips is None else args.w_lpips,
                             "w_repa": 0.0 if repa is None else args.w_repa}
    if encoder_trains:
        model.config["latents"] = None  # --init_from's statistics are of other latents
    objective = Objective(model, repa, vf).to(device)
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizers = make_optimizers(trained, args.optimizer, args.lr, args.weight_decay, device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    if args.compile:
        compile_blocks(model)

    # The run
    parts = {"model": model, "ema": ema, "repa": repa and repa.mlp, "vf": vf, "optimizer": None, "muon": None,
             **optimizers, "gan": gan, "gan_optimizer": gan_optimizer}
    run = Run(args, rank, world, device, parts, dataset, checkpoint)
    del checkpoint
    average = Average(ema, model)
    parallel = data_parallel(objective, world)
    batches = iter(make_loader(dataset, args.batch_size, train=True, workers=args.workers, seed=args.seed, rank=rank,
                               world=world, start=run.done, device=device))
    local = args.batch_size // world                                            # images of this process
    micro = min(args.micro_batch or local, local)                               # images of a forward pass
    z_shape = model.latent_shape(args.size, args.size)
    say(f"{args.enc} (x{args.enc_width:g}) {millions(model.encoder.parameters()):.2f} M + "
        f"U-ViT {args.dec} {millions(model.decoder.parameters()):.2f} M parameters, {millions(trained):.2f} M of them "
        f"trained, loss {args.loss}, {world} process(es) on {device.type}, {'bf16' if dtype else 'float32'} -> "
        f"{args.out}")

    for step in range(run.done, args.steps + 1):
        # Evaluate: here, not after the step, so that a run that is stopped between a checkpoint and its evaluation
        # catches up on it.
        if evaluation_is_due(step, args) and step != evaluated:
            result = validate(run, ema, val, networks, dtype, args.eval_steps)
        if step == args.steps:
            break

        # Draw
        set_learning_rate(optimizers.values(), learning_rate(step, args))
        x, index = run.next_batch(batches)
        x = x.contiguous(memory_format=torch.channels_last)                     # (local, 3, size, size)
        rows = range(rank * local, (rank + 1) * local)                          # of the whole batch
        with_gan = gan is not None and step >= args.gan_start
        side = draw_side(args.seed, step, args.size, model.downscale, args.p_scale)  # of what is decoded

        # Forward and backward, one micro-batch after the other
        totals, by_level, moments = {}, 0, 0
        for i in range(0, local, micro):
            xb = x[i:i + micro]
            e, eps, level = draw(args.seed, step, rows[i:i + micro], (3, side, side), z_shape, device, args.loss,
                                 args.t_mean, args.g_power)
            z_noise, shown = draw_latent(args.seed, step, rows[i:i + micro], model.latent_shape(side, side), device,
                                         args.z_noise, args.nested)
            target = resized(xb, side, side)
            e = e.contiguous(memory_format=torch.channels_last)
            share = len(xb) / local
            is_last = i + micro >= local
            with nullcontext() if is_last or world == 1 else parallel.no_sync():
                with autocast(device, dtype):
                    terms, losses, z, estimate = parallel(xb, e, eps, level, z_noise, shown)
                    if lpips is not None:
                        terms["lpips"] = lpips(target, estimate).mean()
                    if with_gan:
                        terms["gan"] = -gan(estimate).mean()
                terms["loss"] = weighted_sum(terms, weights)
                (terms["loss"] * share).backward()
            if with_gan:
                terms["gan_d"] = discriminator_backward(gan, target, estimate.detach(), share, device, dtype)
            for name, term in terms.items():
                totals[name] = totals.get(name, 0) + term.detach() * share / world
            by_level = by_level + level_sums(losses, level, exact_type(device))  # (2, LEVEL_BINS)
            moments = moments + latent_sums(z)                                  # (2, c)
        norm = clip_grad_norm_(trained, args.grad_clip or float("inf"))
        if with_gan:
            average_gradients(gan, world)
            totals["gan_grad_norm"] = clip_grad_norm_(gan.parameters(), args.grad_clip or float("inf")) / world

        # One small sum over the processes: loss terms, the loss by level, the latents' moments
        numbers = torch.stack([*totals.values()]).to(moments.dtype)
        shared = summed(torch.cat([numbers, by_level.flatten(), moments.flatten()]), world)
        numbers, by_level, moments = shared.split([len(numbers), by_level.numel(), moments.numel()])
        totals = dict(zip(totals, numbers, strict=True))
        by_level, moments = by_level.view(2, -1), moments.view(2, -1)

        # Step and average, unless something is not finite: on all ranks or none, as they hold the same gradients.
        # Decided on the device, which nobody waits for.
        good = norm.isfinite() & shared.isfinite().all()
        step_if(good, optimizers.values())
        if with_gan:
            set_learning_rate([gan_optimizer], learning_rate(step, args))
            step_if(good, [gan_optimizer])
            gan_optimizer.zero_grad()
        if norm_trains:
            model.decoder.norm_z.update(args.batch_size * z_shape[1] * z_shape[2], *moments, good)
        average.update(args.ema, step - args.ema_start, good)
        for p in trained:
            p.grad = None

        # Log and save
        run.finish_step(totals, norm, good, index, by_level)

    run.bar.close()
    unreadable = int((summed(dataset.skipped.int(), world) > 0).sum())  # by any process
    if rank == 0:
        if unreadable:
            print(f"warning: {unreadable} unreadable images were replaced by others in training")
        print_table(result)
        print(f"saved {args.out}/model.safetensors, best.safetensors, reconstructions.png, metrics.json and log.jsonl")


def millions(parameters):
    return sum(p.numel() for p in parameters) / 1e6


if __name__ == "__main__":
    guarded(main)
