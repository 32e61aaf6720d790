"""Latents to train another model on: shards of float16, labels and manifest.json; or only their mean and deviation.

    torchrun --nproc_per_node=8 -m tools.latents --ckpt F --data imagenet/ --size 256 --out latents
    python -m tools.latents --ckpt F --data imagenet/ --size 256 --limit 10000 --z_stats        # into the model's file

latents_K.npy  (n, c, h, w) float16, with --flip (n, 2, c, h, w), the second of the mirrored image
labels_K.npy   (n,) int64, -1: no class; images that cannot be decoded are left out of both
manifest.json  what is encoded, with the classes' names in the order of their labels and a hash of the encoder's
               weights; when all is done also shards, mean and standard deviation
Shard K holds the images K * --shard ... of the data set; process K % world writes it. Files appear whole; a shard that
is there is kept: run the same command again to go on. The files do not depend on the number of processes. `Latents`
reads them.
"""
import argparse
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch

from data import make_dataset, make_loader
from evaluate import load_model, loader_arguments, shared_arguments
from model import DCSSDAE
from plumbing import flags, log
from plumbing.files import read_tensors, whole, write_json
from plumbing.process import gathered, guarded, raise_together, setup
from sampler import image_noise

LARGEST_HALF = 65504                                         # where float16 ends
OPENED = 256                                                 # shards that Latents keeps open: systems allow about 1,000
ROUNDING = 1e-12                                             # E[z^2] - E[z]^2 of a constant, as a part of E[z^2]


