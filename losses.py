"""Training objectives: flow matching, equilibrium matching, LPIPS, REPA, KL; a GAN term, off by default; and what is
random in a training step.

  total = (FM or EqM) + 0.5 LPIPS(x, x^) + 0.25 REPA + 1e-6 KL (+ w_gan GAN)     x^: the one-step estimate of the image

FM     Lipman et al. 2022 (arXiv 2210.02747), as SSDD trains its decoder (arXiv 2510.04961)
EqM    Wang, Du 2025 (arXiv 2510.02300)
LPIPS  Zhang et al. 2018 (arXiv 1801.03924)        REPA  Yu et al. 2024 (arXiv 2410.06940)

Off by default, meant to make latents easier to generate: noise on them, fewer channels, smaller images, VF.

    python train.py --loss eqm --w_lpips 0.5 --lpips_weights vgg16-397923af.pth

Conventions: images x (B, 3, H, W) in [-1, 1]; noise e ~ N(0, I); FM time t: 0 data, 1 noise; EqM level
g: 0 noise, 1 data; t, g (B,).
"""
import importlib.util
import math
import os

import torch
import torch.nn.functional as F
from torch import nn

from plumbing.files import WeightsUnavailable, downloaded, read_tensors
from plumbing.process import first_line
from sampler import seeded_generator


def check_same_shape(*tensors):
    """ValueError unless all have one shape: broadcasting would give a number that means nothing."""
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        raise ValueError(f"output, images and noise have one shape (B, 3, H, W), got {shapes}")


def per_image(level):
    """FM's t or EqM's g (B,) -> (B, 1, 1, 1), which would else broadcast along the width."""
    return level[:, None, None, None]


# ---------------------------------------------------------------------------------------------------------------------
# Flow matching. The velocity v = x - e points from the noise to the data; x_t = (1-t) x + t e.

def fm_mix(x, e, t):
    """x_t: the image at noise level t (B,)."""
    return (1 - per_image(t)) * x + per_image(t) * e


def fm_predict_x(x_t, v, t):
    """One-step estimate x^ = x_t + t v; exact where v = x - e."""
    return x_t + per_image(t) * v


def fm_loss(v, x, e):
    """(v - (x - e))^2, each image's mean: (B,). v: the network's output at fm_mix(x, e, t). ValueError for different
    shapes."""
    check_same_shape(v, x, e)
    return (v.float() - (x - e).float()).square().mean((1, 2, 3))


# ---------------------------------------------------------------------------------------------------------------------
# Equilibrium matching. The field lam c(g) (e - x) points from the data to the noise and vanishes at the data;
# x_g = g x + (1-g) e.

class EqM:
    """The EqM objective for one choice of c(g) (arXiv 2510.02300): how the field's length falls to zero at the data.

    c    "linear"     1 - g
         "trunc"      1 up to g = a, then linear to 0
         "piecewise"  from b at g = 0 linearly to 1 at g = a, then linear to 0
    lam  scale of the field
    raises ValueError for an unknown c, a outside (0, 1), b or lam <= 0
    """

    def __init__(self, c="linear", a=0.8, b=1.4, lam=1.0):
        if c not in ("linear", "trunc", "piecewise"):
            raise ValueError(f"unknown c '{c}': expected linear, trunc or piecewise")
        if not (0 < a < 1 and 0 < b < math.inf and 0 < lam < math.inf):
            raise ValueError(f"EqM needs 0 < a < 1, b > 0 and lam > 0, got a={a}, b={b}, lam={lam}")
        self.kind, self.a, self.b, self.lam = c, a, b, lam
        self.at_noise = lam * (b if c == "piecewise" else 1.0)  # lam c(0)

    def mix(self, x, e, g):
        """x_g: the image at level g (B,)."""
        return per_image(g) * x + (1 - per_image(g)) * e

    def _head(self, g):  # c(g) for g <= a
        if self.kind == "trunc":
            return torch.ones_like(g)
        return self.b - (self.b - 1) * g / self.a

    def c(self, g):
        """c(g), shape of g; 0 at g = 1."""
        if self.kind == "linear":
            return 1 - g
        return torch.where(g <= self.a, self._head(g), (1 - g) / (1 - self.a))

    def target(self, x, e, g):
        """lam c(g) (e - x), shape of x."""
        return self.lam * per_image(self.c(g)) * (e - x)

    def predict_x(self, x_g, f, g):
        """One-step estimate x^ = x_g - f (1-g) / (lam c(g)); exact for a perfect field, also at g = 1, where (1-g)/c is
        not 0/0 but its limit."""
        if self.kind == "linear":
            ratio = torch.ones_like(g)
        else:
            ratio = torch.where(g <= self.a, (1 - g) / self._head(g), 1 - self.a)
        return x_g - f * per_image(ratio) / self.lam


