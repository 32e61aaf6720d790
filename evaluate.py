"""Reconstruction metrics of a trained autoencoder, for several numbers of decoding steps in one pass over the data.

    python evaluate.py --ckpt out/model.safetensors --data demo --limit 64 --steps 1 2 4 8
    torchrun --nproc_per_node=8 evaluate.py --ckpt F --data imagenet/ --size 256      # the same numbers, faster

All on images clamped to [-1, 1] and rounded to 8 bit, against the identically prepared originals (the protocol line):
  PSNR      dB, mean of the per-image values (as DC-AE reports); "pooled": of the mean squared error (as SSDD's code)
  SSIM      Wang et al. 2004: Gaussian window 11, sigma 1.5, R G B averaged; equals scikit-image's
  HF ratio  high-frequency energy of the reconstructions over that of the originals: 1 as sharp, below 1 blurred. Blur
            raises PSNR, so read the two together
  LPIPS     Zhang et al. 2018 (arXiv 1801.03924), VGG and AlexNet: two scales that cannot be compared
  rFID      see fid.py; biased upwards below 10,000 images
  NFE, ms   network evaluations an image; milliseconds an image of decoding, the first batch (warm-up) left out
+- is the standard error of the mean over images. The baseline row is no autoencoder at all: shrink by the model's
factor with antialiasing, enlarge bilinearly. A metric whose network cannot be had is "-", with the reason below.
"""
import argparse
import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from data import make_dataset, make_loader, save_grid
from fid import InceptionFeatures, Statistics, frechet_distance
from losses import LPIPSLoss
from model import DCSSDAE, local_file, read_weights
from sampler import seeded_generator

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
def evaluate(model, loader, device="cpu", steps=(1,), lpips=None, inception=None, options=None, seed=0,
             dtype=None, rank=0, world=1, originals=None, pictures=8, progress=False):
    """Metrics of the reconstructions decode(encode(x).mode()), for every number of steps.

    model      .encode(x).mode() -> z, .sample(z, steps, noise, **options) -> (x, nfe), .downscale; in eval mode
    loader     yields (x (b, 3, s, s) in [-1, 1], index (b,)); the part of this process, every image once in all of them
    lpips      {name: callable (x, y) -> (b,)}, or None;  inception  fid.InceptionFeatures, or None (no rFID)
    options    sampler options;  dtype  torch.bfloat16 for autocast in encoder and decoder, None for float32
    rank, world  with world > 1 all processes must call this, and all get the same result
    originals  fid.Statistics of exactly these originals, to save computing them
    Returns a dict: images, skipped (unreadable ones), rows (a dict of numbers for the baseline, then one per number of
    steps; NAME_se is NAME's standard error), pictures (rows originals, baseline, *steps of (n, 3, s, s)), originals.
    ValueError where no image can be read, or one comes twice.
    """
    device, names, lpips = torch.device(device), ["baseline", *steps], lpips or {}
    values, times, shown = {}, {n: [] for n in steps}, {}      # values: (row, metric) -> list of (b,)
    fids = {name: Statistics(inception.dim, device) for name in names} if inception else {}
    fresh = Statistics(inception.dim, device) if inception and originals is None else None
    dataset = getattr(loader, "dataset", ())
    bar = tqdm(total=math.ceil(len(dataset) / world) or None, unit="img", disable=not progress or rank > 0)
    for x, index in loader:
        if len(x) == 0:  # nothing but unreadable images in this batch
            continue
        image, noise = x.to(device), image_noise(seed, index, x.shape[1:]).to(device)
        x, outputs = to8bit(image), {"baseline": shrink_enlarge(image, model.downscale)}
        batch = {("original", "index"): index, ("original", "hf"): hf_energy(x)}
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
            z = model.encode(image).mode().float()
            for n in steps:
                start = now(device)
                outputs[n], batch[n, "nfe"] = model.sample(z, steps=n, noise=noise, **(options or {}))
                times[n].append((now(device) - start, len(x)))
        outputs = {name: to8bit(y) for name, y in outputs.items()}
        for name, y in outputs.items():
            batch[name, "mse"] = (x - y).square().mean((1, 2, 3))
            batch[name, "ssim"], batch[name, "hf"] = ssim(x, y), hf_energy(y)
            for net, distance in lpips.items():
                batch[name, f"lpips_{net}"] = distance(x, y).flatten()
            if inception:
                fids[name].update(inception(y))
        if fresh:
            fresh.update(inception(x))
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
        for statistics in [*fids.values(), *([fresh] if fresh else [])]:
            statistics.all_reduce()
    filled = [part for part, *_ in parts if part]              # a process may have had no image at all
    if not filled:
        raise ValueError("not one image could be read")
    v = {key: torch.cat([part[key] for part in filled]) for key in filled[0]}
    index, order = v["original", "index"].sort()
    if len(index.unique()) < len(index):
        raise ValueError("the loader gave an image twice")
    v = {key: value[order] for key, value in v.items()}
    originals = fresh or originals
    if inception and originals.n != len(order):
        raise ValueError(f"statistics of {originals.n} originals for {len(order)} images")

    rows = []
    for name in names:
        row = {"name": f"shrink/enlarge x {model.downscale}", "steps": 0}
        if name != "baseline":
            row = {"name": f"{name} step" + "s" * (name > 1), "steps": name}
            row["nfe"], row["nfe_se"] = mean_and_error(v[name, "nfe"])
        row["psnr"], row["psnr_se"] = mean_and_error(psnr(v[name, "mse"]))
        row["psnr_pooled"] = float(psnr(v[name, "mse"].mean()))
        row["ssim"], row["ssim_se"] = mean_and_error(v[name, "ssim"])
        row["hf"], row["hf_se"] = hf_ratio(v[name, "hf"], v["original", "hf"])
        for net in lpips:
            row[f"lpips_{net}"], row[f"lpips_{net}_se"] = mean_and_error(v[name, f"lpips_{net}"])
        if inception and len(order) > 1:
            row["rfid"] = frechet_distance(originals.mu, originals.sigma, fids[name].mu, fids[name].sigma)
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
    columns = {"name": ("", "{}"), "nfe": ("NFE", "{:.4g}"), "psnr": ("PSNR", "{:.2f}"),
               "psnr_pooled": ("pooled", "{:.2f}"), "ssim": ("SSIM", "{:.4f}"), "hf": ("HF ratio", "{:.3f}"),
               "lpips_vgg": ("LPIPS vgg", "{:.4f}"), "lpips_alex": ("LPIPS alex", "{:.4f}"),
               "rfid": ("rFID" + biased, "{:.3f}"), "ms": ("ms/image", "{:.1f}")}
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
    temporary = out / f"metrics.json.{os.getpid()}.tmp"
    text = json.dumps({k: v for k, v in result.items() if k not in ("pictures", "originals")}, indent=1)
    temporary.write_text(text + "\n")
    os.replace(temporary, out / "metrics.json")


