"""Reconstruction metrics of a trained autoencoder, for several numbers of decoding steps in one pass over the data.

    python evaluate.py --ckpt out/model.safetensors --data demo --limit 64 --steps 1 2 4 8
    torchrun --nproc_per_node=8 evaluate.py --ckpt F --data imagenet/ --size 256      # the same numbers, faster
    python evaluate.py --ckpt F --images a.jpg b.png --out D                          # your own pictures, of any size

All on images clamped to [-1, 1] and rounded to 8 bit, against the identically prepared originals (the protocol line):
  PSNR      dB, mean of the per-image values (as DC-AE reports); "pooled": of the mean squared error (as SSDD's code)
  SSIM      Wang et al. 2004: Gaussian window 11, sigma 1.5, R G B averaged; equals scikit-image's
  HF ratio  high-frequency energy of the reconstructions over that of the originals: 1 as sharp, below 1 blurred. Blur
            raises PSNR, so read the two together
  LPIPS     Zhang et al. 2018 (arXiv 1801.03924), VGG and AlexNet: two scales that cannot be compared
  DreamSim  Fu et al. 2023 (arXiv 2306.09344), the package's ensemble
  rFID      see fid.py, also for FD-DINOv2 and features of your own, which are not rFID; biased below 10,000 images
  NFE, ms   network evaluations an image; milliseconds an image of decoding, the first batch (warm-up) left out
  cells     step across the borders of the encoder's cells over that elsewhere, over the originals'; 1: none show
+- is the standard error of the mean over images. Two rows are no networks at all: shrinking by the model's factor with
antialiasing and enlarging bilinearly; and the linear code with as many numbers an image as the latent.
A metric whose network cannot be had is "-", with the reason below.
"""
import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model import DCSSDAE, check_folder, check_size, folder_beside
from sampler import image_noise, seeded_generator

from data import (LARGEST_KEPT, check_numbers, gathered, guarded, keep_freed_memory, make_dataset,  # isort: skip
                  make_loader, now, only_warns, read_image, ready_folder, save_grid, setup, strict,
                  warn_of_idle_flags, write_json)
from fid import (UNBIASED_FROM, Statistics, cache_files, check_metrics, distance_or_none, load_cached,  # isort: skip
                 load_networks, metric_arguments, metric_of, or_nan, save_cached)
from losses import (cell_ratio, cell_steps, hf_energy, hf_ratio, linear_code, mean_and_error, psnr,  # isort: skip
                    shrink_enlarge, ssim, to8bit)

REFERENCES = {"baseline": "shrink/enlarge x {f}", "linear": "linear code"}  # first rows of every table
DEFAULT_SIZE = 256                                           # pixels a side, for models that do not say theirs
MOVED = {  # flags of earlier versions, and where they are now
    "--bench": "python -m tools.bench", "--sweep": "python -m tools.sweep", "--field": "python -m tools.field",
    "--compare": "python -m tools.compare", "--latents": "python -m tools.latents --out",
    "--latents_sample": "python -m tools.latents --sample", "--z_stats": "python -m tools.latents --z_stats",
    "--plot": "an option of python -m tools.sweep and of python -m tools.compare",
    "--calibrate": "an option of python -m tools.sweep",
    **dict.fromkeys(["--flip", "--shard"], "an option of python -m tools.latents"),
    **dict.fromkeys(["--dec", "--enc", "--enc_width", "--loss", "--compile", "--checkpointing"],
                    "an option of python -m tools.bench"),
}


# ---------------------------------------------------------------------------------------------------------------------
# The pass over the data

