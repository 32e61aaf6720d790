"""The first two minutes on a new machine: does everything compute the right thing there, and how fast?

    python -m tools.check                       # on the best device there is
    python -m tools.check values speed --device cpu

  values   a decode and its gradients, in float32 and bf16, against float64 on the CPU
  ranks    the first steps of a run on two GPUs against one; left out where there are fewer
  speed    images/s of a training step, eager and compiled
The last line says "healthy", or what is not; then the exit status is 1.
"""
import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from model import compile_blocks
from plumbing.process import autocast, first_line, guarded, now, setup
from tools.bench import our_model, training_step

TASKS = ("values", "ranks", "speed")
# Largest errors relative to float64 of outputs and of gradients: some times what rounding alone was seen to cost.
LIMITS = {"float32": (1e-4, 1e-3), "bf16": (0.05, 0.15)}
SIZE = 32                                                    # pixels a side of the checks of values
STEPS = 3                                                    # of the runs on one and two GPUs
RANKS_LIMIT = 1e-3                                           # between their losses, relative: sums in another order


# ---------------------------------------------------------------------------------------------------------------------
# Values

def small_model(enc, loss):
    """An autoencoder with random values everywhere, zeros of the start too, so that every layer counts."""
    torch.manual_seed(0)
    network = our_model(enc, "XS", loss, 0.125)
    for name, p in network.named_parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
        elif name.endswith("weight"):  # of a norm, some of which start at zero
            nn.init.normal_(p, 0.3, 0.1)
    return network


def outputs_and_gradients(network, x, noise, dtype):
    """Latent and decoded image of x, and the gradient of the image's mean square by all weights, in float64 on the
    CPU. dtype: of autocast, or None."""
    network.zero_grad()
    with autocast(x.device, dtype):
        z = network.encode(x).mode()
        y = network.decode(z, 2, noise)
    y.square().mean().backward()
    gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
    return [t.detach().cpu().double() for t in (z, y, torch.cat(gradients))]


def relative_error(a, b):
    return float((a - b).norm() / b.norm())


def check_values(device):
    problems = []
    for enc, loss in (("dc_f8c4", "fm"), ("vq_f8c4", "eqm")):
        network = small_model(enc, loss)
        x, noise = torch.randn(1, 3, SIZE, SIZE).clamp(-1, 1), torch.randn(1, 3, SIZE, SIZE)
        exact = outputs_and_gradients(copy.deepcopy(network).double(), x.double(), noise.double(), None)
        network.to(device, memory_format=torch.channels_last)
        for name, dtype in (("float32", None), ("bf16", torch.bfloat16)):
            found = outputs_and_gradients(network, x.to(device), noise.to(device), dtype)
            latent, image, gradient = (relative_error(a, b) for a, b in zip(found, exact))
            print(f"values   {enc} {loss} {name}: latent {latent:.1e}, image {image:.1e}, gradient {gradient:.1e}",
                  flush=True)
            values_limit, gradient_limit = LIMITS[name]
            if not (max(latent, image) < values_limit and gradient < gradient_limit):
                problems.append(f"{enc} {loss} in {name} is {max(latent, image, gradient):.1e} off")
    return problems


# ---------------------------------------------------------------------------------------------------------------------
# Several devices

def first_losses(processes, folder):
    """Losses of a run's first steps on so many GPUs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
               Path(__file__).parent.parent / "train.py", "--preset", "tiny", "--steps", STEPS, "--log_every", 1,
               "--eval_images", 4, "--eval_every", 0, "--dtype", "float32", "--no-compile", "--out", folder]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"training on {processes} GPU(s) failed: {done.stderr.strip().splitlines()[-1]}")
    lines = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def check_ranks(device):
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        print("ranks    left out: fewer than two GPUs")
        return []
    with tempfile.TemporaryDirectory() as folder:
        one, two = (first_losses(n, os.path.join(folder, str(n))) for n in (1, 2))
    worst = max(abs(a - b) / abs(a) for a, b in zip(one, two, strict=True))
    print(f"ranks    two GPUs against one: losses of {STEPS} steps differ by {worst:.1e}")
    return [] if worst < RANKS_LIMIT else [f"two GPUs give losses {worst:.1e} off one's"]


# ---------------------------------------------------------------------------------------------------------------------
# Speed

def check_speed(device):
    batch, size = (32, 128) if device.type == "cuda" else (2, 32)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    problems = []
    for name in ("eager", "compiled"):
        network = our_model("dc_f8c4", "S" if device.type == "cuda" else "XS", "eqm", 0.125)
        network.to(device, memory_format=torch.channels_last)
        if name == "compiled":
            compile_blocks(network)
        try:
            start = now(device)
            step = training_step(network, None, batch, size, dtype, device)
            step()
            first = now(device) - start
            seconds = []
            for _ in range(5):
                start = now(device)
                step()
                seconds.append(now(device) - start)
        except Exception as error:  # noqa: BLE001 compilers raise many classes, for want of Triton or a C compiler
            problems.append(f"the {name} step fails ({first_line(error)})")
            continue
        rate = batch / statistics.median(seconds)
        print(f"speed    {name}: {rate:.1f} images/s at {size} px, first step {first:.1f} s")
    return problems


# ---------------------------------------------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {' '.join(TASKS)}; default: all")
    parser.add_argument("--device", metavar="NAME", help="default: cuda, mps or cpu, the first that is there")
    args = parser.parse_args()
    if not set(args.tasks) <= set(TASKS):
        parser.error(f"tasks are {' '.join(TASKS)}")
    _, _, device = setup(args.device)
    torch.backends.cudnn.allow_tf32 = False                  # float32 means float32
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    print(f"torch {torch.__version__} on {name}")
    checks = {"values": check_values, "ranks": check_ranks, "speed": check_speed}
    problems = []
    for task in args.tasks or TASKS:
        problems += checks[task](device)
    print("healthy" if not problems else f"NOT healthy: {'; '.join(problems)}")
    sys.exit(bool(problems))


if __name__ == "__main__":
    guarded(main)
