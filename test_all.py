"""Tests of everything users rely on: the mathematics, equivalences, parity with independent implementations, every command line.

    python -m pytest test_all.py          # no network, no GPU; under ten minutes on two cores

Tests that compare with another library are skipped where it is not installed. Networks whose weights would have to be downloaded
(VGG-16, DINOv2, Inception) stand here with random weights, given as files.
"""
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import losses
import sampler
from encoder import DiagonalGaussian, make_encoder
from losses import EqM
from model import DCSSDAE, SIZES, LatentNorm, UViT, read_weights

HERE = os.path.dirname(os.path.abspath(__file__))


def relative_error(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def randomise(module, seed=0, scale=1.0):
    """Random values in every parameter and statistic, zero-initialised ones too; sizes that keep activations near 1."""
    g = torch.Generator().manual_seed(seed)
    for name, p in list(module.named_parameters()) + list(module.named_buffers()):
        if p.is_floating_point():
            fan = p[0].numel() if p.ndim > 1 else 4
            p.data.copy_(scale * torch.randn(p.shape, generator=g) / fan ** 0.5)
            if name.endswith("running_var"):
                p.data.abs_().add_(0.5)
            elif p.ndim == 1 and name.endswith("weight"):
                p.data.add_(1.0)
    return module


def cli(*args, ok=True, nproc=None, cwd=HERE, env=None, timeout=300):
    """Run a command line of the project; returns its output. ok=False: it must fail with one sentence and no traceback."""
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={nproc}", "--master_port=0"] if nproc else [sys.executable]
    script = os.path.join(HERE, args[0])
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONWARNINGS="ignore", **(env or {}))
    done = subprocess.run([*launch, script, *map(str, args[1:])], cwd=cwd, env=environment, capture_output=True, text=True,
                          timeout=timeout, check=False)
    output = done.stdout + done.stderr
    if ok:
        assert done.returncode == 0, output
    else:
        assert done.returncode != 0 and "Traceback" not in output, output
        assert done.stderr.strip().splitlines()[-1].startswith("error: "), output
    return output


def lines_of(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


TINY = ["--preset", "tiny", "--device", "cpu", "--dtype", "float32", "--workers", 0, "--batch_size", 4, "--eval_images", 4, "--log_every", 1,
        "--enc_width", 0.0625, "--depth", 1]


# ---------------------------------------------------------------------------------------------------------------------
# Formulas

def test_fm_closed_forms():
    x, e = torch.randn(5, 3, 8, 8), torch.randn(5, 3, 8, 8)
    t = torch.tensor([0.0, 0.25, 0.5, 0.8, 1.0])
    x_t = losses.fm_mix(x, e, t)
    assert torch.equal(x_t[0], x[0]) and torch.equal(x_t[4], e[4])  # t=0 is data, t=1 noise
    assert torch.allclose(losses.fm_predict_x(x_t, x - e, t), x, atol=1e-6)
    assert losses.fm_loss(x - e, x, e) == 0
    assert losses.fm_loss(x - e + 0.5, x, e) == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("c", ["linear", "trunc", "piecewise"])
@pytest.mark.parametrize("lam", [1.0, 4.0])
def test_eqm_closed_forms(c, lam):
    eqm = EqM(c, a=0.8, b=1.4, lam=lam)
    g = torch.tensor([0.0, 0.5, 0.8, 0.95, 1.0])
    x, e = torch.randn(5, 3, 8, 8), torch.randn(5, 3, 8, 8)
    x_g = eqm.mix(x, e, g)
    assert torch.equal(x_g[0], e[0]) and torch.equal(x_g[4], x[4])  # g=0 is noise, g=1 data
    target = eqm.target(x, e, g)
    assert target[4].abs().max() == 0  # the data is an equilibrium
    assert torch.allclose(eqm.predict_x(x_g, target, g), x, atol=2e-6)  # perfect field, also at g=1
    expected = {"linear": [1, .5, .2, .05, 0], "trunc": [1, 1, 1, .25, 0], "piecewise": [1.4, 1.15, 1, .25, 0]}[c]
    assert torch.allclose(eqm.c(g), torch.tensor(expected), atol=1e-6)
    assert losses.eqm_loss(target, x, e, g, eqm) == 0
    if c == "linear" and lam == 1:
        assert torch.allclose(target, x_g - x, atol=1e-6)  # the field is the displacement


def test_eqm_refuses_bad_values():
    for bad in ({"c": "cubic"}, {"a": 1.0}, {"lam": 0.0}):
        with pytest.raises(ValueError):
            EqM(**bad)


def test_kl_against_torch_distributions():
    mean, logvar = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    posterior = DiagonalGaussian(mean, logvar)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (logvar / 2).exp()), normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    assert torch.allclose(posterior.kl(), expected, rtol=1e-5)
    assert losses.kl_loss(posterior) == pytest.approx(float(expected.mean()), rel=1e-5)
    assert DiagonalGaussian(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)).kl() == 0
    wild = DiagonalGaussian(mean, logvar * 1000)
    assert wild.logvar.min() >= -30 and wild.logvar.max() <= 20


def test_posterior_sample_moments_and_noise():
    posterior = DiagonalGaussian(torch.full((1, 1, 200, 200), 2.0), torch.full((1, 1, 200, 200), math.log(0.25)))
    z = posterior.sample(generator=torch.Generator().manual_seed(0))
    assert abs(z.mean() - 2) < 0.02 and abs(z.std() - 0.5) < 0.02
    assert torch.equal(posterior.sample(noise=torch.ones(1, 1, 200, 200)), torch.full((1, 1, 200, 200), 2.5))
    assert torch.equal(posterior.mode(), posterior.mean)


# ---------------------------------------------------------------------------------------------------------------------
# Samplers

def test_euler_is_exact_for_a_straight_path():
    x, e, z = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.zeros(4, 1, 1, 1)
    for steps, t_shift in ((1, 4.0), (5, 1.0), (8, 4.0)):
        out, nfe = sampler.euler(lambda x_t, z, t: x - e, e, z, steps, t_shift)
        assert torch.allclose(out, x, atol=1e-5) and nfe.tolist() == [steps] * 4


