"""Distil a many-step decoder into a one-step decoder with the same encoder: latents stay valid.

    python distill.py --ckpt runs/tiny_eqm/model.safetensors --steps 400 --batch_size 16
    torchrun --nproc_per_node=8 distill.py --ckpt runs/dc_f32c32_eqm/model.safetensors --data DIR

The frozen teacher decodes z from noise e in N steps to x_T. The student starts from the same e and z and takes one step
from pure noise to x^ (SSDD, arXiv 2510.04961). Loss: its own matching loss with x_T in the place of the
data, plus LPIPS(x_T, x^) and REPA. Works for flow matching (t = 1) and equilibrium matching (g = 0). Writes
model.safetensors, reconstructions.png, metrics.json, log.jsonl.
"""
import copy
import math
import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from data import make_dataset, make_loader, parts_taken
from evaluate import evaluate, guarded, image_noise, print_table, setup, write_results
from losses import EqM, eqm_loss, fm_loss, fm_predict_x
from model import DCSSDAE

from train import (StopSignal, append_log, autocast, bad_step, check_shared, check_size, draw, leave,  # isort: skip
                   lr_factor, make_parser, open_board, open_run, peak_memory, perceptual_losses, pick_dtype,
                   save_checkpoint, shared_arguments, training_batches, update_ema)


def get_args(argv=None):
    p = make_parser(__doc__, "--size and --w_lpips are the teacher's unless they are given.")
    add = p.add_argument_group("teacher").add_argument
    add("--ckpt", metavar="FILE", type=str, required=True, help="a model.safetensors of train.py")
    add("--teacher_steps", type=int, default=8, help="steps of the teacher's sampler [%(default)s]")
    add("--t_shift", type=float, help="FM: of the teacher's Euler times")
    add("--eta", type=float, help="EqM: of the teacher's gradient descent")
    add("--mu", type=float, help="EqM: Nesterov momentum of the teacher")

    shared_arguments(p)
    p.set_defaults(size=None, w_lpips=None, w_repa=0.0, steps=10_000, lr=1e-4, warmup=50, decay=0.5, save_every=2000)
    args = p.parse_args(argv)
    args.out = args.out or os.path.dirname(os.path.abspath(args.ckpt)) + "_distilled"
    return args


class OneStep(nn.Module):
    """The student and its loss terms; one module for DDP."""

    def __init__(self, student, lpips, repa):
        super().__init__()
        self.decoder, self.repa, self.lpips = student.decoder, repa, [lpips]
        cfg = student.config
        self.eqm = EqM(cfg["c"], cfg["a"], cfg["b"], cfg["lam"]) if cfg["loss"] == "eqm" else None

    def forward(self, z, e, target):
        """z latents, e noise (B, 3, H, W), target x_T (B, 3, H, W) -> {name: scalar}."""
        if self.eqm is None:
            t = torch.ones(len(e), device=e.device)
            v, tokens = self.decoder.forward_with_tokens(e, z, t)
            terms, estimate = {"fm": fm_loss(v, target, e)}, fm_predict_x(e, v.float(), t)
        else:
            g = torch.zeros(len(e), device=e.device)
            f, tokens = self.decoder.forward_with_tokens(e, z)
            terms, estimate = {"eqm": eqm_loss(f, target, e, g, self.eqm)}, self.eqm.predict_x(e, f.float(), g)
        if self.lpips[0] is not None:
            terms["lpips"] = self.lpips[0](target, estimate).mean()
        if self.repa is not None:
            terms["repa"] = self.repa(tokens, target)
        return terms


@torch.no_grad()
def closeness(teacher, student, loader, teacher_steps, options, device, dtype, seed):
    """Mean squared distance to the teacher's many-step output, from the same noise: (teacher's single step, student's
    single step)."""
    sums, count = torch.zeros(2, dtype=torch.float64), 0
    for x, index in loader:
        if len(x) == 0:
            continue
        noise = image_noise(seed, index, x.shape[1:]).to(device)
        with autocast(device, dtype):
            z = teacher.encode(x.to(device)).mode()
            target = teacher.decode(z, teacher_steps, noise, **options)
            for i, m in enumerate((teacher, student)):
                sums[i] += (m.decode(z, 1, noise) - target).float().square().mean(dim=(1, 2, 3)).sum().item()
        count += len(x)
    return (sums / count).tolist()