def load_networks(nets, lpips_weights, inception_weights, size, device, world):
    """({lpips name: network}, inception or None, {metric: reason why it is unavailable}); the same in all processes.

    A file the user named must exist; one that was merely not found makes its metric unavailable.
    """
    wanted = {f"lpips_{net}": (lambda net=net, file=file: LPIPSLoss(net=net, weights=file), file)
              for net, file in zip(nets, lpips_weights or [None] * len(nets), strict=True)}
    wanted["rfid"] = (lambda: InceptionFeatures(inception_weights), inception_weights)
    networks, unavailable = {}, {}
    for name, (build, given) in wanted.items():
        least = {"lpips_vgg": 16, "lpips_alex": 32}.get(name, 0)
        reasons = [f"the network needs images of at least {least} px" if size < least else None]
        if reasons == [None]:
            try:
                networks[name] = build().to(device).eval()
            except (FileNotFoundError, ImportError) as error:
                if given:
                    raise
                reasons = [" ".join(str(error).split())]
        if world > 1:
            reason, reasons = reasons[0], [None] * world
            dist.all_gather_object(reasons, reason)
        if any(reasons):
            unavailable[name] = next(filter(None, reasons))
            networks.pop(name, None)
    inception = networks.pop("rfid", None)
    return {name.removeprefix("lpips_"): network for name, network in networks.items()}, inception, unavailable


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
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


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


