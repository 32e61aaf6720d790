"""Distil a many-step decoder into a one-step decoder with the same encoder: latents stay valid.

    python distill.py --ckpt runs/tiny_eqm/model.safetensors --steps 400 --batch_size 16
    torchrun --nproc_per_node=8 distill.py --ckpt runs/dc_f32c32_eqm/model.safetensors --data DIR

The frozen teacher decodes z from noise e in N steps to x_T. The student starts from the same e and z and takes one step
from pure noise to x^ (SSDD, arXiv 2510.04961). Loss: its own matching loss with x_T in the place of the data, plus
LPIPS(x_T, x^) and, with --w_repa, REPA. Works for flow matching (t = 1) and equilibrium matching (g = 0).
Writes what train.py writes: model.safetensors, reconstructions.png, metrics.json, log.jsonl and checkpoints.
"""
import copy
import os
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from data import make_loader
from evaluate import print_table, write_results
from losses import draw, matching
from model import DCSSDAE, check_size, compile_blocks
from plumbing.checkpoint import Run, compare_flags, open_run
from plumbing.flags import below_one, count, make_parser, positive
from plumbing.optim import Average, make_optimizers, set_learning_rate, step_if
from plumbing.process import autocast, data_parallel, guarded, start, summed
from sampler import image_noise
from train import (
    VALIDATION_BATCH,
    evaluation_is_due,
    evaluation_networks,
    exact_type,
    freeze_base,
    image_arguments,
    learning_rate,
    open_data,
    perceptual_losses,
    run_arguments,
    validate,
    weighted_sum,
)


def get_args(argv=None):
    p = make_parser(__doc__, "--size and --w_lpips are the teacher's unless they are given.")
    add = p.add_argument_group("teacher").add_argument
    add("--ckpt", metavar="FILE", type=str, required=True, help="a model.safetensors of train.py")
    add("--teacher_steps", type=count, default=8, help="steps of the teacher's sampler [%(default)s]")
    add("--t_shift", type=positive, help="exponent of the teacher's times")
    add("--eta", type=positive, help="EqM: of the teacher's gradient descent; with c = linear its last step lands on "
        "the estimate")
    add("--mu", type=below_one, help="EqM: Nesterov momentum of the teacher")

    image_arguments(p)
    run_arguments(p)
    p.set_defaults(size=None, w_lpips=None, w_repa=0.0, steps=10_000, lr=1e-4, warmup=50, decay=0.5, save_every=2000,
                   eval_every=0)
    args = p.parse_args(argv)
    if not args.out:
        folder = os.path.dirname(os.path.abspath(args.ckpt))
        if args.ckpt.startswith("hf://"):
            folder = os.path.join("runs", os.path.basename(folder))
        args.out = f"{folder}_distilled"
    return args


class OneStep(nn.Module):
    """What trains of the student, and the loss terms of its outputs; one module for DDP."""

    def __init__(self, student, repa):
        super().__init__()
        self.decoder, self.eqm, self.repa, self.loss = student.decoder, student.eqm, repa, student.config["loss"]

    def forward(self, z, e, target):
        """z latents, e noise (B, 3, H, W), target x_T (B, 3, H, W) -> ({name: scalar}, one-step estimate)."""
        # Pure noise is level t = 1 of FM, g = 0 of EqM.
        level = torch.full((len(e),), 1.0 if self.eqm is None else 0.0, device=e.device)
        losses, estimate, tokens = matching(self.decoder, self.eqm, target, e, z, level)
        terms = {self.loss: losses.mean()}
        if self.repa is not None:
            terms["repa"] = self.repa(tokens, target)
        return terms, estimate


@torch.no_grad()
def closeness(teacher, student, val, args, options, device, dtype):
    """Mean squared distance to the teacher's many-step output, from the same noise: (teacher's single step, student's
    single step)."""
    sums, images = torch.zeros(2, dtype=torch.float64), 0
    for x, index in make_loader(val, VALIDATION_BATCH, train=False, device=device):
        noise = image_noise(args.seed, index, x.shape[1:]).to(device)
        with autocast(device, dtype):
            z = teacher.encode(x).mode()
            target = teacher.decode(z, args.teacher_steps, noise, **options)
            for i, model in enumerate((teacher, student)):
                distance = (model.decode(z, 1, noise) - target).float().square().mean(dim=(1, 2, 3))      # (b,)
                sums[i] += distance.sum().item()
        images += len(x)
    return (sums / images).tolist()


