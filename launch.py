"""How programs start and end: place among the processes, device, trained model, and one sentence where they cannot go on.

    python evaluate.py --ckpt F                             # one process needs no launcher
    torchrun --nproc_per_node=8 evaluate.py --ckpt F        # rank and world size come from the environment
"""
import contextlib
import ctypes
import math
import os
import sys

import torch
import torch.distributed as dist

from model import DCSSDAE

# glibc's mallopt: what memory that is freed stays with the process.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
MMAP_MAX = 65536                                             # glibc's default number of maps of their own
LARGEST_KEPT = 1024                                          # pixels a side up to which freed memory stays
DEFAULT_SIZE = 256                                           # pixels a side, for models that do not say theirs


def setup(device=None):
    """(rank, world, device). Under torchrun joins the process group: nccl on GPUs, gloo otherwise.
    One process needs no launcher.

    device  "cuda", "mps" or "cpu"; None: the first that is there. ValueError where there is no such device.
    """
    rank = int(os.environ.get("RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    name = device or best_device()
    try:
        device = torch.device("cuda", local) if name == "cuda" else torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {name}: there is no such device here") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    keep_freed_memory(True)
    if world > 1 and not dist.is_initialized():
        join_processes("nccl" if device.type == "cuda" else "gloo", rank, world)
    return rank, world, device


def best_device():
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def join_processes(backend, rank, world):
    """torch.distributed's process group."""
    store, *_ = next(dist.rendezvous("env://"))
    # Keys of its own for each restart by torchrun: the store may still hold the addresses of the processes before.
    store = dist.PrefixStore(f"restart{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def keep_freed_memory(keep):
    """Linux: let freed memory stay with the process. On CPUs, fetching pages from the system again for every large map
    costs more time than computing on it; but the gaps between maps of gigabytes cost memory: False gives those back."""
    settings = {
        M_MMAP_MAX: 0 if keep else MMAP_MAX,
        M_MMAP_THRESHOLD: 2**25,
        M_TRIM_THRESHOLD: 2**31 - 1,
    }
    with contextlib.suppress(OSError, AttributeError):  # another system, another C library
        for option, value in settings.items():
            ctypes.CDLL("libc.so.6").mallopt(option, value)


def guarded(main):
    """Call main(); what the user can mend ends in one sentence and exit code 1, not in a traceback
    (TRACEBACK=1 shows it)."""
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        if os.environ.get("RANK", "0") != "0":
            sys.exit(1)  # the first process says it
        sys.exit(f"error: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# What evaluate.py and tools/ share: a trained model and a data set

def shared_arguments(parser):
    """The flags of every program that opens a trained model and a data set."""
    add = parser.add_argument
    add("--ckpt", required=True, metavar="FILE", help="model.safetensors written by train.py or distill.py")
    add("--device", metavar="NAME", help="default: cuda, mps or cpu, the first that is there")
    add("--dtype", choices=["float32", "bf16"], default="float32", help="weights and maps of both parts [%(default)s]")
    add("--seed", type=int, default=0, help="of the decoder's noise and of posterior samples [%(default)s]")
    add = parser.add_argument_group("data").add_argument
    add("--data", default="demo", metavar="DIR", help="demo, imagenette, cifar10 or a folder [%(default)s]")
    add("--part", choices=["train", "val"], default="val", help="default: val; of latents' shards train")
    add("--size", type=int, help="image side in pixels; default: the training size, else 256")
    add("--crop", choices=["center", "adm"], default="center", help="short side, centre crop; or DC-AE's [%(default)s]")
    add("--limit", type=int, help="N images, evenly spread over the data; default: all")


def loader_arguments(parser):
    parser.add_argument("--batch_size", type=int, default=32, help="images at a time in each process [%(default)s]")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images [%(default)s]")


def check_at_least_one(args, *names):
    for name in names:
        value = getattr(args, name)
        numbers = value if isinstance(value, list) else [value]
        if min(numbers) < 1:
            raise ValueError(f"--{name} takes numbers of at least 1, got {min(numbers)}")


def load_model(args, device):
    """The model of --ckpt in --dtype on `device`, and the image size: --size, the training's, or 256. -> (model, int)"""
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32: no TF32 in decoder and LPIPS
    model = DCSSDAE.load(args.ckpt, device=device).to(memory_format=torch.channels_last)
    if args.dtype == "bf16":
        model.to(torch.bfloat16)
    notes = model.config.get("notes", {})
    size = args.size or notes.get("size") or DEFAULT_SIZE
    unit = math.lcm(model.downscale, 8)
    if size % unit:
        raise ValueError(f"--size {size} is not a multiple of {unit}, which {model.config['enc']} and the decoder need")
    keep_freed_memory(size <= LARGEST_KEPT)
    return model, size
