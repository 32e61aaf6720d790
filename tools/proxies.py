"""What makes latents easy or hard to generate, measured on the shards of tools.latents without training anything.

    python -m tools.proxies latents_a latents_b                    # a row of the table for each

numbers     c x h x w of an image
high        share of the latents' power above half the Nyquist frequency, their mean removed: white noise has 0.80, on
            4 x 4 cells 0.69, as most frequencies of a grid lie there. Smooth latents, with less, are learned sooner
            (Skorokhodov et al. 2025, arXiv 2502.14831)
neighbours  how much of a cell's variance its 8 neighbours tell: R^2 of a linear fit with bias to all their channels,
            on latents that were not in the fit. 0: cells are independent, 1: a cell is known from its neighbours
deviation   of the channels, least to largest. Channels are normalised first, as the generator sees them
None of these says what the latents are good for: read them beside the reconstruction and a generator's distance.
"""
import argparse
import math

import torch
import torch.nn.functional as F

from plumbing import flags
from plumbing.process import guarded
from tools.latents import Latents

HELD_OUT = 4  # one latent of so many scores the fit


def high_share(z):
    """Share of the power of z (n, c, h, w) at more than a quarter of a cycle a cell, rows and columns together (the
    radius), the mean of all latents removed; None for a single cell."""
    h, w = z.shape[2:]
    if h * w == 1:
        return None
    power = torch.fft.fft2(z - z.mean((0, 2, 3), keepdim=True)).abs().square().sum((0, 1))                     # (h, w)
    radius = torch.hypot(torch.fft.fftfreq(h)[:, None], torch.fft.fftfreq(w))
    return float(power[radius > 0.25].sum() / power.sum())


def neighbours(z):
    """z (n, c, h, w), h, w >= 3 -> (cells with 8 neighbours, c) and these neighbours with a column of ones (cells,
    8 c + 1), float64."""
    c = z.shape[1]
    around = F.unfold(z.double(), 3).unflatten(1, (c, 9)).permute(0, 3, 1, 2).reshape(-1, c, 9)         # (cells, c, 9)
    centre = around[:, :, 4]
    others = torch.cat([around[:, :, :4], around[:, :, 5:]], dim=2).flatten(1)
    return centre, torch.cat([others, others.new_ones(len(others), 1)], dim=1)


def predictability(z):
    """R^2 of a cell from its 8 neighbours, all channels together, on every HELD_OUT-th latent; None for latents of
    fewer than 3 x 3 cells, or too few for the fit."""
    held_out = torch.arange(len(z)) % HELD_OUT == 0
    if min(z.shape[2:]) < 3 or (~held_out).sum() * (z.shape[2] - 2) * (z.shape[3] - 2) < 10 * (8 * z.shape[1] + 1):
        return None
    y, x = neighbours(z[~held_out])
    weight = torch.linalg.solve(x.T @ x + 1e-6 * len(x) * torch.eye(x.shape[1]).double(), x.T @ y)  # (8 c + 1, c)
    y, x = neighbours(z[held_out])
    return 1 - float((y - x @ weight).square().sum() / (y - y.mean(0)).square().sum())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="DIR", help="shards of tools.latents")
    parser.add_argument("--limit", type=flags.count, default=2048, metavar="N", help="latents of each, evenly spread "
                        "[%(default)s]")
    args = parser.parse_args()
    print(f"{'':24s} {'numbers':>16s} {'high':>6s} {'neighbours':>10s} {'deviation':>14s}")
    for folder in args.folders:
        latents = Latents(folder)
        count = min(args.limit, len(latents))
        z = torch.stack([latents[i * len(latents) // count][0] for i in range(count)])
        if z.ndim == 5:  # --flip: the images themselves
            z = z[:, 0]
        z = (z - latents.mean) / latents.std
        values = [f"{'-':>{width}s}" if value is None else f"{value:{width}.3f}"
                  for value, width in ((high_share(z), 6), (predictability(z), 10))]
        shape = " x ".join(map(str, latents.shape))
        print(f"{folder[-24:]:24s} {shape + ' =' + str(math.prod(latents.shape)).rjust(5):>16s} {' '.join(values)} "
              f"{float(latents.std.min()):6.3f} {float(latents.std.max()):7.3f}")


if __name__ == "__main__":
    guarded(main)
