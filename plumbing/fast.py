"""Fast forms of what the networks compute, each beside its plain form, which says what it computes and is its test's
oracle.

Maps (B, C, H, W) are channels_last, (B, H, W, C) in memory: what fast convolutions take. A CPU, a GPU and a compiler
are each fast in another way. `eager_cpu` tells where work is done by the CPU's own kernels; on GPUs, whose kernels of
group norm and pixel_unshuffle would give maps that the next convolution has to turn round, both stand here on views.

Scales and shifts of a norm are (C,), or (B or 1, C, h, w): constant over blocks of H/h x W/w pixels, never enlarged.
"""
import functools
import importlib.util
import math
import os
import shutil
import sysconfig

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

BLOCK = 5        # Two 3x3 convolutions of a map that is constant over blocks of at least 5 pixels have 5 values an axis
#                  and block: its first two and its last two pixels see the neighbours, those between all see the same.
MASKED = -3e4    # The bias of an offset outside the attention window. Its exp is 0, and it fits into float16.


def eager_cpu(x):
    """Whether work on x is done by the CPU's own kernels: not on a GPU, and not compiled."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


lent = None      # A list, while plumbing.graphs records: of what `kept` has returned, which the graph then keeps, too.


def kept(make, most=128):
    """A function of sizes, and of a device, whose last results are kept. They are on the CPU where the function names
    no device, whatever torch's default is. A compiler makes constants of them."""
    @functools.lru_cache(maxsize=most)
    def keep(*key):
        with torch.device("cpu"), torch.inference_mode(False):  # or training could not use what an evaluation has made
            return make(*key)

    @functools.wraps(make)
    def wrapped(*key):
        if torch.compiler.is_compiling():
            return make(*key)
        result = keep(*key)
        if lent is not None:
            lent.append(result)
        return result

    wrapped.cache_clear = keep.cache_clear
    return wrapped


# ---------------------------------------------------------------------------------------------------------------------
# Blocks of pixels