@torch.no_grad()
def evaluate(model, loader, device="cpu", steps=(1,), distances=None, features=None, seed=0, dtype=None,
             rank=0, world=1, originals=None, pictures=8, progress=False):
    """Metrics of the reconstructions decode(encode(x).mode()), for every number of steps, in one pass.

    model      .encode(x).mode() -> z, .sample(z, steps, noise, **options) -> (x, nfe), .downscale; in eval mode
    loader     yields (x (b, 3, s, s) in [-1, 1], index (b,)); the part of this process, every image once in all of them
    steps      numbers of steps, or {name of the row: (steps, sampler options)}
    distances  {metric: callable (x, y) -> (b,)};  features  {metric: network of fid.py}, Frechet distances; or None
    dtype      torch.bfloat16 for autocast in encoder and decoder, None for float32
    rank, world  with world > 1 all processes must call this, and all get the same result
    originals  {metric: fid.Statistics of exactly these originals}, to save computing them
    Returns a dict: images, skipped (unreadable ones), rows (a dict of numbers for each of REFERENCES, then one per
    number of steps; NAME_se is NAME's standard error), pictures (rows originals, *REFERENCES, *steps of (n, 3, s, s)),
    originals.
    ValueError where no image can be read, or one comes twice.
    """
    device = torch.device(device)
    distances, features = distances or {}, features or {}
    runs = steps if isinstance(steps, dict) else {row_name(n): (n, {}) for n in steps}
    rows_of_table = [*REFERENCES, *runs]
    of_rows = {(row, net): Statistics(features[net].dim, device) for row in rows_of_table for net in features}
    originals = dict(originals or {})
    missing = {net: Statistics(features[net].dim, device) for net in features if net not in originals}
    dataset = getattr(loader, "dataset", ())
    part = {"values": {}, "seconds": {row: [] for row in runs}, "pictures": {}, "skipped": []}
    bar = tqdm(total=math.ceil(len(dataset) / world) or None, unit="img", disable=not progress or rank > 0)
    for image, index in loader:
        if len(image) == 0:  # nothing but unreadable images in this batch
            continue
        image = image.to(device)                                                # (b, 3, s, s)
        noise = image_noise(seed, index, image.shape[1:]).to(device)
        x = to8bit(image)
        outputs, nfe, seconds = reconstruct(model, image, noise, runs, dtype)
        values = image_metrics(x, outputs, distances, model.downscale)
        values["original", "index"] = index
        for row in runs:
            values[row, "nfe"] = nfe[row]
            part["seconds"][row].append((seconds[row], len(x)))
        for key, value in values.items():
            part["values"].setdefault(key, []).append(value.cpu().double())
        for (row, net), statistics in of_rows.items():
            statistics.update(or_nan(features[net], outputs[row]))
        for net, statistics in missing.items():
            statistics.update(or_nan(features[net], x))
        for k in range(min(len(x), pictures - len(part["pictures"]))):
            part["pictures"][int(index[k])] = [y[k].cpu() for y in (x, *outputs.values())]
        bar.update(len(x))
    bar.close()

    part["values"] = {key: torch.cat(batches) for key, batches in part["values"].items()}
    if hasattr(dataset, "skipped"):
        part["skipped"] = dataset.skipped.nonzero().flatten().tolist()
    values, ms, shown, skipped = gather(part, world)
    if world > 1:
        for statistics in [*of_rows.values(), *missing.values()]:
            statistics.all_reduce()
    originals |= missing
    images = len(values["original", "index"])
    for statistics in originals.values():
        if statistics.n != images:
            raise ValueError(f"statistics of {statistics.n} originals for {images} images")

    rows = []
    for name, text in REFERENCES.items():
        rows.append(table_row(name, {"name": text.format(f=model.downscale), "steps": 0}, values, distances))
    for name, (n, run_options) in runs.items():
        rows.append(table_row(name, {"name": name, "steps": n, **run_options}, values, distances))
    for name, row in zip(rows_of_table, rows, strict=True):
        if images > 1:  # or there is no covariance
            row |= {net: distance_or_none(originals[net], of_rows[name, net]) for net in features}
        if name in ms:
            row["ms"] = ms[name]
    shown = [shown[i] for i in sorted(shown)[:pictures]]                        # an image's original, references, steps
    shown = [torch.stack(row) for row in zip(*shown, strict=True)]              # (n, 3, s, s) each
    return {"images": images, "skipped": len(skipped), "rows": rows, "pictures": shown, "originals": originals}


def row_name(steps):
    return "1 step" if steps == 1 else f"{steps} steps"


