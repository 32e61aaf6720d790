"""The autoencoder: a deep-compression encoder and a diffusion decoder in pixel space (U-ViT),
conditioned on the latent.

  UViT     the decoder of SSDD (Vallaeys, Verbeek, Cord 2025, arXiv 2510.04961): convolutions at full to 1/8 resolution,
           transformer blocks with windowed attention at 1/8, skip connections between
  DCSSDAE  encoder + decoder + sampler in one module, saved to and loaded from one file

    python -c "import torch, model; m = model.DCSSDAE('dc_f32c32', 'XS', enc_width=0.125); z = m.encode(torch.rand(
        1, 3, 64, 64) * 2 - 1).mode(); print(z.shape, m.decode(z).shape)"

Conventions: images (B, 3, H, W) in [-1, 1]; latents (B, c, H/f, W/f). Flow matching: t=0 is data, t=1 noise, the
network predicts v = x - e. Equilibrium matching: no time; the network predicts a field that points from the data
towards the noise.
"""
import json
import math
from typing import NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import sampler
from encoder import (
    DCDown,
    DCResBlock,
    DiagonalGaussian,
    GatedConv,
    LappedCode,
    LinearAttention,
    VQResBlock,
    make_encoder,
    start_at_zero,
)
from losses import EqM, per_image
from plumbing import fast, graphs, published
from plumbing.files import read_tensors, whole

# Decoder sizes, as SSDD names them. Parameters in millions at z_dim 4, window 17: with time (FM) and without (EqM).
SIZES = {
    #      channels, multipliers, transformer blocks     FM       EqM
    "XS": (32, (1, 2, 3, 3), 8),                    #   5.00     4.61
    "S": (48, (1, 2, 3, 3), 8),                     #  14.09    12.78
    "B": (64, (1, 2, 3, 3), 10),                    #  21.18    19.61
    "M": (96, (1, 2, 3, 3), 12),                    #  50.36    46.85
    "L": (96, (1, 2, 4, 4), 16),                    #  90.84    86.59
    "XL": (128, (1, 2, 4, 4), 16),                  # 161.42   153.86
    "H": (192, (1, 2, 4, 4), 16),                   # 363.01   346.03
}

# A network that adds to a linear base learns from a residual that is small and mostly unpredictable at first. Adam
# takes steps of full size even where a gradient is mostly noise. They put errors into the output, and the network
# lowers the loss fastest by making its output zero. UViT.addition and the next constants are there to prevent that.
GROUP_SIZE = 8            # Norms have groups of 8 channels: with 32 groups, as published, XS would have one channel in
#                           each, which takes away its mean. norm_out is no norm at all, so that contrast stays.
OUTPUT_GAIN = 3.0         # The network adds its output times this and times the base's local contrast; what the code
#                           leaves out is about one contrast (docs/results.md). So Adam's steps count three times.
CONTRAST_CELL = 8         # Contrast is measured on 16 x 16 pixels around the middle of every cell of 8 x 8.
LEAST_CONTRAST = 1 / 255  # It is at least half a level of 8 bits.
INPUT_GAIN = 0.1          # Noise from N(0, I) is faint at the input: it tells nothing about the image.
T_LEAST = 1e-4            # FM's velocity (D - x_t) / t divides by at least this.

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0)  # What fit_linear_decoder tries, times the latents' mean square.
FORMAT = 5    # Files that DCSSDAE.save writes say this, and those of another format are refused.


def level_widths(size):
    """Channels of the four levels, highest resolution first."""
    channels, multipliers, _ = SIZES[size]
    return [math.ceil(channels * m / 32) * 32 for m in multipliers]


# ---------------------------------------------------------------------------------------------------------------------
# Building blocks

class LatentNorm(nn.Module):
    """Normalise every latent channel with running statistics; BatchNorm2d in evaluation, and its state dict.

    Unlike BatchNorm it does the same in training: the statistics are constants of a step, moved once a step by `update`
    from the whole batch. So no sample's output depends on the others, on how the batch is split over micro-batches and
    processes, or on the mode.
    """

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, z):
        return F.batch_norm(z, self.running_mean.to(z.dtype), self.running_var.to(z.dtype),
                            self.weight.to(z.dtype), self.bias.to(z.dtype), training=False)

    @torch.no_grad()
    def update(self, count, total, total_sq, good):
        """count: number of values per channel; total, total_sq: (channels,) sums of z and z**2 over the whole batch,
        float64; good: whether to do it, a bool tensor. Nothing of this is read back from the device."""
        mean = total / count
        # Var z = (E[z^2] - E[z]^2) n / (n - 1), unbiased as BatchNorm's
        var = (total_sq / count - mean.square()).clamp(min=0) * count / max(count - 1, 1)
        self.num_batches_tracked += good.long()
        # The plain average of the first 10 batches, which forgets the initial 0 and 1 at once; then exponential.
        momentum = self.num_batches_tracked.to(self.running_mean.dtype).reciprocal().clamp(min=0.1)
        for running, new in ((self.running_mean, mean), (self.running_var, var)):
            running.copy_(torch.where(good, running.lerp(new.to(running.dtype), momentum), running))


def group_count(channels, group_size):
    """Number of groups of a group norm: 32 as published (group_size None), else of group_size channels each."""
    return channels // group_size if group_size else 32


class GroupNorm(nn.Module):
    """Group norm with weight and bias, and SiLU. groups 0: weight and bias without the norm."""

    def __init__(self, channels, groups):
        super().__init__()
        self.groups = groups
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x, scale=None, shift=None):
        """scale, shift: (B, C) of the time's modulation, * (1 + scale) + shift; None without a time."""
        weight, bias = self.weight, self.bias
        if scale is not None:
            weight, bias = (weight * (1 + scale))[:, :, None, None], (bias * (1 + scale) + shift)[:, :, None, None]
        if self.groups == 0:
            weight, bias = weight[:, None, None], bias[:, None, None]
            return F.silu(torch.addcmul(bias.to(x.dtype), x, weight.to(x.dtype)))
        return fast.norm_silu(x, weight, bias, self.groups)