def main():
    args = get_args()
    rank, world, device = setup(args.device)
    dtype = pick_dtype(args.dtype, device)
    torch.manual_seed(args.seed)
    teacher = DCSSDAE.load(args.ckpt).requires_grad_(False)
    notes = teacher.config["notes"]
    args.size = args.size or notes.get("size") or 128
    if args.w_lpips is None:  # a teacher that was trained without LPIPS has a student without
        args.w_lpips = 0.5 if notes.get("w_lpips", 0.5) else 0.0
    check_size(args.size, teacher)
    check_shared(args, world)
    options = {k: getattr(args, k) for k in ("t_shift", "eta", "mu") if getattr(args, k) is not None}
    checkpoint, log_path, _ = open_run(args, rank, world)
    dataset = make_dataset(args.data, args.size, train=True, aug_scale=args.aug_scale, seed=args.seed, limit=args.limit)
    val = make_dataset(args.data, args.size, train=False, seed=args.seed, limit=args.eval_images)
    if rank == 0:
        print(parts_taken(dataset, val), flush=True)
    lpips, repa, left_out = perceptual_losses(args, teacher.decoder.mid_in.out_features, rank)

    teacher.to(device, memory_format=torch.channels_last)
    student = copy.deepcopy(teacher)
    student.config["notes"] = dict(notes, distilled_from_steps=args.teacher_steps, left_out=left_out)
    student.decoder.requires_grad_(True)
    ema = copy.deepcopy(student).requires_grad_(False).eval()
    objective = OneStep(student, lpips and lpips.to(device), repa).to(device)
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay, betas=(0.9, 0.99),
                                  fused=device.type != "mps")
    parts = {"model": student, "ema": ema, "repa": repa and repa.mlp, "optimizer": optimizer}
    for name, part in parts.items() if checkpoint else ():
        if part:
            part.load_state_dict(checkpoint[name])
    start, skipped = (checkpoint["step"], checkpoint.get("skipped", 0)) if checkpoint else (0, 0)
    parallel = nn.parallel.DistributedDataParallel(objective, broadcast_buffers=False) if world > 1 else objective
    weights = {"fm": 1.0, "eqm": 1.0, "lpips": args.w_lpips, "repa": args.w_repa}

    local = args.batch_size // world
    z_shape = (teacher.encoder.z_dim, args.size // teacher.downscale, args.size // teacher.downscale)
    batches = training_batches(args, dataset, rank, world, start)
    board = open_board(args, start) if rank == 0 else None
    stop, bad, clock, clock_step = StopSignal(), 0, time.time(), start
    bar = tqdm(total=args.steps, initial=start, disable=rank != 0, unit="step", dynamic_ncols=True)
    for step in range(start, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * lr_factor(step, args)
        x, index = next(batches)
        x = x.to(device, memory_format=torch.channels_last, non_blocking=True)
        e, eps, _ = draw(args.seed, step, range(rank * local, (rank + 1) * local), x.shape[1:], z_shape, device)
        e = e.contiguous(memory_format=torch.channels_last)
        with autocast(device, dtype):
            with torch.no_grad():
                z = teacher.encode(x).sample(eps)
                target = teacher.decode(z, args.teacher_steps, e, **options).float()
            terms = parallel(z, e, target)
        loss = sum(weights[name] * term for name, term in terms.items())
        loss.backward()
        norm = clip_grad_norm_(trained, args.grad_clip).item()

        shared = torch.stack([t.detach().float() for t in (*terms.values(), loss)]
                             + [torch.tensor(float(stop.received > 0), device=device)])
        if world > 1:
            dist.all_reduce(shared)
        totals = dict(zip([*terms, "loss"], (shared[:-1] / world).tolist()))
        if math.isfinite(norm) and shared.isfinite().all():
            optimizer.step()
            update_ema(ema, student, args.ema, step - args.ema_start)
            bad = 0
        else:
            bad, skipped = bad + 1, skipped + 1
            bad_step(step, bad, norm, totals, index, rank, world)
        optimizer.zero_grad(set_to_none=True)

        done = step + 1
        bar.update()
        if rank == 0 and (done % args.log_every == 0 or done == args.steps):
            rate = (done - clock_step) * args.batch_size / (time.time() - clock)
            clock, clock_step = time.time(), done
            bar.set_postfix_str(f"loss {totals['loss']:.4f}, {rate:.0f} images/s")
            append_log(log_path, board, done, images=done * args.batch_size, **totals,
                       lr=optimizer.param_groups[0]["lr"], grad_norm=norm,
                       skipped=skipped, images_per_s=rate, peak_mib=peak_memory(device))
        stopped = shared[-1] > 0
        if rank == 0 and (stopped or done % args.save_every == 0 or done == args.steps):
            state = {name: part and part.state_dict() for name, part in parts.items()}
            save_checkpoint(args.out, {"step": done, "skipped": skipped, "args": vars(args), **state}, args.keep, ema)
        if stopped:
            leave(bar, done, stop, rank, world)
    bar.close()
    result = evaluate(ema, make_loader(val, 64 * world, train=False, rank=rank, world=world), device, steps=[1],
                      seed=args.seed, dtype=dtype, rank=rank, world=world)
    if rank == 0:
        before, after = closeness(teacher, ema, make_loader(val, 64, train=False), args.teacher_steps,
                                  options, device, dtype, args.seed)
        result["mse_to_teacher"] = {"teacher_steps": args.teacher_steps, "undistilled": before, "distilled": after}
        write_results(result, args.out)
        append_log(log_path, board, args.steps, result["pictures"], eval=result["rows"],
                   mse_to_teacher=result["mse_to_teacher"])
        print_table(result)
        print(f"mean squared distance of one step to the teacher's {args.teacher_steps} steps, same noise: "
              f"{before:.6f} undistilled, {after:.6f} distilled")
        print(f"saved {args.out}/model.safetensors, reconstructions.png, metrics.json and log.jsonl")


if __name__ == "__main__":
    guarded(main)
