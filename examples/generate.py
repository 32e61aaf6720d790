"""What a tokenizer is for: a small diffusion transformer on its latents, and images from it.

    python -m tools.latents --ckpt runs/deep_eqm/model.safetensors --data demo --size 64 --limit 20000 --out latents
    python -m examples.generate --latents latents --ckpt runs/deep_eqm/model.safetensors    # or torchrun ... -m

The network is DiT (Peebles and Xie 2022, arXiv 2212.09748), one token a cell of the latent; trained by flow matching on
straight lines, as SiT (Ma et al. 2024, arXiv 2401.08740), with the signs of losses.py; sampled by sampler.euler with
equal steps. Latents are normalised by the manifest's mean and deviation. Labels in the shards make the generator
class-conditional; there is no guidance. Every evaluation writes samples.png and, given --features, the Frechet distance
between generated images and as many of the part of the data that the latents were made of.
"""
import copy
import itertools
import json
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_

from data import TrainBatches, make_dataset, make_loader
from encoder import start_at_zero
from evaluate import to8bit
from fid import Statistics, distance_or_none, load_features, metric_of
from losses import draw, fm_loss, fm_mix
from model import DCSSDAE, time_embedding
from plumbing.checkpoint import Run, compare_flags, open_run
from plumbing.files import read_tensors, save_grid, whole
from plumbing.flags import count, make_parser
from plumbing.optim import Average, make_optimizers, set_learning_rate, step_if
from plumbing.process import autocast, data_parallel, guarded, say, start, summed
from sampler import euler, image_noise, seeded_generator
from tools.latents import Latents, encoder_sha256
from train import evaluation_is_due, learning_rate, millions, run_arguments

TIME_FEATURES = 256                                          # cosines and sines of the time, as in DiT
HEAD_WIDTH = 64                                              # channels of an attention head
BATCH = 64                                                   # images generated at a time by a process


def get_args(argv=None):
    p = make_parser(__doc__, "DiT-S, B, L, XL: --width 384, 768, 1024, 1152 and --depth 12, 12, 24, 28.")
    add = p.add_argument
    add("--latents", dest="data", metavar="DIR", type=str, required=True, help="shards of tools.latents")
    add("--ckpt", metavar="FILE", type=str, required=True, help="the tokenizer that made them, or its student")
    add("--width", type=count, default=256, help=f"channels of a token, a multiple of {HEAD_WIDTH} [%(default)s]")
    add("--depth", type=count, default=6, help="transformer blocks [%(default)s]")
    add("--eval_steps", type=count, default=50, help="sampler steps in the latent space [%(default)s]")
    add("--features", metavar="F", type=str, help="of the Frechet distance: inception, dinov2 or a file")
    run_arguments(p)
    p.set_defaults(out="runs/generator", steps=20_000, batch_size=64, warmup=100, weight_decay=0.0, compile=False)
    args = p.parse_args(argv)
    if args.width % HEAD_WIDTH:
        p.error(f"--width {args.width} is not a multiple of {HEAD_WIDTH}, the width of an attention head")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# The network

