"""Reconstruction metrics of a trained autoencoder, for several numbers of decoding steps in one pass over the data.

    python evaluate.py --ckpt out/model.safetensors --data demo --limit 64 --steps 1 2 4 8
    torchrun --nproc_per_node=8 evaluate.py --ckpt F --data imagenet/ --size 256      # the same numbers, faster
    python evaluate.py --ckpt F --images a.jpg b.png --out D                          # your own pictures, of any size
    python evaluate.py --ckpt F --data D --save_images E     # then python fid.py E/originals E/reconstructions
    python evaluate.py --ckpt F --data D --peer stabilityai/sd-vae-ft-mse             # beside another autoencoder

All on images clamped to [-1, 1] and rounded to 8 bit, against the identically prepared originals (the protocol line):
  PSNR      dB, mean of the per-image values (as DC-AE reports); "pooled": of the mean squared error (as SSDD's code)
  SSIM      Wang et al. 2004: Gaussian window 11, sigma 1.5, R G B averaged; equals scikit-image's
  HF ratio  high-frequency energy of the reconstructions over that of the originals: 1 as sharp, below 1 blurred. Blur
            raises PSNR, so read the two together
  LPIPS     Zhang et al. 2018 (arXiv 1801.03924), VGG and AlexNet: two scales that cannot be compared
  DreamSim  Fu et al. 2023 (arXiv 2306.09344), the package's ensemble
  rFID      see fid.py, also for FD-DINOv2 and features of your own, which are not rFID; biased below 10,000 images
  NFE, ms   network evaluations an image; milliseconds an image of decoding, without warm-up: the first two batches
  numbers   of an image's latent, beside --peer
  cells     step across the borders of the encoder's cells over that elsewhere, over the originals'; 1: none show
+- is the standard error of the mean over images. Two rows are no networks at all: shrinking by the model's factor with
antialiasing and enlarging bilinearly; and the linear code with as many numbers an image as the latent.
A metric whose network cannot be had is "-", with the reason below. In --out metrics.json and reconstructions.png
replace those of an earlier run, and nothing else.
"""
import argparse
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data import make_dataset, make_loader
from encoder import LappedCode
from fid import UNBIASED_FROM, Statistics, distance_or_none, load_metrics, metric_of
from model import DCSSDAE, check_size
from plumbing import flags, log
from plumbing.files import save_grid, strict, write_json
from plumbing.images import read_image
from plumbing.peers import Peer
from plumbing.process import autocast, gathered, guarded, keep_freed_memory, now, setup
from sampler import image_noise, seeded_generator

REFERENCES = {"baseline": "shrink/enlarge x {f}", "linear": "linear code"}  # first rows of every table
DEFAULT_SIZE = 256                                           # pixels a side, for models that do not say theirs
LARGEST_KEPT = 1024                                          # pixels a side up to which freed memory is kept

# ---------------------------------------------------------------------------------------------------------------------
# Distances between images, one value an image. Images (B, 3, H, W) in [-1, 1], already through to8bit.

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5                            # the paper's Gaussian window, in pixels
SSIM_C1, SSIM_C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2      # the paper's (K1 L)^2 and (K2 L)^2 for 8-bit images
HIGH_FREQUENCY = 0.25                                        # cycles a pixel: half the Nyquist frequency
LUMA = (0.299, 0.587, 0.114)                                 # ITU-R BT.601: brightness of R, G, B


