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
--features dinov2 is FD-DINOv2 (Stein et al. 2023, arXiv 2306.04675) as edm2 computes it; a file of weights of
timm's or a TorchScript file gives the distance in features of your own. Neither is FID or rFID, or can be compared with
them.

    python fid.py originals/ reconstructions/                 # two folders, searched recursively
    python fid.py imagenet/val --size 256 --save val256.npz   # statistics once ...
    python fid.py val256.npz reconstructions/                 # ... then reused
"""
import argparse
import functools
import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import data
from data import BROKEN_ARCHIVE, BROKEN_FILE, best_device, gathered
from losses import IMAGENET_MEAN, IMAGENET_STD, LPIPSLoss, dreamsim_distance, finite_table
from model import local_file

URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
       "pt_inception-2015-12-05-6726825d.pth")
DINO_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
UNBIASED_FROM = 10_000                                       # images; fewer bias a Frechet distance upwards visibly
INCEPTION_SHA256 = "6726825d"                                # the beginning of it, as torch.hub checks downloads
RANK_EPS = 64 * np.finfo(np.float64).eps                     # of the largest eigenvalue: the rest is rounding noise
SYMMETRY_EPS = 1e-4                                          # of the largest covariance: float32's rounding and no more
NEGATIVE_EPS = 1e-3                                          # as negative eigenvalues of the largest: not rounding

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
        path, state, self.sha256 = read_weights(weights, URL, "--inception")  # before building: a bad file fails fast
        state = {k: v for k, v in state.items() if not k.startswith(("fc.", "AuxLogits."))}
        with torch.device("meta"):  # no random initialisation that the file replaces
            self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2, padding=0)   # 299 -> 149
            self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding=0)            # 147
            self.Conv2d_2b_3x3 = Conv(32, 64, 3)                       # 147, pool -> 73
            self.Conv2d_3b_1x1 = Conv(64, 80, 1)
            self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding=0)           # 71, pool -> 35
            for name, c_in, branches, pool in MIXED:
                self.add_module(name, Mixed(c_in, branches, pool))
        own = self.state_dict()  # older files have no num_batches_tracked counters, which only training uses
        state = {k: torch.zeros((), dtype=torch.long) for k in own if k.endswith("num_batches_tracked")} | state
        wrong = sorted(own.keys() ^ state.keys()) + [k for k in own if k in state and own[k].shape != state[k].shape]
        if wrong:
            raise ValueError(f"{path} does not hold FID's Inception-v3: {len(wrong)} tensors differ, e.g. {wrong[0]}")
        self.load_state_dict(state, assign=True)
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


def empty_network(timm, name, **options):
    """A network of timm's without the random weights that a file will replace; with them where timm is too old, or the
    network has tables that no file holds."""
    try:
        with torch.device("meta"):
            network = timm.create_model(name, **options)
        if network.state_dict().keys() >= dict(network.named_buffers()).keys():
            return network
    except RuntimeError:  # timm 1.0.9 reads numbers of tensors, which have none there
        pass
    return timm.create_model(name, **options)


class DINOv2Features(nn.Module):
    """The 1024 features of FD-DINOv2: the class token of ViT-L/14 after the last norm. ImportError without timm.

    As DINOv2Detector in edm2's calculate_metrics.py: 224 x 224 by bicubic with antialiasing, not rounded; ImageNet's
    mean and deviation; position embeddings from 37 x 37 to 16 x 16 by a factor of 16.1 / 37, bicubic without
    antialiasing, as in DINOv2's code (timm's way of resizing them gives other features).
    weights: dinov2_vitl14_pretrain.pth, or timm's file.
    """

    dim = 1024

    def __init__(self, weights=None):
        super().__init__()
        try:
            import timm
        except (ImportError, RuntimeError) as error:                   # RuntimeError: torchvision of another build
            raise ImportError(f"FD-DINOv2 needs the timm package: pip install timm ({error})") from None
        path, state, self.sha256 = read_weights(weights, DINO_URL, "--dinov2")
        state.pop("mask_token", None)                                  # timm's file is the same without
        self.vit = empty_network(timm, "vit_large_patch14_dinov2.lvd142m", num_classes=0, img_size=224)
        try:
            first, grid = state["pos_embed"].split([1, 37 * 37], dim=1)
            grid = F.interpolate(grid.mT.unflatten(2, (37, 37)), scale_factor=16.1 / 37, mode="bicubic")
            self.vit.load_state_dict(state | {"pos_embed": torch.cat([first, grid.flatten(2).mT], 1)}, assign=True)
        except BROKEN_FILE:
            raise ValueError(f"{path} does not hold the weights of DINOv2 ViT-L/14") from None
        self.float().eval().requires_grad_(False)

    @on_8bit
    def forward(self, x):
        x = F.interpolate(x, size=(224, 224), mode="bicubic", antialias=True)
        mean, std = x.new_tensor(IMAGENET_MEAN)[:, None, None], x.new_tensor(IMAGENET_STD)[:, None, None]
        return self.vit.forward_features((x - mean) / std)[:, 0]


class FileFeatures(nn.Module):
    """Features of your own: a TorchScript file that maps (B, 3, H, W) in [-1, 1] to (B, D) for any B; H = W = size is
    tried. Pickled and exported modules are refused: reading them runs code in the file."""

    def __init__(self, path, size=256):
        super().__init__()
        if not os.path.isfile(path):
            raise FileNotFoundError(f"--features {path}: neither inception nor dinov2 nor a file")
        try:
            self.network = torch.jit.load(path, map_location="cpu").eval()
            for batch in (1, 2):
                rows, self.dim = self.network(torch.zeros(batch, 3, size, size)).shape
                if rows != batch:
                    raise ValueError("not one row an image")
        except BROKEN_FILE as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise ValueError(f"{path} is refused: not a TorchScript network of images (B, 3, {size}, {size}) to "
                             f"features (B, D) ({reason})") from None
        self.sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()

    @on_8bit
    def forward(self, x):
        return self.network(2 * x - 1)


class TimmFeatures(nn.Module):
    """Features of a network that timm knows by name, before its classifier: NAME.safetensors, say
    resnet50.a1_in1k.safetensors, with timm's own tensor names. No code comes from the file. Images are resized to the
    network's own size (bicubic, antialiasing) and normalised as timm says. FileNotFoundError, ValueError; ImportError
    without timm."""

    def __init__(self, path):
        super().__init__()
        try:
            import timm
        except (ImportError, RuntimeError) as error:                   # RuntimeError: torchvision of another build
            raise ImportError(f"--features {path} needs the timm package: pip install timm ({error})") from None
        name = Path(path).name.removesuffix(".safetensors")
        if not timm.is_model(name):
            raise ValueError(f"{path} is refused: timm knows no network {name}; the file's name must be one")
        _, state, self.sha256 = read_weights(path, path, "--features")
        self.network = empty_network(timm, name, num_classes=0)
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
        mean, std = x.new_tensor(self.mean)[:, None, None], x.new_tensor(self.std)[:, None, None]
        return self.network((x - mean) / std)


def load_features(name, inception=None, dinov2=None, size=256):
    """The network of --features `name`: "inception", "dinov2" (their weight files: the next two) or a file."""
    if name == "inception":
        return InceptionFeatures(inception)
    if name == "dinov2":
        return DINOv2Features(dinov2)
    if name.endswith(".safetensors"):
        return TimmFeatures(name)
    return FileFeatures(name, size)


def read_weights(weights, url, flag):
    """(path, tensors, SHA-256) of a weight file: the given one, or `url` through torch.hub's cache. FileNotFoundError
    if there is none, ValueError if it holds something else. Code in pickles is never run."""
    path = Path(weights or Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1]))
    if weights and not path.is_file():
        raise FileNotFoundError(f"{flag}: no weight file {weights}")
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            prefix = INCEPTION_SHA256 if url == URL else None
            torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix, progress=sys.stderr.isatty())
    except Exception as error:  # noqa: BLE001 no network, no space, a proxy's error page: no file
        raise FileNotFoundError(f"{path.name} is neither in {path.parent} nor could it be downloaded from "
                                f"{url.split('/')[2]} ({type(error).__name__}): give it with {flag} FILE") from None
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        return path, dict(finite_table(state)), hashlib.sha256(path.read_bytes()).hexdigest()
    except Exception as error:  # noqa: BLE001 both raise half a dozen types for a foreign file
        raise ValueError(f"{path} is not a PyTorch weight file ({type(error).__name__})") from None


# ---------------------------------------------------------------------------------------------------------------------
class Statistics:
    """Mean and covariance of features, accumulated in float64 and merged exactly across batches and processes.

    Keeps n, the mean (dim,) and the scatter sum (f - mean)(f - mean)^T (dim, dim) on `device` (Chan et al. 1979): no
    difference of large sums, so nothing cancels. n is None after loading a file that does not say it.
    """

    def __init__(self, dim=2048, device="cpu"):
        device = "cpu" if torch.device(device).type == "mps" else device  # Apple GPUs have no float64
        self.n, self.mean = 0, torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features):
        """features: (B, dim), any float type and device. ValueError for others."""
        if features.ndim != 2 or features.shape[1] != len(self.mean) or not features.is_floating_point():
            raise ValueError(f"features are floating-point (B, {len(self.mean)}), got {features.dtype} "
                             f"{tuple(features.shape)}")
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
        alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
        if alone:
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
        """Write mu, sigma (what pytorch-fid reads) and n. Atomic: never a half-written file under this name. ValueError
        where they are not finite, OSError as data.whole."""
        if not (np.isfinite(self.mu).all() and np.isfinite(self.sigma).all()):
            raise ValueError(f"features that are not finite have no statistics to store in {path}")
        arrays = {"mu": self.mu, "sigma": self.sigma}
        if self.n is not None:
            arrays["n"] = self.n
        with data.whole(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)

    @staticmethod
    def load(path):
        """Read a .npz of ours or of pytorch-fid. FileNotFoundError; ValueError if it holds something else."""
        try:
            with np.load(path) as file:
                mu, sigma = file["mu"], file["sigma"]
                n = int(file["n"]) if "n" in file else None
        except FileNotFoundError:
            raise
        except (*BROKEN_ARCHIVE, MemoryError):
            raise ValueError(f"{path} does not hold FID statistics (arrays mu and sigma)") from None
        if mu.ndim != 1 or sigma.shape != 2 * mu.shape:
            raise ValueError(f"{path} does not hold FID statistics: mu is {mu.shape}, sigma {sigma.shape}")
        numeric = mu.dtype.kind == sigma.dtype.kind == "f"
        if not numeric or not np.isfinite(mu).all() or not np.isfinite(sigma).all() or (n is not None and n < 2):
            raise ValueError(f"{path} does not hold FID statistics: finite floats mu and sigma of at least 2 images")
        rounding = SYMMETRY_EPS * np.abs(sigma).max(initial=0)
        if (np.abs(sigma - sigma.T) > rounding).any() or (np.diag(sigma) < -rounding).any():
            raise ValueError(f"{path} does not hold FID statistics: sigma is no covariance, which is symmetric, with "
                             "variances on its diagonal")
        out = Statistics(0)
        out.n, out.mean = n, torch.from_numpy(mu.astype(np.float64))
        out.scatter = torch.from_numpy(sigma.astype(np.float64)) * (1 if n is None else n - 1)
        return out


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)), equation 6 of the FID paper: a float, finite and >= 0.

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
        if len(w) and w[0] < -NEGATIVE_EPS * max(w[-1], 0):
            raise ValueError(f"statistics whose covariance has negative eigenvalues, down to {w[0]:.3g}")
        keep = w > RANK_EPS * max(w[-1], 0)
        roots.append(v[:, keep] * np.sqrt(w[keep]))                    # (D, rank), root @ root.T = s
    cross = 0.0
    if roots[0].size and roots[1].size:
        cross = np.linalg.svd(roots[0].T @ roots[1], compute_uv=False).sum()
    with np.errstate(over="ignore", invalid="ignore"):                 # said below
        distance = ((mu1 - mu2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * cross
    if not np.isfinite(distance):
        raise ValueError("statistics too large for a distance")
    return max(0.0, float(distance))


def distance_or_none(a, b):
    """Frechet distance of two Statistics; None, with a warning, where there is none: of a row that diverged, say."""
    try:
        return distance_between(a, b)
    except ValueError as error:                                        # LinAlgError is one, too
        data.say(f"warning: a Frechet distance is left out: {error}")
        return None


@functools.cache
def warn_once(line):
    """In this process, whichever of several it is."""
    print(line, file=sys.stderr, flush=True)


def or_nan(network, *images):
    """What a metric's network finds in images (b, 3, H, W): (b,), or (b, dim) of features. NaN, with a warning, where
    it fails: the other metrics of a long evaluation go on."""
    try:
        return network(*images)
    except RuntimeError as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        warn_once(f"warning: a metric is left out, {type(network).__name__} fails: {reason}")
        shape = [len(images[0])]
        if len(images) == 1:
            shape.append(network.dim)
        return torch.full(shape, float("nan"))


def distance_between(a, b):
    """Frechet distance of two Statistics."""
    return frechet_distance(a.mu, a.sigma, b.mu, b.sigma)


# ---------------------------------------------------------------------------------------------------------------------
def read_image(path, size=None):
    """(3, H, W) uint8, or None when the file cannot be decoded. size: short side to size (bilinear), centre crop.
    OSError where it cannot be read."""
    try:
        image = data.read_image(path)
    except data.Unreadable as error:
        print(f"\nwarning: skipping unreadable image {path}: {error}", file=sys.stderr)
        return None
    if size:
        image = data.prepare_eval(image, size)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def images_under(folder):
    """-> paths of all images under a folder. FileNotFoundError where there is none."""
    paths = data.list_images(folder) if os.path.isdir(folder) else []
    if not paths:
        raise FileNotFoundError(f"{folder} is not a folder with images")
    return paths


def folder_statistics(folder, network, device="cpu", batch_size=32, size=None):
    """Statistics of every image under a folder; unreadable ones are skipped and counted on stderr. FileNotFoundError
    without images, OSError where a file cannot be read."""
    paths = images_under(folder)
    statistics, skipped = Statistics(network.dim, device), 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(paths), batch_size):
            images = list(pool.map(lambda path: read_image(path, size), paths[start:start + batch_size]))
            skipped += sum(image is None for image in images)
            images = [image for image in images if image is not None]
            for shape in {image.shape for image in images}:            # images of one size go through together
                group = torch.stack([image for image in images if image.shape == shape])
                statistics.update(network(group.to(device)))
            print(f"\r{folder}: {min(start + batch_size, len(paths))}/{len(paths)}", end="", file=sys.stderr)
    print(f"\nwarning: skipped {skipped} unreadable images in {folder}" if skipped else "", file=sys.stderr)
    return statistics


# ---------------------------------------------------------------------------------------------------------------------
# The networks of evaluate.py's metrics: those of Frechet distances, LPIPS, DreamSim

SMALLEST = {"lpips_vgg": 16, "lpips_alex": 32}               # pixels; below, the network's last map has none


def metric_arguments(parser):
    add = parser.add_argument_group("metrics that need a network").add_argument
    add("--lpips_net", nargs="+", choices=["vgg", "alex"], help="default: both; vgg with one --lpips_weights")
    add("--lpips_weights", nargs="+", metavar="FILE", help="ImageNet weights, one file for each --lpips_net")
    add("--dreamsim", action="store_true", help="also DreamSim, where that package is installed")
    add("--features", nargs="*", default=["inception"], metavar="F", help="of Frechet distances: inception (rFID), "
        "dinov2 (FD-DINOv2), NAME.safetensors with weights of timm's network NAME, or TorchScript files that map "
        "(B, 3, H, W) in [-1, 1] to (B, D), which torch is giving up [inception]")
    add("--inception", metavar="FILE", help="FID's Inception weights; default: torch.hub's cache or download")
    add("--dinov2", metavar="FILE", help="DINOv2 ViT-L/14 weights; default: torch.hub's cache or download")
    add("--cache", default="~/.cache/dc-ssdae", help="folder for originals' statistics; '' for none [%(default)s]")


def check_metrics(args):
    """Complete metric_arguments' flags, and complain about them before anything is loaded."""
    if not args.lpips_net:
        one_file = args.lpips_weights is not None and len(args.lpips_weights) == 1
        args.lpips_net = ["vgg"] if one_file else ["vgg", "alex"]
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
        file = {"inception": inception, "dinov2": dinov2}.get(name, name)  # of the others the name is the file
        wanted[metric_of(name)] = file, functools.partial(load_features, name, inception, dinov2, size)
    return wanted