def encoder_sha256(model):
    """-> str that says whose latents these are: of the encoder's weights, and of nothing else in a model's file."""
    digest = hashlib.sha256()
    for name, value in sorted(model.encoder.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Reading

class Latents(torch.utils.data.Dataset):
    """The finished shards of a folder, mapped into memory when they are used: [i] -> latent (c, h, w) float32, with
    --flip (2, c, h, w); label, -1: no class. ValueError.

    shape      (c, h, w);  mean, std  of the channels, (c, 1, 1), std 1 for a channel that is the same everywhere
    classes    number of classes;  labels  (n,) int64
    """

    def __init__(self, folder):
        self.folder, self.opened = Path(folder), {}          # {number of a shard: its array}
        try:
            self.manifest = json.loads((self.folder / "manifest.json").read_text())
            self.shards = self.manifest["shards"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{folder} holds no finished latents ({error}): run tools.latents on it, once more if it "
                             "was stopped") from None
        self.labels = np.concatenate([np.load(self.folder / shard["labels"]) for shard in self.shards])
        self.ends = np.cumsum([shard["count"] for shard in self.shards])
        self.classes = len(self.manifest["classes"])
        self.shape = tuple(self.manifest["shape"][-3:])
        self.mean, std = (torch.tensor(self.manifest[key])[:, None, None] for key in ("mean", "std"))
        self.std = torch.where(std > 0, std, 1.0)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        k = int(np.searchsorted(self.ends, i, side="right"))
        if k not in self.opened:
            if len(self.opened) == OPENED:
                del self.opened[next(iter(self.opened))]     # the one that was opened first
            self.opened[k] = np.load(self.folder / self.shards[k]["latents"], mmap_mode="r")
        z = self.opened[k][i - self.ends[k]]                 # counted from the shard's end
        return torch.from_numpy(z.astype(np.float32)), int(self.labels[i])

    def name_of(self, i):
        return f"latent {i}"


# ---------------------------------------------------------------------------------------------------------------------
# Encoding

def contents(args, model, dataset):
    """The first part of manifest.json: everything that the shards depend on."""
    side = dataset.size // model.downscale
    shape = [model.encoder.z_dim, side, side]
    values = f"sample, seed {args.seed}" if args.sample or args.z_stats else "mean"
    return {
        "encoder_sha256": encoder_sha256(DCSSDAE.load(args.ckpt)),  # in float32, whatever it computes in
        "data": args.data, "part": args.part, "size": dataset.size, "crop": args.crop,
        "images": len(dataset), "shard": args.shard, "classes": dataset.classes,
        "images_sha256": hashlib.sha256(dataset.images.tobytes()).hexdigest(),
        "shape": [2, *shape] if args.flip else shape,        # of one image
        "dtype": "float16", "computed_in": args.dtype, "values": values,
    }


def open_folder(folder, what):
    """Make the folder with its manifest, or see that it holds a part of the same. ValueError: it holds another."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / "manifest.json"
    if not manifest.exists():
        if any(folder.glob("latents_*.npy")):
            raise ValueError(f"{folder} holds latents without their manifest.json: give --out another folder")
        write_json(manifest, what)
        return
    try:
        found = dict(json.loads(manifest.read_text()))
    except (ValueError, TypeError):
        raise ValueError(f"{manifest} is damaged, or not of tools.latents: give --out another folder") from None
    changed = [key for key in what if found.get(key) != what[key]]
    if changed:
        raise ValueError(f"{folder} holds latents of another {', '.join(changed)}: give --out another folder")


def encode(model, x, index, what, args, device):
    """Latents of images x (b, 3, s, s) of these numbers: (b, c, h, w) on the CPU, with --flip (b, 2, c, h, w)."""
    x = x.to(device)
    views = [x, x.flip(3)] if args.flip else [x]
    noise = image_noise(args.seed, index, (len(views), *what["shape"][-3:])).to(device)     # (b, views, c, h, w)
    latents = []
    for k, view in enumerate(views):
        posterior = model.encode(view)
        latents.append(posterior.mode() if what["values"] == "mean" else posterior.sample(noise[:, k]))
    z = torch.stack(latents, 1)                              # (b, views, c, h, w)
    if not args.flip:
        z = z.squeeze(1)                                     # (b, c, h, w)
    return z.float().cpu()


def to_half(z):
    largest = z.abs().max()
    if not largest <= LARGEST_HALF:  # nor NaN
        raise ValueError(f"a latent reaches {largest:.4g}, and float16 ends at {LARGEST_HALF}")
    return z.half()


def encode_shard(model, dataset, k, what, args, device):
    """Latents of shard k, float16 for --out, and their labels. Unreadable images are left out of both."""
    first = k * args.shard
    part = dataset.subset(slice(first, first + args.shard))
    loader = make_loader(part, args.batch_size, train=False, workers=args.workers)
    latents, kept = [], []
    for x, index in loader:
        z = encode(model, x, index + first, what, args, device)
        latents.append(z if args.z_stats else to_half(z))
        kept += index.tolist()
    if not latents:
        latents = [torch.zeros(0, *what["shape"]).half()]
    return torch.cat(latents), part.labels[kept]


def channel_sums(z):
    """Number of values, their sum and sum of squares by channel: (3, c)."""
    c, h, w = z.shape[-3:]
    z = z.double().reshape(-1, c, h, w)                      # mirrored images are images too
    z = z.transpose(0, 1).flatten(1)                         # (c, n h w)
    count = z.new_full((c,), z.shape[1])
    return torch.stack([count, z.sum(1), z.square().sum(1)])


def save_array(path, array):
    with whole(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)


def finish_shard(model, dataset, k, what, args, device):
    """Encode and write shard k, unless it is there already. -> (number of its images, channel_sums)"""
    if args.z_stats:
        z, _ = encode_shard(model, dataset, k, what, args, device)
        return len(z), channel_sums(z)
    path = Path(args.out, f"latents_{k:05d}.npy")
    if path.exists():
        z = torch.from_numpy(np.load(path))
    else:
        z, labels = encode_shard(model, dataset, k, what, args, device)
        save_array(path.with_name(f"labels_{k:05d}.npy"), labels)
        save_array(path, z.numpy())  # last: a shard is done where this is
    return len(z), channel_sums(z)


# ---------------------------------------------------------------------------------------------------------------------
# Mean and standard deviation

def moments(sums):
    """Mean and standard deviation by channel and of all values, from channel_sums of the whole: a dict."""
    of_all = sums.sum(1, keepdim=True)
    n, total, squares = torch.cat([sums, of_all], 1)         # (c + 1,) each, the last of all channels
    mean = total / n
    # Var z = E[z^2] - E[z]^2
    variance = squares / n - mean.square()
    std = torch.where(variance > ROUNDING * squares / n, variance, 0.0).sqrt()
    *means, mean_all = mean.tolist()
    *stds, std_all = std.tolist()
    return {"mean": means, "std": stds, "mean_all": mean_all, "std_all": std_all, "values_per_channel": int(n[0])}


def store_in_model(model, args, statistics):
    """The model with its latents' statistics in --out, else in its own file; a published file stays as it is, and the
    model goes here. -> path. ValueError where the latents are not finite, or a channel the same everywhere."""
    if not all(map(math.isfinite, statistics["mean"] + statistics["std"])):
        raise ValueError("the latents are not finite: the model's file stays as it is")
    if min(statistics["std"]) <= 0:
        raise ValueError("a channel of the latents is the same everywhere, so that nothing can be divided by its "
                         "deviation: the model's file stays as it is; give more images")
    _, metadata = read_tensors(args.ckpt)
    is_ours = "config" in metadata and not args.ckpt.startswith("hf://")
    path = Path(args.ckpt) if is_ours and not args.out else Path(args.out or ".", "model.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    model.config["latents"] = statistics | {"data": args.data}
    model.save(path)
    return path


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared_arguments(parser)
    loader_arguments(parser)
    parser.set_defaults(part=None)
    add = parser.add_argument
    add("--z_stats", action="store_true", help="no shards: measure mean and std of posterior samples, and store them "
        "in the model's file, or with --out in a copy there, model.safetensors")
    add("--sample", action="store_true", help="samples of the posterior instead of its mean")
    add("--flip", action="store_true", help="of the mirrored images as well")
    add("--shard", type=flags.count, default=4096, metavar="N", help="images a shard [%(default)s]")
    args = parser.parse_args()
    if not args.out and not args.z_stats:
        parser.error("give --out DIR for shards of latents, or --z_stats for their mean and standard deviation")
    if args.z_stats and args.dtype != "float32":
        parser.error("--z_stats stores the model again, with all its digits: leave --dtype out")
    args.part = args.part or ("val" if args.z_stats else "train")
    rank, world, device = setup(args.device)
    model, size = load_model(args, device)
    dataset = make_dataset(args.data, size, train=False, limit=args.limit, crop=args.crop, split=args.part)
    what, problem = contents(args, model, dataset), None

    # Every shard, shared out among the processes, which all end where one of them fails
    found = {}                                               # {k: (number of images, channel_sums)}
    try:
        if rank == 0 and not args.z_stats:
            open_folder(Path(args.out), what)
    except (OSError, ValueError) as error:
        problem = error
    raise_together(problem, world)
    shards = range(rank, math.ceil(len(dataset) / args.shard), world)
    bar = log.progress(len(shards), "shard", disable=rank > 0)
    try:
        for k in shards:
            found[k] = finish_shard(model, dataset, k, what, args, device)
            bar.update()
    except (OSError, ValueError) as error:
        problem = error
    bar.close()
    raise_together(problem, world)
    for part in gathered(found, world):
        found |= part
    counts = {k: count for k, (count, _) in sorted(found.items())}
    sums = sum(sums for _, (_, sums) in sorted(found.items()))  # shard by shard: the same for any number of processes
    if not any(counts.values()):
        raise ValueError(f"none of the {len(dataset)} images of {args.data} can be decoded")
    if rank > 0:
        return

    # What is known when all is done
    statistics = moments(sums)
    if args.z_stats:
        path = store_in_model(model, args, statistics)
    else:
        path = Path(args.out, "manifest.json")
        finished = [{"latents": f"latents_{k:05d}.npy", "labels": f"labels_{k:05d}.npy", "count": count}
                    for k, count in counts.items() if count]
        write_json(path, what | {"shards": finished} | statistics)
    print(f"latents of {sum(counts.values())} of {len(dataset)} images of {args.data} ({what['values']}): mean "
          f"{statistics['mean_all']:.4f}, standard deviation {statistics['std_all']:.4f}, per channel "
          f"{min(statistics['std']):.4f} to {max(statistics['std']):.4f}; stored in {path}")


if __name__ == "__main__":
    guarded(main)
