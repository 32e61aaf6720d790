"""Start of the processes of a run, what they tell one another, and errors in one sentence."""
import atexit
import contextlib
import ctypes
import hashlib
import inspect
import multiprocessing
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from plumbing.fast import has_triton

# glibc's mallopt options: what memory that is freed stays with the process.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
MMAP_MAX = 65536                # glibc's default number of maps outside the heap

# Flags that may differ between the processes' machines, being paths or a matter of their processors.
OWN_FLAGS = ("data", "out", "init_from", "enc_ckpt", "ckpt", "lpips_weights", "repa_weights", "inception", "workers")


# ---------------------------------------------------------------------------------------------------------------------
# Start

def start(args):
    """Processes, device, precision and seed of a training: (rank, world, device, dtype). ValueError for a batch that
    the processes do not divide, and for flags that differ between them."""
    rank, world, device = setup(args.device)
    if args.batch_size % world:
        raise ValueError(f"--batch_size {args.batch_size} must be a multiple of the {world} processes")
    same_everywhere({k: v for k, v in vars(args).items() if k not in OWN_FLAGS}, "flags", world)
    if device.type == "cuda":  # TF32 for what autocast leaves in float32, the fastest convolutions for maps of one size
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    if args.compile is None:
        args.compile = device.type == "cuda" and has_triton(device)
    elif args.compile:
        check_compiler(device)
    torch.manual_seed(args.seed)  # initial weights, the same on every rank
    return rank, world, device, pick_dtype(args.dtype, device)


def setup(device=None):
    """-> (rank, world, device). Under torchrun joins the process group: nccl for tensors on GPUs, gloo for others. One
    process needs no launcher.

    device  "cuda", "mps" or "cpu"; None: the first that is there. ValueError where there is no such device.
    """
    rank = int(os.environ.get("RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if world == 1 and int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        raise ValueError("srun started several tasks, and each would train alone: start one torchrun a node "
                         "(docs/training.md)")
    name = device or best_device()
    try:
        device = torch.device("cuda", local) if name == "cuda" else torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: there is no such device here ({first_line(error)})") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    keep_freed_memory(True)
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def best_device():
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def default_workers():
    """-> int: processes that read images for one training process: half of its share of this machine's processors."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    share = processors // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(8, share // 2)


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


def pick_dtype(name, device):
    """torch.bfloat16 or None (float32, no autocast)."""
    if name == "auto":
        if device.type == "cuda":
            # Older GPUs say that they support it, too, and emulate it slowly.
            is_fast = torch.cuda.is_bf16_supported() and torch.cuda.get_device_capability(device) >= (8, 0)
        else:
            is_fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
        name = "bf16" if is_fast else "float32"
    return torch.bfloat16 if name == "bf16" else None


def autocast(device, dtype):
    return torch.autocast(device.type, dtype=dtype) if dtype else contextlib.nullcontext()


def check_compiler(device):
    """Compile a trivial function, as --compile will compile networks. ValueError where that fails."""
    try:
        torch.compile(lambda x: 2 * x)(torch.ones(8, device=device))
    except Exception as error:  # noqa: BLE001 dynamo's and inductor's own types, triton's
        raise ValueError(f"--compile does not work here ({first_line(error)[:200]}): install a C++ compiler such as "
                         "g++, or use --no-compile") from None


# ---------------------------------------------------------------------------------------------------------------------
# Between the processes

def gathered(value, world):
    """[value of process 0, of process 1, ...], the same list in all processes. All must call this."""
    values = [value]
    if world > 1:
        values = [None] * world
        dist.all_gather_object(values, value)
    return values


def summed(values, world):
    """A tensor, summed over the processes, on its device."""
    if world == 1:
        return values
    there = values.cpu() if values.device.type == "mps" else values  # gloo has no Apple GPUs
    dist.all_reduce(there)
    return there.to(values.device)


def data_parallel(module, world):
    """The module, with gradients averaged over the processes."""
    if world == 1:
        return module
    options = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"  # before torch 2.13
    return nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True, **{buffers: False})


def average_gradients(module, world):
    """Over the processes, of a module that DDP does not wrap."""
    if world > 1:
        for p in module.parameters():
            dist.all_reduce(p.grad)
            p.grad /= world


def same_everywhere(value, what, world):
    """ValueError in all processes where they hold different values: one hash is compared."""
    digest = hashlib.sha256(repr(value).encode()).hexdigest()
    if len(set(gathered(digest, world))) > 1:
        raise ValueError(f"the processes have different {what}: start all of them with the same command and files")


def raise_together(problem, world):
    """All processes end where one of them has met an error (an exception, or None): those that wait for it would wait
    for ever. Who has met it raises it, and so says why; the others are silent."""
    failed = gathered(problem is not None, world)
    if problem is not None:
        raise problem
    if any(failed):
        sys.exit(1)


# ---------------------------------------------------------------------------------------------------------------------
# Stop

STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")   # Windows has the first two


class StopSignal:
    """Turns what asks a run to save and end into .received, which its loop reads after every step: Ctrl-C, SIGTERM,
    SIGUSR1 (schedulers' warning) and SIGHUP (a lost terminal, unless nohup was told to ignore it). A second Ctrl-C ends
    the program at once."""

    def __init__(self):
        self.received = 0
        for name in STOP_SIGNALS:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.handle)

    def handle(self, number, frame):
        self.received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def leave_signals_to_parent(worker):
    """A DataLoader's worker_init_fn: what stops a run reaches its readers too (a terminal signals all its processes),
    and without them the step at hand would fail. So they end with their parent: kill_workers."""
    for name in STOP_SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


@atexit.register
def kill_workers():
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # where torch would raise an error about them
    for worker in multiprocessing.active_children():
        worker.kill()


# ---------------------------------------------------------------------------------------------------------------------
# Words

def tell(line):
    """Print a line on stderr. A terminal that is gone ends nothing: what comes next may be a save."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def say(line):
    """`tell` in the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        tell(line)


def first_line(error):
    """-> str: what an exception says, without what libraries append to it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def guarded(main):
    """Call main(). What a user can mend (ValueError, OSError) ends in one sentence and exit code 1, out of memory with
    a hint; anything else is Python's own traceback, and so is everything with TRACEBACK=1."""
    sys.stdout.reconfigure(line_buffering=True)             # a killed program's lines are there
    try:
        main()
    except KeyboardInterrupt:
        kill_workers()                                      # torch would wait for each of them
        sys.exit("interrupted")
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        for bar in list(getattr(tqdm, "_instances", ())):   # or the sentence would stand behind a progress bar
            bar.close()
        if isinstance(error, torch.OutOfMemoryError):
            sys.exit(f"error: {first_line(error)}: out of memory: use a smaller --batch_size, or in training "
                     "--micro_batch or --checkpointing")
        sys.exit(f"error: {error}")
    else:  # not after an error: on GPUs it waits for the other processes, which wait for this one
        if dist.is_initialized():
            dist.destroy_process_group()


def now(device):
    """Seconds, once the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
