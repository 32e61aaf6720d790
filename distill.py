"""Distil a many-step decoder into a one-step decoder with the same encoder: latents stay valid.

    python distill.py --ckpt runs/tiny_eqm/model.safetensors --steps 400 --batch_size 16
    torchrun --nproc_per_node=8 distill.py --ckpt runs/dc_f32c32_eqm/model.safetensors --data DIR

The frozen teacher decodes z from noise e in N steps to x_T. The student starts from the same e and z and takes one step
from pure noise to x^ (SSDD, arXiv 2510.04961). Loss: its own matching loss with x_T in the place of the
data, plus LPIPS(x_T, x^) and, with --w_repa, REPA. Works for flow matching (t = 1) and equilibrium matching (g = 0).
Writes what train.py writes: model.safetensors, reconstructions.png, metrics.json, log.jsonl and checkpoints.
"""
import copy
import hashlib
import json
import os
from contextlib import nullcontext

import torch
from torch import nn

from data import check_compiler, check_numbers, guarded, setup, warn_of_idle_flags
from evaluate import print_table, write_results
from model import DCSSDAE, check_size, compile_blocks
from sampler import image_noise

from train import (Run, append_log, autocast, check_shared, clip_gradients, compiles, data_parallel,  # isort: skip
                   draw, evaluation_is_due, evaluation_networks, finish_step, freeze_base, idle_of_images,
                   image_arguments, keep_best, make_optimizers, make_parser, matching, measure, next_batch,
                   open_boards, open_data, open_run, paired_tensors, perceptual_losses, pick_dtype, prefer_speed,
                   restore, run_arguments, set_learning_rate, step_if, stop_flag, summed, training_batches, update_ema,
                   validate, validation_batches)


def get_args(argv=None):
    p = make_parser(__doc__, "--size and --w_lpips are the teacher's unless they are given.")
    add = p.add_argument_group("teacher").add_argument
    add("--ckpt", metavar="FILE", type=str, required=True, help="a model.safetensors of train.py")
    add("--teacher_steps", type=int, default=8, help="steps of the teacher's sampler [%(default)s]")
    add("--t_shift", type=float, help="FM: of the teacher's Euler times")
    add("--eta", type=float, help="EqM: of the teacher's gradient descent")
    add("--mu", type=float, help="EqM: Nesterov momentum of the teacher")

    image_arguments(p)
    run_arguments(p)
    p.set_defaults(size=None, w_lpips=None, w_repa=0.0, steps=10_000, lr=1e-4, warmup=50, decay=0.5, save_every=2000,
                   eval_every=0)
    args = p.parse_args(argv)
    check_numbers(args)
    if not args.out:
        folder = os.path.dirname(os.path.abspath(args.ckpt))
        if args.ckpt.startswith("hf://"):
            folder = os.path.join("runs", os.path.basename(folder))
        args.out = f"{folder}_distilled"
    warn_of_idle_flags(p, args, idle_of_images(args), argv)
    return args


class OneStep(nn.Module):
    """The student and its loss terms; one module for DDP."""

    def __init__(self, student, lpips, repa):
        super().__init__()
        self.decoder, self.repa, self.lpips = student.decoder, repa, [lpips]
        self.eqm = student.eqm

    def forward(self, z, e, target):
        """z latents, e noise (B, 3, H, W), target x_T (B, 3, H, W) -> {name: scalar}."""
        # Pure noise is level t = 1 of FM, g = 0 of EqM.
        level = torch.full((len(e),), 1.0 if self.eqm is None else 0.0, device=e.device)
        terms, estimate, tokens = matching(self.decoder.forward_with_tokens, self.eqm, target, e, z, level)
        if self.lpips[0] is not None:
            terms["lpips"] = self.lpips[0](target, estimate).mean()
        if self.repa is not None:
            terms["repa"] = self.repa(tokens, target)
        return terms


