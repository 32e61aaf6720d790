"""Reconstruction metrics of a trained autoencoder, for several numbers of decoding steps in one pass over the data.

    python evaluate.py --ckpt out/model.safetensors --data demo --limit 64 --steps 1 2 4 8
    torchrun --nproc_per_node=8 evaluate.py --ckpt F --data imagenet/ --size 256      # the same numbers, faster
    python evaluate.py --ckpt F --sweep --plot                 # quality against compute, each sampler at its best
    python evaluate.py --ckpt F --images a.jpg b.png --out D   # your own pictures, of any size
    python evaluate.py --ckpt F --field                        # one image: noise levels, estimates, field, path
    python evaluate.py --compare runs/eqm_s0 runs/eqm_s1 runs/fm_s0 --plot           # means over the seeds
    torchrun --nproc_per_node=8 evaluate.py --ckpt F --data imagenet/ --latents D     # latents to train on

All on images clamped to [-1, 1] and rounded to 8 bit, against the identically prepared originals (the protocol line):
  PSNR      dB, mean of the per-image values (as DC-AE reports); "pooled": of the mean squared error (as SSDD's code)
  SSIM      Wang et al. 2004: Gaussian window 11, sigma 1.5, R G B averaged; equals scikit-image's
  HF ratio  high-frequency energy of the reconstructions over that of the originals: 1 as sharp, below 1 blurred. Blur
            raises PSNR, so read the two together
  LPIPS     Zhang et al. 2018 (arXiv 1801.03924), VGG and AlexNet: two scales that cannot be compared
  DreamSim  Fu et al. 2023 (arXiv 2306.09344), the package's ensemble
  rFID      see fid.py, also for FD-DINOv2 and features of your own, which are not rFID; biased below 10,000 images
  NFE, ms   network evaluations an image; milliseconds an image of decoding, the first batch (warm-up) left out
+- is the standard error of the mean over images. The baseline row is no autoencoder at all: shrink by the model's
factor with antialiasing, enlarge bilinearly. A metric whose network cannot be had is "-", with the reason below.
"""
import argparse
import contextlib
import ctypes
import hashlib
import importlib.util
import itertools
import json
import math
import os
import platform
import random
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import collate, import_torchvision, make_dataset, make_loader, save_grid, to_rgb
from fid import Statistics, frechet_distance, load_features
from losses import EqM, LPIPSLoss, eqm_loss, fm_loss, fm_mix, fm_predict_x, kl_loss
from model import DCSSDAE, SIZES, local_file, read_weights
from sampler import euler, seeded_generator

# ---------------------------------------------------------------------------------------------------------------------
# Metrics. Images (B, 3, H, W) in [-1, 1], already through to8bit; one value an image, (B,).