def eqm_loss(f, x, e, g, eqm):
    """(f / lam - c(g) (e - x))^2, each image's mean: (B,). f: the network's output at eqm.mix(x, e, g). Divided by
    lam^2, so that the other terms weigh the same with every lam. ValueError for different shapes."""
    check_same_shape(f, x, e)
    return (f.float() - eqm.target(x, e, g).float()).square().mean((1, 2, 3)) / eqm.lam**2


# ---------------------------------------------------------------------------------------------------------------------
# A training step: what is random in it, and the decoder's own loss

def draw(seed, step, rows, x_shape, z_shape, device, loss, t_mean=0.0, g_power=1.0):
    """Per sample, from (seed, step, row) alone: noise e (B, *x_shape), posterior noise (B, *z_shape), level (B,).

    The level of loss "fm" is a time t = sigmoid(n), n ~ N(t_mean, 1) (SSDD); that of "eqm" is g = u^g_power,
    u ~ U(0, 1). t_mean above 0 and g_power above 1 train more on the noise end.
    """
    e, eps, level = [], [], []
    for row in rows:
        gen = seeded_generator(device, seed, step, row)
        if loss == "fm":
            n = torch.randn((), generator=gen, device=device) + t_mean
            level.append(n.sigmoid())
        else:
            level.append(torch.rand((), generator=gen, device=device))
        eps.append(torch.randn(z_shape, generator=gen, device=device))
        e.append(torch.randn(x_shape, generator=gen, device=device))
    level = torch.stack(level)
    if loss == "eqm":
        level = level ** g_power
    return torch.stack(e), torch.stack(eps), level


T_MIN = 0.05  # FM beside a linear base divides the estimate's error by at least this, as JiT (arXiv 2511.13720)


def matching(decoder, eqm, x, e, z, level):
    """The decoder's own loss on images x (B, 3, H, W), latents z, at FM's times or EqM's levels (B,):
    (each image's loss (B,), one-step estimate (B, 3, H, W), the decoder's tokens).

    decoder  model.UViT;  eqm  the EqM objective, None for FM;  e  standard normal noise (B, 3, H, W)
    """
    condition = decoder.condition(z, *x.shape[-2:])
    if eqm is None:
        t = level
        x_t = fm_mix(x, e, t)
        v, tokens = decoder.forward_with_tokens(x_t, t=t, condition=condition)
        losses = fm_loss(v, x, e)
        if decoder.base is not None:  # v = (D - x_t) / t: this is |D - x|^2 / t^2, and becomes it over max(t, T_MIN)^2
            losses = losses * (t / T_MIN).clamp(max=1).square()
        return losses, fm_predict_x(x_t, v.float(), t), tokens
    g = level
    x_g = eqm.mix(x, e, g)
    f, tokens = decoder.forward_with_tokens(x_g, condition=condition)
    return eqm_loss(f, x, e, g, eqm), eqm.predict_x(x_g, f.float(), g), tokens


LEVEL_BINS = 4  # of t or g, by which the log shows the loss


def level_sums(losses, level, dtype):
    """losses (B,) at FM's times or EqM's levels (B,) -> their sums by bins of the level, and how many are in each:
    (2, LEVEL_BINS)."""
    bins = F.one_hot((level * LEVEL_BINS).long().clamp(max=LEVEL_BINS - 1), LEVEL_BINS).to(dtype)
    return torch.stack([losses.to(dtype) @ bins, bins.sum(0)])


def kl_loss(posterior):
    """KL of an encoder.DiagonalGaussian to N(0, I), in nats: summed over c, h, w, mean over the batch."""
    return posterior.kl().mean()


# ---------------------------------------------------------------------------------------------------------------------
# What the decoder is shown of a latent in training, off by default: with noise, the first channels alone, smaller