def load_networks(args, size, device, world):
    """({metric: distance}, {metric: features}, {metric: reason why it is unavailable}); the same in all processes.

    A file the user named must exist; one that was merely not found makes its metric unavailable.
    """
    if "dinov2" in args.features:
        data.import_torchvision()  # timm imports it
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
    for found in gathered(reason, world):
        if found:
            return found
    return None


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
    first = dataset[0]  # None: unreadable
    if first is not None:
        image, _ = first
        first = image.numpy().tobytes()
    key = (hashlib.sha256(dataset.images.tobytes()).hexdigest(), files, first, args.data, dataset.size, args.crop)
    paths, folder = {}, Path(os.path.expanduser(args.cache))
    for metric, network in features.items():
        name = hashlib.sha256(repr((key, metric, network.sha256)).encode()).hexdigest()[:20]
        paths[metric] = folder / f"fid-{name}.npz"
    return paths


def load_cached(paths, world):
    """{metric: Statistics} of the `paths` that all processes find: a home directory may not be shared."""
    mine = {metric for metric, path in paths.items() if os.path.isfile(path)}
    everywhere = set.intersection(*gathered(mine, world))
    found = {}
    for metric in everywhere:
        try:
            found[metric] = Statistics.load(paths[metric])
        except (ValueError, OSError) as error:
            print(f"warning: statistics of the originals are computed again: {error}", file=sys.stderr)
    readable = set.intersection(*gathered(set(found), world))
    return {metric: found[metric] for metric in readable}


