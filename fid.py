"""Frechet distance of two sets of images (FID, FD-DINOv2), from scratch; the networks of all metrics.

FID (Heusel et al. 2017, arXiv 1706.08500) fits a Gaussian to 2048 features of each image set and measures the distance
of the two Gaussians; rFID is the FID between images and their reconstructions. Small differences of protocol move it
more than many papers' gains. Ours, the same as pytorch-fid's (whose numbers and .npz files it reproduces):
- network: FID's own Inception-v3, the TensorFlow graph of 2015 as ported in pt_inception-2015-12-05-6726825d.pth, in
  float32 without TF32. torchvision's Inception has other weights and other pooling: its "FID" is another number. The
  SHA-256 of the weight file is printed with every number.
- input: RGB clamped and rounded to 8 bit, resized to 299 x 299 bilinearly, no antialiasing, half-pixel centres, not
  rounded again, then scaled to [-1, 1].
- statistics: mean and covariance (N - 1) in float64; under 10,000 images FID is visibly biased upwards, and at 2048 or
  fewer the covariance is rank-deficient: compare only numbers with the same N.
- both sets are prepared in the same way. Here: images as stored (turned upright), or --size S: short side to S by PIL
  bilinear, centre crop, which is evaluate.py's --crop center (SSDD); its --crop adm (box halving, bicubic,
  centre crop) is DC-AE's. Raw files against crops is a classic mistake.
--features dinov2 is FD-DINOv2 (Stein et al. 2023, arXiv 2306.04675) as edm2 computes it; a file of weights of timm's
gives the distance in features of your own. Neither is FID or rFID, or can be compared with them.

    python fid.py originals/ reconstructions/                 # two folders, searched recursively
    python fid.py imagenet/val --size 256 --save val256.npz   # statistics once ...
    python fid.py val256.npz reconstructions/                 # ... then reused
"""
import argparse
import functools
import os
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from data import list_images, prepare_eval
from losses import IMAGENET_MEAN, IMAGENET_STD, LPIPS_NETS, LPIPSLoss
from plumbing import flags, log
from plumbing.files import WeightsUnavailable, downloaded, local_file, read_tensors, sha256, whole
from plumbing.images import Unreadable, read_image
from plumbing.process import best_device, first_line, gathered, guarded, say

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
DINO_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
UNBIASED_FROM = 10_000                                       # images; fewer bias a Frechet distance upwards visibly
RANK_EPS = 64 * np.finfo(np.float64).eps                     # of the largest eigenvalue: the rest is rounding noise

# ---------------------------------------------------------------------------------------------------------------------
# The network: Szegedy et al. 2015, arXiv 1512.00567, figures 5 to 7, with the parameter names of the weight file.
# A mixed block is a table: branch -> chain of (width, kernel). FORK: a 1x3 and a 3x1 convolution side by side.
FORK = "1x3 | 3x1"


def block_a(pool):
    return {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
            "branch_pool": [(pool, 1)]}


def block_c(c):
    return {"branch1x1": [(192, 1)], "branch7x7": [(c, 1), (c, (1, 7)), (192, (7, 1))],
            "branch7x7dbl": [(c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))], "branch_pool": [(192, 1)]}


BLOCK_B = {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)], "branch_pool": []}
BLOCK_D = {"branch3x3": [(192, 1), (320, 3)], "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)],
           "branch_pool": []}
BLOCK_E = {"branch1x1": [(320, 1)], "branch3x3": [(384, 1), (384, FORK)],
           "branch3x3dbl": [(448, 1), (384, 3), (384, FORK)], "branch_pool": [(192, 1)]}
# Name, input channels, branches, pool of branch_pool. "halve": the pool and the last convolution of each branch have
# stride 2 and no padding. TensorFlow's average does not count the padding; Mixed_7c pools by maximum, a slip of the
# 2015 graph that is part of every FID number.
MIXED = [("Mixed_5b", 192, block_a(32), "avg"), ("Mixed_5c", 256, block_a(64), "avg"),    # 35 x 35
         ("Mixed_5d", 288, block_a(64), "avg"), ("Mixed_6a", 288, BLOCK_B, "halve"),
         ("Mixed_6b", 768, block_c(128), "avg"), ("Mixed_6c", 768, block_c(160), "avg"),  # 17 x 17
         ("Mixed_6d", 768, block_c(160), "avg"), ("Mixed_6e", 768, block_c(192), "avg"),
         ("Mixed_7a", 768, BLOCK_D, "halve"),
         ("Mixed_7b", 1280, BLOCK_E, "avg"), ("Mixed_7c", 2048, BLOCK_E, "max")]          # 8 x 8