def draw_latent(seed, step, rows, z_shape, device, z_noise=0.0, nested=()):
    """Per sample, from (seed, step, row) alone: noise for the latent (B, *z_shape), in deviations of its channels, and
    how many of its channels are shown (B,). Each None where it is not asked for.

    z_noise  tau of sigma n, sigma = tau |N(0, 1)|, n ~ N(0, I): RAE (Zheng et al. 2025, arXiv 2510.11690), whose tau
             is 0.8. A generator's latents are never exact
    nested   numbers k: a sample shows its first k channels, one of these or all, with equal chances, as DC-AE 1.5 (Chen
             et al. 2025, arXiv 2508.00413)
    """
    noise = shown = None
    generators = [seeded_generator(device, seed, step, row, "latent") for row in rows]
    if nested:
        chosen = [torch.randint(len(nested) + 1, (), generator=gen, device=device) for gen in generators]
        shown = torch.tensor([*nested, z_shape[0]], device=device)[torch.stack(chosen)]
    if z_noise:
        sigma = [z_noise * torch.randn((), generator=gen, device=device).abs() for gen in generators]
        n = [torch.randn(z_shape, generator=gen, device=device) for gen in generators]
        noise = per_image(torch.stack(sigma)) * torch.stack(n)
    return noise, shown


def first_channels(z, shown):
    """z (B, c, h, w) with 0 for all but the first `shown` (B,) channels of each sample."""
    return z * (torch.arange(z.shape[1], device=z.device) < shown[:, None])[:, :, None, None]


SHARES = (0.25, 0.5, 0.75)  # of --size, that smaller images have
LEAST_SIDE = 24             # pixels, the least that a PatchGAN takes


def smaller_sides(size, f):
    """The sides of whole cells of f pixels at about SHARES of `size`: [] where there are none from LEAST_SIDE on."""
    sides = {round(size * share / f) * f for share in SHARES}
    return sorted(side for side in sides if LEAST_SIDE <= side < size)


def draw_side(seed, step, size, f, p_scale=0.0):
    """The side of what a step decodes, from (seed, step) alone: with probability p_scale one of smaller_sides."""
    gen = seeded_generator("cpu", seed, step, "side")
    if torch.rand((), generator=gen) >= p_scale:
        return size
    sides = smaller_sides(size, f)
    return sides[torch.randint(len(sides), (), generator=gen)]


def resized(maps, height, width):
    """Images or latents (B, C, H, W) -> (B, C, height, width). EQ-VAE (Kouzelis et al. 2025, arXiv 2502.09509) decodes
    the shrunk latent and compares with the shrunk image; here with antialiasing."""
    if maps.shape[2:] == (height, width):
        return maps
    return F.interpolate(maps, size=(height, width), mode="bilinear", antialias=True)


# ---------------------------------------------------------------------------------------------------------------------
# GAN, on the one-step estimate. Constant weight, as in SSDD's gan block; VQGAN's adaptive one needs further gradients.

GAN_SLOPE, GAN_DEVIATION = 0.2, 0.02  # pix2pix's: of LeakyReLU below 0, and of the first weights


class PatchGAN(nn.Module):
    """Discriminator of pix2pix (arXiv 1611.07004) and VQGAN (arXiv 2012.09841): a logit for each patch of 70 x 70
    pixels. Images (B, 3, H, W), clamped to [-1, 1], sides of at least 24 -> logits (B, 1, H/8 - 2, W/8 - 2).

    GroupNorm, not BatchNorm: a logit depends on its image alone, not on how the batch is split over processes and
    micro-batches. (Spectral normalisation would keep a state that moves with every call.)
    """

    def __init__(self, channels=64):
        super().__init__()
        layers, c = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(GAN_SLOPE)], channels
        for stride in (2, 2, 1):
            layers += [nn.Conv2d(c, 2 * c, 4, stride, 1), nn.GroupNorm(32, 2 * c), nn.LeakyReLU(GAN_SLOPE)]
            c *= 2
        self.layers = nn.Sequential(*layers, nn.Conv2d(c, 1, 4, 1, 1))
        for m in self.layers:
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, 0.0, GAN_DEVIATION)

    def forward(self, x):
        if min(x.shape[2:]) < LEAST_SIDE:
            raise ValueError(f"the discriminator takes images with sides of at least {LEAST_SIDE}, got "
                             f"{tuple(x.shape)}")
        return self.layers(x.clamp(-1, 1).to(self.layers[0].weight.dtype)).float()