def save_cached(paths, result):
    """Write a result's statistics of the originals to {metric: path}, unless some images are missing in them."""
    if paths and result["skipped"]:
        print(f"statistics of the originals are not kept for other runs: {result['skipped']} images are missing")
        return
    for metric, path in paths.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            result["originals"][metric].save(path)
        except (OSError, ValueError) as error:
            print(f"warning: statistics of the originals are not kept in --cache: {error}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def check_arguments(args):
    """Complaints before any work: ValueError, FileNotFoundError, NotADirectoryError."""
    data.check_numbers(args, ("size", "batch_size"))  # its a and b are other things than train.py's
    for source in (args.a, args.b):
        if source and not os.path.exists(source):
            raise FileNotFoundError(f"there is no {source}")
    if not args.save:
        return
    folder = os.path.dirname(args.save) or "."
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"--save {args.save}: there is no folder {folder}, make it first")
    if os.path.isdir(args.save):
        raise ValueError(f"--save {args.save} is a folder: give the name of a file")
    try:
        data.ready_file(args.save)
    except OSError as error:
        raise OSError(f"--save {args.save}: {error.strerror or error}") from None


def main():
    parser = argparse.ArgumentParser(description="FID between two image folders or saved statistics (.npz).")
    add = parser.add_argument
    add("a", metavar="A", help="folder of images, or .npz statistics")
    add("b", metavar="B", nargs="?", help="the other set; may be left out with --save")
    add("--features", default="inception", metavar="F", help="inception (FID), dinov2 (FD-DINOv2), "
        "NAME.safetensors with weights of timm's network NAME, or a TorchScript file that maps (B, 3, H, W) in "
        "[-1, 1] to (B, D) [%(default)s]")
    add("--inception", metavar="FILE", help="Inception weights; default: torch.hub's cache or download")
    add("--dinov2", metavar="FILE", help="DINOv2 ViT-L/14 weights; default: torch.hub's cache or download")
    add("--size", type=int, help="resize the short side and centre-crop first; default: as stored")
    add("--batch_size", type=int, default=32, help="images read and run at a time [%(default)s]")
    add("--save", metavar="FILE", help="write the statistics of A to this .npz")
    args = parser.parse_args()
    if args.b is None and not args.save:
        parser.error("give two sets A B, or A and --save FILE")
    try:
        check_arguments(args)
        network, sets = read_sets(args)
        if args.save:
            sets[0].save(args.save)
        name = distance_name(args.features)
        if args.b is not None:
            print(f"{name} {distance_between(*sets):.4f}")
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print_protocol(name, sets, args.features, network)


