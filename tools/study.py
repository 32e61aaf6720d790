"""The tables of docs/results.md and docs/sampling.md, made anew: train what is missing, evaluate, write a CSV, print.

    OMP_NUM_THREADS=1 python -m tools.study depth parts     # two tables; stopped, the same command goes on
    python -m tools.study depth --print                     # from the CSV, without training

Every run is a command of train.py or distill.py (RUNS), every line of a table an evaluation of one (TABLES). A run
whose metrics.json is there is done; one that was stopped is resumed. The CSV has a line for each evaluation of each
seed; a table shows means over the seeds, +- standard errors where there are several. Lines of runs that are not in
--runs stay in the CSV as they are.
"""
import argparse
import csv
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from data import make_dataset, make_loader
from evaluate import evaluate, mean_and_error
from model import DCSSDAE
from plumbing.files import save_grid, write_text
from plumbing.process import guarded
from tools.compare import read_run

# Runs: {name: command, after "python"}. {photos}, {crops}, {vgg} and {runs} stand for those flags of the command line,
# {seed} for the seed. --seed and --out are added. A run that starts from another one's model names its file.
ONE_STEP = "train.py --preset deep --g_power 20 --t_mean 4 --workers 0"  # nearly all levels at the noise end
DEEP = f"{ONE_STEP} --steps 300 --eval_every 0 --save_every 150"                               # 1,200 images of 64 px
LARGE = f"{ONE_STEP} --size 128 --batch_size 2 --steps 200 --eval_every 0 --save_every 100"
PAINT = "train.py --preset deep --workers 0 --steps 600 --eval_every 0 --save_every 150"        # 2,400, all levels
TINY = "train.py --preset tiny --workers 0 --steps 1000 --eval_every 0"                        # 8,000 images of 32 px
SHORT = "train.py --preset tiny --workers 0 --eval_every 0 --steps 500 --lr 5e-4 --warmup 20"  # on from a tiny model
DISTILL = "distill.py --workers 0 --warmup 20 --decay 0.5 --eval_every 0"
STUDENT = f"{DISTILL} --teacher_steps 8 --steps 150 --batch_size 4 --optimizer muon --lr 1e-3 --ema 0.98"
PHOTOS = "--data {photos} --aug_scale 4 --eval_images 7"
ON = f"{DEEP} --lr 5e-4 --warmup 20 --init_from examples/f32c32.safetensors {PHOTOS}"           # on from that model
PUBLISHED = "--linear off --no-input_skip --c trunc --g_power 1 --t_mean 0"                    # as the reference trains
RUNS = {
    **{f"deep_{enc}": f"{DEEP} --enc dc_{enc}"
       for enc in ("f8c4", "f8c16", "f16c16", "f32c32", "f32c64", "f64c128", "f64c256")},
    **{f"large_{enc}": f"{LARGE} --enc dc_{enc}" for enc in ("f8c4", "f32c32", "f32c64", "f128c512", "f128c1024")},
    **{f"photos_{enc}": f"{DEEP} --enc dc_{enc} {PHOTOS}" for enc in ("f8c4", "f32c64")},
    "photos_published": f"{DEEP} --enc dc_f32c64 {PUBLISHED} {PHOTOS}",
    **{f"plain_{enc}": f"{DEEP} --enc dc_{enc} --linear off" for enc in ("f8c4", "f32c64")},
    "part_encoder": f"{DEEP} --enc dc_f32c64 --linear encoder",
    "part_decoder": f"{DEEP} --enc dc_f32c64 --linear decoder",
    "part_published": f"{DEEP} --enc dc_f32c64 {PUBLISHED}",
    "deep_f32c64_fm": f"{DEEP} --enc dc_f32c64 --loss fm",
    "deep_f32c32_fm": f"{DEEP} --enc dc_f32c32 --loss fm",
    "deep_adamw": f"{DEEP} --enc dc_f32c32 --optimizer adamw",
    "tiny_adamw": f"{TINY} --optimizer adamw",
    "tiny_eqm": TINY,
    "paint_eqm": PAINT,
    "paint_fm": f"{PAINT} --loss fm",
    "distilled_eqm": f"{STUDENT} --ckpt {{runs}}/paint_eqm_s{{seed}}/model.safetensors",
    "distilled_lpips": f"{STUDENT} --ckpt {{runs}}/paint_eqm_s{{seed}}/model.safetensors --w_lpips 0.5 "
                       "--lpips_weights {vgg}",
    "more_plain": f"{SHORT} --init_from {{runs}}/tiny_eqm_s{{seed}}/model.safetensors",
    "more_lpips": f"{SHORT} --init_from {{runs}}/tiny_eqm_s{{seed}}/model.safetensors --w_lpips 0.5 "
                  "--lpips_weights {vgg}",
    "more_lpips_distilled": f"{DISTILL} --ckpt {{runs}}/more_lpips_s{{seed}}/model.safetensors --steps 100 "
                            "--batch_size 8 --lr 5e-4 --ema 0.99 --w_lpips 0.5 --lpips_weights {vgg}",
    **{f"crops_{name}": f"{ON} {flags}" for name, flags in (
        ("plain", ""), ("lpips", "--w_lpips 0.5 --lpips_weights {vgg}"))},
    "phase2": f"{ONE_STEP} --phase 2 --init_from {{runs}}/deep_f32c64_s{{seed}}/model.safetensors "
              "--size 128 --batch_size 2 --steps 150 --lr 5e-4 --warmup 20 --eval_every 0",
}
# Tables: {name: (evaluation flags, [(line, run, more evaluation flags)])}; a line of the table for each of --steps.
NESTEROV = "--sampler nesterov --mu 0.3"
BUILT_IN = "--limit 200"
TABLES = {
    "depth": (BUILT_IN, [
        ("f8c4: 256 numbers", "deep_f8c4", ""),
        ("f32c64: 256", "deep_f32c64", ""),
        ("f8c16: 1024", "deep_f8c16", ""),
        ("f16c16: 256", "deep_f16c16", ""),
        ("f32c32: 128", "deep_f32c32", ""),
        ("f64c128: 128", "deep_f64c128", ""),
        ("f64c256: 256", "deep_f64c256", "")]),
    "losses": (BUILT_IN, [
        ("f32c32: EqM", "deep_f32c32", ""),
        ("f32c32: FM", "deep_f32c32_fm", ""),
        ("f32c64: EqM", "deep_f32c64", ""),
        ("f32c64: FM", "deep_f32c64_fm", "")]),
    "large": (BUILT_IN, [
        ("f8c4: 1024 numbers", "large_f8c4", ""),
        ("f32c64: 1024", "large_f32c64", ""),
        ("f128c1024: 1024", "large_f128c1024", ""),
        ("f32c32: 512", "large_f32c32", ""),
        ("f128c512: 512", "large_f128c512", "")]),
    "photographs": ("--data {crops}", [
        ("f8c4", "photos_f8c4", ""),
        ("f32c64", "photos_f32c64", ""),
        ("f32c64, as published", "photos_published", "")]),
    "parts": (BUILT_IN, [
        ("both", "deep_f32c64", ""),
        ("decoder alone", "part_decoder", ""),
        ("encoder alone", "part_encoder", ""),
        ("neither", "plain_f32c64", ""),
        ("as published", "part_published", ""),
        ("f8c4: both", "deep_f8c4", ""),
        ("f8c4: neither", "plain_f8c4", "")]),
    "optimizers": (BUILT_IN, [
        ("f32c32: AdamW", "deep_adamw", ""),
        ("f32c32: Muon", "deep_f32c32", ""),
        ("tiny: AdamW", "tiny_adamw", ""),
        ("tiny: Muon", "tiny_eqm", "")]),
    "samplers": (BUILT_IN, [
        ("FM, Euler", "paint_fm", "--steps 1 4 8"),
        ("EqM, gradient descent", "paint_eqm", "--steps 1 4 8"),
        ("EqM, Nesterov", "paint_eqm", f"{NESTEROV} --steps 4 8"),
        ("EqM, Nesterov, stop at tol 0.1", "paint_eqm", f"{NESTEROV} --tol 0.1 --steps 16")]),
    "one_step": (BUILT_IN, [
        ("undistilled", "paint_eqm", "--steps 1 4 8"),
        ("distilled", "distilled_eqm", ""),
        ("the same with the perceptual term", "distilled_lpips", "")]),
    "perceptual": (BUILT_IN, [
        ("without", "more_plain", "--steps 1 4"),
        ("with", "more_lpips", "--steps 1 4"),
        ("with, distilled", "more_lpips_distilled", "")]),
    "perceptual_photographs": ("--data {crops}", [
        ("without", "crops_plain", "--steps 1 4"),
        ("with", "crops_lpips", "--steps 1 4")]),
    "high_resolution": (f"{BUILT_IN} --size 128", [
        ("trained at 64 px", "deep_f32c64", ""),
        ("the same after phase 2", "phase2", ""),
        ("trained at 128 px", "large_f32c64", "")]),
}
COLUMNS = ("run", "seed", "evaluation", "row", "images", "minutes", "nfe", "psnr", "gain", "ssim", "hf", "cells", "fd",
           "enlarged_psnr", "linear_psnr", "linear_ssim", "linear_fd")
