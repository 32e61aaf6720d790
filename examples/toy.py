"""The method in two dimensions: flow matching (FM) and equilibrium matching (EqM) side by side, in one picture.

    python -m examples.toy                  # writes toy.png in about half a minute of a CPU core; needs matplotlib

An "image" is a point (x1, x2) of a circle, its latent is z = x1. Two images fit a latent, (x1, s) and (x1, -s), as many
fit that of a real picture: what the latent does not say is left to the decoder. Losses and samplers are those of
losses.py and sampler.py; to them a point is an image of one pixel and two channels, (2, 1, 1). The picture's columns:
  1  what the network says where x1 = 0.5: FM's velocity at t = 0.5; EqM's field, against which its arrows point
  2  one-step estimates, from pure noise (red) to little noise (blue): means of the images that fit what is seen. From
     pure noise both fit, and the circle collapses to a line (less so for EqM, which must guess how much is noise)
  3  paths from noise to an image for x1 = 0.5; gradient descent and Nesterov (red) stop where the field is small
  4  the decoder's one step (red), its many (grey), and the one step of a student distilled from the many (blue)
"""
import copy

import torch
from torch import nn

from losses import EqM, eqm_loss, fm_loss, fm_mix, fm_predict_x
from sampler import euler, gradient_descent, nesterov

RADIUS = 2.0                    # of the circle; the noise has deviation 1
STEPS, STUDENT_STEPS, TEACHER_STEPS, BATCH, LR = 1000, 200, 8, 256, 4e-3
ETA, MU, TOL = 0.3, 0.5, 0.05   # EqM's step size, momentum, and the root mean square of the field at which it stops
LANDING = 1.0                   # the step that lands on the estimate, (1 - g) / c(g) at the data; from noise it is 1
NOISE_END = 0.0                 # above 0 FM trains more on the noise end: t = sigmoid(n), n ~ N(NOISE_END, 1)
EQM = EqM("linear")             # the field's length is c(g) = 1 - g times that of e - x


def draw_images(n):
    """n points of the circle (n, 2, 1, 1), their latents (n, 1, 1, 1), and noise like the points."""
    angle = 2 * torch.pi * torch.rand(n)
    x = RADIUS * torch.stack([angle.cos(), angle.sin()], dim=1)[..., None, None]
    return x, x[:, :1], torch.randn(n, 2, 1, 1)


