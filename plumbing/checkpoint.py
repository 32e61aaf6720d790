"""A run in its folder: found and continued, counted, logged, saved whole, stopped.

  latest.pt, previous.pt   all that the next step depends on; model.safetensors is the average alone
"""
import contextlib
import copy
import json
import math
import os
import pickle
import signal
import sys
import time
import zipfile
import zlib

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import nn

from plumbing.files import UNFINISHED, whole
from plumbing.log import Clock, Log, last_evaluation, progress
from plumbing.process import StopSignal, first_line, gathered, raise_together, say, summed, tell

WRITTEN = ("latest.pt", "previous.pt", "model.safetensors", "best.safetensors", "metrics.json", "reconstructions.png",
           "log.jsonl")
MOST_SKIPPED = 10  # steps in a row that are not finite: what goes wrong so often will not go away


# ---------------------------------------------------------------------------------------------------------------------
# Find and load

def open_run(args, rank, world):
    """-> (checkpoint to go on from, step of its last evaluation); (None, None) for a new run. ValueError, on all
    ranks, where there is a run already and --resume is not asked for, or where it has done all its steps."""
    path = evaluated = problem = None
    try:
        if rank == 0:
            path = newest_checkpoint(args.out, args.resume)
    except (OSError, ValueError) as error:
        problem = error
    raise_together(problem, world)
    path = gathered(path, world)[0]
    if path is None:
        return None, None
    checkpoint = load_checkpoint(path)
    evaluated = gathered(last_evaluation(args.out, checkpoint["step"]), world)[0]
    if checkpoint["step"] > args.steps or evaluated == args.steps:
        raise ValueError(f"the run in {args.out} has done its {checkpoint['step']} steps: give more --steps, or "
                         "another --out")
    say(f"continuing from {path}, step {checkpoint['step']}")
    return checkpoint, evaluated


def newest_checkpoint(out, resume):
    """Path of the newest checkpoint that can be read, None for a new run. A damaged one is set aside, or the next save
    would move it to where the good one is."""
    os.makedirs(out, exist_ok=True)
    lock_folder(out)
    unfinished = [name for name in os.listdir(out) if name.endswith(UNFINISHED)]  # what a killed run was writing
    for name in unfinished:
        os.remove(os.path.join(out, name))
    written = [name for name in WRITTEN if os.path.exists(os.path.join(out, name))]
    if written and not resume:
        raise ValueError(f"{out} holds {written[0]} already: continue that run with --resume, or choose another --out")
    damaged = []
    for name in ("latest.pt", "previous.pt"):
        path = os.path.join(out, name)
        if not os.path.exists(path):
            continue
        try:
            load_checkpoint(path)
            return path
        except DAMAGED as error:
            os.replace(path, f"{path}.damaged")
            damaged.append(f"{path} ({first_line(error)})")
            say(f"warning: damaged, now called {name}.damaged: {damaged[-1]}")
    if damaged:
        raise ValueError(f"no readable checkpoint in {out}: {', '.join(damaged)}; start again with another --out")
    if written and written[0] != "log.jsonl" and not unfinished:  # it may be all that there is of somebody's model
        raise ValueError(f"{out} holds {written[0]} but no checkpoint to go on from: choose another --out")
    if resume:
        say(f"no checkpoint in {out} yet: a new run")
    return None


# What reading a damaged archive raises.
DAMAGED = (zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, RuntimeError, ValueError, LookupError, EOFError)


def load_checkpoint(path):
    """-> the checkpoint's dict, with maps of the file for tensors: all processes of a machine share one copy."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()  # checksums, which maps go without
    if damaged:
        raise zipfile.BadZipFile(damaged)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" in str(error):  # no memory, or a disk without maps: that says nothing about the file
            raise OSError(f"{path}: {first_line(error)}") from None
        raise


held_locks = []  # a lock ends with its file object


def lock_folder(out):
    """Keep other runs out of a folder until this process ends, however it ends. ValueError where there is one."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    file = open(os.path.join(out, ".lock"), "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another run is writing into {out}: choose another --out, or wait") from None
    except OSError:  # a file system without locks
        return
    held_locks.append(file)