POOLS = {"avg": lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
         "max": lambda x: F.max_pool2d(x, 3, stride=1, padding=1), "halve": lambda x: F.max_pool2d(x, 3, stride=2)}


class Conv(nn.Module):
    """Convolution (no bias), BatchNorm (eps 0.001), ReLU; padding None keeps the map's size."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding=None):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = tuple(k // 2 for k in kernel) if padding is None else padding
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Parallel branches, each a chain of convolutions, concatenated over channels. Arguments: one row of MIXED."""

    def __init__(self, c_in, branches, pool):
        super().__init__()
        self.pool = POOLS[pool]
        self.chains = {branch: [] for branch in branches}              # names of the links of each chain
        for branch, chain in branches.items():
            c = c_in
            for i, (width, kernel) in enumerate(chain, 1):
                name = branch if len(chain) == 1 else f"{branch}_{i}"
                halves = pool == "halve" and i == len(chain)
                stride, padding = (2, 0) if halves else (1, None)
                links = {name + "a": (1, 3), name + "b": (3, 1)} if kernel == FORK else {name: kernel}
                for link, k in links.items():
                    self.add_module(link, Conv(c, width, k, stride, padding))
                self.chains[branch].append(list(links))
                c = width

    def forward(self, x):
        out = []
        for branch, chain in self.chains.items():
            y = self.pool(x) if branch == "branch_pool" else x
            for links in chain:
                y = torch.cat([getattr(self, link)(y) for link in links], 1)
            out.append(y)
        return torch.cat(out, 1)


# Networks whose features a Frechet distance compares. weights: path; None looks in torch.hub's cache, then downloads
# the file there. FileNotFoundError when it can be had nowhere, ValueError when it holds something else. .dim is the
# number of features, .sha256 the digest of the weight file: quote it beside the number. forward: (B, 3, H, W) uint8, or
# float in [-1, 1] -> (B, dim) float32, any H, W.

def on_8bit(forward):
    """Decorator of a network's forward, which then gets 8-bit levels (FID is defined on 8-bit images) scaled to [0, 1],
    and computes in float32 without TF32."""
    @functools.wraps(forward)
    @torch.no_grad()
    def wrapped(self, images):
        if images.dtype != torch.uint8:
            images = (images.float().clamp(-1, 1) * 127.5 + 127.5).round()
        with (torch.autocast(images.device.type, enabled=False),
              torch.backends.cudnn.flags(enabled=True, allow_tf32=False)):
            return forward(self, images.float() / 255)
    return wrapped


class InceptionFeatures(nn.Module):
    """The 2048 features FID is defined on. weights: pt_inception-2015-12-05-6726825d.pth."""

    dim = 2048

    def __init__(self, weights=None):
        super().__init__()
        path = downloaded(INCEPTION_URL, weights, "--inception")
        state, _ = read_tensors(path)
        self.sha256 = sha256(path)
        with torch.device("meta"):  # no random initialisation that the file replaces
            self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2, padding=0)   # 299 -> 149
            self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding=0)            # 147
            self.Conv2d_2b_3x3 = Conv(32, 64, 3)                       # 147, pool -> 73
            self.Conv2d_3b_1x1 = Conv(64, 80, 1)
            self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding=0)           # 71, pool -> 35
            for name, c_in, branches, pool in MIXED:
                self.add_module(name, Mixed(c_in, branches, pool))
        own = {name: value for name, value in state.items() if not name.startswith(("fc.", "AuxLogits."))}
        for name in self.state_dict():
            if name.endswith("num_batches_tracked"):  # counters that only training uses, which older files lack
                own.setdefault(name, torch.zeros((), dtype=torch.long))
        try:
            self.load_state_dict(own, assign=True)
        except RuntimeError:
            raise ValueError(f"{path} does not hold FID's Inception-v3") from None
        self.float().eval().requires_grad_(False)

    @on_8bit
    def forward(self, x):
        x = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(2 * x - 1)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = F.max_pool2d(x, 3, stride=2)                               # (B, 192, 35, 35)
        for name, *_ in MIXED:
            x = getattr(self, name)(x)
        return x.mean((2, 3))                                          # (B, 2048, 8, 8) -> (B, 2048)


