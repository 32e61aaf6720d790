"""Means over seeds: a table of finished runs, grouped by the names of their folders, and their curves. Needs no models.

    python -m tools.compare runs/eqm_s0 runs/eqm_s1 runs/fm_s0
    python -m tools.compare runs/eqm_s? runs/fm_s? --plot --out pictures

Runs whose folders differ only in _s<seed> are one group. Reads metrics.json (train.py, distill.py, evaluate.py write
it) and, for curves and minutes, log.jsonl where there is one.
"""
import argparse
import importlib.util
import itertools
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import torch

from data import guarded, ready_folder, save_figure
from evaluate import print_table
from losses import mean_and_error

AVERAGED = "gain|psnr|ssim|hf|lpips_.{3,4}|dreamsim|rfid|fd_.*|minutes"     # columns of the table; not their errors
# What a damaged file may lead to.
UNREADABLE = (OSError, ArithmeticError, RecursionError, ValueError, LookupError, TypeError, AttributeError)
LARGEST = 1e30                                                              # of numbers that are sums of others
LOSS_WINDOW = 10                                                            # lines of the log in a running mean


# ---------------------------------------------------------------------------------------------------------------------
# Reading

def read_run(folder):
    """A run: a dict of images and rows as in its metrics.json, with "gain" (dB over the linear code) and "minutes";
    "curves" of log.jsonl: loss and one-step gain, [(images seen, value)]. ValueError: no readable run, or other values
    than those programs write."""
    path = Path(folder, "log.jsonl")
    try:
        log = read_log(path) if path.exists() else []
        training = [line for line in log if "images_per_s" in line]
        minutes = seconds_of(training) / 60
        curves = loss_curve(training), gain_curve(log, training)
        path = Path(folder, "metrics.json")
        run = json.loads(path.read_text())
        rows = [checked_row(row) for row in run["rows"]]
        return {"images": whole(run["images"]), "rows": with_gain(rows, minutes or None), "curves": curves}
    except UNREADABLE as error:
        raise ValueError(f"cannot read {path} ({type(error).__name__}: {error})") from None


def read_log(path):
    """The lines of a log.jsonl, dicts; what follows the last line break was cut off."""
    *lines, _ = path.read_text().split("\n")
    return [dict(json.loads(line)) for line in lines]


def checked_row(row):
    """A row of metrics.json, if its values are what they are called; ValueError, TypeError, LookupError."""
    if not isinstance(row["name"], str):
        raise ValueError(f"a row's name is {row['name']!r}")
    whole(row["steps"])
    for key, value in row.items():
        if re.fullmatch(AVERAGED, key) and value is not None:
            number(value)
    return row


def whole(value):
    """value, if it is a whole number of something; ValueError."""
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no whole number")
    return value


def number(value):
    """value, if it is a finite number; ValueError."""
    if type(value) not in (int, float) or not abs(value) <= LARGEST:
        raise ValueError(f"{value!r} is no number")
    return value


def seconds_of(training):
    """Seconds of training: the images between two lines of the log, over the rate that the later one reports."""
    seconds, seen = 0, 0
    for line in training:
        seconds += (whole(line["images"]) - seen) / number(line["images_per_s"])
        seen = line["images"]
    return seconds


def loss_curve(training):
    """[(images seen, matching loss)], without steps that were not finite."""
    curve = []
    for line in training:
        loss = line["eqm"] if "eqm" in line else line["fm"]
        if loss is not None and math.isfinite(loss):  # not that of a step that was skipped; older logs hold NaN
            curve.append((line["images"], number(loss)))
    return curve


def gain_curve(log, training):
    """[(images seen, PSNR of one step over the linear code's)] at the evaluations, whose lines hold steps."""
    batch = whole(training[-1]["images"]) // whole(training[-1]["step"]) if training else 0
    curve = []
    for line in log:
        for row in line.get("eval", ()):
            if row["steps"] == 1:
                gain = difference(row["psnr"], strongest_reference(line["eval"])["psnr"])
                if gain is not None and math.isfinite(gain):  # not that of a model that had diverged
                    curve.append((whole(line["step"]) * batch, number(gain)))
    return curve


def with_gain(rows, minutes):
    """metrics.json's rows: the references as they are, the others with "gain" over the strongest and "minutes"."""
    reference = strongest_reference(rows)
    result = []
    for row in rows:
        if row["steps"] > 0:
            row = row | {"gain": difference(row["psnr"], reference["psnr"]), "minutes": minutes}
        result.append(row)
    return result


def difference(a, b):
    """a - b; None where one of them is, being not finite."""
    return None if a is None or b is None else a - b


def strongest_reference(rows):
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
    runs = list(itertools.chain(*groups.values()))
    baselines = set()
    for run in runs:
        first = run["rows"][0]
        baselines.add((first["name"], first["psnr"] and round(first["psnr"], 2)))  # None: not finite
    table = {}
    for group, members in groups.items():
        for row in itertools.chain(*(run["rows"] for run in members)):
            is_reference = "gain" not in row
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
    right.set(xlabel="images seen", ylabel="one step: PSNR gain over the linear code, dB", yscale="linear")
    right.legend()
    save_figure(Path(out, "curves.png"), figure)
    print(f"wrote curves.png to {out}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders with metrics.json")
    parser.add_argument("--plot", action="store_true", help="also curves.png (needs matplotlib)")
    parser.add_argument("--out", default=".", metavar="DIR", help="folder of curves.png [this one]")
    args = parser.parse_args()
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs the matplotlib package: pip install matplotlib")
    if os.environ.get("RANK", "0") != "0":
        return
    if args.plot:
        ready_folder(args.out, "curves.png")
    groups = grouped(args.runs)
    print_comparison(groups)
    if args.plot:
        plot_curves(groups, args.out)


if __name__ == "__main__":
    guarded(main)