def compare_flags(checkpoint, args, fixed, images):
    """ValueError where one of the `fixed` flags or the number of training images differs from the checkpoint's; what
    else has changed is said."""
    if checkpoint["images"] != images:
        raise ValueError(f"--resume continues a run on {checkpoint['images']} images, but --data {args.data} holds "
                         f"{images}: give the same ones")
    then, now = checkpoint["args"], vars(args)
    changed = []
    for name, value in now.items():
        if name in then and then[name] != value and name not in ("out", "resume"):
            changed.append(name)
    for name in changed:
        if name in fixed:
            raise ValueError(f"--resume continues a run with --{name} {then[name]}, not {now[name]}: use the flags of "
                             "the first call, or another --out")
        say(f"resuming with --{name} {now[name]} instead of {then[name]}")


# ---------------------------------------------------------------------------------------------------------------------
# A run under way

class Run:
    """Counts the steps of a run, logs and saves them, and stops where it is asked to.

    parts    {name: module or optimiser, None where a run has no such part}: what a checkpoint holds
    dataset  the training images
    """

    def __init__(self, args, rank, world, device, parts, dataset, checkpoint):
        self.args, self.rank, self.world, self.device = args, rank, world, device
        self.parts, self.dataset = parts, dataset
        self.done, self.skipped, self.skipped_in_a_row = 0, 0, 0
        self.by_level = torch.zeros(())  # sums and counts of losses by level since the log's last line, on the device
        if checkpoint:
            restore(parts, checkpoint)
            self.done, self.skipped = checkpoint["step"], checkpoint["skipped"]
            self.by_level = checkpoint["by_level"].to(device, copy=True)  # or it would stay a map of the file
        self.saved, self.save_is_due = self.done, False
        # Counted on the device, and read with the other numbers: skipped steps since the last reading, and in a row.
        self.bad_steps = torch.zeros(2, dtype=torch.int64, device=device)
        self.log = None
        if rank == 0:
            self.log = Log(args.out, self.done, args.tensorboard, args.wandb, vars(args))
        self.clock = Clock(self.done * args.batch_size)
        self.stop = StopSignal()
        self.bar = progress(args.steps, "step", initial=self.done, disable=rank != 0)

    def next_batch(self, batches):
        """The loader's (x, index). Where any process has lost its data, or was asked to stop, all save and end."""
        batch = problem = None
        try:
            batch = next(batches)
        except Exception as error:  # noqa: BLE001 whatever it is, the work is saved first
            problem = error
            tell(f"error in reading images, saving first: {first_line(error)}")
        if hasattr(signal, "SIGCHLD"):  # torch tells of a dead reader in the midst of a step, which then cannot save:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # so next() finds it
        # Between CPUs: no GPU waits for it.
        lost, stopped = summed(torch.tensor([problem is not None, self.stop.received > 0]).float(), self.world)
        if lost or stopped:
            self.save_before(most_skipped=1)  # one may be an accident, a ruined model's are all
        if lost:
            say(f"saved after step {self.saved}")
            raise_together(problem, self.world)
        if stopped:
            self.leave()
        return batch

    def finish_step(self, totals, norm, good, index, by_level=None):
        """Count a step; log and save where it is due.

        totals {name: loss term}, gradient norm, good (whether all was finite): of the device, and read from it at every
        tenth step and where a line or a save is due, no more often, as reading leaves it without work.
        by_level: losses.level_sums of the step.
        """
        args = self.args
        self.done += 1
        self.bar.update()
        if by_level is not None:
            self.by_level = self.by_level + torch.where(good, by_level, 0.0)
        bad = (~good).long()
        self.bad_steps = torch.stack([self.bad_steps[0] + bad, (self.bad_steps[1] + bad) * bad])
        is_last = self.done == args.steps
        logs = is_last or self.done % args.log_every == 0
        self.save_is_due = self.save_is_due or is_last or self.done % args.save_every == 0
        if not (logs or self.save_is_due or self.done % MOST_SKIPPED == 0):
            return
        numbers = {name: float(value) for name, value in totals.items()}
        self.count_skipped()
        if logs and self.rank == 0:
            rate = self.clock.rate(self.done * args.batch_size)
            self.bar.set_postfix_str(f"loss {numbers['loss']:.4f}, {rate:.0f} images/s", refresh=False)
            lr = self.parts["optimizer"].param_groups[0]["lr"]
            if by_level is not None:
                for k, (total, images) in enumerate(self.by_level.T.tolist()):
                    if images:
                        numbers[f"level_{k}"] = total / images
                self.by_level = torch.zeros_like(self.by_level)
            self.log.write(self.done, images=self.done * args.batch_size, **numbers, lr=lr, grad_norm=float(norm),
                           skipped=self.skipped, images_per_s=rate, peak_mib=peak_memory(self.device))
        if self.skipped_in_a_row >= MOST_SKIPPED:
            self.give_up(numbers, index)
        if self.save_is_due and self.skipped_in_a_row == 0:  # a ruined model shows in skipped steps
            self.save()
        if is_last and self.save_is_due:
            raise ValueError(f"the last {self.skipped_in_a_row} steps were skipped, being not finite, so the model at "
                             f"step {self.done} is not saved: lower --lr or use --dtype float32, and --resume")

    def count_skipped(self):
        """Read from the device how many steps were skipped since the last reading, and in a row."""
        skipped, self.skipped_in_a_row = self.bad_steps.tolist()
        self.bad_steps[0] = 0
        self.skipped += skipped
        if skipped:
            say(f"warning: {skipped} of the steps up to {self.done} were not finite and are skipped")

    def give_up(self, numbers, index):
        """ValueError, on all ranks, with what the last step was."""
        terms = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        names = []
        for part in gathered([self.dataset.name_of(i) for i in index.tolist()], self.world):
            names += part
        raise ValueError(f"{self.skipped_in_a_row} steps in a row were skipped, being not finite, the last is "
                         f"{self.done}, {terms}, images {', '.join(names[:24])}: lower --lr, or use --dtype float32, "
                         "and continue with --resume; should it stop again, move latest.pt away, for previous.pt")

    def save(self):
        """A checkpoint and the average, by rank 0. ValueError, on all ranks, where weights are not finite."""
        for name, part in self.parts.items():
            if isinstance(part, nn.Module) and not is_finite(part):
                raise ValueError(f"after step {self.done} the weights of the part '{name}' are not finite and not "
                                 "saved: lower --lr and continue with --resume")
        problem = None
        if self.rank == 0:
            ema = self.parts["ema"]
            state = {"step": self.done, "skipped": self.skipped, "args": vars(self.args), "images": len(self.dataset),
                     "by_level": self.by_level, "config": ema.config}
            for name, part in self.parts.items():
                state[name] = None if part is None else part.state_dict()
            try:
                save_checkpoint(self.args.out, state, ema)
            except OSError as error:
                problem = error
        raise_together(problem, self.world)
        self.save_is_due, self.saved = False, self.done

    def save_before(self, most_skipped=0):
        """Save what has been done since the last save, unless more of the last steps than that were skipped."""
        self.count_skipped()
        if self.done > self.saved and self.skipped_in_a_row <= most_skipped:
            self.save()

    @contextlib.contextmanager
    def evaluating(self):
        """Around an evaluation, which may fail: save before, and leave its time out of the training's."""
        self.save_before()
        start = time.monotonic()
        yield
        self.clock.paused += time.monotonic() - start

    def leave(self):
        """End the program, on all ranks once rank 0 has saved: torchrun kills what outlives another."""
        self.bar.close()
        if self.world > 1:
            dist.barrier()
        outcome = "and saved" if self.saved == self.done else "without saving, as the last steps were skipped"
        if self.done == 0:
            outcome = "with nothing to save yet"
        if self.rank == 0:
            print(f"stopped after step {self.done} {outcome}: continue with the same command and --resume")
        sys.exit(128 + (self.stop.received or signal.SIGTERM))


