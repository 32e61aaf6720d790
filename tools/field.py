"""The picture of the method: one image at six noise levels, what one step makes of each, the field, a sampling path.

    python -m tools.field --ckpt runs/eqm_s0/model.safetensors --image 3
    python -m tools.field --ckpt runs/fm_s0/model.safetensors --data photos --out pictures

Writes field.png and prints a line of numbers for each column. Rows: the image noised, from noise to data, at the
sampler's times; the one-step estimate from each; the field there, where 0 is grey, over twice its rms at the noise; the
sampler's path.
"""
import argparse
import math

import torch
import torch.nn.functional as F

from data import make_dataset
from evaluate import load_model, out_folder, psnr, shared_arguments, to8bit
from losses import fm_mix, fm_predict_x
from plumbing import flags
from plumbing.files import save_grid
from plumbing.process import guarded, setup
from sampler import euler, image_noise, noise_times

LEVELS = 6                                                   # columns, from pure noise to data
SHOWN = (0, 1, 2, 4, 8, 16)                                  # steps after which the path is shown, one a column
LEAST_TIME = 0.001                                           # of FM's last column beside a linear base
ETA_LAM, MU = 0.3, 0.3                                       # Nesterov's step and momentum: the path is seen to curve
SMALLEST_SIDE = 96                                           # pixels of the picture that an image gets at least


def estimates(model, x, e, z, t):
    """The image on its way to the noise e at times t (6,), the field there and the one-step estimate:
    (6, 3, H, W) each."""
    cfg = model.config
    x, e = x.expand(LEVELS, -1, -1, -1), e.expand(LEVELS, -1, -1, -1)
    x_t = fm_mix(x, e, t)                                    # (1 - t) x + t e, which is EqM's x_g with g = 1 - t
    z = z.expand(LEVELS, -1, -1, -1)                         # (6, c, h, w)
    if cfg["loss"] == "fm":
        field = model.decoder(x_t, z, t).float()
        return x_t, field, fm_predict_x(x_t, field, t)
    field = model.decoder(x_t, z).float()
    eqm = model.eqm
    return x_t, field, eqm.predict_x(x_t, field, 1 - t)


def euler_path(model, e, z):
    """FM: where 16 Euler steps are after 0, 1, 2, 4, 8, 16 of them. -> (6, 3, H, W)"""
    seen = []

    def recorded(x, z, t):
        seen.append(x)
        return model.decoder(x, z, t)

    last, _ = euler(recorded, e, z, max(SHOWN), model.t_shift)
    seen.append(last)
    return torch.cat([seen[k] for k in SHOWN])


def nesterov_path(model, e, z):
    """EqM: where Nesterov's descent is after 0, 1, 2, 4, 8, 16 steps. -> (6, 3, H, W)"""
    path, eta = [e], ETA_LAM / model.field_at_noise
    for steps in SHOWN[1:]:
        x, _ = model.sample(z, steps, e, method="nesterov", mu=MU, eta=eta, last_eta=eta)  # which does not land
        path.append(x)
    return torch.cat(path)


def decibels(y, x):
    return psnr((to8bit(y) - to8bit(x)).square().mean())


@torch.no_grad()
def show_field(model, dataset, i, seed, device, out):
    """field.png of image i in the folder `out`, and a line of numbers for each column."""
    if i >= len(dataset) or dataset[i] is None:
        raise ValueError(f"--image {i}: {dataset.name} has no readable image of this number, of {len(dataset)}")
    image, _ = dataset[i]
    x = image[None].to(device)                               # (1, 3, H, W)
    e = image_noise(seed, [i], x.shape[1:]).to(device)
    z = model.encode(x).mode()                               # (1, c, h, w)
    fm = model.config["loss"] == "fm"
    t = torch.tensor(noise_times(LEVELS - 1, model.t_shift))
    if fm and model.decoder.base is not None:                # its velocity is (D - x_t) / t, and nothing at t = 0
        t[-1] = LEAST_TIME
    t = t.to(device)
    x_t, field, estimate = estimates(model, x, e, z, t)
    path = euler_path(model, e, z) if fm else nesterov_path(model, e, z)

    rms = field.square().mean((1, 2, 3)).sqrt()              # (6,)
    for j, steps in enumerate(SHOWN):
        level = f"t = {t[j]:.3f}" if fm else f"g = {1 - t[j]:.3f}"
        sampler = f"{steps} of {max(SHOWN)} Euler steps" if fm else f"{steps} Nesterov steps"
        print(f"{level}: estimate {decibels(estimate[j], x[0]):.2f} dB, field rms {rms[j]:.4f}; "
              f"after {sampler} {decibels(path[j], x[0]):.2f} dB")

    enlarge = math.ceil(SMALLEST_SIDE / min(x.shape[2:]))
    rows = [x_t, estimate, field / rms[0] / 2, path]
    save_grid(out / "field.png", [F.interpolate(row, scale_factor=enlarge) for row in rows])
    print(f"wrote field.png to {out}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared_arguments(parser)
    parser.add_argument("--image", type=flags.natural, default=0, metavar="I", help="number in the data [%(default)s]")
    args = parser.parse_args()
    _, _, device = setup(args.device)
    model, size = load_model(args, device)
    out = out_folder(args)
    out.mkdir(parents=True, exist_ok=True)
    dataset = make_dataset(args.data, size, train=False, limit=args.limit, crop=args.crop, split=args.part)
    show_field(model, dataset, args.image, args.seed, device, out)


if __name__ == "__main__":
    guarded(main)