FORMS = {"psnr": ".2f", "gain": "+.2f", "ssim": ".3f", "hf": ".3f", "cells": ".2f", "fd": ".0f", "nfe": ".3g",
         "enlarged_psnr": ".2f", "linear_psnr": ".2f", "linear_ssim": ".3f", "linear_fd": ".0f"}
HEADINGS = {"enlarged_psnr": "shrink, enlarge: PSNR, dB", "linear_psnr": "linear code: PSNR, dB",
            "linear_ssim": "its SSIM", "linear_fd": "its distance", "nfe": "evaluations", "psnr": "PSNR, dB",
            "gain": "gain, dB", "ssim": "SSIM", "hf": "HF ratio", "cells": "cells", "fd": "distance"}
MOST_SEEDS = 10
PICTURES = 8


# ---------------------------------------------------------------------------------------------------------------------
# Work

def lines_of_table(name):
    """[(label, run, evaluation flags)] of a table."""
    common, lines = TABLES[name]
    return [(label, run, f"{common} {flags or '--steps 1'}") for label, run, flags in lines]


def folder_of(run, seed, args):
    return Path(args.runs, f"{run}_s{seed}")


def ensure_run(run, seed, args):
    """Train what this run starts from, and the run, unless they are done."""
    for other in re.findall(r"\{runs\}/(\w+)_s\{seed\}", RUNS[run]):
        ensure_run(other, seed, args)
    folder = folder_of(run, seed, args)
    if (folder / "metrics.json").exists():
        return
    execute([*words_of(RUNS[run], seed, args), "--seed", str(seed), "--out", str(folder), "--resume"])