def main():
    args = get_args()

    # Teacher, and what it decides
    teacher = DCSSDAE.load(args.ckpt).requires_grad_(False)
    notes = teacher.config["notes"]
    if args.size is None:
        args.size = notes.get("size") or 128
    if args.w_lpips is None:
        args.w_lpips = notes.get("w_lpips", 0.5)  # published files do not say
    check_size(args.size, teacher)
    options = {}  # of the teacher's sampler
    for name in ("t_shift", "eta", "mu"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    rank, world, device, dtype = start(args)

    # Data, student, objective, optimiser
    checkpoint, evaluated = open_run(args, rank, world)
    dataset, val = open_data(args, world)
    if checkpoint:
        compare_flags(checkpoint, args, (), len(dataset))
    lpips, repa = perceptual_losses(args, teacher.decoder.mid_in.out_features, device, world)
    networks = evaluation_networks(args, device, world)
    teacher.to(device, memory_format=torch.channels_last)
    student = copy.deepcopy(teacher)
    student.config["notes"] = {"size": args.size, "data": args.data, "w_lpips": 0.0 if lpips is None else args.w_lpips,
                               "w_repa": 0.0 if repa is None else args.w_repa,
                               "distilled_from_steps": args.teacher_steps}
    student.decoder.requires_grad_(True)
    freeze_base(student.decoder)
    student.decoder.train()
    student.decoder.checkpointing = args.checkpointing
    ema = copy.deepcopy(student).requires_grad_(False).eval()
    if args.compile:
        compile_blocks(teacher)
        compile_blocks(student.decoder)
    weights = {teacher.config["loss"]: 1.0, "lpips": args.w_lpips, "repa": args.w_repa}
    objective = OneStep(student, repa).to(device)
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizers = make_optimizers(trained, args.optimizer, args.lr, args.weight_decay, device)

    # The run
    parts = {"model": student, "ema": ema, "repa": repa and repa.mlp, "optimizer": None, "muon": None, **optimizers}
    run = Run(args, rank, world, device, parts, dataset, checkpoint)
    del checkpoint
    average = Average(ema, student)
    parallel = data_parallel(objective, world)
    batches = iter(make_loader(dataset, args.batch_size, train=True, workers=args.workers, seed=args.seed, rank=rank,
                               world=world, start=run.done, device=device))
    local = args.batch_size // world                                            # images of this process
    micro = min(args.micro_batch or local, local)                               # images of a forward pass
    z_shape = teacher.latent_shape(args.size, args.size)

    for step in range(run.done, args.steps + 1):
        if evaluation_is_due(step, args) and step != evaluated:
            result = validate(run, ema, val, networks, dtype, [1])
        if step == args.steps:
            break

        # Draw
        set_learning_rate(optimizers.values(), learning_rate(step, args))
        x, index = run.next_batch(batches)
        x = x.contiguous(memory_format=torch.channels_last)                     # (local, 3, size, size)
        rows = range(rank * local, (rank + 1) * local)                          # of the whole batch

        # Teacher, student, backward: one micro-batch after the other
        totals = {}
        for i in range(0, local, micro):
            xb = x[i:i + micro]
            e, eps, _ = draw(args.seed, step, rows[i:i + micro], xb.shape[1:], z_shape, device, teacher.config["loss"])
            e = e.contiguous(memory_format=torch.channels_last)
            share = len(xb) / local
            is_last = i + micro >= local
            with nullcontext() if is_last or world == 1 else parallel.no_sync():
                with autocast(device, dtype):
                    with torch.no_grad():
                        z = teacher.encode(xb).sample(eps)
                        target = teacher.decode(z, args.teacher_steps, e, **options).float()
                    terms, estimate = parallel(z, e, target)
                    if lpips is not None:
                        terms["lpips"] = lpips(target, estimate).mean()
                terms["loss"] = weighted_sum(terms, weights)
                (terms["loss"] * share).backward()
            for name, term in terms.items():
                totals[name] = totals.get(name, 0) + term.detach() * share / world
        norm = clip_grad_norm_(trained, args.grad_clip or float("inf"))

        # One small sum of the loss terms over the processes
        shared = summed(torch.stack([*totals.values()]).to(exact_type(device)), world)
        totals = dict(zip(totals, shared))

        # Step and average, unless something is not finite: on all ranks or none, as they hold the same gradients
        good = norm.isfinite() & shared.isfinite().all()
        step_if(good, optimizers.values())
        average.update(args.ema, step - args.ema_start, good)
        for p in trained:
            p.grad = None

        # Log and save
        run.finish_step(totals, norm, good, index)

    # How close it has come to its teacher
    run.bar.close()
    if rank == 0:
        before, after = closeness(teacher, ema, val, args, options, device, dtype)
        result["mse_to_teacher"] = {"teacher_steps": args.teacher_steps, "undistilled": before, "distilled": after}
        write_results(result, args.out)
        run.log.write(run.done, mse_to_teacher=result["mse_to_teacher"])
        print_table(result)
        print(f"mean squared distance of one step to the teacher's {args.teacher_steps} steps, same noise: "
              f"{before:.6f} undistilled, {after:.6f} distilled")
        print(f"saved {args.out}/model.safetensors, best.safetensors, reconstructions.png, metrics.json and log.jsonl")


if __name__ == "__main__":
    guarded(main)