def test_euler_converges_to_the_exact_flow_of_a_gaussian():
    """Data N(0, s^2): v = E[x - e | x_t] is linear in x_t and the flow maps e to s e. First order: half the error with twice the steps."""
    s, e = 0.5, torch.randn(1, 3, 32, 32, dtype=torch.float64)

    def velocity(x_t, z, t):
        t = losses.per_image(t.double())
        return ((1 - t) * s * s - t) / ((1 - t) ** 2 * s * s + t ** 2) * x_t
    error = [relative_error(sampler.euler(velocity, e, e, n, 1.0)[0], s * e) for n in (100, 200)]
    assert error[0] < 0.02 and 1.8 < error[0] / error[1] < 2.2


def test_gradient_descent_lands_in_one_step_on_a_perfect_linear_field():
    x, e = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    for lam in (1.0, 4.0):
        out, nfe = sampler.gradient_descent(lambda y, z, lam=lam: lam * (y - z), e, x, steps=1, eta=1 / lam, lam=lam)
        assert torch.allclose(out, x, atol=1e-6) and nfe.tolist() == [1] * 4


def test_nesterov_without_momentum_is_gradient_descent():
    torch.manual_seed(0)
    e, A = torch.randn(3, 3, 4, 4), torch.rand(3, 4, 4)
    a = sampler.gradient_descent(lambda y, z: A * y, e, e, steps=7, eta=0.3)[0]
    b = sampler.nesterov(lambda y, z: A * y, e, e, steps=7, eta=0.3, mu=0.0)[0]
    assert torch.equal(a, b)


def test_nesterov_against_torch_sgd():
    """torch's SGD(nesterov=True) holds the look-ahead points y_k; ours returns x_{k+1} = y_k - eta f(y_k)."""
    torch.manual_seed(0)
    start, A, eta, mu = torch.randn(1, 3, 4, 4), torch.rand(3, 4, 4), 0.2, 0.7
    p = nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([p], lr=eta, momentum=mu, nesterov=True)
    for steps in range(1, 8):
        y = p.detach().clone()
        ours = sampler.nesterov(lambda y, z: A * y, start, start, steps=steps, eta=eta, mu=mu)[0]
        assert torch.allclose(ours, y - eta * A * y, atol=1e-6)
        p.grad = A * p.detach()
        optimizer.step()


def test_nesterov_accelerates_on_an_ill_conditioned_quadratic():
    curvature = torch.logspace(-3, 0, 48, dtype=torch.float64).view(1, 3, 4, 4)  # condition number 1000
    start = torch.ones_like(curvature)
    nfe = {mu: int(sampler.nesterov(lambda y, z: curvature * y, start, start, steps=20000, eta=1.0, mu=mu, tol=1e-6)[1]) for mu in (0.0, 0.9)}
    assert nfe[0.9] < nfe[0.0] / 5, nfe


def test_adaptive_stop_drops_finished_samples_from_the_batch():
    torch.manual_seed(0)
    rates = torch.tensor([1.0, 0.5, 0.01, 1e-4])  # the condition z carries each sample's rate
    z, x, seen = losses.per_image(rates), torch.randn(4, 3, 8, 8), []

    def field(y, z):
        seen.append(len(y))
        return z * y
    out, nfe = sampler.nesterov(field, x, z, steps=50, eta=1.0, mu=0.3, tol=1e-3)
    assert sum(seen) == int(nfe.sum()) and seen[0] == 4 and seen[-1] < 4 and seen == sorted(seen, reverse=True)
    assert nfe[0] < nfe[1] < nfe[2] == 50 and nfe[3] == 1  # the last one is flat from the start
    for i in range(4):  # each as if it were alone
        alone, n = sampler.nesterov(lambda y, z: z * y, x[i:i + 1], z[i:i + 1], steps=50, eta=1.0, mu=0.3, tol=1e-3)
        assert torch.allclose(alone[0], out[i], atol=1e-6) and int(n) == int(nfe[i])
    everything = sampler.nesterov(lambda y, z: z * y, x, z, steps=50, eta=1.0, mu=0.3)
    assert everything[1].tolist() == [50] * 4  # tol = 0 never stops


def test_samplers_refuse_bad_arguments():
    x = torch.zeros(1, 3, 8, 8)
    for call in (lambda: sampler.euler(None, x, x, 0), lambda: sampler.gradient_descent(None, x, x, 1, eta=-1.0),
                 lambda: sampler.nesterov(None, x, x, 1, mu=1.0), lambda: sampler.nesterov(None, x, x, 2.5)):
        with pytest.raises(ValueError):
            call()


# ---------------------------------------------------------------------------------------------------------------------
# Decoder: a plain reference in the published names, one functional call after another, in float64

