"""Train the autoencoder: encoder and diffusion decoder together, from scratch or from a pretrained encoder.

    python train.py --preset tiny                                         # two CPU cores, no network: a few minutes
    torchrun train.py --enc dc_f32c32 --loss eqm --data DIR               # one GPU
    torchrun --nproc_per_node=8 train.py --enc dc_f32c32 --loss fm --data DIR --compile    # one node

The objective is SSDD's (arXiv 2510.04961): FM or EqM + 0.5 LPIPS + 0.25 REPA + 1e-6 KL. Everything random - data order,
crops, noise, times, posterior draws - is a function of (seed, step, sample), so a run does not depend on processes,
micro-batches or interruptions.
Writes to --out: model.safetensors (EMA weights), latest.pt (to resume), log.jsonl, reconstructions.png, metrics.json.
"""
import argparse
import copy
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from data import make_dataset, make_loader
from evaluate import evaluate, guarded, print_table, setup, write_results
from losses import EqM, LPIPSLoss, REPALoss, WeightsUnavailable, eqm_loss, fm_loss, fm_mix, fm_predict_x, kl_loss
from model import BROKEN_FILE, DCSSDAE, SIZES, local_file
from sampler import seeded_generator

PRESETS = {
    # Two cores without GPU or network. Measured results stand in the README's quick start.
    "tiny": {"enc": "dc_f8c16", "enc_width": 0.125, "dec": "XS", "depth": 2, "size": 32, "batch_size": 16, "steps": 950,
             "lr": 2e-3, "t_mean": 1.5, "warmup": 50, "decay": 0.5, "w_lpips": 0.0, "w_repa": 0.0, "ema": 0.99,
             "eval_every": 475, "eval_images": 256, "save_every": 475},
}


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--preset", choices=sorted(PRESETS), help="named set of defaults; flags given beside it win")

    g = p.add_argument_group("model")
    g.add_argument("--enc", default="dc_f32c32", help="(vq|dc|dcae)_f<8|16|32|64|128>c<channels>, or dcae_f32c32_sana")
    g.add_argument("--enc_width", type=float, default=1.0,
                   help="multiplies the encoder's widths; 0.125 is a teaching size")
    g.add_argument("--enc_ckpt",
                   help="start the encoder from this file or hf://owner/repo/file: ours or a published one (README)")
    g.add_argument("--freeze_enc", action="store_true", help="train the decoder only; needs --enc_ckpt")
    g.add_argument("--dec", choices=list(SIZES), default="S", help="decoder size")
    g.add_argument("--depth", type=int, help="decoder transformer blocks, instead of the size's own")
    g.add_argument("--input_skip", action=argparse.BooleanOptionalAction, default=True,
                   help="add the noisy image to the decoder's output (UViT's skip); off, as published, "
                        "the network carries the noise itself")

    g = p.add_argument_group("objective")
    g.add_argument("--loss", choices=["fm", "eqm"], default="eqm", help="flow matching or equilibrium matching")
    g.add_argument("--c", choices=["linear", "trunc", "piecewise"], default="linear",
                   help="EqM: how the field falls to zero at the data")
    g.add_argument("--a", type=float, default=0.8, help="EqM: where trunc and piecewise begin to fall to zero")
    g.add_argument("--b", type=float, default=1.4, help="EqM: piecewise's value at the noise end")
    g.add_argument("--lam", type=float, default=1.0, help="EqM: scale of the field")
    g.add_argument("--t_mean", type=float, default=0.0,
                   help="FM: t = sigmoid(n), n ~ N(t_mean, 1); above 0 trains more on the noise end, "
                        "where one step begins")
    g.add_argument("--w_kl", type=float, default=1e-6, help="weight of the KL term (sum over the latent)")

    shared_arguments(p)
    g = p.add_argument_group("training only")
    g.add_argument("--micro_batch", type=int,
                   help="images per forward pass and process; gradients accumulate to the whole batch")
    g.add_argument("--compile", action="store_true", help="torch.compile encoder and decoder")
    g.add_argument("--eval_every", type=int, default=5000,
                   help="steps between evaluations on the validation images; 0: only at the end")
    g.add_argument("--eval_steps", type=int, nargs="+", default=[1, 4], help="sampler steps of these evaluations")

    preset = p.parse_known_args(argv)[0].preset
    if preset:
        p.set_defaults(**PRESETS[preset])
    args = p.parse_args(argv)
    args.out = args.out or os.path.join("runs", f"{args.preset or args.enc}_{args.loss}")
    return args


