"""Latents to train another model on: shards of float16, labels and manifest.json; or only their mean and deviation.

    torchrun --nproc_per_node=8 -m tools.latents --ckpt F --data imagenet/ --size 256 --out latents
    python -m tools.latents --ckpt F --data imagenet/ --size 256 --limit 10000 --z_stats        # into the model's file

latents_K.npy  (n, c, h, w) float16, with --flip (n, 2, c, h, w), the second of the mirrored image
labels_K.npy   (n,) int64, -1: no class; images that cannot be decoded are left out of both
manifest.json  what is encoded, with the classes' names in the order of their labels; when all is done also shards, mean
               and standard deviation
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
import torch.distributed as dist
from tqdm import tqdm

from data import (
    BROKEN_ARCHIVE,
    check_numbers,
    gathered,
    guarded,
    lock_folder,
    make_dataset,
    make_loader,
    ready_folder,
    setup,
    write_json,
    write_whole,
)
from evaluate import load_model, loader_arguments, shared_arguments
from model import local_file, read_weights
from sampler import image_noise

LARGEST_HALF = 65504                                         # where float16 ends


# ---------------------------------------------------------------------------------------------------------------------
# Reading

class Latents(torch.utils.data.Dataset):
    """The finished shards of a folder, mapped into memory: [i] -> latent (c, h, w) float32, with --flip (2, c, h, w);
    label, -1: no class. ValueError.

    shape      (c, h, w);  mean, std  of the channels, (c, 1, 1)
    classes    number of classes;  labels  (n,) int64
    """

    def __init__(self, folder):
        folder = Path(folder)
        try:
            self.manifest = json.loads((folder / "manifest.json").read_text())
            shards = self.manifest["shards"]
            self.shards = [np.load(folder / shard["latents"], mmap_mode="r") for shard in shards]
            self.labels = np.concatenate([np.load(folder / shard["labels"]) for shard in shards])
            self.mean, self.std = (torch.tensor(self.manifest[key])[:, None, None] for key in ("mean", "std"))
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{folder} holds no finished latents ({type(error).__name__}: {error}): run tools.latents "
                             "on it, once more if it was stopped") from None
        self.classes = len(self.manifest["classes"])
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.shape = self.shards[0].shape[-3:]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        k = np.searchsorted(self.ends, i, side="right")
        z = self.shards[k][i - self.ends[k]]                 # counted from the shard's end
        return torch.from_numpy(z.astype(np.float32)), int(self.labels[i])

    def content(self):
        """-> str that says which latents these are, wherever they lie."""
        return f"{len(self)} latents of {self.manifest['data']}, model {self.manifest['model_sha256'][:16]}"

    def name_of(self, i):
        return f"latent {i}"


# ---------------------------------------------------------------------------------------------------------------------
# What is encoded

def contents(args, model, dataset):
    """The first part of manifest.json: everything that the shards depend on."""
    side = dataset.size // model.downscale
    shape = [model.encoder.z_dim, side, side]
    values = f"sample, seed {args.seed}" if args.sample or args.z_stats else "mean"
    return {
        "model_sha256": hashlib.sha256(Path(local_file(args.ckpt)).read_bytes()).hexdigest(),
        "data": args.data, "part": args.part, "size": dataset.size, "crop": args.crop,
        "images": len(dataset), "shard": args.shard, "classes": dataset.classes,
        "images_sha256": hashlib.sha256(dataset.images.tobytes()).hexdigest(),
        "shape": [2, *shape] if args.flip else shape,        # of one image
        "dtype": "float16", "computed_in": args.dtype, "values": values,
    }


def open_folder(folder, what, rank, world):
    """Make the folder with its manifest, or see that it holds a part of the same. ValueError: it holds another."""
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        lock_folder(folder)
    manifest = folder / "manifest.json"
    is_new = not manifest.is_file()
    if not is_new:
        try:
            found = dict(json.loads(manifest.read_text()))
        except (ValueError, TypeError, RecursionError):  # a wrong encoding is a ValueError, too
            raise ValueError(f"{manifest} is damaged: give --out another folder, or remove this one") from None
        changed = [key for key in what if found.get(key) != what[key]]
        if changed:
            raise ValueError(f"{folder} holds latents of another {', '.join(changed)}: give --out another folder")
    if world > 1:
        dist.barrier()  # all have read it
    if rank == 0:
        for unfinished in folder.glob("*.tmp"):
            unfinished.unlink()
    if world > 1:
        dist.barrier()  # the others write only now
    if rank == 0 and is_new:
        write_json(manifest, what)


# ---------------------------------------------------------------------------------------------------------------------
# Encoding

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
    loader = make_loader(part, args.batch_size, train=False, workers=args.workers, may_be_empty=True)
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


def finish_shard(model, dataset, k, what, args, device):
    """Encode and write shard k, unless it is there already. -> (number of its images, channel_sums)"""
    if args.z_stats:
        z, _ = encode_shard(model, dataset, k, what, args, device)
        return len(z), channel_sums(z)
    path = Path(args.out, f"latents_{k:05d}.npy")
    labels_path = path.with_name(f"labels_{k:05d}.npy")
    z = whole_shard(path, labels_path, what) if path.exists() else None
    if z is None:
        z, labels = encode_shard(model, dataset, k, what, args, device)
        write_whole(labels_path, labels)
        write_whole(path, z.numpy())  # last: a shard is done where this is
    return len(z), channel_sums(z)


def whole_shard(path, labels_path, what):
    """Latents of a shard of an earlier call, or None, with a warning, where it is to be encoded again: unreadable,
    empty, of another shape or size, with values that are not finite, or without a label for each image."""
    try:
        z, labels = np.load(path), np.load(labels_path)
        is_labelled = labels.dtype == np.int64 and labels.shape == z.shape[:1]
        is_shard = z.dtype == np.float16 and [*z.shape[1:]] == what["shape"] and 0 < len(z) <= what["shard"]
        if is_labelled and is_shard and np.isfinite(z).all():
            return torch.from_numpy(z)
    except (*BROKEN_ARCHIVE, MemoryError):
        pass  # as damaged as one with other contents
    tqdm.write(f"warning: {path} or its labels are damaged or empty: encoding these images again")
    return None


def finish_all(model, dataset, what, args, rank, world, device):
    """Every shard, shared out among the processes: {k: (number of images, channel_sums)} in order, the same in all."""
    shards = math.ceil(len(dataset) / args.shard)
    found, problem = {}, None
    try:
        for k in tqdm(range(rank, shards, world), unit="shard", disable=rank > 0):
            found[k] = finish_shard(model, dataset, k, what, args, device)
    except (ValueError, OSError) as error:
        if world == 1:
            raise
        problem = str(error)
    merged = {}
    for part, its_problem in gathered((found, problem), world):
        if its_problem:
            raise ValueError(its_problem)  # in all processes, whoever met it
        merged |= part
    return dict(sorted(merged.items()))


# ---------------------------------------------------------------------------------------------------------------------
# Mean and standard deviation

def moments(sums):
    """Mean and standard deviation by channel and of all values, from channel_sums of the whole: a dict."""
    of_all = sums.sum(1, keepdim=True)
    n, total, squares = torch.cat([sums, of_all], 1)         # (c + 1,) each, the last of all channels
    mean = total / n
    # Var z = E[z^2] - E[z]^2
    std = (squares / n - mean.square()).clamp(min=0).sqrt()
    *means, mean_all = mean.tolist()
    *stds, std_all = std.tolist()
    return {"mean": means, "std": stds, "mean_all": mean_all, "std_all": std_all, "values_per_channel": int(n[0])}


def file_of_statistics(args):
    """Where --z_stats stores the model with its statistics: in --out, else in the model's own file; where that has no
    configuration, being a published one, or is an hf:// address: here. -> path"""
    _, metadata = read_weights(args.ckpt)
    is_ours = "config" in metadata and not args.ckpt.startswith("hf://")
    if is_ours and not args.out:
        return Path(args.ckpt)
    return Path(args.out or ".", "model.safetensors")


