"""Encoders: an image becomes a diagonal Gaussian over latents, 8x to 128x smaller per side.

Two families, one naming rule NAME = FAMILY_f<downscale>c<latent channels>:
  vq_*  the encoder of the latent-diffusion KL-VAE (Rombach et al. 2022, arXiv 2112.10752): vq_f8c4, vq_f16c16, ...
  dc_*  the deep-compression encoder of DC-AE (Chen et al. 2024, arXiv 2410.10733), residual blocks only: dc_f32c32, ...

    python -c "from encoder import make_encoder; print(make_encoder('dc_f32c32', width=0.125))"

Convention: images (B, 3, H, W) in [-1, 1], H and W multiples of the downscale f; latents (B, c, H/f, W/f).
"""
import math
import re

import torch
import torch.nn.functional as F
from torch import nn


class DiagonalGaussian:
    """Posterior q(z|x) = N(mean, exp(logvar)), independent per value. mean, logvar: (B, c, h, w); logvar is clamped to
    [-30, 20]."""

    def __init__(self, mean, logvar):
        self.mean, self.logvar = mean, logvar.clamp(-30.0, 20.0)

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
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2, 3))


# ---------------------------------------------------------------------------------------------------------------------
# vq_*: the KL-VAE encoder. Group norm, swish, strided convolutions, one attention at the lowest resolution.

def group_norm(channels):
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)  # 32 groups unless the width was scaled below 32


class VQResBlock(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.norm1, self.conv1 = group_norm(cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2, self.conv2 = group_norm(cout), nn.Conv2d(cout, cout, 3, padding=1)
        self.shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class VQAttention(nn.Module):
    """Single-head self-attention over all positions."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (p(h).flatten(2).mT.unsqueeze(1) for p in (self.q, self.k, self.v))  # (B, 1, H*W, C)
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1).mT.reshape(x.shape)
        return x + self.out(h)


class VQEncoder(nn.Module):
    def __init__(self, downscale, z_dim, width=1.0):
        super().__init__()
        self.downscale, self.z_dim = downscale, z_dim
        levels = int(math.log2(downscale)) + 1
        widths = [_scaled(128 * min(2 ** i, 4), width, 1) for i in range(levels)]
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList()  # a level: two residual blocks and, but for the last, a strided convolution
        for i, (cin, cout) in enumerate(zip([widths[0]] + widths, widths)):
            level = nn.ModuleList([VQResBlock(cin, cout), VQResBlock(cout, cout)])
            if i < levels - 1:
                level.append(nn.Conv2d(cout, cout, 3, stride=2))
            self.down.append(level)
        top = widths[-1]
        self.mid = nn.Sequential(VQResBlock(top, top), VQAttention(top), VQResBlock(top, top))
        self.norm_out = group_norm(top)
        self.conv_out = nn.Conv2d(top, 2 * z_dim, 3, padding=1)
        self.quant = nn.Conv2d(2 * z_dim, 2 * z_dim, 1)

    def forward(self, x):
        """x (B, 3, H, W) in [-1, 1] -> DiagonalGaussian over (B, z_dim, H/f, W/f)."""
        h = self.conv_in(x)
        for level in self.down:
            h = level[1](level[0](h))
            if len(level) == 3:
                h = level[2](F.pad(h, (0, 1, 0, 1)))  # the original pads right and bottom only
        h = self.conv_out(F.silu(self.norm_out(self.mid(h))))
        return DiagonalGaussian(*self.quant(h).float().chunk(2, dim=1))


# ---------------------------------------------------------------------------------------------------------------------
# dc_*: the deep-compression encoder. Each halving of the resolution has a shortcut without parameters (section 3.1).

class RMSNorm(nn.Module):
    """Divide by the root mean square over channels, per pixel; then weight and bias."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(dim=1, keepdim=True) + self.eps)
        return h.to(x.dtype) * self.weight[:, None, None] + self.bias[:, None, None]


class DCResBlock(nn.Module):
    def __init__(self, channels, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = RMSNorm(channels) if norm else nn.Identity()

    def forward(self, x):
        return x + self.norm(self.conv2(F.silu(self.conv1(x))))


class DCDown(nn.Module):
    """Halve the resolution: conv + space-to-channel, plus space-to-channel + channel averaging as the shortcut
    (equation 1)."""

    def __init__(self, cin, cout, shortcut=True):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout // 4, 3, padding=1)
        self.cout, self.shortcut = cout, shortcut

    def forward(self, x):
        h = F.pixel_unshuffle(self.conv(x), 2)
        if self.shortcut:
            h = h + F.pixel_unshuffle(x, 2).unflatten(1, (self.cout, -1)).mean(dim=2)  # groups of consecutive channels
        return h


class DCEncoder(nn.Module):
    def __init__(self, downscale, z_dim, width=1.0, norm=True):
        super().__init__()
        self.downscale, self.z_dim = downscale, z_dim
        levels = int(math.log2(downscale)) + 1
        widths = [_scaled(w, width, 4) for w in (128, 256, 512, 512, 1024, 1024, 1024, 1024)[:levels]]
        depths = (0, 5, 10, 4, 4, 4, 4, 4)[:levels]
        self.stem = DCDown(3, widths[1], shortcut=False)  # stage 0 has no block: straight to half resolution
        self.stages = nn.ModuleList()
        for i in range(levels):
            stage = nn.Sequential(*(DCResBlock(widths[i], norm) for _ in range(depths[i])))
            if 0 < i < levels - 1:
                stage.append(DCDown(widths[i], widths[i + 1]))
            self.stages.append(stage)
        self.head = nn.Conv2d(widths[-1], 2 * z_dim, 3, padding=1)

    def forward(self, x):
        """x (B, 3, H, W) in [-1, 1] -> DiagonalGaussian over (B, z_dim, H/f, W/f)."""
        h = self.stem(x)
        for stage in self.stages:
            h = stage(h)
        return DiagonalGaussian(*self.head(h).float().chunk(2, dim=1))


# ---------------------------------------------------------------------------------------------------------------------

FAMILIES = {"vq": VQEncoder, "dc": DCEncoder}


def _scaled(channels, width, multiple):
    scaled = round(channels * width)
    if scaled < multiple or scaled % multiple or abs(scaled - channels * width) > 1e-6:
        raise ValueError(f"encoder width {width} turns {channels} channels into {channels * width:g}, "
                         f"which must be a whole multiple of {multiple}: use a power of two such as 0.25")
    return scaled


def make_encoder(name, width=1.0, **options):
    """Build an encoder by name, with random weights.

    name    (vq|dc)_f<8|16|32|64|128>c<latent channels>, e.g. vq_f8c4, dc_f32c32, dc_f128c512
    width   multiplies all widths; 1.0 is the published size, 0.125 runs on a laptop
    options dc only: norm=False leaves out the RMS norms, as the published DC-SSDAE encoders do
    returns nn.Module with .downscale (f) and .z_dim (c); forward(x) -> DiagonalGaussian
    raises  ValueError for a name outside this rule or a width that gives fractional channels
    """
    match = re.fullmatch(r"([a-z]+)_f(8|16|32|64|128)c([1-9]\d*)", name)
    if not match or match[1] not in FAMILIES:
        raise ValueError(f"unknown encoder '{name}': expected {'|'.join(FAMILIES)} + _f<8|16|32|64|128>c<channels>, "
                         "for example dc_f32c32")
    return FAMILIES[match[1]](int(match[2]), int(match[3]), width, **options)