def published_decoder_shapes(widths, blocks, z_dim, time, window=15, heads=4):
    """Names and shapes of a published DC-SSDAE decoder file (without the prefix decoder.)."""
    c, top, shapes = widths[0], widths[-1], {}

    def layer(name, *weight, bias=True):
        shapes[f"{name}.weight"] = weight
        if bias:
            shapes[f"{name}.bias"] = weight[:1]

    def resnet(name, cin, cout):
        layer(f"{name}.norm1.ctx_proj", 2 * cin, c, 1, 1)
        layer(f"{name}.conv1", cout, cin, 3, 3)
        if time:
            layer(f"{name}.time_emb_proj", 2 * cout, 4 * c)
        layer(f"{name}.norm2", cout)
        layer(f"{name}.conv2", cout, cout, 3, 3)
        if cin != cout:
            layer(f"{name}.conv_shortcut", cout, cin, 1, 1)

    layer("conv_in_img", c // 2, 3, 3, 3)
    layer("conv_in_z", c // 2, z_dim, 3, 3)
    layer("conv_in", c, c, 3, 3)
    layer("batch_norm_z", z_dim)
    shapes |= {"batch_norm_z.running_mean": (z_dim,), "batch_norm_z.running_var": (z_dim,), "batch_norm_z.num_batches_tracked": ()}
    layer("ada_ctx_proj.0", c, z_dim, 3, 3)
    layer("ada_ctx_proj.2", c, c, 3, 3)
    if time:
        layer("time_embedding.linear_1", 4 * c, c)
        layer("time_embedding.linear_2", 4 * c, 4 * c)
    skips, cin = [c], c
    for i, cout in enumerate(widths):
        for j in range(2):
            resnet(f"down_blocks.{i}.resnets.{j}", cin, cout)
            skips.append(cout)
            cin = cout
        if i < 3:
            layer(f"down_blocks.{i}.downsamplers.0.conv", cout, cout, 3, 3)
            skips.append(cout)
    for name in ("norm", "proj_in", "proj_out"):
        layer(f"mid_block.{name}", *((top,) if name == "norm" else (top, top)))
    if True:
        shapes["mid_block.norm.bias"] = (top,)
    for k in range(blocks):
        b = f"mid_block.transformer_blocks.{k}"
        layer(f"{b}.norm1.linear", 2 * top, c)
        for name in "qkv":
            layer(f"{b}.attn1.to_{name}", top, top, bias=False)
        layer(f"{b}.attn1.out_proj", top, top)
        layer(f"{b}.norm2", top)
        layer(f"{b}.ff.proj_in_act.proj", 8 * top, top)
        layer(f"{b}.ff.proj_out", top, 4 * top)
        shapes[f"{b}.relative_position_bias.relative_bias_table"] = (window, window, heads)
    for i, cout in enumerate(reversed(widths)):
        for j in range(3):
            resnet(f"up_blocks.{i}.resnets.{j}", cin + skips.pop(), cout)
            cin = cout
        if i < 3:
            layer(f"up_blocks.{i}.upsamplers.0.conv", cout, cout, 3, 3)
    layer("conv_norm_out", c)
    layer("conv_out", 3, c, 3, 3)
    return shapes


def published_decoder(seed=0, **kw):
    """A random published-layout state dict."""
    g, state = torch.Generator().manual_seed(seed), {}
    for name, shape in published_decoder_shapes(**kw).items():
        value = torch.randn(shape, generator=g) / (math.prod(shape[1:]) ** 0.5 if len(shape) > 1 and "bias_table" not in name else 4)
        if name.endswith(("norm2.weight", "norm.weight", "norm_out.weight", "norm_z.weight")):
            value = 1 + value
        if name.endswith("running_var"):
            value = 0.5 + value.abs()
        state[name] = torch.tensor(0) if name.endswith("tracked") else value
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

    z = (z - p["batch_norm_z.running_mean"][:, None, None]) / (p["batch_norm_z.running_var"][:, None, None] + 1e-5).sqrt()
    z = z * p["batch_norm_z.weight"][:, None, None] + p["batch_norm_z.bias"][:, None, None]
    ctx = conv("ada_ctx_proj.2", F.silu(conv("ada_ctx_proj.0", z)))
    temb = None
    if t is not None:
        half = p["conv_in.weight"].shape[0] // 2
        angle = 1000 * t.double()[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
        temb = linear("time_embedding.linear_2", F.silu(linear("time_embedding.linear_1", torch.cat([angle.cos(), angle.sin()], 1))))
    h = conv("conv_in", torch.cat([conv("conv_in_img", x), conv("conv_in_z", resize(z, x))], 1))
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
    u = linear("mid_block.proj_in", F.group_norm(h, 32, p["mid_block.norm.weight"], p["mid_block.norm.bias"]).flatten(2).mT)
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
@pytest.mark.parametrize("enc,size", [("vq_f8c4", (64, 64)), ("dc_f16c8", (32, 96)), ("dc_f32c8", (32, 160))])
def test_published_decoder_loads_and_equals_the_reference(tmp_path, loss, enc, size):
    """Published names, a 15 x 15 table in a 17 x 17 window, square and not, grids smaller and larger than the window."""
    z_dim, f = make_encoder(enc, 0.25).z_dim, make_encoder(enc, 0.25).downscale
    state = published_decoder(widths=[32, 64, 96, 96], blocks=2, z_dim=z_dim, time=loss == "fm")
    torch.save({"state_dict": {f"module.decoder.{k}": v for k, v in state.items()}}, tmp_path / "published.pt")
    model = DCSSDAE(enc, "XS", loss, enc_width=0.25, depth=2, input_skip=True).eval()
    model.load_published(tmp_path / "published.pt", part="decoder")
    assert not model.config["input_skip"]  # published decoders have none
    torch.manual_seed(0)
    x, z = torch.randn(2, 3, *size), torch.randn(2, z_dim, size[0] // f, size[1] // f)
    t = torch.rand(2) if loss == "fm" else None
    with torch.no_grad():
        assert relative_error(model.decoder(x, z, t), reference_decoder(state, x, z, t)) < 1e-5


def test_window_attention_equals_reference_at_17():
    state = published_decoder(widths=[32, 64, 96, 96], blocks=1, z_dim=4, time=False, window=17)
    torch.manual_seed(0)
    x, z = torch.randn(1, 3, 80, 160), torch.randn(1, 4, 10, 20)
    model = DCSSDAE("vq_f8c4", "XS", "eqm", enc_width=0.25, depth=1)
    import tempfile

    from safetensors.torch import save_file
    with tempfile.TemporaryDirectory() as folder:
        save_file({f"decoder.{k}": v for k, v in state.items()}, f"{folder}/d.safetensors")
        model.load_published(f"{folder}/d.safetensors", part="decoder")
    with torch.no_grad():
        ours, reference = model.decoder(x, z), reference_decoder(state, x, z, window=17)
    assert relative_error(ours, reference) < 1e-5
    assert relative_error(ours, reference_decoder(state, x, z, window=15)) > 1e-5  # the outermost offsets count


# ---------------------------------------------------------------------------------------------------------------------
# Model

MILLIONS = {"XS": (5.00, 4.61), "S": (14.09, 12.78), "B": (21.18, 19.61), "M": (50.36, 46.85), "L": (90.84, 86.59), "XL": (161.42, 153.86),
            "H": (363.01, 346.03)}


@pytest.mark.parametrize("size", SIZES)
def test_decoder_parameter_counts(size):
    """The published counts have 15 x 15 tables; ours of 17 x 17 hold 64 more entries a head and block."""
    for time_cond, expected in zip((True, False), MILLIONS[size]):
        with torch.device("meta"):
            decoder = UViT(size, z_dim=4, time_cond=time_cond)
        extra = sum(64 * block.attn.heads for block in decoder.blocks)
        assert (sum(p.numel() for p in decoder.parameters()) - extra) / 1e6 == pytest.approx(expected, abs=0.0051)


def test_encoder_parameter_counts():
    with torch.device("meta"):
        count = {name: sum(p.numel() for p in make_encoder(name).parameters()) for name in ("vq_f8c4", "vq_f16c16", "dc_f32c32")}
        bare = sum(p.numel() for p in make_encoder("dc_f32c32", norm=False).parameters())
    assert count == {"vq_f8c4": 34_163_664, "vq_f16c16": 46_078_400, "dc_f32c32": 227_986_240 + 33_280} and bare == 227_986_240


@pytest.mark.parametrize("enc", ["vq_f8c4", "vq_f16c16", "dc_f8c4", "dc_f16c16", "dc_f32c32", "dc_f32c64", "dc_f64c128", "dc_f64c256",
                                 "dc_f128c512", "dc_f128c1024"])
def test_every_latent_configuration_builds_and_trains(enc):
    torch.manual_seed(0)
    model = DCSSDAE(enc, "XS", "eqm", enc_width=0.125 if enc.startswith("dc") else 0.25, depth=1)
    f, c, size = model.downscale, model.encoder.z_dim, max(32, model.downscale)
    assert enc.endswith(f"f{f}c{c}")
    x, optimizer = torch.rand(1, 3, size, size) * 2 - 1, torch.optim.Adam(model.parameters(), lr=1e-3)  # one image, one latent pixel: no NaN
    history = []
    for step in range(2):
        posterior = model.encode(x)
        assert posterior.mean.shape == (1, c, size // f, size // f)
        loss = F.mse_loss(model.decoder(x, posterior.sample(torch.zeros_like(posterior.mean))), torch.zeros_like(x))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(float(loss))
    assert history[1] < history[0]


@pytest.mark.parametrize("name", ["dc_f32", "foo_f8c4", "dc_f12c4", "dc_f8c0", "DC_f8c4", "vq_f8c4x"])
def test_unknown_encoder_names(name):
    with pytest.raises(ValueError, match="unknown encoder"):
        make_encoder(name)


@pytest.mark.parametrize("loss", ["fm", "eqm"])
def test_every_parameter_gets_a_gradient_and_matters_at_every_call(loss):
    """Also after a first call: nothing derived from parameters may be kept between calls."""
    model = randomise(DCSSDAE("dc_f16c4", "XS", loss, enc_width=0.0625, depth=2, input_skip=True))
    torch.manual_seed(0)
    x, t, eps = torch.rand(1, 3, 16, 16), torch.tensor([0.3]) if loss == "fm" else None, torch.randn(1, 4, 1, 1)
    z = model.encode(x).sample(eps)
    with torch.no_grad():
        before = model.decoder(x, z, t)
    model.decoder(x, z, t).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name
    for name, p in list(model.decoder.named_parameters())[::1 if loss == "fm" else 5]:
        with torch.no_grad():
            saved = p.clone()
            p.add_(0.1 * torch.randn(p.shape))
            assert not torch.equal(model.decoder(x, z, t), before), name
            p.copy_(saved)


def test_samples_do_not_depend_on_each_other_or_on_the_mode():
    model = randomise(DCSSDAE("vq_f8c4", "XS", "eqm", enc_width=0.25, depth=1))
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        together = model.train().decoder(x, model.encode(x).mode())
        alone = model.eval().decoder(x[1:2], model.encode(x[1:2]).mode())
    assert torch.allclose(together[1], alone[0], atol=1e-5)


def test_latent_norm_is_batch_norm_in_evaluation():
    ours, theirs = LatentNorm(4), nn.BatchNorm2d(4, momentum=None)  # momentum None: plain average, as ours over the first batches
    torch.manual_seed(0)
    for _ in range(3):
        z = 3 * torch.randn(5, 4, 2, 2) + 1
        theirs(z)
        ours.update(z.numel() // 4, z.double().sum(dim=(0, 2, 3)), z.double().square().sum(dim=(0, 2, 3)))
    for name, value in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[name].float(), value.float(), rtol=1e-4), name
    ours.load_state_dict(theirs.state_dict())
    assert torch.allclose(ours(z), theirs.eval()(z), atol=1e-6)


def test_shapes_are_checked():
    model = DCSSDAE("dc_f16c4", "XS", "fm", enc_width=0.0625, depth=1)
    with pytest.raises(ValueError, match="multiples of 16"):
        model.encode(torch.zeros(1, 3, 24, 32))
    with pytest.raises(ValueError, match="multiples of 8"):
        model.decoder(torch.zeros(1, 3, 20, 20), torch.zeros(1, 4, 2, 2), torch.zeros(1))
    with pytest.raises(ValueError, match="needs t"):
        model.decoder(torch.zeros(1, 3, 32, 32), torch.zeros(1, 4, 2, 2))
    for bad in ({"dec": "XXS"}, {"loss": "gan"}, {"window": 4}, {"enc_width": 0.3}):
        with pytest.raises(ValueError):
            DCSSDAE(**{"enc": "dc_f16c4", "dec": "XS", **bad})


@pytest.mark.parametrize("loss", ["fm", "eqm"])
@pytest.mark.parametrize("c", ["linear", "piecewise"])
def test_input_skip_is_the_field_at_the_noise_end(loss, c):
    """With skip and a network that outputs the image (up to scale), one step from pure noise returns the image."""
    model = DCSSDAE("dc_f16c4", "XS", loss, enc_width=0.0625, depth=1, c=c, lam=2.0, input_skip=True).eval()
    nn.init.zeros_(model.decoder.conv_out.weight)
    nn.init.constant_(model.decoder.conv_out.bias, 0.5 if loss == "fm" else -0.5 * model.field_at_noise)
    assert torch.allclose(model.decode(torch.randn(2, 4, 2, 2)), torch.full((2, 3, 32, 32), 0.5), atol=1e-5)


def test_decode_is_reproducible_differentiable_and_says_what_it_takes():
    model = randomise(DCSSDAE("dc_f16c4", "XS", "eqm", enc_width=0.0625, depth=1)).eval()
    z = torch.randn(2, 4, 2, 3, requires_grad=True)
    a, b = (model.decode(z, steps=2, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert a.shape == (2, 3, 32, 48) and torch.equal(a, b)
    a.sum().backward()
    assert z.grad.abs().sum() > 0
    _x, nfe = model.sample(z, steps=6, method="nesterov", mu=0.3, eta=0.1, tol=1e9)
    assert nfe.tolist() == [1, 1]
    with pytest.raises(ValueError, match="t_shift"):
        model.decode(z, t_shift=1.0)
    with pytest.raises(ValueError, match="method"):
        model.decode(z, method="adam")
    with pytest.raises(ValueError, match="takes the sampler options t_shift"):
        DCSSDAE("dc_f16c4", "XS", "fm", enc_width=0.0625, depth=1).decode(z, eta=0.1)
    half = model.bfloat16()
    assert half.decode(z.detach().bfloat16(), steps=2).dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------------------------------
# Files

@pytest.mark.parametrize("enc,loss", [("dc_f16c4", "fm"), ("vq_f8c4", "eqm")])
def test_save_and_load_round_trip(tmp_path, enc, loss):
    options = {"norm": False} if enc.startswith("dc") else {}
    model = randomise(DCSSDAE(enc, "XS", loss, enc_width=0.25, enc_options=options, depth=1, c="trunc", lam=4.0, input_skip=True,
                              notes={"size": 64})).eval()
    model.save(tmp_path / "m.safetensors")
    loaded = DCSSDAE.load(tmp_path / "m.safetensors")
    assert loaded.config == model.config and not loaded.training and os.listdir(tmp_path) == ["m.safetensors"]
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    x, noise = torch.rand(1, 3, 32, 32), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.decode(loaded.encode(x).mode(), 2, noise), model.decode(model.encode(x).mode(), 2, noise))
    other = DCSSDAE(enc, "XS", loss, enc_width=0.25, depth=1)
    other.load_published(tmp_path / "m.safetensors", part="encoder")  # --enc_ckpt takes our own files; the variant without norms is built
    assert torch.equal(other.encode(x).mean, model.encode(x).mean)


def test_damaged_and_foreign_weight_files(tmp_path):
    model = DCSSDAE("dc_f16c4", "XS", "eqm", enc_width=0.0625, depth=1)
    model.save(tmp_path / "m.safetensors")
    whole = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "junk.pt").write_bytes(b"this is not a checkpoint")
    marker = tmp_path / "executed"

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(marker),)
    torch.save({"state_dict": Malicious()}, tmp_path / "evil.pt")
    torch.save({"w": torch.zeros(1)}, tmp_path / "other.pt")
    for name, words in (("cut.safetensors", "not a readable"), ("junk.pt", "junk.pt"), ("evil.pt", "refused"), ("none.pt", "no weight file")):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            read_weights(tmp_path / name)
    assert not marker.exists()
    with pytest.raises(ValueError, match="no DC-SSDAE configuration"):
        DCSSDAE.load(tmp_path / "other.pt")
    with pytest.raises(ValueError, match="does not fit this model.*of another shape"):
        DCSSDAE("dc_f16c8", "XS", "eqm", enc_width=0.0625, depth=1).load_published(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="missing.*time"):
        DCSSDAE("dc_f16c4", "XS", "fm", enc_width=0.0625, depth=1).load_published(tmp_path / "m.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# Encoders against diffusers' (random weights), in the published names of both

def test_vq_encoder_against_diffusers(tmp_path):
    data.import_torchvision()
    vae = pytest.importorskip("diffusers.models.autoencoders.vae")
    theirs = randomise(vae.Encoder(3, 4, ("DownEncoderBlock2D",) * 4, (32, 64, 128, 128), layers_per_block=2)).eval()
    quant = randomise(nn.Conv2d(8, 8, 1))
    names = (("down_blocks.", "down."), (".resnets.", ".block."), (".downsamplers.0.", ".downsample."), ("conv_shortcut", "nin_shortcut"),
             ("mid_block.block.", "mid.block."), ("mid.resnets.0", "mid.block_1"), ("mid_block.resnets.0", "mid.block_1"),
             ("mid_block.resnets.1", "mid.block_2"), ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
             ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"), ("mid_block.attentions.0.to_", "mid.attn_1."), ("conv_norm_out", "norm_out"))
    state = {f"encoder.out_proj.{k}": v for k, v in quant.state_dict().items()}
    for key, value in theirs.state_dict().items():
        for old, new in (*names[3:], *names[:3]):
            key = key.replace(old, new)
        state["encoder." + key] = value[:, :, None, None] if ".attn_1." in key and value.ndim == 2 else value
    torch.save(state, tmp_path / "vq.pt")
    ours = DCSSDAE("vq_f8c4", "XS", enc_width=0.25, depth=1)
    ours.load_published(tmp_path / "vq.pt", part="encoder")
    x = torch.rand(2, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        posterior, expected = ours.encode(x), quant(theirs(x))
    assert relative_error(torch.cat([posterior.mean, posterior.logvar], 1), torch.cat([expected[:, :4], expected[:, 4:].clamp(-30, 20)], 1)) < 1e-5


@pytest.mark.parametrize("name", ["dc_f8c4", "dc_f32c32", "dc_f64c128"])
def test_dc_encoder_against_diffusers(tmp_path, name):
    data.import_torchvision()
    dc = pytest.importorskip("diffusers.models.autoencoders.autoencoder_dc")
    ours = randomise(DCSSDAE(name, "XS", enc_width=0.125, depth=1))
    levels, z_dim = int(math.log2(ours.downscale)) + 1, ours.encoder.z_dim
    theirs = dc.Encoder(3, 2 * z_dim, 32, "ResBlock", tuple(w // 8 for w in (128, 256, 512, 512, 1024, 1024, 1024, 1024)[:levels]),
                        (0, 5, 10, 4, 4, 4, 4, 4)[:levels], ((),) * levels, "pixel_unshuffle", out_shortcut=False).eval()
    state = {}
    for key, value in ours.encoder.state_dict().items():
        key = key.replace("stem.conv.", "conv_in.conv.").replace("stages.", "down_blocks.").replace("head.", "conv_out.")
        state[key] = value
    theirs.load_state_dict(state)
    x = torch.rand(1, 3, 64, 128) * 2 - 1
    with torch.no_grad():
        posterior, expected = ours.encode(x), theirs(x)
    assert relative_error(posterior.mean, expected[:, :z_dim]) < 1e-5
    assert relative_error(posterior.logvar, expected[:, z_dim:].clamp(-30, 20)) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Losses in the features of networks (random weights)

@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("nets") / "vgg16.pth"
    state = {f"features.{k}": v for k, v in data.import_torchvision().models.vgg16(weights=None).features.state_dict().items()}
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def dino_file(tmp_path_factory):
    data.import_torchvision()
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        state = timm.create_model("vit_base_patch14_dinov2.lvd142m", pretrained=False, num_classes=0).state_dict()
    g, path = torch.Generator().manual_seed(0), tmp_path_factory.mktemp("nets") / "dino.pth"
    torch.save({k: torch.randn(v.shape, generator=g) * 0.02 + (".gamma" in k or "norm" in k and "weight" in k) for k, v in state.items()}, path)
    return path


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_lpips_against_the_lpips_package(tmp_path, vgg_file, net):
    torchvision = data.import_torchvision()
    peer = pytest.importorskip("lpips")
    torch.manual_seed(0)
    path = vgg_file
    if net == "alex":
        path = tmp_path / "alex.pth"
        torch.save(torchvision.models.alexnet(weights=None).state_dict(), path)
    ours = losses.LPIPSLoss(net, weights=path)
    theirs = peer.LPIPS(net=net, pnet_rand=True, verbose=False)
    features, slices = torch.load(path, weights_only=True), theirs.net
    for k in range(1, 6):
        block = getattr(slices, f"slice{k}")
        block.load_state_dict({name: features[f"features.{name}"] for name in block.state_dict()})
    x, y = torch.rand(3, 3, 64, 64) * 2 - 1, torch.rand(3, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        assert relative_error(ours(x, y), theirs(x, y).flatten()) < 1e-5
        with torch.autocast("cpu", dtype=torch.bfloat16):  # stays in float32
            assert relative_error(ours(x, y), theirs.float()(x, y).flatten().float()) < 0.05 and ours(x, y).dtype == torch.float32
    assert ours(x, x).abs().max() == 0 and not any(p.requires_grad for p in ours.parameters())


def test_lpips_gradient_is_finite_on_constant_images(vgg_file):
    loss = losses.LPIPSLoss("vgg", weights=vgg_file)
    for value in (-1.0, 0.0, 1.0):
        x = torch.full((1, 3, 32, 32), value, requires_grad=True)
        loss(x, torch.full((1, 3, 32, 32), -0.5)).sum().backward()
        assert x.grad.isfinite().all() and x.grad.abs().max() < 1e3


def test_missing_networks_are_reported_in_one_sentence(tmp_path, monkeypatch):
    import urllib.error

    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(losses.WeightsUnavailable, match="vgg16-397923af.pth.*--lpips_weights FILE.*--w_lpips 0"):
        losses.LPIPSLoss("vgg")
    with pytest.raises(losses.WeightsUnavailable, match="missing.pth"):
        losses.LPIPSLoss("vgg", weights=tmp_path / "missing.pth")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    with pytest.raises(ValueError, match="junk.pth"):
        losses.LPIPSLoss("vgg", weights=tmp_path / "junk.pth")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not hold torchvision's vgg16"):
        losses.LPIPSLoss("vgg", weights=tmp_path / "other.pth")
    with pytest.raises(losses.WeightsUnavailable, match="--repa_weights FILE.*--w_repa 0"):
        losses.REPALoss(96, weights=tmp_path / "missing.pth")


def test_repa_with_random_dinov2(dino_file):
    repa = losses.REPALoss(96, weights=dino_file)
    x, tokens = torch.rand(2, 3, 32, 64) * 2 - 1, torch.randn(2, 4 * 8, 96, requires_grad=True)
    target = repa.target(x)
    assert target.shape == (2, 32, 768)  # the decoder's token grid, not square
    assert not torch.allclose(target[:, :-1], target[:, 1:], atol=1e-3)
    exact = nn.Sequential(nn.Identity())
    loss = repa(tokens, x)
    loss.backward()
    assert 0 < float(loss.detach()) < 2 and tokens.grad.abs().sum() > 0 and all(p.grad is None for p in repa.dino.parameters())
    repa.mlp = exact
    assert float(repa(target, x)) == pytest.approx(0, abs=1e-5) and float(repa(-target, x)) == pytest.approx(2, abs=1e-5)
    repa.train()
    assert not repa.dino.training and repa.trained_state().keys() == exact.state_dict().keys()
    # The square 518 px input it was made for: the same tokens as timm's model
    import timm
    with torch.device("meta"):
        dino = timm.create_model("vit_base_patch14_dinov2.lvd142m", pretrained=False, num_classes=0).eval()
    dino.load_state_dict(torch.load(dino_file, weights_only=True), assign=True)
    with torch.no_grad():
        image = torch.rand(1, 3, 296, 296) * 2 - 1
        resized = F.interpolate((image + 1) / 2, size=(518, 518), mode="bicubic", antialias=True)
        mean, std = torch.tensor(dino.pretrained_cfg["mean"]).view(3, 1, 1), torch.tensor(dino.pretrained_cfg["std"]).view(3, 1, 1)
        assert relative_error(repa.target(image), dino.forward_features((resized - mean) / std)[:, 1:]) < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# Command lines

@pytest.fixture(scope="module", params=["eqm", "fm"])
def trained(request, tmp_path_factory):
    """A tiny run of train.py for either loss: its folder."""
    out = tmp_path_factory.mktemp("runs") / request.param
    output = cli("train.py", *TINY, "--loss", request.param, "--steps", 6, "--eval_every", 3, "--out", out)
    assert "PSNR" in output and "saved" in output
    return out


def test_train_leaves_model_log_picture_and_metrics(trained):
    assert {"model.safetensors", "latest.pt", "log.jsonl", "reconstructions.png", "metrics.json"} <= set(os.listdir(trained))
    log = [line for line in lines_of(trained / "log.jsonl") if "loss" in line]
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(line[k]) for line in log for k in ("loss", "kl", "lr", "grad_norm", "images_per_s"))
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["images"] == 4 and [row["steps"] for row in metrics["rows"]] == [0, 1, 4]
    from PIL import Image
    assert Image.open(trained / "reconstructions.png").size[1] > 4 * 32  # original, baseline, 1 step, 4 steps
    model = DCSSDAE.load(trained / "model.safetensors")
    assert model.config["notes"]["size"] == 32
    averaged, raw = model.state_dict(), torch.load(trained / "latest.pt", weights_only=True)["model"]
    name = "decoder.norm_z.running_var"
    assert not torch.equal(averaged[name], torch.ones_like(averaged[name])) and not torch.equal(averaged[name], raw[name])  # EMA has buffers


def test_distill_then_evaluate(trained, tmp_path):
    output = cli("distill.py", "--ckpt", trained / "model.safetensors", "--steps", 3, "--batch_size", 4, "--teacher_steps", 3, "--eval_images", 4,
                 "--log_every", 1, "--out", tmp_path / "d", "--device", "cpu", "--workers", 0)
    assert "mean squared distance of one step to the teacher's 3 steps" in output
    teacher, student = (DCSSDAE.load(folder / "model.safetensors") for folder in (trained, tmp_path / "d"))
    assert all(torch.equal(a, b) for a, b in zip(teacher.encoder.state_dict().values(), student.encoder.state_dict().values()))
    assert torch.equal(teacher.decoder.norm_z.running_var, student.decoder.norm_z.running_var)  # latents stay valid
    assert not torch.equal(teacher.decoder.conv_out.weight, student.decoder.conv_out.weight)
    log = lines_of(tmp_path / "d" / "log.jsonl")
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3] and "mse_to_teacher" in log[-1]
    output = cli("evaluate.py", "--ckpt", tmp_path / "d" / "model.safetensors", "--data", "demo", "--limit", 4, "--out", tmp_path / "e", "--device", "cpu")
    assert "PSNR" in output and "HF ratio" in output


def test_distillation_brings_one_step_to_the_teacher(tmp_path):
    """A student that starts from random weights learns the teacher's several steps: enough steps that it must get closer."""
    for loss in ("fm", "eqm"):
        torch.manual_seed(0)
        model = randomise(DCSSDAE("dc_f8c4", "XS", loss, enc_width=0.0625, depth=1, input_skip=True, notes={"size": 16, "w_lpips": 0}), scale=0.7)
        model.save(tmp_path / f"{loss}.safetensors")
        cli("distill.py", "--ckpt", tmp_path / f"{loss}.safetensors", "--steps", 40, "--batch_size", 8, "--teacher_steps", 4, "--lr", 1e-3, "--ema", 0.9,
            "--eval_images", 8, "--out", tmp_path / loss, "--device", "cpu", "--workers", 0)
        distance = json.loads((tmp_path / loss / "metrics.json").read_text())["mse_to_teacher"]
        assert distance["distilled"] < 0.8 * distance["undistilled"], (loss, distance)


def same_weights(a, b):
    a, b = (torch.load(folder / "latest.pt", weights_only=True) for folder in (a, b))
    same = [torch.equal(a[part][k], b[part][k]) for part in ("model", "ema") for k in a[part]]
    same += [torch.equal(s["exp_avg"], b["optimizer"]["state"][k]["exp_avg"]) for k, s in a["optimizer"]["state"].items()]
    return all(same)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_is_bit_identical(tmp_path, workers):
    common = [*TINY, "--decay", 0, "--workers", workers, "--loss", "eqm"]
    cli("train.py", *common, "--steps", 5, "--out", tmp_path / "whole")
    cli("train.py", *common, "--steps", 2, "--out", tmp_path / "parts")
    cli("train.py", *common, "--steps", 5, "--out", tmp_path / "parts", "--resume")
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    whole, parts = ([line["loss"] for line in lines_of(tmp_path / name / "log.jsonl") if "loss" in line] for name in ("whole", "parts"))
    assert whole == parts and len(whole) == 5


def test_processes_and_micro_batches_do_not_change_the_run(tmp_path):
    common = [*TINY, "--steps", 4, "--loss", "fm"]
    cli("train.py", *common, "--out", tmp_path / "one")
    cli("train.py", *common, "--out", tmp_path / "two", nproc=2)
    cli("train.py", *common, "--out", tmp_path / "micro", "--micro_batch", 3)
    one, two, micro = ([line for line in lines_of(tmp_path / name / "log.jsonl") if "loss" in line] for name in ("one", "two", "micro"))
    for other in (two, micro):
        for a, b in zip(one, other, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
    weights = [torch.load(tmp_path / name / "latest.pt", weights_only=True)["model"] for name in ("one", "two", "micro")]
    for name, value in weights[0].items():
        if value.is_floating_point():
            assert all(torch.allclose(w[name], value, atol=2e-4) for w in weights[1:]), name


def test_the_plain_command_runs_offline_under_torchrun(tmp_path):
    """No --data, no networks: the built-in images, the missing terms named and recorded. (Full width is the README's command.)"""
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    output = cli("train.py", "--enc", "dc_f32c32", "--loss", "eqm", "--steps", 1, "--batch_size", 2, "--size", 64, "--enc_width", 0.125, "--dec", "XS",
                 "--eval_images", 2, "--out", tmp_path / "run", "--device", "cpu", nproc=2, env=env)
    assert "training WITHOUT LPIPS" in output and "training WITHOUT REPA" in output
    notes = DCSSDAE.load(tmp_path / "run" / "model.safetensors").config["notes"]
    assert set(notes["left_out"]) == {"lpips", "repa"} and notes["w_lpips"] == 0
    images = tmp_path / "images"
    images.mkdir()
    from PIL import Image
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(images / "a.png")
    output = cli("train.py", "--data", images, "--size", 32, "--enc_width", 0.125, "--dec", "XS", "--out", tmp_path / "real", "--device", "cpu",
                 env=env, ok=False)  # on real data an objective never changes silently
    assert "vgg16-397923af.pth" in output and "--w_lpips 0" in output


def test_training_with_lpips_and_repa(tmp_path, vgg_file, dino_file):
    common = [*TINY, "--w_lpips", 0.5, "--lpips_weights", vgg_file, "--w_repa", 0.25, "--repa_weights", dino_file, "--decay", 0]
    cli("train.py", *common, "--steps", 2, "--out", tmp_path / "whole")
    cli("train.py", *common, "--steps", 1, "--out", tmp_path / "parts")
    cli("train.py", *common, "--steps", 2, "--out", tmp_path / "parts", "--resume")  # REPA's MLP and its optimiser state too
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    log = lines_of(tmp_path / "whole" / "log.jsonl")[0]
    assert log["loss"] == pytest.approx(log["eqm"] + 0.5 * log["lpips"] + 0.25 * log["repa"] + 1e-6 * log["kl"], rel=1e-5)


def test_frozen_encoder_from_a_checkpoint(trained, tmp_path):
    loss = DCSSDAE.load(trained / "model.safetensors").config["loss"]
    cli("train.py", *TINY, "--loss", loss, "--steps", 2, "--enc_ckpt", trained / "model.safetensors", "--freeze_enc", "--out", tmp_path / "run")
    before, after = (DCSSDAE.load(folder / "model.safetensors") for folder in (trained, tmp_path / "run"))
    assert all(torch.equal(a, b) for a, b in zip(before.encoder.parameters(), after.encoder.parameters()))
    assert not torch.equal(before.decoder.conv_in.weight, after.decoder.conv_in.weight)


@pytest.mark.parametrize("flags,words", [
    (["--data", "/nowhere/at/all"], "/nowhere/at/all"),
    (["--size", 100], "--size 100 is not a multiple"),
    (["--enc", "dc_f32"], "unknown encoder 'dc_f32'"),
    (["--freeze_enc"], "--enc_ckpt"),
    (["--enc_ckpt", "missing.safetensors"], "missing.safetensors"),
    (["--w_lpips", 1, "--lpips_weights", "missing.pth"], "missing.pth"),
    (["--resume"], "no checkpoint"),
    (["--batch_size", 0], "--batch_size 0"),
    (["--lr", 1e30, "--grad_clip", 1e30, "--warmup", 0, "--steps", 40], "not finite"),
])
def test_bad_input_to_train(tmp_path, flags, words):
    output = cli("train.py", *TINY, "--out", tmp_path / "run", *flags, ok=False)
    assert words in output.strip().splitlines()[-1]


def test_bad_files_and_folders(tmp_path, trained):
    from PIL import Image
    empty, images = tmp_path / "empty", tmp_path / "images"
    empty.mkdir(), images.mkdir()
    assert "no images" in cli("train.py", *TINY, "--data", empty, "--out", tmp_path / "a", ok=False)
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(images / f"{i}.jpg")
    broken = (images / "2.jpg").read_bytes()
    (images / "2.jpg").write_bytes(broken[:len(broken) // 3])
    output = cli("train.py", *TINY, "--steps", 3, "--data", images, "--eval_images", 5, "--out", tmp_path / "b")
    assert "2.jpg" in output and "1 unreadable images were replaced" in output
    output = cli("evaluate.py", "--ckpt", tmp_path / "b" / "model.safetensors", "--data", images, "--out", tmp_path / "e", "--device", "cpu")
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert metrics["images"] == 4 and metrics["skipped"] == 1 and "2.jpg" in output
    # another configuration's checkpoint, and a folder that already holds a run
    assert "does not fit" in cli("train.py", *TINY, "--enc", "dc_f8c4", "--enc_ckpt", trained / "model.safetensors", "--out", tmp_path / "c", ok=False)
    assert "already holds a run" in cli("train.py", *TINY, "--out", tmp_path / "b", ok=False)
    assert "--resume continues a run with --batch_size" in cli("train.py", *TINY, "--batch_size", 2, "--data", images, "--out", tmp_path / "b", "--resume",
                                                               ok=False)
    assert "no weight file" in cli("distill.py", "--ckpt", tmp_path / "missing.safetensors", ok=False)


def test_interrupted_training_saves_and_resumes(tmp_path):
    import signal
    import time
    command = [sys.executable, os.path.join(HERE, "train.py"), *map(str, TINY), "--steps", "100000", "--decay", "0", "--eval_every", "0", "--out", str(tmp_path / "r")]
    env = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for _ in range(600):
        if (tmp_path / "r" / "log.jsonl").exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "continue with the same command and --resume" in output, output
    step = torch.load(tmp_path / "r" / "latest.pt", weights_only=True)["step"]
    cli("train.py", *TINY, "--decay", 0, "--steps", step + 1, "--out", tmp_path / "r", "--resume")
    assert [line["step"] for line in lines_of(tmp_path / "r" / "log.jsonl") if "loss" in line] == list(range(1, step + 2))


def test_a_full_disk_or_damaged_checkpoint_loses_nothing(tmp_path, monkeypatch):
    import train
    train.save_checkpoint(tmp_path, {"step": 1})
    train.save_checkpoint(tmp_path, {"step": 2})

    def full(state, file):
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="earlier checkpoint is intact"):
        train.save_checkpoint(tmp_path, {"step": 3})
    assert train.load_checkpoint(tmp_path)["step"] == 2 and sorted(os.listdir(tmp_path)) == ["latest.pt", "previous.pt"]
    (tmp_path / "latest.pt").write_bytes(b"damaged")
    assert train.load_checkpoint(tmp_path)["step"] == 1


def test_help_explains_every_flag():
    for script in ("train.py", "distill.py", "evaluate.py", "fid.py"):
        assert "--" in cli(script, "--help")
    text = cli("train.py", "--help")
    for flag in ["--enc", "--enc_width", "--enc_ckpt", "--freeze_enc", "--dec", "--loss", "--c", "--lam", "--w_lpips", "--w_repa", "--w_kl", "--data", "--size", "--aug_scale", "--batch_size", "--micro_batch", "--steps", "--lr", "--weight_decay", "--grad_clip", "--ema", "--dtype", "--compile", "--seed", "--out", "--resume", "--eval_every", "--save_every", "--log_every"]:
        assert flag in text