def reconstruct(model, image, noise, runs, dtype):
    """A batch for every row of the table: {row: images (b, 3, s, s)}, {row: evaluations (b,)}, {row: seconds}."""
    device, nfe, seconds = image.device, {}, {}
    outputs = {"baseline": shrink_enlarge(image, model.downscale), "linear": None}
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
        z = model.encode(image).mode().float()                                  # (b, c, s / f, s / f)
        outputs["linear"] = linear_code(image, model.downscale, z.shape[1])
        for name, (steps, options) in runs.items():
            start = now(device)
            outputs[name], nfe[name] = model.sample(z, steps=steps, noise=noise, **options)
            seconds[name] = now(device) - start
    return {name: to8bit(y) for name, y in outputs.items()}, nfe, seconds


def image_metrics(x, outputs, distances, f):
    """{(row, metric): one value an image (b,)} of reconstructions of x, with cells of f x f pixels."""
    values = {("original", "hf"): hf_energy(x)}
    for name, y in {"original": x, **outputs}.items():
        values[name, "across"], values[name, "elsewhere"] = cell_steps(y, f)
    for name, y in outputs.items():
        values[name, "mse"] = (x - y).square().mean((1, 2, 3))
        values[name, "ssim"] = ssim(x, y)
        values[name, "hf"] = hf_energy(y)
        for metric, distance in distances.items():
            values[name, metric] = or_nan(distance, x, y).flatten()
    return values


def gather(part, world):
    """What all processes found, the same in each: {(row, metric): (N,)}, {row: milliseconds an image},
    {index: pictures}, set of unreadable images. In the order of the data set: no sum depends on who computed what."""
    parts = gathered(part, world)
    filled = [p["values"] for p in parts if p["values"]]                        # a process may have had no image at all
    if not filled:
        raise ValueError("not one image could be read")
    values = {key: torch.cat([v[key] for v in filled]) for key in filled[0]}
    index, order = values["original", "index"].sort()
    if len(index.unique()) < len(index):
        raise ValueError("the loader gave an image twice")
    values = {key: value[order] for key, value in values.items()}
    ms = {}
    for row in part["seconds"]:
        warm = []
        for p in parts:
            timed = p["seconds"][row]
            warm += timed[1:] or timed  # without each process's first batch, unless there is no other
        ms[row] = 1000 * sum(seconds for seconds, _ in warm) / sum(images for _, images in warm)
    shown, skipped = {}, set()  # a set: several processes may have met the same file
    for p in parts:
        shown |= p["pictures"]
        skipped |= set(p["skipped"])
    return values, ms, shown, skipped


def table_row(name, row, values, distances):
    """`row` and the means over images of what was measured for `name`, each with its standard error."""
    if (name, "nfe") in values:
        row["nfe"], row["nfe_se"] = mean_and_error(values[name, "nfe"])
    row["psnr"], row["psnr_se"] = mean_and_error(psnr(values[name, "mse"]))
    row["psnr_pooled"] = float(psnr(values[name, "mse"].mean()))
    row["ssim"], row["ssim_se"] = mean_and_error(values[name, "ssim"])
    row["hf"], row["hf_se"] = hf_ratio(values[name, "hf"], values["original", "hf"])
    steps, original_steps = ((values[key, "across"], values[key, "elsewhere"]) for key in (name, "original"))
    row["cells"] = cell_ratio(steps, original_steps)
    for metric in distances:
        row[metric], row[metric + "_se"] = mean_and_error(values[name, metric])
    return row


# ---------------------------------------------------------------------------------------------------------------------
# Table and files

