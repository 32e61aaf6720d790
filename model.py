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
import json
import math
import os
import pickle
import re
import struct

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import sampler
from encoder import make_encoder

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
# What reading a damaged file raises, in one library or another.
BROKEN_FILE = (OSError, RuntimeError, ValueError, LookupError, EOFError, TypeError, AttributeError, struct.error,
               pickle.UnpicklingError, SafetensorError)
FORMAT = 2  # of the files that DCSSDAE.save writes; 1 had other names for the dc encoders' first and last convolution



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
    def update(self, count, total, total_sq):
        """count: number of values per channel; total, total_sq: (channels,) sums of z and z**2 over the whole batch,
        float64."""
        mean = total / count
        var = (total_sq / count - mean.square()).clamp(min=0) * count / max(count - 1, 1)
        self.num_batches_tracked += 1
        # A plain average over the first batches, so that the initial 0 and 1 are forgotten at once; then exponential.
        momentum = max(self.momentum, 1.0 / int(self.num_batches_tracked))
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        self.running_var.lerp_(var.to(self.running_var), momentum)


class GroupNorm(nn.Module):
    """32 groups, statistics in float32 whatever the input; returns the input's dtype. (bf16 norms lose digits, and
    crawl on CPUs.)"""

    def __init__(self, channels, affine=True, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x):
        affine = () if self.weight is None else (self.weight.float(), self.bias.float())
        return F.group_norm(x.float(), 32, *affine, eps=self.eps).to(x.dtype)


class AdaGN(nn.Module):
    """Group norm whose scale and shift come from the latent's context map (B, ctx, h, w), nearest-resized to x."""

    def __init__(self, channels, ctx):
        super().__init__()
        self.norm = GroupNorm(channels, affine=False)
        self.proj = nn.Conv2d(ctx, 2 * channels, 1)

    def forward(self, x, ctx):
        scale, shift = F.interpolate(self.proj(ctx), size=x.shape[-2:], mode="nearest").chunk(2, dim=1)
        return self.norm(x) * (1 + scale) + shift


class ResBlock(nn.Module):
    def __init__(self, cin, cout, ctx, temb=None):
        super().__init__()
        self.norm1, self.conv1 = AdaGN(cin, ctx), nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2, self.conv2 = GroupNorm(cout), nn.Conv2d(cout, cout, 3, padding=1)
        self.time = nn.Linear(temb, 2 * cout) if temb else None
        self.shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x, ctx, temb=None):
        h = self.norm2(self.conv1(F.silu(self.norm1(x, ctx))))
        if self.time is not None:
            scale, shift = self.time(F.silu(temb))[:, :, None, None].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        return self.shortcut(x) + self.conv2(F.silu(h))