def empty_network(name, **options):
    """A network of timm's without the random weights that a file will replace; with them where timm is too old, or the
    network has tables that no file holds."""
    import timm
    try:
        with torch.device("meta"):
            network = timm.create_model(name, **options)
        if network.state_dict().keys() >= dict(network.named_buffers()).keys():
            return network
    except RuntimeError:  # timm 1.0.9 reads numbers of tensors, which have none there
        pass
    return timm.create_model(name, **options)


def normalised(x, mean, std):
    return (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]


class DINOv2Features(nn.Module):
    """The 1024 features of FD-DINOv2: the class token of ViT-L/14 after the last norm.

    As DINOv2Detector in edm2's calculate_metrics.py: 224 x 224 by bicubic with antialiasing, not rounded; ImageNet's
    mean and deviation; position embeddings from 37 x 37 to 16 x 16 by a factor of 16.1 / 37, bicubic without
    antialiasing, as in DINOv2's code (timm's way of resizing them gives other features).
    weights: dinov2_vitl14_pretrain.pth, or timm's file.
    """

    dim = 1024

    def __init__(self, weights=None):
        super().__init__()
        path = downloaded(DINO_URL, weights, "--dinov2")
        state, _ = read_tensors(path)
        self.sha256 = sha256(path)
        state.pop("mask_token", None)                                  # timm's file is the same without
        self.vit = empty_network("vit_large_patch14_dinov2.lvd142m", num_classes=0, img_size=224)
        try:
            first, grid = state["pos_embed"].split([1, 37 * 37], dim=1)
            grid = F.interpolate(grid.mT.unflatten(2, (37, 37)), scale_factor=16.1 / 37, mode="bicubic")
            self.vit.load_state_dict(state | {"pos_embed": torch.cat([first, grid.flatten(2).mT], 1)}, assign=True)
        except (KeyError, RuntimeError):
            raise ValueError(f"{path} does not hold the weights of DINOv2 ViT-L/14") from None
        self.float().eval().requires_grad_(False)

    @on_8bit
    def forward(self, x):
        x = F.interpolate(x, size=(224, 224), mode="bicubic", antialias=True)
        return self.vit.forward_features(normalised(x, IMAGENET_MEAN, IMAGENET_STD))[:, 0]


class TimmFeatures(nn.Module):
    """Features of a network that timm knows by name, before its classifier: NAME.safetensors, say
    resnet50.a1_in1k.safetensors, with timm's own tensor names. Images are resized to the network's own size (bicubic,
    antialiasing) and normalised as timm says."""

    def __init__(self, path):
        super().__init__()
        import timm
        path = local_file(path)
        name = Path(path).name.removesuffix(".safetensors")
        if not timm.is_model(name):
            raise ValueError(f"--features {path}: neither inception nor dinov2, and timm knows no network {name}: the "
                             "file's name must be one")
        state, _ = read_tensors(path)
        self.sha256 = sha256(path)
        self.network = empty_network(name, num_classes=0)
        kept = {key: state[key] for key in self.network.state_dict() if key in state}  # without the classifier
        try:
            self.network.load_state_dict(kept, assign=True)
        except RuntimeError:
            raise ValueError(f"{path} does not hold the weights of timm's {name}") from None
        settings = self.network.pretrained_cfg
        # Some networks have a layer between their features and the classifier.
        self.dim = getattr(self.network, "head_hidden_size", None) or self.network.num_features
        self.size = settings["input_size"][-2:]
        self.mean, self.std = settings["mean"], settings["std"]
        self.float().eval().requires_grad_(False)

    @on_8bit
    def forward(self, x):
        x = F.interpolate(x, size=self.size, mode="bicubic", antialias=True)
        return self.network(normalised(x, self.mean, self.std))


def load_features(name, inception=None, dinov2=None):
    """The network of --features `name`: "inception", "dinov2" (their weight files: the next two) or a file of timm's
    weights."""
    if name == "inception":
        return InceptionFeatures(inception)
    if name == "dinov2":
        return DINOv2Features(dinov2)
    return TimmFeatures(name)


# ---------------------------------------------------------------------------------------------------------------------
# The distance

