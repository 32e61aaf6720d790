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
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import train
from data import TrainBatches, check_numbers, guarded, make_dataset, make_loader, now, save_grid, setup, whole
from encoder import start_at_zero
from fid import Statistics, distance_or_none, load_features, metric_of
from losses import fm_loss, fm_mix, to8bit
from model import DCSSDAE, time_embedding, umask
from sampler import euler, image_noise, seeded_generator
from tools.latents import Latents

TIME_FEATURES = 256                                          # cosines and sines of the time, as in DiT
HEAD_WIDTH = 64                                              # channels of an attention head
BATCH = 64                                                   # images generated at a time by a process


def get_args(argv=None):
    p = train.make_parser(__doc__, "DiT-S, B, L, XL: --width 384, 768, 1024, 1152 and --depth 12, 12, 24, 28.")
    add = p.add_argument
    add("--latents", dest="data", metavar="DIR", type=str, required=True, help="shards of tools.latents")
    add("--ckpt", metavar="FILE", type=str, required=True, help="the tokenizer that made them")
    add("--width", type=int, default=256, help=f"channels of a token, a multiple of {HEAD_WIDTH} [%(default)s]")
    add("--depth", type=int, default=6, help="transformer blocks [%(default)s]")
    add("--eval_steps", type=int, default=50, help="of the sampler in the latent space [%(default)s]")
    add("--features", metavar="F", type=str, help="of the Frechet distance: inception, dinov2 or a file")
    train.run_arguments(p)
    p.set_defaults(out="runs/generator", steps=20_000, batch_size=64, warmup=100, weight_decay=0.0)
    args = p.parse_args(argv)
    check_numbers(args)
    if args.width < HEAD_WIDTH or args.width % HEAD_WIDTH:
        raise ValueError(f"--width {args.width} is not a multiple of {HEAD_WIDTH}, the width of an attention head")
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
        self.arguments = {"shape": list(shape), "width": width, "depth": depth, "classes": classes}
        c, h, w = shape
        self.time = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes, width) if classes else None
        self.token = nn.Linear(c, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.ada, self.out = nn.Linear(width, 2 * width), nn.Linear(width, c)
        start_at_zero(self.ada)
        start_at_zero(self.out)
        rows, columns = torch.cartesian_prod(torch.arange(h), torch.arange(w)).T                        # (hw,) each
        places = [time_embedding(axis / 1000, width // 2) for axis in (rows, columns)]  # which multiplies by 1000
        self.register_buffer("places", torch.cat(places, dim=1), persistent=False)                      # (hw, width)

    def forward(self, x, labels, t):
        condition = self.time(time_embedding(t, TIME_FEATURES))
        if self.label is not None:
            condition = condition + self.label(labels)
        tokens = self.token(x.flatten(2).mT) + self.places                                              # (B, hw, width)
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = self.ada(F.silu(condition))[:, None].chunk(2, dim=2)
        return self.out(modulated(tokens, shift, scale)).mT.unflatten(2, x.shape[2:])

    def save(self, path):
        with whole(path) as temporary:
            save_file(self.state_dict(), temporary, metadata={"config": json.dumps(self.arguments)})
            os.chmod(temporary, 0o666 & ~umask())  # safetensors makes files that only their owner reads

    @classmethod
    def load(cls, path):
        with safe_open(path, framework="pt") as file:
            model = cls(**json.loads(file.metadata()["config"]))
        model.load_state_dict(load_file(path))
        return model.requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling and its evaluation

@torch.no_grad()
def generate(ema, tokenizer, latents, args, rank, world, device, dtype):
    """Batches of this process's share of --eval_images images (b, 3, H, W); classes take turns."""
    size = latents.manifest["size"]
    numbers = list(range(rank, args.eval_images, world))
    for index in (numbers[k:k + BATCH] for k in range(0, len(numbers), BATCH)):
        labels = torch.tensor(index, device=device) % latents.classes if latents.classes else None
        noise = image_noise(args.seed, index, latents.shape).to(device)
        with train.autocast(device, dtype):
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


def validate(run, ema, tokenizer, latents, features, reference, dtype):
    """Generate: samples.png, a line of the log, and given features the distance to the Statistics `reference`."""
    args, start = run.args, now(run.device)
    train.save_before(run)
    images = generate(ema, tokenizer, latents, args, run.rank, run.world, run.device, dtype)
    first = next(images)
    values = {"name": "samples"}
    if features:
        statistics = statistics_of(itertools.chain([first], images), features, run.device)
        values[metric_of(args.features)] = distance_or_none(statistics, reference)
    run.evaluating += now(run.device) - start
    if run.rank == 0:
        save_grid(Path(args.out, "samples.png"), [*first.split(8)])
        train.append_log(run.log_path, run.boards, run.done, eval=[values])
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
    rank, world, device = setup(args.device)
    dtype = train.pick_dtype(args.dtype, device)
    torch.manual_seed(args.seed)
    latents = Latents(args.data)
    tokenizer, size = DCSSDAE.load(args.ckpt, device), latents.manifest["size"]
    if latents.shape != tokenizer.latent_shape(size, size):
        raise ValueError(f"{args.data} holds latents {latents.shape}, but {args.ckpt} makes "
                         f"{tokenizer.latent_shape(size, size)} of {size} px")
    unlabelled = int((latents.labels < 0).sum())
    if latents.classes and unlabelled:
        raise ValueError(f"{unlabelled} of the latents in {args.data} have no class, the others have: make them of "
                         "images that are all in folders of classes, or none")
    train.check_shared(args, world)
    if args.eval_images < world:
        raise ValueError(f"--eval_images {args.eval_images} must be at least one for each of the {world} processes")
    features = reference = None
    if args.features:
        features = load_features(args.features, size=size).to(device)
        of = latents.manifest
        originals = make_dataset(of["data"], size, False, limit=args.eval_images, crop=of["crop"], split=of["part"])
        loader = make_loader(originals, BATCH * world, train=False, rank=rank, world=world)
        reference = statistics_of((x for x, _ in loader), features, device)

    checkpoint, log_path, evaluated = train.open_run(args, rank, world)
    train.check_content(checkpoint, latents, args)
    model = DiT(latents.shape, args.width, args.depth, latents.classes).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizers = train.make_optimizers(list(model.parameters()), args, device)
    parts = {"model": model, "ema": ema, **optimizers}
    start, skipped = train.restore(parts, checkpoint)
    del checkpoint
    averaged = train.paired_tensors(ema, model)
    parallel = train.data_parallel(model, world)
    batches = iter(TrainBatches(len(latents.labels), args.batch_size, args.seed, rank, world, start))
    boards = train.open_boards(args, start) if rank == 0 else []
    run = train.Run(args, rank, world, device, log_path, boards, parts, start, skipped, latents)
    rows = range(rank * args.batch_size // world, (rank + 1) * args.batch_size // world)  # of this process
    if rank == 0:
        print(f"{train.millions(model.parameters()):.1f} M parameters, {latents.shape[1] * latents.shape[2]} tokens of "
              f"{latents.shape[0]} channels, {latents.content()} -> {args.out}", flush=True)

    for step in range(start, args.steps + 1):
        if train.evaluation_is_due(step, args) and step != evaluated:
            validate(run, ema, tokenizer, latents, features, reference, dtype)
        if step == args.steps:
            break

        # Draw: noise e and t ~ U(0, 1)
        train.set_learning_rate(optimizers.values(), step, args)
        keys = next(batches)
        x, labels = (value.to(device) for value in batch_of(latents, keys, args.seed))
        e, _, t = train.draw(args.seed, step, rows, latents.shape, (), device)

        # Forward and backward
        with train.autocast(device, dtype):
            v = parallel(fm_mix(x, e, t), labels, t)
        loss = fm_loss(v, x, e)
        loss.backward()
        norm = train.clip_gradients(list(model.parameters()), args)
        stop = train.stop_flag(run)
        mean_loss, stop = train.summed(torch.cat([loss.detach().to(stop)[None] / world, stop]), world)

        # Step and average, unless something is not finite
        good = norm.isfinite() & mean_loss.isfinite()
        train.step_if(good, optimizers.values())
        train.update_ema(averaged, args.ema, step - args.ema_start, good)
        model.zero_grad()
        index = torch.tensor([i for _, i in keys])
        train.finish_step(run, {"loss": mean_loss}, norm.to(stop), stop, good, index)

    run.bar.close()


if __name__ == "__main__":
    guarded(main)
