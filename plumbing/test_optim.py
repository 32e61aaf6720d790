"""The mathematics of a step: Muon, AdamW's steps that change nothing, the weights' average.

    python -m pytest plumbing
"""
import pytest
import torch
from torch import nn

from plumbing.optim import Average, Muon, adamw, make_optimizers, orthogonal, set_learning_rate, step_if
from test_all import relative_error

GOOD, BAD = torch.tensor(True), torch.tensor(False)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 24, 216), (2, 216, 24)])
def test_orthogonal_against_the_singular_value_decomposition(shape):
    g = torch.Generator().manual_seed(0)
    m = torch.randn(shape, generator=g, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(m, full_matrices=False)
    inside = u.mT @ orthogonal(m) @ vh.mT  # diagonal, about 1: the same directions, of equal length
    values = inside.diagonal(dim1=1, dim2=2)
    assert (inside - torch.diag_embed(values)).abs().max() < 1e-12
    assert values.max() < 1.21 and values.median() > 0.68 and values.min() > 0
    # Gradients of any size, also where their squares are no more float32: behind layers that start at zero.
    m = m.float()
    for size in (1e-38, 1e-30, 1e30):
        torch.testing.assert_close(orthogonal(size * m), orthogonal(m), rtol=0, atol=1e-3)
    # In float32, with singular values from 1 to 1e-6: the small ones are still small, none has grown beyond.
    ill = (u * torch.logspace(0, -6, u.shape[2])).matmul(vh).float()
    values = torch.linalg.svdvals(orthogonal(ill))
    assert values.max() < 1.21 and values[:, 0].min() > 0.68
    assert not orthogonal(torch.zeros(shape)).any()


def test_muons_step_against_its_formula_and_torchs_own():
    g, lr, decay = torch.Generator().manual_seed(0), 0.1, 0.25
    weights = [torch.randn(shape, generator=g) for shape in ((16, 32), (32, 16, 3, 3))]
    ours = [nn.Parameter(weights[0].clone()), nn.Parameter(weights[1].contiguous(memory_format=torch.channels_last))]
    muon, moments = Muon(ours, lr, decay), [torch.zeros_like(w) for w in weights]
    theirs = [nn.Parameter(w.flatten(1).clone()) for w in weights]
    has_peer = hasattr(torch.optim, "Muon")  # torch 2.9
    if has_peer:
        peer = torch.optim.Muon(theirs, lr=lr, weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for good in (GOOD, GOOD, BAD, GOOD):
        before, expected = [p.detach().clone() for p in ours], []
        for k, (p, q) in enumerate(zip(ours, theirs)):
            grad = torch.randn(p.shape, generator=g)
            p.grad, q.grad = grad, grad.flatten(1)
            if not good:
                p.grad = grad / 0
                continue
            moments[k] = 0.95 * moments[k] + 0.05 * grad
            update = (0.05 * grad + 0.95 * moments[k]).flatten(1)
            direction = orthogonal(update[None])[0].view(p.shape)
            expected.append(before[k] * (1 - lr * decay) - lr * 0.2 * max(update.shape) ** 0.5 * direction)
        muon.step(good)
        for k, p in enumerate(ours):
            if good:
                assert relative_error(p.detach(), expected[k]) < 1e-6
            else:  # a step that is not finite leaves no trace
                assert torch.equal(p, before[k]) and muon.state[p]["momentum"].isfinite().all()
        if good and has_peer:
            peer.step()
    if has_peer:  # its products are in bf16
        for w, p, q in zip(weights, ours, theirs):
            assert relative_error(p.detach().flatten(1) - w.flatten(1), q.detach() - w.flatten(1)) < 0.03


@pytest.mark.parametrize("fused,decay", [(True, 0.25), (False, 0.25), (True, 0.0)])
def test_adamw_against_its_formula_and_a_step_that_is_not_finite(fused, decay):
    g, lr, eps = torch.Generator().manual_seed(0), 0.1, 1e-8
    start = torch.randn((4, 3) if decay else 12, generator=g)  # only weights of convolutions and linear layers decay
    p = nn.Parameter(start.clone())
    optimizer = adamw([p], 1.0, 0.25, torch.device("cpu" if fused else "mps"))
    assert optimizer.param_groups[0]["fused"] is fused
    set_learning_rate([optimizer], lr)
    m = v = torch.zeros_like(start)
    expected = start
    for step in range(1, 4):
        p.grad = torch.randn(p.shape, generator=g)
        m, v = 0.9 * m + 0.1 * p.grad, 0.99 * v + 0.01 * p.grad**2
        direction = m / (1 - 0.9**step) / ((v / (1 - 0.99**step)).sqrt() + eps)
        expected = expected * (1 - lr * decay) - lr * direction
        step_if(GOOD, [optimizer])
        assert relative_error(p.detach(), expected) < 1e-6
        before = p.detach().clone()
        p.grad = torch.full_like(p, float("nan"))
        step_if(BAD, [optimizer])
        assert torch.equal(p, before) and optimizer.state[p]["step"] == step


def test_which_weights_are_muons():
    layers = nn.ModuleList([nn.Linear(32, 16), nn.Conv2d(16, 16, 3), nn.Linear(15, 32), nn.Conv2d(1, 16, 3)])
    optimizers = make_optimizers([*layers.parameters()], "muon", 0.1, 0.0, torch.device("cpu"))
    of_muon = optimizers["muon"].param_groups[0]["params"]
    assert [p.shape for p in of_muon] == [layers[0].weight.shape, layers[1].weight.shape]
    assert [len(group["params"]) for group in optimizers["optimizer"].param_groups] == [2, 4]
    assert list(make_optimizers([*layers.parameters()], "adamw", 0.1, 0.0, torch.device("cpu"))) == ["optimizer"]
    assert list(make_optimizers([*layers[2].parameters()], "muon", 0.1, 0.0, torch.device("cpu"))) == ["optimizer"]


def test_the_average_follows_its_formula():
    torch.manual_seed(0)
    model, ema = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    nn.init.normal_(model.weight)
    model.running_mean.normal_(), model.num_batches_tracked.fill_(7)
    average, start = Average(ema, model), torch.ones(3)
    average.update(0.9, 2, BAD)
    assert torch.equal(ema.weight, start)
    average.update(0.9, 2, GOOD)  # decay (1 + 2) / (10 + 2)
    assert torch.allclose(ema.weight, 0.25 * start + 0.75 * model.weight)
    assert torch.allclose(ema.running_mean, 0.75 * model.running_mean) and ema.num_batches_tracked == 7
    assert torch.equal(ema.running_var, model.running_var)  # what does not move stays to the last bit
    before = ema.weight.clone()
    average.update(0.9, 1000, GOOD)
    assert torch.allclose(ema.weight, 0.9 * before + 0.1 * model.weight)
    average.update(0.9, -1, GOOD)  # before it starts: a copy
    assert torch.equal(ema.weight, model.weight)