def restore(parts, checkpoint):
    """Read a checkpoint into the parts. ValueError where they are other parts, or of another model."""
    for name, part in parts.items():
        state = checkpoint.get(name)
        if (part is None) != (state is None):
            raise ValueError(f"--resume: the run was begun {'without' if state is None else 'with'} the part '{name}': "
                             "use the flags of the first call, and give it the same networks")
        if part is None:
            continue
        try:
            if isinstance(part, torch.optim.Optimizer):
                # Rates and decays are this call's flags; which weights there were is the file's, and torch compares.
                groups = []
                for now, then in zip(part.state_dict()["param_groups"], state["param_groups"], strict=True):
                    groups.append(now | {"params": then["params"]})
                # It keeps the tensors that it is given, here maps of the file.
                state = {"state": copy.deepcopy(state["state"]), "param_groups": groups}
            part.load_state_dict(state)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"--resume: the part '{name}' of the checkpoint does not fit ({first_line(error)}): use "
                             "the flags of the first call") from None


def save_checkpoint(out, state, ema):
    """The model `ema` to model.safetensors, `state` to latest.pt, and the one before that to previous.pt: at every
    moment a complete checkpoint is there. OSError says that the disk is full, say; the ones before stay."""
    # Of links the targets: a link that were moved would leave both names with one target.
    latest, previous = (os.path.realpath(os.path.join(out, name)) for name in ("latest.pt", "previous.pt"))
    try:
        with whole(latest) as temporary:
            with open(temporary, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())  # before the one that it follows is moved
            ema.save(os.path.join(out, "model.safetensors"))
            if os.path.exists(latest):
                os.replace(latest, previous)
    except (OSError, RuntimeError, SafetensorError) as error:
        cause = error
        while cause.__context__ is not None:  # torch raises its own errors on top of the system's
            cause = cause.__context__
        raise OSError(f"could not write a checkpoint to {out} ({first_line(cause)}): make room and continue with "
                      "--resume") from None