def ensure_evaluation(run, seed, flags, args):
    folder = folder_of(run, seed, args)
    out = evaluation_folder(folder, flags)
    if (out / "metrics.json").exists():
        return
    command = ["evaluate.py", "--ckpt", str(folder / "model.safetensors"), "--workers", "0", "--out", str(out),
               *words_of(flags, seed, args)]
    if args.features:
        command += ["--features", args.features]
    execute(command)


def evaluation_folder(folder, flags):
    """For "--limit 200 --steps 1 4": FOLDER/limit_200_steps_1_4"""
    return folder / re.sub(r"\W+", "_", flags).strip("_")


def words_of(command, seed, args):
    """The words of a command of RUNS or TABLES. ValueError: it needs a file or folder that was not given."""
    names = {name: getattr(args, name) for name in ("runs", "photos", "crops", "vgg")}
    for name, value in names.items():
        if value is None and f"{{{name}}}" in command:
            raise ValueError(f"this table needs --{name} (see docs/results.md)")
    return shlex.split(command.format(seed=seed, **names))


def execute(command):
    """Run `python command` in the folder of the programs; its failure ends the study in one sentence."""
    print("python", shlex.join(command), flush=True)
    code = subprocess.run([sys.executable, *command]).returncode
    if code:
        raise ValueError(f"python {shlex.join(command)} ended with exit code {code}; its message stands above")


# ---------------------------------------------------------------------------------------------------------------------
# The CSV

def key_of(line):
    return line["run"], int(line["seed"]), line["evaluation"], line["row"]


def read_csv(path):
    """{key: line} of a CSV of an earlier study; {} where there is none."""
    if not Path(path).exists():
        return {}
    with open(path, newline="") as file:
        return {key_of(line): line for line in csv.DictReader(file)}


def lines_of(run, seed, flags, args):
    """The CSV's lines of one evaluation, all text."""
    folder = folder_of(run, seed, args)
    out = evaluation_folder(folder, flags)
    if not ((folder / "metrics.json").exists() and (out / "metrics.json").exists()):
        return
    training, evaluation = read_run(folder), read_run(out)
    enlarged, linear = (row for row in evaluation["rows"] if row["steps"] == 0)
    for row in evaluation["rows"]:
        if row["steps"] == 0:
            continue
        values = row | {
            "run": run, "seed": seed, "evaluation": flags, "row": row["name"], "images": evaluation["images"],
            "minutes": training["rows"][-1]["minutes"], "fd": distance(row), "enlarged_psnr": enlarged["psnr"],
            "linear_psnr": linear["psnr"], "linear_ssim": linear["ssim"], "linear_fd": distance(linear)}
        yield {name: text_of(values[name]) for name in COLUMNS}