def shared_arguments(p):
    """The flags that train.py and distill.py have in common, with the defaults of train.py."""
    g = p.add_argument_group("data")
    g.add_argument("--data", default="demo", help="demo (built in), imagenette, cifar10, or a folder of images")
    g.add_argument("--size", type=int, default=128,
                   help="training crop, pixels a side; a multiple of 8 and of the encoder's f")
    g.add_argument("--aug_scale", type=float, default=2.0,
                   help="random resize of the short side in [size, size * aug_scale] before the crop")
    g.add_argument("--limit", type=int, help="use only N training images, evenly spread over the set")
    g.add_argument("--workers", type=int, default=min(8, (os.cpu_count() or 2) // 2),
                   help="data loading processes per training process")

    g = p.add_argument_group("losses in the features of pretrained networks")
    g.add_argument("--w_lpips", type=float, default=0.5, help="weight of LPIPS (VGG-16); 0: off")
    g.add_argument("--lpips_weights",
                   help="torchvision's VGG-16 weights as a file; else torch hub's cache or a download")
    g.add_argument("--w_repa", type=float, default=0.25, help="weight of REPA (DINOv2 ViT-B/14); 0: off")
    g.add_argument("--repa_weights",
                   help="DINOv2 ViT-B/14 weights as a file; else the Hugging Face cache or a download")

    g = p.add_argument_group("optimisation")
    g.add_argument("--batch_size", type=int, default=192, help="images per step over all processes")
    g.add_argument("--steps", type=int, default=250_000, help="optimiser steps")
    g.add_argument("--lr", type=float, default=3e-4, help="AdamW's learning rate")
    g.add_argument("--warmup", type=int, default=1000, help="steps of linear warm-up")
    g.add_argument("--decay", type=float, default=0.0,
                   help="last fraction of the steps in which the learning rate falls linearly to 0")
    g.add_argument("--weight_decay", type=float, default=1e-3, help="AdamW's weight decay")
    g.add_argument("--grad_clip", type=float, default=1.0, help="largest gradient norm")
    g.add_argument("--ema", type=float, default=0.999,
                   help="decay of the weights' moving average, which is what is saved and evaluated")

    g = p.add_argument_group("run")
    g.add_argument("--out", help="folder of the run [default: named after what is trained]")
    g.add_argument("--resume", action="store_true", help="continue the run in --out from its latest.pt")
    g.add_argument("--device", help="cuda, mps or cpu [default: the best there is]")
    g.add_argument("--dtype", choices=["auto", "float32", "bf16"], default="auto",
                   help="bf16: autocast; auto: bf16 where the hardware has it")
    g.add_argument("--seed", type=int, default=0, help="of everything random")
    g.add_argument("--eval_images", type=int, default=64, help="validation images of evaluations")
    g.add_argument("--save_every", type=int, default=5000, help="steps between checkpoints")
    g.add_argument("--log_every", type=int, default=50, help="steps between lines of log.jsonl")


def check_size(size, model):
    unit = max(8, model.downscale)
    if size < unit or size % unit:
        raise ValueError(f"--size {size} is not a multiple of {unit}, "
                         f"which {model.config['enc']} and the decoder need: "
                         f"take {max(1, size // unit) * unit} or {(size // unit + 1) * unit}")


def check_args(args, world):
    """Complaints about flags and their combinations, before anything is built on them."""
    if args.batch_size < 1 or args.batch_size % world:
        raise ValueError(f"--batch_size {args.batch_size} must be a positive multiple of the {world} processes")
    if args.freeze_enc and not args.enc_ckpt:
        raise ValueError("--freeze_enc without --enc_ckpt would train on the latents of a random encoder: "
                         "give --enc_ckpt FILE")
    for name in ("steps", "log_every", "save_every", "eval_images"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.micro_batch is not None and args.micro_batch < 1:
        raise ValueError(f"--micro_batch must be at least 1, got {args.micro_batch}")
    if not (0 <= args.ema < 1 and 0 <= args.decay <= 1):
        raise ValueError(f"--ema must lie in [0, 1) and --decay in [0, 1], got {args.ema} and {args.decay}")


# ---------------------------------------------------------------------------------------------------------------------
# Pieces that distill.py shares

def pick_dtype(name, device):
    """torch.bfloat16 or None (float32, no autocast)."""
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        name = "bf16" if fast or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()) else "float32"
    return torch.bfloat16 if name == "bf16" else None


def autocast(device, dtype):
    return torch.autocast(device.type, dtype=dtype) if dtype else nullcontext()


def perceptual_losses(args, width, rank):
    """(LPIPS or None, REPA or None, {name: reason} of those left out).

    A network that cannot be had stops the program, so that an objective never changes silently; only on the built-in
    images, which anybody should be able to try offline, is the term left out, in one visible line.
    """
    built, left_out = [], {}
    for name, weight, build in (("lpips", args.w_lpips, lambda: LPIPSLoss("vgg", local_file(args.lpips_weights))),
                                ("repa", args.w_repa, lambda: REPALoss(width, local_file(args.repa_weights)))):
        module = None
        try:
            module = build() if weight else None
        except WeightsUnavailable as error:
            if args.data != "demo" or getattr(args, f"{name}_weights"):
                raise
            left_out[name] = str(error)
            if rank == 0:
                print(f"NOTE: training WITHOUT {name.upper()} on the built-in images: {error}", flush=True)
        built.append(module)
    return *built, left_out


def draw(seed, step, rows, x_shape, z_shape, device, t_mean=None):
    """What is random in a step, per sample from (seed, step, row): noise e (B, *x_shape), posterior noise
    (B, *z_shape), level s (B,).

    t_mean  None: s ~ U(0, 1), EqM's g. A number: s = sigmoid(n), n ~ N(t_mean, 1), FM's t (SSDD).
    """
    e, eps, s = [], [], []
    for row in rows:
        gen = seeded_generator(device, seed, step, row)
        s.append(torch.rand((), generator=gen, device=device) if t_mean is None else
                 (torch.randn((), generator=gen, device=device) + t_mean).sigmoid())
        eps.append(torch.randn(z_shape, generator=gen, device=device))
        e.append(torch.randn(x_shape, generator=gen, device=device))
    return torch.stack(e), torch.stack(eps), torch.stack(s)


def lr_factor(step, args):
    """Linear warm-up, constant, linear fall to zero over the last `decay` of the steps."""
    left = (args.steps - step) / max(1.0, args.decay * args.steps) if args.decay else 1.0
    return min(1.0, (step + 1) / max(1, args.warmup), left)


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """Parameters and float buffers (the latents' statistics too): ema <- decay * ema + (1 - decay) * model; faster in
    the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    for a, b in zip(ema.state_dict().values(), model.state_dict().values()):
        if a.is_floating_point():
            a.lerp_(b, 1 - decay)
        else:
            a.copy_(b)


def optimise(optimizer, parameters, grad_clip):
    """Clip, step, clear. Returns the gradient norm; a non-finite one skips the step - on all ranks, which hold the same
    gradients."""
    norm = nn.utils.clip_grad_norm_(parameters, grad_clip)
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)


class StopSignal:
    """Turns SIGINT and SIGTERM (a scheduler's preemption) into a flag that the loop reads at the end of a step."""

    def __init__(self):
        self.received = 0
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self.handle)

    def handle(self, number, frame):
        self.received = number


def save_checkpoint(out, state):
    """latest.pt through a temporary name, the one before it kept as previous.pt. OSError says that the disk is full,
    say; nothing is lost."""
    latest, temporary = os.path.join(out, "latest.pt"), os.path.join(out, "latest.pt.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise OSError(f"could not write a checkpoint to {out} ({str(error).splitlines()[0]}); "
                      "the earlier checkpoint is intact: make room and continue with --resume") from None
    if os.path.exists(latest):
        os.replace(latest, os.path.join(out, "previous.pt"))
    os.replace(temporary, latest)


def load_checkpoint(out):
    """The newest readable checkpoint of a run. FileNotFoundError / ValueError where there is none."""
    problems = []
    for name in ("latest.pt", "previous.pt"):
        path = os.path.join(out, name)
        if os.path.isfile(path):
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except BROKEN_FILE as error:
                problems.append(f"{path} ({type(error).__name__})")
    if problems:
        raise ValueError(f"no readable checkpoint, damaged: {', '.join(problems)}; start again with another --out")
    raise FileNotFoundError(f"--resume found no checkpoint in {out}: leave --resume out to start a run there")


def prepare_out(out, resume, rank, log_step=None):
    """Make the folder; refuse to write over another run; on resuming, drop the log lines that will be written again."""
    log = os.path.join(out, "log.jsonl")
    if not resume and any(os.path.exists(os.path.join(out, name)) for name in ("latest.pt", "model.safetensors")):
        raise ValueError(f"{out} already holds a run: continue it with --resume, or choose another folder with --out")
    if rank == 0:
        os.makedirs(out, exist_ok=True)
        if resume and os.path.exists(log):
            with open(log) as file:
                lines = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= log_step]
            with open(log, "w") as file:
                file.writelines(lines)
        elif os.path.exists(log):
            os.remove(log)
    return log


