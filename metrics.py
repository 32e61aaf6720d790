"""What is measured on images: the formulas, one value an image, and the metrics that need a trained network.

    python -m pytest test_all.py -k "ssim or psnr or hf_ratio"          # against scikit-image and closed forms

Images (B, 3, H, W) in [-1, 1], already through to8bit. Which of these rewards what is said in evaluate.py.
"""
import functools
import hashlib
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from data import import_torchvision
from encoder import LappedCode
from fid import Statistics, load_features
from losses import LPIPSLoss
from model import local_file

# ---------------------------------------------------------------------------------------------------------------------
# Formulas

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
    return 10 * torch.log10(4 / mse.double().clamp(min=4e-10))


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
    code = LappedCode(f, min(channels, 3 * f * f)).to(x.device)
    return code.decode(code.encode(x))


# ---------------------------------------------------------------------------------------------------------------------
# Metrics in the features of a trained network

SMALLEST = {"lpips_vgg": 16, "lpips_alex": 32}               # pixels; below, the network's last map has none
DREAMSIM_SIZE = 224                                          # pixels a side, what its `preprocess` resizes to


def metric_arguments(parser):
    add = parser.add_argument_group("metrics that need a network").add_argument
    add("--lpips_net", nargs="+", choices=["vgg", "alex"], help="default: both; vgg with one --lpips_weights")
    add("--lpips_weights", nargs="+", metavar="FILE", help="ImageNet weights, one file for each --lpips_net")
    add("--dreamsim", action="store_true", help="also DreamSim, where that package is installed")
    add("--features", nargs="*", default=["inception"], metavar="F", help="of Frechet distances: inception (rFID), "
        "dinov2 (FD-DINOv2), TorchScript files that map (B, 3, H, W) in [-1, 1] to (B, D) [inception]")
    add("--inception", metavar="FILE", help="FID's Inception weights; default: torch.hub's cache or download")
    add("--dinov2", metavar="FILE", help="DINOv2 ViT-L/14 weights; default: torch.hub's cache or download")
    add("--cache", default="~/.cache/dc-ssdae", help="folder for originals' statistics; '' for none [%(default)s]")


def check_metrics(args):
    """Complete metric_arguments' flags, and complain about them before anything is loaded."""
    if not args.lpips_net:
        args.lpips_net = ["vgg", "alex"][:len(args.lpips_weights or "12")]
    if args.lpips_weights and len(args.lpips_weights) != len(args.lpips_net):
        raise ValueError(f"--lpips_weights needs one file for each of --lpips_net {' '.join(args.lpips_net)}")
    if len({metric_of(name) for name in args.features}) < len(args.features):
        raise ValueError(f"--features {' '.join(args.features)}: two of one name")


def metric_of(features):
    """Key of the Frechet distance in a row: rfid, fd_dinov2, fd_<file stem>."""
    if features == "inception":
        return "rfid"
    if features == "dinov2":
        return "fd_dinov2"
    return f"fd_{Path(features).stem}"


def dreamsim_distance(device):
    """DreamSim, callable (x, y) -> (b,), on images in [-1, 1]. FileNotFoundError without the package or its weights:
    in torch.hub's folder, else downloaded."""
    try:
        from dreamsim import dreamsim
        folder = Path(torch.hub.get_dir(), "dreamsim")
        folder.mkdir(parents=True, exist_ok=True)
        network, _ = dreamsim(pretrained=True, device=str(device), cache_dir=str(folder))
    except Exception as error:  # noqa: BLE001 no package, no network, an incomplete folder
        raise FileNotFoundError(f"needs the dreamsim package and its weights: pip install dreamsim ({error})") from None

    def prepared(x):
        size = (DREAMSIM_SIZE, DREAMSIM_SIZE)
        return F.interpolate((x + 1) / 2, size, mode="bicubic", antialias=True).clamp(0, 1)

    return lambda x, y: network(prepared(x), prepared(y))