def table_columns(rows, images):
    """{key in a row: (heading, number format)}, in the order of the table."""
    biased = f" (biased, N={images})" if images < UNBIASED_FROM else ""
    columns = {
        "name": ("", "{}"), "runs": ("runs", "{}"), "gain": ("gain, dB", "{:.2f}"), "nfe": ("NFE", "{:.4g}"),
        "psnr": ("PSNR", "{:.2f}"), "psnr_pooled": ("pooled", "{:.2f}"), "ssim": ("SSIM", "{:.4f}"),
        "hf": ("HF ratio", "{:.3f}"), "cells": ("cells", "{:.2f}"),
        "lpips_vgg": ("LPIPS vgg", "{:.4f}"), "lpips_alex": ("LPIPS alex", "{:.4f}"),
        "dreamsim": ("DreamSim", "{:.4f}"), "rfid": ("rFID" + biased, "{:.3f}"),
        "fd_dinov2": ("FD-DINOv2" + biased, "{:.3f}"),
    }
    for row in rows:
        for key in row:  # Frechet distances in features of the user's own
            if key.startswith("fd_") and not key.endswith("_se") and key not in columns:
                columns[key] = f"FD {key[3:]}{biased}", "{:.3f}"
    return columns | {"ms": ("ms/image", "{:.1f}"), "minutes": ("minutes", "{:.1f}")}


def table_cell(row, key, form):
    """A number with its standard error, or "-" where there is none."""
    if strict(row.get(key)) is None:
        return "-"
    text = form.format(row[key])
    if row.get(f"{key}_se"):
        text += " +-" + form.format(row[f"{key}_se"])
    return text


def print_table(result):
    """Print the rows of `evaluate` with standard errors, "-" where there is no number, reasons and protocol."""
    rows, unavailable = result["rows"], result.get("unavailable", {})
    columns = table_columns(rows, result["images"])
    lines = [""] * (1 + len(rows))
    for key, (head, form) in columns.items():
        if not any(key in row for row in rows):
            continue
        cells = [head] + [table_cell(row, key, form) for row in rows]
        width = max(len(cell) for cell in cells)
        for i, cell in enumerate(cells):
            lines[i] += cell.ljust(width) if key == "name" else "  " + cell.rjust(width)
    for line in lines:
        print(line.rstrip())
    for key, reason in unavailable.items():
        heading, _ = columns[key]
        print(f"{heading.split(' (')[0]}: unavailable: {reason}")
    if "protocol" in result:
        print(f"protocol: {result['protocol']}")


