"""Quality against compute: every sampler over several numbers of steps, each with the steps that suit it best.

    python -m tools.sweep --ckpt runs/eqm_s0/model.safetensors --by rfid --plot
    torchrun --nproc_per_node=8 -m tools.sweep --ckpt F --data imagenet/ --size 256 --steps 1 2 4 8

Some images choose the times of the steps (c = trunc and piecewise: their size) and Nesterov's momentum; the others are
evaluated as by evaluate.py, with --limit as their number. For EqM also the adaptive stop: the best sampler at the
largest number of steps, with several tolerances. Writes sweep.csv, with --plot sweep.png, and evaluate.py's files.
What is best, --by says: least squared error always finds the blur, the Frechet distance what looks like the originals.
"""
import argparse
import math

import numpy as np

from data import make_dataset, make_loader
from evaluate import (
    evaluate,
    load_model,
    load_networks,
    loader_arguments,
    metric_arguments,
    out_folder,
    ready_folder,
    report,
    shared_arguments,
)
from plumbing import flags
from plumbing.files import strict, write_text
from plumbing.process import guarded, setup
from sampler import default_eta
from tools.compare import check_plot, save_figure

COUNTS = [1, 2, 3, 4, 8, 16, 25]                             # numbers of steps
MOMENTA = (0.3, 0.6, 0.9)                                    # Nesterov's mu
FIRST_POWERS = (0, 1, -1, -2, -4)                            # of 2, times the default step size: where to look at all
REFINEMENTS = (1, 1 / 2, 1 / 4, 1 / 8)                       # then by these powers of 2 up and down
TOLERANCES = (0.2, 0.1, 0.05, 0.02)                          # of the adaptive stop
PLOTTED = {"psnr": "PSNR, dB", "hf": "HF ratio", "lpips_vgg": "LPIPS vgg", "rfid": "rFID"}


# ---------------------------------------------------------------------------------------------------------------------
# The best options of each sampler

def starting_options(sampler, steps, model):
    """Options to start the search from, one set for each momentum."""
    if model.config["loss"] == "fm" or model.eqm.kind == "linear":
        start = {"t_shift": model.t_shift}
    else:
        start = {"eta": default_eta(model.eqm, steps)}
    if sampler == "euler":
        return [start]
    if sampler == "gd":
        return [{"method": "gd"} | start]
    return [{"method": "nesterov", "mu": mu} | start for mu in MOMENTA]


def scaled(options, power):
    """The same options with 2^power times the exponent of the times, or the step size."""
    name = "t_shift" if "t_shift" in options else "eta"
    return options | {name: options[name] * 2.0**power}


def score(row, by):
    """How good a row of `evaluate` is, the more the better: -inf where a run diverged."""
    value = row["psnr_pooled" if by == "psnr" else by]
    if value is None:                                        # a Frechet distance of what is not finite
        return -math.inf
    if by == "hf":
        value = -abs(math.log(value))                        # 1: as much fine detail as the originals
    elif by != "psnr":
        value = -value
    return max(-math.inf, value)                             # NaN, too


def keep_better(best, candidates, measure, by):
    """Measure {(sampler, steps): [options, ...]} in one pass, and put into `best` what has a better score."""
    runs = {}
    for (sampler, steps), several in candidates.items():
        for i, options in enumerate(several):
            runs[sampler, steps, i] = steps, options
    rows = measure(runs)
    for ((sampler, steps, _), (_, options)), row in zip(runs.items(), rows, strict=True):
        value = score(row, by)
        if (sampler, steps) not in best or value > best[sampler, steps][0]:
            best[sampler, steps] = value, options


def calibrate(model, counts, measure, by="psnr"):
    """The best options of every sampler and number of steps: {(sampler, steps): (score, options)}.

    measure  {name: (steps, options)} -> rows of `evaluate` on calibration images
    by       what is best: "psnr", "hf", or the key of a distance in these rows
    """
    samplers = ["euler"] if model.config["loss"] == "fm" else ["gd", "nesterov"]
    candidates = {}
    for sampler in samplers:
        for steps in counts:
            candidates[sampler, steps] = []
            for options in starting_options(sampler, steps, model):
                candidates[sampler, steps] += [scaled(options, power) for power in FIRST_POWERS]
    best = {}
    keep_better(best, candidates, measure, by)
    for power in REFINEMENTS:
        around = {key: [scaled(options, -power), scaled(options, power)] for key, (_, options) in best.items()}
        keep_better(best, around, measure, by)
    return best


def sweep_runs(best):
    """`evaluate`'s steps from what calibrate found, {name of the row: (steps, options)}, and the adaptive stop."""
    runs = {}
    for (sampler, steps), (_, options) in best.items():
        runs[run_name(sampler, steps, options)] = steps, options
    most = max(steps for _, steps in best)
    scores = {sampler: score for (sampler, steps), (score, _) in best.items() if steps == most}
    winner = max(scores, key=scores.get)
    if winner != "euler":  # which has no stop
        _, options = best[winner, most]
        for tol in TOLERANCES:
            stopping = options | {"tol": tol}
            runs[run_name(f"adaptive {winner}", most, stopping)] = most, stopping
    return runs