class Statistics:
    """Mean and covariance of features, accumulated in float64 and merged exactly across batches and processes.

    Keeps n, the mean (dim,) and the scatter sum (f - mean)(f - mean)^T (dim, dim) on `device` (Chan et al. 1979): no
    difference of large sums, so nothing cancels. n is None after loading a file that does not say it.
    """

    def __init__(self, dim, device="cpu"):
        device = "cpu" if torch.device(device).type == "mps" else device  # Apple GPUs have no float64
        self.n, self.mean = 0, torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features):
        """features: (B, dim), any float type and device."""
        f = features.detach().to(self.mean.device).double()
        if len(f) == 0:
            return
        mean, n = f.mean(0), self.n + len(f)
        delta = mean - self.mean
        f = f - mean
        # S = S_a + S_b + (mean_b - mean_a)(mean_b - mean_a)^T n_a n_b / n
        self.scatter += f.T @ f + torch.outer(delta, delta) * (self.n * len(f) / n)
        self.mean += delta * (len(f) / n)
        self.n = n

    def all_reduce(self):
        """Merge over all processes of torch.distributed (no effect without); afterwards all hold the same."""
        if not dist.is_initialized():
            return
        n = torch.tensor(float(self.n), dtype=torch.float64, device=self.mean.device)
        total, mean = n.clone(), self.mean * n
        dist.all_reduce(total)
        dist.all_reduce(mean)
        mean /= total.clamp(min=1)
        self.scatter += n * torch.outer(self.mean - mean, self.mean - mean)
        dist.all_reduce(self.scatter)
        self.n, self.mean = int(total), mean

    @property
    def mu(self):
        return self.mean.cpu().numpy()

    @property
    def sigma(self):
        """Unbiased covariance, as np.cov(features, rowvar=False). ValueError under two images."""
        if self.n is not None and self.n < 2:
            raise ValueError(f"FID needs at least 2 images in each set, got {self.n}")
        freedom = 1 if self.n is None else self.n - 1
        return (self.scatter / freedom).cpu().numpy()

    def save(self, path):
        """Write mu, sigma (what pytorch-fid reads) and n."""
        arrays = {"mu": self.mu, "sigma": self.sigma}
        if self.n is not None:
            arrays["n"] = self.n
        with whole(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)

    @staticmethod
    def load(path):
        """Read a .npz of ours or of pytorch-fid. FileNotFoundError; ValueError if it holds something else."""
        try:
            with np.load(path) as file:
                mu, sigma = file["mu"].astype(np.float64), file["sigma"].astype(np.float64)
                n = int(file["n"]) if "n" in file else None
        except (ValueError, LookupError, AttributeError, EOFError, zipfile.BadZipFile):
            raise ValueError(f"{path} does not hold FID statistics (arrays mu and sigma)") from None
        if mu.ndim != 1 or sigma.shape != 2 * mu.shape:
            raise ValueError(f"{path} does not hold FID statistics: mu is {mu.shape}, sigma {sigma.shape}")
        out = Statistics(0)
        out.n, out.mean = n, torch.from_numpy(mu)
        out.scatter = torch.from_numpy(sigma) * (1 if n is None else n - 1)
        return out


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)), equation 6 of the FID paper: a float >= 0.

    mu (D,), sigma (D, D) symmetric: arrays or tensors, computed in float64. Tr (S1 S2)^(1/2) is the sum of the singular
    values of S1^(1/2) S2^(1/2); through the eigenvalues of S1 and S2 this needs no square root of a non-symmetric
    matrix, so nothing complex appears, also for rank-deficient covariances. ValueError on other shapes or on NaN.
    """
    mu1, mu2, s1, s2 = (np.asarray(a, dtype=np.float64) for a in (mu1, mu2, sigma1, sigma2))
    mu1, mu2, s1, s2 = np.atleast_1d(mu1), np.atleast_1d(mu2), np.atleast_2d(s1), np.atleast_2d(s2)
    if mu1.shape != mu2.shape or not s1.shape == s2.shape == 2 * mu1.shape:
        raise ValueError(f"statistics of different sizes: {mu1.shape} {s1.shape} and {mu2.shape} {s2.shape}")
    if not all(np.isfinite(a).all() for a in (mu1, mu2, s1, s2)):
        raise ValueError("statistics that are not finite")
    roots = []
    for s in (s1, s2):
        w, v = np.linalg.eigh(s)                                       # ascending
        keep = w > RANK_EPS * max(w[-1], 0)
        roots.append(v[:, keep] * np.sqrt(w[keep]))                    # (D, rank), root @ root.T = s
    cross = 0.0
    if roots[0].size and roots[1].size:
        cross = np.linalg.svd(roots[0].T @ roots[1], compute_uv=False).sum()
    distance = ((mu1 - mu2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * cross
    return max(0.0, float(distance))


def distance_between(a, b):
    """Frechet distance of two Statistics."""
    return frechet_distance(a.mu, a.sigma, b.mu, b.sigma)


def distance_or_none(a, b):
    """The same; None, with a warning, where there is none: of a sampler that diverged, say."""
    try:
        return distance_between(a, b)
    except ValueError as error:                                        # numpy's LinAlgError is one, too
        say(f"warning: a Frechet distance is left out: {error}")
        return None


# ---------------------------------------------------------------------------------------------------------------------
# All networks of evaluations: those of Frechet distances, LPIPS, DreamSim

DREAMSIM_SIZE = 224                                          # pixels a side, what its `preprocess` resizes to
SMALLEST = {f"lpips_{net}": smallest for net, (*_, smallest) in LPIPS_NETS.items()}  # pixels a side


def dreamsim_distance(device):
    """DreamSim, callable (x, y) -> (b,), on images in [-1, 1]. WeightsUnavailable without the package or its weights:
    in torch.hub's folder, else downloaded."""
    try:
        from dreamsim import dreamsim
        folder = Path(torch.hub.get_dir(), "dreamsim")
        folder.mkdir(parents=True, exist_ok=True)
        network, _ = dreamsim(pretrained=True, device=str(device), cache_dir=str(folder))
    except Exception as error:  # noqa: BLE001 no package, no network, an incomplete folder
        raise WeightsUnavailable("needs the dreamsim package and its weights: pip install dreamsim "
                                 f"({first_line(error)})") from None

    def prepared(x):
        size = (DREAMSIM_SIZE, DREAMSIM_SIZE)
        return F.interpolate((x + 1) / 2, size, mode="bicubic", antialias=True).clamp(0, 1)

    return lambda x, y: network(prepared(x), prepared(y))