def to8bit(x):
    """Clamp to [-1, 1] and round to the 256 levels of an 8-bit image, any shape; stays a float in [-1, 1]."""
    return (x.float().clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1


def psnr(mse):
    """Peak signal-to-noise ratio in dB of a mean squared error on the [-1, 1] scale; at most 100."""
    # PSNR = 10 log10(peak^2 / MSE), and from -1 to 1 the peak is 2
    mse = mse.float() if mse.device.type == "mps" else mse.double()  # Apple's GPUs have no float64
    return 10 * torch.log10(4 / mse.clamp(min=4e-10))


def ssim(x, y):
    """Structural similarity (Wang, Bovik, Sheikh, Simoncelli 2004) at every place where the window fits. -> (B,)

    K1 = 0.01, K2 = 0.03, population covariance. Images smaller than the window get the largest odd one that fits.
    """
    side = min(SSIM_WINDOW, (min(x.shape[-2:]) - 1) // 2 * 2 + 1)
    if x.device.type != "mps":  # Apple GPUs have no float64
        x, y = x.double(), y.double()
    x, y = (x + 1) * 127.5, (y + 1) * 127.5                                     # [0, 255]
    distance = torch.arange(side, device=x.device) - side // 2
    window = torch.exp(-distance.to(x) ** 2 / (2 * SSIM_SIGMA**2))              # (side,)
    window = window / window.sum()

    # Local means of x, y, x^2, y^2 and x y: the window over all of them at once, along the rows, then the columns.
    maps = torch.cat([x, y, x * x, y * y, x * y]).flatten(0, 1)[:, None]        # (15 B, 1, H, W)
    maps = F.conv2d(maps, window.view(1, 1, 1, side))
    maps = F.conv2d(maps, window.view(1, 1, side, 1))                           # (15 B, 1, H - side + 1, ...)
    mx, my, xx, yy, xy = maps.unflatten(0, (5, len(x), 3))                      # (B, 3, 1, ...) each

    # Equation 13: (2 mx my + C1) (2 cov + C2) / ((mx^2 + my^2 + C1) (var x + var y + C2))
    covariance = xy - mx * my
    variances = xx - mx * mx + yy - my * my
    likeness = (2 * mx * my + SSIM_C1) * (2 * covariance + SSIM_C2)
    largest = (mx * mx + my * my + SSIM_C1) * (variances + SSIM_C2)
    return (likeness / largest).flatten(1).mean(1)


def hf_energy(x):
    """Energy of the luminance above half the Nyquist frequency. -> (B,)

    The mean is removed and a Hann window laid over the image, or else its borders would count as edges.
    """
    luma = LUMA[0] * x[:, 0] + LUMA[1] * x[:, 1] + LUMA[2] * x[:, 2]             # (B, H, W)
    h, w = luma.shape[1:]
    window = torch.hann_window(h, device=x.device)[:, None] * torch.hann_window(w, device=x.device)
    luma = (luma - luma.mean((1, 2), keepdim=True)) * window
    power = torch.fft.fft2(luma).abs().square()
    radius = torch.hypot(torch.fft.fftfreq(h, device=x.device)[:, None], torch.fft.fftfreq(w, device=x.device))
    return (power * (radius > HIGH_FREQUENCY)).sum((1, 2)) / (h * w)


def hf_ratio(energy, reference):
    """Ratio of two sums of hf_energy over a set of images, and its standard error (linearised): (float, float).

    A ratio of sums: the mean of ratios would be ruled by the flattest image. None where the reference has no energy.
    """
    if float(reference.sum()) <= 0:
        return None, None
    ratio = energy.sum() / reference.sum()
    _, error = mean_and_error(energy - ratio * reference)
    return float(ratio), error / float(reference.mean())


def cell_steps(x, f):
    """Mean step between neighbouring pixels across the borders of cells of f x f pixels, and elsewhere: (B,), (B,).
    NaN across borders where an image is a single cell."""
    across, elsewhere = [], []
    for lines in (x, x.mT):
        steps = lines.diff(dim=3).abs().mean((1, 2))                             # (B, W - 1)
        border = torch.arange(1, lines.shape[3], device=x.device) % f == 0
        across.append(steps[:, border])
        elsewhere.append(steps[:, ~border])
    return torch.cat(across, dim=1).mean(1), torch.cat(elsewhere, dim=1).mean(1)


def cell_ratio(steps, reference):
    """Step across cell borders over that elsewhere, relative to the originals: a float, None where there is no border.

    steps, reference  cell_steps' pair for a set of images, (N,) each
    """
    across, elsewhere = steps
    original_across, original_elsewhere = reference
    ratio = across.sum() / elsewhere.sum() / (original_across.sum() / original_elsewhere.sum())
    return float(ratio) if ratio.isfinite() else None


def mean_and_error(values):
    """Mean of (N,) values and the standard error of that mean (0 for a single image): two floats."""
    values = values.double()
    if len(values) == 1:
        return float(values.mean()), 0.0
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def shrink_enlarge(x, factor):
    """The baseline: bilinear with antialiasing to 1/factor of each side, bilinear back."""
    sides = [side // factor for side in x.shape[2:]]
    small = F.interpolate(x, size=sides, mode="bilinear", antialias=True)
    return F.interpolate(small, size=x.shape[2:], mode="bilinear", align_corners=False)


def linear_code(x, f, channels):
    """The yardstick of every autoencoder: x decoded from the linear code (encoder.LappedCode) with as many numbers an
    image; at most the 3 f^2 of a cell, which are exact."""
    code = LappedCode(f, min(channels, 3 * f * f))
    return code.decode(code.encode(x))


# ---------------------------------------------------------------------------------------------------------------------
# The pass over the data

@torch.no_grad()
def evaluate(model, loader, device="cpu", steps=(1,), distances=None, features=None, seed=0, dtype=None, rank=0,
             world=1, pictures=8, progress=False, save=None):
    """Metrics of the reconstructions decode(encode(x).mode()), for every number of steps, in one pass.

    model      .encode(x).mode() -> z, .sample(z, steps, noise, **options) -> (x, nfe), .downscale; in eval mode
    loader     yields (x (b, 3, s, s) in [-1, 1], index (b,)); the part of this process, every image once in all of them
    steps      numbers of steps, or {name of the row: (steps, sampler options)}
    distances  {metric: callable (x, y) -> (b,)};  features  {metric: network of fid.py}, Frechet distances; or None
    dtype      torch.bfloat16 for autocast in encoder and decoder, None for float32
    rank, world  with world > 1 all processes must call this, and all get the same result
    pictures   how many images to show;  save  callable (index, originals, first steps' reconstructions) for each batch
    Returns a dict: images, skipped (unreadable ones), rows (a dict of numbers for each of REFERENCES, then one per
    number of steps; NAME_se is NAME's standard error), pictures (rows originals, *REFERENCES, *steps of (n, 3, s, s)).
    ValueError where no image can be read, or one comes twice.
    """
    device = torch.device(device)
    distances, features = distances or {}, features or {}
    runs = steps if isinstance(steps, dict) else {row_name(n): (n, {}) for n in steps}
    statistics = {}
    for name in ("original", *REFERENCES, *runs):
        for metric, network in features.items():
            statistics[name, metric] = Statistics(network.dim, device)
    dataset = getattr(loader, "dataset", ())
    values, seconds, shown = {}, {name: [] for name in runs}, {}
    bar = log.progress(math.ceil(len(dataset) / world) or None, "img", disable=not progress or rank > 0)
    for image, index in loader:
        image = image.to(device)                                                # (b, 3, s, s)
        noise = image_noise(seed, index, image.shape[1:]).to(device)
        x = to8bit(image)
        outputs, nfe, seconds_taken = reconstruct(model, image, noise, runs, dtype)
        found = image_metrics(x, outputs, distances, model.downscale)
        found["original", "index"] = index
        for name in runs:
            found[name, "nfe"] = nfe[name]
            seconds[name].append((seconds_taken[name], len(x)))
        for key, value in found.items():
            values.setdefault(key, []).append(value.cpu().double())
        for (name, metric), each in statistics.items():
            each.update(features[metric](x if name == "original" else outputs[name]))
        for k in range(min(len(x), pictures - len(shown))):
            shown[int(index[k])] = [y[k].cpu() for y in (x, *outputs.values())]
        if save:
            save(index, x, outputs[next(iter(runs))])
        bar.update(len(x))
    bar.close()

    # The same in all processes, in the order of the data set: no sum depends on who computed what
    values = in_order(gathered({key: torch.cat(batches) for key, batches in values.items()}, world))
    ms = milliseconds(gathered(seconds, world))
    for part in gathered(shown, world):
        shown |= part
    skipped = set()  # several processes may have met the same file
    for part in gathered(getattr(dataset, "skipped", torch.zeros(0)).nonzero().flatten().tolist(), world):
        skipped |= set(part)
    for each in statistics.values():
        each.all_reduce()
    images = len(values["original", "index"])

    rows = []
    for name, text in REFERENCES.items():
        rows.append(table_row(name, {"name": text.format(f=model.downscale), "steps": 0}, values, distances))
    for name, (n, options) in runs.items():
        rows.append(table_row(name, {"name": name, "steps": n, **options}, values, distances))
    for name, row in zip((*REFERENCES, *runs), rows, strict=True):
        if images > 1:  # or there is no covariance
            row |= {net: distance_or_none(statistics["original", net], statistics[name, net]) for net in features}
        if name in ms:
            row["ms"] = ms[name]
    shown = [shown[i] for i in sorted(shown)[:pictures]]                        # an image's original, references, steps
    shown = [torch.stack(row) for row in zip(*shown, strict=True)]              # (n, 3, s, s) each
    return {"images": images, "skipped": len(skipped), "rows": rows, "pictures": shown}


def row_name(steps):
    return "1 step" if steps == 1 else f"{steps} steps"


def reconstruct(model, image, noise, runs, dtype):
    """A batch for every row of the table: {row: images (b, 3, s, s)}, {row: evaluations (b,)}, {row: seconds}."""
    device, nfe, seconds = image.device, {}, {}
    outputs = {"baseline": shrink_enlarge(image, model.downscale)}
    with autocast(device, dtype):
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
            values[name, metric] = distance(x, y).flatten()
    return values


def in_order(parts):
    """All processes' {(row, metric): (n,)} -> {(row, metric): (N,)} in the order of the data set."""
    filled = [part for part in parts if part]                                   # a process may have had no image at all
    if not filled:
        raise ValueError("not one image could be read")
    values = {key: torch.cat([part[key] for part in filled]) for key in filled[0]}
    index, order = values["original", "index"].sort()
    if len(index.unique()) < len(index):
        raise ValueError("the loader gave an image twice")
    return {key: value[order] for key, value in values.items()}


def milliseconds(parts):
    """All processes' {row: [(seconds, images) of a batch]} -> {row: milliseconds an image}, without each process's
    first two batches, unless there are no others: a GPU warms up, then records its kernels (plumbing/graphs.py)."""
    result = {}
    for row in parts[0]:
        warm = []
        for part in parts:
            warm += part[row][2:] or part[row][-1:]
        result[row] = 1000 * sum(seconds for seconds, _ in warm) / sum(images for _, images in warm)
    return result


def table_row(name, row, values, distances):
    """`row` and the means over images of what was measured for `name`, each with its standard error."""
    if (name, "nfe") in values:
        row["nfe"], row["nfe_se"] = mean_and_error(values[name, "nfe"])
    row["psnr"], row["psnr_se"] = mean_and_error(psnr(values[name, "mse"]))
    row["psnr_pooled"] = float(psnr(values[name, "mse"].mean()))
    row["ssim"], row["ssim_se"] = mean_and_error(values[name, "ssim"])
    row["hf"], row["hf_se"] = hf_ratio(values[name, "hf"], values["original", "hf"])
    steps = values[name, "across"], values[name, "elsewhere"]
    original_steps = values["original", "across"], values["original", "elsewhere"]
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
        "name": ("", "{}"), "numbers": ("numbers", "{}"), "runs": ("runs", "{}"), "gain": ("gain, dB", "{:.2f}"),
        "nfe": ("NFE", "{:.4g}"),
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
    rows = result["rows"]
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
    for key, reason in result.get("unavailable", {}).items():
        heading, _ = columns[key]
        print(f"{heading.split(' (')[0]}: unavailable: {reason}")
    if "protocol" in result:
        print(f"protocol: {result['protocol']}")


def write_results(result, out):
    """metrics.json (no pictures), then reconstructions.png, in the folder `out`."""
    numbers = {key: value for key, value in result.items() if key != "pictures"}
    write_json(Path(out, "metrics.json"), numbers)
    save_grid(Path(out, "reconstructions.png"), result["pictures"])


def ready_folder(out):
    """Before the work: make the folder of the results, and see that there is nothing of somebody else's under their
    names. OSError, ValueError."""
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise OSError(f"nothing can be written into {out}: choose another --out")
    numbers, picture = out / "metrics.json", out / "reconstructions.png"
    is_ours = not picture.exists()
    if numbers.exists():
        is_ours = '"rows"' in numbers.read_text(errors="replace")
    if not is_ours:
        raise ValueError(f"{out} holds a metrics.json or reconstructions.png that no evaluation wrote: choose another "
                         "--out")


def image_writer(folder, dataset):
    """For --save_images: a callable (index, originals, reconstructions) that writes PNG into two folders below a new
    `folder`, under the names that the images have below their own. ValueError where the folder is not empty."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"--save_images {folder} is not empty: give a new folder")
    paths = [Path(dataset.name_of(j)) for j in range(len(dataset))]
    root = os.path.commonpath([path.parent for path in paths])
    names = [path.relative_to(root) for path in paths]
    stems = [name.with_suffix("") for name in names]
    if len(set(stems)) < len(names):  # a.jpg beside a.png
        stems = names

    def write(index, originals, reconstructions):
        for part, images in (("originals", originals), ("reconstructions", reconstructions)):
            levels = (images * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()  # (b, s, s, 3)
            for j, picture in zip(index.tolist(), levels, strict=True):
                path = Path(folder, part, f"{stems[j]}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(path)
    return write


# ---------------------------------------------------------------------------------------------------------------------
# Own pictures

@torch.no_grad()
def reconstruct_images(model, args, options, device, out):
    """--images: FILE.reconstruction.png in `out` (original, reconstruction, error x 4) and a line for each. ValueError
    in the end, with the files that are no images."""
    if len({Path(path).name for path in args.images}) < len(args.images):
        raise ValueError("--images holds two files of one name: so would their results")
    out.mkdir(parents=True, exist_ok=True)
    bad, steps = [], args.steps[0]
    for i, path in enumerate(args.images):
        try:
            pixels = torch.from_numpy(np.array(read_image(path)))               # (H, W, 3) uint8
        except (OSError, ValueError) as error:
            bad.append(f"{path} ({error})")
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
# What tools/ share: the flags of programs that open a trained model and a data set, and their start

def shared_arguments(parser, required=True):
    """The flags of every program that opens a trained model, which --ckpt must or may name, and a data set."""
    add = parser.add_argument
    add("--ckpt", required=required, metavar="FILE", help="model.safetensors written by train.py or distill.py")
    add("--out", metavar="DIR", help="folder of what is written; default: the checkpoint's")
    add("--device", metavar="NAME", help="default: cuda, mps or cpu, the first that is there")
    add("--dtype", choices=["float32", "tf32", "bf16"], default="float32", help="weights and maps of both parts; tf32: "
        "float32 with the faster, coarser products of NVIDIA's GPUs, metrics' networks too [%(default)s]")
    add("--seed", type=flags.natural, default=0, metavar="N", help="of the decoder's noise and of posterior samples "
        "[%(default)s]")
    add = parser.add_argument_group("data").add_argument
    add("--data", default="demo", metavar="DIR", help="demo, imagenette, cifar10 or a folder [%(default)s]")
    add("--part", choices=["train", "val"], default="val", help="default: val; of latents' shards train")
    add("--size", type=flags.count, metavar="N", help="image side in pixels; default: the training size, else 256")
    add("--crop", choices=["center", "adm"], default="center", help="short side, centre crop; or DC-AE's [%(default)s]")
    add("--limit", type=flags.count, metavar="N", help="N images, evenly spread over the data; default: all")


def loader_arguments(parser):
    add = parser.add_argument
    add("--batch_size", type=flags.count, default=32, metavar="N", help="images at a time in each process "
        "[%(default)s]")
    add("--workers", type=flags.natural, default=2, metavar="N", help="processes that read images [%(default)s]")


def metric_arguments(parser):
    add = parser.add_argument_group("metrics that need a network").add_argument
    add("--lpips_net", nargs="+", choices=["vgg", "alex"], help="default: both; vgg with one --lpips_weights")
    add("--lpips_weights", nargs="+", metavar="FILE", help="ImageNet weights, one file for each --lpips_net")
    add("--dreamsim", action="store_true", help="also DreamSim, where that package is installed")
    add("--features", nargs="*", default=["inception"], metavar="F", help="of Frechet distances: inception (rFID), "
        "dinov2 (FD-DINOv2), NAME.safetensors with weights of timm's network NAME [inception]")
    add("--inception", metavar="FILE", help="FID's Inception weights; default: torch.hub's cache or download")
    add("--dinov2", metavar="FILE", help="DINOv2 ViT-L/14 weights; default: torch.hub's cache or download")


def load_networks(args, size, device, world):
    """fid.load_metrics' networks for the flags of metric_arguments."""
    files = args.lpips_weights or []
    nets = args.lpips_net or (["vgg"] if len(files) == 1 else ["vgg", "alex"])
    if files and len(files) != len(nets):
        raise ValueError(f"--lpips_weights needs one file for each of --lpips_net {' '.join(nets)}")
    if len(set(map(metric_of, args.features))) < len(args.features):
        raise ValueError(f"--features {' '.join(args.features)}: two of one name")
    return load_metrics(size, device, world, nets, files or [None] * len(nets), args.features, args.inception,
                        args.dinov2, args.dreamsim)


def out_folder(args):
    """Where results go: --out, else the checkpoint's folder; for an hf:// address this one."""
    if args.out:
        return Path(args.out)
    return Path() if not args.ckpt or args.ckpt.startswith("hf://") else Path(args.ckpt).parent


def set_precision(args):
    """float32 means float32, also in LPIPS: torch's own choice is TF32 for convolutions."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = args.dtype == "tf32"


def load_model(args, device):
    """The model of --ckpt in --dtype on `device`, and the image size: --size, the training's, or 256: (model, int).
    ValueError, OSError: no such model, a size that does not fit it."""
    set_precision(args)
    model = DCSSDAE.load(args.ckpt, device=device).to(memory_format=torch.channels_last)
    if args.dtype == "bf16":
        model.to(torch.bfloat16)
    size = args.size or model.config["notes"].get("size") or DEFAULT_SIZE
    check_size(size, model)
    keep_freed_memory(size <= LARGEST_KEPT)
    return model, size


def load_peers(args, size, device):
    """{row of the table: Peer} of --peer. ValueError for a size that does not fit one."""
    set_precision(args)
    peers = {}
    for name in args.peer:
        peer = Peer(name).to(device, torch.bfloat16 if args.dtype == "bf16" else torch.float32).eval()
        if size % peer.downscale:
            raise ValueError(f"--size {size} is not a multiple of {peer.downscale}, which --peer {name} needs")
        peers[name] = peer.to(memory_format=torch.channels_last)
    return peers


# ---------------------------------------------------------------------------------------------------------------------
# Command line

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


def report(args, model, dataset, networks, runs, sampler, out, rank, world, device, save=None, peers=None):
    """Evaluate, write the files, then print the table. `sampler` says in the protocol how it was set; peers: {name:
    Peer}, each below references of its own. -> the result, in the first process alone."""
    distances, features, unavailable = networks
    loader = make_loader(dataset, args.batch_size * world, False, args.workers, rank=rank, world=world, device=device)
    result = evaluate(model, loader, device, runs, distances, features, seed=args.seed, rank=rank, world=world,
                      progress=True, save=save)
    results = [(model, result)]
    for name, peer in (peers or {}).items():
        results.append((peer, evaluate(peer, loader, device, {name: (1, {})}, distances, features, seed=args.seed,
                                       rank=rank, world=world, progress=True)))
    if peers is not None:  # the numbers of an image's latent, which differ
        for one, part in results:
            for row in part["rows"][1:]:
                row["numbers"] = math.prod(one.latent_shape(dataset.size, dataset.size))
    for _, part in results[1:]:
        result["rows"] += part["rows"]
        result["pictures"] += part["pictures"][1:]
    if rank > 0:
        return None
    if result["images"] < 2:
        unavailable = unavailable | dict.fromkeys(features, "a covariance needs at least 2 images")
    for row in result["rows"]:
        row.update(dict.fromkeys(unavailable))
    result |= {"unavailable": unavailable, "arguments": vars(args), "model": model.config}
    result["protocol"] = protocol(args, result, dataset.size, sampler, distances, features, f"{world} x {device.type}")
    write_results(result, out)  # before anything else can fail
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared_arguments(parser, required=False)
    loader_arguments(parser)
    add = parser.add_argument
    add("--peer", nargs="+", default=[], metavar="NAME", help="autoencoders of diffusers' in the table, alone or "
        "beside --ckpt: a folder, or of the Hugging Face hub owner/repo or owner/repo/folder")
    add("--images", nargs="+", metavar="FILE", help="instead of a data set: reconstruct pictures of any size with the "
        "first of --steps")
    add("--save_images", metavar="DIR", help="new folder for originals/ and reconstructions/ of the first of --steps, "
        "PNG")
    add = parser.add_argument_group("sampler").add_argument
    add("--steps", type=flags.count, nargs="+", default=[1], metavar="N", help="numbers of decoding steps, a row each "
        "[1]")
    add("--sampler", choices=["euler", "gd", "nesterov"], help="default: euler for FM, gd (nesterov with --mu) for EqM")
    add("--eta", type=flags.positive, metavar="X", help="EqM: step size; default: chosen from the number of steps")
    add("--last_eta", type=flags.positive, metavar="X", help="EqM: size of the last step; default, with "
        "c = linear and several steps: what lands on the estimate")
    add("--mu", type=flags.below_one, metavar="X", help="EqM: Nesterov momentum; default: the sampler's")
    add("--tol", type=flags.not_negative, metavar="X", help="EqM: a sample stops once rms(field) / lam is below; "
        "default: never")
    add("--t_shift", type=flags.positive, metavar="X", help="FM, and EqM with c = linear: exponent of the "
        "times; default: the sampler's")
    metric_arguments(parser)
    args = parser.parse_args()
    if not args.ckpt and (args.images or not args.peer):
        parser.error("give --ckpt FILE, or for a table --peer NAME")
    rank, world, device = setup(args.device)
    if args.ckpt:
        model, size = load_model(args, device)
        options = sampler_options(args, model.config["loss"])
        runs = {row_name(steps): (steps, options) for steps in args.steps}
    else:
        model, size, options = None, args.size or DEFAULT_SIZE, {}
    out = out_folder(args)
    if args.images:
        if rank == 0:
            reconstruct_images(model, args, options, device, out)
        return

    dataset = make_dataset(args.data, size, train=False, limit=args.limit, crop=args.crop, split=args.part)
    peers = load_peers(args, size, device) if args.peer else None
    if model is None:
        name = next(iter(peers))
        model, runs = peers.pop(name), {name: (1, {})}
    ready_folder(out)
    save = image_writer(args.save_images, dataset) if args.save_images else None
    networks = load_networks(args, size, device, world)
    sampler = ", ".join(f"{key} {value}" for key, value in options.items()) or "defaults"
    report(args, model, dataset, networks, runs, sampler, out, rank, world, device, save, peers)


if __name__ == "__main__":
    guarded(main)
