"""The autoencoder: a deep-compression encoder and a diffusion decoder in pixel space (U-ViT),
conditioned on the latent.

  UViT     the decoder of SSDD (Vallaeys, Verbeek, Cord 2025, arXiv 2510.04961): convolutions at full to 1/4 resolution,
           transformer blocks with windowed attention at 1/8, skip connections between
  DCSSDAE  encoder + decoder + sampler in one module, saved to and loaded from one file

    python -c "import torch, model; m = model.DCSSDAE('dc_f32c32', 'XS', enc_width=0.125); z = m.encode(torch.rand(
        1, 3, 64, 64) * 2 - 1).mode(); print(z.shape, m.decode(z).shape)"

Conventions: images (B, 3, H, W) in [-1, 1]; latents (B, c, H/f, W/f). Flow matching: t=0 is data, t=1 noise, the
network predicts v = x - e. Equilibrium matching: no time; the network predicts a field that points from the data
towards the noise.
"""
import functools
import json
import math
import os
import pickle
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import sampler
from data import BROKEN_FILE, first_line
from encoder import (
    LARGEST_WIDTH,
    DCDown,
    DCResBlock,
    GatedConv,
    LappedCode,
    LinearAttention,
    VQResBlock,
    eager_cpu,
    gpu_kernels,
    make_encoder,
    normed,
    parse_name,
    plain_norm,
    recomputed,
    start_at_zero,
)
from losses import EqM

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
# lowers the loss fastest by making its output zero. UViT.addition and these constants, all beside a linear base, are
# there to prevent that:
GROUP_SIZE = 8  # channels of a group of the norms; XS as published, 32 groups on 32 channels, takes away each channel's
#                 mean. No norm before the output (norm_out is scale and shift only), so that contrast stays
OUTPUT_GAIN = 3.0  # of the network's output, in units of the base's local contrast; what the code leaves out is about
#                    one unit (docs/results.md)
CONTRAST_CELL = 8  # pixels; contrast is that of 16 x 16 pixels around every cell's middle, linear between
LEAST_CONTRAST = 1 / 255  # half a level of 8 bits
INPUT_GAIN = 0.1  # of the noisy image at the input: noise tells nothing about the image
T_MIN = 0.05  # FM: in training the velocity (D - x_t) / t divides by at least this, as in JiT (arXiv 2511.13720)
T_LEAST = 1e-4  # and in sampling by this: with T_MIN the last steps would stop short of D and leave a part of the noise
RIDGE = 1e-4  # of the linear decoder's fit, times the latents' mean square: fewer cells than channels still have a fit
FORMAT = 5  # of the files that DCSSDAE.save writes; 1 had other names for the dc encoders' first and last convolution
LINEAR_FORMAT = 5  # of decoders with a linear base; 3 had no UViT.revision and other norms, 4 no contrast in `addition`
ALL_VALUES = 5  # along an axis, of two 3x3 convolutions on a map that is constant over blocks of at least 5 pixels: the
#                 first two and the last two pixels of a block see its neighbours, those between all see the same
NO_BIAS = -1e4  # of the offsets that a smaller window in a file does not have: exp of it is 0 in every precision
UNKNOWN = "?"  # a decoder's size that is none of SIZES
MASKED = -1e9  # bias of an offset outside the attention window: exp of it is 0
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "ema", "params")  # around the tensors of torch files
DEEPEST = 4  # wrappers around each other
PREFIX = re.compile(r"^((module|_orig_mod|model|first_stage_model|vae)\.)+")  # of names in published files


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

    def __init__(self, channels, momentum=0.1, eps=1e-5):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, z):
        return F.batch_norm(z, self.running_mean.to(z.dtype), self.running_var.to(z.dtype),
                            self.weight.to(z.dtype), self.bias.to(z.dtype), training=False, eps=self.eps)

    @torch.no_grad()
    def update(self, count, total, total_sq, good):
        """count: number of values per channel; total, total_sq: (channels,) sums of z and z**2 over the whole batch,
        float64; good: whether to do it, a bool tensor. Nothing of this is read back from the device."""
        mean = total / count
        # Var z = (E[z^2] - E[z]^2) n / (n - 1), unbiased as BatchNorm's
        var = (total_sq / count - mean.square()).clamp(min=0) * count / max(count - 1, 1)
        self.num_batches_tracked += good.long()
        # A plain average over the first batches, so that the initial 0 and 1 are forgotten at once; then exponential.
        momentum = self.num_batches_tracked.to(self.running_mean.dtype).reciprocal().clamp(min=self.momentum)
        for running, new in ((self.running_mean, mean), (self.running_var, var)):
            running.copy_(torch.where(good, running.lerp(new.to(running.dtype), momentum), running))