class Decoder(nn.Module):
    """FM: (noisy image, latent, time) -> velocity. EqM: (noisy image, latent) -> field."""

    def __init__(self, has_time):
        super().__init__()
        self.has_time = has_time
        width = 64
        self.layers = nn.Sequential(nn.Linear(4, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                    nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x, z, t=None):
        t = t if self.has_time else torch.zeros(len(x))                                 # (B,)
        return self.layers(torch.cat([x.flatten(1), z.flatten(1), t[:, None]], dim=1))[..., None, None]

    def matching(self, x, e, z, level):
        """The loss and the one-step estimate at FM's t (1: noise) or EqM's g (0: noise)."""
        if self.has_time:
            x_t = fm_mix(x, e, level)
            v = self(x_t, z, level)
            return fm_loss(v, x, e).mean(), fm_predict_x(x_t, v, level)
        x_g = EQM.mix(x, e, level)
        f = self(x_g, z)
        return eqm_loss(f, x, e, level, EQM).mean(), EQM.predict_x(x_g, f, level)

    def decode(self, e, z, steps):
        if self.has_time:
            return euler(self, e, z, steps)[0]
        return gradient_descent(self, e, z, steps, ETA, last_eta=LANDING if steps > 1 else 1.0)[0]


def step_loss(decoder, x, z, e, teacher):
    if teacher:  # one step from pure noise should end where the teacher's many from that noise do
        with torch.no_grad():
            x = teacher.decode(e, z, TEACHER_STEPS)
        level = torch.full((BATCH,), 1.0 if decoder.has_time else 0.0)
    else:
        level = (torch.randn(BATCH) + NOISE_END).sigmoid() if decoder.has_time else torch.rand(BATCH)
    return decoder.matching(x, e, z, level)[0]


def train(decoder, steps, teacher=None):
    optimizer = torch.optim.Adam(decoder.parameters(), LR, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        step_loss(decoder, *draw_images(BATCH), teacher).backward()
        optimizer.step()
        schedule.step()
    return decoder


def posterior_mean(x_t, z, t):
    """The mean of (z, s) and (z, -s), each weighted by its probability to have become x_t (docs/derivations.md)."""
    s = (RADIUS ** 2 - z.square()).clamp(min=0).sqrt()
    return torch.cat([z, s * torch.tanh((1 - t) * s * x_t[:, 1:] / t ** 2)], dim=1)


def off_circle(x):
    return (x.flatten(1).norm(dim=1) - RADIUS).square().mean().sqrt()                   # root mean square


def distance(x, y):
    return (x - y).flatten(1).norm(dim=1).square().mean().sqrt()


@torch.no_grad()
def show(axes, decoder, student):
    name, letter = ("FM", "t") if decoder.has_time else ("EqM", "g")
    x, z, e = draw_images(600)
    z_half, line = torch.full((225, 1, 1, 1), 0.5), torch.linspace(-2.7, 2.7, 15)
    grid = torch.cartesian_prod(line, line)[..., None, None]                            # (225, 2, 1, 1)
    arrows = decoder(grid, z_half, torch.full((225,), 0.5)) * (1 if decoder.has_time else -1)
    axes[0].quiver(*grid.flatten(1).T, *arrows.flatten(1).T, angles="xy")
    for data_share, color in ((0.0, "tab:red"), (0.4, "tab:orange"), (0.7, "tab:green"), (0.9, "tab:blue")):
        level = torch.full((600,), 1 - data_share if decoder.has_time else data_share)
        _, estimate = decoder.matching(x, e, z, level)
        axes[1].scatter(*estimate.flatten(1).T, s=3, color=color)
        print(f"{name}, one step from {letter} = {level[0]:.1f}: {off_circle(estimate):.2f} off the circle")
        if decoder.has_time:
            mean = posterior_mean(fm_mix(x, e, level), z, level[0])
            print(f"    posterior mean {off_circle(mean):.2f} off, the estimate {distance(estimate, mean):.2f} from it")
    runs = [("Euler", euler, {"steps": TEACHER_STEPS})]
    if not decoder.has_time:
        stop = {"steps": 100, "eta": ETA, "tol": TOL, "last_eta": LANDING}
        runs = [("gradient descent", gradient_descent, stop), ("Nesterov", nesterov, stop | {"mu": MU})]
    for color, (label, sampler, options) in zip(("tab:blue", "tab:red"), runs):
        end, nfe = sampler(decoder, e, z, **options)
        print(f"{name}, {label}: {nfe.float().mean():.1f} evaluations, {off_circle(end):.2f} off the circle")
        for start in e[:12, None]:
            path = []

            def recorded(*seen):
                path.append(seen[0])
                return decoder(*seen)

            end, _ = sampler(recorded, start, z_half[:1], **options)
            axes[2].plot(*torch.cat([*path, end]).flatten(1).T, "o-", color=color, markersize=2, linewidth=0.7)
    many = decoder.decode(e, z, TEACHER_STEPS)
    axes[3].scatter(*many.flatten(1).T, s=3, color="0.6")
    for label, network, color in (("one step", decoder, "tab:red"), ("one step, distilled", student, "tab:blue")):
        one = network.decode(e, z, 1)
        axes[3].scatter(*one.flatten(1).T, s=3, color=color)
        print(f"{name}, {label}: {off_circle(one):.2f} off the circle, {distance(one, many):.2f} from the many steps")
    for axis, title in zip(axes, ("field", "one-step estimates", "paths", "one step, many, distilled")):
        axis.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal", title=f"{name}: {title}")


def main():
    import matplotlib.pyplot as plt
    torch.set_num_threads(1)  # more only wait for one another on tensors so small
    figure, rows = plt.subplots(2, 4, figsize=(16, 8.4), layout="constrained")
    for has_time, axes in zip((True, False), rows):
        torch.manual_seed(0)
        decoder = train(Decoder(has_time), STEPS)
        show(axes, decoder, train(copy.deepcopy(decoder), STUDENT_STEPS, decoder))
    figure.savefig("toy.png", dpi=80)


if __name__ == "__main__":
    main()
