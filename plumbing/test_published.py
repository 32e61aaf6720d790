"""Weights as other people publish them: their names, sizes and values, and files that do not fit.

    python -m pytest plumbing
"""
import functools
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import evaluate
import train
from encoder import make_encoder
from model import DCSSDAE, SIZES, UViT
from plumbing import published
from test_all import TINY, command, demo_batch, randomise, relative_error, sentence
from tools import bench

# ---------------------------------------------------------------------------------------------------------------------
# Encoders of other people
# Sizes and values of the published layouts, against diffusers with random weights.

def to_latent_diffusion(state, quant):
    """diffusers' AutoencoderKL encoder -> the names of latent-diffusion, with `quant` for its last convolution."""
    names = (("quant_conv", quant), ("down_blocks.", "down."), (".resnets.", ".block."),
             (".downsamplers.0.", ".downsample."), ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"),
             ("mid_block.block.0", "mid.block_1"), ("mid_block.block.1", "mid.block_2"),
             ("mid_block.attentions.0", "mid.attn_1"), (".attentions.", ".attn."),
             ("group_norm", "norm"), ("to_out.0", "proj_out"), (".to_", "."))
    out = {}
    for key, value in state.items():
        if key.startswith(("encoder.", "quant_conv.")):
            for old, new in names:
                key = key.replace(old, new)
            out[key] = value[:, :, None, None] if ".attn" in key and value.ndim == 2 else value
    return out


def same_posterior(ours, theirs):
    assert relative_error(ours.mean, theirs.mean) < 1e-5 and relative_error(ours.logvar, theirs.logvar) < 1e-5


@pytest.mark.parametrize("layout", ["diffusers", "older diffusers", "latent-diffusion"])
def test_vq_encoder_against_diffusers(tmp_path, layout):
    diffusers = pytest.importorskip("diffusers")
    vae = randomise(diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
        block_out_channels=(32, 64, 128, 128), latent_channels=4)).eval()
    state = vae.state_dict()
    if layout == "older diffusers":  # as sd-vae-ft-mse is stored
        for old, new in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            state = {k.replace(old, new): v for k, v in state.items()}
    elif layout == "latent-diffusion":  # and the published DC-SSDAE encoders
        state = to_latent_diffusion(state, "encoder.out_proj")
    torch.save(state, tmp_path / "vq.pt")
    ours = DCSSDAE("vq_f8c4", "XS", enc_width=0.25, depth=1)
    ours.load_published(tmp_path / "vq.pt", part="encoder")
    x = torch.rand(2, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        posterior, expected = ours.encode(x), vae.encode(x).latent_dist
    assert relative_error(posterior.mean, expected.mean) < 1e-5
    assert relative_error(posterior.logvar, expected.logvar) < 1e-5


@pytest.mark.parametrize("layout", ["diffusers", "repository"])
def test_flux_encoders_against_diffusers(tmp_path, layout):
    """FLUX's, which has no quant_conv, and FLUX.2's: as its encoder gives them (f8) and as its transformer has them."""
    diffusers = pytest.importorskip("diffusers")
    shape = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
             "block_out_channels": (32, 64, 128, 128), "layers_per_block": 2}
    flux = randomise(diffusers.AutoencoderKL(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False,
                                             **shape)).eval()
    flux2 = randomise(diffusers.AutoencoderKLFlux2(latent_channels=32, **shape)).eval()
    files = {"flux": flux.state_dict(), "flux2": flux2.state_dict()}
    if layout == "repository":
        statistics = {key: value for key, value in files["flux2"].items() if key.startswith("bn.")}
        assert len(statistics) == 3
        files = {name: to_latent_diffusion(state, "encoder.quant_conv") for name, state in files.items()}
        files["flux2"] |= statistics
    for name, state in files.items():
        save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / f"{name}.safetensors")
    x = torch.rand(2, 3, 64, 96) * 2 - 1
    for name, vae, enc in (("flux", flux, "vq_f8c16"), ("flux2", flux2, "vq_f8c32")):
        ours = DCSSDAE(enc, "XS", enc_width=0.25, depth=1)
        ours.load_published(tmp_path / f"{name}.safetensors", part="encoder")
        with torch.no_grad():
            same_posterior(ours.encode(x), vae.encode(x).latent_dist)

    ours = DCSSDAE("vq_f16c128", "XS", enc_width=0.25, depth=1)
    ours.load_published(tmp_path / "flux2.safetensors", part="encoder")
    ours.save(tmp_path / "ours.safetensors")
    before = {key: value.clone() for key, value in ours.encoder.named_buffers()}
    with torch.no_grad():
        posterior, z = ours.train().encode(x), flux2.encode(x).latent_dist.mode()  # (2, 32, 8, 12)
        cells = z.view(2, 32, 4, 2, 6, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 128, 4, 6)  # as its pipeline does
        expected = flux2.bn(cells)
        assert relative_error(posterior.mode(), expected) < 1e-5
        assert all(torch.equal(value, before[key]) for key, value in ours.encoder.named_buffers())
        # A draw of the folded posterior is the folded draw: mean and deviation are scaled alike.
        plain = DCSSDAE("vq_f8c32", "XS", enc_width=0.25, depth=1)
        plain.load_published(tmp_path / "flux2.safetensors", part="encoder")
        eps = torch.randn_like(z)
        draw = flux2.bn(F.pixel_unshuffle(plain.encode(x).sample(eps), 2))
        assert relative_error(posterior.sample(F.pixel_unshuffle(eps, 2)), draw) < 1e-5
        assert torch.equal(DCSSDAE.load(tmp_path / "ours.safetensors").encode(x).mean, posterior.mean)
    with pytest.raises(ValueError, match=r"vq_f16c128 \(width 0.25, folded\), expected was an encoder vq_f16c16"):
        DCSSDAE("vq_f16c16", "XS", enc_width=0.25, depth=1).load_published(tmp_path / "flux2.safetensors", "encoder")