def distance(row):
    """The Frechet distance in --features of a row of metrics.json; None without."""
    for key, value in row.items():
        if re.fullmatch("fd_(?!.*_se$).*", key):
            return value
    return None


def text_of(value):
    """Six digits, as many as anybody can use."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)


def collect(args):
    """Put what is done into the CSV. -> {key: line}, in the order of TABLES."""
    known, result = read_csv(args.csv), {}
    for name in TABLES:
        for _, run, flags in lines_of_table(name):
            for line in known.values():
                if (line["run"], line["evaluation"]) == (run, flags):
                    result[key_of(line)] = line
            for seed in range(MOST_SEEDS):
                for line in lines_of(run, seed, flags, args):
                    result[key_of(line)] = line
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(result.values())
    write_text(args.csv, text.getvalue())
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The tables

def table_of(name, known):
    """A table in Markdown, a list of lines, from the CSV's lines {key: line}."""
    result = ["| " + " | ".join(["", *HEADINGS.values(), "seeds"]) + " |",
              "|" + "---|" * (len(HEADINGS) + 2)]
    for label, run, flags in lines_of_table(name):
        rows = {}
        for line in known.values():
            if (line["run"], line["evaluation"]) == (run, flags):
                rows.setdefault(line["row"], []).append(line)
        for row, seeds in rows.items():
            cells = [label, *(mean_of(seeds, column) for column in HEADINGS), str(len(seeds))]
            result.append("| " + " | ".join(cells) + " |")
            label = ""
    return result


def mean_of(seeds, column):
    """Mean of a column over the seeds' lines, +- its standard error where they differ; "-" where one has no value."""
    texts = [line[column] for line in seeds]
    if "" in texts:
        return "-"
    form = FORMS[column]
    values = torch.tensor([float(text) for text in texts], dtype=torch.float64)
    mean, error = mean_and_error(values)
    if len(set(texts)) == 1:  # one seed, or what does not depend on it
        return f"{mean:{form}}"
    return f"{mean:{form}} +- {error:{form.removeprefix('+')}}"


# ---------------------------------------------------------------------------------------------------------------------
# The picture

def picture_rows(name, seed, args):
    """Rows of 8 images (8, 3, s, s): the originals of a table, and for each of its models, in the table's order, the
    linear code and one step."""
    common, lines = TABLES[name]
    rows = []
    for run in dict.fromkeys(run for _, run, _ in lines):
        model = DCSSDAE.load(folder_of(run, seed, args) / "model.safetensors")
        data = args.crops if "{crops}" in common else "demo"
        dataset = make_dataset(data, model.config["notes"]["size"], train=False, limit=PICTURES)
        result = evaluate(model, make_loader(dataset, PICTURES, train=False), seed=seed, pictures=PICTURES)
        original, _, *rows_of_model = result["pictures"]
        rows += [original] * (not rows) + rows_of_model
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("tables", nargs="+", metavar="TABLE", choices=TABLES, help=", ".join(TABLES))
    add("--seeds", type=int, nargs="+", default=[0], choices=range(MOST_SEEDS), metavar="N", help="[0]")
    add("--runs", default="runs/study", metavar="DIR", help="folder of the runs [%(default)s]")
    add("--csv", default="docs/results.csv", metavar="FILE", help="where the numbers go [%(default)s]")
    add("--print", action="store_true", help="the tables from the CSV, without any training")
    add("--pictures", metavar="DIR", help="folder for TABLE.png, from the first seed: originals, then for each run the "
        "linear code and one step")
    add("--features", metavar="FILE", help="network of the Frechet distance, see evaluate.py; default: none")
    add("--photos", metavar="DIR", help="folder of photographs with train/ and val/")
    add("--crops", metavar="DIR", help="folder of validation crops")
    add("--vgg", metavar="FILE", help="VGG-16 of the perceptual term")
    args = parser.parse_args()
    if args.print:
        if not Path(args.csv).exists():
            raise FileNotFoundError(f"--print: there is no file {args.csv}")
        known = read_csv(args.csv)
    else:
        for name in args.tables:
            for seed in args.seeds:
                for _, run, flags in lines_of_table(name):
                    ensure_run(run, seed, args)
                    ensure_evaluation(run, seed, flags, args)
                    known = collect(args)
    for name in args.tables:
        print(f"\n{name}\n")
        print("\n".join(table_of(name, known)))
        if args.pictures:
            save_grid(Path(args.pictures, f"{name}.png"), picture_rows(name, args.seeds[0], args))


if __name__ == "__main__":
    guarded(main)
