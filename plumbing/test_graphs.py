"""CUDA graphs, on a CPU: an emulated one writes down operations and the memory that they read and write."""
import copy
import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from model import DCSSDAE
from plumbing import graphs
from test_all import randomise, relative_error


class Recording(TorchDispatchMode):
    """The operations of a call. They hold aliases of the tensors, which stay with the memory of now, as a graph does,
    whatever memory a parameter has later."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        self.operations.append((function, *tree_map_only(
            torch.Tensor, torch.Tensor.detach, (arguments, options or {}, out))))
        return out

    @torch.autocast("cpu", enabled=False)  # casts are operations of their own here
    def replay(self):
        for function, arguments, options, out in self.operations:
            for old, new in zip(tree_leaves(out), tree_leaves(function(*arguments, **options)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():  # no view, nothing in place
                    old.copy_(new)


@pytest.fixture
def recordings(monkeypatch, smallest):
    """Calls of any device without gradients are recorded; a list of these recordings."""
    made = []

    def record(function, inputs):
        made.append(Recording())
        with made[-1]:
            outputs = function(*inputs)
        return made[-1].replay, outputs

    assert not graphs.suit([torch.zeros(1)])
    monkeypatch.setattr(graphs, "suit", lambda inputs: not torch.is_grad_enabled())
    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(graphs, "current_stream", lambda t: 0)
    return made


def small_model(loss="eqm", **options):
    model = DCSSDAE("dc_f8c4", "XS", loss, enc_width=0.0625, depth=1, input_skip=True, linear_encoder=True,
                    linear_decoder=4, **options)
    return randomise(model).eval()


def eager(model, call):
    model.use_graphs = False
    with torch.no_grad():
        result = call(model)
    model.use_graphs = True
    return result


@pytest.mark.parametrize("loss", ["eqm", "fm"])
def test_the_second_call_is_recorded_and_later_ones_are_replayed(recordings, loss):
    model = small_model(loss)
    images, latents, noise = torch.randn(4, 1, 3, 16, 16), torch.randn(4, 1, 4, 2, 2), torch.randn(4, 1, 3, 16, 16)
    results = []
    with torch.no_grad():
        for x, z, e in zip(images, latents, noise):
            results.append((model.encode(x).mean, model.encode(x).logvar, model.decode(z, 1, e), model.decode(z, 3, e)))
    assert len(recordings) == 3  # encode, one step, three
    for found, x, z, e in zip(results, images, latents, noise):
        expected = eager(model, lambda m, x=x, z=z, e=e: (m.encode(x).mean, m.encode(x).logvar, m.decode(z, 1, e),
                                                          m.decode(z, 3, e)))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))  # and none is overwritten
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = [model.decode(latents[0], 1, noise[0]) for _ in range(3)]
    assert len(recordings) == 4 and torch.equal(half[0], half[2]) and not torch.equal(half[0], results[0][2])
    with torch.inference_mode():
        assert torch.equal(model.decode(latents[0], 1, noise[0]), results[0][2])
    assert len(recordings) == 4


def test_few_graphs_are_kept_and_the_oldest_go(recordings, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_KINDS", 2)
    model = small_model()

    def decode(batch, times=1, **options):
        with torch.no_grad():
            for _ in range(times):
                model.decode(torch.zeros(batch, 4, 1, 1), 2, torch.zeros(batch, 3, 8, 8), **options)
        return len(recordings)

    assert [decode(1, 3), decode(2, 3), decode(1, 2), decode(3, 3), decode(1), decode(2), decode(2)] == [
        1, 2, 2, 3, 3, 3, 4]
    assert len(graphs.known[model.decoder]) == 2
    assert decode(2, eta=0.5) == 4 and decode(2, eta=0.5) == 5 and decode(2, eta=0.25) == 5
    assert decode(2, 3, tol=0.1) == 5  # which operations run depends on values
    model.use_graphs = False
    assert decode(4, 3) == 5
    model.use_graphs = True
    copied = copy.deepcopy(model)
    assert copied.decoder not in graphs.known
    decoder = model.decoder
    del model.decoder, decoder
    gc.collect()
    assert len([m for m in graphs.known if not hasattr(m, "stages")]) == 0


def test_where_nothing_can_be_recorded_calls_stay_eager(recordings, monkeypatch):
    model, calls = small_model(), []

    def refuse(function, inputs):
        calls.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "record", refuse)
    z, noise = torch.randn(1, 4, 2, 2), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        first = model.decode(z, 1, noise)
        with pytest.warns(UserWarning, match="no CUDA graph of UViT: operation not permitted"):
            second = model.decode(z, 1, noise)
        third = model.decode(z, 1, noise)
    assert torch.equal(first, second) and torch.equal(first, third) and len(calls) == 1


def train_a_step(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model.decode(torch.ones(1, 4, 2, 2), 1, torch.ones(1, 3, 16, 16)).square().sum().backward()
    optimizer.step()


def swap_data(model):
    for p in model.parameters():
        p.data = p.data.flip(0)


def replace_a_module(model):
    model.decoder.conv_out = randomise(torch.nn.Conv2d(model.decoder.channels, 3, 3, padding=1), seed=1)


CHANGES = {
    "trained": train_a_step,
    "loaded": lambda model: model.load_state_dict(randomise(copy.deepcopy(model), seed=1).state_dict()),
    "assigned": lambda model: model.load_state_dict(randomise(copy.deepcopy(model), seed=1).state_dict(), assign=True),
    "swapped": swap_data,
    "cast": lambda model: model.double(),
    "turned": lambda model: model.to(memory_format=torch.channels_last),
    "replaced": replace_a_module,
    "frozen": lambda model: model.requires_grad_(False),
    "in training mode": lambda model: model.train(),
    "with other statistics": lambda model: model.decoder.norm_z.running_mean.add_(1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_no_graph_uses_old_weights(recordings, change):
    model = small_model()
    z, noise = torch.randn(1, 4, 2, 2), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        before = [model.decode(z, 1, noise) for _ in range(3)][-1]
    CHANGES[change](model)
    with torch.no_grad():
        after = [model.decode(z, 1, noise) for _ in range(3)]
    expected = eager(model, lambda m: m.decode(z, 1, noise))
    assert all(torch.equal(y, expected) for y in after)
    assert torch.equal(before, expected) == (change in ("frozen", "turned", "in training mode"))
    again = len(recordings)
    y = model.decode(z, 1, noise)  # gradients on: eager
    assert len(recordings) == again and y.requires_grad == (change != "frozen")
    assert relative_error(y.detach(), expected) < 1e-4
