"""Files: written whole or not at all; weight files read without running code from them."""
import contextlib
import hashlib
import json
import math
import os
import pickle
import sys

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from plumbing.process import first_line

# ---------------------------------------------------------------------------------------------------------------------
# Writing

UNFINISHED = ".dcssdae.tmp"  # ends the names of files that are being written


@contextlib.contextmanager
def whole(path):
    """Gives a temporary name, this process's own, whose file takes the place of `path` in the end, or vanishes where an
    error comes. On the disk before it is there under its name. A symbolic link stays, its target is replaced."""
    path = os.path.realpath(path)
    temporary = f"{path}.{os.getpid()}{UNFINISHED}"
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def write_text(path, text):
    with whole(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)


def write_json(path, value):
    """A value as JSON; null in the place of numbers that are not finite."""
    write_text(path, json.dumps(strict(value), indent=1, allow_nan=False) + "\n")


def strict(value):
    """The same for strict JSON: None in the place of numbers that are not finite, in dicts and lists too."""
    if isinstance(value, dict):
        return {key: strict(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def save_grid(path, images):
    """Write a PNG of rows of images, white between them. images: (R, C, 3, H, W), or a list of R tensors (C, 3, H, W)
    of one H, W; values in [-1, 1], others are clipped."""
    h, w = images[0].shape[-2:]
    columns = max(map(len, images))
    pad = 2  # pixels of white between the images and around them
    grid = np.full((len(images) * (h + pad) + pad, columns * (w + pad) + pad, 3), 255, np.uint8)
    for r, row in enumerate(images):
        row = (row.detach().float().cpu().clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        for c, image in enumerate(row):                     # (H, W, 3)
            y, x = pad + r * (h + pad), pad + c * (w + pad)
            grid[y:y + h, x:x + w] = image
    with whole(path) as temporary:
        Image.fromarray(grid).save(temporary, format="PNG")


# ---------------------------------------------------------------------------------------------------------------------
# Weight files

class WeightsUnavailable(FileNotFoundError):
    """A pretrained network's weights are neither given, nor cached, nor downloadable."""


def local_file(path):
    """hf://owner/repo/file -> that file in the Hugging Face cache, downloaded if need be; other paths as they are."""
    if not str(path).startswith("hf://"):
        return path
    parts = str(path).removeprefix("hf://").split("/", 2)
    if len(parts) < 3:
        raise ValueError(f"{path} names no file: give hf://owner/repo/file")
    owner, repo, name = parts
    try:
        from huggingface_hub import hf_hub_download
        return hf_hub_download(f"{owner}/{repo}", name)
    except Exception as error:  # noqa: BLE001 the hub client raises many classes; all mean: no file
        raise WeightsUnavailable(f"could not get {path} ({type(error).__name__}): download {name} from "
                                 f"https://huggingface.co/{owner}/{repo} and give its path instead") from None


def downloaded(url, given, flag):
    """-> path of a network's weights: the `given` file, else torch.hub's copy of `url`, else a download to there.
    WeightsUnavailable where that cannot be had; `flag` is the way to give the file."""
    if given:
        given = local_file(given)
        if not os.path.isfile(given):
            raise WeightsUnavailable(f"{flag}: no weight file {given}")
        return given
    name = url.rsplit("/", 1)[1]
    path = os.path.join(torch.hub.get_dir(), "checkpoints", name)
    if os.path.isfile(path):
        return path
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        digest = torch.hub.HASH_REGEX.search(name)          # in names such as vgg16-397923af.pth
        torch.hub.download_url_to_file(url, path, digest and digest[1], progress=sys.stderr.isatty())
    except (OSError, RuntimeError) as error:                # urllib's errors are OSErrors; RuntimeError: wrong content
        raise WeightsUnavailable(f"{name} is not in {os.path.dirname(path)} and could not be downloaded from "
                                 f"{url.split('/')[2]} ({first_line(error)}): give it with {flag} FILE") from None
    return path


def read_tensors(path):
    """-> (what a .safetensors or torch file holds, usually {name: tensor}; its metadata {str: str}). Code in pickles is
    never run. FileNotFoundError; ValueError for anything else, in a sentence."""
    path = str(local_file(path))
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no weight file at {path}")
    try:
        if path.endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            return load_file(path), metadata
        return torch.load(path, map_location="cpu", weights_only=True), {}
    except pickle.UnpicklingError:
        raise ValueError(f"{path} is refused: it is damaged, or holds more than tensors, which is never executed; if "
                         "you trust where it comes from, convert it once by torch.save(torch.load(FILE, "
                         "weights_only=False)['state_dict'], 'weights.pt')") from None
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 whatever torch's reader stumbles over in a file of something else
        raise ValueError(f"{path} is not a readable weight file ({first_line(error)})") from None


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
