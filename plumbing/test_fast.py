"""The fast forms against the plain ones, and what GPUs need, shown on a CPU: layouts, compiled blocks."""
import importlib
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from encoder import (
    make_encoder,
)
from model import (
    BLOCKS,
    DCSSDAE,
    ResBlock,
    TransformerBlock,
    UViT,
    compile_blocks,
)
from plumbing import fast
from test_all import HERE, randomise, relative_error, slow
from tools import bench, check

# ---------------------------------------------------------------------------------------------------------------------
# plumbing/fast.py: the fast forms against the plain ones
# Windowed attention, norms, upsampling, conditioning: equal to their plain forms, compiled, linear in pixels.

def same_values_and_gradients(fast_form, plain_form, inputs):
    """Both forms, functions of the same inputs, have the same value and the same gradients of all."""
    grad, found = None, []
    for form in (fast_form, plain_form):
        y = form()
        grad = torch.randn_like(y) if grad is None else grad
        found.append([y, *torch.autograd.grad(y, inputs, grad)])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-9 * (b.norm() + 1e-3)


@pytest.mark.parametrize("h, w, window", [(1, 1, 17), (3, 40, 17), (24, 25, 17), (33, 26, 17), (41, 32, 17), (19, 9, 9),
                                          (17, 16, 1), (30, 31, 13), (29, 20, 5), (50, 10, 21), (9, 9, 99)])
def test_windowed_attention(h, w, window):
    q, kv = (torch.randn(2, h * w, width, dtype=torch.float64).requires_grad_() for width in (16, 32))
    table = torch.randn(window, window, 2, dtype=torch.float64).requires_grad_()
    windows = fast.windows_for(h, w, window, q.device)

    def plain():
        heads = (t.unflatten(2, (-1, 8)).transpose(1, 2) for t in (q, kv))                   # (2, heads, h w, 8)
        return fast.plain_attention(*heads, table, h, w).transpose(1, 2).flatten(2)

    same_values_and_gradients(lambda: fast.window_attention(q, kv, windows, windows.bias(table)), plain, (q, kv, table))


@pytest.mark.parametrize("batch, h, w", [(2, 2, 3), (1, 1, 1), (2, 1, 1)])
def test_norm_and_modulation(batch, h, w):
    x = (3 * torch.randn(2, 64, 4, 6, dtype=torch.float64) + 1).requires_grad_()
    scale, shift = (torch.randn(batch, 64, h, w, dtype=torch.float64).requires_grad_() for _ in range(2))
    large_scale, large_shift = (F.interpolate(m, size=(4, 6), mode="nearest") for m in (scale, shift))
    plain = (F.group_norm(x, 32) * large_scale + large_shift).detach()
    torch.testing.assert_close(fast.plain_norm(x, scale, shift, 32), F.silu(plain))
    torch.testing.assert_close(fast.plain_norm(x, scale, shift, 32, silu=False), plain)
    same_values_and_gradients(lambda: fast.norm_silu(x, scale, shift, 32),
                              lambda: fast.plain_norm(x, scale, shift, 32), (x, scale, shift))
    same_values_and_gradients(lambda: fast.modulate(x, fast.per_block(scale), fast.per_block(shift)),
                              lambda: fast.plain_modulate(x, scale, shift), (x, scale, shift))
    weight, bias = (t[0, :, 0, 0].detach().requires_grad_() for t in (scale, shift))
    same_values_and_gradients(lambda: fast.norm_silu(x, weight, bias, 32),
                              lambda: fast.plain_norm(x, weight, bias, 32), (x, weight, bias))
    with torch.no_grad():  # works in place on its own result, never on x
        before = x.clone()
        for y in (x, x.contiguous(memory_format=torch.channels_last)):
            assert torch.allclose(fast.norm_silu(y, scale, shift, 32), F.silu(plain)) and torch.equal(x, before)
        half = fast.norm_silu(x.bfloat16(), scale.bfloat16(), shift.bfloat16(), 32)
    assert relative_error(half, F.silu(plain)) < 1e-2


