"""Encoders: an image becomes a diagonal Gaussian over latents, 8x to 128x smaller per side.

Three families, one naming rule NAME = FAMILY_f<downscale>c<latent channels>:
  vq_*  the encoder of the latent-diffusion KL-VAE (Rombach et al. 2022, arXiv 2112.10752): vq_f8c4, vq_f16c16, ...;
        by options also those of FLUX, FLUX.2 (Black Forest Labs) and VA-VAE (Yao et al. 2025, arXiv 2501.01423)
  dc_*  the deep-compression encoder of DC-AE (Chen et al. 2024, arXiv 2410.10733), residual blocks only: dc_f32c32, ...
  dcae_*  the published DC-AE encoders, with EfficientViT blocks: dcae_f32c32, dcae_f64c128, dcae_f128c512
        (in-1.0 and mix-1.0), and dcae_f32c32_sana (sana-1.0)
and timm_NAME, a frozen vision transformer of timm's, as RAE (Zheng et al. 2025, arXiv 2510.11690)

    python -c "from encoder import make_encoder; print(make_encoder('dc_f32c32', width=0.125))"

Convention: images (B, 3, H, W) in [-1, 1], H and W multiples of the downscale f; latents (B, c, H/f, W/f).
"""
import math
import os
import re
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from plumbing import fast
from plumbing.files import WeightsUnavailable
from plumbing.process import first_line

LOGVAR_RANGE = (-30.0, 20.0)  # as in latent diffusion: a variance that is neither 0 nor infinite in float32


class DiagonalGaussian:
    """Posterior q(z|x) = N(mean, exp(logvar)), independent per value. mean, logvar: (B, c, h, w); logvar is clamped to
    [-30, 20]."""

    def __init__(self, mean, logvar):
        self.mean, self.logvar = mean, logvar.clamp(*LOGVAR_RANGE)

    def mode(self):
        return self.mean

    def sample(self, noise=None, generator=None):
        """One draw, (B, c, h, w). `noise` fixes the standard normal draw; otherwise it comes from `generator`."""
        if noise is None:
            noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self):
        """KL(q || N(0, I)) in nats, summed over c, h, w: (B,). Kingma & Welling 2014 (arXiv 1312.6114), appendix B."""
        mean, logvar = self.mean.float(), self.logvar.float()
        # KL = 1/2 sum (mu^2 + var - 1 - log var)
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2, 3))


def point_mass(mean):
    """The posterior of an encoder that is sure: (almost) no width around mean (B, c, h, w)."""
    return DiagonalGaussian(mean, torch.full_like(mean, LOGVAR_RANGE[0]))


START_LOGVAR = -5.0         # A standard deviation of 0.08: with 1, as default weights have it, latents begin as noise.
START_LOGVAR_LINEAR = -8.0  # 0.02: beside the linear code's latents of unit deviation it costs no visible quality.


def start_posterior(conv, linear):
    """Start the last layer of an encoder, (mean, logvar): a narrow posterior, the same for every image. With the linear
    code its mean is zero, so that the untrained encoder is the code."""
    c = conv.out_channels // 2
    nn.init.zeros_(conv.weight[c:])
    nn.init.constant_(conv.bias[c:], START_LOGVAR_LINEAR if linear else START_LOGVAR)
    if linear:
        nn.init.zeros_(conv.weight[:c])
        nn.init.zeros_(conv.bias[:c])