def run_name(sampler, steps, options):
    """As in "nesterov 8 mu 0.3 eta 0.212"."""
    words = [f"{sampler} {steps}"]
    for key, value in options.items():
        if key != "method":
            words.append(f"{key} {value:.3g}")
    return " ".join(words)


# ---------------------------------------------------------------------------------------------------------------------
# Files

def csv_text(rows):
    """One line a row, one column for each key of any row, empty where a row has no value or none that is finite."""
    rows, keys = strict(rows), []
    for row in rows:
        keys += [key for key in row if key not in keys]
    lines = [",".join(keys)]
    for row in rows:
        values = [row.get(key) for key in keys]
        lines.append(",".join("" if value is None else str(value) for value in values))
    return "\n".join(lines) + "\n"


def plot_sweep(rows, path):
    """PNG: quality against network evaluations, one curve a sampler, the references grey."""
    from matplotlib.figure import Figure
    rows = strict(rows)  # without numbers that are not finite
    references = [row for row in rows if row["steps"] == 0]
    others = [row for row in rows if row["steps"] > 0]
    curves = {}
    for row in others:
        sampler = row.get("method", "euler")
        name = f"adaptive {sampler}" if "tol" in row else sampler
        curves.setdefault(name, []).append(row)
    labels = {key: label for key, label in PLOTTED.items() if references[0].get(key) is not None}
    figure = Figure(figsize=(4.5 * len(labels), 4), layout="constrained")
    axes = figure.subplots(1, len(labels), squeeze=False)[0]
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        for name, curve in curves.items():
            shown = [row for row in curve if row.get(key) is not None]
            axis.plot([row["nfe"] for row in shown], [row[key] for row in shown], marker="o", label=name)
        for row, style in zip(references, ("--", ":")):
            if row.get(key) is not None:
                axis.axhline(row[key], color="grey", linestyle=style, label=row["name"])
        axis.set(xlabel="network evaluations an image", ylabel=label, xscale="log")
    axes[-1].legend()
    save_figure(path, figure)


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def split_images(dataset, calibrate, limit):
    """(the images that calibrate, at most half of all; of the others the `limit` that are evaluated, or all): two data
    sets, each evenly spread over the whole."""
    n = len(dataset)
    k = min(calibrate, n // 2)
    if k == 0:
        raise ValueError(f"a sweep needs at least 2 images, {dataset.name} has {n}")
    held = np.arange(k) * n // k
    rest = np.delete(np.arange(n), held)                     # (n - k,)
    m = min(limit or n, n - k)
    return dataset.subset(held), dataset.subset(rest[np.arange(m) * (n - k) // m])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared_arguments(parser)
    loader_arguments(parser)
    add = parser.add_argument
    add("--steps", type=flags.count, nargs="+", default=COUNTS, metavar="N", help="numbers of steps %(default)s")
    add("--calibrate", type=flags.count, default=64, metavar="N", help="choose the steps' times or sizes on N "
        "images, at most half of all [%(default)s]")
    add("--by", default="psnr", metavar="NAME", help="choose by psnr, hf (nearest to 1), or the least distance of "
        "--features and --lpips_net: rfid, fd_dinov2, fd_FILE, lpips_vgg, ... [%(default)s]")
    add("--plot", action="store_true", help="also sweep.png (needs matplotlib)")
    metric_arguments(parser)
    args = parser.parse_args()
    check_plot(args)
    rank, world, device = setup(args.device)
    model, size = load_model(args, device)
    out = out_folder(args)
    ready_folder(out)
    dataset = make_dataset(args.data, size, train=False, crop=args.crop, split=args.part)
    calibration, others = split_images(dataset, args.calibrate, args.limit)
    networks = load_networks(args, size, device, world)

    distances, features, _ = networks
    chooses = {"distances": {}, "features": {}}
    if args.by in distances:
        chooses["distances"] = {args.by: distances[args.by]}
    elif args.by in features:
        chooses["features"] = {args.by: features[args.by]}
    elif args.by not in ("psnr", "hf"):
        raise ValueError(f"--by {args.by}: expected psnr, hf or one of the distances that are measured: "
                         f"{', '.join([*distances, *features]) or 'none is'}")

    def measure(runs):
        loader = make_loader(calibration, args.batch_size * world, False, args.workers, rank=rank, world=world)
        seed = args.seed + 1  # another noise than the evaluation's
        result = evaluate(model, loader, device, runs, seed=seed, rank=rank, world=world, pictures=0,
                          **chooses)
        return [row for row in result["rows"] if row["steps"] > 0]  # without the references

    runs = sweep_runs(calibrate(model, sorted(set(args.steps)), measure, args.by))
    sampler = f"the best by {args.by} on {len(calibration)} other images"
    result = report(args, model, others, networks, runs, sampler, out, rank, world, device)
    if rank > 0:
        return
    write_text(out / "sweep.csv", csv_text(result["rows"]))
    if args.plot:
        plot_sweep(result["rows"], out / "sweep.png")
    print(f"wrote sweep.csv{' and sweep.png' if args.plot else ''} to {out}")


if __name__ == "__main__":
    guarded(main)