def keep_best(run, model, rows, images):
    """Write best.safetensors where the fewest steps, usually one, are better than ever: by rFID, else LPIPS, else PSNR,
    whichever is the first that is measured. Its note "best" says when. Only results of as many images of the same size,
    by the same metric and in as many steps, are compared: after a change of these the next one is the best.

    rows    evaluate's for each number of steps;  images  how many were evaluated
    """
    path = os.path.join(run.args.out, "best.safetensors")
    row = min(rows, key=lambda row: row["steps"])
    metric = next(name for name in ("rfid", "lpips_vgg", "psnr") if name in row)
    protocol = {"metric": metric, "images": images, "size": run.args.size, "decoding_steps": row["steps"]}
    if row[metric] is None or math.isnan(row[metric]):
        return
    best = {}
    if os.path.exists(path):
        with safe_open(path, framework="pt") as file:
            best = json.loads(file.metadata()["config"])["notes"]["best"]
    if all(best.get(name) == value for name, value in protocol.items()):
        is_better = row[metric] > best["value"] if metric == "psnr" else row[metric] < best["value"]
        if not is_better:
            return
    notes = model.config["notes"]
    model.config["notes"] = notes | {"best": protocol | {"step": run.done, "value": row[metric]}}
    model.save(path)
    model.config["notes"] = notes


def is_finite(module):
    """Whether all weights and statistics are."""
    checks = [value.isfinite().all() for value in module.state_dict().values()]
    return bool(torch.stack(checks).all())


def peak_memory(device):
    """Most memory held so far, MiB: the GPU's allocations, else this process's resident set (0 where unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