def modulated(x, shift, scale):
    """LayerNorm without parameters, then scale and shift (B, 1, width)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Block(nn.Module):
    """Attention and MLP; each is scaled, shifted and gated by the condition, and starts at zero (adaLN-Zero)."""

    def __init__(self, width):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.ada = nn.Linear(width, 6 * width)
        start_at_zero(self.ada)

    def forward(self, x, condition):  # (B, n, width), (B, width)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.ada(F.silu(condition))[:, None].chunk(6, dim=2)
        qkv = self.qkv(modulated(x, shift_a, scale_a)).unflatten(2, (3, -1, HEAD_WIDTH))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                                # (B, heads, n, .) each
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)              # (B, n, width)
        x = x + gate_a * self.proj(a)
        return x + gate_m * self.mlp(modulated(x, shift_m, scale_m))


class DiT(nn.Module):
    """(noisy latent (B, c, h, w), labels (B,) or None, time (B,)) -> velocity (B, c, h, w)."""

    def __init__(self, shape, width, depth, classes=0):
        super().__init__()
        self.config = {"shape": list(shape), "width": width, "depth": depth, "classes": classes}
        self.time = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes, width) if classes else None
        self.token = nn.Linear(shape[0], width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.ada, self.out = nn.Linear(width, 2 * width), nn.Linear(width, shape[0])
        start_at_zero(self.ada)
        start_at_zero(self.out)

    def forward(self, x, labels, t):
        condition = self.time(time_embedding(t, TIME_FEATURES))
        if self.label is not None:
            condition = condition + self.label(labels)
        tokens = self.token(x.flatten(2).mT) + self.places(*x.shape[2:], x.device)                      # (B, hw, width)
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = self.ada(F.silu(condition))[:, None].chunk(2, dim=2)
        return self.out(modulated(tokens, shift, scale)).mT.unflatten(2, x.shape[2:])

    def places(self, h, w, device):
        """Sinusoids of each cell's row and column, which time_embedding takes in thousandths: (hw, width)."""
        rows, columns = torch.cartesian_prod(torch.arange(h, device=device), torch.arange(w, device=device)).T
        half = self.config["width"] // 2
        return torch.cat([time_embedding(axis / 1000, half) for axis in (rows, columns)], dim=1)

    def save(self, path):
        with whole(path) as temporary, open(temporary, "wb") as file:
            file.write(safetensors.torch.save(self.state_dict(), {"config": json.dumps(self.config)}))

    @classmethod
    def load(cls, path):
        state, metadata = read_tensors(path)
        model = cls(**json.loads(metadata["config"]))
        model.load_state_dict(state)
        return model.requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling and its evaluation

def open_latents(args, tokenizer):
    """The Latents of --latents, if they are those of --ckpt. ValueError."""
    latents = Latents(args.data)
    if latents.manifest.get("encoder_sha256") != encoder_sha256(tokenizer):
        raise ValueError(f"the latents in {args.data} are of another encoder than that in {args.ckpt}, whose decoder "
                         "cannot read them: give the model that made them, or make them anew with tools.latents")
    unlabelled = int((latents.labels < 0).sum())
    if latents.classes and unlabelled:
        raise ValueError(f"{unlabelled} of the latents in {args.data} have no class, the others have: make them of "
                         "images that are all in folders of classes, or none")
    return latents


@torch.no_grad()
def generate(ema, tokenizer, latents, args, rank, world, device, dtype):
    """Batches of this process's share of --eval_images images (b, 3, H, W); the classes of the latents take turns."""
    size, classes = latents.manifest["size"], torch.from_numpy(latents.labels).unique()
    numbers = list(range(rank, args.eval_images, world))
    for index in (numbers[k:k + BATCH] for k in range(0, len(numbers), BATCH)):
        labels = classes[torch.tensor(index) % len(classes)].to(device) if latents.classes else None
        noise = image_noise(args.seed, index, latents.shape).to(device)
        with autocast(device, dtype):
            z, _ = euler(ema, noise, labels, args.eval_steps, t_shift=1.0)
            z = z.float() * latents.std.to(device) + latents.mean.to(device)
            pixels = image_noise(args.seed, [k + args.eval_images for k in index], (3, size, size))  # not the latents'
            yield tokenizer.decode(z, 1, pixels.to(device)).float()


def statistics_of(images, features, device):
    """Statistics of the features of batches of images, over all processes."""
    statistics = Statistics(features.dim, device)
    for x in images:
        statistics.update(features(to8bit(x.to(device))))
    statistics.all_reduce()
    return statistics


def statistics_of_originals(latents, features, args, rank, world, device):
    """Statistics of --eval_images images of the data that the latents were made of."""
    made_of = latents.manifest
    originals = make_dataset(made_of["data"], made_of["size"], False, limit=args.eval_images, crop=made_of["crop"],
                             split=made_of["part"])
    loader = make_loader(originals, BATCH * world, train=False, rank=rank, world=world)
    return statistics_of((x for x, _ in loader), features, device)