class NormSiLU(torch.autograd.Function):
    """silu(GroupNorm(x) * scale + shift) for x (B, C, H, W) and scale, shift (B or 1, C, h, w) that are constant over
    blocks of x: they are never enlarged, only x is kept for the backward pass, and that takes few passes over x.

    Statistics are computed in float32. The plain form is the oracle in test_all.py.
    """

    @staticmethod
    def forward(ctx, x, scale, shift, groups=32, eps=1e-5):
        B, C, H, W = x.shape
        # PyTorch's CPU kernel for bf16 maps of under 1024 pixels is 8 times slower than the one for float32.
        slow = x.dtype is torch.bfloat16 and H * W < 1024 and x.device.type == "cpu"
        y = x.float() if slow else x
        scale, shift = scale.to(y.dtype), shift.to(y.dtype)
        if len(scale) == scale[0, 0].numel() == 1:  # the same everywhere: group norm's own weights
            y, mean, rstd = torch.native_group_norm(y, scale.flatten(), shift.flatten(), B, C, H * W, groups, eps)
        else:
            y, mean, rstd = torch.native_group_norm(y, None, None, B, C, H * W, groups, eps)
            v = in_blocks(y, scale)
            y = unblock(torch.addcmul(per_block(shift), v, per_block(scale), out=v), y.shape)
        ctx.groups = groups
        ctx.save_for_backward(x, scale, shift, mean, rstd)
        return F.silu(y, inplace=True).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, scale, shift, mean, rstd = ctx.saved_tensors
        groups, (C, H, W), dtypes = ctx.groups, x.shape[1:], (x.dtype, scale.dtype, shift.dtype)
        # In float32 at least: constants that were rounded to bf16 would not cancel where a group's mean is large.
        exact = torch.promote_types(x.dtype, torch.float32)
        x, grad, scale, shift, mean, rstd = (t.to(exact) for t in (x, grad, scale, shift, mean, rstd))

        def per_channel(t):  # (B, groups) -> (B, C, 1, 1)
            return t.repeat_interleave(C // groups, 1)[:, :, None, None]

        def block_sums(t):  # (B, h, H/h, w, W/w, C) -> (B, C, h, w)
            return t.sum(4).sum(2).permute(0, 3, 1, 2)

        def group_mean(t):  # over a group's pixels and channels, of scale * t that is given by its sums over blocks
            sums = (scale * t).sum((2, 3)).unflatten(1, (groups, -1)).sum(2)                    # (B, groups)
            return per_channel(sums / (C // groups * H * W))

        mean, rstd = per_channel(mean), per_channel(rstd)
        # x^ = (x - mean) rstd, y = scale x^ + shift = a x + (shift - mean a) with a = rstd scale
        v, a = in_blocks(x, scale), rstd * scale
        y = torch.addcmul(per_block(shift - mean * a), v, per_block(a))
        g = torch.ops.aten.silu_backward(in_blocks(grad, scale), y)
        # dshift = sum g, dscale = sum g x^, over every block of pixels
        dshift = block_sums(g)                                                                  # (B, C, h, w)
        dscale = (block_sums(g * v) - mean * dshift) * rstd
        # dx = rstd (scale g - mean(scale g) - x^ mean(scale g x^))
        m, m_xhat = group_mean(dshift), group_mean(dscale)
        slope = -rstd.square() * m_xhat
        constant = -rstd * m - mean * slope
        dx = torch.addcmul(per_block(constant), v, per_block(slope))
        dx = unblock(dx.addcmul_(g, per_block(a)), x.shape)
        dscale, dshift = dscale.sum_to_size(scale.shape), dshift.sum_to_size(shift.shape)
        return *(t.to(dtype) for t, dtype in zip((dx, dscale, dshift), dtypes)), None, None


def norm_silu(x, scale, shift, groups=32, eps=1e-5):
    """silu(GroupNorm(x) * scale + shift), arguments as NormSiLU's, which is made for the CPU's own kernels; on
    GPUs that Triton serves in kernels of its own; elsewhere the plain form, which compilers fuse into two passes."""
    if eager_cpu(x):
        return NormSiLU.apply(x, scale, shift, groups, eps)
    kernels = gpu_kernels(x)
    if kernels:
        return kernels.GpuNormSiLU.apply(x, scale, shift, groups, eps)
    return recomputed(plain_norm_silu, x, scale, shift, groups, eps)


def plain_norm_silu(x, scale, shift, groups, eps):
    y = plain_norm(x, groups, eps)
    y = torch.addcmul(per_block(shift.to(y.dtype)), in_blocks(y, scale), per_block(scale.to(y.dtype)))
    return F.silu(unblock(y, x.shape)).to(x.dtype)


def in_blocks(x, scale):
    """(B, C, H, W) -> (B, h, H/h, w, W/w, C), a view of channels_last maps, for scale (., C, h, w)."""
    (B, C, H, W), (h, w) = x.shape, scale.shape[-2:]
    return x.permute(0, 2, 3, 1).reshape(B, h, H // h, w, W // w, C)


def per_block(scale):
    """(B, C, h, w) -> (B, h, 1, w, 1, C)."""
    return scale.permute(0, 2, 3, 1)[:, :, None, :, None]


def unblock(x, shape):
    """The inverse of `in_blocks`."""
    B, C, H, W = shape
    return x.reshape(B, H, W, C).permute(0, 3, 1, 2)


def spread(values, H, W):
    """Condition.input_map (B, C, 5h, 5w) -> (B, C, H, W): of the 5 values that a block has along an axis, the first two
    and the last two stand at its ends, the third everywhere between."""
    values = values.permute(0, 2, 3, 1)
    for dim, pixels in ((2, W), (1, H)):
        side = ALL_VALUES * pixels // values.shape[dim]  # of a block
        p = torch.arange(pixels, device=values.device)
        block, inside = p // side, p % side
        from_end = (inside - side + ALL_VALUES).clamp(min=2)
        values = values.index_select(dim, ALL_VALUES * block + torch.where(inside < 2, inside, from_end))
    return values.permute(0, 3, 1, 2)


def modulate(x, scale, shift):
    """x * (1 + scale) + shift, with scale and shift constant over blocks of x, as in NormSiLU."""
    return unblock(torch.addcmul(per_block(shift), in_blocks(x, scale), per_block(1 + scale)), x.shape)


def linear(x, layer):
    """A Linear layer over the channels of a map (B, C, h, w), as a 1x1 convolution: on CPUs oneDNN beats MKL's
    matmul."""
    return F.conv2d(x, layer.weight[:, :, None, None], layer.bias)


def group_count(channels, group_size):
    """Number of groups of a group norm: 32 as published (group_size None), else of group_size channels each."""
    return channels // group_size if group_size else 32


class GroupNorm(nn.Module):
    """Weight and bias of a group norm, and SiLU after it: see NormSiLU. groups 0: weight and bias without the norm."""

    def __init__(self, channels, groups, eps=1e-5):
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x, scale=None, shift=None):
        """scale, shift: (B, C) of the time's modulation, * (1 + scale) + shift; None without a time."""
        weight, bias = self.weight, self.bias
        if scale is not None:
            weight, bias = weight * (1 + scale), bias * (1 + scale) + shift
        scale, shift = weight.reshape(-1, x.shape[1], 1, 1), bias.reshape(-1, x.shape[1], 1, 1)
        if self.groups == 0:
            return F.silu(torch.addcmul(shift.to(x.dtype), x, scale.to(x.dtype)))
        return norm_silu(x, scale, shift, self.groups, self.eps)


def upsample(x, conv):
    """Nearest x2, then a 3x3 convolution layer, as one transposed convolution: 16 weights for 4 pixels, not 36."""
    # The two taps that read the same pixel after enlarging are added up: (w2, w1 + w2, w0 + w1, w0) per axis.
    w = F.pad(conv.weight.flip(2, 3).transpose(0, 1), (1, 1, 1, 1))
    w = w[:, :, :-1] + w[:, :, 1:]
    return F.conv_transpose2d(x, w[..., :-1] + w[..., 1:], conv.bias, stride=2, padding=1)


class AdaGN(nn.Module):
    """Group norm, scale and shift from the latent's context map (B, ctx, h, w), nearest-resized to x, then SiLU."""

    def __init__(self, channels, groups, ctx):
        super().__init__()
        self.groups = groups
        self.proj = nn.Conv2d(ctx, 2 * channels, 1)

    def forward(self, x, mod):  # mod: proj(ctx)
        scale, shift = mod.chunk(2, dim=1)
        return norm_silu(x, 1 + scale, shift, self.groups)


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


def axis_blocks(n, window):
    """One axis of n positions, cut into blocks of queries: (starts of the blocks, starts of their keys, queries of a
    block, keys of a block).

    A block has max(8, r) queries, r = window // 2, and its keys are the block + 2 r positions around it, moved inwards
    at the borders. An axis that is not longer than that is one block.
    """
    r = window // 2
    block = max(8, r)
    keys = block + 2 * r
    if n <= keys:
        return [0], [0], n, n
    starts, reach = [], []
    for i in range(math.ceil(n / block)):
        start = min(i * block, n - block)
        starts.append(start)
        reach.append(min(max(start - r, 0), n - keys))
    return starts, reach, block, keys


class Windows:
    """Which tokens of an h x w grid are attended together: blocks of queries, and the keys that their windows reach.

    So cost and memory are linear in h w, no key is padding, and blocks at the same distance from the borders (of the
    same kind) share one table of biases.
    """

    def __init__(self, h, w, window, device):
        r = window // 2
        starts, reach, block, keys = zip(axis_blocks(h, window), axis_blocks(w, window))      # (rows, columns) each
        self.block, self.keys = block, keys
        self.single = len(starts[0]) == len(starts[1]) == 1

        def tokens(first, length):
            """Numbers of the tokens in every block: (blocks, tokens of one)."""
            y, x = (torch.tensor(s, device=device)[:, None] + torch.arange(n, device=device)
                    for s, n in zip(first, length))                                           # (blocks, length) each
            return (y[:, None, :, None] * w + x[None, :, None, :]).flatten(2).flatten(0, 1)

        self.q = tokens(starts, block)
        self.kv = tokens(reach, keys)

        # Along each axis: the block of every position, its place in there; the kind of every block; and where the
        # biases of a kind and a query begin in the padded table.
        home, place, kind, self.rows = [], [], [], []
        for axis, n in enumerate((h, w)):
            first = torch.tensor(starts[axis], device=device)
            position = torch.arange(n, device=device)
            home.append((position // block[axis]).clamp(max=len(first) - 1))                  # (n,)
            place.append(position - first[home[axis]])                                        # (n,)
            distances = [s - k for s, k in zip(starts[axis], reach[axis])]  # of queries from their keys
            kinds = sorted(set(distances))
            kind.append(torch.tensor([kinds.index(d) for d in distances], device=device))     # (blocks,)
            query = torch.arange(block[axis], device=device)
            begin = keys[axis] + r - torch.tensor(kinds, device=device)[:, None] - query
            self.rows.append(begin)                                                           # (kinds, block)
        # Where every token's result stands among the blocks' results.
        home = home[0][:, None] * len(starts[1]) + home[1]                                    # (h, w)
        place = place[0][:, None] * block[1] + place[1]                                       # (h, w)
        self.back = (home * self.q.shape[1] + place).flatten()
        self.kind = (kind[0][:, None] * len(self.rows[1]) + kind[1]).flatten()                # of every block

    def bias(self, tables):
        """tables (..., window, window, heads) -> (..., heads, kinds of blocks, queries, keys); MASKED outside the
        window."""
        (ky, kx), (iy, ix) = self.keys, self.rows
        t = F.pad(tables.flip(-3, -2).movedim(-1, -3), (kx, kx, ky, ky), value=MASKED)        # by key - query
        t = t.unfold(-2, ky, 1).unfold(-2, kx, 1)                                             # (row, column, ky, kx)
        t = t[..., iy[:, None, :, None], ix[None, :, None, :], :, :]                          # (uy, ux, by, bx, ky, kx)
        t = t.clone(memory_format=torch.contiguous_format)  # torch 2.6's compiler believes that it is already
        return t.flatten(-2).flatten(-3, -2).flatten(-4, -3)


@functools.lru_cache(maxsize=32)
def cached_windows(h, w, window, device):
    with torch.inference_mode(False):  # or training could not use what an evaluation has made
        return Windows(h, w, window, device)


def windows_for(h, w, window, device):
    """Windows of a grid, made once: their indices come from the host. A compiler makes constants of them."""
    if torch.compiler.is_compiling():
        return Windows(h, w, window, device)
    return cached_windows(h, w, window, torch.device(device))


def picked_rows(tokens, index):
    """tokens (B, heads, N, C), index (...) of 0 to N - 1 -> tokens[:, :, index] (B, heads, ..., C), as rows of one
    table: whole rows are copied, where an index of tensors goes through its values one by one on CPUs."""
    B, heads, N, C = tokens.shape
    first = N * torch.arange(B * heads, device=tokens.device)
    rows = first[:, None] + index.flatten()                                              # (B heads, .)
    return F.embedding(rows, tokens.reshape(-1, C)).view(B, heads, *index.shape, C)


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
        """x (B, C, h, w), windows Windows(h, w, self.window, ...), bias windows.bias(self.bias_table)
        -> (B, C, h, w)."""
        q = linear(x, self.q).flatten(2).mT                                              # (B, N, C)
        kv_weight = torch.cat([self.k.weight, self.v.weight])[:, :, None, None]
        kv = F.conv2d(x, kv_weight).flatten(2).mT                                        # (B, N, 2 C)
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)                            # (B, heads, N, C / heads)
        kv = kv.unflatten(-1, (2 * self.heads, -1)).transpose(1, 2)                      # (B, 2 heads, N, C / heads)
        bias = bias.to(q.dtype)
        if not windows.single:
            q, kv = picked_rows(q, windows.q), picked_rows(kv, windows.kv)               # (B, ., blocks, ., C / heads)
        k, v = kv.chunk(2, dim=1)
        if not windows.single:  # a block is a head of its own, so that all images share the biases
            q, k, v = q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2)
            bias = bias.index_select(1, windows.kind)
        bias = bias.flatten(0, 1)[None]                                                  # (1, heads * blocks, ...)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        if not windows.single:
            out = out.unflatten(1, (self.heads, -1)).flatten(2, 3)                       # (B, heads, ., C / heads)
            out = picked_rows(out, windows.back)                                         # (B, heads, N, C / heads)
        out = out.transpose(1, 2).flatten(2).mT                                          # (B, C, N), channels last
        return linear(out.unflatten(2, x.shape[2:]), self.out)


class TransformerBlock(nn.Module):
    def __init__(self, dim, ctx, heads, window):
        super().__init__()
        self.ada = nn.Linear(ctx, 2 * dim)
        self.attn = WindowAttention(dim, heads, window)
        self.norm = nn.LayerNorm(dim)
        self.mlp_in, self.mlp_out = nn.Linear(dim, 8 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x, mod, windows, bias):  # x (B, dim, h, w); mod: ada(silu(ctx)); the rest as WindowAttention
        h = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2]).permute(0, 3, 1, 2)
        shift, scale = mod.chunk(2, dim=1)
        x = x + self.attn(modulate(h, scale, shift), windows, bias)
        h = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        value, gate = linear(h, self.mlp_in).chunk(2, dim=1)                             # (B, 4 dim, h, w) each
        return x + linear(value * F.gelu(gate), self.mlp_out)


def time_embedding(t, dim):
    """Sinusoids of 1000 t, cosines first: t (B,) in [0, 1] -> (B, dim). Vaswani et al. 2017 (arXiv 1706.03762),
    section 3.5."""
    freqs = torch.exp(-math.log(10000.0) * torch.arange(dim // 2, device=t.device, dtype=torch.float32) / (dim // 2))
    angles = 1000.0 * t.float()[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


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
    input_map: torch.Tensor     # (B, C, 5h, 5w), the input convolutions' part of the latent: see spread
    adagn: torch.Tensor         # (B, ., h, w), scales and shifts of all AdaGN, in the order of UViT.modules()
    adaln: torch.Tensor         # (B, ., h, w), shifts and scales of all transformer blocks
    bias: torch.Tensor | None   # (blocks, heads, kinds, queries, keys), of all attentions: Windows.bias
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
    skip       the field is skip * x + network(x, z, t); 0 as published. The field at the noise end is the difference of
               noise and image: with skip = -1 (FM) or lam c(0) (EqM) the network need not carry the noise from its
               input to its output. With `base` it is skip * (x - D), see `field`
    base       (f, count): the estimate of the image starts from a linear one, `count` lapped coefficients
               (encoder.LappedCode) read from the latent by a 1x1 convolution; the network adds to it what these leave
               out (`addition`), is silent at first, and sees it beside the noisy image, the latent itself not at first;
               see GROUP_SIZE, INPUT_GAIN
    joint_input  one input convolution on image and latent together, the latent not normalised: SSDD as published
    without    parts to leave out, for ablations: "norm_z", the latent's normalisation; "context", the latent's way to
               the adaptive norms, which keep a learned scale and shift
    """

    def __init__(self, size="S", z_dim=32, time_cond=True, depth=None, window=17, skip=0.0, joint_input=False,
                 without=(), base=None):
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"unknown decoder size '{size}': expected one of {', '.join(SIZES)}")
        if set(without) - {"norm_z", "context"}:
            raise ValueError(f"a decoder can be without norm_z and context, got {', '.join(without)}")
        if base and joint_input:
            raise ValueError("a decoder with joint_input has no linear base")
        if window < 1 or window % 2 == 0:
            raise ValueError(f"the attention window must be odd and positive, got {window}")
        if depth is None:
            depth = SIZES[size][2]
        widths = level_widths(size)
        c, top = widths[0], widths[-1]
        temb = 4 * c if time_cond else None
        self.channels, self.z_dim, self.time_cond, self.skip = c, z_dim, time_cond, skip
        group_size = GROUP_SIZE if base else None
        self.checkpointing = False  # True: training keeps only the residual blocks' inputs, and computes the rest twice
        if time_cond:
            self.time = nn.Sequential(nn.Linear(c, temb), nn.SiLU(), nn.Linear(temb, temb))

        if joint_input:
            self.norm_z, self.conv_in_x, self.conv_in_z = nn.Identity(), nn.Identity(), nn.Identity()
        else:
            self.norm_z = nn.Identity() if "norm_z" in without else LatentNorm(z_dim)
            images = 6 if base else 3  # channels of the noisy image and of the base
            self.conv_in_x = nn.Conv2d(images, c // 2, 3, padding=1)
            self.conv_in_z = nn.Conv2d(z_dim, c // 2, 3, padding=1)
        self.conv_in = nn.Conv2d(3 + z_dim if joint_input else c, c, 3, padding=1)
        self.context = None if "context" in without else nn.Sequential(
            nn.Conv2d(z_dim, c, 3, padding=1), nn.SiLU(), nn.Conv2d(c, c, 3, padding=1))

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
        if isinstance(self.norm_z, LatentNorm):
            nn.init.zeros_(self.norm_z.weight)
        for m in self.modules():
            if isinstance(m, AdaGN):
                start_at_zero(m.proj)
            elif isinstance(m, TransformerBlock):
                start_at_zero(m.ada)

    def forward(self, x, z, t=None):
        """x (B, 3, H, W), z (B, z_dim, H/f, W/f) or its `condition`, t (B,) in [0, 1] with time_cond -> (B, 3, H, W).
        ValueError on other shapes."""
        field, _ = self.forward_with_tokens(x, z, t)
        return field

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
        if self.context is None:
            context = normalised.new_zeros(len(z), self.channels, h, w)
        else:
            context = self.context(normalised)                                                          # (B, C, h, w)
        # Every norm's projection of the context, all at once.
        projections = [m.proj for m in self.modules() if isinstance(m, AdaGN)]
        weight = torch.cat([p.weight for p in projections])
        bias = torch.cat([p.bias for p in projections])
        adagn = F.conv2d(context, weight, bias)
        adaln, attention_bias = context[:, :0], None
        if self.blocks:
            windows = windows_for(H // 8, W // 8, self.blocks[0].attn.window, z.device)
            tables = torch.stack([block.attn.bias_table for block in self.blocks])
            attention_bias = windows.bias(tables.to(context.dtype))
            weight = torch.cat([block.ada.weight for block in self.blocks])[:, :, None, None]
            bias = torch.cat([block.ada.bias for block in self.blocks])
            adaln = F.conv2d(F.silu(context), weight, bias)
        # The input convolutions of the enlarged latent, of which ALL_VALUES an axis and block are enough.
        enlarged = F.interpolate(normalised, scale_factor=ALL_VALUES, mode="nearest")                   # (B, c, 5h, 5w)
        part = self.conv_in_z(enlarged)
        weight = self.conv_in.weight[:, -part.shape[1]:]
        input_map = F.conv2d(part, weight, self.conv_in.bias, padding=1)                                # (B, C, 5h, 5w)
        return Condition(input_map, adagn, adaln, attention_bias, base, base_map, contrast)

    def base_image(self, z):
        """z (B, z_dim, h, w) -> linear image (B, 3, h f, w f)."""
        with torch.autocast(z.device.type, enabled=False):
            return self.code.decode(F.conv2d(z.float(), self.base.weight.float(), self.base.bias.float()))

    def forward_with_tokens(self, x, z, t=None):
        """As forward, and the tokens (B, H/8 * W/8, width) after transformer block min(4, depth // 2), which REPA
        aligns."""
        if (t is None) == self.time_cond:
            raise ValueError("this decoder needs t" if self.time_cond else "this decoder has no time: leave t out")
        self.check_inputs(x, z, t)
        H, W = x.shape[-2:]
        condition = z if isinstance(z, Condition) else self.condition(z, H, W)
        temb = None
        if self.time_cond:
            temb = self.time(time_embedding(t, self.channels).to(self.conv_out.weight.dtype))           # (B, 4 C)
        widths = [m.proj.out_channels for m in self.modules() if isinstance(m, AdaGN)]
        mods = iter(condition.adagn.split(widths, dim=1))

        h = self.input_layer(x, condition)                                                              # (B, C, H, W)
        skips = [h]
        for level in self.down:
            for block in level[:2]:
                h = self.run_block(block, h, next(mods), temb)
                skips.append(h)
            if len(level) == 3:
                h = level[2](h)
                skips.append(h)

        u = linear(normed(h, self.mid_norm), self.mid_in)                                               # (B, ., h8, w8)
        u, tokens = self.middle(u, condition)
        h = h + linear(u, self.mid_out)

        for level in self.up:
            for block in level[:3]:
                h = torch.cat([h, skips.pop()], dim=1)  # on a line of its own, which lets go of the old h
                h = self.run_block(block, h, next(mods), temb)
            if len(level) == 4:
                h = upsample(h, level[3])
        out = self.conv_out(self.norm_out(h))                                                           # (B, 3, H, W)
        return self.field(out, x, condition, t), tokens.flatten(2).mT

    def check_inputs(self, x, z, t):
        """ValueError for arguments of forward that are not floating-point, or of other shapes."""
        if not x.is_floating_point() or x.ndim != 4 or x.shape[1] != 3 or 0 in x.shape:
            raise ValueError(f"noisy images are floating-point (B, 3, H, W), got {x.dtype} {tuple(x.shape)}")
        if isinstance(z, torch.Tensor):
            is_latent = z.is_floating_point() and z.ndim == 4 and z.shape[:2] == (len(x), self.z_dim)
            if not is_latent or 0 in z.shape[2:]:
                raise ValueError(f"latents of these images are floating-point ({len(x)}, {self.z_dim}, h, w), "
                                 f"got {z.dtype} {tuple(z.shape)}")
        if t is not None and (not t.is_floating_point() or t.shape != x.shape[:1]):
            raise ValueError(f"times of these images are floating-point ({len(x)},), got {t.dtype} {tuple(t.shape)}")

    def input_layer(self, x, condition):
        """The input convolutions of the noisy image, with what they make of latent and base: (B, C, H, W)."""
        dtype = self.conv_out.weight.dtype
        if condition.base is None:
            h = self.conv_in_x(x.to(dtype))
        else:
            weight = self.conv_in_x.weight[:, :3]
            h = F.conv2d((INPUT_GAIN * x).to(dtype), weight, self.conv_in_x.bias, padding=1) + condition.base_map
        weight = self.conv_in.weight[:, :h.shape[1]]
        return F.conv2d(h, weight, padding=1).add_(spread(condition.input_map, *x.shape[-2:]))

    def run_block(self, block, *arguments):
        if self.checkpointing and self.training:
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)

    def middle(self, u, condition):
        """The transformer blocks on a map (B, width, H/8, W/8) -> (the last map, that of block min(4, depth // 2))."""
        tokens, depth = u, len(self.blocks)
        if depth == 0:
            return u, tokens
        windows = windows_for(*u.shape[2:], self.blocks[0].attn.window, u.device)
        mods = condition.adaln.chunk(depth, dim=1)
        for number, (block, mod, bias) in enumerate(zip(self.blocks, mods, condition.bias), start=1):
            u = block(u, mod, windows, bias)
            if number == min(4, depth // 2):
                tokens = u
        return u, tokens

    def field(self, out, x, condition, t):
        """The field (B, 3, H, W) at x from the network's output.

        Beside a linear base it is skip * (x - D), where D = base - addition / skip is the estimate of the image; FM
        divides it by t.
        """
        if condition.base is None:
            if self.skip == 0:
                return out.to(x.dtype)
            return out + self.skip * x
        field = self.skip * (x - condition.base) + self.addition(out, condition.contrast)
        if self.time_cond:  # FM: v = (D - x_t) / t, D the estimate of the image
            field = field / t.clamp(min=T_MIN if self.training else T_LEAST)[:, None, None, None]
        return field

    def addition(self, out, contrast):
        """What the network adds to the field beside a linear base, from its output (B, 3, H, W) and the base's local
        contrast (B, 1, H, W).

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
                # Contrast is in the error, and would be in the gradient a second time: the network would learn from
                # the strongest edges alone. So the gradient passes unscaled, as of a loss over contrast.
                scaled = out + (scaled - out).detach()
            coefficients = self.code.encode(scaled)                                                     # (B, ., h, w)
            return scaled - self.code.decode((1 - self.revision.float()) * coefficients)


# What torch.compile gets: each block by itself. Blocks of the same shapes then share their code (25 graphs of about 60
# blocks, a minute or two of start-up on a GPU), and DDP can send a block's gradients while the one before is at work.
BLOCKS = (ResBlock, TransformerBlock, DCResBlock, DCDown, VQResBlock, LinearAttention, GatedConv)
MOST_VARIANTS = 64  # of a block's code, for all its shapes: beyond, the compiler leaves it as it is


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
    input_skip                   add the noisy image to the network's output (UViT's skip, of the loss's value)
    linear_encoder               the latent's mean is the linear code (encoder.LappedCode) plus what the network finds
    linear_decoder               the number of lapped coefficients that a 1x1 convolution reads from the latent, for an
                                 image that the network starts from (UViT's base); 0: none. z_dim with linear_encoder:
                                 an untrained model is then the linear code; more after fit_linear_decoder
    joint_input                  UViT's, for published SSDD decoders
    latents                      {"mean": [c], "std": [c], ...} per channel, from tools.latents --z_stats, for normalize
    without                      UViT's, for ablations
    notes                        anything else worth keeping in the saved file: training size, losses left out, ...
    raises                       ValueError for unknown names and values outside the ranges of CONFIG
    """

    def __init__(self, enc="dc_f32c32", dec="S", loss="eqm", enc_width=1.0, enc_options=None, depth=None, window=17,
                 c="linear", a=0.8, b=1.4, lam=1.0, input_skip=False, joint_input=False, without=(), latents=None,
                 notes=None, linear_encoder=False, linear_decoder=0):
        super().__init__()
        self.config = {"enc": enc, "dec": dec, "loss": loss, "enc_width": enc_width,
                       "enc_options": {} if enc_options is None else enc_options, "depth": depth, "window": window,
                       "c": c, "a": a, "b": b,
                       "lam": lam, "input_skip": input_skip, "joint_input": joint_input,
                       "without": without, "latents": latents, "notes": {} if notes is None else notes,
                       "linear_encoder": linear_encoder, "linear_decoder": linear_decoder}
        check_config(self.config)
        if self.config["enc_options"].get("linear"):
            raise ValueError("a model with the linear code has linear_encoder=True, not linear among its enc_options")
        for name, kind in (("enc_options", dict), ("notes", dict), ("without", sorted)):
            self.config[name] = kind(self.config[name])  # copies: the caller's stay as they are
        options = dict(self.config["enc_options"])
        if linear_encoder:
            options["linear"] = True
        self.encoder = make_encoder(enc, enc_width, **options)
        # The field at the noise end is this number times (e - x).
        self.eqm, self.field_at_noise = None, -1.0
        if loss == "eqm":
            self.eqm = EqM(c, a, b, lam)
            self.field_at_noise = self.eqm.at_noise
        self.decoder = UViT(dec, self.encoder.z_dim, loss == "fm", depth, window,
                            skip=self.field_at_noise if input_skip else 0.0, joint_input=joint_input, without=without,
                            base=(self.downscale, linear_decoder) if linear_decoder else None)

    @property
    def downscale(self):
        return self.encoder.downscale

    def encode(self, x):
        """x (B, 3, H, W) in [-1, 1] -> encoder.DiagonalGaussian over (B, c, H/f, W/f). ValueError if f does not divide
        H and W, or for integers: 8-bit levels would be taken for the range [-1, 1]."""
        f = self.downscale
        if not x.is_floating_point():
            raise ValueError(f"images are floating-point numbers in [-1, 1], got {x.dtype}: "
                             "x / 127.5 - 1 makes them of 8-bit levels")
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] % f or x.shape[3] % f or 0 in x.shape:
            raise ValueError(f"{self.config['enc']} encodes (B, 3, H, W) images with sides that are multiples of {f}, "
                             f"got {tuple(x.shape)}")
        return self.encoder(x.to(next(self.encoder.parameters()).dtype))

    def decode(self, z, steps=1, noise=None, generator=None, **options):
        """z (B, c, h, w) -> images (B, 3, h*f, w*f), nominally in [-1, 1], not clamped. Arguments as in `sample`."""
        return self.sample(z, steps, noise, generator, **options)[0]

    def sample(self, z, steps=1, noise=None, generator=None, **options):
        """As decode, and the number of network evaluations of every sample: (x, nfe (B,)).

        noise    starting point (B, 3, h*f, w*f); drawn from `generator` where None
        options  FM: method "euler", t_shift (sampler.euler). EqM: method "gd" or "nesterov", eta, last_eta, mu, tol
                 (sampler.gradient_descent, sampler.nesterov)
        raises   ValueError for options of the other loss or sampler, and for latents or noise of another shape
        """
        cfg, f = self.config, self.downscale
        self._check_latents(z)
        shape = (len(z), 3, z.shape[2] * f, z.shape[3] * f)
        if noise is not None and (noise.shape != shape or not noise.is_floating_point()):
            raise ValueError(f"noise for these latents is floating-point {shape}, got {noise.dtype} "
                             f"{tuple(noise.shape)}")
        if noise is None:
            noise = torch.randn(shape, generator=generator, device=generator.device if generator else z.device)
        # at least float32, whatever z is, and the weights' type: the sum of steps
        exact = torch.promote_types(self.decoder.conv_out.weight.dtype, torch.float32)
        noise = noise.to(z.device, torch.promote_types(noise.dtype, exact), memory_format=torch.channels_last)
        condition = self.decoder.condition(z, *noise.shape[-2:])
        allowed = {"method", "t_shift"} if cfg["loss"] == "fm" else {"method", "eta", "last_eta", "mu", "tol"}
        if set(options) - allowed:
            raise ValueError(f"a decoder trained with --loss {cfg['loss']} takes the sampler options "
                             f"{', '.join(sorted(allowed))}; "
                             f"got {', '.join(sorted(set(options) - allowed))}")
        if cfg["loss"] == "fm":
            method = options.pop("method", "euler")
            if method != "euler":
                raise ValueError(f"unknown sampling method '{method}' of flow matching: expected euler")
            return sampler.euler(self.decoder, noise, condition, steps, **options)
        method = options.pop("method", "nesterov" if "mu" in options else "gd")
        if method not in ("gd", "nesterov"):
            raise ValueError(f"unknown sampling method '{method}': expected gd or nesterov")
        if method == "gd" and "mu" in options:
            raise ValueError("gradient descent (gd) has no momentum: leave mu out, or take nesterov")
        if "eta" not in options:
            options = sampler.default_steps(self.eqm, steps) | options
        descend = sampler.gradient_descent if method == "gd" else sampler.nesterov
        return descend(self.decoder, noise, condition, steps, lam=cfg["lam"], **options)

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
        self._check_latents(z)
        shape = (len(z), 3, z.shape[2] * self.downscale, z.shape[3] * self.downscale)
        if x.shape != shape or not x.is_floating_point():
            raise ValueError(f"images for these latents are floating-point {shape}, got {x.dtype} {tuple(x.shape)}")
        # at least float32, as the sampler's images
        x = x.to(z.device, torch.promote_types(x.dtype, torch.float32), memory_format=torch.channels_last)
        field = self.decoder(x, z).float()
        return field.square().sum(dim=(1, 2, 3)) / (2 * self.eqm.lam)

    def reconstruct(self, x, steps=1, noise=None, generator=None, **options):
        """x (B, 3, H, W) of any size -> its reconstruction, same size: padded by reflection, in the end cropped."""
        if x.ndim != 4 or x.shape[1] != 3 or 0 in x.shape:
            raise ValueError(f"images are (B, 3, H, W) with sides of at least 1, got {tuple(x.shape)}")
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

    def _check_latents(self, z):
        """ValueError unless z is floating-point (B, c, h, w)."""
        c = self.encoder.z_dim
        if not z.is_floating_point() or z.ndim != 4 or z.shape[1] != c or 0 in z.shape:
            raise ValueError(f"latents of this model are floating-point (B, {c}, h, w), got {z.dtype} {tuple(z.shape)}")

    def _latent_moments(self, z):
        if not self.config["latents"]:
            raise ValueError("this model has no latent statistics: python -m tools.latents --ckpt F --data D "
                             "--z_stats stores them")
        self._check_latents(z)
        mean, std = self.config["latents"]["mean"], self.config["latents"]["std"]
        return torch.tensor(mean).to(z)[:, None, None], torch.tensor(std).to(z)[:, None, None]           # (c, 1, 1)

    @torch.no_grad()
    def fit_linear_decoder(self, images):
        """Set the linear decoder to the least-squares fit from this encoder's latents to the images, and the network's
        share in its coefficients to what the fit leaves unexplained: for an encoder whose latents are not the linear
        code's.

        images   iterable of batches (b, 3, H, W) in [-1, 1]
        Ridge regression with bias in float64, one for all cells: W = (Z'Z + r I)^-1 Z'C, Z (cells, c + 1) latents and
        ones, C (cells, linear_decoder) lapped coefficients. As the lapped vectors are orthonormal, least squares of
        the coefficients is least squares of the pixels.
        raises   ValueError without a linear decoder or images
        """
        decoder = self.decoder
        if decoder.base is None:
            raise ValueError("this model has no linear decoder to fit")
        gram, cross, energy, cells = 0, 0, 0, 0
        for x in images:
            x = x.to(next(self.parameters()).device)
            z = self.encode(x).mode()                                                            # (b, c, h, w)
            rows = z.permute(0, 2, 3, 1).flatten(0, 2).double()                                  # (cells, c)
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)                         # (cells, c + 1)
            target = decoder.code.encode(x).permute(0, 2, 3, 1).flatten(0, 2).double()           # (cells, count)
            gram = gram + rows.T @ rows
            cross = cross + rows.T @ target
            energy = energy + target.square().sum(0)                                             # (count,)
            cells += len(rows)
        if cells == 0:
            raise ValueError("no image to fit the linear decoder on")
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        weight = torch.linalg.solve(gram + ridge, cross).T                                       # (count, c + 1)
        decoder.base.weight.copy_(weight[:, :-1, None, None])
        decoder.base.bias.copy_(weight[:, -1])
        # Residual over variance, 1 - R^2, of every coefficient.
        residual = energy - 2 * (weight.T * cross).sum(0) + (weight @ gram * weight).sum(1)
        variance = energy - cross[-1].square() / cells                                           # the last row: ones
        unexplained = (residual / variance.clamp(min=torch.finfo(variance.dtype).tiny)).clamp(0, 1)
        decoder.revision.copy_(unexplained[:, None, None])

    # -- files ----------------------------------------------------------------------------------------------------

    def save(self, path):
        """Write weights and configuration to one .safetensors file, through a temporary name: never half a file under
        `path`. OSError: it cannot be written, or is a device or a pipe."""
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError(f"{path} is no ordinary file: give another name")
        state = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        temporary = f"{path}.{os.getpid()}.tmp"
        try:
            save_file(state, temporary, metadata={"format": str(FORMAT), "config": json.dumps(self.config)})
            os.chmod(temporary, 0o666 & ~umask())  # safetensors makes files that only their owner reads
            os.replace(temporary, path)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from None
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)

    @classmethod
    def load(cls, path, device="cpu"):
        """The model of a file that `save` wrote, or of a published file with encoder and decoder, in evaluation mode.

        A published file's configuration is read off its tensors. FileNotFoundError, ValueError: what is wrong with it.
        """
        state, meta = read_weights(path)
        saved = saved_config(meta, path)
        config = saved
        if not saved:
            config = infer_config(state)
            if "enc" not in config or config.get("dec", UNKNOWN) == UNKNOWN:
                raise ValueError(f"{path} has no DC-SSDAE configuration and holds {describe(config)}; a model needs an "
                                 "encoder and a decoder")
            del config["z_dim"]
        try:
            with torch.device("meta"):  # without memory: nothing large is built before it is known to be in the file
                config = cls(**config).config
        except ValueError as error:
            raise ValueError(f"{path} describes no model that can be built: {error}") from None
        config, state = fitted(config, state, path, "all", meta)
        model = cls(**config)
        model.load_state_dict(state)
        return model.to(device).eval()

    def load_published(self, path, part="all"):
        """Read weights into this model: from a file that `save` wrote, or in a published layout (see the README).

        part    "all", "encoder" or "decoder": what to read; the rest of the file is ignored
        The file decides between variants: a dc encoder with or without norms, a vq one's options, a decoder with
        SSDD's joint_input; published decoders have no input_skip. A 15 x 15 bias table fits a larger window.
        raises  FileNotFoundError, or ValueError that says what the file holds and what was expected
        """
        if part not in ("all", "encoder", "decoder"):
            raise ValueError(f"unknown part '{part}': expected all, encoder or decoder")
        state, meta = read_weights(path)
        config, state = fitted(self.config, state, path, part, meta)
        model = self
        if config != self.config:
            model = DCSSDAE(**config).to(next(self.parameters())).train(self.training)
        model.load_state_dict(state, strict=part == "all")
        self.config = config
        if part != "decoder":
            self.encoder = model.encoder
        if part != "encoder":
            self.decoder, self.eqm, self.field_at_noise = model.decoder, model.eqm, model.field_at_noise


# ---------------------------------------------------------------------------------------------------------------------
# Configurations: what a model's arguments, and those in a file, may be

def is_whole(low, high):
    """Test for whole numbers of this range."""
    return lambda value: type(value) is int and low <= value <= high


def is_number(low, high):
    """Test for numbers above low and up to high; not NaN."""
    return lambda value: type(value) in (int, float) and low < value <= high


def is_one_of(*words):
    return lambda value: isinstance(value, str) and value in words


def is_odd(value):
    return is_whole(1, 1025)(value) and value % 2 == 1


def is_list_of_words(value):
    return isinstance(value, (list, tuple)) and all(isinstance(word, str) for word in value)


def is_moments(value):
    """Test for `latents`: mean and std, as many numbers each, std positive."""
    if not isinstance(value, dict):
        return value is None
    mean, std = value.get("mean"), value.get("std")
    if not isinstance(mean, list) or not isinstance(std, list) or len(mean) != len(std):
        return False
    return all(map(is_number(-math.inf, LARGEST), mean)) and all(map(is_number(0, LARGEST), std))


LARGEST = 1e30  # of numbers in a configuration; float32 ends at 3e38
IS_DEPTH, IS_COUNT = is_whole(0, 1000), is_whole(0, 10**6)
CONFIG = {  # argument of DCSSDAE: (test, what is expected)
    "enc": (lambda value: isinstance(value, str), "an encoder's name"),
    "dec": (is_one_of(*SIZES), f"one of {', '.join(SIZES)}"),
    "loss": (is_one_of("fm", "eqm"), "fm or eqm"),
    "enc_width": (is_number(0, LARGEST_WIDTH), f"a number above 0, at most {LARGEST_WIDTH}"),
    "enc_options": (lambda value: isinstance(value, dict), "a dict of the encoder's options"),
    "depth": (lambda value: value is None or IS_DEPTH(value), "None or a whole number from 0 to 1000"),
    "window": (is_odd, "odd, from 1 to 1025"),
    "c": (is_one_of("linear", "trunc", "piecewise"), "linear, trunc or piecewise"),
    "a": (lambda value: is_number(0, 1)(value) and value < 1, "a number between 0 and 1"),
    "b": (is_number(0, LARGEST), "a positive number"),
    "lam": (is_number(0, LARGEST), "a positive number"),
    "input_skip": (lambda value: isinstance(value, bool), "true or false"),
    "joint_input": (lambda value: isinstance(value, bool), "true or false"),
    "without": (is_list_of_words, "a list of words"),
    "latents": (is_moments, "None or mean and std, lists of finite numbers, std positive"),
    "notes": (lambda value: isinstance(value, dict), "a dict"),
    "linear_encoder": (lambda value: isinstance(value, bool), "true or false"),
    "linear_decoder": (lambda value: value is False or IS_COUNT(value), "a whole number from 0 to 1000000"),
}


def check_config(config):
    """ValueError that names the first of a model's arguments, {name: value}, which is unknown or none that a model can
    have. Cheap: builds nothing."""
    unknown = [name for name in config if name not in CONFIG]
    if unknown:
        raise ValueError(f"unknown argument {short(unknown[0])} of a model: expected are {', '.join(CONFIG)}")
    for name, value in config.items():
        is_valid, expected = CONFIG[name]
        if not is_valid(value):
            raise ValueError(f"{name} of a model must be {expected}, got {short(value)}")
    if config.get("linear_decoder") and not config.get("input_skip"):
        raise ValueError("a linear decoder needs the input skip: its field is skip * (noisy image - estimate)")
    if "enc" in config:
        _, _, z_dim = parse_name(config["enc"])
        latents = config.get("latents")
        if latents is not None and len(latents["mean"]) != z_dim:
            raise ValueError(f"latents of {config['enc']} have {z_dim} channels, their statistics "
                             f"{len(latents['mean'])}")


def short(value):
    """A value as it stands in a message: at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def saved_config(meta, path):
    """The configuration in the metadata of a file that DCSSDAE.save wrote; {} of another's. ValueError where it is no
    configuration, or of a format newer than this code's."""
    if "config" not in meta:
        return {}
    number = meta.get("format", "")
    if not re.fullmatch(r"\d{1,9}", number):
        raise ValueError(f"{path} has a configuration but format {short(number)}, which is no number: it is damaged")
    if int(number) > FORMAT:
        raise ValueError(f"{path} has format {number}, newer than this code's {FORMAT}: update it")
    try:
        config = json.loads(meta["config"])
    except (ValueError, RecursionError):
        raise ValueError(f"{path} has a configuration that is not JSON: it is damaged") from None
    if not isinstance(config, dict) or not config:
        raise ValueError(f"{path} has a configuration that is no table of arguments: {short(config)}")
    try:
        check_config(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return config


def config_for(config, state, part, saved):
    """A model's configuration with what the tensors `state` decide of `part`. saved: the configuration beside them; {}
    for a published file."""
    found, config = infer_config(state), dict(config)
    if part != "decoder":
        config["linear_encoder"] = saved.get("linear_encoder", False)
        config["latents"] = saved.get("latents")  # the statistics before were of another encoder's
        if found.get("enc") == config["enc"]:
            config["enc_options"] = found.get("enc_options", config["enc_options"])
    if part != "encoder":
        config["joint_input"] = found.get("joint_input", config["joint_input"])
        config["input_skip"] = saved.get("input_skip", False)
        config["linear_decoder"] = saved.get("linear_decoder", 0)
        for name in ("c", "a", "b", "lam"):  # of the field that it was trained to be
            config[name] = saved.get(name, config[name])
    return config


def fitted(config, state, path, part, meta):
    """What loading `part` of the tensors `state` takes: (configuration, state dict), compared by names and shapes with
    a model that has no memory yet. meta: of the file. ValueError where they do not fit or are not finite."""
    state, saved = dict(state), saved_config(meta, path)
    unfolded = {key: value for key, value in state.items() if not key.startswith("encoder.fold_")}
    if infer_config(unfolded).get("enc") == config["enc"]:  # FLUX.2's latents as its encoder gives them, before folding
        state = unfolded
    config = config_for(config, state, part, saved)
    for key, table in state.items():
        if key.endswith("bias_table") and len(table) < config["window"]:
            pad = (config["window"] - len(table)) // 2
            state[key] = F.pad(table, (0, 0, pad, pad, pad, pad), value=NO_BIAS)
    if config["linear_decoder"] and part != "encoder" and int(meta["format"]) < LINEAR_FORMAT:
        raise ValueError(f"{path} holds a linear decoder of file format {meta['format']}, whose network adds to the "
                         "linear image in another way: train it again")
    with torch.device("meta"):
        own = DCSSDAE(**config).state_dict()
    return config, checked(own, state, path, part)


def umask():
    """The permissions that this process withholds from new files."""
    found = os.umask(0)  # there is no way to read it alone
    os.umask(found)
    return found


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


def check_folder(path):
    """ValueError for an --out that is no folder of this machine."""
    if str(path).startswith("hf:"):
        raise ValueError(f"--out {path} is an address of the Hugging Face Hub, where nothing can be written: give a "
                         "folder, and upload its model.safetensors afterwards")


def folder_beside(path):
    """Where the results about a weight file go by default: its folder; the current one for an hf:// address."""
    return "." if str(path).startswith("hf://") else os.path.dirname(path) or "."


def local_file(path):
    """hf://owner/repo/file -> that file in the Hugging Face cache, downloaded if need be; other paths as they are."""
    if not str(path).startswith("hf://"):
        return path
    parts = str(path).removeprefix("hf://").split("/", 2)
    if len(parts) < 3 or not parts[2]:
        raise ValueError(f"{path} is not of the form hf://owner/repo/file.safetensors")
    owner, repo, name = parts
    try:
        from huggingface_hub import hf_hub_download
        return hf_hub_download(f"{owner}/{repo}", name)
    except Exception as error:  # noqa: BLE001 the hub client raises many classes; all mean: no file
        raise FileNotFoundError(f"could not get {path} ({type(error).__name__}): download {name} from "
                                f"https://huggingface.co/{owner}/{repo} and give its path instead") from None


def read_weights(path):
    """Tensors (our names) and metadata of a .safetensors or torch file, or hf:// address: (dict, dict).

    Code in pickles is never run.

    Strips leading module., _orig_mod., model., first_stage_model. and vae., and unwraps {"state_dict": ...} and the
    like (WRAPPERS). Raises FileNotFoundError, ValueError.
    """
    path = local_file(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no weight file at {path}")
    try:
        if str(path).endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                meta = file.metadata() or {}
            state = load_file(path)
        else:
            state, meta = torch.load(path, map_location="cpu", weights_only=True), {}
    except pickle.UnpicklingError:
        raise ValueError(f"{path} is refused: it is damaged, or holds more than tensors (a Lightning checkpoint, say), "
                         "which is never executed; if you trust where it comes from, convert it once by torch.save("
                         "torch.load(FILE, weights_only=False)['state_dict'], 'weights.pt')") from None
    except (*BROKEN_FILE, MemoryError, RecursionError) as error:
        reason = "not written by torch.save" if isinstance(error, KeyError) else first_line(error)
        raise ValueError(f"{path} is not a readable weight file ({reason})") from None
    named = {}
    for key, value in unwrapped(state, path).items():
        name = PREFIX.sub("", key)
        if name in named:
            raise ValueError(f"{path} holds two tensors that are both {name} without their prefixes")
        named[name] = value
    has_our_names = "config" in meta and meta.get("format") != "1"  # a fork's module may be called as a published one
    return named if has_our_names else our_names(named), meta


def unwrapped(state, path):
    """The flat table {name: tensor} in what a file holds, inside of at most DEEPEST of WRAPPERS. ValueError where there
    is none, several, or tensors that are no plain arrays of real numbers."""
    for _ in range(DEEPEST):
        if not isinstance(state, dict) or any(isinstance(value, torch.Tensor) for value in state.values()):
            break
        inner = [name for name in WRAPPERS if isinstance(state.get(name), dict)]
        if "state_dict" in inner:
            inner = ["state_dict"]
        if len(inner) > 1:
            raise ValueError(f"{path} holds several tables of tensors ({', '.join(inner)}), as a checkpoint of "
                             "training does: give the model's own file (train.py's is model.safetensors), or store one "
                             "of them")
        if not inner:
            break
        state = state[inner[0]]
    is_table = isinstance(state, dict) and all(isinstance(key, str) for key in state)
    if not is_table or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} does not hold a flat table of tensors")
    for key, value in state.items():
        if value.layout is not torch.strided or value.is_quantized or value.is_complex() or value.is_meta:
            raise ValueError(f"{path} holds {key}, which is no plain array of real numbers")
    return state


# Published names -> ours. The decoder's come from the diffusers library, dc's from the DC-AE repository, vq's from
# latent-diffusion's.
RENAMES = [(re.compile(pattern), name) for pattern, name in (
    (r"^decoder\.time_embedding\.linear_(\d)\.", lambda m: f"decoder.time.{2 * int(m[1]) - 2}."),
    (r"^decoder\.conv_in_img\.", "decoder.conv_in_x."),
    (r"^decoder\.batch_norm_z\.", "decoder.norm_z."),
    (r"^decoder\.ada_ctx_proj\.", "decoder.context."),
    (r"^decoder\.conv_norm_out\.", "decoder.norm_out."),
    (r"^decoder\.(down|up)_blocks\.(\d)\.resnets\.", r"decoder.\1.\2."),
    (r"^decoder\.down_blocks\.(\d)\.downsamplers\.0\.conv\.", r"decoder.down.\1.2."),
    (r"^decoder\.up_blocks\.(\d)\.upsamplers\.0\.conv\.", r"decoder.up.\1.3."),
    (r"\.ctx_proj\.", ".proj."), (r"\.conv_shortcut\.|\.nin_shortcut\.", ".shortcut."),
    (r"\.time_emb_proj\.", ".time."),
    (r"^decoder\.mid_block\.(norm|proj_in|proj_out)\.", lambda m: f"decoder.mid_{m[1].removeprefix('proj_')}."),
    (r"^decoder\.mid_block\.transformer_blocks\.", "decoder.blocks."),
    (r"\.norm1\.linear\.", ".ada."), (r"^(decoder\.blocks\.\d+)\.norm2\.", r"\1.norm."),
    (r"\.attn1\.to_([qkv])\.", r".attn.\1."), (r"\.attn1\.out_proj\.", ".attn.out."),
    (r"\.relative_position_bias\.relative_bias_table$", ".attn.bias_table"),
    (r"\.ff\.proj_in_act\.proj\.", ".mlp_in."), (r"\.ff\.proj_out\.", ".mlp_out."),
    # dc and dcae: the DC-AE repository, then diffusers' AutoencoderDC, then our files of format 1
    (r"^encoder\.project_in\.conv\.", "encoder.conv_in."),
    (r"^encoder\.project_out\.(main\.)?op_list\.0\.conv\.", "encoder.conv_out."),
    (r"^encoder\.stages\.(\d+)\.op_list\.(\d+)\.", r"encoder.stages.\1.\2."),
    (r"^encoder\.down_blocks\.(\d+)\.(\d+)\.", r"encoder.stages.\1.\2."),
    (r"^(encoder\.stages\.\d+\.\d+)\.(context_module\.main|attn)\.", r"\1.0."),
    (r"^(encoder\.stages\.\d+\.\d+)\.(local_module\.main|conv_out)\.", r"\1.1."),
    (r"^(encoder\.stages\.\d+\.\d+)\.main\.", r"\1."),
    (r"\.(proj|conv2|point_conv)\.norm\.|\.norm_out\.(?=weight$|bias$)(?<=\.0\.norm_out\.)", ".norm."),
    (r"\.(inverted|depth|point)_conv\.conv\.|\.conv_(inverted|depth|point)\.", lambda m: f".{m[1] or m[2]}."),
    (r"\.(conv1|conv2|conv|qkv|proj)\.conv\.(?=weight$|bias$)", r".\1."),
    (r"\.aggreg\.", ".aggregate."), (r"\.to_qkv_multiscale\.(\d)\.proj_(in|out)\.",
     lambda m: f".aggregate.{m[1]}.{int(m[2] == 'out')}."),
    (r"^(encoder\.stages\..*)\.to_out\.", r"\1.proj."),
    (r"^encoder\.stem\.", "encoder.conv_in."), (r"^encoder\.head\.", "encoder.conv_out."),
    # vq: latent-diffusion, then diffusers' AutoencoderKL
    (r"^(encoder\.down\.\d)\.block\.", r"\1."), (r"^(encoder\.down\.\d)\.downsample\.conv\.", r"\1.2."),
    (r"^encoder\.down_blocks\.(\d)\.resnets\.", r"encoder.down.\1."),
    (r"^encoder\.down_blocks\.(\d)\.downsamplers\.0\.conv\.", r"encoder.down.\1.2."),
    (r"^encoder\.mid\.block_([12])\.", lambda m: f"encoder.mid.{2 * int(m[1]) - 2}."),
    (r"^encoder\.mid_block\.resnets\.([01])\.", lambda m: f"encoder.mid.{2 * int(m[1])}."),
    (r"^encoder\.(mid\.attn_1|mid_block\.attentions\.0)\.", "encoder.mid.1."),
    (r"^encoder\.mid\.1\.group_norm\.", "encoder.mid.1.norm."),
    (r"^encoder\.mid\.1\.(to_)?([qkv])(uery|ey|alue)?\.", r"encoder.mid.1.\2."),
    (r"^encoder\.mid\.1\.(proj_out|proj_attn|to_out\.0)\.", "encoder.mid.1.out."),
    (r"^encoder\.conv_norm_out\.", "encoder.norm_out."),
    (r"^(encoder\.out_proj|quant_conv|encoder\.quant_conv)\.", "encoder.quant."),
    (r"^encoder\.down\.(\d)\.attn\.([01])\.", r"encoder.attend.\1.\2."),
    (r"^encoder\.down_blocks\.(\d)\.attentions\.([01])\.", r"encoder.attend.\1.\2."),
    (r"^(encoder\.attend\.\d\.\d)\.group_norm\.", r"\1.norm."),
    (r"^(encoder\.attend\.\d\.\d)\.to_([qkv])\.", r"\1.\2."),
    (r"^(encoder\.attend\.\d\.\d)\.(proj_out|to_out\.0)\.", r"\1.out."),
    (r"^bn\.running_(mean|var)$", r"encoder.fold_\1"),  # FLUX.2
)]


# Weights of linear layers that are 1x1 convolutions here: the encoders' attention.
LINEAR_AS_CONVOLUTION = re.compile(
    r"encoder\.(mid\.1|attend\.\d\.\d|stages\..*\.0)\.(q|k|v|out|to_[qkv]|proj)\.weight$")


def our_names(state):
    """State dict of any known layout -> our names; separate q, k, v and linear layers become our convolutions."""
    out = {}
    for key, value in state.items():
        for pattern, name in RENAMES:
            key = pattern.sub(name, key)
        if value.ndim == 2 and LINEAR_AS_CONVOLUTION.match(key):
            value = value[:, :, None, None]
        out[key] = value
    for key in list(out):
        if key.endswith(".to_q.weight"):
            separate = [key, key.replace("to_q", "to_k"), key.replace("to_q", "to_v")]
            if all(name in out for name in separate):
                out[key.replace("to_q", "qkv")] = torch.cat([out[name] for name in separate])
            for name in separate:
                out.pop(name, None)
    return out


def infer_config(state):
    """What a state dict (our names) holds, read off names and shapes: DCSSDAE's arguments, and the decoder's z_dim."""
    rows = {key: len(value) for key, value in state.items() if value.ndim}  # output channels
    return infer_encoder(rows) | infer_decoder(state, rows)


def infer_encoder(rows):
    """DCSSDAE's arguments of the encoder, {} without one."""
    stem = rows.get("encoder.conv_in.weight")
    out = rows.get("encoder.conv_out.weight")
    levels = {key.split(".")[2] for key in rows if key.startswith("encoder.down.")}
    if stem and out and levels:
        f, c = 2 ** (len(levels) - 1), out // 2
        options = {} if "encoder.quant.weight" in rows else {"quant": False}
        if any(key.startswith("encoder.attend.") for key in rows):
            options["kl_f16"] = True
        if "encoder.fold_mean" in rows:
            f, c, options = 2 * f, 4 * c, options | {"fold": True}
        return {"enc": f"vq_f{f}c{c}", "enc_width": stem / 128, "enc_options": options}
    stages = [int(number) for number in (key.split(".")[2] for key in rows if key.startswith("encoder.stages."))
              if number.isdecimal() and len(number) < 3]
    if not stages or not out:
        return {}
    f = 2 ** max(stages)
    halving_stem = rows.get("encoder.conv_in.conv.weight")  # where stage 0 has no block
    if any(".qkv." in key for key in rows):
        if halving_stem:
            return {"enc": f"dcae_f{f}c{out}", "enc_width": halving_stem / 64}
        return {"enc": f"dcae_f{f}c{out}_sana", "enc_width": stem / 128}
    if not halving_stem:
        return {}
    has_norms = any(key.startswith("encoder.") and ".norm." in key for key in rows)
    options = {} if has_norms else {"norm": False}
    return {"enc": f"dc_f{f}c{out // 2}", "enc_width": halving_stem / 64, "enc_options": options}


def infer_decoder(state, rows):
    """DCSSDAE's arguments of the decoder, and its z_dim; {} without one."""
    widths = [rows.get(f"decoder.down.{i}.0.conv1.weight") for i in range(4)]
    context = state.get("decoder.context.0.weight")
    if not all(widths) or context is None or context.ndim != 4:
        return {}
    blocks = sum(key.endswith(".attn.bias_table") for key in rows)
    size, depth = UNKNOWN, blocks
    for name in SIZES:  # of those with the same widths the one of this depth, or else the first
        if level_widths(name) == widths:
            if SIZES[name][2] == blocks:
                size, depth = name, None
                break
            if size == UNKNOWN:
                size = name
    return {"dec": size, "depth": depth, "loss": "fm" if "decoder.time.0.weight" in rows else "eqm",
            "joint_input": "decoder.conv_in_x.weight" not in rows,
            "z_dim": context.shape[1]}


def describe(config):
    """infer_config's result as words."""
    words = []
    if "enc" in config:
        options = config.get("enc_options", {})
        norms = "" if options.get("norm", True) else ", without norms"
        if not options.get("quant", True):
            norms = ", without quant_conv"
        for option, word in (("kl_f16", ", kl-f16"), ("fold", ", folded")):
            norms += word if options.get(option) else ""
        words.append(f"an encoder {config['enc']} (width {config['enc_width']:g}{norms})")
    if "dec" in config:
        depth = "" if config["depth"] is None else f", {config['depth']} blocks"
        latents = f"latents of {config['z_dim']} channels"
        words.append(f"a decoder of size {config['dec']} ({config['loss']}{depth}, {latents})")
    return " and ".join(words) or "no encoder or decoder in a known layout"


def checked(own, state, path, part="all"):
    """`part` of the tensors `state`, if they have the names and shapes of the state dict `own`, and finite values.
    ValueError in one sentence: what the file holds, what was expected."""
    own = {k: v for k, v in own.items() if part == "all" or k.startswith(part + ".")}
    state = {k: v for k, v in state.items() if part == "all" or k.startswith(part + ".")}
    missing, extra = [k for k in own if k not in state], [k for k in state if k not in own]
    shapes = [f"{k} is {tuple(state[k].shape)}, expected {tuple(own[k].shape)}"
              for k in own if k in state and state[k].shape != own[k].shape]
    if missing or extra or shapes:
        kinds = (("tensors missing", missing), ("unknown", extra), ("of another shape", shapes))
        found = [f"{len(names)} {kind} (first: {names[0]})" for kind, names in kinds if names]
        raise ValueError(f"{path} does not fit this model: it holds {describe(infer_config(state))}, expected was "
                         f"{describe(infer_config(own))}; {'; '.join(found)}")
    bad = [k for k, v in state.items() if not is_finite(v)]
    if bad:
        raise ValueError(f"{path} holds weights that are not finite in {len(bad)} tensors (first: {bad[0]}): the "
                         "training that wrote it has diverged, or the file is damaged; take an earlier one")
    negative = [k for k, v in state.items() if k.endswith((".running_var", ".fold_var")) and (v < 0).any()]
    if negative:
        raise ValueError(f"{path} holds negative variances ({negative[0]}): it is damaged")
    return state


def is_finite(tensor):
    return not tensor.is_floating_point() or bool(tensor.float().isfinite().all())