def in_blocks(x, h, w):
    """(B, C, H, W) -> (B, h, H/h, w, W/w, C), a view of channels_last maps."""
    B, C, H, W = x.shape
    return x.permute(0, 2, 3, 1).reshape(B, h, H // h, w, W // w, C)


def per_block(scale):
    """(B, C, h, w) -> (B, h, 1, w, 1, C)."""
    return scale.permute(0, 2, 3, 1)[:, :, None, :, None]


def unblock(x, shape):
    """The inverse of `in_blocks`."""
    B, C, H, W = shape
    return x.reshape(B, H, W, C).permute(0, 3, 1, 2)


def modulate(x, scale, shift):
    """x * scale + shift; both as `per_block` makes them."""
    _, h, _, w, _, _ = scale.shape
    return unblock(torch.addcmul(shift, in_blocks(x, h, w), scale), x.shape)


def plain_modulate(x, scale, shift):
    scale, shift = (F.interpolate(m, size=x.shape[2:], mode="nearest") for m in (scale, shift))
    return x * scale + shift


@kept
def ones_and_zeros(counts, dtype, device):
    """counts[0] ones, counts[1] zeros, counts[2] ones, ...: (., 1, 1), what makes 1 + scale of all scales in a map."""
    values = [torch.full((count, 1, 1), (number + 1) % 2, dtype=dtype) for number, count in enumerate(counts)]
    return torch.cat(values).to(device)


# ---------------------------------------------------------------------------------------------------------------------
# Group norm, scale, shift, SiLU

def norm_silu(x, scale, shift, groups, eps=1e-5):
    """silu(GroupNorm(x) * scale + shift): on CPUs NormSiLU, on GPUs that Triton serves a kernel of our own; elsewhere
    the plain form, which compilers fuse into two passes over x."""
    if eager_cpu(x):
        return NormSiLU.apply(x, scale, shift, groups, eps)
    if not torch.compiler.is_compiling() and x.dtype is not torch.float64 and has_triton(x.device):
        from plumbing.triton import GpuNormSiLU
        return GpuNormSiLU.apply(x, scale, shift, groups, eps)
    return recomputed(plain_norm, x, scale, shift, groups, eps)


def group_norm(x, layer, silu=False):
    """x through an nn.GroupNorm, and SiLU if asked for: on CPUs PyTorch's own."""
    if eager_cpu(x):
        y = layer(x)
        return F.silu(y) if silu else y
    if silu:
        return norm_silu(x, layer.weight, layer.bias, layer.num_groups, layer.eps)
    return recomputed(plain_norm, x, layer.weight, layer.bias, layer.num_groups, layer.eps, False)


def plain_norm(x, scale, shift, groups, eps=1e-5, silu=True):
    """silu(GroupNorm(x) * scale + shift), or the same without SiLU; computed in float32 at least."""
    if scale.ndim == 1:
        scale, shift = scale[None, :, None, None], shift[None, :, None, None]
    y = x.permute(0, 2, 3, 1).unflatten(3, (groups, -1))                                     # (B, H, W, groups, .)
    y = y.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(y, dim=(1, 2, 4), keepdim=True, correction=0)
    y = ((y - mean) * torch.rsqrt(var + eps)).flatten(3).permute(0, 3, 1, 2)
    y = torch.addcmul(per_block(shift.to(y.dtype)), in_blocks(y, *scale.shape[-2:]), per_block(scale.to(y.dtype)))
    y = unblock(y, x.shape)
    return (F.silu(y) if silu else y).to(x.dtype)


def recomputed(function, x, *arguments):
    """function(x, *arguments), of which only the arguments are kept for the backward pass; a compiler sees to that by
    itself."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return function(x, *arguments)
    return checkpoint(function, x, *arguments, use_reentrant=False, preserve_rng_state=False)


@functools.cache
def has_triton(device):
    """Whether Triton is installed and makes kernels for this GPU: NVIDIA's from 2017 (Volta) on, and AMD's. It needs a
    C compiler and Python's headers, which slim images lack."""
    if device.type != "cuda":
        return False
    serves = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (7, 0)
    compiler = os.environ.get("CC") or shutil.which("clang") or shutil.which("gcc")
    headers = os.path.exists(os.path.join(sysconfig.get_path("include", "posix_prefix"), "Python.h"))
    return bool(serves and compiler and headers) and importlib.util.find_spec("triton") is not None


class NormSiLU(torch.autograd.Function):
    """The CPU's norm_silu: only x is kept for the backward pass, and that takes few passes over x. Statistics are
    computed in float32."""

    @staticmethod
    def forward(ctx, x, scale, shift, groups, eps):
        B, C, H, W = x.shape
        # PyTorch's CPU kernel for bf16 maps of under 1024 pixels is 8 times slower than the one for float32.
        slow = x.dtype is torch.bfloat16 and H * W < 1024
        y = x.float() if slow else x
        scale, shift = scale.to(y.dtype), shift.to(y.dtype)
        if scale.numel() == C:  # the same everywhere: group norm's own weights
            y, mean, rstd = torch.native_group_norm(y, scale.flatten(), shift.flatten(), B, C, H * W, groups, eps)
        else:
            y, mean, rstd = torch.native_group_norm(y, None, None, B, C, H * W, groups, eps)
            v = in_blocks(y, *scale.shape[-2:])
            y = unblock(torch.addcmul(per_block(shift), v, per_block(scale), out=v), y.shape)
        ctx.groups = groups
        ctx.save_for_backward(x, scale, shift, mean, rstd)
        return F.silu(y, inplace=True).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, scale, shift, mean, rstd = ctx.saved_tensors
        groups, (C, H, W), dtypes, shape = ctx.groups, x.shape[1:], (x.dtype, scale.dtype, shift.dtype), scale.shape
        # In float32 at least: constants that were rounded to bf16 would not cancel where a group's mean is large.
        exact = torch.promote_types(x.dtype, torch.float32)
        x, grad, scale, shift, mean, rstd = (t.to(exact) for t in (x, grad, scale, shift, mean, rstd))
        if scale.ndim == 1:
            scale, shift = scale[None, :, None, None], shift[None, :, None, None]

        def per_channel(t):  # (B, groups) -> (B, C, 1, 1)
            return t.repeat_interleave(C // groups, 1)[:, :, None, None]

        def block_sums(t):  # (B, h, H/h, w, W/w, C) -> (B, C, h, w)
            return t.sum(4).sum(2).permute(0, 3, 1, 2)

        def group_mean(t):  # over a group's pixels and channels, of scale * t that is given by its sums over blocks
            sums = (scale * t).sum((2, 3)).unflatten(1, (groups, -1)).sum(2)                 # (B, groups)
            return per_channel(sums / (C // groups * H * W))

        mean, rstd = per_channel(mean), per_channel(rstd)
        # x^ = (x - mean) rstd, y = scale x^ + shift = a x + (shift - mean a) with a = rstd scale
        v, a = in_blocks(x, *scale.shape[-2:]), rstd * scale
        y = torch.addcmul(per_block(shift - mean * a), v, per_block(a))
        g = torch.ops.aten.silu_backward(in_blocks(grad, *scale.shape[-2:]), y)
        # dshift = sum g, dscale = sum g x^, over every block of pixels
        dshift = block_sums(g)                                                               # (B, C, h, w)
        dscale = (block_sums(g * v) - mean * dshift) * rstd
        # dx = rstd (scale g - mean(scale g) - x^ mean(scale g x^))
        m, m_xhat = group_mean(dshift), group_mean(dscale)
        slope = -rstd.square() * m_xhat
        constant = -rstd * m - mean * slope
        dx = torch.addcmul(per_block(constant), v, per_block(slope))
        dx = unblock(dx.addcmul_(g, per_block(a)), x.shape)
        dscale, dshift = (t.sum_to_size(scale.shape).reshape(shape) for t in (dscale, dshift))
        return *(t.to(dtype) for t, dtype in zip((dx, dscale, dshift), dtypes)), None, None


# ---------------------------------------------------------------------------------------------------------------------
# Convolutions

def linear(x, layer):
    """A Linear layer over the channels of a map, as a 1x1 convolution: on CPUs oneDNN beats MKL's matmul."""
    return F.conv2d(x, layer.weight.view(*layer.weight.shape, 1, 1), layer.bias)


def plain_linear(x, layer):
    return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def upsample(x, conv):
    """Nearest x2, then a 3x3 convolution layer, as one transposed convolution: 16 weights for 4 pixels, not 36."""
    # The two taps that read the same pixel after enlarging are added up: (w2, w1 + w2, w0 + w1, w0) per axis.
    w = F.pad(conv.weight.flip(2, 3).transpose(0, 1), (1, 1, 1, 1))
    w = w[:, :, :-1] + w[:, :, 1:]
    return F.conv_transpose2d(x, w[..., :-1] + w[..., 1:], conv.bias, stride=2, padding=1)


def plain_upsample(x, conv):
    return conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def space_to_channel(x):
    """pixel_unshuffle by 2: (B, C, H, W) -> (B, 4 C, H/2, W/2)."""
    if eager_cpu(x):
        return F.pixel_unshuffle(x, 2)
    B, C, H, W = x.shape
    x = x.permute(0, 2, 3, 1).reshape(B, H // 2, 2, W // 2, 2, C)
    return x.permute(0, 1, 3, 5, 2, 4).reshape(B, H // 2, W // 2, 4 * C).permute(0, 3, 1, 2)


def convolved_blocks(z, first, second):
    """A latent (B, c, h, w), nearest-enlarged to a map, through the 3x3 convolution `first` and those of `second` that
    read its last channels: BLOCK values an axis and block (B, C, 5h, 5w), for `spread`, whatever the map's size."""
    part = first(F.interpolate(z, scale_factor=BLOCK, mode="nearest"))                       # (B, ., 5h, 5w)
    return F.conv2d(part, second.weight[:, -part.shape[1]:], second.bias, padding=1)


def spread(values, H, W):
    """convolved_blocks (B, C, 5h, 5w) -> the map (B, C, H, W): of the 5 values that a block has along an axis, the
    first two and the last two stand at its ends, the third everywhere between."""
    h, w = values.shape[2:]
    values = values.permute(0, 2, 3, 1)
    values = values.index_select(2, spread_index(W, w, values.device))
    values = values.index_select(1, spread_index(H, h, values.device))
    return values.permute(0, 3, 1, 2)


@kept
def spread_index(pixels, values, device):
    """For each pixel of an axis the number of its value: (pixels,)."""
    side = BLOCK * pixels // values  # of a block
    p = torch.arange(pixels, device=device)
    block, inside = p // side, p % side
    from_end = (inside - side + BLOCK).clamp(min=2)
    return BLOCK * block + torch.where(inside < 2, inside, from_end)


def plain_convolved(z, first, second, H, W):
    """spread(convolved_blocks(z, first, second), H, W)"""
    part = first(F.interpolate(z, size=(H, W), mode="nearest"))
    return F.conv2d(part, second.weight[:, -part.shape[1]:], second.bias, padding=1)


# ---------------------------------------------------------------------------------------------------------------------
# Attention in windows: cost and memory linear in the number of tokens

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
        starts, reach, block, keys = zip(axis_blocks(h, window), axis_blocks(w, window))     # (rows, columns) each
        self.block, self.keys = block, keys
        self.single = len(starts[0]) == len(starts[1]) == 1

        def tokens(first, length):
            """Numbers of the tokens in every block: (blocks, tokens of one)."""
            y, x = (torch.tensor(s, device=device)[:, None] + torch.arange(n, device=device)
                    for s, n in zip(first, length))                                          # (blocks, length) each
            return (y[:, None, :, None] * w + x[None, :, None, :]).flatten(2).flatten(0, 1)

        self.q = tokens(starts, block)
        self.kv = tokens(reach, keys)

        # Along each axis: the block of every position, its place in there; the kind of every block; and where the
        # biases of a kind and a query begin in the padded table.
        home, place, kind, self.rows = [], [], [], []
        for axis, n in enumerate((h, w)):
            first = torch.tensor(starts[axis], device=device)
            position = torch.arange(n, device=device)
            home.append((position // block[axis]).clamp(max=len(first) - 1))                 # (n,)
            place.append(position - first[home[axis]])                                       # (n,)
            distances = [s - k for s, k in zip(starts[axis], reach[axis])]  # of queries from their keys
            kinds = sorted(set(distances))
            kind.append(torch.tensor([kinds.index(d) for d in distances], device=device))    # (blocks,)
            query = torch.arange(block[axis], device=device)
            begin = keys[axis] + r - torch.tensor(kinds, device=device)[:, None] - query
            self.rows.append(begin)                                                          # (kinds, block)
        # Where every token's result stands among the blocks' results.
        home = home[0][:, None] * len(starts[1]) + home[1]                                   # (h, w)
        place = place[0][:, None] * block[1] + place[1]                                      # (h, w)
        self.back = (home * self.q.shape[1] + place).flatten()
        self.kind = (kind[0][:, None] * len(self.rows[1]) + kind[1]).flatten()               # of every block

    def bias(self, tables):
        """tables (..., window, window, heads) -> (..., heads, kinds of blocks, queries, keys); MASKED outside the
        window."""
        (ky, kx), (iy, ix) = self.keys, self.rows
        t = F.pad(tables.flip(-3, -2).movedim(-1, -3), (kx, kx, ky, ky), value=MASKED)       # by key - query
        t = t.unfold(-2, ky, 1).unfold(-2, kx, 1)                                            # (row, column, ky, kx)
        t = t[..., iy[:, None, :, None], ix[None, :, None, :], :, :]                         # (uy, ux, by, bx, ky, kx)
        t = t.clone(memory_format=torch.contiguous_format)  # torch 2.6's compiler believes that it is already
        return t.flatten(-2).flatten(-3, -2).flatten(-4, -3)


@kept
def windows_for(h, w, window, device):
    """Windows of a grid, made once: their indices come from the host."""
    return Windows(h, w, window, device)


def window_attention(q, kv, windows, bias):
    """q (B, N, C), keys and values kv (B, N, 2 C) of the N tokens of a grid, bias windows.bias(table) (heads, ...)
    -> (B, N, C)."""
    heads, bias = len(bias), bias.to(q.dtype)
    if windows.single:
        q = q.unflatten(2, (heads, -1)).transpose(1, 2)                                      # (B, heads, N, d)
        k, v = kv.unflatten(2, (2 * heads, -1)).transpose(1, 2).chunk(2, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.flatten(0, 1)[None])
        return out.transpose(1, 2).flatten(2)
    # A block is a head of its own, so that all images share the biases. Whole rows of tables are copied, where an index
    # of tensors goes through its values one by one on CPUs.
    of_q, of_kv, back = row_numbers(windows, len(q), heads)
    d = q.shape[2] // heads
    q, kv = F.embedding(of_q, q.reshape(-1, d)), F.embedding(of_kv, kv.reshape(-1, d))       # (B, ., ., d)
    k, v = kv.chunk(2, dim=1)
    bias = bias.index_select(1, windows.kind)                                                # (heads, blocks, ., .)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.view(1, -1, *bias.shape[2:]))
    return F.embedding(back, out.transpose(1, 2).reshape(-1, d)).flatten(2)


@functools.partial(kept, most=8)  # they grow with the number of images
def row_numbers(windows, B, heads):
    """Where window_attention's rows of C / heads values stand: of every block's queries in q (B, heads * blocks, .), of
    its keys, then values, in kv (B, 2 heads * blocks, .), and of every token in the result (B, N, heads)."""
    (blocks, queries), N, device = windows.q.shape, len(windows.back), windows.q.device
    image, head = torch.arange(B, device=device)[:, None, None, None], torch.arange(heads, device=device)
    of_q = (image * N + windows.q) * heads + head[:, None, None]                             # (B, heads, blocks, .)
    both = torch.arange(2 * heads, device=device)
    of_kv = (image * N + windows.kv) * 2 * heads + both[:, None, None]
    block, query = (windows.back // queries)[:, None], (windows.back % queries)[:, None]
    back = (image[:, :, 0] * queries + query) * heads * blocks + head * blocks + block       # (B, N, heads)
    return of_q.flatten(1, 2), of_kv.flatten(1, 2), back


def plain_attention(q, kv, table, h, w):
    """Every pair of tokens of an h x w grid, masked. table (window, window, heads): biases by query - key."""
    r = len(table) // 2
    k, v = kv.chunk(2, dim=1)
    y, x = torch.arange(h).repeat_interleave(w), torch.arange(w).repeat(h)
    dy, dx = y[:, None] - y, x[:, None] - x                                                  # (N, N), query - key
    bias = table[dy.clamp(-r, r) + r, dx.clamp(-r, r) + r].permute(2, 0, 1)                  # (heads, N, N)
    bias = bias.masked_fill((dy.abs() > r) | (dx.abs() > r), float("-inf"))
    return (q @ k.mT / q.shape[-1] ** 0.5 + bias).softmax(-1) @ v