@torch.no_grad()
def store_latent_moments(model, loader, device, world, args):
    """Mean and standard deviation of the latents (posterior samples), per channel and overall, into its file."""
    sums = torch.zeros(3, model.encoder.z_dim, dtype=torch.float64)  # count, sum, sum of squares
    for x, index in tqdm(loader, unit="batch", disable=int(os.environ.get("RANK", "0")) > 0):
        posterior = model.encode(x.to(device))
        noise = image_noise(args.seed, index, posterior.mean.shape[1:]).to(device)
        z = posterior.sample(noise).cpu().double()
        sums += torch.stack([torch.full_like(sums[0], z[:, 0].numel()), z.sum((0, 2, 3)), z.square().sum((0, 2, 3))])
    if world > 1:
        sums = sums.to(device if device.type == "cuda" else "cpu")
        dist.all_reduce(sums)
    n, mean, square = sums.cpu()
    std, overall = (square / n - mean.div(n).square()).clamp(min=0).sqrt(), (mean.sum() / n.sum()).item()
    model.config["latents"] = {
        "mean": mean.div(n).tolist(), "std": std.tolist(), "mean_all": overall,
        "std_all": (square.sum() / n.sum() - overall ** 2).sqrt().item(), "data": args.data,
        "values_per_channel": int(n[0])}
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    path = args.ckpt if "config" in read_weights(args.ckpt)[1] else os.path.join(args.out or ".", "model.safetensors")
    model.save(path)
    print(f"latents of {args.data}: mean {overall:.4f}, standard deviation {model.config['latents']['std_all']:.4f}, "
          f"per channel {std.min():.4f} to {std.max():.4f}; stored in {path}")


def cached_originals(folder, dataset, *protocol):
    """Path of the .npz under `folder` for the statistics of these originals, prepared in this way.

    The key holds name, size and time of every file and the pixels of the first image, so that neither a changed data
    set nor a changed preparation is taken for the old one.
    """
    on_disk = getattr(getattr(dataset.images, "dtype", None), "kind", None) == "S"  # file names, not pixels
    files = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in (dataset.images if on_disk else [])]
    first = dataset[0] and dataset[0][0].numpy().tobytes()
    key = hashlib.sha256(repr((files, len(dataset), first, protocol)).encode()).hexdigest()
    return Path(folder).expanduser() / f"fid-{key[:20]}.npz"