def start_at_zero(layer):
    """Silence the last layer of a branch: a deep network then starts as a shallow one."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


@torch.no_grad()
def start_coarse(down, last):
    """Start the convolutions `down` that halve the resolution as random mixes of channels, each averaged over the 3 x 3
    pixels, and the `last` one as a mix without neighbours: what is coarse in an image, where most of its energy is,
    then fills the latent from the first step on. The response to a constant keeps its variance."""
    for conv in down:
        conv.weight.copy_(conv.weight.mean((2, 3), keepdim=True).expand_as(conv.weight))
    centre = torch.zeros(3, 3)
    centre[1, 1] = 3.0  # one weight then responds to a constant as nine did
    last.weight.mul_(centre)


# ---------------------------------------------------------------------------------------------------------------------
# The linear code: what an untrained encoder and decoder start from. A lapped orthogonal transform (LOT): like JPEG's
# cosines, but the vectors of neighbouring cells overlap by half, so that no cell borders show. Built without data.

# The expected energy of the coefficients of a textured picture, divided by f^2, in round numbers, for the three colour
# directions COLORS: of a cell's mean, and at frequency (ky, kx) times ky^2 + kx^2. It decides which coefficients are
# kept, and their scale. It is much the same at every f, as pictures look alike at every scale; photographs of 256 px
# have a third to a half of it.
COLORS = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))  # luminance, orange to blue, magenta to green
MEAN_ENERGY = (0.45, 0.12, 0.035)
WAVE_ENERGY = (0.03, 0.0045, 0.0012)


@fast.kept
def lapped_basis(f, rho=0.98):
    """The f vectors of the lapped orthogonal transform for cells of f pixels (even), smoothest first: (f, 2 f) float64.

    Malvar, Staelin 1989 ("The LOT: transform coding without blocking effects", IEEE Trans. ASSP 37). Orthonormal, also
    to the same vectors shifted by f pixels. rho: correlation of neighbouring pixels.
    """
    n = torch.arange(f, dtype=torch.float64)
    cosines = torch.cos(math.pi / f * (n + 0.5) * n[:, None]) * math.sqrt(2 / f)             # DCT-II, (f, f)
    cosines[0] /= math.sqrt(2)
    # Any orthonormal start will do: even minus odd cosines, continued into the next cell as a mirror image, + or -.
    head = (cosines[0::2] - cosines[1::2]) / 2                                               # (f/2, f)
    pixels = torch.arange(2 * f, dtype=torch.float64)
    covariance = rho ** (pixels[:, None] - pixels).abs()                                     # first-order Markov
    basis = torch.empty(f, 2 * f, dtype=torch.float64)
    for parity, sign in ((0, 1), (1, -1)):                                                   # symmetric, antisymmetric
        vectors = torch.cat([head, sign * head.flip(1)], dim=1)                              # (f/2, 2 f)
        _, rotation = torch.linalg.eigh(vectors @ covariance @ vectors.T)
        basis[parity::2] = rotation.flip(1).T @ vectors                                      # largest variance first
    falling = basis[:, :f].sum(dim=1, keepdim=True) < 0  # the sign of an eigenvector is arbitrary
    return torch.where(falling, -basis, basis)


class LappedTables(NamedTuple):
    """What a LappedCode is made of. (f, count) decide it alone."""
    basis: torch.Tensor         # (used, 2 f), the vectors of the frequencies that are used
    colors: torch.Tensor        # (3, 3), unit vectors
    deviation: torch.Tensor     # (count, 1, 1), expected
    index: torch.Tensor         # (count,), where the coefficients stand among 3 used^2


@fast.kept
def lapped_tables(f, count):
    """-> LappedTables on the CPU. Types are written out: a file's latents mean the same whatever torch's default type
    is."""
    square = torch.arange(f, dtype=torch.float64).square()
    wave = torch.tensor(WAVE_ENERGY, dtype=torch.float32)[:, None, None]
    energy = wave / (square[:, None] + square).clamp(min=1)                                  # (3, ky, kx)
    energy[:, 0, 0] = torch.tensor(MEAN_ENERGY, dtype=torch.float32)
    energy, index = energy.flatten().sort(descending=True, stable=True)
    energy, index = energy[:count], index[:count]
    color, ky, kx = index // f**2, index // f % f, index % f
    used = int(torch.maximum(ky, kx).max()) + 1  # frequencies an axis
    colors = F.normalize(torch.tensor(COLORS, dtype=torch.float64))
    deviation = (f * energy.sqrt()).float()[:, None, None]
    return LappedTables(lapped_basis(f)[:used].float(), colors.float(), deviation, (color * used + ky) * used + kx)


class LappedCode:
    """The linear code for cells of f x f pixels: of the 3 f^2 lapped coefficients of a cell those `count` that carry
    most of an average picture's energy, each divided by its expected deviation. No parameters and no state: the tables
    follow from (f, count), wherever the images are. Computed in float32, in a model that is cast to bf16, too: rounded
    tables would cost 0.16 dB of examples/f32c32.safetensors on crops of photographs.

    encode  images (B, 3, H, W) -> coefficients of about unit variance (B, count, H/f, W/f)
    decode  the reverse; with count = 3 f^2 exactly, else the orthogonal projection on the coefficients that are kept
    raises  ValueError for more coefficients than a cell has
    """

    def __init__(self, f, count):
        if count > 3 * f * f:
            raise ValueError(f"cells of {f} x {f} pixels have {3 * f * f} coefficients, not {count}")
        self.f, self.count = f, count
        self.on_cpu = lapped_tables(f, count)

    def tables(self, device):
        """LappedTables on a device."""
        return self.on_cpu if device.type == "cpu" else lapped_tables_on(self.f, self.count, device)

    def encode(self, x):
        basis, colors, deviation, index = self.tables(x.device)
        # Along the rows, then along the columns, then over the colours.
        with torch.autocast(x.device.type, enabled=False):
            x = _mirror(x.float(), self.f // 2)                                              # (B, 3, H, W + f)
            x = x.unfold(3, 2 * self.f, self.f) @ basis.T                                    # (B, 3, H, w, kx)
            x = _mirror(x.permute(0, 1, 3, 4, 2), self.f // 2)                               # (B, 3, w, kx, H + f)
            x = x.unfold(4, 2 * self.f, self.f) @ basis.T                                    # (B, 3, w, kx, h, ky)
            x = torch.einsum("dc,bcwxhy->bdyxhw", colors, x).flatten(1, 3)
            return x[:, index] / deviation

    def decode(self, z):
        basis, colors, deviation, index = self.tables(z.device)
        used = len(basis)
        with torch.autocast(z.device.type, enabled=False):
            B, _, h, w = z.shape
            z = z.float() * deviation
            x = z.new_zeros(B, 3 * used**2, h, w).index_copy(1, index, z)
            x = x.unflatten(1, (3, used, used))                                              # (B, 3, ky, kx, h, w)
            x = torch.einsum("dc,bdyxhw->bchywx", colors, x)
            x = _overlap(x @ basis, self.f)                                                  # (B, 3, h, ky, W)
            x = _overlap(x.permute(0, 1, 4, 2, 3) @ basis, self.f)                           # (B, 3, W, H)
            return x.mT


@fast.kept
def lapped_tables_on(f, count, device):
    return LappedTables(*(table.to(device) for table in lapped_tables(f, count)))


def _mirror(x, n):
    """The last dimension extended by n values at both ends, as mirrors there would show them."""
    return torch.cat([x[..., :n].flip(-1), x, x[..., -n:].flip(-1)], dim=-1)


def _overlap(x, f):
    """Cells with their margins (..., cells, 2 f), each overlapping its neighbours by half, are added up and the outer
    margins folded back: (..., cells * f). The adjoint of cutting a mirrored line into such cells."""
    left, right = x[..., :f], x[..., f:]
    x = (F.pad(left, (0, 0, 0, 1)) + F.pad(right, (0, 0, 1, 0))).flatten(-2)                 # (..., (cells + 1) f)
    n = f // 2
    inside, before, after = x[..., n:-n], x[..., :n], x[..., -n:]
    rest = inside.shape[-1] - n
    return inside + F.pad(before.flip(-1), (0, rest)) + F.pad(after.flip(-1), (rest, 0))


# ---------------------------------------------------------------------------------------------------------------------
# vq_*: the KL-VAE encoder. Group norm, swish, strided convolutions, one attention at the lowest resolution.

def vq_norm(channels):
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)  # 32 groups unless the width was scaled below 32


class VQResBlock(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.norm1, self.conv1 = vq_norm(cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2, self.conv2 = vq_norm(cout), nn.Conv2d(cout, cout, 3, padding=1)
        start_at_zero(self.conv2)
        self.shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x):
        # PyTorch's group norm crashes in backward for channels_last inputs that need no gradient.
        if fast.eager_cpu(x) and not x.requires_grad:
            x = x.contiguous()
        h = self.conv1(fast.group_norm(x, self.norm1, silu=True))
        h = self.conv2(fast.group_norm(h, self.norm2, silu=True))
        return self.shortcut(x) + h


class VQAttention(nn.Module):
    """Single-head self-attention over all positions."""

    def __init__(self, channels):
        super().__init__()
        self.norm = vq_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        start_at_zero(self.out)

    def forward(self, x):
        h = fast.group_norm(x, self.norm)
        q, k, v = (p(h).flatten(2).mT.unsqueeze(1) for p in (self.q, self.k, self.v))  # (B, 1, H*W, C)
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1).mT.reshape(x.shape)
        return x + self.out(h)


KL_F16_WIDTHS = (1, 1, 2, 2, 4)  # The levels' widths, times 128.
FOLD_EPS = 1e-4                  # What FLUX.2 adds to its variances.


class VQEncoder(nn.Module):
    """The KL-VAE encoder of latent diffusion.

    quant   the 1x1 convolution at the end, which FLUX's layout is without
    kl_f16  latent diffusion's network for f = 16, which VA-VAE and MAR have: narrower, with attention in the last level
    fold    FLUX.2's latents: the network ends at f / 2 with c / 4 channels, of which 2 x 2 cells are folded into one,
            and these are normalised by statistics that come with the weights
    raises  ValueError for kl_f16 with another f
    """

    def __init__(self, downscale, z_dim, width=1.0, linear=False, quant=True, kl_f16=False, fold=False):
        super().__init__()
        if kl_f16 and downscale != 16:
            raise ValueError(f"kl_f16 is a network for f = 16, not {downscale}")
        self.downscale, self.z_dim, self.fold = downscale, z_dim, fold
        self.code = LappedCode(downscale, z_dim) if linear else None
        levels = int(math.log2(downscale)) + 1
        if fold:
            levels, z_dim = levels - 1, z_dim // 4
            self.register_buffer("fold_mean", torch.zeros(self.z_dim))
            self.register_buffer("fold_var", torch.ones(self.z_dim))
        multiples = KL_F16_WIDTHS if kl_f16 else [min(2 ** i, 4) for i in range(levels)]
        widths = [_scaled(128 * multiple, width, 1) for multiple in multiples]
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList()  # a level: two residual blocks and, but for the last, a strided convolution
        self.attend = nn.ModuleList()  # a level: attention after each of these blocks, or nothing
        for i, (cin, cout) in enumerate(zip([widths[0]] + widths, widths)):
            level = nn.ModuleList([VQResBlock(cin, cout), VQResBlock(cout, cout)])
            is_last = i == levels - 1
            if not is_last:
                level.append(nn.Conv2d(cout, cout, 3, stride=2))
            self.down.append(level)
            attends = kl_f16 and is_last
            self.attend.append(nn.ModuleList([VQAttention(cout), VQAttention(cout)] if attends else []))
        top = widths[-1]
        self.mid = nn.Sequential(VQResBlock(top, top), VQAttention(top), VQResBlock(top, top))
        self.norm_out = vq_norm(top)
        self.conv_out = nn.Conv2d(top, 2 * z_dim, 3, padding=1)
        self.quant = nn.Conv2d(2 * z_dim, 2 * z_dim, 1) if quant else nn.Identity()
        start_coarse([level[2] for level in self.down if len(level) == 3], self.conv_out)
        start_posterior(self.quant if quant else self.conv_out, linear)

    def forward(self, x):
        """x (B, 3, H, W) in [-1, 1] -> DiagonalGaussian over (B, z_dim, H/f, W/f)."""
        h = self.conv_in(x)
        for level, attention in zip(self.down, self.attend, strict=True):
            for i in range(2):
                h = level[i](h)
                if len(attention):
                    h = attention[i](h)
            if len(level) == 3:
                h = level[2](F.pad(h, (0, 1, 0, 1)))  # the original pads right and bottom only
        h = self.conv_out(fast.group_norm(self.mid(h), self.norm_out, silu=True))
        mean, logvar = self.quant(h).float().chunk(2, dim=1)
        if self.fold:
            variance = self.fold_var.float()[:, None, None] + FOLD_EPS
            mean = (F.pixel_unshuffle(mean, 2) - self.fold_mean.float()[:, None, None]) / variance.sqrt()
            logvar = F.pixel_unshuffle(logvar, 2) - variance.log()
        if self.code is not None:
            mean = mean + self.code.encode(x)
        return DiagonalGaussian(mean, logvar)


# ---------------------------------------------------------------------------------------------------------------------
# dc_*: the deep-compression encoder. Each halving of the resolution has a shortcut without parameters.

class RMSNorm(nn.Module):
    """Divide by the root mean square over channels, per pixel; then weight and bias."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        h = F.rms_norm(x.permute(0, 2, 3, 1), (x.shape[1],), eps=1e-5)                       # (B, H, W, C)
        # Back to x's type at the very end: weights are float32 under autocast, and all blocks after this one would be.
        return (h * self.weight + self.bias).to(x.dtype).permute(0, 3, 1, 2)