def wanted_networks(args, size, device):
    """What the flags ask for: {metric: (file that the user named or None, function that builds the network)}."""
    inception, dinov2 = local_file(args.inception), local_file(args.dinov2)
    lpips_files = [local_file(file) for file in args.lpips_weights or [None] * len(args.lpips_net)]
    wanted = {}
    for net, file in zip(args.lpips_net, lpips_files, strict=True):
        wanted[f"lpips_{net}"] = file, functools.partial(LPIPSLoss, net=net, weights=file)
    if args.dreamsim:
        wanted["dreamsim"] = None, functools.partial(dreamsim_distance, device)
    for name in args.features:
        file = {"inception": inception, "dinov2": dinov2}.get(name, name)
        wanted[metric_of(name)] = file, functools.partial(load_features, name, inception, dinov2, size)
    return wanted


def load_networks(args, size, device, world):
    """({metric: distance}, {metric: features}, {metric: reason why it is unavailable}); the same in all processes.

    A file the user named must exist; one that was merely not found makes its metric unavailable.
    """
    if "dinov2" in args.features:
        import_torchvision()  # timm imports it
    frechet = [metric_of(name) for name in args.features]
    distances, features, unavailable = {}, {}, {}
    for metric, (file, build) in wanted_networks(args, size, device).items():
        network, reason = None, None
        least = SMALLEST.get(metric, 0)
        if size < least:
            reason = f"the network needs images of at least {least} px"
        else:
            try:
                network = build()
            except (FileNotFoundError, ImportError) as error:
                if file:
                    raise
                reason = " ".join(str(error).split())
        reason = first_reason(reason, world)
        if reason:
            unavailable[metric] = reason
            continue
        if isinstance(network, nn.Module):
            network = network.to(device).eval()
        if metric in frechet:
            features[metric] = network
        else:
            distances[metric] = network
    return distances, features, unavailable


def first_reason(reason, world):
    """The first reason that any process has, or None: what one process cannot load, none uses."""
    reasons = [reason]
    if world > 1:
        reasons = [None] * world
        dist.all_gather_object(reasons, reason)
    return next(filter(None, reasons), None)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics of the originals, kept on disk: they are the same for every model

def cache_files(args, dataset, features):
    """{metric: path of the .npz in --cache for the statistics of these originals, prepared in this way}.

    The key holds names, sizes and times of all files, or the pixels, and the first prepared image, so that neither a
    changed data set nor a changed preparation is taken for the old one.
    """
    if not features or not args.cache:
        return {}
    files = []
    if dataset.images.dtype.kind == "S":  # file names, not pixels
        for path in dataset.images:
            try:
                status = os.stat(path)
            except FileNotFoundError:  # the pass will say so, and its statistics are not kept
                continue
            files.append((status.st_size, status.st_mtime_ns))
    first = dataset[0] and dataset[0][0].numpy().tobytes()
    key = (hashlib.sha256(dataset.images.tobytes()).hexdigest(), files, first, args.data, dataset.size, args.crop)
    paths = {}
    for metric, network in features.items():
        name = hashlib.sha256(repr((key, network.sha256)).encode()).hexdigest()[:20]
        paths[metric] = Path(args.cache).expanduser() / f"fid-{name}.npz"
    return paths


def load_cached(paths, world):
    """{metric: Statistics} of the `paths` that all processes find: a home directory may not be shared."""
    mine = {metric for metric, path in paths.items() if path.is_file()}
    found = [mine]
    if world > 1:
        found = [None] * world
        dist.all_gather_object(found, mine)
    return {metric: Statistics.load(paths[metric]) for metric in set.intersection(*found)}


def save_cached(paths, result):
    """Write a result's statistics of the originals to {metric: path}, unless some images are missing in them."""
    if paths and result["skipped"]:
        print(f"statistics of the originals are not kept for other runs: {result['skipped']} images are missing in them")
        return
    for metric, path in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        result["originals"][metric].save(path)