def main():
    parser = argparse.ArgumentParser(description="Reconstruction metrics of a trained autoencoder.")
    add = parser.add_argument
    add("--ckpt", required=True, help="model.safetensors written by train.py or distill.py")
    add("--data", default="demo", help="demo, imagenette, cifar10 or a folder; its validation part [%(default)s]")
    add("--steps", type=int, nargs="+", default=[1], help="numbers of decoding steps, one row each [%(default)s]")
    add("--sampler", choices=["euler", "gd", "nesterov"], help="default: euler for FM, gd (nesterov with --mu) for EqM")
    add("--eta", type=float, help="EqM: step size; default: chosen from the number of steps")
    add("--mu", type=float, help="EqM: Nesterov momentum; default: the sampler's")
    add("--tol", type=float, help="EqM: a sample stops once rms(field) / lam is below; default: never")
    add("--t_shift", type=float, help="FM: exponent of the time grid; default: the sampler's")
    add("--size", type=int, help="image side in pixels; default: the training size, else 256")
    add("--crop", choices=["center", "adm"], default="center", help="short side, centre crop; or DC-AE's [%(default)s]")
    add("--limit", type=int, help="N images, evenly spread over the data; default: all")
    add("--batch_size", type=int, default=32, help="images at a time in each process [%(default)s]")
    add("--workers", type=int, default=2, help="processes that read images [%(default)s]")
    add("--seed", type=int, default=0, help="of the decoder's noise [%(default)s]")
    add("--device", help="default: cuda, mps or cpu, the first that is there")
    add("--dtype", choices=["float32", "bf16"], default="float32", help="of encoder and decoder [%(default)s]")
    add("--lpips_net", nargs="+", choices=["vgg", "alex"], help="default: both; vgg with one --lpips_weights")
    add("--lpips_weights", nargs="+", metavar="FILE", help="ImageNet weights, one file for each --lpips_net")
    add("--inception", metavar="FILE", help="FID's Inception weights; default: torch.hub's cache or download")
    add("--cache", default="~/.cache/dc-ssdae", help="folder for originals' FID statistics; '' for none [%(default)s]")
    add("--z_stats", action="store_true", help="only measure the latents' mean and std, and store them in the model")
    add("--out", help="folder of metrics.json and reconstructions.png; default: the checkpoint's")
    args = parser.parse_args()
    rank, world, device = setup(args.device)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32: no TF32 in decoder and LPIPS

    model = DCSSDAE.load(args.ckpt, device=device).to(memory_format=torch.channels_last)
    config, size = model.config, args.size or model.config.get("notes", {}).get("size") or 256
    if size % math.lcm(model.downscale, 8):
        raise ValueError(f"--size {size} is not a multiple of {math.lcm(model.downscale, 8)}, which {config['enc']} "
                         "and the decoder need")
    if args.sampler and (args.sampler == "euler") != (config["loss"] == "fm"):
        raise ValueError(f"--sampler {args.sampler} does not fit a model trained with --loss {config['loss']}")
    options = {k: getattr(args, k) for k in ("eta", "mu", "tol", "t_shift") if getattr(args, k) is not None}
    options |= {"method": args.sampler} if args.sampler in ("gd", "nesterov") else {}
    nets = args.lpips_net or ["vgg", "alex"][:len(args.lpips_weights or "12")]
    if args.lpips_weights and len(args.lpips_weights) != len(nets):
        raise ValueError(f"--lpips_weights needs one file for each of --lpips_net {' '.join(nets)}")
    dataset = make_dataset(args.data, size, train=False, limit=args.limit, crop=args.crop)
    loader = make_loader(dataset, args.batch_size * world, train=False, workers=args.workers, rank=rank, world=world)
    if args.z_stats:
        return store_latent_moments(model, loader, device, world, args)
    lpips, inception, unavailable = load_networks(
        nets, [local_file(f) for f in args.lpips_weights or []], local_file(args.inception), size, device, world)

    cache, originals = None, None
    if inception and args.cache:
        cache = cached_originals(args.cache, dataset, args.data, size, args.crop, inception.sha256)
        found = [cache.is_file()] * world
        if world > 1:  # all processes or none: a home directory may not be shared
            dist.all_gather_object(found, cache.is_file())
        originals = Statistics.load(cache) if all(found) else None
    result = evaluate(model, loader, device, list(dict.fromkeys(args.steps)), lpips, inception, options, args.seed,
                      torch.bfloat16 if args.dtype == "bf16" else None, rank, world, originals, progress=True)
    if rank > 0:
        return
    if cache and originals is None and result["images"] > 1:
        cache.parent.mkdir(parents=True, exist_ok=True)
        result["originals"].save(cache)

    if inception and result["images"] < 2:
        unavailable["rfid"] = "a covariance needs at least 2 images"
    for row in result["rows"]:
        row.update(dict.fromkeys(unavailable))
    prepared = {"center": f"short side to {size} px (bilinear), centre crop",
                "adm": f"box halving, short side to {size} px (bicubic), centre crop (ADM)"}[args.crop]
    result["unavailable"] = unavailable
    result["protocol"] = "; ".join([
        f"{result['images']} validation images of {args.data}, {result['skipped']} unreadable", prepared,
        "clamped and rounded to 8 bit", "latent mode", f"noise seed {args.seed}",
        "sampler " + (", ".join(f"{k} {v}" for k, v in options.items()) or "defaults"),
        *([f"LPIPS 0.1 {' '.join(lpips)}"] if lpips else []),
        *([f"Inception 2015 sha256 {inception.sha256}"] if inception else []),
        f"{args.dtype}, batches of {args.batch_size} on {world} x {device.type}"])
    result |= {"arguments": vars(args), "model": config}
    out = args.out or Path(args.ckpt).parent
    print_table(result)
    write_results(result, out)
    print(f"wrote metrics.json and reconstructions.png to {out}")


if __name__ == "__main__":
    guarded(main)
