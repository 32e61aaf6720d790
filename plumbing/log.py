"""What a run tells: progress bars, log.jsonl, and the same on TensorBoard and Weights & Biases."""
import contextlib
import json
import os
import sys
import time

import torch
from tqdm import tqdm

from plumbing.files import strict, write_text

SECONDS_BETWEEN_LINES = 30  # of progress where nobody watches: in a file or a pipe


def progress(total, unit, initial=0, disable=False):
    """A tqdm bar; where stderr is no terminal, a line every 30 seconds."""
    if sys.stderr.isatty():
        return tqdm(total=total, initial=initial, unit=unit, disable=disable, dynamic_ncols=True)
    return tqdm(total=total, initial=initial, unit=unit, disable=disable, ncols=100, mininterval=SECONDS_BETWEEN_LINES,
                maxinterval=SECONDS_BETWEEN_LINES, file=LinesOnly())


class LinesOnly:
    """stderr for a bar that is not watched: each of its states is a line of its own."""

    def write(self, text):
        text = text.replace("\r", "").strip()
        if text:
            sys.stderr.write(text + "\n")

    def flush(self):
        sys.stderr.flush()


class Log:
    """log.jsonl of a run in `out`, a JSON object a line, and the boards beside it; in the first process alone.

    start  steps done: lines of later ones, which a run wrote after its last checkpoint, are dropped
    """

    def __init__(self, out, start, tensorboard=False, wandb=False, flags=None):
        self.path = os.path.join(out, "log.jsonl")
        self.writer = None
        lines = [line for line in read_lines(self.path) if json.loads(line)["step"] <= start]
        write_text(self.path, "".join(lines))
        if wandb:
            start_wandb(out, flags)
        if tensorboard or wandb:
            self.writer = summary_writer(out, start)

    def write(self, step, pictures=(), **values):
        """A line of numbers, null for what is not finite. pictures: rows of (n, 3, s, s) in [-1, 1], for the boards. A
        disk that is full ends a run where it saves, not here."""
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(strict({"step": step, **values}), allow_nan=False) + "\n")
        except OSError as error:
            tqdm.write(f"warning: could not write to {self.path}: {error.strerror}")
        if self.writer is None:
            return
        for name, value in values.items():
            if isinstance(value, float):
                self.writer.add_scalar(name, value, step)
        for row in values.get("eval", []):
            for name, value in row.items():
                if isinstance(value, float):
                    self.writer.add_scalar(f"{row['name']}/{name}", value, step)
        if pictures:
            rows = [torch.cat([*row], dim=2) for row in pictures]               # (3, s, n * s) each
            self.writer.add_image("reconstructions", torch.cat(rows, dim=1) / 2 + 0.5, step)
        self.writer.flush()


def read_lines(path):
    """The whole lines of a log. A full disk cuts lines off, which the next one is then appended to."""
    lines = []
    if not os.path.exists(path):
        return lines
    with open(path, errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError, LookupError, TypeError):
                json.loads(line)["step"]
                if line.endswith("\n"):
                    lines.append(line)
    return lines


def last_evaluation(out, done):
    """Step of the last evaluation that the log of a run has up to the step `done`, or None."""
    steps = []
    for line in read_lines(os.path.join(out, "log.jsonl")):
        entry = json.loads(line)
        if "eval" in entry and entry["step"] <= done:
            steps.append(entry["step"])
    return max(steps, default=None)


def summary_writer(out, start):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard and --wandb need the tensorboard package: pip install tensorboard") from None
    return SummaryWriter(out, purge_step=start + 1)


def start_wandb(out, flags):
    """Weights & Biases copies what TensorBoard is given."""
    try:
        import wandb
    except ImportError:
        raise ValueError("--wandb needs the wandb package: pip install wandb") from None
    name = os.path.basename(os.path.abspath(out))
    wandb.init(project="dc-ssdae", name=name, id=name, resume="allow", dir=out, config=flags, sync_tensorboard=True)


class Clock:
    """Images a second since the last reading, without the time of evaluations."""

    def __init__(self, images):
        self.images, self.at, self.paused = images, time.monotonic(), 0.0

    def rate(self, images):
        now = time.monotonic() - self.paused
        rate = (images - self.images) / max(now - self.at, 1e-6)  # Windows' clock stands still for 15 ms
        self.images, self.at = images, now
        return rate