class AdaGN(nn.Module):
    """Group norm, scale and shift from the latent's context map (B, ctx, h, w), nearest-resized to x, then SiLU:
    norm(x) * (1 + scale) + shift."""

    def __init__(self, channels, groups, ctx):
        super().__init__()
        self.groups = groups
        self.proj = nn.Conv2d(ctx, 2 * channels, 1)

    def forward(self, x, mod):  # mod (B, 2 C, h, w): 1 + scale and shift, of Condition.adagn
        scale, shift = mod.chunk(2, dim=1)
        return fast.norm_silu(x, scale, shift, self.groups)


class ResBlock(nn.Module):
    def __init__(self, cin, cout, group_size, ctx, temb=None):
        super().__init__()
        self.norm1 = AdaGN(cin, group_count(cin, group_size), ctx)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2 = GroupNorm(cout, group_count(cout, group_size))
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.time = nn.Linear(temb, 2 * cout) if temb else None
        self.shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x, mod, temb=None):
        scale = shift = None
        if self.time is not None:
            scale, shift = self.time(F.silu(temb)).chunk(2, dim=1)  # (B, cout) each
        h = self.conv1(self.norm1(x, mod))
        h = self.norm2(h, scale, shift)  # on lines of their own, which let go of the old h
        h = self.conv2(h)
        return h.add_(self.shortcut(x))


class WindowAttention(nn.Module):
    """Multi-head attention in which a token sees the tokens at most window // 2 rows and columns away, with a learned
    bias per offset."""

    def __init__(self, dim, heads, window):
        super().__init__()
        self.heads, self.window = heads, window
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.out = nn.Linear(dim, dim)
        self.bias_table = nn.Parameter(torch.zeros(window, window, heads))  # [row offset, column offset, head]

    def forward(self, x, windows, bias):
        """x (B, C, h, w), windows fast.windows_for(h, w, self.window, ...), bias windows.bias(self.bias_table)
        -> (B, C, h, w)."""
        q = fast.linear(x, self.q).flatten(2).mT                                         # (B, N, C)
        kv_weight = torch.cat([self.k.weight, self.v.weight])[:, :, None, None]
        kv = F.conv2d(x, kv_weight).flatten(2).mT                                        # (B, N, 2 C)
        out = fast.window_attention(q, kv, windows, bias)                                # (B, N, C)
        return fast.linear(out.mT.unflatten(2, x.shape[2:]), self.out)


class TransformerBlock(nn.Module):
    def __init__(self, dim, ctx, heads, window):
        super().__init__()
        self.ada = nn.Linear(ctx, 2 * dim)
        self.attn = WindowAttention(dim, heads, window)
        self.norm = nn.LayerNorm(dim)
        self.mlp_in, self.mlp_out = nn.Linear(dim, 8 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x, mod, windows, bias):  # x (B, dim, h, w); mod of Condition.adaln; the rest as WindowAttention
        h = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2]).permute(0, 3, 1, 2)
        shift, scale = mod.chunk(2, dim=-1)
        x = x + self.attn(fast.modulate(h, scale, shift), windows, bias)
        h = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        value, gate = fast.linear(h, self.mlp_in).chunk(2, dim=1)                             # (B, 4 dim, h, w) each
        return x + fast.linear(value * F.gelu(gate), self.mlp_out)


