"""Samplers: from noise and a latent to an image, in few network evaluations. Free functions, their first four arguments
the same.

  euler              flow matching (FM): integrates the learned velocity from t=1 (noise) to t=0 (data)
  gradient_descent   equilibrium matching (EqM, Wang & Du 2025, arXiv 2510.02300): descends a field that does not know
                     the time
  nesterov           the same with Nesterov's look-ahead momentum

    python evaluate.py --ckpt runs/tiny_eqm/model.safetensors --data demo --steps 1 2 4 8

Common arguments: field(x, z[, t]) -> same shape as x; x (B, 3, H, W) starting noise; z the latent (B, c, h, w), row by
row with x, or what the decoder made of it (model.Condition), of which .rows chooses some samples. Each returns
(x, nfe): the images, not clamped, and the number of network evaluations of every sample, an integer tensor (B,).
Nothing here turns gradients off: a one-step decode can be differentiated (the latent's gradient takes the local
contrast that UViT.addition multiplies with for a constant). Wrap the call in torch.no_grad() where that is not wanted.
"""
import hashlib
import itertools
import math

import torch

T_SHIFT = 4.0     # SSDD's
BASE_SHIFT = 3.0  # beside a linear base: nearer than one step, on photographs and drawn images (docs/sampling.md)


def noise_times(steps, t_shift):
    """steps + 1 times from 1 (noise) to 0 (data), t_k = (1 - k / steps) ^ t_shift: floats. ValueError unless t_shift is
    positive and finite."""
    if not 0 < t_shift < math.inf:
        raise ValueError(f"the sampler needs t_shift > 0, got t_shift={t_shift}")
    return torch.linspace(1.0, 0.0, _at_least_one(steps) + 1, dtype=torch.float64).pow(float(t_shift)).tolist()


def euler(field, x, z, steps=1, t_shift=T_SHIFT):
    """Euler steps of dx/dt = -v, where v = x_data - noise is the network's target, on noise_times.

    steps    number of evaluations, >= 1
    t_shift  > 1 makes the steps near the data finer; one step does not depend on it
    """
    for t, t_next in itertools.pairwise(noise_times(steps, t_shift)):
        v = field(x, z, torch.full((len(x),), t, device=x.device))
        # x_{k+1} = x_k + (t_k - t_{k+1}) v
        x = x + (t - t_next) * v
    return x, torch.full((len(x),), steps, dtype=torch.long, device=x.device)


def gradient_descent(field, x, z, steps=1, eta=1.0, lam=1.0, tol=0.0, last_eta=None):
    """x <- x - eta * f(x), at most `steps` times; Nesterov with no momentum.

    eta       step size, or a list of one for each step; with c = linear, 1 / lam lands on the one-step estimate
    lam       the field's scale in training; only the stopping rule uses it
    tol       adaptive stop: a sample whose rms(f) / lam falls below tol takes its last step and leaves the batch
              (0: never)
    last_eta  size of a sample's last step, which is number `steps` or the one at which tol stops it; None: eta,
              of a list its last
    """
    return nesterov(field, x, z, steps, eta, 0.0, lam, tol, last_eta)


def nesterov(field, x, z, steps=1, eta=1.0, mu=0.3, lam=1.0, tol=0.0, last_eta=None):
    """y = x_k + mu (x_k - x_{k-1}); x_{k+1} = y - eta f(y). (Nesterov 1983, textbook form with constant momentum.)

    mu    momentum in [0, 1); other arguments as in gradient_descent
    """
    sizes = list(eta) if isinstance(eta, (list, tuple)) else [eta] * _at_least_one(steps)
    if len(sizes) != steps:
        raise ValueError(f"{steps} steps need as many step sizes, got {len(sizes)}")
    if not (all(0 < size < math.inf for size in sizes) and 0 <= mu < 1 and tol >= 0):
        raise ValueError(f"the sampler needs eta > 0, 0 <= mu < 1 and tol >= 0, got eta={eta}, mu={mu}, tol={tol}")
    if last_eta is None:
        last_eta = sizes[-1]
    sizes[-1] = last_eta
    out = x.clone()
    nfe = torch.zeros(len(x), dtype=torch.long, device=x.device)
    alive = torch.arange(len(x), device=x.device)  # rows still moving: the others cost nothing any more
    previous = x
    for step in sizes:
        y = x + mu * (x - previous)
        f = field(y, z)
        nfe[alive] += 1
        previous = x
        x = y - step * f
        if tol == 0:
            continue
        rms = f.flatten(1).float().square().mean(dim=1).sqrt()  # (alive,)
        stops = rms / lam < tol
        if stops.any():
            out = out.index_copy(0, alive[stops], y[stops] - last_eta * f[stops])
            moving = ~stops
            alive, x, previous = alive[moving], x[moving], previous[moving]
            z = z[moving] if isinstance(z, torch.Tensor) else z.rows(moving)
            if len(alive) == 0:
                break
    return out.index_copy(0, alive, x), nfe


def default_steps(eqm, steps, t_shift=T_SHIFT):
    """Step sizes of EqM sampling where none is given, as the samplers' options. eqm: losses.EqM.

    With c = linear the steps are Euler's of flow matching on noise_times: one of size eta lam = 1 - t' / t takes what
    is left of the noise from t to t'. The last, 1 / lam, lands on the network's estimate, or else what is left of the
    noise would stay in the picture; `last_eta` says so for a sample that tol stops, and beside a user's eta.
    """
    if steps == 1 or eqm.kind != "linear":
        return {"eta": default_eta(eqm, steps)}
    times = noise_times(steps, t_shift)
    sizes = [(1 - t_next / t) / eqm.lam for t, t_next in itertools.pairwise(times)]
    return {"eta": sizes, "last_eta": 1.0 / eqm.lam}


def default_eta(eqm, steps):
    """-> float, the size of `steps` equal steps of EqM sampling. One: 1 / (lam c(0)), the estimate from pure noise.

    More: "trunc" and "piecewise" fall to zero with the slope 1 / (1 - a), so that a step above 1 - a overshoots
    near the data; the step is searched that leaves the least noise on a perfect field.
    """
    if steps == 1:
        return 1.0 / eqm.at_noise
    candidates = torch.arange(1, 1001, dtype=torch.float64, device="cpu") / 1000
    noise = torch.ones_like(candidates)  # 1 - g, what is left of it on the way
    for _ in range(steps):
        noise = noise - candidates * eqm.c(1 - noise)
    return candidates[noise.abs().argmin()].item() / eqm.lam


def _at_least_one(steps):
    if steps < 1 or int(steps) != steps:
        raise ValueError(f"the number of steps must be a whole number from 1 on, got {steps}")
    return int(steps)


def seeded_generator(device, *key):
    """A generator that depends on the key (numbers, strings) alone, so that a sample's noise does not depend on its
    batch or process."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little") >> 1)


def image_noise(seed, index, shape):
    """Standard normal (len(index), *shape); row i depends on (seed, index[i]) alone: no batch, process, device."""
    return torch.stack([torch.randn(shape, generator=seeded_generator("cpu", seed, int(i))) for i in index])