class WindowAttention(nn.Module):
    """Multi-head attention in which a token sees the tokens at most window // 2 rows and columns away, with a learned
    bias per offset."""

    def __init__(self, dim, heads, window):
        super().__init__()
        self.heads, self.window = heads, window
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.out = nn.Linear(dim, dim)
        self.bias_table = nn.Parameter(torch.zeros(window, window, heads))  # [row offset, column offset, head]

    def bias(self, h, w):
        """(1, heads, h*w, h*w): the bias of every pair of tokens, -inf outside the window. Depends on the table at
        every call."""
        r = self.window // 2
        rows, cols = (torch.arange(n, device=self.bias_table.device) for n in (h, w))
        dy, dx = rows[:, None] - rows[None], cols[:, None] - cols[None]  # (query, key) offsets
        inside = (dy.abs() <= r)[:, None, :, None] & (dx.abs() <= r)[None, :, None, :]  # (h, w, h, w)
        iy, ix = (dy.clamp(-r, r) + r)[:, None, :, None], (dx.clamp(-r, r) + r)[None, :, None, :]
        bias = self.bias_table[iy, ix].masked_fill(~inside[..., None], float("-inf"))
        return bias.reshape(h * w, h * w, self.heads).permute(2, 0, 1)[None]

    def forward(self, x, h, w):
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, d)
                   for p in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias(h, w).to(q.dtype))
        return self.out(out.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    def __init__(self, dim, ctx, heads, window):
        super().__init__()
        self.ada = nn.Linear(ctx, 2 * dim)
        self.attn = WindowAttention(dim, heads, window)
        self.norm = nn.LayerNorm(dim)
        self.mlp_in, self.mlp_out = nn.Linear(dim, 8 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x, ctx, h, w):  # x (B, h*w, dim), ctx (B, h*w, C)
        shift, scale = self.ada(F.silu(ctx)).chunk(2, dim=-1)
        x = x + self.attn(F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift, h, w)
        value, gate = self.mlp_in(self.norm(x)).chunk(2, dim=-1)
        return x + self.mlp_out(value * F.gelu(gate))


def time_embedding(t, dim):
    """Sinusoids of 1000 t, cosines first: t (B,) in [0, 1] -> (B, dim). Vaswani et al. 2017 (arXiv 1706.03762),
    section 3.5."""
    freqs = torch.exp(-math.log(10000.0) * torch.arange(dim // 2, device=t.device, dtype=torch.float32) / (dim // 2))
    angles = 1000.0 * t.float()[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# The decoder

class UViT(nn.Module):
    """SSDD's diffusion decoder: (noisy image, latent, time) -> field of the image's shape.

    size       a key of SIZES
    z_dim      channels of the latent
    time_cond  True for flow matching, False for equilibrium matching
    depth      number of transformer blocks, instead of the size's own
    window     odd; a token attends to window x window tokens around it
    skip       the field is skip * x + network(x, z, t); 0 as published. The field at the noise end is the difference of
               noise and image: with skip = -1 (FM) or lam c(0) (EqM) the network need not carry the noise from its
               input to its output
    joint_input  one input convolution on image and latent together, the latent not normalised: SSDD as published
    """

    def __init__(self, size="S", z_dim=32, time_cond=True, depth=None, window=17, skip=0.0, joint_input=False):
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"unknown decoder size '{size}': expected one of {', '.join(SIZES)}")
        if window < 1 or window % 2 == 0:
            raise ValueError(f"the attention window must be odd and positive, got {window}")
        blocks = SIZES[size][2]
        widths = level_widths(size)
        c, top = widths[0], widths[-1]
        temb = 4 * c if time_cond else None
        self.channels, self.time_cond, self.skip = c, time_cond, skip
        if time_cond:
            self.time = nn.Sequential(nn.Linear(c, temb), nn.SiLU(), nn.Linear(temb, temb))

        if joint_input:
            self.norm_z, self.conv_in_x, self.conv_in_z = nn.Identity(), nn.Identity(), nn.Identity()
        else:
            self.norm_z = LatentNorm(z_dim)
            self.conv_in_x, self.conv_in_z = nn.Conv2d(3, c // 2, 3, padding=1), nn.Conv2d(z_dim, c // 2, 3, padding=1)
        self.conv_in = nn.Conv2d(3 + z_dim if joint_input else c, c, 3, padding=1)
        self.context = nn.Sequential(nn.Conv2d(z_dim, c, 3, padding=1), nn.SiLU(), nn.Conv2d(c, c, 3, padding=1))

        # Down: two residual blocks a level, then a strided convolution. Every output is a skip connection.
        self.down, skips = nn.ModuleList(), [c]
        for i, (cin, cout) in enumerate(zip([c] + widths, widths)):
            level = nn.ModuleList([ResBlock(cin, cout, c, temb), ResBlock(cout, cout, c, temb)])
            skips += [cout, cout]
            if i < 3:
                level.append(nn.Conv2d(cout, cout, 3, stride=2, padding=1))
                skips.append(cout)
            self.down.append(level)

        heads = min(16, max(4, top // 64))
        self.mid_norm = GroupNorm(top, eps=1e-6)
        self.mid_in, self.mid_out = nn.Linear(top, top), nn.Linear(top, top)
        self.blocks = nn.ModuleList(TransformerBlock(top, c, heads, window)
                                    for _ in range(blocks if depth is None else depth))

        # Up: three residual blocks a level, each with one skip connection, then nearest x2 and a convolution.
        self.up, cin = nn.ModuleList(), top
        for i, cout in enumerate(reversed(widths)):
            level = nn.ModuleList()
            for _ in range(3):
                level.append(ResBlock(cin + skips.pop(), cout, c, temb))
                cin = cout
            if i < 3:
                level.append(nn.Conv2d(cout, cout, 3, padding=1))
            self.up.append(level)
        self.norm_out = GroupNorm(c)
        self.conv_out = nn.Conv2d(c, 3, 3, padding=1)

        for m in self.modules():  # residual branches start at zero, so that the network starts as a shallow one
            if isinstance(m, ResBlock):
                nn.init.zeros_(m.conv2.weight), nn.init.zeros_(m.conv2.bias)
            elif isinstance(m, TransformerBlock):
                nn.init.zeros_(m.mlp_out.weight), nn.init.zeros_(m.mlp_out.bias)

    def forward(self, x, z, t=None):
        """x (B, 3, H, W), z (B, z_dim, H/f, W/f), t (B,) in [0, 1] with time_cond -> (B, 3, H, W). ValueError on other
        shapes."""
        return self.forward_with_tokens(x, z, t)[0]

    def forward_with_tokens(self, x, z, t=None):
        """As forward, and the tokens (B, H/8 * W/8, width) after transformer block min(4, depth // 2), which REPA
        aligns."""
        H, W = x.shape[-2:]
        if H % 8 or W % 8 or H % z.shape[-2] or W % z.shape[-1]:
            raise ValueError("the decoder needs image sides that are multiples of 8 and of the latent's, "
                             f"got {H}x{W} and a {z.shape[-2]}x{z.shape[-1]} latent")
        if (t is None) == self.time_cond:
            raise ValueError("this decoder needs t" if self.time_cond else "this decoder has no time: leave t out")
        temb = self.time(time_embedding(t, self.channels).to(x.dtype)) if self.time_cond else None

        z = self.norm_z(z)
        ctx = self.context(z)  # (B, C, h, w)
        h = torch.cat([self.conv_in_x(x), self.conv_in_z(F.interpolate(z, size=(H, W), mode="nearest"))], dim=1)
        h = self.conv_in(h)

        skips = [h]
        for level in self.down:
            for block in level[:2]:
                h = block(h, ctx, temb)
                skips.append(h)
            if len(level) == 3:
                h = level[2](h)
                skips.append(h)

        rows, cols = h.shape[-2:]  # H/8, W/8
        ctx_tokens = F.interpolate(ctx, size=(rows, cols), mode="nearest").flatten(2).mT  # (B, N, C)
        u = self.mid_in(self.mid_norm(h).flatten(2).mT)  # (B, N, width)
        tokens = u
        for i, block in enumerate(self.blocks):
            u = block(u, ctx_tokens, rows, cols)
            if i + 1 == min(4, len(self.blocks) // 2):
                tokens = u
        h = h + self.mid_out(u).mT.unflatten(2, (rows, cols))

        for level in self.up:
            for block in level[:3]:
                h = block(torch.cat([h, skips.pop()], dim=1), ctx, temb)
            if len(level) == 4:
                h = level[3](F.interpolate(h, scale_factor=2, mode="nearest"))
        out = self.conv_out(F.silu(self.norm_out(h)))
        return (out + self.skip * x if self.skip else out), tokens


# ---------------------------------------------------------------------------------------------------------------------
# The autoencoder

class DCSSDAE(nn.Module):
    """Encoder and decoder.

    enc, enc_width, enc_options  encoder.make_encoder's name, width and options
    dec, depth, window           UViT's size, number of transformer blocks and attention window
    loss                         "fm" or "eqm": what the decoder predicts and how it is sampled
    c, a, b, lam                 EqM's c(g) (losses.EqM), which the sampler's step size depends on
    input_skip                   add the noisy image to the network's output (UViT's skip, of the loss's value)
    joint_input                  UViT's, for published SSDD decoders
    latents                      {"mean": [c], "std": [c], ...} per channel, from evaluate.py --z_stats, for normalize
    notes                        anything else worth keeping in the saved file: training size, losses left out, ...
    raises                       ValueError for unknown names
    """

    def __init__(self, enc="dc_f32c32", dec="S", loss="eqm", enc_width=1.0, enc_options=None, depth=None, window=17,
                 c="linear", a=0.8, b=1.4, lam=1.0, input_skip=False, joint_input=False, latents=None, notes=None):
        super().__init__()
        if loss not in ("fm", "eqm"):
            raise ValueError(f"unknown loss '{loss}': expected fm or eqm")
        self.config = {"enc": enc, "dec": dec, "loss": loss, "enc_width": enc_width,
                       "enc_options": dict(enc_options or {}), "depth": depth, "window": window, "c": c, "a": a, "b": b,
                       "lam": lam, "input_skip": input_skip, "joint_input": joint_input, "latents": latents,
                       "notes": dict(notes or {})}
        self.encoder = make_encoder(enc, enc_width, **self.config["enc_options"])
        # times (e - x); lam c(0) for EqM
        self.field_at_noise = -1.0 if loss == "fm" else lam * (b if c == "piecewise" else 1.0)
        self.decoder = UViT(dec, self.encoder.z_dim, loss == "fm", depth, window,
                            skip=self.field_at_noise if input_skip else 0.0, joint_input=joint_input)

    @property
    def downscale(self):
        return self.encoder.downscale

    def encode(self, x):
        """x (B, 3, H, W) in [-1, 1] -> encoder.DiagonalGaussian over (B, c, H/f, W/f). ValueError if f does not divide
        H and W."""
        f = self.downscale
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] % f or x.shape[3] % f:
            raise ValueError(f"{self.config['enc']} encodes (B, 3, H, W) images with sides that are multiples of {f}, "
                             f"got {tuple(x.shape)}")
        return self.encoder(x)

    def decode(self, z, steps=1, noise=None, generator=None, **options):
        """z (B, c, h, w) -> images (B, 3, h*f, w*f), nominally in [-1, 1], not clamped. Arguments as in `sample`."""
        return self.sample(z, steps, noise, generator, **options)[0]

    def sample(self, z, steps=1, noise=None, generator=None, **options):
        """As decode, and the number of network evaluations of every sample: (x, nfe (B,)).

        noise    starting point (B, 3, h*f, w*f); drawn from `generator` where None
        options  FM: t_shift (sampler.euler). EqM: method "gd" or "nesterov", eta, mu, tol (sampler.gradient_descent,
                 sampler.nesterov)
        raises   ValueError for options of the other loss
        """
        cfg, f = self.config, self.downscale
        if noise is None:
            shape = (len(z), 3, z.shape[2] * f, z.shape[3] * f)
            noise = torch.randn(shape, generator=generator, device=generator.device if generator else z.device)
        noise = noise.to(z)
        allowed = {"t_shift"} if cfg["loss"] == "fm" else {"method", "eta", "mu", "tol"}
        if set(options) - allowed:
            raise ValueError(f"a decoder trained with --loss {cfg['loss']} takes the sampler options "
                             f"{', '.join(sorted(allowed))}; "
                             f"got {', '.join(sorted(set(options) - allowed))}")
        if cfg["loss"] == "fm":
            return sampler.euler(self.decoder, noise, z, steps, **options)
        method = options.pop("method", "nesterov" if options.get("mu") else "gd")
        if method not in ("gd", "nesterov"):
            raise ValueError(f"unknown sampling method '{method}': expected gd or nesterov")
        options.setdefault("eta", self.default_eta(steps))
        descend = sampler.gradient_descent if method == "gd" else sampler.nesterov
        return descend(self.decoder, noise, z, steps, lam=cfg["lam"], **options)

    def reconstruct(self, x, steps=1, noise=None, generator=None, **options):
        """x (B, 3, H, W) of any size -> its reconstruction, same size: padded by reflection, in the end cropped."""
        H, W = x.shape[-2:]
        z = self.encode(pad_to_multiple(x, max(8, self.downscale))).mode()
        return self.decode(z, steps, noise, generator, **options)[..., :H, :W]

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
            raise ValueError("this model has no latent statistics: evaluate.py --ckpt F --data D --z_stats stores them")
        return (torch.tensor(self.config["latents"][k]).to(z)[:, None, None] for k in ("mean", "std"))

    def default_eta(self, steps):
        """Step size of EqM sampling. One step: 1 / (lam c(0)), the one-step estimate from pure noise.

        Several: a step of size eta removes the fraction eta lam of the noise that is left (c = linear), so that 1 % is
        left after all.
        """
        return (1.0 if steps == 1 else 1.0 - 0.01 ** (1.0 / steps)) / self.field_at_noise

    # -- files ----------------------------------------------------------------------------------------------------

    def save(self, path):
        """Write weights and configuration to one .safetensors file, through a temporary name: never half a file under
        `path`."""
        state = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        save_file(state, f"{path}.tmp", metadata={"format": str(FORMAT), "config": json.dumps(self.config)})
        os.replace(f"{path}.tmp", path)

    @classmethod
    def load(cls, path, device="cpu"):
        """The model of a file that `save` wrote, or of a published file with encoder and decoder, in evaluation mode.

        A published file's configuration is read off its tensors. FileNotFoundError, ValueError: what is wrong with it.
        """
        state, meta = read_weights(path)
        if "config" in meta:
            if int(meta["format"]) > FORMAT:
                raise ValueError(f"{path} has format {meta['format']}, newer than this code's {FORMAT}: update it")
            model = cls(**json.loads(meta["config"]))
        else:
            config = infer_config(state)
            if "enc" not in config or config.get("dec", "?") == "?":
                raise ValueError(f"{path} has no DC-SSDAE configuration and holds {describe(config)}; a model needs an "
                                 "encoder and a decoder")
            config.pop("z_dim")
            model = cls(**config)
        model._read(state, path, "all", published="config" not in meta)
        return model.to(device).eval()

    def load_published(self, path, part="all"):
        """Read weights into this model: from a file that `save` wrote, or in a published layout (see the README).

        part    "all", "encoder" or "decoder": what to read; the rest of the file is ignored
        The file decides between variants: a dc encoder with or without norms, a decoder with SSDD's joint_input;
        published decoders have no input_skip. A 15 x 15 bias table fits a larger window.
        raises  FileNotFoundError, or ValueError that says what the file holds and what was expected
        """
        if part not in ("all", "encoder", "decoder"):
            raise ValueError(f"unknown part '{part}': expected all, encoder or decoder")
        state, meta = read_weights(path)
        self._read(state, path, part, published="config" not in meta)

    def _read(self, state, path, part, published):
        found, config = infer_config(state), dict(self.config)
        if part != "decoder" and config["enc"].startswith("dc_"):
            config["enc_options"] = found.get("enc_options", config["enc_options"])
        if part != "encoder":
            config["joint_input"] = found.get("joint_input", config["joint_input"])
            config["input_skip"] = config["input_skip"] and not published
        model = self if config == self.config else DCSSDAE(**config).to(next(self.parameters())).train(self.training)
        for k, v in state.items():
            if k.endswith("bias_table") and v.shape[0] < config["window"]:
                pad = (config["window"] - v.shape[0]) // 2  # exp(-1e4) is 0 in every precision: exactly the smaller one
                state[k] = F.pad(v, (0, 0, pad, pad, pad, pad), value=-1e4)
        _load_strictly(model, state, path, part)  # where this raises, nothing has changed
        self.config = config
        self.encoder, self.decoder = ((self if part == other else model).get_submodule(name)
                                      for name, other in (("encoder", "decoder"), ("decoder", "encoder")))


def pad_to_multiple(x, unit):
    """x (..., H, W) enlarged at the bottom and right by reflection to multiples of unit; any H, W >= 1."""
    for dim in (-2, -1):
        n = x.shape[dim]
        i = torch.arange(math.ceil(n / unit) * unit, device=x.device) % max(1, 2 * (n - 1))  # up ...
        x = x.index_select(dim, torch.minimum(i, 2 * (n - 1) - i))  # ... and down again
    return x


def local_file(path):
    """hf://owner/repo/file -> that file in the Hugging Face cache, downloaded if need be; other paths as they are."""
    if not str(path).startswith("hf://"):
        return path
    owner, repo, name = [*str(path)[5:].split("/", 2), "", ""][:3]
    if not name:
        raise ValueError(f"{path} is not of the form hf://owner/repo/file.safetensors")
    try:
        from huggingface_hub import hf_hub_download
        return hf_hub_download(f"{owner}/{repo}", name)
    except Exception as error:  # noqa: BLE001 the hub client raises many classes; all mean: no file
        raise FileNotFoundError(f"could not get {path} ({type(error).__name__}): download {name} from "
                                f"https://huggingface.co/{owner}/{repo} and give its path instead") from None


def read_weights(path):
    """Tensors (our names) and metadata of a .safetensors or torch file, or hf:// address: (dict, dict).

    Code in pickles is never run.

    Strips leading module., _orig_mod. and model., and unwraps {"state_dict": ...}. Raises FileNotFoundError,
    ValueError.
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
            state = state.get("state_dict", state) if isinstance(state, dict) else state
    except pickle.UnpicklingError:
        raise ValueError(f"{path} is refused: it is damaged, "
                         "or holds more than tensors, which is never executed") from None
    except BROKEN_FILE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is not a readable weight file ({reason})") from None
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path} does not hold a flat table of tensors")
    return our_names({re.sub(r"^((module|_orig_mod|model)\.)+", "", k): v for k, v in state.items()}), meta


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
    (r"^encoder\.conv_norm_out\.", "encoder.norm_out."), (r"^(encoder\.out_proj|quant_conv)\.", "encoder.quant."),
)]


def our_names(state):
    """State dict of any known layout -> our names; separate q, k, v and linear layers become our convolutions."""
    out = {}
    for key, value in state.items():
        for pattern, name in RENAMES:
            key = pattern.sub(name, key)
        if value.ndim == 2 and re.match(r"encoder\.(mid\.1|stages\..*\.0)\.(q|k|v|out|to_[qkv]|proj)\.weight$", key):
            value = value[:, :, None, None]
        out[key] = value
    for key in [k for k in out if k.endswith(".to_q.weight")]:
        parts = [out.pop(key.replace("to_q", f"to_{n}"), None) for n in "qkv"]
        if all(p is not None for p in parts):
            out[key.replace("to_q", "qkv")] = torch.cat(parts)
    return out


def infer_config(state):
    """What a state dict (our names) holds, read off names and shapes: DCSSDAE's arguments, and the decoder's z_dim."""
    config, rows = {}, {k: v.shape[0] for k, v in state.items() if v.ndim}
    out, first = rows.get("encoder.conv_out.weight"), rows.get("encoder.conv_in.conv.weight")
    if "encoder.quant.weight" in rows and "encoder.conv_in.weight" in rows:
        levels = len({k.split(".")[2] for k in rows if k.startswith("encoder.down.")})
        config = {"enc": f"vq_f{2 ** (levels - 1)}c{rows['encoder.quant.weight'] // 2}",
                  "enc_width": rows["encoder.conv_in.weight"] / 128}
    elif out and any(k.startswith("encoder.stages.") for k in rows):
        f = 2 ** max(int(k.split(".")[2]) for k in rows if k.startswith("encoder.stages."))
        if any(".qkv." in k for k in rows):
            config = {"enc": f"dcae_f{f}c{out}" + "_sana" * (first is None),
                      "enc_width": first / 64 if first else rows["encoder.conv_in.weight"] / 128}
        elif first:
            norm = any(".norm." in k for k in rows if k.startswith("encoder."))
            config = {"enc": f"dc_f{f}c{out // 2}", "enc_width": first / 64,
                      "enc_options": {} if norm else {"norm": False}}
    widths = [rows.get(f"decoder.down.{i}.0.conv1.weight") for i in range(4)]
    if all(widths) and "decoder.context.0.weight" in state:
        blocks = sum(k.endswith(".attn.bias_table") for k in rows)
        fits = [s for s in SIZES if level_widths(s) == widths]
        config["dec"] = next((s for s in fits if SIZES[s][2] == blocks), (fits + ["?"])[0])
        config["depth"] = None if config["dec"] != "?" and SIZES[config["dec"]][2] == blocks else blocks
        config["loss"] = "fm" if "decoder.time.0.weight" in rows else "eqm"
        config["joint_input"] = "decoder.conv_in_x.weight" not in rows
        config["z_dim"] = state["decoder.context.0.weight"].shape[1]
    return config


def describe(config):
    """infer_config's result as words."""
    words = []
    if "enc" in config:
        norms = "" if config.get("enc_options", {}).get("norm", True) else ", without norms"
        words.append(f"an encoder {config['enc']} (width {config['enc_width']:g}{norms})")
    if "dec" in config:
        depth = "" if config["depth"] is None else f", {config['depth']} blocks"
        latents = f"latents of {config['z_dim']} channels"
        words.append(f"a decoder of size {config['dec']} ({config['loss']}{depth}, {latents})")
    return " and ".join(words) or "no encoder or decoder in a known layout"


def _load_strictly(model, state, path, part="all"):
    """load_state_dict of a part; where names or shapes differ, one sentence: what the file holds, what was expected."""
    own = {k: v for k, v in model.state_dict().items() if part == "all" or k.startswith(part + ".")}
    state = {k: v for k, v in state.items() if part == "all" or k.startswith(part + ".")}
    missing, extra = [k for k in own if k not in state], [k for k in state if k not in own]
    shapes = [f"{k} is {tuple(state[k].shape)}, expected {tuple(own[k].shape)}"
              for k in own if k in state and state[k].shape != own[k].shape]
    if missing or extra or shapes:
        kinds = (("tensors missing", missing), ("unknown", extra), ("of another shape", shapes))
        found = [f"{len(names)} {kind} (first: {names[0]})" for kind, names in kinds if names]
        raise ValueError(f"{path} does not fit this model: it holds {describe(infer_config(state))}, expected was "
                         f"{describe(infer_config(own))}; {'; '.join(found)}")
    model.load_state_dict(state, strict=part == "all")