def test_convolutions():
    x, conv = torch.randn(2, 6, 3, 4, dtype=torch.float64).requires_grad_(), nn.Conv2d(6, 5, 3, padding=1).double()
    same_values_and_gradients(lambda: fast.upsample(x, conv), lambda: fast.plain_upsample(x, conv),
                              [x, *conv.parameters()])
    layer = nn.Linear(6, 5).double()
    same_values_and_gradients(lambda: fast.linear(x, layer), lambda: fast.plain_linear(x, layer),
                              [x, *layer.parameters()])


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (16, 64)])
def test_the_latents_part_of_the_input_layer(joint, size):
    unet = UViT("XS", 4, time_cond=False, depth=1, joint_input=joint).double().eval()
    x, z = torch.randn(2, 3, *size).double(), torch.randn(2, 4, size[0] // 8, max(1, size[1] // 32)).double()
    normalised, condition = unet.norm_z(z), unet.condition(z, *size)
    part = fast.plain_convolved(normalised, unet.conv_in_z, unet.conv_in, *size)
    torch.testing.assert_close(fast.spread(condition.input_map, *size), part)
    up = F.interpolate(normalised, size=size, mode="nearest")
    plain = unet.conv_in(torch.cat([unet.conv_in_x(x), unet.conv_in_z(up)], dim=1))
    torch.testing.assert_close(unet.input_layer(x, condition), plain)
    assert torch.equal(unet(x, condition=condition), unet(x, z))


def test_latent_work_is_done_once_per_decode_and_in_float32_sums():
    torch.manual_seed(0)
    model, calls = DCSSDAE("dc_f8c4", "XS", "eqm", enc_width=0.0625, depth=1).eval(), []
    for p in model.decoder.parameters():
        nn.init.normal_(p, std=0.05)
    model.decoder.context.register_forward_hook(lambda *a: calls.append(1))
    z, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        x, nfe = model.sample(z, steps=5, noise=noise, method="nesterov", mu=0.3, eta=0.3, tol=1e-6)
        assert len(calls) == 1 and nfe.tolist() == [5] * 3
        # samples that stop leave the prepared condition too: each ends as it does alone
        rms = model.decoder(noise, z).flatten(1).square().mean(1).sqrt().sort().values
        tol = float(rms[:2].mean())
        together = model.sample(z, steps=4, noise=noise, eta=0.1, tol=tol)
        assert len(set(together[1].tolist())) > 1
        for i in range(3):
            alone = model.sample(z[i:i + 1], steps=4, noise=noise[i:i + 1], eta=0.1, tol=tol)
            assert alone[1] == together[1][i] and relative_error(alone[0], together[0][i:i + 1]) < 1e-5
        half = model.bfloat16().sample(z, steps=5, noise=noise, method="nesterov", mu=0.3, eta=0.3, tol=1e-6)[0]
    assert half.dtype == torch.float32 and relative_error(half, x) < 0.05


@slow
def test_every_kind_of_block_compiles_in_one_graph(smallest):
    """And one with the gradients that the compiler makes of it."""
    x, found = torch.randn(2, 3, 32, 32), {}

    def keep(block, arguments, output):
        found.setdefault(type(block), (block, arguments, output))

    for network, arguments in ((make_encoder("vq_f8c4", 0.125), (x,)), (make_encoder("dcae_f32c32", 0.125), (x,)),
                               (randomise(UViT("XS", 4, depth=1)), (x, torch.randn(2, 4, 4, 4), torch.rand(2)))):
        hooks = [block.register_forward_hook(keep) for block in network.modules() if isinstance(block, BLOCKS)]
        network(*arguments)
        for hook in hooks:
            hook.remove()
    assert found.keys() == set(BLOCKS)
    for kind in set(BLOCKS) - {ResBlock, TransformerBlock}:  # theirs: test_blocks_are_compiled_one_by_one
        block, arguments, output = found[kind]
        compiled = torch.compile(block, fullgraph=True, backend="eager")
        assert relative_error(compiled(*arguments).detach(), output.detach()) < 1e-5

    block, arguments, _ = found[ResBlock]
    values = []
    for run in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        y = run(*(argument.detach() for argument in arguments))
        values.append([y.detach(), *torch.autograd.grad(y.square().sum(), [block.conv1.weight, block.conv2.weight])])
    for a, b in zip(*values, strict=True):
        assert relative_error(a, b) < 1e-5


def test_checkpointing_changes_no_gradient_and_keeps_half_as_much():
    unet = UViT("XS", 4, depth=1).train()
    x, z, t = torch.randn(2, 3, 32, 32), torch.randn(2, 4, 4, 4), torch.rand(2)
    for p in unet.parameters():
        nn.init.normal_(p, std=0.05)
    gradients, kept = [], []
    for unet.checkpointing in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            y = unet(x, z, t)
        kept.append(sum(sizes))
        gradients.append(torch.autograd.grad(unet(x, z, t).square().sum(), [*unet.parameters()]))
    assert y.isfinite().all() and kept[1] < 0.5 * kept[0]
    largest = max(gradient.norm() for gradient in gradients[0])
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= 1e-5 * (a.norm() + 0.01 * largest)  # some biases have no gradient but rounding


def test_cost_and_memory_of_decoding_are_linear_in_pixels():
    """At 16, 32 and 64 tokens a side: one block of attention, then many. Operations are counted without values."""
    unet = UViT("XS", 4, time_cond=False, depth=2).eval().to(memory_format=torch.channels_last)
    with torch.device("meta"):
        empty = UViT("XS", 4, time_cond=False, depth=2).eval()
    flop, memory = [], []
    with torch.no_grad():
        for size in (128, 256, 512):
            shapes = (1, 3, size, size), (1, 4, size // 8, size // 8)
            with FlopCounterMode(display=False) as counter:
                empty(*(torch.zeros(shape, device="meta") for shape in shapes))
            flop.append(counter.get_total_flops())
            if size < 512:
                x, z = (torch.randn(shape) for shape in shapes)
                memory.append(bench.bytes_allocated(lambda x=x, z=z: unet(x, z), torch.device("cpu")))
    assert 3.5 < flop[1] / flop[0] < 4.3 and 3.5 < flop[2] / flop[1] < 4.3
    assert 3.5 < memory[1] / memory[0] < 4.3
    block = 4 * 64 * 256 * 256  # bytes of one map at full resolution in the widest layer
    assert memory[1] < 16 * block


# ---------------------------------------------------------------------------------------------------------------------
# What GPUs need

class GpuLayouts(TorchDispatchMode):
    """Layouts as on a GPU, whose pixel_unshuffle and group norm return NCHW; the convolutions that get NCHW, and those
    whose backward pass does."""

    def __init__(self):
        super().__init__()
        self.convolutions, self.forward, self.backward = 0, [], []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        name = function.overloadpacket.__name__
        if name == "pixel_unshuffle":
            out = out.contiguous()
        elif name == "native_group_norm":
            out = (out[0].contiguous(), *out[1:])
        elif name == "convolution":
            self.convolutions += 1
            if not arguments[0].is_contiguous(memory_format=torch.channels_last):
                self.forward.append(arguments[0].shape)
        elif name == "convolution_backward":
            for t in arguments[:2]:
                if t.stride(1) != 1 and not t.is_contiguous(memory_format=torch.channels_last):
                    self.backward.append(t.shape)
        return out


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The forms that GPUs and compilers get, on the CPU."""
    monkeypatch.setattr(fast, "eager_cpu", lambda x: False)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("part", ["dc_f32c32", "vq_f8c4", "dcae_f32c32", "dcae_f32c32_sana", "fm", "eqm"])
def test_no_convolution_turns_a_map_round_on_a_gpu(part, trains, as_on_a_gpu):
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    if part in ("fm", "eqm"):
        network = UViT("XS", 4, part == "fm", depth=1, field_at_noise=1.0, base=(8, 4) if part == "eqm" else None)
        arguments = (x, torch.randn(2, 4, 8, 8), *([torch.rand(2)] if part == "fm" else []))
        outputs = network
    else:
        network, arguments = make_encoder(part, 0.125), (x,)
        outputs = lambda x: network(x).mean  # noqa: E731
    network.to(memory_format=torch.channels_last).requires_grad_(trains)
    with GpuLayouts() as layouts:
        y = outputs(*arguments)
        if trains:
            y.square().sum().backward()
    assert layouts.convolutions > 30 and layouts.forward == []
    # what is left are gradients of latents, and of an attention's q, k and v
    is_attention = part.startswith("dcae")
    assert all(max(shape[2:]) <= 8 for shape in layouts.backward) and (is_attention or len(layouts.backward) <= 1)


@pytest.mark.parametrize("name", ["vq_f8c4", "dc_f16c4"])
def test_the_forms_for_gpus_equal_those_for_cpus(name, monkeypatch):
    x = torch.randn(1, 3, 32, 48, dtype=torch.float64)
    network = randomise(make_encoder(name, 0.25 if name == "vq_f8c4" else 0.0625)).double()
    decoder = randomise(UViT("XS", 4, depth=1)).double()
    parameters, found = [*network.parameters(), *decoder.parameters()], []
    for is_cpu in (True, False):
        monkeypatch.setattr(fast, "eager_cpu", lambda x, is_cpu=is_cpu: is_cpu)
        z = network(x).mode().double()
        y = decoder(x, z, torch.tensor([0.3]).double())
        found.append([z, y, *torch.autograd.grad(y.square().sum() + z.sum(), parameters, allow_unused=True)])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).norm() <= 1e-6 * (b.norm() + 1e-3)  # some are 0 but for rounding


@slow
def test_the_gpus_norm_equals_the_plain_form():
    """On a GPU, or in Triton's interpreter, which is chosen before anything imports Triton."""
    pytest.importorskip("triton")
    env = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    script = f"import {__name__} as checks; checks.check_gpu_norm(); checks.check_block_with_gpu_norm()"
    subprocess.run([sys.executable, "-c", script], cwd=HERE, env=env, check=True, timeout=300)


def check_gpu_norm():
    """Tiles that do not divide the map, groups of any width, large means, and scales for all images or for each, also
    as channels of a larger map, or none but the weights."""
    from plumbing.triton import GpuNormSiLU
    torch.manual_seed(0)
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    single, half = (torch.float32, 1e-6), (torch.bfloat16, 5e-3)
    for batch, channels, groups, h, w, cells, offset, limits in (
            (2, 16, 8, 4, 6, (2, 2, 3), 0.0, (single, half)), (2, 12, 4, 4, 4, (2, 4, 4), 3.0, (single,)),
            (1, 160, 10, 5, 6, (), 5.0, (single, half)), (1, 32, 4, 33, 10, (1, 1, 1), 0.0, (single,))):
        x = torch.randn(batch, channels, h, w) + offset * torch.randn(1, channels, 1, 1)
        x = x.to(memory_format=torch.channels_last)
        shape = (cells[0], channels, *cells[1:]) if cells else (channels,)
        scale, shift, grad = 1 + torch.randn(shape) / 2, torch.randn(shape), torch.randn_like(x)
        for dtype, limit in limits:
            inputs = [t.to(dtype) for t in (x, scale, shift)]
            if cells:
                both = torch.cat(inputs[1:], dim=1).contiguous(memory_format=torch.channels_last)
                inputs = [inputs[0], *both.chunk(2, dim=1)]
            inputs = [t.detach().requires_grad_() for t in inputs]
            y = GpuNormSiLU.apply(*inputs, groups, 1e-5)
            exact = [t.detach().double().requires_grad_() for t in inputs]
            plain = fast.plain_norm(*exact, groups)
            assert y.dtype is dtype and y.is_contiguous(memory_format=torch.channels_last)
            found = [y, *torch.autograd.grad(y, inputs, grad.to(dtype))]
            expected = [plain, *torch.autograd.grad(plain, exact, grad.to(dtype).double())]
            for a, b in zip(found, expected, strict=True):
                assert relative_error(a, b) < limit
    x = torch.randn(1, 32, 2, 2, requires_grad=True)
    y = GpuNormSiLU.apply(x, torch.ones(1, 32, 1, 1), torch.zeros(1, 32, 1, 1), 8, 1e-5)
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):  # rather than a gradient without this part
        slope.square().sum().backward()


def check_block_with_gpu_norm():
    """Outputs and gradients of a block that has such norms stay what they are."""
    from plumbing.triton import GpuNormSiLU
    plain, calls = fast.norm_silu, []

    def counted(x, scale, shift, groups, eps=1e-5):
        calls.append(x.shape)
        return GpuNormSiLU.apply(x, scale, shift, groups, eps)

    fast.eager_cpu = lambda x: False
    x, modulation = torch.randn(1, 64, 4, 6), torch.randn(1, 128, 2, 3)
    block, found = randomise(ResBlock(64, 96, 8, 16)).to(x.device), []
    for fast.norm_silu in (counted, plain):
        y = block(x, modulation)
        found.append([y, *torch.autograd.grad(y.square().sum(), block.parameters(), allow_unused=True)])
    for a, b in zip(*found, strict=True):
        assert a is None or (a - b).norm() <= 1e-5 * (b.norm() + 10)  # some are 0 but for rounding
    assert len(calls) == 2


@pytest.mark.parametrize("enc", ["vq_f8c4", "dc_f8c4", "dcae_f32c32"])
def test_half_precision_weights_on_a_gpu(as_on_a_gpu, enc):
    model = DCSSDAE(enc, "XS", "eqm", enc_width=0.125, depth=1, input_skip=True).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        z = model.encode(x).mode()
        exact = model.decode(z, 1, x)
        model.bfloat16()
        half = model.encode(x.bfloat16()).mode()
        y = model.decode(half.bfloat16(), 1, x.bfloat16())
    assert relative_error(half, z) < 0.1 and relative_error(y, exact) < 0.1


@pytest.mark.parametrize("form", [fast.NormSiLU.apply, fast.plain_norm])
@pytest.mark.parametrize("offset", [0.0, 4.0])
def test_bf16_gradients_of_the_norms_are_as_exact_as_autocasts(form, offset):
    """Also where a group's mean is large beside its deviation, and constants cancel."""
    x = torch.randn(2, 64, 24, 24) + offset * torch.randn(1, 64, 1, 1)
    x = x.bfloat16().to(memory_format=torch.channels_last)
    scale, shift, grad = 1 + torch.randn(2, 64, 3, 3) / 2, torch.randn(2, 64, 3, 3), torch.randn(2, 64, 24, 24)

    def torchs(x, scale, shift):
        scale, shift = (nn.functional.interpolate(m, size=x.shape[2:], mode="nearest") for m in (scale, shift))
        return nn.functional.silu(nn.functional.group_norm(x, 32) * scale + shift)

    def gradients(form, dtype):
        inputs = [t.bfloat16().to(dtype).requires_grad_() for t in (x, scale, shift)]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            y = form(*inputs).to(dtype)
        return torch.autograd.grad(y, inputs, grad.bfloat16().to(dtype))

    exact = gradients(torchs, torch.float64)
    ours, autocasts = (gradients(f, torch.bfloat16) for f in (lambda *a: form(*a, 32, 1e-5), torchs))
    for a, b, c in zip(ours, autocasts, exact, strict=True):
        assert relative_error(a, c) <= 1.2 * relative_error(b, c)


@pytest.mark.parametrize("name", ["dc_f32c32", "dcae_f32c32"])
def test_autocast_keeps_the_dc_encoders_maps_in_half_precision(name):
    network, kinds = make_encoder(name, 0.125), set()
    for module in network.modules():
        if type(module).__name__ in ("DCResBlock", "DCDown", "LinearAttention", "GatedConv"):
            module.register_forward_hook(lambda module, inputs, output: kinds.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        network(torch.randn(1, 3, 32, 32))
    assert kinds == {torch.bfloat16}


@pytest.mark.parametrize("loss", ["fm", "eqm"])
def test_a_decode_after_the_first_makes_nothing_of_sizes_alone(loss, as_on_a_gpu):
    """Windows, indices, the code's tables and the time's frequencies are kept."""
    model = DCSSDAE("dc_f32c32", "XS", loss, enc_width=0.125, depth=2, input_skip=True, linear_decoder=32).eval()
    z, noise = torch.randn(1, 32, 9, 1), torch.randn(1, 3, 288, 32)  # 36 x 4 tokens: several blocks of attention
    for keeper in (fast.windows_for, fast.row_numbers):
        keeper.cache_clear()
    counts = []
    with torch.no_grad():
        for _ in range(2):
            with bench.Operations() as operations:
                condition = model.decoder.condition(z, 288, 32)
                model.decoder(noise, t=torch.full((1,), 0.5) if loss == "fm" else None, condition=condition)
            counts.append(sum(operations.all[name] for name in ("arange", "lift_fresh", "linspace", "eye")))
    assert counts[0] > 5 and counts[1] == 0


def test_operations_of_a_decode():
    """Of one image, as many for every size of the decoder with eight transformer blocks; a norm is one."""
    operations = bench.counted_decode("dc_f32c32", "XS", "eqm", 224, on_gpu=True)  # 28 x 28 tokens: blocks of attention
    assert operations.all["norm_silu"] == 40 and operations.all["embedding"] == 24
    assert operations.all.total() <= 900 and operations.kernels.total() <= 450
    assert operations.kernels["view"] == operations.kernels["empty"] == 0 < operations.all["view"]


@slow
def test_blocks_are_compiled_one_by_one(smallest):
    """Each in one graph, once for every shape of its weights; in eager code between them nothing changes."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    decoder = randomise(UViT("XS", 4)).requires_grad_(False)
    x, z, t = torch.randn(1, 3, 16, 16), torch.randn(1, 4, 2, 2), torch.rand(1)
    plain, names = decoder(x, z, t), list(decoder.state_dict())
    compile_blocks(decoder, backend=backend, fullgraph=True)
    assert relative_error(decoder(x, z, t), plain) < 1e-4 and list(decoder.state_dict()) == names
    made = len(graphs)
    decoder(2 * x, z, t)
    blocks = sum(isinstance(m, BLOCKS) for m in decoder.modules())
    assert len(graphs) == made and 8 < made < blocks == 21  # beyond 8, the compiler's own limit
    torch._dynamo.reset()


def test_kernels_of_our_own_need_a_compiler(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(fast.sysconfig, "get_path", lambda *names: HERE)
    monkeypatch.setattr(os.path, "exists", lambda path: path == os.path.join(HERE, "Python.h"))
    monkeypatch.delenv("CC", raising=False)
    there = fast.has_triton.__wrapped__
    for compiler in ("gcc", "clang", None):
        monkeypatch.setattr(fast.shutil, "which", lambda name, compiler=compiler: name == compiler or None)
        assert there(torch.device("cuda")) == (compiler is not None)
    assert not there(torch.device("cpu"))


# Operations that read a value back, so that a GPU and its host wait for each other.
READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "unique2", "_unique2")


class HostTraffic(TorchDispatchMode):
    """Counts, while it is active, what would make a GPU and its host wait for each other. The operations are the same
    on every device, so this can be counted on the CPU too.

    copies  tensors made of Python numbers or moved between devices
    reads   values read back: item(), bool(), tolist(), indexing by a mask, copies to the CPU
    """

    def __init__(self):
        super().__init__()
        self.copies, self.reads, self.paused = [], [], False

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        if self.paused:
            return out
        name = function.overloadpacket.__name__
        if name == "lift_fresh":  # torch.tensor([...])
            self.copies.append(name)
        elif name in READS:
            self.reads.append(name)
        elif name in ("index", "index_put_"):
            t = arguments[0]
            for index in arguments[1]:  # a mask, whose number of hits the host must know, or indices that lie elsewhere
                if index is not None and (index.dtype is torch.bool or index.device != t.device):
                    self.reads.append(name)
        elif name in ("_to_copy", "copy_"):
            target, source = (out, arguments[0]) if name == "_to_copy" else arguments[:2]
            if source.device != target.device:
                (self.reads if target.device.type == "cpu" else self.copies).append(name)
        return out


@pytest.mark.parametrize("what", ["decode", "training step"])
def test_nothing_waits_for_the_host(smallest, what):
    network = check.small_model("dc_f8c4", "eqm")
    z, noise = torch.randn(2, 4, 4, 4), torch.randn(2, 3, 32, 32)
    if what == "decode":
        run_once = torch.no_grad()(lambda: network.decode(z, 2, noise))
    else:
        run_once = bench.training_step(network, None, 2, 32, torch.float32, torch.device("cpu"))
    run_once()
    with HostTraffic() as traffic:
        run_once()
    assert traffic.copies == traffic.reads == []
    with HostTraffic() as traffic:
        noise * z.mean().item(), z[z > 0]
    assert len(traffic.reads) == 2