def write_results(result, out):
    """metrics.json (no pictures, no statistics) in the folder `out`, whole; reconstructions.png, or else a warning."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    numbers = {key: value for key, value in result.items() if key not in ("pictures", "originals")}
    write_json(out / "metrics.json", numbers)
    with only_warns("reconstructions.png"):
        save_grid(out / "reconstructions.png", result["pictures"])


# ---------------------------------------------------------------------------------------------------------------------
# Own pictures

@torch.no_grad()
def reconstruct_images(model, args, options, device, out):
    """--images: FILE.reconstruction.png in `out` (original, reconstruction, error x 4) and a line for each. ValueError
    in the end, with the files that are no images."""
    if len({Path(path).name for path in args.images}) < len(args.images):
        raise ValueError("--images holds two files of one name: so would their results")
    ready_folder(out, *(f"{Path(path).name}.reconstruction.png" for path in args.images))
    bad, steps = [], args.steps[0]
    for i, path in enumerate(args.images):
        try:
            pixels = torch.from_numpy(np.array(read_image(path, retry=False)))  # (H, W, 3) uint8
        except (OSError, ValueError) as error:
            bad.append(f"{path} ({' '.join(str(error).split())})")
            continue
        start = now(device)
        x = pixels.to(device).permute(2, 0, 1)[None] / 127.5 - 1                # (1, 3, H, W)
        height, width = x.shape[2:]
        keep_freed_memory(height * width <= LARGEST_KEPT**2)
        y = model.reconstruct(x, steps, generator=seeded_generator("cpu", args.seed, i), **options)
        seconds = now(device) - start
        x, y = to8bit(x), to8bit(y)
        error = 4 * (x - y).abs() - 1                                           # black where there is none
        save_grid(out / f"{Path(path).name}.reconstruction.png", [torch.cat([x, y, error])])
        c, h, w = model.latent_shape(height, width)
        pixel_bytes, latent_bytes = 3 * height * width, 2 * c * h * w           # of 8 and 16 bit
        decibels = psnr((x - y).square().mean())
        print(f"{path}: {width} x {height}, PSNR {decibels:.2f} dB, SSIM {ssim(x, y).item():.4f}, "
              f"latent {c} x {h} x {w} of 16 bit, {pixel_bytes} : {latent_bytes} bytes = "
              f"{pixel_bytes / latent_bytes:.1f}, {seconds:.2f} s for encoding and {row_name(steps)}")
    if bad:
        raise ValueError(f"{len(bad)} of {len(args.images)} --images could not be read: {', '.join(bad)}")


# ---------------------------------------------------------------------------------------------------------------------
# What tools/ share: the flags of programs that open a trained model and a data set

def shared_arguments(parser):
    """The flags of every program that opens a trained model and a data set."""
    add = parser.add_argument
    add("--ckpt", required=True, metavar="FILE", help="model.safetensors written by train.py or distill.py")
    add("--device", metavar="NAME", help="default: cuda, mps or cpu, the first that is there")
    add("--dtype", choices=["float32", "tf32", "bf16"], default="float32", help="weights and maps of both parts; tf32: "
        "float32 with the faster, coarser products of NVIDIA's GPUs, metrics' networks too [%(default)s]")
    add("--seed", type=int, default=0, help="of the decoder's noise and of posterior samples [%(default)s]")
    add = parser.add_argument_group("data").add_argument
    add("--data", default="demo", metavar="DIR", help="demo, imagenette, cifar10 or a folder [%(default)s]")
    add("--part", choices=["train", "val"], default="val", help="default: val; of latents' shards train")
    add("--size", type=int, help="image side in pixels; default: the training size, else 256")
    add("--crop", choices=["center", "adm"], default="center", help="short side, centre crop; or DC-AE's [%(default)s]")
    add("--limit", type=int, help="N images, evenly spread over the data; default: all")


def loader_arguments(parser):
    parser.add_argument("--batch_size", type=int, default=32, help="images at a time in each process [%(default)s]")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images [%(default)s]")


def load_model(args, device):
    """The model of --ckpt in --dtype on `device`, and the image size: --size, the training's, or 256: (model, int).
    ValueError, OSError: no such model, a size that does not fit it, an --out that is no folder."""
    check_folder(args.out)
    # float32 means float32, also in LPIPS: torch's own choice is TF32 for convolutions.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = args.dtype == "tf32"
    model = DCSSDAE.load(args.ckpt, device=device).to(memory_format=torch.channels_last)
    if args.dtype == "bf16":
        model.to(torch.bfloat16)
    notes = model.config.get("notes", {})
    size = args.size
    if size is None:
        size = notes.get("size") or DEFAULT_SIZE
    check_size(size, model)
    keep_freed_memory(size <= LARGEST_KEPT)
    return model, size


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def parse_arguments():
    for word in sys.argv[1:]:
        flag = word.split("=")[0]
        if flag in MOVED:
            raise ValueError(f"{flag} is now {MOVED[flag]}")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared_arguments(parser)
    loader_arguments(parser)
    add = parser.add_argument
    add("--out", metavar="DIR", help="folder of what is written; default: the checkpoint's")
    add("--images", nargs="+", metavar="FILE", help="instead of a data set: reconstruct pictures of any size with the "
        "first of --steps")
    add = parser.add_argument_group("sampler").add_argument
    add("--steps", type=int, nargs="+", default=[1], help="numbers of decoding steps, one row each [%(default)s]")
    add("--sampler", choices=["euler", "gd", "nesterov"], help="default: euler for FM, gd (nesterov with --mu) for EqM")
    add("--eta", type=float, help="EqM: step size; default: chosen from the number of steps")
    add("--last_eta", type=float, help="EqM: size of the last step; default: with --eta the same, else what lands on "
        "the estimate")
    add("--mu", type=float, help="EqM: Nesterov momentum; default: the sampler's")
    add("--tol", type=float, help="EqM: a sample stops once rms(field) / lam is below; default: never")
    add("--t_shift", type=float, help="FM: exponent of the time grid; default: the sampler's")
    metric_arguments(parser)
    args = parser.parse_args()
    check_numbers(args)
    check_metrics(args)
    warn_of_idle_flags(parser, args, idle_flags(args))
    return args


def idle_flags(args):
    """{flag that has no effect: why}"""
    if args.images:
        return dict.fromkeys(("data", "part", "size", "crop", "limit", "batch_size", "workers", "lpips_net",
                              "lpips_weights", "dreamsim", "features", "inception", "dinov2", "cache"), "with --images")
    idle = {}
    for network in ("inception", "dinov2"):
        if network not in args.features:
            idle[network] = f"without --features {network}"
    return idle


def sampler_options(args, loss):
    """What --sampler, --eta, --last_eta, --mu, --tol and --t_shift say, as options of `model.sample`."""
    if args.sampler and (args.sampler == "euler") != (loss == "fm"):
        raise ValueError(f"--sampler {args.sampler} does not fit a model trained with --loss {loss}")
    options = {}
    for name in ("eta", "last_eta", "mu", "tol", "t_shift"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    if args.sampler:
        options["method"] = args.sampler
    return options


def report(args, model, dataset, networks, runs, sampler, out, rank, world, device):
    """Evaluate, print the table, write the files. `sampler` says in the protocol how it was set. -> the result, in the
    first process alone."""
    distances, features, unavailable = networks
    paths = cache_files(args, dataset, features)
    originals = load_cached(paths, world)
    loader = make_loader(dataset, args.batch_size * world, False, args.workers, rank=rank, world=world, device=device)
    result = evaluate(model, loader, device, runs, distances, features, seed=args.seed, rank=rank, world=world,
                      originals=originals, progress=True)
    if rank > 0:
        return None
    if result["images"] < 2:
        unavailable = unavailable | dict.fromkeys(features, "a covariance needs at least 2 images")
    for row in result["rows"]:
        row.update(dict.fromkeys(unavailable))
    result |= {"unavailable": unavailable, "arguments": vars(args), "model": model.config}
    result["protocol"] = protocol(args, result, dataset.size, sampler, distances, features, f"{world} x {device.type}")
    write_results(result, out)  # before anything else can fail
    save_cached({metric: paths[metric] for metric in paths.keys() - originals.keys() - unavailable.keys()}, result)
    print_table(result)
    print(f"wrote metrics.json and reconstructions.png to {out}")
    return result


def protocol(args, result, size, sampler, distances, features, machine):
    """Everything that the numbers depend on, in one line."""
    prepared = {"center": f"short side to {size} px (bilinear), centre crop",
                "adm": f"box halving, short side to {size} px (bicubic), centre crop (ADM)"}
    parts = [f"{result['images']} {args.part} images of {args.data}, {result['skipped']} unreadable",
             prepared[args.crop], "clamped and rounded to 8 bit", "latent mode", f"noise seed {args.seed}",
             f"sampler {sampler}"]
    for metric in distances:
        parts.append(metric.replace("lpips_", "LPIPS 0.1 "))
    files = {metric_of(name): Path(name).name for name in args.features}
    for metric, network in features.items():
        parts.append(f"{files[metric]} features sha256 {network.sha256}")
    parts.append(f"{args.dtype}, batches of {args.batch_size} on {machine}")
    return "; ".join(parts)


def main():
    args = parse_arguments()
    rank, world, device = setup(args.device)
    model, size = load_model(args, device)
    options = sampler_options(args, model.config["loss"])
    out = Path(args.out or folder_beside(args.ckpt))
    if args.images:
        if rank == 0:
            reconstruct_images(model, args, options, device, out)
        return
    if rank == 0:
        ready_folder(out, "metrics.json", "reconstructions.png")
    dataset = make_dataset(args.data, size, train=False, limit=args.limit, crop=args.crop, split=args.part)
    networks = load_networks(args, size, device, world)
    runs = {row_name(steps): (steps, options) for steps in args.steps}
    sampler = ", ".join(f"{key} {value}" for key, value in options.items()) or "defaults"
    report(args, model, dataset, networks, runs, sampler, out, rank, world, device)


if __name__ == "__main__":
    guarded(main)
