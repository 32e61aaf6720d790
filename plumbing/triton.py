"""Group norm, scale, shift and SiLU in one operation for GPUs, in Triton; plumbing.fast.norm_silu calls it there.

PyTorch's own kernels would go over each map about ten times, and more often backwards. Here the forward pass reads a
map twice (statistics, result) and the backward pass twice (sums, gradient). Only x is kept for it, and all arithmetic
is in float32 registers. Maps are channels_last: (B, H, W, C) in memory, and channels are the fast axis of every load.
"""
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

MOST_PIXELS = 64             # of a tile
TILE = 2048                  # values of a tile: what fits into registers some times over
MOST_SPAN = 256              # pixels that one program sums up, tile by tile


def tile(pixels, channels):
    """(pixels, channels) of a tile, powers of 2."""
    c = min(triton.next_power_of_2(channels), 128)
    return min(triton.next_power_of_2(pixels), TILE // c, MOST_PIXELS), c


def group_tile(rows, channels):
    """(rows, channels) of a tile that holds all channels of a group, and rows that tiles one after the other cover: a
    power of 2, so that few sizes are compiled."""
    c = triton.next_power_of_2(channels)
    covered = triton.next_power_of_2(rows)
    return min(covered, max(1, TILE // c)), c, covered


def span(pixels):
    return min(triton.next_power_of_2(pixels), MOST_SPAN)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. A cell is a block of H/h x W/w pixels that share scale and shift, which lie `row` values from one cell to the
# next: they may be some channels of a larger map. statistics (2, B, groups): a group's mean and 1 / deviation, B_G = B
# groups.

@triton.jit
def _place(own, row, H, W, C, h, w, group, P: tl.constexpr, N: tl.constexpr):
    """A program's tile of a map, P pixels by N channels of an image: where its values lie, those of its cells and of
    its groups, and which of them are there."""
    chunks = tl.cdiv(H * W, P)
    b, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    p, c = chunk * P + tl.arange(0, P), tl.program_id(1) * N + tl.arange(0, N)
    at = b.to(tl.int64) * H * W * C + p[:, None].to(tl.int64) * C + c[None, :]
    cell = p // W // (H // h) * w + p % W // (W // w)
    of_cell = (own * b * h * w + cell)[:, None] * row + c[None, :]
    of_group = b * (C // group) + c // group
    return at, of_cell, of_group, (p < H * W)[:, None] & (c < C)[None, :], c < C


@triton.jit
def _silu_gradient(v, grad):
    sigmoid = tl.sigmoid(v)
    return grad * sigmoid * (1 + v * (1 - sigmoid))


@triton.jit
def _moments(x, sums, H_W, C, group, spans, SPAN: tl.constexpr, P: tl.constexpr, N: tl.constexpr):
    """Sums of (x - k) and (x - k)^2 over a span of pixels, for each channel: sums (2, B, spans, C). k is the image's
    first value in the channel's group: without it a mean far from 0 would cancel."""
    b, number = tl.program_id(0) // spans, tl.program_id(0) % spans
    c = tl.program_id(1) * N + tl.arange(0, N)
    image = x + b.to(tl.int64) * H_W * C
    k = tl.load(image + c // group * group, mask=c < C, other=0.0).to(tl.float32)
    total, squares = tl.zeros([P, N], tl.float32), tl.zeros([P, N], tl.float32)
    for start in range(0, SPAN, P):
        p = number * SPAN + start + tl.arange(0, P)
        inside = (p < H_W)[:, None] & (c < C)[None, :]
        v = tl.load(image + p[:, None].to(tl.int64) * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
        v = tl.where(inside, v - k[None, :], 0.0)
        total += v
        squares += v * v
    out = sums + tl.program_id(0).to(tl.int64) * C + c
    tl.store(out, tl.sum(total, 0), mask=c < C)
    tl.store(out + tl.num_programs(0).to(tl.int64) * C, tl.sum(squares, 0), mask=c < C)


@triton.jit
def _statistics(x, sums, statistics, H_W, C, group, spans, eps, SPANS: tl.constexpr, S: tl.constexpr,
                N: tl.constexpr):
    """Mean and 1 / deviation of a group, of the moments of its spans and channels."""
    groups = C // group
    b, first = tl.program_id(0) // groups, tl.program_id(0) % groups * group
    c = tl.arange(0, N)
    total, squares = tl.zeros([S, N], tl.float32), tl.zeros([S, N], tl.float32)
    for start in range(0, SPANS, S):
        s = start + tl.arange(0, S)
        inside = (s < spans)[:, None] & (c < group)[None, :]
        at = sums + (b.to(tl.int64) * spans + s[:, None]) * C + first + c[None, :]
        total += tl.load(at, mask=inside, other=0.0)
        squares += tl.load(at + (tl.num_programs(0) // groups).to(tl.int64) * spans * C, mask=inside, other=0.0)
    off = tl.sum(tl.sum(total, 1), 0) / (H_W * group)
    var = tl.sum(tl.sum(squares, 1), 0) / (H_W * group) - off * off
    k = tl.load(x + b.to(tl.int64) * H_W * C + first).to(tl.float32)
    tl.store(statistics + tl.program_id(0), k + off)
    tl.store(statistics + tl.num_programs(0) + tl.program_id(0), tl.rsqrt(tl.maximum(var, 0.0) + eps))


@triton.jit
def _forward(x, y, statistics, scale, shift, own, row, H, W, C, h, w, group, B_G, P: tl.constexpr, N: tl.constexpr):
    """y = silu((x - mean) rstd scale + shift). own: 1 if every image has its own scale and shift, else 0."""
    at, of_cell, of_group, inside, is_channel = _place(own, row, H, W, C, h, w, group, P, N)
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(statistics + of_group, mask=is_channel, other=0.0)
    r = tl.load(statistics + B_G + of_group, mask=is_channel, other=0.0)
    a = tl.load(scale + of_cell, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(shift + of_cell, mask=inside, other=0.0).to(tl.float32)
    v = (v - m[None, :]) * r[None, :] * a + s
    tl.store(y + at, (v * tl.sigmoid(v)).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _sums(x, grad, statistics, scale, shift, sums, own, row, H, W, C, h, w, group, B_G, spans, SPAN: tl.constexpr,
          P: tl.constexpr, N: tl.constexpr):
    """Gradients of shift and scale: sums of g = grad silu'(.) and of g x^ over a span of a cell's pixels, for each
    channel: sums (2, B, h, w, spans, C)."""
    of_image, number = tl.program_id(0) // spans, tl.program_id(0) % spans
    b, cell = of_image // (h * w), of_image % (h * w)
    c = tl.program_id(1) * N + tl.arange(0, N)
    rows, columns = H // h, W // w
    image = b.to(tl.int64) * H * W * C
    of_group = b * (C // group) + c // group
    of_cell = (own * b * h * w + cell) * row + c
    m = tl.load(statistics + of_group, mask=c < C, other=0.0)
    r = tl.load(statistics + B_G + of_group, mask=c < C, other=0.0)
    a = tl.load(scale + of_cell, mask=c < C, other=0.0).to(tl.float32)
    s = tl.load(shift + of_cell, mask=c < C, other=0.0).to(tl.float32)
    total, products = tl.zeros([P, N], tl.float32), tl.zeros([P, N], tl.float32)
    for start in range(0, SPAN, P):
        q = number * SPAN + start + tl.arange(0, P)                                   # number of a pixel in the cell
        p = (cell // w * rows + q // columns) * W + cell % w * columns + q % columns  # and in the image
        inside = (q < rows * columns)[:, None] & (c < C)[None, :]
        at = image + p[:, None].to(tl.int64) * C + c[None, :]
        x_hat = (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - m[None, :]) * r[None, :]
        v = x_hat * a[None, :] + s[None, :]
        g = _silu_gradient(v, tl.load(grad + at, mask=inside, other=0.0).to(tl.float32))
        total += g
        products += g * x_hat
    out = sums + tl.program_id(0).to(tl.int64) * C + c
    tl.store(out, tl.sum(total, 0), mask=c < C)
    tl.store(out + tl.num_programs(0).to(tl.int64) * C, tl.sum(products, 0), mask=c < C)


@triton.jit
def _means(sums, scale, means, own, row, H_W, C, cells, group, spans, ROWS: tl.constexpr, S: tl.constexpr,
           N: tl.constexpr):
    """Means over a group of scale g and of scale g x^: means (2, B, groups)."""
    groups = C // group
    b, first = tl.program_id(0) // groups, tl.program_id(0) % groups * group
    c = tl.arange(0, N)
    total, products = tl.zeros([S, N], tl.float32), tl.zeros([S, N], tl.float32)
    for start in range(0, ROWS, S):
        s = start + tl.arange(0, S)
        inside = (s < cells * spans)[:, None] & (c < group)[None, :]
        at = sums + (b.to(tl.int64) * cells * spans + s[:, None]) * C + first + c[None, :]
        a = tl.load(scale + (own * b * cells + s // spans)[:, None] * row + first + c[None, :], mask=inside, other=0.0)
        a = a.to(tl.float32)
        total += a * tl.load(at, mask=inside, other=0.0)
        products += a * tl.load(at + (tl.num_programs(0) // groups).to(tl.int64) * cells * spans * C, mask=inside,
                                other=0.0)
    tl.store(means + tl.program_id(0), tl.sum(tl.sum(total, 1), 0) / (H_W * group))
    tl.store(means + tl.num_programs(0) + tl.program_id(0), tl.sum(tl.sum(products, 1), 0) / (H_W * group))


@triton.jit
def _backward(x, grad, dx, statistics, scale, shift, means, own, row, H, W, C, h, w, group, B_G,
              P: tl.constexpr, N: tl.constexpr):
    """dx = rstd (scale g - mean(scale g) - x^ mean(scale g x^)), the means over a group: means (2, B, groups)."""
    at, of_cell, of_group, inside, is_channel = _place(own, row, H, W, C, h, w, group, P, N)
    m = tl.load(statistics + of_group, mask=is_channel, other=0.0)
    r = tl.load(statistics + B_G + of_group, mask=is_channel, other=0.0)
    m_g, m_gx = (tl.load(means + of_group, mask=is_channel, other=0.0),
                 tl.load(means + B_G + of_group, mask=is_channel, other=0.0))
    a = tl.load(scale + of_cell, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(shift + of_cell, mask=inside, other=0.0).to(tl.float32)
    x_hat = (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - m[None, :]) * r[None, :]
    v = x_hat * a + s
    g = _silu_gradient(v, tl.load(grad + at, mask=inside, other=0.0).to(tl.float32))
    d = r[None, :] * (a * g - m_g[None, :] - x_hat * m_gx[None, :])
    tl.store(dx + at, d.to(dx.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------------------------------------------------------------

def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last)


def with_row(scale, shift):
    """A norm's scale and shift, (C,) or (., C, h, w), as they may lie in memory for the kernels, and the number of
    values from one cell to the next: that of a larger map where they are some of its channels."""
    if scale.ndim == 1:
        return scale, shift, len(scale)
    _, _, h, w = scale.shape
    row = scale.stride(3)
    if scale.stride() == shift.stride() == (h * w * row, 1, w * row, row):
        return scale, shift, row
    return channels_last(scale), channels_last(shift), scale.shape[1]


def on_device_of(t):
    """Triton starts kernels on the current GPU, wherever the data is."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


class GpuNormSiLU(torch.autograd.Function):
    """silu(GroupNorm(x) * scale + shift), arguments and values as plumbing.fast.NormSiLU's."""

    @staticmethod
    def forward(ctx, x, scale, shift, groups, eps):
        B, C, H, W = x.shape
        own, h, w = (0, 1, 1) if scale.ndim == 1 else (int(len(scale) > 1), *scale.shape[2:])
        x, (scale, shift, row) = channels_last(x), with_row(scale, shift)
        group = C // groups
        P, N = tile(H * W, C)
        spans, columns = triton.cdiv(H * W, span(H * W)), triton.cdiv(C, N)
        S, M, covered = group_tile(spans, group)
        sums = x.new_empty((2, B, spans, C), dtype=torch.float32)
        statistics = x.new_empty((2, B, groups), dtype=torch.float32)
        y = torch.empty_like(x)
        with on_device_of(x):
            _moments[(B * spans, columns)](x, sums, H * W, C, group, spans, SPAN=span(H * W), P=P, N=N)
            _statistics[(B * groups,)](x, sums, statistics, H * W, C, group, spans, eps, SPANS=covered, S=S, N=M)
            _forward[(B * triton.cdiv(H * W, P), columns)](
                x, y, statistics, scale, shift, own, row, H, W, C, h, w, group, B * groups, P=P, N=N)
        ctx.save_for_backward(x, scale, shift, statistics)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, scale, shift, statistics = ctx.saved_tensors
        (B, C, H, W), groups = x.shape, statistics.shape[2]
        own, h, w = (0, 1, 1) if scale.ndim == 1 else (int(len(scale) > 1), *scale.shape[2:])
        grad, (_, _, row) = channels_last(grad), with_row(scale, shift)
        group = C // groups
        pixels = H // h * (W // w)                                                            # of a cell
        spans, columns = triton.cdiv(pixels, span(pixels)), triton.cdiv(C, tile(pixels, C)[1])
        sums = x.new_empty((2, B, h, w, spans, C), dtype=torch.float32)
        means = x.new_empty((2, B, groups), dtype=torch.float32)
        dx = torch.empty_like(x)
        with on_device_of(x):
            P, N = tile(pixels, C)
            _sums[(B * h * w * spans, columns)](
                x, grad, statistics, scale, shift, sums, own, row, H, W, C, h, w, group, B * groups, spans,
                SPAN=span(pixels), P=P, N=N)
            S, M, covered = group_tile(h * w * spans, group)
            _means[(B * groups,)](
                sums, scale, means, own, row, H * W, C, h * w, group, spans, ROWS=covered, S=S, N=M)
            P, N = tile(H * W, C)
            _backward[(B * triton.cdiv(H * W, P), columns)](
                x, grad, dx, statistics, scale, shift, means, own, row, H, W, C, h, w, group, B * groups, P=P, N=N)
        sums = sums.sum(4) if spans > 1 else sums[:, :, :, :, 0]                              # (2, B, h, w, C)
        sums = sums.permute(0, 1, 4, 2, 3)                                                    # (2, B, C, h, w)
        if scale.ndim == 1:
            sums = sums.sum((1, 3, 4))                                                        # (2, C)
        dshift, dscale = (s.sum_to_size(t.shape).to(t.dtype) for s, t in zip(sums, (shift, scale)))
        return dx, dscale, dshift, None, None
