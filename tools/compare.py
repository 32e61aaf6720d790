"""Means over seeds: a table of finished runs, grouped by the names of their folders, and their curves. Needs no models.

    python -m tools.compare runs/eqm_s0 runs/eqm_s1 runs/fm_s0
    python -m tools.compare runs/eqm_s? runs/fm_s? --plot --out pictures

Runs whose folders differ only in _s<seed> are one group. Reads metrics.json (train.py, distill.py, evaluate.py write
it) and, for curves and minutes, log.jsonl where there is one. --plot writes curves.png.
"""
import argparse
import importlib.util
import itertools
import json
import re
from pathlib import Path

import numpy as np
import torch

from evaluate import mean_and_error, print_table
from plumbing.files import whole
from plumbing.log import read_lines
from plumbing.process import guarded

AVERAGED = "gain|psnr|ssim|hf|lpips_.{3,4}|dreamsim|rfid|fd_.*|minutes"     # columns of the table; not their errors
LOSS_WINDOW = 10                                                            # lines of the log in a running mean


# ---------------------------------------------------------------------------------------------------------------------
# Reading

def read_run(folder):
    """A run: a dict of images and rows as in its metrics.json, with "gain" (dB over the linear code) and "minutes";
    "curves" of log.jsonl: loss and one-step gain, [(images seen, value)]. ValueError: no finished run."""
    try:
        run = json.loads(Path(folder, "metrics.json").read_text())
        rows = run["rows"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{folder} holds no metrics.json of a finished run ({error})") from None
    log = [json.loads(line) for line in read_lines(Path(folder, "log.jsonl"))]
    training = [line for line in log if "images_per_s" in line]
    minutes = seconds_of(training) / 60
    linear = linear_code_of(rows)
    for row in rows:
        if row["steps"] > 0:
            row |= {"gain": difference(row["psnr"], linear["psnr"]), "minutes": minutes or None}
    return {"images": run["images"], "rows": rows, "curves": (loss_curve(training), gain_curve(log, training))}


def seconds_of(training):
    """Seconds of training: the images between two lines of the log, over the rate that the later one reports."""
    seconds, seen = 0, 0
    for line in training:
        seconds += (line["images"] - seen) / line["images_per_s"]
        seen = line["images"]
    return seconds


def loss_curve(training):
    """[(images seen, matching loss)], without steps that were not finite, which are null."""
    curve = [(line["images"], line["eqm"] if "eqm" in line else line["fm"]) for line in training]
    return [point for point in curve if point[1] is not None]


def gain_curve(log, training):
    """[(images seen, PSNR of one step over the linear code's)] at the evaluations, whose lines hold steps."""
    batch = training[-1]["images"] // training[-1]["step"] if training else 0
    curve = []
    for line in log:
        for row in line.get("eval", ()):
            if row["steps"] == 1:
                gain = difference(row["psnr"], linear_code_of(line["eval"])["psnr"])
                if gain is not None:
                    curve.append((line["step"] * batch, gain))
    return curve


def difference(a, b):
    """a - b; None where one of them is, being not finite."""
    return None if a is None or b is None else a - b


def linear_code_of(rows):
    """Of the rows without a network, which come first, the last: the linear code."""
    return [row for row in rows if row["steps"] == 0][-1]


# ---------------------------------------------------------------------------------------------------------------------
# Table

def grouped(folders):
    """{name without _s<seed>: [run, ...]}"""
    groups = {}
    for folder in dict.fromkeys(map(Path, folders)):  # each folder once
        name = re.sub(r"_s\d+$", "", str(folder))
        groups.setdefault(name, []).append(read_run(folder))
    return groups


def rows_by_name(groups):
    """{row of the table: rows of the runs that it averages}: references once for all, where all have the same."""
    baselines = set()
    for run in itertools.chain(*groups.values()):
        first = run["rows"][0]
        baselines.add((first["name"], first["psnr"] and round(first["psnr"], 2)))  # None: not finite
    table = {}
    for group, members in groups.items():
        for row in itertools.chain(*(run["rows"] for run in members)):
            is_reference = row["steps"] == 0
            name = row["name"] if is_reference and len(baselines) == 1 else f"{group}, {row['name']}"
            table.setdefault(name, []).append(row)
    return table


def averaged(name, members):
    """One row of the table: means with standard errors over the runs, of what all of them have."""
    row = {"name": name, "runs": len(members)}
    for key in members[0]:
        values = [member.get(key) for member in members]
        if re.fullmatch(AVERAGED, key) and None not in values:
            row[key], row[f"{key}_se"] = mean_and_error(torch.tensor(values, dtype=torch.float64))
    return row


def print_comparison(groups):
    rows = [averaged(name, members) for name, members in rows_by_name(groups).items()]
    images = sorted({run["images"] for run in itertools.chain(*groups.values())})
    protocol = (f"{' or '.join(map(str, images))} images; +- standard error over runs with different seeds; "
                "minutes of training without its evaluations")
    print_table({"rows": rows, "images": images[0], "protocol": protocol})


# ---------------------------------------------------------------------------------------------------------------------
# Curves

def running_mean(values, width):
    """Mean of each value and the width - 1 before it, fewer at the beginning."""
    return [values[max(0, end - width):end].mean() for end in range(1, len(values) + 1)]


def draw(axis, groups, panel, width, marker):
    """Curve number `panel` of every run, one colour a group."""
    for k, (group, members) in enumerate(groups.items()):
        axis.plot([], [], f"C{k}", label=group)
        for run in members:
            x, y = np.array(run["curves"][panel], dtype=float).reshape(-1, 2).T
            axis.plot(x, running_mean(y, width), f"C{k}", linewidth=0.8, marker=marker)


def check_plot(args):
    """Before the work. ValueError."""
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs the matplotlib package: pip install matplotlib")


def save_figure(path, figure):
    """Write a matplotlib figure as PNG."""
    with whole(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def plot_curves(groups, out):
    """curves.png: loss and one-step gain in training."""
    if not any(any(run["curves"]) for run in itertools.chain(*groups.values())):
        raise ValueError("--plot needs a log.jsonl in one of the folders")
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw(left, groups, 0, width=LOSS_WINDOW, marker="")
    draw(right, groups, 1, width=1, marker=".")
    left.set(xlabel="images seen", ylabel="loss (fm, eqm)", yscale="log")
    right.set(xlabel="images seen", ylabel="one step: PSNR gain over the linear code, dB")
    right.legend()
    save_figure(Path(out, "curves.png"), figure)
    print(f"wrote curves.png to {out}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders with metrics.json")
    parser.add_argument("--plot", action="store_true", help="also curves.png (needs matplotlib)")
    parser.add_argument("--out", default=".", metavar="DIR", help="folder of curves.png [this one]")
    args = parser.parse_args()
    check_plot(args)
    groups = grouped(args.runs)
    print_comparison(groups)
    if args.plot:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        plot_curves(groups, args.out)


if __name__ == "__main__":
    guarded(main)