def to8bit(x):
    """Clamp to [-1, 1] and round to the 256 levels of an 8-bit image, any shape; stays a float in [-1, 1]."""
    return (x.float().clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1


def psnr(mse):
    """Peak signal-to-noise ratio in dB of a mean squared error on the [-1, 1] scale (peak to peak 2); at most 100."""
    return 10 * torch.log10(4 / mse.double().clamp(min=4e-10))


def ssim(x, y):
    """Structural similarity (Wang, Bovik, Sheikh, Simoncelli 2004, equation 13) at every place where the window fits.

    K1 = 0.01, K2 = 0.03, population covariance. Images smaller than the window get the largest odd one that fits.
    """
    side = min(11, (min(x.shape[-2:]) - 1) // 2 * 2 + 1)
    x, y = ((t + 1) * 127.5 if t.device.type == "mps" else (t.double() + 1) * 127.5 for t in (x, y))  # [0, 255]
    g = torch.exp(-(torch.arange(side, device=x.device) - side // 2).to(x) ** 2 / (2 * 1.5**2))
    g = g / g.sum()

    maps = torch.cat([x, y, x * x, y * y, x * y]).flatten(0, 1)[:, None]                  # (15 B, 1, H, W)
    maps = F.conv2d(F.conv2d(maps, g.view(1, 1, 1, side)), g.view(1, 1, side, 1))         # H - side + 1, ...
    mx, my, xx, yy, xy = maps.unflatten(0, (5, len(x), 3))                                # (B, 3, 1, ...) each
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    value = (2 * mx * my + c1) * (2 * (xy - mx * my) + c2) / (
        (mx * mx + my * my + c1) * (xx - mx * mx + yy - my * my + c2))
    return value.flatten(1).mean(1)


def hf_energy(x):
    """Energy of the luminance above half the Nyquist frequency (a radius of 1/4 cycle a pixel).

    The mean is removed and a Hann window laid over the image, or else its borders would count as edges.
    """
    luma = 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]
    h, w = luma.shape[1:]
    window = torch.hann_window(h, device=x.device)[:, None] * torch.hann_window(w, device=x.device)
    power = torch.fft.fft2((luma - luma.mean((1, 2), keepdim=True)) * window).abs().square()
    radius = torch.hypot(torch.fft.fftfreq(h, device=x.device)[:, None], torch.fft.fftfreq(w, device=x.device))
    return (power * (radius > 0.25)).sum((1, 2)) / (h * w)


def hf_ratio(energy, reference):
    """Ratio of two sums of hf_energy over a set of images, and its standard error (linearised): (float, float).

    A ratio of sums: the mean of ratios would be ruled by the flattest image. None where the reference has no energy.
    """
    if float(reference.sum()) <= 0:
        return None, None
    ratio = energy.sum() / reference.sum()
    return float(ratio), mean_and_error(energy - ratio * reference)[1] / float(reference.mean())


def mean_and_error(values):
    """Mean of (N,) values and the standard error of that mean (0 for a single image): two floats."""
    values = values.double()
    return float(values.mean()), float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0


def shrink_enlarge(x, factor):
    """The baseline: bilinear with antialiasing to 1/factor of each side, bilinear back."""
    small = F.interpolate(x, size=[side // factor for side in x.shape[2:]], mode="bilinear", antialias=True)
    return F.interpolate(small, size=x.shape[2:], mode="bilinear", align_corners=False)


# ---------------------------------------------------------------------------------------------------------------------
def image_noise(seed, index, shape):
    """Standard normal (len(index), *shape); row i depends on (seed, index[i]) alone: no batch, process, device."""
    return torch.stack([torch.randn(shape, generator=seeded_generator("cpu", seed, int(i))) for i in index])


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


@torch.no_grad()
def evaluate(model, loader, device="cpu", steps=(1,), distances=None, features=None, options=None, seed=0,
             dtype=None, rank=0, world=1, originals=None, pictures=8, progress=False):
    """Metrics of the reconstructions decode(encode(x).mode()), for every number of steps, in one pass.

    model      .encode(x).mode() -> z, .sample(z, steps, noise, **options) -> (x, nfe), .downscale; in eval mode
    loader     yields (x (b, 3, s, s) in [-1, 1], index (b,)); the part of this process, every image once in all of them
    steps      numbers of steps, or {name of the row: (steps, sampler options)}
    distances  {metric: callable (x, y) -> (b,)};  features  {metric: network of fid.py}, Frechet distances; or None
    options    sampler options;  dtype  torch.bfloat16 for autocast in encoder and decoder, None for float32
    rank, world  with world > 1 all processes must call this, and all get the same result
    originals  {metric: fid.Statistics of exactly these originals}, to save computing them
    Returns a dict: images, skipped (unreadable ones), rows (a dict of numbers for the baseline, then one per number of
    steps; NAME_se is NAME's standard error), pictures (rows originals, baseline, *steps of (n, 3, s, s)), originals.
    ValueError where no image can be read, or one comes twice.
    """
    device, distances, features, originals = torch.device(device), distances or {}, features or {}, originals or {}
    runs = steps if isinstance(steps, dict) else {f"{n} step" + "s" * (n > 1): (n, options or {}) for n in steps}
    names, values, times, shown = ["baseline", *runs], {}, {name: [] for name in runs}, {}
    fids = {(name, net): Statistics(features[net].dim, device) for name, net in itertools.product(names, features)}
    fresh = {net: Statistics(features[net].dim, device) for net in features if net not in originals}
    dataset = getattr(loader, "dataset", ())
    bar = tqdm(total=math.ceil(len(dataset) / world) or None, unit="img", disable=not progress or rank > 0)
    for x, index in loader:
        if len(x) == 0:  # nothing but unreadable images in this batch
            continue
        image, noise = x.to(device), image_noise(seed, index, x.shape[1:]).to(device)
        x, outputs = to8bit(image), {"baseline": shrink_enlarge(image, model.downscale)}
        batch = {("original", "index"): index, ("original", "hf"): hf_energy(x)}               # (row, metric): (b,)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
            z = model.encode(image).mode().float()
            for name, (n, run_options) in runs.items():
                start = now(device)
                outputs[name], batch[name, "nfe"] = model.sample(z, steps=n, noise=noise, **run_options)
                times[name].append((now(device) - start, len(x)))
        outputs = {name: to8bit(y) for name, y in outputs.items()}
        for name, y in outputs.items():
            batch[name, "mse"] = (x - y).square().mean((1, 2, 3))
            batch[name, "ssim"], batch[name, "hf"] = ssim(x, y), hf_energy(y)
            for metric, distance in distances.items():
                batch[name, metric] = distance(x, y).flatten()
            for net, network in features.items():
                fids[name, net].update(network(y))
        for net, statistics in fresh.items():
            statistics.update(features[net](x))
        for key, value in batch.items():
            values.setdefault(key, []).append(value.cpu().double())
        for k, i in enumerate(index.tolist()[:max(0, pictures - len(shown))]):
            shown[i] = [x[k].cpu(), *(y[k].cpu() for y in outputs.values())]
        bar.update(len(x))
    bar.close()

    # One value an image, from all processes, in the order of the data set: sums do not depend on who computed what.
    skipped = dataset.skipped.nonzero().flatten().tolist() if hasattr(dataset, "skipped") else []
    parts = [({key: torch.cat(v) for key, v in values.items()}, times, shown, skipped)]
    if world > 1:
        part, parts = parts[0], [None] * world
        dist.all_gather_object(parts, part)
        for statistics in [*fids.values(), *fresh.values()]:
            statistics.all_reduce()
    filled = [part for part, *_ in parts if part]              # a process may have had no image at all
    if not filled:
        raise ValueError("not one image could be read")
    v = {key: torch.cat([part[key] for part in filled]) for key in filled[0]}
    index, order = v["original", "index"].sort()
    if len(index.unique()) < len(index):
        raise ValueError("the loader gave an image twice")
    v = {key: value[order] for key, value in v.items()}
    originals = originals | fresh
    for statistics in originals.values():
        if statistics.n != len(order):
            raise ValueError(f"statistics of {statistics.n} originals for {len(order)} images")

    rows = []
    for name in names:
        row = {"name": f"shrink/enlarge x {model.downscale}", "steps": 0}
        if name != "baseline":
            row = {"name": name, "steps": runs[name][0], **runs[name][1]}
            row["nfe"], row["nfe_se"] = mean_and_error(v[name, "nfe"])
        row["psnr"], row["psnr_se"] = mean_and_error(psnr(v[name, "mse"]))
        row["psnr_pooled"] = float(psnr(v[name, "mse"].mean()))
        row["ssim"], row["ssim_se"] = mean_and_error(v[name, "ssim"])
        row["hf"], row["hf_se"] = hf_ratio(v[name, "hf"], v["original", "hf"])
        for metric in distances:
            row[metric], row[metric + "_se"] = mean_and_error(v[name, metric])
        for net in features if len(order) > 1 else ():
            a, b = originals[net], fids[name, net]
            row[net] = frechet_distance(a.mu, a.sigma, b.mu, b.sigma)
        if name != "baseline":  # without each process's first batch, unless there is no other
            warm = [t for _, part, *_ in parts for t in part[name][1:] or part[name]]
            row["ms"] = 1000 * sum(t for t, _ in warm) / sum(b for _, b in warm)
        rows.append(row)
    shown = {i: images for *_, part, _ in parts for i, images in part.items()}
    shown = [torch.stack(row) for row in zip(*(shown[i] for i in sorted(shown)[:pictures]), strict=True)]
    skipped = {i for *_, part in parts for i in part}          # a set: several processes may have met the same file
    return {"images": len(order), "skipped": len(skipped), "rows": rows, "pictures": shown, "originals": originals}


# ---------------------------------------------------------------------------------------------------------------------
def print_table(result):
    """Print the rows of `evaluate` with standard errors, "-" where there is no number, reasons and protocol."""
    rows, unavailable = result["rows"], result.get("unavailable", {})
    biased = f" (biased, N={result['images']})" if result["images"] < 10_000 else ""
    columns = {"name": ("", "{}"), "runs": ("runs", "{}"), "gain": ("gain, dB", "{:.2f}"),
               "nfe": ("NFE", "{:.4g}"), "psnr": ("PSNR", "{:.2f}"),
               "psnr_pooled": ("pooled", "{:.2f}"), "ssim": ("SSIM", "{:.4f}"), "hf": ("HF ratio", "{:.3f}"),
               "lpips_vgg": ("LPIPS vgg", "{:.4f}"), "lpips_alex": ("LPIPS alex", "{:.4f}"),
               "dreamsim": ("DreamSim", "{:.4f}"), "rfid": ("rFID" + biased, "{:.3f}"),
               "fd_dinov2": ("FD-DINOv2" + biased, "{:.3f}")}
    columns |= {key: (f"FD {key[3:]}{biased}", "{:.3f}") for key in itertools.chain(*rows)
                if key[:3] == "fd_" and key not in columns and key[-3:] != "_se"}
    columns |= {"ms": ("ms/image", "{:.1f}"), "minutes": ("minutes", "{:.1f}")}
    text = []
    for key, (head, form) in columns.items():
        if any(key in row for row in rows):
            cells = ["-" if row.get(key) is None else form.format(row[key]) + (
                " +-" + form.format(row[key + "_se"]) if row.get(key + "_se") else "") for row in rows]
            width = max(map(len, [head, *cells]))
            text.append([c.ljust(width) if key == "name" else c.rjust(width) for c in [head, *cells]])
    for line in zip(*text, strict=True):
        print("  ".join(line).rstrip())
    for key, reason in unavailable.items():
        print(f"{columns[key][0].split(' (')[0]}: unavailable: {reason}")
    if "protocol" in result:
        print(f"protocol: {result['protocol']}")


def write_results(result, out):
    """metrics.json (no pictures, no statistics) and reconstructions.png in the folder `out`, whole or not at all."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    save_grid(out / "reconstructions.png", result["pictures"])
    text = json.dumps({k: v for k, v in result.items() if k not in ("pictures", "originals")}, indent=1)
    write_whole(out / "metrics.json", text + "\n")


def write_whole(path, data):
    """Text, or an array as .npy, into `path`: whole and on the disk, or not at all."""
    with open(f"{path}.tmp", "wb") as file:
        file.write(data.encode()) if isinstance(data, str) else np.save(file, data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def dreamsim_distance(device):
    """DreamSim, callable (x, y) -> (b,), on images in [-1, 1] resized as its `preprocess` does. FileNotFoundError
    without the package or its weights: in torch.hub's folder, else downloaded."""
    try:
        from dreamsim import dreamsim
        folder = Path(torch.hub.get_dir(), "dreamsim")
        folder.mkdir(parents=True, exist_ok=True)
        network, _ = dreamsim(pretrained=True, device=str(device), cache_dir=str(folder))
    except Exception as error:  # noqa: BLE001 no package, no network, an incomplete folder
        raise FileNotFoundError(f"needs the dreamsim package and its weights: pip install dreamsim ({error})") from None
    return lambda *pair: network(*(F.interpolate((x + 1) / 2, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
                                   for x in pair))


def load_networks(args, size, device, world):
    """({metric: distance}, {metric: features}, {metric: reason why it is unavailable}); the same in all processes.

    A file the user named must exist; one that was merely not found makes its metric unavailable.
    """
    if "dinov2" in args.features:
        import_torchvision()  # timm imports it
    inception, dinov2, *weights = map(local_file, [args.inception, args.dinov2, *(args.lpips_weights or [])])
    wanted = {f"lpips_{net}": (lambda net=net, file=file: LPIPSLoss(net=net, weights=file).to(device).eval(), file)
              for net, file in zip(args.lpips_net, weights or [None] * len(args.lpips_net), strict=True)}
    wanted |= {"dreamsim": (lambda: dreamsim_distance(device), None)} if args.dreamsim else {}
    wanted |= {metric_of(name): (lambda name=name: load_features(name, inception, dinov2, size).to(device).eval(),
                                 {"inception": inception, "dinov2": dinov2}.get(name, name)) for name in args.features}
    networks, unavailable = {}, {}
    for metric, (build, given) in wanted.items():
        least = {"lpips_vgg": 16, "lpips_alex": 32}.get(metric, 0)
        reasons = [f"the network needs images of at least {least} px" if size < least else None]
        if reasons == [None]:
            try:
                networks[metric] = build()
            except (FileNotFoundError, ImportError) as error:
                if given:
                    raise
                reasons = [" ".join(str(error).split())]
        if world > 1:
            reason, reasons = reasons[0], [None] * world
            dist.all_gather_object(reasons, reason)
        if any(reasons):
            unavailable[metric] = next(filter(None, reasons))
            networks.pop(metric, None)
    features = {metric: networks.pop(metric) for metric in map(metric_of, args.features) if metric in networks}
    return networks, features, unavailable


def metric_of(features):
    """Key of the Frechet distance in a row: rfid, fd_dinov2, fd_<file stem>."""
    return {"inception": "rfid", "dinov2": "fd_dinov2"}.get(features) or f"fd_{Path(features).stem}"


def setup(device=None):
    """(rank, world, device). Under torchrun joins the process group: nccl on GPUs, gloo otherwise.
    One process needs no launcher.

    device  "cuda", "mps" or "cpu"; None: the first that is there. ValueError where there is no such device.
    """
    rank, world, local = (int(os.environ.get(key, default)) for key, default in (("RANK", "0"), ("WORLD_SIZE", "1"),
                                                                                 ("LOCAL_RANK", "0")))
    name = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device("cuda", local) if name == "cuda" else torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {name}: there is no such device here") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    keep_freed_memory(True)
    if world > 1 and not dist.is_initialized():
        # Keys of its own for each restart by torchrun: the store may still hold the addresses of the processes before.
        store = dist.PrefixStore(f"restart{os.environ.get('TORCHELASTIC_RESTART_COUNT')}",
                                 next(dist.rendezvous("env://"))[0])
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world)
    return rank, world, device


def keep_freed_memory(keep):
    """Linux (mallopt): let freed memory stay with the process. On CPUs, fetching pages from the system again for every
    large map costs more time than computing on it; but the gaps between maps of gigabytes cost memory: False gives
    those back."""
    with contextlib.suppress(OSError, AttributeError):  # glibc: M_MMAP_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        for option, value in (-4, 0 if keep else 65536), (-3, 2**25), (-1, 2**31 - 1):
            ctypes.CDLL("libc.so.6").mallopt(option, value)


def guarded(main):
    """Call main(); what the user can mend ends in one sentence and exit code 1, not in a traceback
    (TRACEBACK=1 shows it)."""
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        sys.exit(f"error: {error}" if os.environ.get("RANK", "0") == "0" else 1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def cached_originals(args, dataset, size, features):
    """{metric: path of the .npz in --cache for the statistics of these originals, prepared in this way}.

    The key holds names, sizes and times of all files, or the pixels, and the first prepared image, so that neither a
    changed data set nor a changed preparation is taken for the old one.
    """
    on_disk = dataset.images.dtype.kind == "S"  # file names, not pixels
    files = [(os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in (dataset.images if on_disk else [])]
    first = dataset[0] and dataset[0][0].numpy().tobytes()
    key = (hashlib.sha256(dataset.images.tobytes()).hexdigest(), files, first, args.data, size, args.crop)
    keys = {metric: hashlib.sha256(repr((key, network.sha256)).encode()) for metric, network in features.items()}
    return {metric: Path(args.cache).expanduser() / f"fid-{key.hexdigest()[:20]}.npz" for metric, key in keys.items()}


# ---------------------------------------------------------------------------------------------------------------------
# --sweep: quality against compute

def calibrate(model, counts, measure):
    """Options of least squared error for every sampler and number of steps: {(sampler, n): (PSNR, options)}.

    measure  {name: (n, options)} -> rows of `evaluate` on calibration images
    FM: Euler's t_shift. EqM: gradient descent's eta, Nesterov's eta and mu. The default of eta or t_shift is scaled by
    2^(0, 1, -1, -2, -4), for every mu; then the best by 2^(1, 1/2, 1/4, 1/8) up and down, keeping what is better.
    """
    fm, best = model.config["loss"] == "fm", {}
    scaled, samplers = ("t_shift", {"euler": [{}]}) if fm else ("eta", {
        "gd": [{"method": "gd"}], "nesterov": [{"method": "nesterov", "mu": mu} for mu in (0.3, 0.6, 0.9)]})
    for step in (None, 1, 1 / 2, 1 / 4, 1 / 8):
        runs = {}
        for key in itertools.product(samplers, counts):
            start = [o | {scaled: 4.0 if fm else model.default_eta(key[1])} for o in samplers[key[0]]]
            around, powers = (start, (0, 1, -1, -2, -4)) if step is None else ([best[key][1]], (-step, step))
            for i, (o, k) in enumerate(itertools.product(around, powers)):
                runs[key, i] = key[1], o | {scaled: o[scaled] * 2.0**k}
        for ((key, _), (_, options)), row in zip(runs.items(), measure(runs), strict=True):
            score = max(-math.inf, row["psnr_pooled"])  # NaN, where a run diverged, is the worst
            if key not in best or score > best[key][0]:
                best[key] = score, options
    return best


def sweep_runs(best):
    """`evaluate`'s steps from what calibrate found; for EqM also the adaptive stop, with the best options of the
    largest number of steps."""
    runs, most = [(*key, options) for key, (_, options) in best.items()], max(n for _, n in best)
    sampler = max((s for s, n in best if n == most), key=lambda s: best[s, most][0])
    if sampler != "euler":
        runs += [(f"adaptive {sampler}", most, best[sampler, most][1] | {"tol": tol}) for tol in (0.2, 0.1, 0.05, 0.02)]
    return {" ".join([f"{name} {n}", *(f"{k} {v:.3g}" for k, v in options.items() if k != "method")]): (n, options)
            for name, n, options in runs}


def sweep_answers(rows):
    """Sentences from a sweep's rows: who needs how many evaluations for one quality, and what the stop saves."""
    curves, adaptive = {}, [row for row in rows if "tol" in row]
    for row in rows[1:]:
        curves.setdefault(row.get("method", "euler"), []).extend([row] * ("tol" not in row))

    def fewest(key, aim, sign):  # sign -1: less is better
        return ", ".join(f"{name} {min((r['steps'] for r in curve if sign * r[key] >= sign * aim), default='never')}"
                         for name, curve in curves.items())

    last = next(iter(curves.values()))[-1]  # EqM: gradient descent's
    for key, sign, label, aim in (("psnr", 1, "PSNR within 0.1 dB", lambda v: v - 0.1),
                                  ("hf", 1, "HF ratio at least 95 %", lambda v: 0.95 * v),
                                  ("lpips_vgg", -1, "LPIPS vgg within 2 %", lambda v: 1.02 * v)):
        if last.get(key) is not None:
            best = max(itertools.chain(*curves.values()), key=lambda row, key=key, sign=sign: sign * row[key])
            for name, value in {row["name"]: row[key] for row in (best, last)}.items():
                yield f"{label} of {name} ({value:.4g}), fewest evaluations: {fewest(key, aim(value), sign)}"
    if adaptive:
        full = curves[adaptive[0]["method"]][-1]
        row = min([full, *(r for r in adaptive if r["psnr"] >= full["psnr"] - 0.1)], key=lambda row: row["nfe"])
        stop = f"at tol {row['tol']:g}" if row is not full else "at no tol"
        yield (f"adaptive stop, within 0.1 dB of {full['name']} ({full['psnr']:.2f} dB): saves evaluations {stop}: "
               f"{row['nfe']:.1f} for {row['psnr']:.2f} dB, {1 - row['nfe'] / full['nfe']:.0%} fewer; within 0.1 dB of "
               f"that at fixed numbers: {fewest('psnr', row['psnr'] - 0.1, 1)}")


def plot_sweep(rows, path):
    """PNG: quality against network evaluations, one curve a sampler, the baseline dashed."""
    from matplotlib.figure import Figure
    labels = {"psnr": "PSNR, dB", "hf": "HF ratio", "lpips_vgg": "LPIPS vgg", "rfid": "rFID"}
    labels = {key: label for key, label in labels.items() if rows[0].get(key) is not None}
    figure = Figure(figsize=(4.5 * len(labels), 4), layout="constrained")
    for axis, (key, label) in zip(figure.subplots(1, len(labels), squeeze=False)[0], labels.items(), strict=True):
        for name, curve in itertools.groupby(rows[1:], lambda r: "adaptive " * ("tol" in r) + r.get("method", "euler")):
            axis.plot(*zip(*((row["nfe"], row[key]) for row in curve), strict=True), marker="o", label=name)
        axis.axhline(rows[0][key], color="grey", linestyle="--", label=rows[0]["name"])
        axis.set(xlabel="network evaluations an image", ylabel=label, xscale="log")
    axis.legend()
    figure.savefig(path, dpi=150)


# ---------------------------------------------------------------------------------------------------------------------
# --compare: runs, without their models; --field: one image

def read_run(folder):
    """A run: a dict of images and rows as in its metrics.json, with "gain" (dB) and "minutes" of training; "curves" of
    log.jsonl: loss and one-step gain, [(images seen, value)]. ValueError: no readable run."""
    path = Path(folder, "log.jsonl")
    try:
        log = [json.loads(line) for line in re.findall(".*\n", path.read_text())] if path.exists() else []
        lines = [line for line in log if "images_per_s" in line]
        seconds = sum((line["images"] - last["images"]) / line["images_per_s"]
                      for last, line in itertools.pairwise([{"images": 0}, *lines]))
        batch = lines[-1]["images"] // lines[-1]["step"] if lines else 0
        curves = [(line["images"], line["eqm" if "eqm" in line else "fm"]) for line in lines], [
            (line["step"] * batch, row["psnr"] - line["eval"][0]["psnr"])
            for line in log for row in line.get("eval", ()) if row["steps"] == 1]
        path = Path(folder, "metrics.json")
        run = json.loads(path.read_text())
        first, *rows = run["rows"]
        rows = [row | {"gain": row["psnr"] - first["psnr"], "minutes": seconds / 60 or None} for row in rows]
        return {"images": run["images"], "rows": [first, *rows], "curves": curves}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"--compare cannot read {path} ({type(error).__name__}: {error})") from None


def compare(folders, plot, out):
    """--compare: means +- standard errors over runs whose folders differ only in _s<seed>; with `plot` curves.png, a
    colour for each group: loss (running mean of 10 lines of the log) and one-step gain in training."""
    groups, rows, table = {}, {}, []
    for folder in dict.fromkeys(map(Path, folders)):
        groups.setdefault(re.sub(r"_s\d+$", "", str(folder)), []).append(read_run(folder))
    runs = [run for members in groups.values() for run in members]
    one = len({(run["rows"][0]["name"], round(run["rows"][0]["psnr"], 2)) for run in runs}) == 1  # baseline for all
    for group, row in [(group, row) for group, members in groups.items() for run in members for row in run["rows"]]:
        rows.setdefault(row["name"] if one and "gain" not in row else f"{group}, {row['name']}", []).append(row)
    for name, members in rows.items():
        table.append({"name": name, "runs": len(members)})
        for key in members[0]:
            values = [row.get(key) for row in members]
            if re.fullmatch("gain|psnr|ssim|hf|lpips_.{3,4}|dreamsim|rfid|fd_.*|minutes", key) and None not in values:
                table[-1][key], table[-1][key + "_se"] = mean_and_error(torch.tensor(values, dtype=torch.float64))
    images = sorted({run["images"] for run in runs})
    print_table({"rows": table, "images": images[0], "protocol": f"{' or '.join(map(str, images))} images; +- standard "
                 "error over runs with different seeds; minutes of training without its evaluations"})
    if not plot:
        return
    if not any(any(run["curves"]) for run in runs):
        raise ValueError("--plot needs a log.jsonl in one of the folders")
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 4), layout="constrained")
    labels = (10, "", "log", "loss (fm, eqm)"), (1, ".", "linear", "one step: PSNR gain over the baseline, dB")
    for axis, panel, (width, marker, scale, label) in zip(figure.subplots(1, 2), (0, 1), labels, strict=True):
        for k, (group, members) in enumerate(groups.items()):
            axis.plot([], [], f"C{k}", label=group)
            for run in members:
                x, y = np.array(run["curves"][panel], dtype=float).reshape(-1, 2).T
                y = [y[max(0, i - width):i].mean() for i in range(1, len(y) + 1)]
                axis.plot(x, y, f"C{k}", linewidth=0.8, marker=marker)
        axis.set(xlabel="images seen", ylabel=label, yscale=scale)
    axis.legend()
    Path(out).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(out, "curves.png"), dpi=150)
    print(f"wrote curves.png to {out}")


@torch.no_grad()
def show_field(model, dataset, i, seed, device, out):
    """--field: field.png of image i, and a line of numbers for each column. Rows: the image noised, from noise to data;
    the one-step estimate from each; the field there, 0 is grey, over twice its rms at the noise; the sampler's path."""
    if not 0 <= i < len(dataset) or dataset[i] is None:
        raise ValueError(f"--field {i}: {dataset.name} has no readable image of this number, of {len(dataset)}")
    x, cfg, counts, path = dataset[i][0][None].to(device), model.config, (0, 1, 2, 4, 8, 16), []
    e, z, t = image_noise(seed, [i], x.shape[1:]).to(device), model.encode(x).mode(), torch.linspace(1, 0, 6).to(device)
    x_t, fm = fm_mix(x, e, t), cfg["loss"] == "fm"                                             # (6, 3, H, W); g = 1 - t
    f = model.decoder(x_t, z.expand(6, -1, -1, -1), *[t] * fm).float()
    if fm:
        estimate, steps = fm_predict_x(x_t, f, t), "of 16 Euler steps"
        last, _ = euler(lambda x, z, t: path.append(x) or model.decoder(x, z, t), e, z, 16)
        path = [[*path, last][k] for k in counts]
    else:
        estimate, steps = EqM(cfg["c"], cfg["a"], cfg["b"], cfg["lam"]).predict_x(x_t, f, 1 - t), "Nesterov steps"
        options = {"method": "nesterov", "mu": 0.3, "eta": 0.3 / model.field_at_noise}
        path = [e] + [model.sample(z, k, e, **options)[0] for k in counts[1:]]
    rms, path, big = f.square().mean((1, 2, 3)).sqrt(), torch.cat(path), math.ceil(96 / min(x.shape[2:]))
    for j, k in enumerate(counts):
        a, b = (psnr((to8bit(y[j]) - to8bit(x[0])).square().mean()) for y in (estimate, path))
        print(f"{f't = {t[j]:.1f}' if fm else f'g = {1 - t[j]:.1f}'}: estimate {a:.2f} dB, field rms {rms[j]:.4f}; "
              f"after {k} {steps} {b:.2f} dB")
    out.mkdir(parents=True, exist_ok=True)
    save_grid(out / "field.png", [F.interpolate(y, scale_factor=big) for y in (x_t, estimate, f / rms[0] / 2, path)])
    print(f"wrote field.png to {out}")


# ---------------------------------------------------------------------------------------------------------------------
# --images, --latents and --z_stats

@torch.no_grad()
def reconstruct_images(model, args, options, device, out):
    """--images: FILE.reconstruction.png in `out` (original, reconstruction, error x 4) and a line for each. ValueError
    in the end, with the files that are no images."""
    bad, unit, steps = [], max(8, model.downscale), args.steps[0]  # reconstruct pads to multiples of `unit`
    if len({Path(path).name for path in args.images}) < len(args.images):
        raise ValueError("--images holds two files of one name: so would their results")
    out.mkdir(parents=True, exist_ok=True)
    for i, path in enumerate(args.images):
        try:
            with Image.open(path) as image:
                x = torch.from_numpy(np.array(to_rgb(image))).to(device).permute(2, 0, 1)[None] / 127.5 - 1
        except Exception as error:  # noqa: BLE001 PIL has no common type, see data.py
            bad.append(f"{path} ({' '.join(str(error).split())})")
            continue
        start, (height, width) = now(device), x.shape[2:]
        keep_freed_memory(height * width <= 1024**2)
        y = model.reconstruct(x, steps, generator=seeded_generator("cpu", args.seed, i), **options)
        seconds, x, y = now(device) - start, to8bit(x), to8bit(y)
        save_grid(out / f"{Path(path).name}.reconstruction.png", [torch.cat([x, y, 4 * (x - y).abs() - 1])])
        c, h, w = model.encoder.z_dim, *(math.ceil(side / unit) * unit // model.downscale for side in (height, width))
        sizes = 3 * height * width, 2 * c * h * w  # bytes: 8-bit pixels, 16-bit latents
        print(f"{path}: {width} x {height}, PSNR {psnr((x - y).square().mean()):.2f} dB, SSIM {ssim(x, y).item():.4f}, "
              f"latent {c} x {h} x {w} of 16 bit, {sizes[0]} : {sizes[1]} bytes = {sizes[0] / sizes[1]:.1f}, "
              f"{seconds:.2f} s for encoding and {steps} step{'s' * (steps > 1)}")
    if bad:
        raise ValueError(f"{len(bad)} of {len(args.images)} --images could not be read: {', '.join(bad)}")


@torch.no_grad()
def store_latents(model, dataset, device, rank, world, args):
    """--latents: shard k holds the images k * --shard ... of the data set; process k % world writes it. --z_stats: only
    mean and standard deviation of posterior samples, into the model's file.

    latents_K.npy  (n, c, h, w) float16, with --flip (n, 2, c, h, w), the second of the mirrored image
    labels_K.npy   (n,) int64, -1: no class; images that cannot be read are left out of both
    manifest.json  what is encoded; when all is done also shards, mean and standard deviation
    Files appear whole; a shard that is there is kept. ValueError: another content in the folder, or beyond float16.
    """
    folder, side, size = Path(args.latents or "."), dataset.size // model.downscale, args.shard
    manifest, shape = folder / "manifest.json", [2] * args.flip + [model.encoder.z_dim, side, side]
    what = {"model_sha256": hashlib.sha256(Path(local_file(args.ckpt)).read_bytes()).hexdigest(), "data": args.data,
            "part": args.part, "size": dataset.size, "crop": args.crop, "images": len(dataset), "shard": size,
            "images_sha256": hashlib.sha256(dataset.images.tobytes()).hexdigest(), "shape": shape, "dtype": "float16",
            "computed_in": args.dtype,
            "values": f"sample, seed {args.seed}" if args.latents_sample or args.z_stats else "mean"}
    if args.latents:
        folder.mkdir(parents=True, exist_ok=True)
        found = json.loads(manifest.read_text()) if manifest.is_file() else what
        if changed := [key for key in what if found.get(key) != what[key]]:
            raise ValueError(f"{folder} holds latents of another {', '.join(changed)}: give --latents another folder")
        if world > 1:
            dist.barrier()  # all have read it
        if rank == 0 and found is what:
            write_whole(manifest, json.dumps(what, indent=1))

    def encode(x, index):
        x, noise = x.to(device), image_noise(args.seed, index, (1 + args.flip, *shape[-3:])).to(device)
        posteriors = [model.encode(v) for v in ([x, x.flip(3)] if args.flip else [x])]
        z = [p.mode() if what["values"] == "mean" else p.sample(noise[:, k]) for k, p in enumerate(posteriors)]
        z = torch.stack(z, 1).squeeze(1).float().cpu()                                             # (b, [2,] c, h, w)
        if args.latents and not z.abs().max() <= 65504:
            raise ValueError(f"a latent reaches {z.abs().max():.4g}, and float16 ends at 65504")
        return z.half() if args.latents else z

    def moments(k):  # of shard k, encoded if it is not there: number of images; number, sum, sum of squares by channel
        path, part = folder / f"latents_{k:05d}.npy", dataset.subset(slice(k * size, (k + 1) * size))
        if args.latents and path.exists():
            z = torch.from_numpy(np.load(path))
        else:
            loader = torch.utils.data.DataLoader(part, args.batch_size, collate_fn=collate, num_workers=args.workers)
            done = [(encode(x, index + k * size), index) for x, index in loader if len(x)]
            z = torch.cat([z for z, _ in done] or [torch.zeros(0, *shape).half()])
            if args.latents:
                index = [i for _, index in done for i in index.tolist()]
                write_whole(folder / f"labels_{k:05d}.npy", part.labels[index])
                write_whole(path, z.numpy())
        v = z.double().flatten(0, -4).transpose(0, 1).flatten(1)                                   # (c, n h w)
        return len(z), torch.stack([v.new_full((len(v),), v.shape[1]), v.sum(1), v.square().sum(1)])

    found, problem = {}, None
    try:
        for k in tqdm(range(rank, math.ceil(len(dataset) / size), world), unit="shard", disable=rank > 0):
            found[k] = moments(k)
    except (ValueError, OSError) as error:
        if world == 1:
            raise
        problem = str(error)
    parts = [(found, problem)] * world
    if world > 1:
        dist.all_gather_object(parts, (found, problem))
    if problem := next((problem for _, problem in parts if problem), None):
        raise ValueError(problem)  # in all processes, whoever met it
    found = dict(sorted(item for part, _ in parts for item in part.items()))
    sums = sum(sums for _, sums in found.values())  # shard by shard: the same for any number of processes
    if not sums.any():
        raise dataset.nothing_readable()
    if rank > 0:
        return
    n, mean, square = torch.cat([sums, sums.sum(1, keepdim=True)], 1)  # the last of all channels
    mean, square = mean / n, square / n
    (*means, mean_all), (*stds, std_all) = mean.tolist(), (square - mean.square()).clamp(min=0).sqrt().tolist()
    result = {"mean": means, "std": stds, "mean_all": mean_all, "std_all": std_all, "values_per_channel": int(n[0])}
    if args.latents:
        path, shards = manifest, [{"latents": f"latents_{k:05d}.npy", "labels": f"labels_{k:05d}.npy", "count": count}
                                  for k, (count, _) in found.items() if count]
        write_whole(path, json.dumps(what | {"shards": shards} | result, indent=1))
    else:
        path = args.ckpt if "config" in read_weights(args.ckpt)[1] else Path(args.out or ".", "model.safetensors")
        model.config["latents"] = result | {"data": args.data}
        model.save(path)
    print(f"latents of {sum(count for count, _ in found.values())} of {len(dataset)} images of {args.data} "
          f"({what['values']}): mean {mean_all:.4f}, standard deviation {std_all:.4f}, per channel {min(stds):.4f} to "
          f"{max(stds):.4f}; stored in {path}")


# ---------------------------------------------------------------------------------------------------------------------
# --bench: speed. Random weights, interleaved rounds, medians; ratios are taken within the rounds.

def interleaved(runs, device, rounds=7):
    """{name: callable} -> {name: (rounds,) seconds}, each called once before, then in turn."""
    for run in runs.values():
        run()
    seconds = {name: [] for name in runs}
    for _, (name, run) in itertools.product(range(rounds), runs.items()):
        start = now(device)
        run()
        seconds[name].append(now(device) - start)
    return {name: np.array(value) for name, value in seconds.items()}


def peak_memory(run, device):
    """Bytes that one call allocates at the same time at most, beside what is there already (weights)."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max(initial=0))


def product_rate(dtype, device):
    """FLOP/s of the fastest of a matrix product and 1x1 and 3x3 convolutions: on CPUs their libraries differ."""
    n, c = (8192, 512) if device.type == "cuda" else (1536, 192)
    a, x = torch.randn(n, n, dtype=dtype, device=device), torch.randn(4, c, 64, 64, dtype=dtype, device=device)
    x, rates = x.to(memory_format=torch.channels_last), []
    for k in (0, 1, 3):
        w = torch.randn(c, c, k or 1, k or 1, dtype=dtype, device=device).to(memory_format=torch.channels_last)
        run = (lambda w=w, k=k: F.conv2d(x, w, padding=k // 2)) if k else (lambda: a @ a)
        rates.append((2 * x.numel() * c * k * k if k else 2 * n**3) / interleaved({0: run}, device, 20)[0].min())
    return max(rates)


def print_bench(title, runs, models, rate, device, batch, reference, compile):
    """Time {name: callable}, eager and, with `compile`, compiled, whichever is faster, and print a line for each."""
    def compiled(run):  # the callables are methods or lambdas of one network call
        return torch.compile(run, mode="max-autotune-no-cudagraphs" if device.type == "cuda" else None)

    every = {(name, False): run for name, run in runs.items()}
    every |= {(name, True): compiled(run) for name, run in runs.items()} if compile else {}
    seconds = interleaved(every, device)
    best = {name: min((k for k in seconds if k[0] == name), key=lambda k: np.median(seconds[k])) for name in runs}
    print(f"{title:36s} {'params':>8s} {'GFLOP':>8s} {'ms':>9s} {'images/s':>9s} {'of peak':>8s} {'MiB':>8s}")
    for name, key in best.items():
        with FlopCounterMode(display=False) as counter:
            runs[name]()
        flop, median = counter.get_total_flops(), float(np.median(seconds[key]))
        size = sum(p.numel() for p in models[name].parameters()) / 1e6
        ratio = f"  {float(np.median(seconds[best[reference]] / seconds[key])):.2f} x {reference}" if reference else ""
        print(f"{name + ' compiled' * key[1]:36s} {size:6.1f} M {flop / 1e9:8.1f} {1000 * median:9.1f} "
              f"{batch / median:9.2f} {flop / median / rate:8.0%} {peak_memory(runs[name], device) / 2**20:8.0f}"
              + ratio, flush=True)


def peers():
    """{name: diffusers' autoencoder with random weights}: SD's KL-VAE and DC-AE f32c32; empty without diffusers."""
    if importlib.util.find_spec("diffusers") is None:
        return {}
    from diffusers import AutoencoderDC, AutoencoderKL
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    return {"KL-VAE": AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
                                    down_block_types=down, up_block_types=up),
            "DC-AE f32c32": AutoencoderDC(
                encoder_block_types=blocks, decoder_block_types=blocks, encoder_layers_per_block=(0, 4, 8, 2, 2, 2),
                decoder_layers_per_block=(0, 5, 10, 2, 2, 2), encoder_qkv_multiscales=((),) * 6,
                decoder_qkv_multiscales=((),) * 6, decoder_norm_types=("batch_norm",) * 3 + ("rms_norm",) * 3,
                decoder_act_fns=("relu",) * 3 + ("silu",) * 3)}


def bench(args, device):
    """Decoding (one step), encoding, one training step, and the loader; see --bench."""
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else platform.processor() or 'CPU'}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, batch {args.batch_size}, channels_last")
    dtypes = [torch.float32 if name == "float32" else torch.bfloat16 for name in args.dtype]
    others = peers() if {"decode", "encode"} & set(args.bench) else {}
    for what, dtype, size in itertools.product(("decode", "encode"), dtypes, args.size):
        if what not in args.bench:
            continue
        def place(t, dtype=dtype):
            return t.to(device, dtype, memory_format=torch.channels_last)

        runs, models, rate = {}, {}, product_rate(dtype, device)
        image = place(torch.randn(args.batch_size, 3, size, size))
        for name, peer in others.items():
            peer, models[name] = place(peer).eval(), peer.decoder if what == "decode" else peer.encoder
            f, c = (8, 4) if name == "KL-VAE" else (32, 32)
            z = place(torch.randn(args.batch_size, c, size // f, size // f))
            runs[name] = ((lambda peer=peer, z=z: peer.decode(z).sample) if what == "decode" else
                          (lambda peer=peer, image=image: peer.encode(image)[0]))
        for dec in args.dec if what == "decode" else [None]:
            model = place(DCSSDAE(args.enc, dec or "XS", args.loss, 0.125 if dec else 1.0)).eval()
            name = f"U-ViT {dec} {args.enc}" if dec else args.enc
            models[name] = model.decoder if dec else model.encoder
            z = place(torch.randn(args.batch_size, model.encoder.z_dim, *[size // model.downscale] * 2))
            runs[name] = ((lambda model=model, z=z, image=image: model.decode(z, 1, image)) if dec else
                          (lambda model=model, image=image: model.encode(image).mean))
        with torch.no_grad():
            print_bench(f"{what}, {size} px, {str(dtype)[6:]}, {rate / 1e12:.2f} TFLOP/s", runs, models, rate, device,
                        args.batch_size, "KL-VAE" if others else None, args.compile)
    if "train" in args.bench:
        import_torchvision()
        from torchvision.models import vgg16
        with tempfile.TemporaryDirectory() as folder:  # LPIPS costs the same with random weights
            torch.save(vgg16(weights=None).state_dict(), f"{folder}/vgg.pt")
            lpips = LPIPSLoss("vgg", f"{folder}/vgg.pt").to(device)
        for dtype, size in itertools.product(dtypes, args.size):
            runs, models, rate = {}, {}, product_rate(dtype, device)
            for dec, loss, perceptual in itertools.product(args.dec, ("fm", "eqm"), (None, lpips)):
                name = f"U-ViT {dec} {loss}{' + LPIPS' if perceptual else ''}"
                model = models[name] = DCSSDAE(args.enc, dec, loss, args.enc_width)
                model.to(device, memory_format=torch.channels_last).decoder.checkpointing = args.checkpointing
                runs[name] = training_step(model, perceptual, args.batch_size, size, dtype, device)
            title = f"training step, {size} px, {str(dtype)[6:]}, {rate / 1e12:.2f} TFLOP/s"
            print_bench(title, runs, models, rate, device, args.batch_size, None, False)
    if "input" in args.bench:
        bench_input()


def training_step(model, lpips, batch, size, dtype, device):
    """One step of train.py on a random batch, without its data and bookkeeping: a callable."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x, e = (torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last) for _ in range(2))
    s, eqm = torch.rand(batch, device=device), None if model.config["loss"] == "fm" else EqM()

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
            posterior = model.encode(x)
            x_s = eqm.mix(x, e, s) if eqm else fm_mix(x, e, s)
            field = model.decoder(x_s, posterior.sample(), *([] if eqm else [s]))
            loss = (eqm_loss(field, x, e, s, eqm) if eqm else fm_loss(field, x, e)) + 1e-6 * kl_loss(posterior)
            estimate = (eqm.predict_x if eqm else fm_predict_x)(x_s, field.float(), s)
            loss = loss + (0.5 * lpips(x, estimate).mean() if lpips else 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def bench_input():
    """Images/s of one process that prepares JPEG files for training at 128 px, beside torchvision's ImageFolder."""
    import_torchvision()
    from torchvision import datasets
    from torchvision import transforms as T
    for width, height in ((500, 375), (2000, 1500)):
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "class").mkdir()
            rng = np.random.default_rng(0)
            for i in range(16):  # smooth colours with some grain: about as many bytes a pixel as photographs
                noise = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8))
                noise.resize((width, height), Image.BICUBIC).save(Path(folder, "class", f"{i}.jpg"), quality=90)
            plain = T.Compose([T.Lambda(lambda image: T.functional.resize(image, int(128 * (1 + random.random())))),
                               T.RandomCrop(128), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize((0.5,), (0.5,))])
            theirs, ours = datasets.ImageFolder(folder, plain), make_dataset(folder, 128, train=True, aug_scale=2.0)
            seconds = interleaved({name: lambda data=data: [data[i] for i in range(16)]
                                   for name, data in (("ImageFolder", theirs), ("ours", ours))}, torch.device("cpu"))
            rates = {name: 16 / float(np.median(t)) for name, t in seconds.items()}
            ratio = float(np.median(seconds["ImageFolder"] / seconds["ours"]))
            print(f"input, JPEG {width} x {height} to 128 px, one process: "
                  + ", ".join(f"{name} {rate:.0f} images/s" for name, rate in rates.items()) + f", {ratio:.2f} x")


# ---------------------------------------------------------------------------------------------------------------------
def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", help="model.safetensors written by train.py or distill.py; needed but for --bench and --compare")
    add("--out", help="folder of what is written; default: the checkpoint's; --compare: this one")
    add("--device", help="default: cuda, mps or cpu, the first that is there")
    add("--dtype", choices=["float32", "bf16"], nargs="+", default=["float32"], help="of encoder and decoder, weights "
        "and maps; several only with --bench [float32]")
    add("--batch_size", type=int, help="images at a time in each process [32; 1 with --bench]")
    add("--workers", type=int, default=2, help="processes that read images [%(default)s]")
    add("--seed", type=int, default=0, help="of the decoder's noise and of posterior samples [%(default)s]")
    add = parser.add_argument_group("data").add_argument
    add("--data", default="demo", help="demo, imagenette, cifar10 or a folder [%(default)s]")
    add("--part", choices=["train", "val"], help="part of the data; default: train for --latents, else val")
    add("--size", type=int, nargs="+", help="image side in pixels; several only with --bench; default: the training "
        "size, else 256")
    add("--crop", choices=["center", "adm"], default="center", help="short side, centre crop; or DC-AE's [%(default)s]")
    add("--limit", type=int, help="N images, evenly spread over the data; default: all")
    add = parser.add_argument_group("sampler").add_argument
    add("--steps", type=int, nargs="+", default=[1], help="numbers of decoding steps, one row each [%(default)s]")
    add("--sampler", choices=["euler", "gd", "nesterov"], help="default: euler for FM, gd (nesterov with --mu) for EqM")
    add("--eta", type=float, help="EqM: step size; default: chosen from the number of steps")
    add("--mu", type=float, help="EqM: Nesterov momentum; default: the sampler's")
    add("--tol", type=float, help="EqM: a sample stops once rms(field) / lam is below; default: never")
    add("--t_shift", type=float, help="FM: exponent of the time grid; default: the sampler's")
    add = parser.add_argument_group("metrics that need a network").add_argument
    add("--lpips_net", nargs="+", choices=["vgg", "alex"], help="default: both; vgg with one --lpips_weights")
    add("--lpips_weights", nargs="+", metavar="FILE", help="ImageNet weights, one file for each --lpips_net")
    add("--dreamsim", action="store_true", help="also DreamSim, where that package is installed")
    add("--features", nargs="*", default=["inception"], metavar="F", help="of Frechet distances: inception (rFID), "
        "dinov2 (FD-DINOv2), TorchScript files that map (B, 3, H, W) in [-1, 1] to (B, D) [inception]")
    add("--inception", metavar="FILE", help="FID's Inception weights; default: torch.hub's cache or download")
    add("--dinov2", metavar="FILE", help="DINOv2 ViT-L/14 weights; default: torch.hub's cache or download")
    add("--cache", default="~/.cache/dc-ssdae", help="folder for originals' statistics; '' for none [%(default)s]")
    group = parser.add_argument_group("other tasks")
    add, task = group.add_argument, group.add_mutually_exclusive_group().add_argument
    task("--sweep", type=int, nargs="*", metavar="N", help="compare samplers over numbers of steps [1 2 3 4 8 16 25], "
         "each with its best step size; sweep.csv")
    add("--calibrate", type=int, default=64, help="--sweep: choose step sizes by squared error on N images, at most "
        "half of all; the others are evaluated [%(default)s]")
    add("--plot", action="store_true", help="--sweep: also sweep.png; --compare: curves.png (needs matplotlib)")
    task("--compare", nargs="+", metavar="RUN", help="table of folders with metrics.json, means over those that differ "
         "only in _s<seed>")
    task("--field", type=int, nargs="?", const=0, metavar="I", help="field.png: image I of the data [0] noised at six "
         "levels, one-step estimates, field, sampling path")
    task("--images", nargs="+", metavar="FILE", help="reconstruct pictures of any size with the first of --steps")
    task("--latents", metavar="DIR", help="encode the data into shards, labels and manifest.json, or go on with it")
    add("--latents_sample", action="store_true", help="--latents: samples of the posterior instead of its mean")
    add("--flip", action="store_true", help="--latents: of the mirrored images as well")
    add("--shard", type=int, default=4096, help="--latents: images a shard [%(default)s]")
    task("--z_stats", action="store_true", help="measure mean and std of the latents, and store them in the model")
    add = parser.add_argument_group("speed, with random weights").add_argument
    add("--bench", nargs="*", choices=["decode", "encode", "train", "input"], help="time these [all], decoders and "
        "encoders beside diffusers' KL-VAE and DC-AE if that package is installed; with --size, --dtype, --batch_size")
    add("--dec", nargs="+", choices=list(SIZES), default=["S", "M"], help="--bench: decoder sizes [S M]")
    add("--enc", default="dc_f32c32", help="--bench: encoder, and the latents of the decoders [%(default)s]")
    add("--enc_width", type=float, default=0.125, help="--bench: encoder width in the training step [%(default)s]")
    add("--loss", choices=["fm", "eqm"], default="eqm", help="--bench: the decoder that is timed [%(default)s]")
    add("--compile", action="store_true", help="--bench: also time torch.compile, and report the faster")
    add("--checkpointing", action="store_true", help="--bench: train with activation checkpointing")
    args = parser.parse_args()
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs the matplotlib package: pip install matplotlib")
    if args.compare:
        return args
    args.batch_size = args.batch_size or (32 if args.bench is None else 1)
    if args.bench is not None:
        args.bench, args.size = args.bench or ["decode", "encode", "train", "input"], args.size or [256]
        return args
    if not args.ckpt:
        raise ValueError("--ckpt is needed: a model.safetensors written by train.py or distill.py")
    if len(args.dtype) > 1 or len(args.size or [0]) > 1:
        raise ValueError("several --dtype or --size go with --bench only")
    args.dtype, args.size = args.dtype[0], args.size and args.size[0]
    if min([args.calibrate, args.shard, args.batch_size, *args.steps, *(args.sweep or [])]) < 1:
        raise ValueError("--calibrate, --shard, --batch_size, --steps and --sweep take numbers of at least 1")
    if args.sweep is not None:
        args.sweep = sorted(set(args.sweep)) or [1, 2, 3, 4, 8, 16, 25]
    args.lpips_net = args.lpips_net or ["vgg", "alex"][:len(args.lpips_weights or "12")]
    if args.lpips_weights and len(args.lpips_weights) != len(args.lpips_net):
        raise ValueError(f"--lpips_weights needs one file for each of --lpips_net {' '.join(args.lpips_net)}")
    if len({metric_of(name) for name in args.features}) < len(args.features):
        raise ValueError(f"--features {' '.join(args.features)}: two of one name")
    return args


def main():
    args = parse_arguments()
    if args.compare:
        return compare(args.compare, args.plot, args.out or ".") if os.environ.get("RANK", "0") == "0" else None
    rank, world, device = setup(args.device)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32: no TF32 in decoder and LPIPS
    if args.bench is not None:
        return bench(args, device) if rank == 0 else None

    model = DCSSDAE.load(args.ckpt, device=device).to(memory_format=torch.channels_last)
    if args.dtype == "bf16" and not args.z_stats:  # (which stores the model)
        model.to(torch.bfloat16)
    config, size = model.config, args.size or model.config.get("notes", {}).get("size") or 256
    if size % math.lcm(model.downscale, 8):
        raise ValueError(f"--size {size} is not a multiple of {math.lcm(model.downscale, 8)}, which {config['enc']} "
                         "and the decoder need")
    keep_freed_memory(size <= 1024)
    if args.sampler and (args.sampler == "euler") != (config["loss"] == "fm"):
        raise ValueError(f"--sampler {args.sampler} does not fit a model trained with --loss {config['loss']}")
    options = {k: getattr(args, k) for k in ("eta", "mu", "tol", "t_shift") if getattr(args, k) is not None}
    options |= {"method": args.sampler} if args.sampler in ("gd", "nesterov") else {}
    if (args.sweep or args.field is not None) and options:
        raise ValueError(f"--sweep and --field choose the sampler's options themselves: leave out {', '.join(options)}")
    out = Path(args.out or Path(args.ckpt).parent)
    args.part = args.part or ("train" if args.latents else "val")
    if args.images:
        return reconstruct_images(model, args, options, device, out) if rank == 0 else None
    dataset = make_dataset(args.data, size, train=False, limit=None if args.sweep else args.limit, crop=args.crop,
                           split=args.part)
    if args.field is not None:
        return show_field(model, dataset, args.field, args.seed, device, out) if rank == 0 else None
    if args.latents or args.z_stats:
        return store_latents(model, dataset, device, rank, world, args)

    def measure(dataset, steps, seed, **more):
        loader = make_loader(dataset, args.batch_size * world, False, args.workers, rank=rank, world=world)
        return evaluate(model, loader, device, steps, options=options, seed=seed, rank=rank, world=world, **more)

    distances, features, unavailable = load_networks(args, size, device, world)
    steps, noted = list(dict.fromkeys(args.steps)), ", ".join(f"{k} {v}" for k, v in options.items()) or "defaults"
    if args.sweep:  # every (n // k)-th image calibrates; of the others, --limit are evaluated
        n, k = len(dataset), min(args.calibrate, len(dataset) // 2)
        if k == 0:
            raise ValueError(f"--sweep needs at least 2 images, {args.data} has {n}")
        held, noted = np.arange(k) * n // k, f"options of least squared error on {k} other images"
        chosen, rest, m = dataset.subset(held), np.delete(np.arange(n), held), min(args.limit or n, n - k)
        dataset = dataset.subset(rest[np.arange(m) * (n - k) // m])
        best = calibrate(model, args.sweep, lambda runs: measure(chosen, runs, args.seed + 1, pictures=0)["rows"][1:])
        steps = sweep_runs(best)
    caches = cached_originals(args, dataset, size, features) if features and args.cache else {}
    found = [{metric for metric, path in caches.items() if path.is_file()}] * world
    if world > 1:  # all processes or none: a home directory may not be shared
        dist.all_gather_object(found, found[0])
    originals = {metric: Statistics.load(caches[metric]) for metric in set.intersection(*found)}
    result = measure(dataset, steps, args.seed, distances=distances, features=features, originals=originals,
                     progress=True)
    if rank > 0:
        return

    if result["images"] < 2:
        unavailable |= dict.fromkeys(features, "a covariance needs at least 2 images")
    for metric in caches.keys() - originals.keys() - unavailable.keys():
        caches[metric].parent.mkdir(parents=True, exist_ok=True)
        result["originals"][metric].save(caches[metric])
    for row in result["rows"]:
        row.update(dict.fromkeys(unavailable))
    prepared = {"center": f"short side to {size} px (bilinear), centre crop",
                "adm": f"box halving, short side to {size} px (bicubic), centre crop (ADM)"}[args.crop]
    files = {metric_of(name): Path(name).name for name in args.features}
    result |= {"unavailable": unavailable, "arguments": vars(args), "model": config, "protocol": "; ".join([
        f"{result['images']} {args.part} images of {args.data}, {result['skipped']} unreadable", prepared,
        "clamped and rounded to 8 bit", "latent mode", f"noise seed {args.seed}", f"sampler {noted}",
        *(metric.replace("lpips_", "LPIPS 0.1 ") for metric in distances),
        *(f"{files[metric]} features sha256 {network.sha256}" for metric, network in features.items()),
        f"{args.dtype}, batches of {args.batch_size} on {world} x {device.type}"])}
    print_table(result)
    write_results(result, out)
    print(f"wrote metrics.json and reconstructions.png to {out}")
    if args.sweep:
        print(*sweep_answers(result["rows"]), sep="\n")
        keys = list(dict.fromkeys(itertools.chain(*result["rows"])))
        lines = [keys, *([row.get(key) for key in keys] for row in result["rows"])]
        text = "\n".join(",".join("" if value is None else str(value) for value in line) for line in lines)
        write_whole(out / "sweep.csv", text + "\n")
        if args.plot:
            plot_sweep(result["rows"], out / "sweep.png")
        print(f"wrote sweep.csv{' and sweep.png' * args.plot} to {out}")


if __name__ == "__main__":
    guarded(main)