def hinge_loss(real, fake):
    """The discriminator's loss (Lim, Ye 2017, arXiv 1705.02894) from its logits of images and of estimates: a scalar.
    The estimate's own is -fake.mean()."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


# ---------------------------------------------------------------------------------------------------------------------
# Losses in the features of a pretrained network

LPIPS_NETS = {  # torchvision model, its weight file, ends of the five slices of .features, smallest side of images
    "vgg": ("vgg16", "vgg16-397923af.pth", (4, 9, 16, 23, 30), 16),
    "alex": ("alexnet", "alexnet-owt-7be5be79.pth", (2, 5, 8, 10, 12), 32),
}


LPIPS_EPS = 1e-12  # added to squared lengths of features, where 0 has no direction
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of R, G, B in [0, 1]


class LPIPSLoss(nn.Module):
    """LPIPS v0.1: distances of unit-normalised features, weighted per channel, averaged over space, summed over five
    layers.

    net      "vgg" (training) or "alex" (often quoted in evaluation); the two are not comparable
    weights  torchvision's ImageNet weights of that network as a file; None: torch hub's cache, else a download
    raises   WeightsUnavailable where they cannot be had; ValueError for a file of another network
    The channel weights ship inside the lpips package. Always computed in float32.
    """

    def __init__(self, net="vgg", weights=None):
        super().__init__()
        name, filename, ends, self.smallest = LPIPS_NETS[net]
        spec = importlib.util.find_spec("lpips")
        if spec is None:
            raise WeightsUnavailable("LPIPS needs the lpips package for its channel weights: pip install lpips")
        folder = spec.submodule_search_locations[0]
        lin, _ = read_tensors(os.path.join(folder, "weights", "v0.1", f"{net}.pth"))
        path = downloaded(f"https://download.pytorch.org/models/{filename}", weights, "--lpips_weights")
        state, _ = read_tensors(path)
        import torchvision
        with torch.device("meta"):  # structure only: the weights come from the file
            features = getattr(torchvision.models, name)(weights=None).features
        try:
            convolutions = {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}
            features.load_state_dict(convolutions, assign=True)
        except RuntimeError:
            raise ValueError(f"{path} does not hold torchvision's {name} weights, which LPIPS needs") from None
        features.float()
        for m in features:
            if isinstance(m, nn.ReLU):
                m.inplace = False  # the slices' outputs are kept
        self.slices = nn.ModuleList(features[start:end] for start, end in zip((0,) + ends, ends))
        for k in range(5):
            self.register_buffer(f"lin{k}", lin[f"lin{k}.model.1.weight"])  # (1, C, 1, 1), non-negative
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])
        self.requires_grad_(False).eval()

    def forward(self, x, y):
        """x, y (B, 3, H, W) in [-1, 1] -> distances (B,). Sides of at least 16 (vgg) or 32 (alex) keep every layer's
        map non-empty. ValueError for other images."""
        check_same_shape(x, y)
        if min(x.shape[2:]) < self.smallest:
            raise ValueError(f"LPIPS compares images with sides of at least {self.smallest}, got {tuple(x.shape)}")
        distance = 0
        with torch.autocast(x.device.type, enabled=False):
            # One after the other: an original that needs no gradient then keeps no features for a backward pass.
            hx, hy = ((image.float() - self.shift) / self.scale for image in (x, y))
            for k, layers in enumerate(self.slices):
                hx, hy = layers(hx), layers(hy)
                # Equation 1, with the squares of its weights: over channels, averaged over space
                weighted = (unit_length(hx) - unit_length(hy)).square() * getattr(self, f"lin{k}")  # (B, C, h, w)
                distance = distance + weighted.sum(dim=1).mean(dim=(1, 2))
            return distance


def unit_length(h):
    """h (B, C, h, w), each pixel's channels divided by their length. Not h / (|h| + eps): the square root's gradient is
    infinite where all channels are zero."""
    return h * torch.rsqrt(h.square().sum(dim=1, keepdim=True) + LPIPS_EPS)


def repa_projection(width, target_width=768):
    """REPA's MLP, from the decoder's tokens to DINOv2 ViT-B's, as wide as the tokens."""
    return nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, target_width))