def validate(run, ema, tokenizer, latents, features, reference, dtype):
    """Generate: samples.png, a line of the log, and given features the distance to the Statistics `reference`."""
    with run.evaluating():
        images = generate(ema, tokenizer, latents, run.args, run.rank, run.world, run.device, dtype)
        first = next(images)
        values = {"name": "samples"}
        if features:
            statistics = statistics_of(itertools.chain([first], images), features, run.device)
            values[metric_of(run.args.features)] = distance_or_none(statistics, reference)
        if run.rank == 0:
            save_grid(Path(run.args.out, "samples.png"), [*first.split(8)])
            run.log.write(run.done, eval=[values])
            run.bar.write(f"step {run.done}: {values}")


# ---------------------------------------------------------------------------------------------------------------------
# Training

def batch_of(latents, keys, seed):
    """[(epoch, i)] -> normalised latents (b, c, h, w), of an image or by chance its mirror image; labels (b,)."""
    rows = []
    for epoch, i in keys:
        z, _ = latents[i]
        if z.ndim == 4:
            z = z[torch.randint(2, (), generator=seeded_generator("cpu", seed, epoch, i))]
        rows.append(z)
    return (torch.stack(rows) - latents.mean) / latents.std, torch.from_numpy(latents.labels[[i for _, i in keys]])


def main():
    args = get_args()
    rank, world, device, dtype = start(args)
    tokenizer = DCSSDAE.load(args.ckpt, device)
    latents = open_latents(args, tokenizer)
    checkpoint, evaluated = open_run(args, rank, world)
    if checkpoint:
        compare_flags(checkpoint, args, ("width", "depth"), len(latents))
    model = DiT(latents.shape, args.width, args.depth, latents.classes).to(device)
    features = reference = None
    if args.features:
        features = load_features(args.features).to(device)
        reference = statistics_of_originals(latents, features, args, rank, world, device)
    ema = copy.deepcopy(model).requires_grad_(False)
    trained = list(model.parameters())
    optimizers = make_optimizers(trained, args.optimizer, args.lr, args.weight_decay, device)
    parts = {"model": model, "ema": ema, "optimizer": None, "muon": None, **optimizers}
    run = Run(args, rank, world, device, parts, latents, checkpoint)
    del checkpoint
    average = Average(ema, model)
    parallel = data_parallel(model, world)
    batches = iter(TrainBatches(len(latents), args.batch_size, args.seed, rank, world, run.done))
    rows = range(rank * args.batch_size // world, (rank + 1) * args.batch_size // world)  # of this process
    say(f"{millions(trained):.1f} M parameters, {latents.shape[1] * latents.shape[2]} tokens of {latents.shape[0]} "
        f"channels, {len(latents)} latents of {latents.manifest['data']} -> {args.out}")

    for step in range(run.done, args.steps + 1):
        if evaluation_is_due(step, args) and step != evaluated:
            validate(run, ema, tokenizer, latents, features, reference, dtype)
        if step == args.steps:
            break

        # Draw: noise e and t ~ U(0, 1), which draw has as eqm's level
        set_learning_rate(optimizers.values(), learning_rate(step, args))
        keys = run.next_batch(batches)
        x, labels = (value.to(device) for value in batch_of(latents, keys, args.seed))
        e, _, t = draw(args.seed, step, rows, latents.shape, (), device, "eqm")

        # Forward and backward
        with autocast(device, dtype):
            v = parallel(fm_mix(x, e, t), labels, t)
        loss = fm_loss(v, x, e).mean()
        loss.backward()
        norm = clip_grad_norm_(trained, args.grad_clip or float("inf"))
        mean_loss = summed(loss.detach() / world, world)

        # Step and average, unless something is not finite
        good = norm.isfinite() & mean_loss.isfinite()
        step_if(good, optimizers.values())
        average.update(args.ema, step - args.ema_start, good)
        model.zero_grad()
        run.finish_step({"loss": mean_loss}, norm, good, torch.tensor([i for _, i in keys]))

    run.bar.close()


if __name__ == "__main__":
    guarded(main)