@pytest.mark.parametrize("layout", ["diffusers", "latent-diffusion"])
def test_va_vae_encoder_against_diffusers(tmp_path, layout):
    """latent-diffusion's kl-f16, which VA-VAE and MAR have: narrower levels, attention in the last one."""
    diffusers = pytest.importorskip("diffusers")
    vae = randomise(diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4, layers_per_block=2,
        block_out_channels=(32, 32, 64, 64, 128), latent_channels=32)).eval()
    state = vae.state_dict()
    if layout == "latent-diffusion":  # with what else VA-VAE's file holds
        state = to_latent_diffusion(state, "quant_conv") | {
            "foundation_model.model.patch_embed.proj.weight": torch.zeros(1), "loss.logvar": torch.zeros(()),
            "linear_proj.weight": torch.zeros(1), "decoder.conv_in.weight": torch.zeros(1)}
    torch.save({"state_dict": state}, tmp_path / "vavae.pt")
    ours = DCSSDAE("vq_f16c32", "XS", enc_width=0.25, depth=1)
    ours.load_published(tmp_path / "vavae.pt", part="encoder")
    assert ours.config["enc_options"] == {"kl_f16": True}
    ours.save(tmp_path / "ours.safetensors")
    x = torch.rand(2, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        same_posterior(ours.encode(x), vae.encode(x).latent_dist)
        assert torch.equal(DCSSDAE.load(tmp_path / "ours.safetensors").encode(x).mean, ours.encode(x).mean)
    with pytest.raises(ValueError, match=r"vq_f16c32 \(width 0.25, kl-f16\), expected was an encoder vq_f8c4"):
        DCSSDAE("vq_f8c4", "XS", enc_width=0.25, depth=1).load_published(tmp_path / "vavae.pt", "encoder")


@pytest.mark.parametrize("name", ["dc_f8c4", "dc_f32c32", "dc_f64c128"])
def test_dc_encoder_against_diffusers(tmp_path, name):
    dc = pytest.importorskip("diffusers.models.autoencoders.autoencoder_dc")
    ours = randomise(DCSSDAE(name, "XS", enc_width=0.125, depth=1))
    levels, z_dim = int(math.log2(ours.downscale)) + 1, ours.encoder.z_dim
    widths = tuple(w // 8 for w in (128, 256, 512, 512, 1024, 1024, 1024, 1024)[:levels])
    theirs = dc.Encoder(3, 2 * z_dim, 32, "ResBlock", widths, (0, 5, 10, 4, 4, 4, 4, 4)[:levels], ((),) * levels,
                        "pixel_unshuffle", out_shortcut=False).eval()
    state = {}
    for key, value in ours.encoder.state_dict().items():
        state[key.replace("stages.", "down_blocks.")] = value
    theirs.load_state_dict(state)
    x = torch.rand(1, 3, 64, 128) * 2 - 1
    with torch.no_grad():
        posterior, expected = ours.encode(x), theirs(x)
    assert relative_error(posterior.mean, expected[:, :z_dim]) < 1e-5
    assert relative_error(posterior.logvar, expected[:, z_dim:].clamp(-30, 20)) < 1e-5


DCAE = {  # name: stage widths (full size), depths, EfficientViT's token scales, downsampling
    "dcae_f32c32": ((128, 256, 512, 512, 1024, 1024), (0, 4, 8, 2, 2, 2), (), "pixel_unshuffle"),
    "dcae_f64c128": ((128, 256, 512, 512, 1024, 1024, 2048), (0, 4, 8, 2, 2, 2, 2), (), "pixel_unshuffle"),
    "dcae_f128c512": ((128, 256, 512, 512, 1024, 1024, 2048, 2048), (0, 4, 8, 2, 2, 2, 2, 2), (), "pixel_unshuffle"),
    "dcae_f32c32_sana": ((128, 256, 512, 512, 1024, 1024), (2, 2, 2, 3, 3, 3), (5,), "conv"),
}


def to_dc_ae_repository(state):
    """diffusers' AutoencoderDC encoder -> the names of the original repository, as its published files have them."""
    out = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "conv_in":
            name = "project_in.conv." + ".".join(parts[1:])
        elif parts[0] == "conv_out":
            name = "project_out.main.op_list.0.conv." + parts[1]
        else:
            stage, block, *rest = parts[1:]
            rest = ".".join(rest)
            if rest.startswith(("attn.to_q.", "attn.to_k.", "attn.to_v.")):
                if "to_q" in rest:
                    qkv = torch.cat([state[key.replace("to_q", f"to_{n}")] for n in "qkv"])
                    out[f"stages.{stage}.op_list.{block}.context_module.main.qkv.conv.weight"] = qkv[:, :, None, None]
                continue
            for old, new in (("attn.to_out.", "context_module.main.proj.conv."),
                             ("attn.norm_out.", "context_module.main.proj.norm."),
                             ("attn.to_qkv_multiscale.0.proj_in.", "context_module.main.aggreg.0.0."),
                             ("attn.to_qkv_multiscale.0.proj_out.", "context_module.main.aggreg.0.1."),
                             ("conv_out.conv_inverted.", "local_module.main.inverted_conv.conv."),
                             ("conv_out.conv_depth.", "local_module.main.depth_conv.conv."),
                             ("conv_out.conv_point.", "local_module.main.point_conv.conv."),
                             ("conv_out.norm.", "local_module.main.point_conv.norm."), ("conv1.", "main.conv1.conv."),
                             ("conv2.", "main.conv2.conv."), ("norm.", "main.conv2.norm."),
                             ("conv.", "main.conv.conv.")):
                if rest.startswith(old):
                    rest = new + rest.removeprefix(old)
                    break
            name = f"stages.{stage}.op_list.{block}.{rest}"
            value = value[:, :, None, None] if value.ndim == 2 and ".proj.conv." in name else value
        out[name] = value
    return out


def diffusers_dc_ae_encoder(name, width, z_dim):
    dc = pytest.importorskip("diffusers.models.autoencoders.autoencoder_dc")
    widths, depths, scales, down = DCAE[name]
    stages = len(widths)
    return dc.Encoder(
        3, z_dim, 32, ("ResBlock",) * 3 + ("EfficientViTBlock",) * (stages - 3), tuple(int(w * width) for w in widths),
        depths, ((),) * 3 + (scales,) * (stages - 3), down)


def published_dc_ae_layouts(name, state):
    """{who publishes it: an encoder's weights in his names} of diffusers' state dict."""
    repository = to_dc_ae_repository(state)
    if name.endswith("sana"):  # its strided convolutions are plain layers in the repository
        repository = {k.replace(".main.conv.conv.", ".main.conv."): v for k, v in repository.items()}
    layouts = {"diffusers": state, "repository": repository}
    return {layout: {f"encoder.{k}": v for k, v in tensors.items()} for layout, tensors in layouts.items()}


@pytest.mark.parametrize("name", DCAE)
def test_official_dc_ae_encoders_have_the_published_names_and_shapes(name):
    """At full size, without values: up to 300 million parameters."""
    with torch.device("meta"):
        ours = make_encoder(name)
        theirs = diffusers_dc_ae_encoder(name, 1.0, ours.z_dim)
    want = {f"encoder.{k}": v.shape for k, v in ours.state_dict().items()}
    for layout, tensors in published_dc_ae_layouts(name, theirs.state_dict()).items():
        assert {k: v.shape for k, v in published.our_names(tensors).items()} == want, layout


@pytest.mark.parametrize("name", DCAE)
def test_official_dc_ae_encoders_against_diffusers(tmp_path, name):
    """An eighth as wide: both published layouts, one square, one not, float32; and bf16 to its accuracy."""
    # no fewer channels than latent channels
    narrow = "dcae_f128c64" if name == "dcae_f128c512" else name
    ours = DCSSDAE(narrow, "XS", enc_width=0.125, depth=1).eval()
    theirs = randomise(diffusers_dc_ae_encoder(name, 0.125, ours.encoder.z_dim)).eval()
    side = max(64, ours.downscale)
    layouts = published_dc_ae_layouts(name, theirs.state_dict()).items()
    for (layout, tensors), shape in zip(layouts, ((1, 3, side, 2 * side), (2, 3, side, side)), strict=True):
        torch.save(tensors | {"decoder.conv_in.weight": torch.zeros(1)}, tmp_path / f"{layout}.pt")
        ours.load_published(tmp_path / f"{layout}.pt", part="encoder")
        x = torch.rand(shape) * 2 - 1
        with torch.no_grad():
            expected, posterior = theirs(x), ours.encode(x)
        assert relative_error(posterior.mean, expected) < 1e-4
        assert torch.allclose(posterior.sample(), posterior.mean, atol=1e-5)  # deterministic
    x, expected = x[:1], expected[:1]
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert relative_error(ours.encode(x).mean, expected) < 0.05
        assert relative_error(ours.encoder.bfloat16()(x.bfloat16()).mean, expected) < 0.05


# ---------------------------------------------------------------------------------------------------------------------
# Decoders of other people
# The published names and values: a plain decoder, one functional call after another, in float64.

PUBLISHED = [(re.compile(pattern), name) for pattern, name in (  # our names of a decoder -> DC-SSDAE's
    (r"^time\.0\.", "time_embedding.linear_1."), (r"^time\.2\.", "time_embedding.linear_2."),
    (r"^conv_in_x\.", "conv_in_img."), (r"^norm_z\.", "batch_norm_z."), (r"^context\.", "ada_ctx_proj."),
    (r"^norm_out\.", "conv_norm_out."), (r"^mid_(in|out)\.", r"mid_block.proj_\1."), (r"^mid_norm", "mid_block.norm"),
    (r"^down\.(\d)\.2\.", r"down_blocks.\1.downsamplers.0.conv."),
    (r"^up\.(\d)\.3\.", r"up_blocks.\1.upsamplers.0.conv."), (r"^(down|up)\.(\d)\.", r"\1_blocks.\2.resnets."),
    (r"\.norm1\.proj\.", ".norm1.ctx_proj."), (r"\.shortcut\.", ".conv_shortcut."),
    (r"(resnets\.\d)\.time\.", r"\1.time_emb_proj."), (r"^blocks\.", "mid_block.transformer_blocks."),
    (r"\.norm\.(?=weight$|bias$)(?<=\d\.norm\.)", ".norm2."), (r"\.ada\.", ".norm1.linear."),
    (r"\.attn\.([qkv])\.", r".attn1.to_\1."), (r"\.attn\.out\.", ".attn1.out_proj."),
    (r"\.attn\.bias_table", ".relative_position_bias.relative_bias_table"),
    (r"\.mlp_in\.", ".ff.proj_in_act.proj."), (r"\.mlp_out\.", ".ff.proj_out."))]


def published_decoder(**options):
    """A random state dict in the published names (without the prefix decoder.)."""
    state = {}
    for name, value in randomise(UViT("XS", depth=2, window=15, **options)).state_dict().items():
        for pattern, published_name in PUBLISHED:
            name = pattern.sub(published_name, name)
        state[name] = value
    return state


def reference_decoder(p, x, z, t=None, window=15):
    """The decoder of design and paper, written down naively."""
    p = {k: v.double() for k, v in p.items()}
    x, z = x.double(), z.double()

    def conv(name, h, stride=1):
        w = p[f"{name}.weight"]
        return F.conv2d(h, w, p[f"{name}.bias"], stride=stride, padding=w.shape[-1] // 2)

    def linear(name, h):
        return h @ p[f"{name}.weight"].T + (p.get(f"{name}.bias", 0))

    def resize(h, like):  # nearest
        return h.repeat_interleave(like.shape[2] // h.shape[2], 2).repeat_interleave(like.shape[3] // h.shape[3], 3)

    def resnet(name, h, ctx, temb):
        scale, shift = resize(conv(f"{name}.norm1.ctx_proj", ctx), h).chunk(2, 1)
        u = F.silu(F.group_norm(h, 32) * (1 + scale) + shift)
        u = conv(f"{name}.conv1", u)
        u = F.group_norm(u, 32, p[f"{name}.norm2.weight"], p[f"{name}.norm2.bias"])
        if temb is not None:
            scale, shift = linear(f"{name}.time_emb_proj", F.silu(temb))[:, :, None, None].chunk(2, 1)
            u = u * (1 + scale) + shift
        u = conv(f"{name}.conv2", F.silu(u))
        return u + (conv(f"{name}.conv_shortcut", h) if f"{name}.conv_shortcut.weight" in p else h)

    def attention(name, bias_name, u, rows, cols):
        table = p[bias_name]
        heads, r = table.shape[2], window // 2
        q, k, v = (linear(f"{name}.to_{n}", u).unflatten(-1, (heads, -1)) for n in "qkv")  # (B, N, heads, d)
        out = torch.zeros_like(q)
        for i in range(rows * cols):  # one query at a time
            near = [(j, table[i // cols - j // cols + r, i % cols - j % cols + r]) for j in range(rows * cols)
                    if abs(i // cols - j // cols) <= r and abs(i % cols - j % cols) <= r]
            index, bias = [j for j, _ in near], torch.stack([b for _, b in near])  # bias (n, heads)
            weight = ((q[:, i:i + 1] * k[:, index]).sum(-1) / q.shape[-1] ** 0.5 + bias).softmax(dim=1)
            out[:, i] = (weight[..., None] * v[:, index]).sum(1)
        return linear(f"{name}.out_proj", out.flatten(2))

    joint = "conv_in_img.weight" not in p  # as SSDD has published
    if not joint:
        mean, var = (p[f"batch_norm_z.running_{name}"][:, None, None] for name in ("mean", "var"))
        z = (z - mean) / (var + 1e-5).sqrt()
        z = z * p["batch_norm_z.weight"][:, None, None] + p["batch_norm_z.bias"][:, None, None]
    ctx = conv("ada_ctx_proj.2", F.silu(conv("ada_ctx_proj.0", z)))
    temb = None
    if t is not None:
        half = p["conv_in.weight"].shape[0] // 2  # C / 2
        angle = 1000 * t.double()[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
        temb = linear("time_embedding.linear_1", torch.cat([angle.cos(), angle.sin()], 1))
        temb = linear("time_embedding.linear_2", F.silu(temb))
    h = [x, resize(z, x)] if joint else [conv("conv_in_img", x), conv("conv_in_z", resize(z, x))]
    h = conv("conv_in", torch.cat(h, 1))
    skips = [h]
    for i in range(4):
        for j in range(2):
            h = resnet(f"down_blocks.{i}.resnets.{j}", h, ctx, temb)
            skips.append(h)
        if i < 3:
            h = conv(f"down_blocks.{i}.downsamplers.0.conv", h, stride=2)
            skips.append(h)
    rows, cols = h.shape[2:]
    tokens_ctx = resize(ctx, h).flatten(2).mT
    u = F.group_norm(h, 32, p["mid_block.norm.weight"], p["mid_block.norm.bias"], eps=1e-6)
    u = linear("mid_block.proj_in", u.flatten(2).mT)
    for k in range(sum(name.endswith("bias_table") for name in p)):
        b = f"mid_block.transformer_blocks.{k}"
        shift, scale = linear(f"{b}.norm1.linear", F.silu(tokens_ctx)).chunk(2, -1)
        bias = f"{b}.relative_position_bias.relative_bias_table"
        u = u + attention(f"{b}.attn1", bias, F.layer_norm(u, u.shape[-1:]) * (1 + scale) + shift, rows, cols)
        n = F.layer_norm(u, u.shape[-1:], p[f"{b}.norm2.weight"], p[f"{b}.norm2.bias"])
        value, gate = linear(f"{b}.ff.proj_in_act.proj", n).chunk(2, -1)
        u = u + linear(f"{b}.ff.proj_out", value * F.gelu(gate))
    h = h + linear("mid_block.proj_out", u).mT.unflatten(2, (rows, cols))
    for i in range(4):
        for j in range(3):
            h = resnet(f"up_blocks.{i}.resnets.{j}", torch.cat([h, skips.pop()], 1), ctx, temb)
        if i < 3:
            h = conv(f"up_blocks.{i}.upsamplers.0.conv", h.repeat_interleave(2, 2).repeat_interleave(2, 3))
    return conv("conv_out", F.silu(F.group_norm(h, 32, p["conv_norm_out.weight"], p["conv_norm_out.bias"])))


@pytest.mark.parametrize("loss", ["fm", "eqm"])
@pytest.mark.parametrize("enc,size", [("vq_f8c4", (64, 32)), ("dc_f32c8", (32, 160))])
def test_published_decoder_loads_and_equals_the_reference(tmp_path, loss, enc, size):
    """Published names, a 15 x 15 table in a 17 x 17 window, square and not, grids smaller and larger than the
    window."""
    z_dim, f = make_encoder(enc, 0.25).z_dim, make_encoder(enc, 0.25).downscale
    state = published_decoder(z_dim=z_dim, time_cond=loss == "fm")
    torch.save({"state_dict": {f"module.decoder.{k}": v for k, v in state.items()}}, tmp_path / "published.pt")
    model = DCSSDAE(enc, "XS", loss, enc_width=0.25, depth=2, input_skip=True).eval()
    model.load_published(tmp_path / "published.pt", part="decoder")
    assert not model.config["input_skip"]  # published decoders have none
    torch.manual_seed(0)
    x, z = torch.randn(2, 3, *size), torch.randn(2, z_dim, size[0] // f, size[1] // f)
    t = torch.rand(2) if loss == "fm" else None
    with torch.no_grad():
        assert relative_error(model.decoder(x, z, t), reference_decoder(state, x, z, t)) < 1e-5


def test_ssdd_decoder_loads_and_equals_the_reference(tmp_path):
    """One input convolution on image and latent, no normalisation of the latent: the same class, chosen by the file."""
    state = published_decoder(z_dim=4, joint_input=True)
    torch.save({f"module.decoder.{k}": v for k, v in state.items()}, tmp_path / "ssdd.pt")
    model = DCSSDAE("vq_f8c4", "XS", "fm", enc_width=0.25, depth=2, input_skip=True).eval()
    encoder = model.encoder
    model.load_published(tmp_path / "ssdd.pt", part="decoder")
    assert model.encoder is encoder and model.config["joint_input"] and not model.config["input_skip"]
    x, z, t = torch.randn(2, 3, 32, 48), torch.randn(2, 4, 4, 6), torch.rand(2)
    with torch.no_grad():
        assert relative_error(model.decoder(x, z, t), reference_decoder(state, x, z, t)) < 1e-5
    model.save(tmp_path / "m.safetensors")
    assert torch.equal(DCSSDAE.load(tmp_path / "m.safetensors").decoder(x, z, t), model.decoder(x, z, t))


MILLIONS = {"XS": (5.00, 4.61), "S": (14.09, 12.78), "B": (21.18, 19.61), "M": (50.36, 46.85), "L": (90.84, 86.59),
            "XL": (161.42, 153.86), "H": (363.01, 346.03)}


@pytest.mark.parametrize("size", SIZES)
def test_decoder_parameter_counts(size):
    """The published counts have 15 x 15 tables; ours of 17 x 17 hold 64 more entries a head and block."""
    for time_cond, expected in zip((True, False), MILLIONS[size]):
        with torch.device("meta"):
            decoder = UViT(size, z_dim=4, time_cond=time_cond)
        extra = sum(64 * block.attn.heads for block in decoder.blocks)
        assert (sum(p.numel() for p in decoder.parameters()) - extra) / 1e6 == pytest.approx(expected, abs=0.0051)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# What is known of a file without configuration, and what is said of one that does not fit.

def test_a_vq_encoder_without_quant_conv_under_prefixes(tmp_path):
    model = randomise(DCSSDAE("vq_f8c16", "XS", enc_width=0.25, depth=1, enc_options={"quant": False})).eval()
    x = torch.rand(1, 3, 32, 32)
    for prefix in ("first_stage_model.", "vae."):
        state = {f"{prefix}{k}": v for k, v in model.state_dict().items() if k.startswith("encoder.")}
        torch.save({"state_dict": {"model": state}}, tmp_path / "vae.pt")
        other = DCSSDAE("vq_f8c16", "XS", enc_width=0.25, depth=1)
        other.load_published(tmp_path / "vae.pt", part="encoder")
        assert torch.equal(other.encode(x).mean, model.encode(x).mean)


def test_a_whole_published_file_needs_no_configuration(tmp_path):
    model = randomise(DCSSDAE("dc_f16c8", "XS", "fm", enc_width=0.125, enc_options={"norm": False})).eval()
    torch.save(model.state_dict(), tmp_path / "published.pt")  # names as ours: as good a layout as any
    loaded = DCSSDAE.load(tmp_path / "published.pt")
    assert {k: loaded.config[k] for k in ("enc", "enc_width", "dec", "loss", "depth")} == {
        "enc": "dc_f16c8", "enc_width": 0.125, "dec": "XS", "loss": "fm", "depth": None}
    x, noise = torch.rand(1, 3, 32, 32), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(*(m.decode(m.encode(x).mode(), 2, noise) for m in (loaded, model)))


def test_our_names_stay_as_they_are():
    for enc in ("vq_f8c4", "dc_f32c32", "dcae_f64c128", "dcae_f32c32_sana"):
        for loss in ("fm", "eqm"):
            with torch.device("meta"):
                state = DCSSDAE(enc, "XS", loss).state_dict()
            assert list(published.our_names(state)) == list(state)


def test_refusals_name_what_the_file_holds(tmp_path):
    with torch.device("meta"):
        files = {"m": DCSSDAE("vq_f8c4", "M", "fm", enc_width=0.25),
                 "dc": DCSSDAE("dc_f32c32", "XS", "eqm", enc_width=0.25)}
    for name, model in files.items():
        state = {k: torch.zeros((), dtype=v.dtype).expand(v.shape) for k, v in model.state_dict().items()}
        torch.save(state, tmp_path / f"{name}.pt")
    model = DCSSDAE("vq_f8c4", "XS", "fm", enc_width=0.25)
    for part, file, words in (("decoder", "m", "holds.* a decoder of size M .*expected was a decoder of size XS"),
                              ("decoder", "dc", r"\(eqm, latents of 32 channels\).*\(fm, latents of 4 channels\)"),
                              ("encoder", "dc", r"an encoder dc_f32c32 \(width 0.25\), expected was an encoder vq_")):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(ValueError, match=words):
            model.load_published(tmp_path / f"{file}.pt", part=part)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # nothing has changed


def test_files_that_do_not_fit(tmp_path, smallest):
    model = DCSSDAE("dc_f16c4", "XS", "eqm", enc_width=0.0625, depth=1)
    config = model.config | {"without": [], "source": 0.0}  # entries of older files of this format
    for name, metadata in (("m", {"format": "5", "config": json.dumps(config)}),
                           ("old", {"format": "4", "config": json.dumps(config)}),
                           ("odd", {"format": "5", "config": json.dumps(config | {"dec": "XXL"})}),
                           ("source", {"format": "5", "config": json.dumps(config | {"source": 0.5})}),
                           ("new", {"format": "5", "config": json.dumps(config | {"flavour": 1})})):
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors", metadata=metadata)
    torch.save({"w": torch.zeros(1)}, tmp_path / "other.pt")
    torch.save({"model": model.state_dict(), "ema": model.state_dict(), "step": 3}, tmp_path / "latest.pt")
    torch.save({"step": 3}, tmp_path / "none.pt")
    assert DCSSDAE.load(tmp_path / "m.safetensors").config == model.config
    for name, words in (("old.safetensors", "file format 4; this code reads format 5"),
                        ("odd.safetensors", "no model that can be built: unknown decoder size 'XXL'"),
                        ("source.safetensors", "no model that can be built: .*source"),
                        ("new.safetensors", "no model that can be built: .*flavour"),
                        ("other.pt", "no DC-SSDAE configuration and holds no encoder"),
                        ("latest.pt", r"several tables of tensors \(model, ema\), as a checkpoint of training"),
                        ("none.pt", "not hold a flat table")):
        with pytest.raises(ValueError, match=words) as stop:
            DCSSDAE.load(tmp_path / name)
        assert name in str(stop.value) and "\n" not in str(stop.value)
    for enc, loss, words in (("dc_f16c8", "eqm", "does not fit this model.*of another shape"),
                             ("dc_f16c4", "fm", "missing.*time")):
        with pytest.raises(ValueError, match=words):
            DCSSDAE(enc, "XS", loss, enc_width=0.0625, depth=1).load_published(tmp_path / "m.safetensors")


def test_a_saved_model_is_finite_and_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    model, calls = DCSSDAE("dc_f16c4", "XS", "eqm", enc_width=0.0625, depth=1), []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: calls.append("fsync") or fsync(number))
    monkeypatch.setattr(os, "replace", lambda *names: calls.append("replace") or replace(*names))
    model.save(tmp_path / "m.safetensors")
    assert calls == ["fsync", "replace"]
    before = (tmp_path / "m.safetensors").read_bytes()
    model.decoder.conv_in.weight.data[0] = math.nan
    with pytest.raises(ValueError, match="1 of its tensors hold values that are not finite"):
        model.save(tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").read_bytes() == before and os.listdir(tmp_path) == ["m.safetensors"]


# ---------------------------------------------------------------------------------------------------------------------
# Networks of other people in our programs

def test_a_vision_transformer_as_encoder(tmp_path, offline, smallest, monkeypatch):
    """DINOv2's tokens, normalised, on their grid; trained with its decoder alone; rebuilt from our file without timm's.
    """
    timm = pytest.importorskip("timm")
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, depth=2))
    name = "vit_small_patch14_dinov2.lvd142m"
    reference = timm.create_model(name, num_classes=0, dynamic_img_size=True).eval()
    randomise(reference)
    torch.save(reference.state_dict(), tmp_path / "vit.pth")
    monkeypatch.setattr(train, "FIT_CELLS", 1)
    common = [*TINY, "--enc", f"timm_{name}", "--size", 32, "--decay", 0, "--out"]
    command(train, *common, tmp_path / "run", "--enc_ckpt", tmp_path / "vit.pth", "--steps", 2)
    assert "--enc_ckpt" in sentence(train, *common, tmp_path / "n")  # timm's own weights cannot be had
    assert "does not hold the weights" in sentence(train, *common, tmp_path / "n", "--enc_ckpt",
                                                   tmp_path / "run" / "model.safetensors")
    model = DCSSDAE.load(tmp_path / "run" / "model.safetensors")
    assert (model.downscale, model.encoder.z_dim, model.config["enc"]) == (16, 384, f"timm_{name}")

    x = demo_batch(2, 64)[..., :48]
    mean, std = (torch.tensor(reference.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    reference.norm = nn.Identity()
    with torch.no_grad():
        small = F.interpolate((x + 1) / 2, size=(56, 42), mode="bicubic", antialias=True)  # 14 pixels a cell of 16
        tokens = reference.forward_features((small - mean) / std)[:, 1:]                  # (2, 4 * 3, 384)
        z = model.encode(x).mode()
    wanted = F.layer_norm(tokens, (384,), eps=1e-6)
    assert z.shape == (2, 384, 4, 3) and relative_error(z, wanted.mT.unflatten(2, (4, 3))) < 1e-5
    assert z.mean(1).abs().max() < 1e-5 and (z.square().mean(1) - 1).abs().max() < 1e-3
    assert model.decode(z).shape == x.shape
    assert model.decoder.base.weight.abs().max() > 0 and model.decoder.base.out_channels == 3 * 16**2
    for bad, words in (("timm_nothing", "no network nothing"), ("timm_vgg11", "no vision transformer")):
        with pytest.raises(ValueError, match=words):
            make_encoder(bad)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderDC"])
def test_a_peer_is_a_row_of_the_table(tmp_path, checkpoint, kind, offline, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    if kind == "AutoencoderKL":
        network = diffusers.AutoencoderKL(block_out_channels=(32, 32, 32), layers_per_block=1, latent_channels=4,
                                          down_block_types=("DownEncoderBlock2D",) * 3,
                                          up_block_types=("UpDecoderBlock2D",) * 3)
    else:
        network = diffusers.AutoencoderDC(
            latent_channels=4, encoder_block_out_channels=(32, 32, 32), decoder_block_out_channels=(32, 32, 32),
            encoder_block_types="ResBlock", decoder_block_types="ResBlock", encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1), encoder_qkv_multiscales=((),) * 3, decoder_qkv_multiscales=((),) * 3)
    network.save_pretrained(tmp_path / "peer")
    common = ["--peer", tmp_path / "peer", "--limit", 4, "--size", 32, "--workers", 0, "--features", "--device", "cpu"]
    output = command(evaluate, *common, "--ckpt", checkpoint, "--out", tmp_path / "both")
    command(evaluate, *common, "--out", tmp_path / "alone")
    both, alone = (json.loads(Path(tmp_path, name, "metrics.json").read_text()) for name in ("both", "alone"))
    assert "numbers" in output
    x = demo_batch(4, 32)
    with torch.no_grad():
        code = network.eval().encode(x)
        z = code.latent_dist.mode() if kind == "AutoencoderKL" else code.latent
        error = (evaluate.to8bit(network.decode(z).sample) - evaluate.to8bit(x)).square().mean((1, 2, 3))
    for rows in (both["rows"][3:], alone["rows"]):
        assert [row["name"] for row in rows] == ["shrink/enlarge x 4", "linear code", str(tmp_path / "peer")]
        assert rows[2]["psnr"] == pytest.approx(float(evaluate.psnr(error).mean()), abs=1e-3)
        assert rows[2]["numbers"] == z[0].numel() == 256 and rows[2]["ms"] > 0 and rows[2]["nfe"] == 1
    assert both["rows"][2]["numbers"] == 4 * 4 * 4 and both["rows"][2]["psnr"] != both["rows"][5]["psnr"]
    assert evaluate.psnr((evaluate.linear_code(x, 4, 4) - x).square().mean((1, 2, 3))).mean() == pytest.approx(
        alone["rows"][1]["psnr"], abs=0.05)
    if kind == "AutoencoderKL":
        shutil.copytree(tmp_path / "peer", tmp_path / "other")
        other = json.loads((tmp_path / "peer" / "config.json").read_text()) | {"_class_name": "UNet2DModel"}
        (tmp_path / "other" / "config.json").write_text(json.dumps(other))
        assert "UNet2DModel" in sentence(evaluate, *common, "--peer", tmp_path / "other", "--out", tmp_path / "n")
        assert "multiple of 4" in sentence(evaluate, *common, "--size", 34, "--out", tmp_path / "n")
        assert "no folder" in sentence(evaluate, *common, "--peer", tmp_path / "nothing", "--out", tmp_path / "n")
        others = bench.named_peers([str(tmp_path / "peer")])
        assert [part[1:] for part in others.values()] == [(4, 4)]
        monkeypatch.setitem(sys.modules, "diffusers", None)
        assert "pip install diffusers" in sentence(evaluate, *common, "--out", tmp_path / "n")