def read_sets(args):
    """(the network of --features, None where nothing needs it, [Statistics of A, of B if it is given])."""
    sources = [args.a] if args.b is None else [args.a, args.b]
    device = best_device()
    network, sets = None, []
    for source in sources:
        if not source.endswith(".npz"):
            images_under(source)                             # before a network is loaded, or fetched
    for source in sources:
        if source.endswith(".npz"):
            sets.append(Statistics.load(source))
            continue
        if network is None:
            network = load_features(args.features, args.inception, args.dinov2, args.size or 256).to(device)
        sets.append(folder_statistics(source, network, device, args.batch_size, args.size))
    return network, sets


def distance_name(features):
    if features == "inception":
        return "FID"
    if features == "dinov2":
        return "FD-DINOv2"
    return f"FD {Path(features).stem}"


def print_protocol(name, sets, features, network):
    """What the number depends on, and a warning where it is biased."""
    counts = " and ".join(str(s.n or "unknown") for s in sets)
    source = f"features of {features} sha256 {network.sha256}" if network else "features from .npz files"
    print(f"N = {counts}; {source}")
    smallest = min((s.n for s in sets if s.n), default=UNBIASED_FROM)
    if smallest >= UNBIASED_FROM:
        return
    rank = ", and its covariance is rank-deficient" if smallest <= sets[0].mu.size else ""
    print(f"warning: {name} of {smallest} images is biased upwards{rank}: compare only at the same N")


if __name__ == "__main__":
    data.guarded(main)