def metric_of(features):
    """Key of the Frechet distance in a row: rfid, fd_dinov2, fd_<file stem>."""
    if features == "inception":
        return "rfid"
    if features == "dinov2":
        return "fd_dinov2"
    return f"fd_{Path(features).stem}"


def load_metrics(size, device, world=1, lpips=("vgg",), lpips_weights=(None,), features=("inception",), inception=None,
                 dinov2=None, dreamsim=False):
    """({metric: distance (x, y) -> (b,)}, {metric: features}, {metric: why it is unavailable}), as `evaluate` takes
    them; the same in all processes.

    size              pixels a side of the images
    lpips             networks, of "vgg" and "alex";  lpips_weights  a file for each, or None
    features          of Frechet distances: "inception", "dinov2" or files, see load_features
    inception, dinov2, lpips_weights   None: torch.hub's cache, else a download
    A file that was given must be there; a metric whose network cannot be had otherwise is unavailable.
    """
    wanted = {}  # {metric: (the file that was given or None, what makes the network)}
    for net, file in zip(lpips, lpips_weights, strict=True):
        wanted[f"lpips_{net}"] = file, functools.partial(LPIPSLoss, net, file)
    if dreamsim:
        wanted["dreamsim"] = None, functools.partial(dreamsim_distance, device)
    for name in features:
        file = {"inception": inception, "dinov2": dinov2}.get(name, name)
        wanted[metric_of(name)] = file, functools.partial(load_features, name, inception, dinov2)

    networks, missing = {}, {}
    for metric, (file, make) in wanted.items():
        least = SMALLEST.get(metric, 0)
        if size < least:
            missing[metric] = f"the network needs images of at least {least} px"
            continue
        try:
            networks[metric] = make()
        except WeightsUnavailable as error:
            if file:
                raise
            missing[metric] = str(error)

    unavailable = {}
    for part in gathered(missing, world):  # what one process cannot load, none uses
        unavailable = part | unavailable
    distances, frechet = {}, {}
    frechet_metrics = [metric_of(name) for name in features]
    for metric, network in networks.items():
        if metric in unavailable:
            continue
        if isinstance(network, nn.Module):
            network = network.to(device).eval()
        if metric in frechet_metrics:
            frechet[metric] = network
        else:
            distances[metric] = network
    return distances, frechet, unavailable