class DCResBlock(nn.Module):
    def __init__(self, channels, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = RMSNorm(channels) if norm else nn.Identity()
        if norm:  # silent branches at first, or the image drowns in those of 20 random blocks
            nn.init.zeros_(self.norm.weight)

    def forward(self, x):
        return x + self.norm(self.conv2(F.silu(self.conv1(x))))


ATTENTION_EPS = 1e-15  # As published. Where all keys or all queries of a pixel are negative, 0 / 0 becomes 0.


class LinearAttention(nn.Module):
    """EfficientViT's ReLU linear attention (Cai et al. 2023, arXiv 2205.14756), heads of 32 channels, linear in H*W.

    scales  kernel sizes of further sets of tokens: q, k, v gathered by depthwise and grouped convolutions
    """

    def __init__(self, channels, scales):
        super().__init__()
        wide = 3 * channels
        self.qkv = nn.Conv2d(channels, wide, 1, bias=False)
        self.aggregate = nn.ModuleList()
        for k in scales:
            depthwise = nn.Conv2d(wide, wide, k, padding=k // 2, groups=wide, bias=False)
            grouped = nn.Conv2d(wide, wide, 1, groups=wide // 32, bias=False)
            self.aggregate.append(nn.Sequential(depthwise, grouped))
        self.proj = nn.Conv2d(channels * (1 + len(scales)), channels, 1, bias=False)
        self.norm = RMSNorm(channels)

    def forward(self, x):
        h = self.qkv(x)
        h = torch.cat([h, *(aggregate(h) for aggregate in self.aggregate)], dim=1)  # (B, sets * 3 C, H, W)
        with torch.autocast(x.device.type, enabled=False):  # sums over all pixels: float32
            q, k, v = h.float().flatten(2).unflatten(1, (-1, 96)).chunk(3, dim=2)  # (B, heads, 32, H*W)
            v = F.pad(v, (0, 0, 0, 1), value=1.0)  # a row of ones: its result is the normaliser
            h = v @ F.relu(k).mT @ F.relu(q)  # (B, heads, 33, H*W)
            h = h[:, :, :-1] / (h[:, :, -1:] + ATTENTION_EPS)
        h = h.flatten(1, 2).unflatten(2, x.shape[2:]).to(x.dtype, memory_format=torch.channels_last)
        return x + self.norm(self.proj(h))


class GatedConv(nn.Module):
    """Gated inverted bottleneck: 1x1 conv to 8 times the width, depthwise 3x3, one half gates the other, 1x1 conv."""

    def __init__(self, channels):
        super().__init__()
        self.inverted = nn.Conv2d(channels, 8 * channels, 1)
        self.depth = nn.Conv2d(8 * channels, 8 * channels, 3, padding=1, groups=8 * channels)
        self.point = nn.Conv2d(4 * channels, channels, 1, bias=False)
        self.norm = RMSNorm(channels)

    def forward(self, x):
        h, gate = self.depth(F.silu(self.inverted(x))).chunk(2, dim=1)
        return x + self.norm(self.point(h * F.silu(gate)))


class DCDown(nn.Module):
    """Halve the resolution: conv + space-to-channel (or a strided conv), plus the shortcut without parameters (DC-AE):
    space-to-channel, then the mean over groups of consecutive channels."""

    def __init__(self, cin, cout, shortcut=True, strided=False):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout if strided else cout // 4, 3, stride=2 if strided else 1, padding=1)
        self.cout, self.shortcut, self.strided = cout, shortcut, strided

    def forward(self, x):
        h = self.conv(x) if self.strided else fast.space_to_channel(self.conv(x))
        if self.shortcut:
            h = h + fast.space_to_channel(x).unflatten(1, (self.cout, -1)).mean(dim=2)
        return h


DC_DEPTHS = {  # blocks of each stage, of f128; smaller factors have the first of them
    "dc": (0, 5, 10, 4, 4, 4, 4, 4),
    "dcae": (0, 4, 8, 2, 2, 2, 2, 2),
    "sana": (2, 2, 2, 3, 3, 3, 3, 3),
}


class DCEncoder(nn.Module):
    """DC-AE's encoder. kind: "dc" residual blocks only, Gaussian posterior; "dcae" as published, with EfficientViT
    blocks from the fourth stage on, deterministic; "sana" SANA's variant, with 5x5 tokens and strided convolutions."""

    def __init__(self, downscale, z_dim, width=1.0, norm=True, kind="dc", linear=False):
        super().__init__()
        self.code = LappedCode(downscale, z_dim) if linear else None
        self.downscale, self.z_dim, self.deterministic = downscale, z_dim, kind != "dc"
        stages = int(math.log2(downscale)) + 1
        top = 1024 if kind == "dc" else 2048
        first_attention = stages if kind == "dc" else 3  # the stage from which on blocks attend
        widths = []
        for i, w in enumerate((128, 256, 512, 512, 1024, 1024, top, top)[:stages]):
            multiple = 32 if i >= first_attention else 4  # a head's channels; what pixels are folded into
            widths.append(_scaled(w, width, multiple))
        depths = DC_DEPTHS[kind]
        strided = kind == "sana"
        scales = (5,) if kind == "sana" else ()
        # Where stage 0 has no block, the first convolution goes straight to half the resolution.
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1) if depths[0] else DCDown(3, widths[1], shortcut=False)
        self.stages = nn.ModuleList()
        for i, (w, depth) in enumerate(zip(widths, depths, strict=False)):
            if i < first_attention:
                blocks = [DCResBlock(w, norm) for _ in range(depth)]
            else:
                blocks = [nn.Sequential(LinearAttention(w, scales), GatedConv(w)) for _ in range(depth)]
            if depth and i < stages - 1:
                blocks.append(DCDown(w, widths[i + 1], strided=strided))
            self.stages.append(nn.Sequential(*blocks))
        self.conv_out = nn.Conv2d(widths[-1], z_dim if self.deterministic else 2 * z_dim, 3, padding=1)
        if not self.deterministic:
            start_coarse([m.conv for m in self.modules() if isinstance(m, DCDown)], self.conv_out)
            start_posterior(self.conv_out, linear)
        elif linear:
            start_at_zero(self.conv_out)
        elif widths[-1] % z_dim:
            raise ValueError(f"a dcae encoder averages {widths[-1]} channels to c, which must divide them, not {z_dim}")

    def forward(self, x):
        """x (B, 3, H, W) in [-1, 1] -> DiagonalGaussian over (B, z_dim, H/f, W/f), of (almost) no width for dcae."""
        h = self.conv_in(x)
        for stage in self.stages:
            h = stage(h)
        if self.deterministic:
            mean = self.conv_out(h).float()
            if self.code is not None:
                mean = mean + self.code.encode(x)
            else:
                mean = mean + h.unflatten(1, (self.z_dim, -1)).mean(dim=2).float()           # DC-AE's shortcut
            return point_mass(mean)
        mean, logvar = self.conv_out(h).float().chunk(2, dim=1)
        if self.code is not None:
            mean = mean + self.code.encode(x)
        return DiagonalGaussian(mean, logvar)


# ---------------------------------------------------------------------------------------------------------------------
# timm_*: a vision transformer that was trained to see. Its patch tokens are the latent, for a decoder to learn from.

class TimmEncoder(nn.Module):
    """A vision transformer of timm's as a frozen, deterministic encoder (RAE, arXiv 2510.11690): the latent is its
    patch tokens, each normalised over its channels (the last layer norm, without weight and bias), on their grid.

    name    as timm has it, say vit_base_patch14_dinov2.lvd142m; with random weights, see `read_weights`
    .downscale is the patch's side p, for the decoder rounded up to a multiple of 8: images are resized by
    p / downscale, DINOv2's from 256 to 224 px, and both have 16 x 16 cells. .z_dim: the tokens' width.
    raises  ValueError where timm has no vision transformer of that name
    """

    def __init__(self, name):
        super().__init__()
        self.name, self.network = name, tokens_alone(timm_vit(name))
        self.patch, self.z_dim = self.network.patch_embed.patch_size[0], self.network.embed_dim
        self.downscale = math.ceil(self.patch / 8) * 8
        for key in ("mean", "std"):  # of R, G, B in [0, 1]
            self.register_buffer(key, torch.tensor(self.network.pretrained_cfg[key])[:, None, None])
        self.requires_grad_(False)

    def read_weights(self, path=None):
        """Weights of the network by timm's or the original names from a file; None: timm's own, from the Hugging Face
        cache or a download. WeightsUnavailable, ValueError."""
        if path and not os.path.isfile(path):
            raise WeightsUnavailable(f"no weight file at {path}")
        try:
            network = timm_vit(self.name, pretrained=True, pretrained_cfg_overlay={"file": str(path)} if path else None)
            self.network.load_state_dict(tokens_alone(network).state_dict())
        except Exception as error:  # noqa: BLE001 the hub client raises many classes; offline, all mean the same
            if path:
                raise ValueError(f"{path} does not hold the weights of timm's {self.name} "
                                 f"({first_line(error)})") from None
            raise WeightsUnavailable(f"the weights of timm/{self.name} are not in the Hugging Face cache and could not "
                                     "be downloaded: give them with --enc_ckpt FILE") from None

    def forward(self, x):
        """x (B, 3, H, W) in [-1, 1] -> DiagonalGaussian over (B, z_dim, H/f, W/f), of (almost) no width."""
        grid = [side // self.downscale for side in x.shape[2:]]
        dtype, x = x.dtype, (x.float() + 1) / 2
        if self.patch != self.downscale:
            x = F.interpolate(x, size=[self.patch * n for n in grid], mode="bicubic", antialias=True)
        tokens = self.network.forward_features(((x - self.mean) / self.std).to(dtype))
        tokens = tokens[:, self.network.num_prefix_tokens:]                                  # (B, h w, z_dim)
        return point_mass(tokens.mT.unflatten(2, grid).float())


@cache
def timm_shape(name):
    """(downscale, z_dim) of timm_NAME, which takes building it."""
    encoder = make_encoder(name)
    return encoder.downscale, encoder.z_dim


def timm_vit(name, **options):
    """timm's vision transformer of this name, for images of any size. ValueError where there is none."""
    import timm
    if not timm.is_model(name):
        raise ValueError(f"timm has no network {name}")
    try:
        network = timm.create_model(name, num_classes=0, dynamic_img_size=True, **options)
        network.num_prefix_tokens, network.patch_embed.patch_size  # what a vision transformer has
    except (TypeError, AttributeError):
        raise ValueError(f"timm's {name} is no vision transformer for images of any size") from None
    return network


def tokens_alone(network):
    """The network without what follows its tokens, and its last layer norm without weight and bias."""
    network.norm = nn.LayerNorm(network.embed_dim, eps=1e-6, elementwise_affine=False)
    for name in ("fc_norm", "attn_pool", "head"):
        setattr(network, name, nn.Identity())
    return network


# ---------------------------------------------------------------------------------------------------------------------

FAMILIES = {"vq": VQEncoder, "dc": DCEncoder, "dcae": partial(DCEncoder, kind="dcae"),
            "dcae_sana": partial(DCEncoder, kind="sana")}
TIMM = "timm_"  # begins the names of timm's networks


def _scaled(channels, width, multiple):
    scaled = round(channels * width)
    if scaled < multiple or scaled % multiple or abs(scaled - channels * width) > 1e-6:
        raise ValueError(f"encoder width {width} turns {channels} channels into {channels * width:g}, "
                         f"which must be a whole multiple of {multiple}: use a power of two such as 0.25")
    return scaled


def make_encoder(name, width=1.0, **options):
    """Build an encoder by name, with random weights.

    name    (vq|dc|dcae)_f<8|16|32|64|128>c<latent channels>, e.g. vq_f8c4, dc_f32c32, dcae_f64c128; dcae_f32c32_sana;
            timm_NAME
    width   multiplies all widths but timm's; 1.0 is the published size, 0.125 runs on a laptop
    options vq, dc, dcae: linear=True adds the linear code (LappedCode) to the mean, and starts the rest of it at zero
            dc: norm=False leaves out the RMS norms, as the published DC-SSDAE encoders do
            vq: quant=False leaves out the last 1x1 convolution (quant_conv), as FLUX's layout does
            vq_f16: kl_f16=True is latent diffusion's network for f16, which VA-VAE and MAR have
            vq: fold=True folds 2 x 2 cells of a network for f / 2, as FLUX.2 does
    returns nn.Module with .downscale (f) and .z_dim (c); forward(x) -> DiagonalGaussian
    raises  ValueError for a name outside this rule or a width that gives fractional channels
    """
    if name.startswith(TIMM):
        return TimmEncoder(name.removeprefix(TIMM), **options)
    family, downscale, z_dim = parse_name(name)
    return FAMILIES[family](downscale, z_dim, width, **options)


def parse_name(name):
    """An encoder's name -> (key of FAMILIES or "timm", downscale f, latent channels c). ValueError for an unknown one.
    """
    if name.startswith(TIMM):
        return "timm", *timm_shape(name)
    match = re.fullmatch(r"([a-z][a-z0-9]*)_f(8|16|32|64|128)c([1-9]\d*)(_sana)?", name)
    family = None
    if match:
        family = match[1] + (match[4] or "")
    if family not in FAMILIES:
        raise ValueError(f"unknown encoder '{name}': expected (vq|dc|dcae)_f<8|16|32|64|128>c<channels>, for example "
                         "dc_f32c32, or dcae_f32c32_sana, or timm_NAME")
    return family, int(match[2]), int(match[3])