def store_in_model(model, args, statistics):
    """-> path. ValueError where the latents are not finite or the same everywhere, as a model's statistics must not."""
    numbers = statistics["mean"] + statistics["std"]
    if not all(map(math.isfinite, numbers)):
        raise ValueError("the latents are not finite: the model's file stays as it is")
    if min(statistics["std"]) <= 0:
        raise ValueError("a channel of the latents is the same everywhere, so that nothing can be divided by its "
                         "deviation: the model's file stays as it is; give more images")
    path = file_of_statistics(args)
    model.config["latents"] = statistics | {"data": args.data}
    model.save(path)
    return path


def store_in_manifest(args, what, found, statistics):
    """The manifest with everything in it, which says that all shards are done. -> path"""
    shards = []
    for k, (count, _) in found.items():
        if count:
            shards.append({"latents": f"latents_{k:05d}.npy", "labels": f"labels_{k:05d}.npy", "count": count})
    path = Path(args.out, "manifest.json")
    write_json(path, what | {"shards": shards} | statistics)
    return path


@torch.no_grad()
def store_latents(model, dataset, args, rank, world, device):
    """Shards into --out, or with --z_stats only mean and standard deviation into the model's file. ValueError: another
    content in the folder, or a latent beyond float16."""
    what = contents(args, model, dataset)
    if not args.z_stats:
        open_folder(Path(args.out), what, rank, world)
    found = finish_all(model, dataset, what, args, rank, world, device)
    sums = sum(sums for _, sums in found.values())           # shard by shard: the same for any number of processes
    if not sums.any():
        raise dataset.nothing_readable()
    if rank > 0:
        return
    statistics = moments(sums)
    if args.z_stats:
        path = store_in_model(model, args, statistics)
    else:
        path = store_in_manifest(args, what, found, statistics)
    readable = sum(count for count, _ in found.values())
    print(f"latents of {readable} of {len(dataset)} images of {args.data} ({what['values']}): mean "
          f"{statistics['mean_all']:.4f}, standard deviation {statistics['std_all']:.4f}, per channel "
          f"{min(statistics['std']):.4f} to {max(statistics['std']):.4f}; stored in {path}")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared_arguments(parser)
    loader_arguments(parser)
    parser.set_defaults(part=None)
    add = parser.add_argument
    add("--out", metavar="DIR", help="folder of the shards, new or to go on with")
    add("--z_stats", action="store_true", help="no shards: measure mean and std of posterior samples, and store them "
        "in the model's file, or with --out in a copy there, model.safetensors")
    add("--sample", action="store_true", help="samples of the posterior instead of its mean")
    add("--flip", action="store_true", help="of the mirrored images as well")
    add("--shard", type=int, default=4096, help="images a shard [%(default)s]")
    args = parser.parse_args()
    if not args.out and not args.z_stats:
        raise ValueError("give --out DIR for shards of latents, or --z_stats for their mean and standard deviation")
    check_numbers(args)
    args.part = args.part or ("val" if args.z_stats else "train")
    if args.z_stats and args.dtype != "float32":
        raise ValueError("--z_stats stores the model again, with all its digits: leave --dtype out")
    return args


def main():
    args = parse_arguments()
    rank, world, device = setup(args.device)
    model, size = load_model(args, device)
    if rank == 0:
        target = file_of_statistics(args) if args.z_stats else Path(args.out, "manifest.json")
        ready_folder(target.parent, target.name)
    dataset = make_dataset(args.data, size, train=False, limit=args.limit, crop=args.crop, split=args.part)
    store_latents(model, dataset, args, rank, world, device)


if __name__ == "__main__":
    guarded(main)
