"""The optimiser's side of a step: Muon, the weights' average, and steps that do nothing where numbers are not finite.

Whether they are is known on the device alone: `good` is a bool tensor there, and nobody waits for it.
"""
from contextlib import contextmanager

import torch

ADAM_BETAS = (0.9, 0.99)  # memory of about 10 steps of the gradient, 100 of its square
MUON_MOMENTUM = 0.95      # memory of about 20 steps of the gradient
MUON_RMS = 0.2            # root mean square of the entries of Muon's steps, over lr
MUON_SMALLEST = 16        # rows and columns of the matrices that Muon trains


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal, for weights that are matrices: all directions of a weight learn equally
    fast, not only the few that a gradient points to (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    A convolution (out, in, k, k) is a matrix (out, in k k). The entries of a step have the root mean square MUON_RMS,
    about that of Adam's, so that both share one learning rate (Liu et al. 2025, arXiv 2502.16982, section 2.2).
    """

    def __init__(self, parameters, lr, weight_decay):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, good):
        """One step where `good`, a bool tensor, is true, else none."""
        group = self.param_groups[0]
        by_shape = {}  # matrices of one shape are made orthogonal together
        for p in group["params"]:
            if p.grad is None:
                continue
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            momentum = self.state[p]["momentum"]
            grad = torch.where(good, p.grad, momentum)  # what is not finite would stay in there
            momentum.lerp_(grad, 1 - MUON_MOMENTUM)
            update = grad.lerp(momentum, MUON_MOMENTUM).flatten(1)                    # Nesterov's; (rows, columns)
            by_shape.setdefault(update.shape, []).append((p, update))
        for shape, members in by_shape.items():
            with without_tf32():
                updates = orthogonal(torch.stack([update for _, update in members]))  # (n, rows, columns)
            size = group["lr"] * MUON_RMS * max(shape) ** 0.5  # entries of an orthogonal one: 1 / sqrt(max(shape))
            for (p, _), update in zip(members, updates):
                p.mul_(1 - good * group["lr"] * group["weight_decay"])
                p.sub_(good * size * update.view(p.shape))


def orthogonal(matrices):
    """(n, rows, columns) -> nearly U V' of each U S V': all singular values go to about 1, between 0.7 and 1.2, by five
    Newton-Schulz steps X <- P X, P = a + b X X' + c (X X')^2, with Jordan's coefficients. Zero stays zero.

    The steps are taken by X X' alone, a third of the work where a convolution has 9 times as many columns as rows: as
    all of this commutes, the next X X' is P X X' P.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    tiny = torch.finfo(x.dtype).tiny
    x = x / x.abs().amax(dim=(1, 2), keepdim=True).clamp(min=tiny)                    # or squares would underflow
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=tiny)
    one = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    gram, product = x @ x.mT, one
    for _ in range(5):
        factor = a * one + b * gram + c * gram @ gram                                 # P
        product = factor @ product
        gram = factor @ gram @ factor
    x = product @ x
    return x.mT if is_tall else x


@contextmanager
def without_tf32():
    """Products in float32: where rounding makes an eigenvalue of X X' negative, the steps make it grow."""
    products = torch.backends.cuda.matmul
    before, products.allow_tf32 = products.allow_tf32, False
    try:
        yield
    finally:
        products.allow_tf32 = before


def is_matrix(p):
    """Whether a weight is Muon's: of a linear layer or a convolution, and not so narrow as those at the image."""
    return p.ndim in (2, 4) and min(p.flatten(1).shape) >= MUON_SMALLEST


def make_optimizers(parameters, kind, lr, weight_decay, device):
    """{name in a checkpoint: optimiser}: AdamW for all weights, or with kind "muon" for those that are no matrices.
    Only weights of convolutions and linear layers decay."""
    matrices = []
    if kind == "muon":
        matrices = [p for p in parameters if is_matrix(p)]
        parameters = [p for p in parameters if not is_matrix(p)]
    optimizers = {"optimizer": adamw(parameters, lr, weight_decay, device)}
    if matrices:
        optimizers["muon"] = Muon(matrices, lr, weight_decay)
    return optimizers


def adamw(parameters, lr, weight_decay, device, betas=ADAM_BETAS):
    """AdamW whose step reads `good` on the device; Apple's GPUs have no fused one."""
    parameters = list(parameters)
    groups = [{"params": [p for p in parameters if p.ndim in (2, 4)], "weight_decay": weight_decay},
              {"params": [p for p in parameters if p.ndim not in (2, 4)], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=device.type != "mps")


def step_if(good, optimizers):
    """A step of each optimiser, which changes nothing where `good`, a bool tensor, is false."""
    for optimizer in optimizers:
        if isinstance(optimizer, Muon):
            optimizer.step(good)
        elif optimizer.param_groups[0]["fused"]:
            optimizer.found_inf = (~good).to(torch.float32)
            optimizer.step()
        elif good:
            optimizer.step()


def set_learning_rate(optimizers, lr):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


class Average:
    """The exponential average `ema` of a model's weights and buffers (the latents' statistics too): another model of
    the same shapes, which is what is saved."""

    def __init__(self, ema, model):
        pairs = [*zip(ema.state_dict().values(), model.state_dict().values(), strict=True)]
        self.averages = [average for average, _ in pairs if average.is_floating_point()]
        self.values = [value for average, value in pairs if average.is_floating_point()]
        self.others = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, decay, step, good):
        """ema <- decay * ema + (1 - decay) * model; faster in the first steps, a copy before step 0; nothing where
        `good`, a bool tensor, is false."""
        decay = min(decay, (1 + step) / (10 + step)) if step >= 0 else 0.0
        weight = good.to(self.averages[0].dtype) * (1 - decay)
        if decay == 0:  # a copy to the last bit; slow on GPUs: one kernel for each tensor
            torch._foreach_lerp_(self.averages, self.values, [weight] * len(self.averages))
        else:  # what does not train stays as it is, to the last bit
            changes = torch._foreach_sub(self.values, self.averages)
            torch._foreach_mul_(changes, weight)
            torch._foreach_add_(self.averages, changes)
        for average, value in self.others:
            average.copy_(value)