def fingerprint(model):
    """SHA-256 of what a model computes: weights and configuration, without statistics of its latents and notes."""
    config = {name: value for name, value in model.config.items() if name not in ("latents", "notes")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


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
            for i, model in enumerate((teacher, student)):
                distance = (model.decode(z, 1, noise) - target).float().square().mean(dim=(1, 2, 3))      # (b,)
                sums[i] += distance.sum().item()
        count += len(x)
    return (sums / count).tolist()


def main():
    args = get_args()
    rank, world, device = setup(args.device)
    prefer_speed(device)
    dtype = pick_dtype(args.dtype, device)
    torch.manual_seed(args.seed)

    # Teacher, and what it decides
    teacher = DCSSDAE.load(args.ckpt).requires_grad_(False)
    notes = teacher.config["notes"]
    if args.size is None:
        args.size = notes.get("size") or 128
    if args.w_lpips is None:
        args.w_lpips = notes.get("w_lpips", 0.5)  # published files do not say
    check_size(args.size, teacher)
    check_shared(args, world)
    if args.compile:
        check_compiler(device)
    options = {}  # of the teacher's sampler
    for name in ("t_shift", "eta", "mu"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)

    args.teacher = fingerprint(teacher)  # what --resume compares

    # Data, student, objective, optimiser
    checkpoint, log_path, evaluated = open_run(args, rank, world)
    dataset, val = open_data(args, checkpoint, rank, world)
    lpips, repa, left_out = perceptual_losses(args, teacher.decoder.mid_in.out_features, rank, world)
    networks = evaluation_networks(args, val, lpips, device, world)
    teacher.to(device, memory_format=torch.channels_last)
    student = copy.deepcopy(teacher)
    kept = {name: value for name, value in notes.items() if name != "best"}  # a number of the teacher's training
    student.config["notes"] = kept | {
        "size": args.size, "data": args.data, "w_lpips": 0.0 if lpips is None else args.w_lpips,
        "w_repa": 0.0 if repa is None else args.w_repa, "left_out": left_out,
        "distilled_from_steps": args.teacher_steps}
    student.decoder.requires_grad_(True)
    freeze_base(student.decoder)
    student.decoder.train()
    student.decoder.checkpointing = args.checkpointing
    ema = copy.deepcopy(student).requires_grad_(False).eval()
    if compiles(args, device):
        compile_blocks(teacher)
        compile_blocks(student.decoder)
    if lpips is not None:
        lpips.to(device, memory_format=torch.channels_last)
    weights = {"fm": 1.0, "eqm": 1.0, "lpips": args.w_lpips, "repa": args.w_repa}
    objective = OneStep(student, lpips, repa).to(device)
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizers = make_optimizers(trained, args, device)

    # The run
    parts = {"model": student, "ema": ema, "repa": None if repa is None else repa.mlp, **optimizers}
    start, skipped = restore(parts, checkpoint)
    del checkpoint
    averaged = paired_tensors(ema, student)
    parallel = data_parallel(objective, world)
    batches = training_batches(args, dataset, rank, world, start, device)
    boards = open_boards(args, start) if rank == 0 else []
    run = Run(args, rank, world, device, log_path, boards, parts, start, skipped, dataset, networks)
    local = args.batch_size // world                                            # images of this process
    micro = min(args.micro_batch or local, local)                               # images of a forward pass
    z_shape = teacher.latent_shape(args.size, args.size)

    for step in range(start, args.steps):
        if evaluation_is_due(step, args) and step != evaluated:  # the last one comes after the loop
            validate(run, ema, val, dtype, [1])

        # Draw
        set_learning_rate(optimizers.values(), step, args)
        x, index = next_batch(run, batches)
        x = x.contiguous(memory_format=torch.channels_last)                     # (local, 3, size, size)
        rows = range(rank * local, (rank + 1) * local)                          # of the whole batch

        # Teacher, student, backward: one micro-batch after the other
        totals = {}
        for i in range(0, local, micro):
            xb = x[i:i + micro]
            e, eps, _ = draw(args.seed, step, rows[i:i + micro], xb.shape[1:], z_shape, device)
            e = e.contiguous(memory_format=torch.channels_last)
            share = len(xb) / local
            is_last = i + micro >= local
            with nullcontext() if is_last or world == 1 else parallel.no_sync():
                with autocast(device, dtype):
                    with torch.no_grad():
                        z = teacher.encode(xb).sample(eps)
                        target = teacher.decode(z, args.teacher_steps, e, **options).float()
                    terms = parallel(z, e, target)
                terms["loss"] = sum(weights[name] * term for name, term in terms.items())
                (terms["loss"] * share).backward()
            for name, term in terms.items():
                totals[name] = totals.get(name, 0) + term.detach() * share / world
        norm = clip_gradients(trained, args)

        # One small sum over the processes: loss terms, and whether anybody was asked to stop
        stop = stop_flag(run)
        shared = summed(torch.cat([torch.stack([*totals.values()]).to(stop.dtype), stop]), world)
        totals = dict(zip(totals, shared))

        # Step and average, unless something is not finite: on all ranks or none, as they hold the same gradients
        good = norm.isfinite() & shared.isfinite().all()
        step_if(good, optimizers.values())
        update_ema(averaged, args.ema, step - args.ema_start, good)
        for p in trained:
            p.grad = None

        # Log and save
        finish_step(run, totals, norm.to(stop.dtype), shared[-1], good, index)

    # Evaluate
    run.bar.close()
    result = measure(run, ema, val, dtype, [1])
    if rank == 0:
        write_results(result, args.out)  # before anything else can fail
        keep_best(run, ema, result)
        loader = validation_batches(val, args, 0, 1, device)
        before, after = closeness(teacher, ema, loader, args.teacher_steps, options, device, dtype, args.seed)
        result["mse_to_teacher"] = {"teacher_steps": args.teacher_steps, "undistilled": before, "distilled": after}
        write_results(result, args.out)
        append_log(log_path, boards, args.steps, result["pictures"], eval=result["rows"],
                   mse_to_teacher=result["mse_to_teacher"])
        print_table(result)
        print(f"mean squared distance of one step to the teacher's {args.teacher_steps} steps, same noise: "
              f"{before:.6f} undistilled, {after:.6f} distilled")
        print(f"saved {args.out}/model.safetensors, best.safetensors, reconstructions.png, metrics.json and log.jsonl")


if __name__ == "__main__":
    guarded(main)