class REPALoss(nn.Module):
    """1 - cosine(MLP(decoder tokens), DINOv2 ViT-B/14 patch tokens of the clean image), mean over tokens and batch.

    width    channels of the decoder's tokens; the MLP trains with the model and is not exported
    weights  DINOv2 ViT-B/14 as a file, in timm's or the original layout; None: the Hugging Face cache, else a download
    largest  sides in pixels up to which there is a DINOv2 token for each of the decoder's; DINOv2 sees larger images as
             if they had this size, and the decoder's tokens are averaged to its grid. Its attention costs the fourth
             power of the side
    raises   WeightsUnavailable where they cannot be had; ValueError for a file of another network
    """

    def __init__(self, width, weights=None, largest=256):
        super().__init__()
        self.largest = largest
        import timm
        name = "vit_base_patch14_dinov2.lvd142m"
        if weights is not None and not os.path.isfile(weights):
            raise WeightsUnavailable(f"--repa_weights: no weight file {weights}")
        overlay = {"file": str(weights)} if weights else None
        try:
            dino = timm.create_model(name, pretrained=True, num_classes=0, dynamic_img_size=True,
                                     pretrained_cfg_overlay=overlay)
        except Exception as error:  # noqa: BLE001 the hub client raises many classes; offline, all mean the same
            if weights:
                raise ValueError(f"{weights} does not hold DINOv2 ViT-B/14 weights ({first_line(error)})") from None
            raise WeightsUnavailable(
                f"REPA needs DINOv2 weights (timm/{name}), which are not in the Hugging Face cache and could not be "
                "downloaded: give them with --repa_weights FILE or turn the loss off with --w_repa 0") from None
        self.dino = dino.eval().requires_grad_(False)
        self.mlp = repa_projection(width, dino.embed_dim)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None])

    def grid(self, x):
        """Rows and columns of DINOv2's tokens of images x: a token for 8 x 8 pixels, at most `largest` / 8 a side."""
        shrink = max(1.0, max(x.shape[-2:]) / self.largest)
        return [max(1, round(side / shrink) // 8) for side in x.shape[-2:]]

    @torch.no_grad()
    def target(self, x):
        """x (B, 3, H, W) in [-1, 1] -> DINOv2 patch tokens (B, rows * columns of the grid, 768)."""
        size = [14 * n for n in self.grid(x)]
        x = F.interpolate((x.float() + 1) / 2, size=size, mode="bicubic", antialias=True)
        return self.dino.forward_features((x - self.mean) / self.std)[:, self.dino.num_prefix_tokens:]

    def forward(self, tokens, x, theirs=None):
        """tokens (B, H/8 * W/8, width) of the decoder, x (B, 3, H, W) clean images in [-1, 1], theirs: target(x), if
        it is known -> scalar in [0, 2]."""
        rows, columns = (side // 8 for side in x.shape[-2:])
        if [rows, columns] != self.grid(x):
            tokens = F.adaptive_avg_pool2d(tokens.mT.unflatten(2, (rows, columns)), self.grid(x)).flatten(2).mT
        if theirs is None:
            theirs = self.target(x)
        ours, theirs = self.mlp(tokens).float(), theirs.float()                  # (B, N, 768) each
        return 1 - F.cosine_similarity(ours, theirs, dim=-1).mean()


VF_COSINE, VF_PAIRS = 0.5, 0.25  # VA-VAE's margins m1 and m2: what is nearer than these is near enough


class VFLoss(nn.Module):
    """VA-VAE's likeness of latent and vision network (Yao et al. 2025, arXiv 2501.01423), from z' = W z and DINOv2's
    tokens f of the same places:

      mean_i relu(1 - m1 - cos(z'_i, f_i))  +  mean_ij relu(|cos(z'_i, z'_j) - cos(f_i, f_j)| - m2)

    Its weight is constant; theirs follows the gradients. W trains with the model and is not exported.
    """

    def __init__(self, z_dim, width=768):
        super().__init__()
        self.proj = nn.Linear(z_dim, width, bias=False)

    def forward(self, z, features):
        """z (B, c, h, w), features (B, 768, rows, columns) of the same images -> scalar, at least 0. The finer grid is
        averaged to the coarser one."""
        grid = [min(ours, theirs) for ours, theirs in zip(z.shape[2:], features.shape[2:])]
        with torch.autocast(z.device.type, enabled=False):
            z, f = (F.adaptive_avg_pool2d(maps.float(), grid).flatten(2).mT for maps in (z, features))  # (B, N, .)
            z, f = F.normalize(self.proj(z), dim=2), F.normalize(f, dim=2)
            cosine = (z * f).sum(2)                                                                     # (B, N)
            pairs = (z @ z.mT - f @ f.mT).abs()                                                         # (B, N, N)
            return F.relu(1 - VF_COSINE - cosine).mean() + F.relu(pairs - VF_PAIRS).mean()