def time_embedding(t, dim):
    """Sinusoids of 1000 t, cosines first: t (B,) in [0, 1] -> (B, dim). Vaswani et al. 2017 (arXiv 1706.03762),
    section 3.5."""
    angles = 1000.0 * t.float()[:, None] * frequencies(dim, t.device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@fast.kept
def frequencies(dim, device):
    return torch.exp(-math.log(10000.0) * torch.arange(dim // 2, device=device, dtype=torch.float32) / (dim // 2))


# ---------------------------------------------------------------------------------------------------------------------
# The decoder

def local_contrast(image):
    """image (B, 3, H, W), sides multiples of 8 -> (B, 1, H, W): the standard deviation of the pixels around, never less
    than LEAST_CONTRAST.

    Of the 16 x 16 pixels around the middle of every cell of 8 x 8 (at the border of those that there are), the root
    mean square over the colours; between the middles linear.
    """
    def around(values):
        return F.avg_pool2d(values, 2 * CONTRAST_CELL, CONTRAST_CELL, CONTRAST_CELL // 2, count_include_pad=False)

    mean_square = around(image.square().mean(1, keepdim=True))                                  # (B, 1, H/8, W/8)
    square_of_mean = around(image).square().mean(1, keepdim=True)
    variance = (mean_square - square_of_mean).clamp(min=0)
    deviation = (variance + LEAST_CONTRAST ** 2).sqrt()
    return F.interpolate(deviation, scale_factor=CONTRAST_CELL, mode="bilinear")


class Condition(NamedTuple):
    """What the decoder makes of a latent z (B, z_dim, h, w) alone: computed once, used by every sampling step."""
    input_map: torch.Tensor     # (B, C, 5h, 5w), the input convolutions' part of the latent: see fast.spread
    adagn: torch.Tensor         # (B, ., h, w), 1 + scale and shift of all AdaGN, in the order of UViT.projections
    adaln: torch.Tensor | None  # (B, h, 1, w, 1, .), shift and 1 + scale of all transformer blocks: fast.per_block
    bias: torch.Tensor | None   # (blocks, heads, kinds, queries, keys), of all attentions: fast.Windows.bias
    base: torch.Tensor | None   # (B, 3, H, W), the linear image
    base_map: torch.Tensor | None  # (B, C/2, H, W), the input convolution's part of it
    contrast: torch.Tensor | None  # (B, 1, H, W), the base's local_contrast

    def rows(self, chosen):
        """The Condition of some samples of the batch: indices or a mask."""
        fields = {}
        for name, value in self._asdict().items():
            if value is not None and name != "bias":  # which is the same for all
                value = value[chosen]
            fields[name] = value
        return Condition(**fields)


class UViT(nn.Module):
    """SSDD's diffusion decoder: (noisy image, latent, time) -> field of the image's shape.

    size       a key of SIZES
    z_dim      channels of the latent
    time_cond  True for flow matching, False for equilibrium matching
    depth      number of transformer blocks, instead of the size's own
    window     odd; a token attends to window x window tokens around it
    field_at_noise  the field at the noise end is this number times (noise - image): -1 for FM, lam c(0) for EqM. Given,
               the field is field_at_noise * x + network(x, z, t), and the network need not carry the noise from its
               input to its output. With `base` it is field_at_noise * (x - D) at all levels, see `assemble`. None, as
               published: the field is the network's output
    base       (f, count): the estimate of the image starts from a linear one, `count` lapped coefficients
               (encoder.LappedCode) read from the latent by a 1x1 convolution; the network adds to it what these leave
               out (`addition`), is silent at first, and sees it beside the noisy image, the latent itself not at first;
               see GROUP_SIZE, INPUT_GAIN
    joint_input  one input convolution on image and latent together, the latent not normalised: SSDD as published
    raises     ValueError for an unknown size, an even window, and a base without field_at_noise or with joint_input
    """

    def __init__(self, size="S", z_dim=32, time_cond=True, depth=None, window=17, field_at_noise=None,
                 joint_input=False, base=None):
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"unknown decoder size '{size}': expected one of {', '.join(SIZES)}")
        if base and (joint_input or field_at_noise is None):
            raise ValueError("a linear decoder needs the input skip, and no joint_input: its field is field_at_noise * "
                             "(noisy image - estimate)")
        if window % 2 == 0:
            raise ValueError(f"the attention window must be odd, got {window}")
        if depth is None:
            depth = SIZES[size][2]
        widths = level_widths(size)
        c, top = widths[0], widths[-1]
        temb = 4 * c if time_cond else None
        group_size = GROUP_SIZE if base else None
        self.channels, self.z_dim, self.time_cond, self.field_at_noise = c, z_dim, time_cond, field_at_noise
        self.checkpointing = False  # True: training keeps only the residual blocks' inputs, and computes the rest twice
        if time_cond:
            self.time = nn.Sequential(nn.Linear(c, temb), nn.SiLU(), nn.Linear(temb, temb))

        if joint_input:
            self.norm_z, self.conv_in_x, self.conv_in_z = nn.Identity(), nn.Identity(), nn.Identity()
        else:
            self.norm_z = LatentNorm(z_dim)
            images = 6 if base else 3  # channels of the noisy image and of the base
            self.conv_in_x = nn.Conv2d(images, c // 2, 3, padding=1)
            self.conv_in_z = nn.Conv2d(z_dim, c // 2, 3, padding=1)
        self.conv_in = nn.Conv2d(3 + z_dim if joint_input else c, c, 3, padding=1)
        self.context = nn.Sequential(nn.Conv2d(z_dim, c, 3, padding=1), nn.SiLU(), nn.Conv2d(c, c, 3, padding=1))

        # Down: two residual blocks a level, then a strided convolution. Every output is a skip connection.
        self.down, skips = nn.ModuleList(), [c]
        for i, (cin, cout) in enumerate(zip([c] + widths, widths)):
            level = nn.ModuleList([ResBlock(cin, cout, group_size, c, temb), ResBlock(cout, cout, group_size, c, temb)])
            skips += [cout, cout]
            if i < 3:
                level.append(nn.Conv2d(cout, cout, 3, stride=2, padding=1))
                skips.append(cout)
            self.down.append(level)

        heads = min(16, max(4, top // 64))
        self.mid_norm = nn.GroupNorm(group_count(top, group_size), top, eps=1e-6)
        self.mid_in, self.mid_out = nn.Linear(top, top), nn.Linear(top, top)
        self.blocks = nn.ModuleList(TransformerBlock(top, c, heads, window) for _ in range(depth))

        # Up: three residual blocks a level, each with one skip connection, then nearest x2 and a convolution.
        self.up, cin = nn.ModuleList(), top
        for i, cout in enumerate(reversed(widths)):
            level = nn.ModuleList()
            for _ in range(3):
                level.append(ResBlock(cin + skips.pop(), cout, group_size, c, temb))
                cin = cout
            if i < 3:
                level.append(nn.Conv2d(cout, cout, 3, padding=1))
            self.up.append(level)
        self.norm_out = GroupNorm(c, 0 if base else 32)
        self.conv_out = nn.Conv2d(c, 3, 3, padding=1)

        for m in self.modules():
            if isinstance(m, ResBlock):
                start_at_zero(m.conv2)
            elif isinstance(m, TransformerBlock):
                start_at_zero(m.mlp_out)
        self.base = None
        if base:
            self.start_from_base(*base)

    def start_from_base(self, f, count):
        """Add the linear base, beside which the network is silent at first. See the class on `base`."""
        self.code, self.base = LappedCode(f, count), nn.Conv2d(self.z_dim, count, 1)
        nn.init.dirac_(self.base.weight)
        nn.init.zeros_(self.base.bias)
        self.revision = nn.Parameter(torch.zeros(count, 1, 1))
        start_at_zero(self.conv_out)
        # The base shows in its place all that the latent says. What the latent gives to the input and the norms is the
        # same over a whole cell and another for every image: at random it hides the base, so it starts at zero.
        nn.init.zeros_(self.norm_z.weight)
        for m in self.modules():
            if isinstance(m, AdaGN):
                start_at_zero(m.proj)
            elif isinstance(m, TransformerBlock):
                start_at_zero(m.ada)

    def forward(self, x, z=None, t=None, condition=None):
        """x (B, 3, H, W), z (B, z_dim, H/f, W/f), t (B,) in [0, 1] with time_cond -> (B, 3, H, W). In the place of z
        what the method `condition` made of it, once for many steps. ValueError for sides that do not fit, for a t where
        there is no time, and for none where there is one."""
        field, _ = self.forward_with_tokens(x, z, t, condition)
        return field

    def projections(self):
        """What every AdaGN makes of the context by, in the order of their use. No list that is kept: a replica of
        nn.DataParallel has modules of its own."""
        found = []
        for level in (*self.down, *self.up):
            found += [block.norm1.proj for block in level if isinstance(block, ResBlock)]
        return found

    def condition(self, z, H, W):
        """The Condition of images of H x W: all that depends on the latent z (B, z_dim, h, w) alone."""
        h, w = z.shape[-2:]
        dtype = self.conv_out.weight.dtype
        z = z.contiguous(memory_format=torch.channels_last)
        if H % (8 * h) or W % (8 * w):
            raise ValueError("the decoder needs image sides that are multiples of 8 and of the latent's, by a factor "
                             f"that is a multiple of 8; got {H}x{W} and a {h}x{w} latent")
        base = base_map = contrast = None
        if self.base is not None:
            f = self.code.f
            if (H, W) != (f * h, f * w):
                raise ValueError(f"the linear image of a {h}x{w} latent is {f * h}x{f * w}, got {H}x{W}")
            base = self.base_image(z).contiguous(memory_format=torch.channels_last)
            base_map = F.conv2d(base.to(dtype), self.conv_in_x.weight[:, 3:], padding=1)                # (B, C/2, H, W)
            # A scale, not a signal: the latent takes no gradient through it.
            contrast = local_contrast(base.detach())                                                    # (B, 1, H, W)
        normalised = self.norm_z(z.to(dtype))
        context = self.context(normalised)                                                              # (B, C, h, w)
        # From here on nothing new, but for speed: every norm's projection of the context, all at once.
        projections = self.projections()
        weight = torch.cat([p.weight for p in projections])
        bias = torch.cat([p.bias for p in projections])
        adagn = F.conv2d(context, weight, bias)
        counts = []
        for p in projections:
            scales = shifts = p.out_channels // 2
            counts += [scales, shifts]
        adagn = adagn + fast.ones_and_zeros(tuple(counts), adagn.dtype, adagn.device)
        adaln = attention_bias = None
        if self.blocks:
            windows = fast.windows_for(H // 8, W // 8, self.blocks[0].attn.window, z.device)
            tables = torch.stack([block.attn.bias_table for block in self.blocks])
            attention_bias = windows.bias(tables.to(context.dtype))
            weight = torch.cat([block.ada.weight for block in self.blocks])[:, :, None, None]
            bias = torch.cat([block.ada.bias for block in self.blocks])
            adaln = F.conv2d(F.silu(context), weight, bias)
            counts = (0,) + 2 * len(self.blocks) * (self.mid_in.out_features,)
            adaln = fast.per_block(adaln + fast.ones_and_zeros(counts, adaln.dtype, adaln.device))
        input_map = fast.convolved_blocks(normalised, self.conv_in_z, self.conv_in)                     # (B, C, 5h, 5w)
        return Condition(input_map, adagn, adaln, attention_bias, base, base_map, contrast)

    def base_image(self, z):
        """z (B, z_dim, h, w) -> linear image (B, 3, h f, w f)."""
        with torch.autocast(z.device.type, enabled=False):
            return self.code.decode(F.conv2d(z.float(), self.base.weight.float(), self.base.bias.float()))

    def forward_with_tokens(self, x, z=None, t=None, condition=None):
        """As forward, and the tokens (B, H/8 * W/8, width) after transformer block min(4, depth // 2), counted from 0,
        which REPA aligns: of 8 the fifth."""
        if (t is None) == self.time_cond:
            raise ValueError("this decoder needs t" if self.time_cond else "this decoder has no time: leave t out")
        if condition is None:
            condition = self.condition(z, *x.shape[-2:])
        temb = None
        if self.time_cond:
            temb = self.time(time_embedding(t, self.channels).to(self.conv_out.weight.dtype))           # (B, 4 C)
        mods = iter(condition.adagn.split([p.out_channels for p in self.projections()], dim=1))

        h = self.input_layer(x, condition)                                                              # (B, C, H, W)
        skips = [h]
        for level in self.down:
            for block in level[:2]:
                h = self.run_block(block, h, next(mods), temb)
                skips.append(h)
            if len(level) == 3:
                h = level[2](h)
                skips.append(h)

        u = fast.linear(fast.group_norm(h, self.mid_norm), self.mid_in)                                 # (B, ., h8, w8)
        u, tokens = self.middle(u, condition)
        h = h + fast.linear(u, self.mid_out)

        for level in self.up:
            for block in level[:3]:
                h = torch.cat([h, skips.pop()], dim=1)  # on a line of its own, which lets go of the old h
                h = self.run_block(block, h, next(mods), temb)
            if len(level) == 4:
                h = fast.upsample(h, level[3])
        out = self.conv_out(self.norm_out(h))                                                           # (B, 3, H, W)
        return self.assemble(out, x, condition, t), tokens.flatten(2).mT

    def input_layer(self, x, condition):
        """The input convolutions of the noisy image, with what they make of latent and base: (B, C, H, W)."""
        dtype = self.conv_out.weight.dtype
        if condition.base is None:
            h = self.conv_in_x(x.to(dtype))
        else:
            weight = self.conv_in_x.weight[:, :3]
            h = F.conv2d((INPUT_GAIN * x).to(dtype), weight, self.conv_in_x.bias, padding=1) + condition.base_map
        weight = self.conv_in.weight[:, :h.shape[1]]
        return F.conv2d(h, weight, padding=1).add_(fast.spread(condition.input_map, *x.shape[-2:]))

    def run_block(self, block, *arguments):
        if self.checkpointing and self.training:
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)

    def middle(self, u, condition):
        """The transformer blocks on a map (B, width, H/8, W/8) -> (the last map, that of block min(4, depth // 2))."""
        tokens, depth = u, len(self.blocks)
        if depth == 0:
            return u, tokens
        windows = fast.windows_for(*u.shape[2:], self.blocks[0].attn.window, u.device)
        mods = condition.adaln.chunk(depth, dim=-1)
        for number, (block, mod, bias) in enumerate(zip(self.blocks, mods, condition.bias)):
            u = block(u, mod, windows, bias)
            if number == min(4, depth // 2):
                tokens = u
        return u, tokens

    def assemble(self, out, x, condition, t):
        """The field (B, 3, H, W) at x from the network's output.

        Beside a linear base it is field_at_noise * (x - D), where D = base - addition / field_at_noise is the estimate
        of the image; FM divides it by t.
        """
        if self.field_at_noise is None:
            return out.to(x.dtype)
        if condition.base is None:
            return out + self.field_at_noise * x
        field = self.field_at_noise * (x - condition.base) + self.addition(out, condition.contrast)
        if self.time_cond:  # FM: v = (D - x_t) / t, D the estimate of the image
            field = field / per_image(t.clamp(min=T_LEAST))
        return field

    def addition(self, out, contrast):
        """What is added to the field beside a linear base, from the network's output (B, 3, H, W) and the base's local
        contrast.

        The latent says what the code's coefficients are. From the network comes what the code leaves out, the part of
        its output in the code's null space (the decomposition of DDNM, Wang, Yu, Zhang 2022, arXiv 2212.00490), and of
        the coefficients only the share `revision`. What varies slowly in a new network's output would otherwise be by
        far the largest part of its error: it would learn to be silent first, and that for long.

        What the code leaves out is in proportion to the contrast of what it keeps (docs/results.md): natural images are
        scale mixtures (Wainwright, Simoncelli 1999). So the network need not learn to be silent in a flat sky.
        """
        with torch.autocast(out.device.type, enabled=False):
            scaled = OUTPUT_GAIN * contrast * out                                    # (B, 3, H, W), at least float32
            if self.training:
                # Not the loss's own gradient. Contrast is in the error, and would be in the gradient a second time:
                # the network would learn from the strongest edges alone. So d scaled / d out, OUTPUT_GAIN * contrast,
                # is set to 1.
                scaled = out + (scaled - out).detach()
            coefficients = self.code.encode(scaled)                                                     # (B, ., h, w)
            return scaled - self.code.decode((1 - self.revision.float()) * coefficients)


# What torch.compile gets: each block by itself. Blocks of the same shapes then share their code (25 graphs of about 60
# blocks, a minute or two of start-up on a GPU), and DDP can send a block's gradients while the one before is at work.
BLOCKS = (ResBlock, TransformerBlock, DCResBlock, DCDown, VQResBlock, LinearAttention, GatedConv)
MOST_VARIANTS = 64  # A block's code is compiled for at most so many shapes; beyond, the compiler leaves it as it is.


def compile_blocks(network, **options):
    """Let torch.compile make the blocks' kernels when they are first used; names of parameters stay."""
    dynamo = torch._dynamo.config
    name = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"  # before torch 2.7
    setattr(dynamo, name, max(MOST_VARIANTS, getattr(dynamo, name)))
    for module in network.modules():
        if isinstance(module, BLOCKS):
            module.compile(dynamic=False, **options)


# ---------------------------------------------------------------------------------------------------------------------
# The autoencoder

class DCSSDAE(nn.Module):
    """Encoder and decoder.

    enc, enc_width, enc_options  encoder.make_encoder's name, width and options
    dec, depth, window           UViT's size, number of transformer blocks and attention window
    loss                         "fm" or "eqm": what the decoder predicts and how it is sampled
    c, a, b, lam                 EqM's c(g) (losses.EqM), which the sampler's step size depends on
    input_skip                   add the noisy image to the network's output (UViT's field_at_noise)
    joint_input                  UViT's, for published SSDD decoders
    linear_encoder               the latent's mean is the linear code (encoder.LappedCode) plus what the network finds
    linear_decoder               the number of lapped coefficients that a 1x1 convolution reads from the latent, for an
                                 image that the network starts from (UViT's base); 0: none. z_dim with linear_encoder:
                                 an untrained model is then the linear code; more after fit_linear_decoder
    latents                      {"mean": [c], "std": [c], ...} per channel, from tools.latents --z_stats, for normalize
    notes                        anything else worth keeping in the saved file: training size, losses left out, ...
    raises                       ValueError for unknown names
    """

    def __init__(self, enc="dc_f32c32", dec="S", loss="eqm", enc_width=1.0, enc_options=None, depth=None, window=17,
                 c="linear", a=0.8, b=1.4, lam=1.0, input_skip=False, joint_input=False, latents=None, notes=None,
                 linear_encoder=False, linear_decoder=0):
        super().__init__()
        if loss not in ("fm", "eqm"):
            raise ValueError(f"unknown loss '{loss}': expected fm or eqm")
        enc_options, notes = dict(enc_options or {}), dict(notes or {})  # copies: the caller's stay as they are
        self.config = {"enc": enc, "dec": dec, "loss": loss, "enc_width": enc_width, "enc_options": enc_options,
                       "depth": depth, "window": window, "c": c, "a": a, "b": b, "lam": lam, "input_skip": input_skip,
                       "joint_input": joint_input, "latents": latents, "notes": notes,
                       "linear_encoder": linear_encoder, "linear_decoder": linear_decoder}
        if linear_encoder:
            enc_options = enc_options | {"linear": True}
        self.encoder = make_encoder(enc, enc_width, **enc_options)
        self.eqm = EqM(c, a, b, lam) if loss == "eqm" else None
        # The field at the noise end is this number times (e - x).
        self.field_at_noise = -1.0 if self.eqm is None else self.eqm.at_noise
        self.decoder = UViT(dec, self.encoder.z_dim, loss == "fm", depth, window,
                            field_at_noise=self.field_at_noise if input_skip else None, joint_input=joint_input,
                            base=(self.downscale, linear_decoder) if linear_decoder else None)
        self.use_graphs = True  # On GPUs small calls without gradients are replayed: plumbing/graphs.py.

    @property
    def downscale(self):
        return self.encoder.downscale

    @property
    def t_shift(self):
        """The sampling times' exponent where none is given: sampler.noise_times."""
        return sampler.T_SHIFT if self.decoder.base is None else sampler.BASE_SHIFT

    @torch.no_grad()
    def retargeted(self, loss):
        """A copy to go on training with another loss. It fits at once, but for the time, which new layers learn to
        use. ValueError without a linear decoder."""
        if not self.config["linear_decoder"]:
            raise ValueError("only a model with a linear decoder can go on with another loss")
        model = DCSSDAE(**self.config | {"loss": loss})
        for module in model.modules():
            if isinstance(module, ResBlock) and module.time is not None:
                start_at_zero(module.time)
        known = self.state_dict()
        for name, value in model.state_dict().items():
            if name in known:
                value.copy_(known[name])
        old, new = self.decoder, model.decoder
        for weight in new.conv_out.parameters():
            weight *= new.field_at_noise / old.field_at_noise  # D = base - addition / field_at_noise
        return model.eval()

    def forward(self, x, **options):
        """The same as `reconstruct`."""
        return self.reconstruct(x, **options)

    def encode(self, x):
        """x (B, 3, H, W) in [-1, 1] -> encoder.DiagonalGaussian over (B, c, H/f, W/f). ValueError if f does not divide
        H and W, or for integers: 8-bit levels would be taken for the range [-1, 1]."""
        f = self.downscale
        if not x.is_floating_point():
            raise ValueError(f"images are floating-point numbers in [-1, 1], got {x.dtype}: "
                             "x / 127.5 - 1 makes them of 8-bit levels")
        if x.shape[2] % f or x.shape[3] % f:
            raise ValueError(f"{self.config['enc']} encodes (B, 3, H, W) images with sides that are multiples of {f}, "
                             f"got {tuple(x.shape)}")
        x = x.to(next(self.encoder.parameters()).dtype)
        if not (self.use_graphs and graphs.suit([x])):
            return self.encoder(x)

        def moments(x):
            posterior = self.encoder(x)
            return posterior.mean, posterior.logvar

        return DiagonalGaussian(*graphs.replayed(self.encoder, moments, [x]))

    def decode(self, z, steps=1, noise=None, generator=None, **options):
        """z (B, c, h, w) -> images (B, 3, h*f, w*f), nominally in [-1, 1], not clamped. Arguments as in `sample`."""
        return self.sample(z, steps, noise, generator, **options)[0]

    def sample(self, z, steps=1, noise=None, generator=None, **options):
        """As decode, and the number of network evaluations of every sample: (x, nfe (B,)).

        z        with fewer channels than the model's these are the first ones (train.py --nested); the others are 0
        noise    standard normal e (B, 3, h*f, w*f), where the path to the image begins; drawn from `generator` where
                 None
        options  FM: method "euler", t_shift (sampler.euler). EqM: method "gd" or "nesterov", eta or t_shift
                 (c = linear), last_eta, mu, tol (sampler.gradient_descent, sampler.nesterov)
        raises   ValueError for options of the other loss or sampler, and for noise of another shape
        """
        loss, shape = self.config["loss"], self._image_shape(z)
        if z.shape[1] < self.encoder.z_dim:
            z = F.pad(z, (0, 0, 0, 0, 0, self.encoder.z_dim - z.shape[1]))
        allowed = {"fm": ("method", "t_shift"), "eqm": ("method", "t_shift", "eta", "last_eta", "mu", "tol")}[loss]
        unknown = sorted(set(options) - set(allowed))
        if unknown:
            raise ValueError(f"a decoder trained with --loss {loss} takes the sampler options "
                             f"{', '.join(sorted(allowed))}; got {', '.join(unknown)}")
        if noise is None:
            device = generator.device if generator else z.device
            noise = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        if noise.shape != shape:
            raise ValueError(f"noise for these latents is {shape}, got {tuple(noise.shape)}")
        # The sum of steps is float32 at least, whatever z is, and of the weights' type.
        exact = torch.promote_types(self.decoder.conv_out.weight.dtype, torch.float32)
        noise = noise.to(z.device, torch.promote_types(noise.dtype, exact), memory_format=torch.channels_last)
        t_shift = options.pop("t_shift", self.t_shift)
        if loss == "fm":
            if options.pop("method", "euler") != "euler":
                raise ValueError("flow matching is sampled with the method euler alone")
            descend, options = sampler.euler, {"t_shift": t_shift}
        else:
            method = options.pop("method", "nesterov" if "mu" in options else "gd")
            if method not in ("gd", "nesterov"):
                raise ValueError(f"unknown sampling method '{method}': expected gd or nesterov")
            if method == "gd" and "mu" in options:
                raise ValueError("gradient descent has no momentum: the method nesterov takes mu")
            descend = sampler.gradient_descent if method == "gd" else sampler.nesterov
            options = sampler.default_steps(self.eqm, steps, t_shift) | {"lam": self.eqm.lam} | options

        def field(x, condition, t=None):
            return self.decoder(x, t=t, condition=condition)

        def run(z, noise):
            condition = self.decoder.condition(z, *shape[2:])
            return descend(field, noise, condition, steps, **options)

        # An adaptive stop looks at values: which kernels start depends on them.
        if self.use_graphs and not options.get("tol") and graphs.suit([noise, z]):
            choices = [(name, tuple(value) if isinstance(value, list) else value) for name, value in options.items()]
            return graphs.replayed(self.decoder, run, [z, noise], descend, steps, *choices)
        return run(z, noise)

    def _image_shape(self, z):
        return (len(z), 3, z.shape[2] * self.downscale, z.shape[3] * self.downscale)

    def energy(self, x, z):
        """How far images x (B, 3, h*f, w*f) are from rest in the field of the latents z (B, c, h, w): |f(x, z)|^2 /
        (2 lam), summed over an image's values. -> (B,), at least 0, float32. Low where x is what z describes.

        The network is the field itself, which is in general no gradient, so that no energy belongs to it. There is one
        where the field leads to a single image x0 and c is linear: then f = lam (x - x0), this is lam/2 |x - x0|^2, and
        its gradient is f. Elsewhere it is the squared length of the field, no more: sqrt(2 energy / (lam 3 H W)) is
        rms(f) / lam, which the samplers' `tol` is compared with. With another c even a perfect field's length does
        not tell the distance: with "trunc" it is the same on most of the way from the noise.

        EqM's authors (arXiv 2510.02300) propose energies for finding foreign images. Their EqM-E trains a network f
        through the gradient of <x, f(x)>, which thereby is an energy. That product says less of a network that is the
        field: at the same distance from x0 it depends on x0, and it can be negative.

        raises   ValueError for FM, whose velocity is not small at the data, and for images or latents of another shape
        """
        if self.eqm is None:
            raise ValueError("a decoder trained with --loss fm has no energy: only eqm's field comes to rest at images")
        if x.shape != self._image_shape(z):
            raise ValueError(f"images for these latents are {self._image_shape(z)}, got {tuple(x.shape)}")
        # at least float32, as the sampler's images
        x = x.to(z.device, torch.promote_types(x.dtype, torch.float32), memory_format=torch.channels_last)
        field = self.decoder(x, z).float()
        return field.square().sum(dim=(1, 2, 3)) / (2 * self.eqm.lam)

    def reconstruct(self, x, steps=1, noise=None, generator=None, **options):
        """x (B, 3, H, W) of any size -> its reconstruction, same size: padded by reflection, in the end cropped."""
        H, W = x.shape[-2:]
        z = self.encode(pad_to_multiple(x, max(8, self.downscale))).mode()
        return self.decode(z, steps, noise, generator, **options)[..., :H, :W]

    def latent_shape(self, height, width):
        """(c, h, w) of an image's latent; `reconstruct` pads the sides to multiples of 8 and of the factor."""
        unit = max(8, self.downscale)
        h, w = (math.ceil(side / unit) * unit // self.downscale for side in (height, width))
        return self.encoder.z_dim, h, w

    def normalize(self, z):
        """Latents -> mean 0, standard deviation 1 per channel over --z_stats's data: for training on latents."""
        mean, std = self._latent_moments(z)
        return (z - mean) / std

    def denormalize(self, z):
        """The inverse of normalize: what `decode` takes."""
        mean, std = self._latent_moments(z)
        return z * std + mean

    def _latent_moments(self, z):
        if not self.config["latents"]:
            raise ValueError("this model has no latent statistics: python -m tools.latents --ckpt F --data D "
                             "--z_stats stores them")
        mean, std = (torch.tensor(self.config["latents"][name], dtype=torch.float32) for name in ("mean", "std"))
        return mean.to(z)[:, None, None], std.to(z)[:, None, None]                                       # (c, 1, 1)

    @torch.no_grad()
    def fit_linear_decoder(self, images):
        """Set the linear decoder to the least-squares fit from this encoder's latents to the images, and the network's
        share in its coefficients to what the fit leaves unexplained: for an encoder whose latents are not the linear
        code's.

        images   iterable of batches (b, 3, H, W) in [-1, 1]
        Ridge regression with bias in float64, one for all cells: W = (Z'Z + r I)^-1 Z'C, Z (cells, c + 1) latents and
        ones, C (cells, linear_decoder) lapped coefficients. As the lapped vectors are orthonormal, least squares of
        the coefficients is least squares of the pixels. Every fourth batch is held out: r is the one of RIDGES that
        explains these best, and what it leaves unexplained there is the network's share.
        raises   ValueError without a linear decoder
        """
        decoder = self.decoder
        if decoder.base is None:
            raise ValueError("this model has no linear decoder to fit")
        fitted, held_out = [0, 0, 0], [0, 0, 0]
        for number, x in enumerate(images):
            x = x.to(next(self.parameters()).device)
            z = self.encode(x).mode()                                                            # (b, c, h, w)
            rows = z.permute(0, 2, 3, 1).flatten(0, 2).double()                                  # (cells, c)
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)                         # (cells, c + 1)
            target = decoder.code.encode(x).permute(0, 2, 3, 1).flatten(0, 2).double()           # (cells, count)
            sums = held_out if number % 4 == 3 else fitted
            for k, new in enumerate((rows.T @ rows, rows.T @ target, target.square().sum(0))):
                sums[k] = sums[k] + new
        pixels = decoder.code.tables(x.device).deviation.flatten().double().square()  # a coefficient's in pixels
        best = min(RIDGES, key=lambda ridge: float(residual(ridge_fit(ridge, *fitted), *held_out) @ pixels))
        unexplained = residual(ridge_fit(best, *fitted), *held_out) / variance(*held_out)
        everything = [a + b for a, b in zip(fitted, held_out)]
        weight = ridge_fit(best, *everything)                                                    # (count, c + 1)
        decoder.base.weight.copy_(weight[:, :-1, None, None])
        decoder.base.bias.copy_(weight[:, -1])
        decoder.revision.copy_(unexplained.clamp(0, 1)[:, None, None])

    # -- files ----------------------------------------------------------------------------------------------------

    def save(self, path):
        """Write weights and configuration to one .safetensors file, whole or not at all. ValueError for weights that
        are not finite: nothing is written then."""
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        broken = [name for name, value in state.items() if not value.isfinite().all()]
        if broken:
            raise ValueError(f"the model is not saved to {path}: {len(broken)} of its tensors hold values that are not "
                             f"finite (first: {broken[0]})")
        metadata = {"format": str(FORMAT), "config": json.dumps(self.config)}
        with whole(path) as temporary, open(temporary, "wb") as file:
            file.write(safetensors.torch.save(state, metadata))

    @classmethod
    def load(cls, path, device="cpu"):
        """The model of a file that `save` wrote, or of a published file with encoder and decoder, in float32 and in
        evaluation mode.

        A published file's configuration is read off its tensors. FileNotFoundError; ValueError that says what the file
        holds and what was expected.
        """
        state, config = read_model(path)
        if config is None:
            config = published.infer_config(state, LAYOUTS)
            if "enc" not in config or config.get("dec", published.UNKNOWN) == published.UNKNOWN:
                raise ValueError(f"{path} has no DC-SSDAE configuration and holds "
                                 f"{published.describe(state, LAYOUTS)}; a model needs an encoder and a decoder")
        try:
            model = cls(**config)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} describes no model that can be built: {error}") from None
        model.float()._take(state, path)  # whatever torch's default type is
        return model.to(device).eval()

    def load_published(self, path, part="all"):
        """Read weights into this model: from a file that `save` wrote, or in a published layout (see the README).

        part    "all", "encoder" or "decoder": what to read; the rest of the file is ignored
        The file decides between variants: a dc encoder with or without norms, a vq one's options, a decoder with
        SSDD's joint_input; published decoders have no input_skip. A 15 x 15 bias table fits a larger window.
        raises  FileNotFoundError, or ValueError that says what the file holds and what was expected
        """
        state, saved = read_model(path)
        state = published.unfolded(state, self.config["enc"])
        found = saved or published.infer_config(state, LAYOUTS)
        taken = []
        if part != "decoder":
            taken += ["linear_encoder", "latents"]  # the statistics before were of another encoder's
            if found.get("enc") == self.config["enc"]:
                taken.append("enc_options")
        if part != "encoder":
            taken += ["joint_input", "input_skip", "linear_decoder", "c", "a", "b", "lam"]  # what its field is
        config = self.config | {name: found[name] for name in taken if name in found}
        model = self
        if config != self.config:
            model = DCSSDAE(**config).to(next(self.parameters())).train(self.training)
        model._take(state, path, part)
        self.config = config
        if part != "decoder":
            self.encoder = model.encoder
        if part != "encoder":
            self.decoder, self.eqm, self.field_at_noise = model.decoder, model.eqm, model.field_at_noise

    def _take(self, state, path, part="all"):
        """Load `part` of the tensors `state` of the file `path`, which must have this model's names and shapes."""
        own, state = self.state_dict(), published.widened(state, self.config["window"])
        if part != "all":
            own, state = ({name: value for name, value in tensors.items() if name.startswith(f"{part}.")}
                          for tensors in (own, state))
        problems = [("tensors missing", [name for name in own if name not in state]),
                    ("unknown", [name for name in state if name not in own]),
                    ("of another shape", [f"{name} is {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
                                          for name in own if name in state and state[name].shape != own[name].shape])]
        words = [f"{len(names)} {kind} (first: {names[0]})" for kind, names in problems if names]
        if words:
            raise ValueError(f"{path} does not fit this model: it holds {published.describe(state, LAYOUTS)}, expected "
                             f"was {published.describe(own, LAYOUTS)}; {'; '.join(words)}")
        self.load_state_dict(state, strict=False)


# Least squares from sums over cells: gram Z'Z (c + 1, c + 1), cross Z'C (c + 1, count), energy sum C^2 (count,).

def ridge_fit(ridge, gram, cross, energy):
    """(count, c + 1) weights; `ridge` is in units of the latents' mean square, and the bias, the last one, free of it.
    """
    penalty = ridge * gram.diagonal()[:-1].mean() * torch.ones_like(gram[0])
    penalty[-1] = 0
    return torch.linalg.solve(gram + penalty.diag(), cross).T


def residual(weight, gram, cross, energy):
    """Sum of the squared errors of each coefficient: (count,)."""
    return energy - 2 * (weight.T * cross).sum(0) + (weight @ gram * weight).sum(1)


def variance(gram, cross, energy):
    """Sum of squares of each coefficient about its mean: (count,), above 0."""
    cells = gram[-1, -1]
    return (energy - cross[-1].square() / cells).clamp(min=torch.finfo(energy.dtype).tiny)


LAYOUTS = {size: (level_widths(size), SIZES[size][2]) for size in SIZES}  # What tells a published decoder's size.


def read_model(path):
    """A weight file -> (its tensors by our names, the arguments of DCSSDAE that are stored beside them; None for a
    published file). ValueError for a file of another format than FORMAT."""
    contents, metadata = read_tensors(path)
    if "config" not in metadata:
        return published.our_names(published.table_of_tensors(contents, path)), None
    if metadata.get("format") != str(FORMAT):
        raise ValueError(f"{path} is a model of file format {metadata.get('format')}; this code reads format {FORMAT}")
    config = json.loads(metadata["config"])
    for name in ("without", "source", "precondition"):  # entries of older files, most of which had no use for them
        if not config.get(name):
            config.pop(name, None)
    return contents, config


def pad_to_multiple(x, unit):
    """x (..., H, W) enlarged at the bottom and right by reflection to multiples of unit; any H, W >= 1."""
    for dim in (-2, -1):
        n = x.shape[dim]
        i = torch.arange(math.ceil(n / unit) * unit, device=x.device) % max(1, 2 * (n - 1))  # up ...
        x = x.index_select(dim, torch.minimum(i, 2 * (n - 1) - i))  # ... and down again
    return x


def check_size(size, model):
    """ValueError unless --size fits the encoder's cells and the decoder's levels."""
    unit = max(8, model.downscale)
    if size < unit or size % unit:
        raise ValueError(f"--size {size} is not a multiple of {unit}, "
                         f"which {model.config['enc']} and the decoder need: "
                         f"take {max(1, size // unit) * unit} or {(size // unit + 1) * unit}")