def remaining(step, args):
    """The step to go on from; ValueError where nothing is left to do."""
    if step >= args.steps:
        raise ValueError(f"the run in {args.out} has done its {step} steps: give a larger --steps to continue it")
    return step


def append_log(path, **values):
    with open(path, "a") as file:
        file.write(json.dumps(values) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Training

class Objective(nn.Module):
    """All that has trained parameters, and the loss terms: one module, so that one DDP wrap covers it."""

    def __init__(self, model, lpips, repa, args):
        super().__init__()
        self.model, self.repa = model, repa
        self.lpips = [lpips]  # in a list: its frozen weights are neither trained, synchronised nor saved
        self.eqm = EqM(args.c, args.a, args.b, args.lam) if args.loss == "eqm" else None
        self.encode, self.field = model.encode, model.decoder.forward_with_tokens
        if args.compile:
            self.encode, self.field = torch.compile(self.encode), torch.compile(self.field)

    def forward(self, x, e, eps, s):
        """x images, e noise (B, 3, H, W), eps (B, c, h, w) posterior noise, s (B,) level -> ({name: scalar}, latents
        (B, c, h, w))."""
        posterior = self.encode(x)
        z = posterior.sample(eps)
        terms = {}
        if self.eqm is None:
            x_s = fm_mix(x, e, s)
            v, tokens = self.field(x_s, z, s)
            terms["fm"] = fm_loss(v, x, e)
            estimate = fm_predict_x(x_s, v.float(), s)
        else:
            x_s = self.eqm.mix(x, e, s)
            f, tokens = self.field(x_s, z)
            terms["eqm"] = eqm_loss(f, x, e, s, self.eqm)
            estimate = self.eqm.predict_x(x_s, f.float(), s)
        if self.lpips[0] is not None:
            terms["lpips"] = self.lpips[0](x, estimate).mean()
        if self.repa is not None:
            terms["repa"] = self.repa(tokens, x)
        terms["kl"] = kl_loss(posterior)
        return terms, z.detach()


def main():
    args = get_args()
    rank, world, device = setup(args.device)
    if device.type == "cuda":  # TF32 for what autocast leaves in float32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    check_args(args, world)
    dtype = pick_dtype(args.dtype, device)
    torch.manual_seed(args.seed)  # initial weights, the same on every rank

    model = DCSSDAE(args.enc, args.dec, args.loss, args.enc_width, depth=args.depth, c=args.c, a=args.a, b=args.b,
                    lam=args.lam, input_skip=args.input_skip)
    check_size(args.size, model)
    checkpoint = load_checkpoint(args.out) if args.resume else None
    log_path = prepare_out(args.out, args.resume, rank, checkpoint and checkpoint["step"])
    if args.enc_ckpt:
        model.load_published(args.enc_ckpt, part="encoder")
    model.encoder.requires_grad_(not args.freeze_enc)
    dataset = make_dataset(args.data, args.size, train=True, aug_scale=args.aug_scale, seed=args.seed, limit=args.limit)
    val = make_dataset(args.data, args.size, train=False, seed=args.seed, limit=args.eval_images)
    lpips, repa, left_out = perceptual_losses(args, model.decoder.mid_in.out_features, rank)
    model.config["notes"] = {"size": args.size, "data": args.data, "w_lpips": 0.0 if lpips is None else args.w_lpips,
                             "w_repa": 0.0 if repa is None else args.w_repa, "left_out": left_out}

    model.to(device, memory_format=torch.channels_last)
    lpips = lpips and lpips.to(device)
    objective = Objective(model, lpips, repa, args).to(device)
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay, betas=(0.9, 0.99),
                                  fused=device.type != "mps")
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    start = 0
    if checkpoint:
        start = resume(checkpoint, args, model, ema, repa, optimizer)
    parallel = nn.parallel.DistributedDataParallel(objective, broadcast_buffers=False) if world > 1 else objective
    weights = {"fm": 1.0, "eqm": 1.0, "lpips": args.w_lpips, "repa": args.w_repa,
               "kl": 0.0 if args.freeze_enc else args.w_kl}

    local = args.batch_size // world
    micro = min(args.micro_batch or local, local)
    z_shape = (model.encoder.z_dim, args.size // model.downscale, args.size // model.downscale)
    batches = iter(make_loader(dataset, args.batch_size, train=True, workers=args.workers, seed=args.seed,
                               rank=rank, world=world, start=start))
    if rank == 0:
        count = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (model.encoder, model.decoder)]
        print(f"{args.enc} (x{args.enc_width:g}) {count[0]:.2f} M + U-ViT {args.dec} {count[1]:.2f} M parameters, "
              f"loss {args.loss}, {len(dataset)} images of '{args.data}' at {args.size} px, "
              f"{world} process(es) on {device.type}, {'bf16' if dtype else 'float32'} -> {args.out}")

    stop, bad, clock, clock_step = StopSignal(), 0, time.time(), start
    bar = tqdm(total=args.steps, initial=start, disable=rank != 0, unit="step", dynamic_ncols=True)
    for step in range(start, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * lr_factor(step, args)
        x, _ = next(batches)
        x = x.to(device, memory_format=torch.channels_last, non_blocking=True)
        rows = range(rank * local, (rank + 1) * local)

        totals, moments = {}, 0
        for i in range(0, local, micro):
            xb = x[i:i + micro]
            e, eps, s = draw(args.seed, step, rows[i:i + micro], xb.shape[1:], z_shape, device,
                             args.t_mean if args.loss == "fm" else None)
            share = len(xb) / local
            last = i + micro >= local
            with nullcontext() if last or world == 1 else parallel.no_sync():
                with autocast(device, dtype):
                    terms, z = parallel(xb, e.contiguous(memory_format=torch.channels_last), eps, s)
                loss = sum(weights[name] * term for name, term in terms.items())
                (loss * share).backward()
            for name, term in dict(terms, loss=loss).items():
                totals[name] = totals.get(name, 0) + term.detach() * share / world
            z = z.float().cpu().double()
            moments = moments + torch.stack([z.sum(dim=(0, 2, 3)), z.square().sum(dim=(0, 2, 3))])

        norm = optimise(optimizer, trained, args.grad_clip)
        # One small all-reduce a step: loss terms, the latents' moments, and whether anybody was asked to stop.
        shared = torch.cat([torch.stack(list(totals.values())).double().cpu(), moments.flatten(),
                            torch.tensor([float(stop.received)])])
        if world > 1:
            shared = shared.to(device if device.type == "cuda" else "cpu")
            dist.all_reduce(shared)
        shared = shared.cpu()
        totals = dict(zip(totals, shared.tolist()))
        if math.isfinite(norm) and shared.isfinite().all():
            model.decoder.norm_z.update(args.batch_size * z_shape[1] * z_shape[2], *shared[len(totals):-1].view(2, -1))
            update_ema(ema, model, args.ema, step)
            bad = 0
        else:
            bad += 1
            if rank == 0:
                tqdm.write(f"warning: step {step} skipped, not finite: gradient norm {norm}, "
                           + ", ".join(f"{k} {v:.4g}" for k, v in totals.items()))
            if bad == 10:
                raise ValueError(f"ten steps in a row were not finite, the last is {step} with {totals}: "
                                 f"lower --lr, or use --dtype float32; {args.out} keeps the last checkpoint")

        done = step + 1
        bar.update()
        if rank == 0 and (done % args.log_every == 0 or done == args.steps):
            rate = (done - clock_step) * args.batch_size / (time.time() - clock)
            clock, clock_step = time.time(), done
            bar.set_postfix_str(f"loss {totals['loss']:.4f}, {rate:.0f} images/s")
            append_log(log_path, step=done, **totals, lr=optimizer.param_groups[0]["lr"],
                       grad_norm=norm, images_per_s=rate)
        stopped = shared[-1] > 0
        if (stopped or done % args.save_every == 0 or done == args.steps) and rank == 0:
            save_checkpoint(args.out, {"step": done, "args": vars(args), "model": model.state_dict(),
                                       "ema": ema.state_dict(), "repa": repa and repa.trained_state(),
                                       "optimizer": optimizer.state_dict()})
            ema.save(os.path.join(args.out, "model.safetensors"))
        if stopped:
            bar.close()
            if rank == 0:
                print(f"stopped after step {done} and saved: continue with the same command and --resume")
            sys.exit(128 + (stop.received or signal.SIGTERM))
        if done == args.steps or (args.eval_every and done % args.eval_every == 0):
            before = time.time()
            loader = make_loader(val, 64 * world, train=False, rank=rank, world=world)
            result = evaluate(ema, loader, device, steps=args.eval_steps, seed=args.seed, dtype=dtype,
                              rank=rank, world=world, progress=False)
            if rank == 0:
                row = result["rows"][1]
                tqdm.write(f"step {done}: one-step PSNR {row['psnr']:.2f} dB, "
                           f"baseline {result['rows'][0]['psnr']:.2f} dB on {result['images']} images")
                append_log(log_path, step=done, eval=result["rows"])
                write_results(result, args.out)
            clock += time.time() - before
    bar.close()
    if rank == 0:
        if int(dataset.skipped.sum()):
            print(f"warning: {int(dataset.skipped.sum())} unreadable images were replaced by others in training")
        print_table(result)
        print(f"saved {args.out}/model.safetensors, reconstructions.png, metrics.json and log.jsonl")


def resume(checkpoint, args, model, ema, repa, optimizer):
    """Restore everything in place; the step to go on from. ValueError where the flags describe another model."""
    then = checkpoint["args"]
    for name in ("enc", "enc_width", "dec", "depth", "loss", "c", "a", "b", "lam", "input_skip",
                 "size", "batch_size", "seed", "data"):
        if then[name] != getattr(args, name):
            raise ValueError(f"--resume continues a run with --{name} {then[name]}, "
                             f"but --{name} {getattr(args, name)} was given: "
                             "use the flags of the first call, or another --out")
    model.load_state_dict(checkpoint["model"])
    ema.load_state_dict(checkpoint["ema"])
    if repa:
        repa.mlp.load_state_dict(checkpoint["repa"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    return remaining(checkpoint["step"], args)


if __name__ == "__main__":
    guarded(main)