# ---------------------------------------------------------------------------------------------------------------------
# Folders of images

def images_under(folder):
    """-> paths of all images under a folder. FileNotFoundError where there is none."""
    paths = list_images(folder) if os.path.isdir(folder) else []
    if not paths:
        raise FileNotFoundError(f"{folder} is not a folder with images")
    return paths


def read_pixels(path, size=None):
    """(3, H, W) uint8, or None, with a warning, for a file that cannot be decoded. size: short side to size (bilinear),
    centre crop."""
    try:
        image = read_image(path)
    except Unreadable as error:
        print(f"warning: skipping unreadable image {path}: {error}", file=sys.stderr)
        return None
    if size:
        image = prepare_eval(image, size)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def folder_statistics(folder, network, device="cpu", batch_size=32, size=None):
    """Statistics of every image under a folder; unreadable ones are skipped, named and counted on stderr."""
    paths = images_under(folder)
    statistics, skipped = Statistics(network.dim, device), 0
    bar = log.progress(len(paths), "img")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(paths), batch_size):
            found = list(pool.map(lambda path: read_pixels(path, size), paths[start:start + batch_size]))
            images = [image for image in found if image is not None]
            skipped += len(found) - len(images)
            for shape in {image.shape for image in images}:            # images of one size go through together
                group = torch.stack([image for image in images if image.shape == shape])
                statistics.update(network(group.to(device)))
            bar.update(len(found))
    bar.close()
    if skipped:
        print(f"warning: skipped {skipped} unreadable images in {folder}", file=sys.stderr)
    return statistics


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("a", metavar="A", help="folder of images, or .npz statistics")
    add("b", metavar="B", nargs="?", help="the other set; may be left out with --save")
    add("--features", default="inception", metavar="F", help="inception (FID), dinov2 (FD-DINOv2), or "
        "NAME.safetensors with weights of timm's network NAME [%(default)s]")
    add("--inception", metavar="FILE", help="Inception weights; default: torch.hub's cache or download")
    add("--dinov2", metavar="FILE", help="DINOv2 ViT-L/14 weights; default: torch.hub's cache or download")
    add("--size", type=flags.count, metavar="N", help="resize the short side and centre-crop first; default: as stored")
    add("--batch_size", type=flags.count, default=32, metavar="N", help="images read and run at a time [%(default)s]")
    add("--save", metavar="FILE", help="write the statistics of A to this .npz")
    args = parser.parse_args()
    if args.b is None and not args.save:
        parser.error("give two sets A B, or A and --save FILE")
    if args.save and not os.path.isdir(os.path.dirname(args.save) or "."):
        raise FileNotFoundError(f"--save {args.save}: there is no folder {os.path.dirname(args.save)}, make it first")

    # Read: the images are looked for before a network is loaded, or fetched
    sources = [source for source in (args.a, args.b) if source]
    folders = [source for source in sources if not source.endswith(".npz")]
    for folder in folders:
        images_under(folder)
    device, network, sets = best_device(), None, []
    if folders:
        network = load_features(args.features, args.inception, args.dinov2).to(device)
    for source in sources:
        if source in folders:
            sets.append(folder_statistics(source, network, device, args.batch_size, args.size))
        else:
            sets.append(Statistics.load(source))
    if args.save:
        sets[0].save(args.save)

    # Compare
    name = {"inception": "FID", "dinov2": "FD-DINOv2"}.get(args.features, f"FD {Path(args.features).stem}")
    if args.b is not None:
        print(f"{name} {distance_between(*sets):.4f}")
    counts = " and ".join(str(s.n or "unknown") for s in sets)
    source = f"features of {args.features} sha256 {network.sha256}" if network else "features from .npz files"
    print(f"N = {counts}; {source}")
    smallest = min((s.n for s in sets if s.n), default=UNBIASED_FROM)
    if smallest < UNBIASED_FROM:
        rank = ", and its covariance is rank-deficient" if smallest <= sets[0].mu.size else ""
        print(f"warning: {name} of {smallest} images is biased upwards{rank}: compare only at the same N")


if __name__ == "__main__":
    guarded(main)
