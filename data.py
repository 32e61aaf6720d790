"""Images in, batches out: folders, two downloadable sets and a built-in image generator, decoded with Pillow.

    python data.py --data demo --out grid.png            # look at your data: a grid of what training would see

Images are float32 (3, size, size) in [-1, 1]. An item depends on (seed, epoch, index) alone and the order on (seed,
epoch) alone, so a run gets the same batches with any number of workers or processes, and after a resume. At the end
what every program begins with: its place among the processes, its device, files that are whole or not there.
"""
import argparse
import collections
import contextlib
import copy
import ctypes
import datetime
import errno
import functools
import hashlib
import io
import json
import math
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import time
import tokenize
import zipfile
import zlib

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFilter, UnidentifiedImageError
from safetensors import SafetensorError
from tqdm import tqdm

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
NO_IMAGES = ("__MACOSX", "@eaDir")                           # folders that systems fill with copies, beside hidden ones
DEMO_LENGTH = {"train": 100_000, "val": 2_000}
SPLITS = {"train": 0, "val": 1}
# First key of every random stream: without it (seed, epoch) and (seed, epoch, 0) would be one stream to numpy.
ORDER, ITEM, DEMO = 1, 2, 3

# ----------------------------------------------------------------------------------------------------------------------
# torchvision, only where a caller asks for it

_declared = []                                               # the operators vanish with their Library object: keep it


def import_torchvision():
    """-> the torchvision module. With a CPU-only torch beside the registry's CUDA torchvision, its compiled operators
    cannot load and `import torchvision` stops at "operator torchvision::nms does not exist". Its data sets and networks
    need none of them, so then (and only then) declare the two missing operators and import again.
    Call before lpips or timm: they import torchvision themselves."""
    try:
        import torchvision
    except (RuntimeError, AttributeError) as error:
        first, again = "operator torchvision::nms does not exist", "partially initialized module 'torchvision'"
        if first not in str(error) and again not in str(error):
            raise
        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[name]                            # half imported
        _declared.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name in ("nms", "qnms"):
            _declared[-1].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    return torchvision


# ----------------------------------------------------------------------------------------------------------------------
# Built-in images: dead leaves (Lee, Mumford, Huang 2001; Baradad et al. 2021, arXiv 2106.05963). Shapes that hide one
# another, with radii of density r^-3, have the power spectrum and the edges of photographs.

BANK = 512                                                   # side of the texture fields, a power of 2
SQUARE = BANK * BANK
TURN = np.arange(24)[:, None] / 24                           # a leaf's outline has 24 points


@functools.cache
def _textures():
    """-> (3 * 512 * 512,) float32: periodic random fields of unit variance: rough, cloudy, grained; amplitude f^-a."""
    rng, fields = np.random.default_rng(0), []
    fy, fx = np.fft.fftfreq(BANK)[:, None], np.fft.rfftfreq(BANK)[None]
    for a, stretch in ((1.1, 1), (1.7, 1), (1.4, 5)):
        f = np.hypot(fx, stretch * fy)
        f[0, 0] = np.inf                                     # no mean
        field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((BANK, BANK))) * f**-a, s=(BANK, BANK))
        fields.append(field / field.std())
    return np.stack(fields).astype(np.float32).ravel()


def demo_image(size, seed, split, index):
    """-> uint8 (size, size, 3): picture `index` of "train" or "val", from the arguments alone. The arrangement is
    the same at every size; textures and stripes are laid out in pixels. KeyError for another split."""
    rng = np.random.default_rng([DEMO, seed, SPLITS[split], index])
    side = 2 * size                                          # drawn at twice the size, then averaged
    mood = rng.random(10).tolist()                           # this picture's own style
    # As many leaves as cover the picture 0.2 to 4 times: with density r^-3 their mean area is about 4 r0^2 log(r1/r0).
    r0, r1 = 0.015 * 8 ** mood[0], 0.45
    n = int(np.clip(0.2 * 20 ** mood[1] / (4 * r0**2 * np.log(r1 / r0)), 4, 250))
    u, g = rng.random((21, n + 1)), rng.standard_normal((6, n + 1))           # leaf 0 is the background

    # Palette of 6 colours: brightness varies most, then orange-blue, then red-green, as in photographs.
    bright = 0.05 + 0.95 * rng.random(6) ** (0.6 + mood[2])
    bright = bright.mean() + (0.3 + 0.7 * mood[3]) * (bright - bright.mean())
    warm, red = (0.06 + 0.4 * mood[4] ** 2) * (rng.standard_normal((2, 6)) + rng.standard_normal((2, 1)))
    palette = bright * (1 + warm * [[0.8], [0.1], [-1.0]] + red * [[0.5], [-0.4], [0.3]])                 # (3, 6)
    color = palette[:, (6 * u[0]).astype(int)] * (1 + 0.12 * g[0]) + 0.02 * g[1:4]                        # (3, n+1)
    second = palette[:, (6 * u[1]).astype(int)] - color      # textures and stripes go from one colour to the other

    # Outlines, all at once: polygons are circles with the angle rounded down, blobs have two harmonics added.
    r = (r0**-2 - u[2] * (r0**-2 - r1**-2)) ** -0.5          # inverse of the distribution function of r^-3
    r[0], r[1:4] = 0.7, 0.25 + 0.6 * u[2, 1:4]               # three large ones first: a setting
    cx, cy = 1.2 * u[3] - 0.1, 1.2 * u[4] - 0.1
    corners = np.where(u[5] < 0.35, 3 + (4 * u[7]).astype(int), 24)
    angle = 2 * np.pi * np.floor(TURN * corners) / corners                                                # (24, n+1)
    wobble = np.where(u[5] < 0.7, 0.5 * u[8], 0)
    radius = r * (1 + wobble * np.cos(2 * angle + 12 * u[9]) + 0.6 * wobble * np.cos(3 * angle + 18 * u[10]))
    px, py = radius * np.cos(angle), radius * np.sin(angle) * (0.35 + 0.65 * u[11])
    c, s = np.cos(2 * np.pi * u[6]), np.sin(2 * np.pi * u[6])
    points = side * np.stack([cx + c * px - s * py, cy + s * px + c * py], -1)                            # (24, n+1, 2)
    points = points.transpose(1, 0, 2).reshape(n + 1, 48).tolist()
    width = np.where(u[5] > 0.85, np.maximum(1, 0.15 * side * r * u[8]), 0).astype(int).tolist()
    canvas = Image.new("L", (side, side))                    # holds the number of the leaf in front
    draw = ImageDraw.Draw(canvas)
    for i in range(1, n + 1):
        if width[i]:                                         # a stroke: half an outline
            draw.line(points[i][:24], fill=i, width=width[i], joint="curve" if width[i] > 4 else None)
        else:
            draw.polygon(points[i], fill=i)
    leaf = np.asarray(canvas)                                                                             # (side, side)

    # Appearance: one table of leaf properties, looked up at each pixel.
    rough = (0.04 + 0.4 * u[12] ** 3) * (0.2 + mood[5])
    stripes = np.where(u[15] < 0.2, 0.2 + 0.8 * u[16], 0)
    wave = 2 * np.pi / (5 * (side / 10) ** u[17])            # a stripe is 5 to side/2 canvas pixels wide
    ball = np.where(u[20] < 0.4, 0.5 * u[20] / (side * r) ** 2, 0)
    table = [side * cx, side * cy, 0.2 * g[4] / (side * r), 0.2 * g[5] / (side * r), ball, rough, stripes,
             wave * np.cos(2 * np.pi * u[18]), wave * np.sin(2 * np.pi * u[18]), 2 * np.pi * u[19]]
    table = np.concatenate([table, color, second]).astype(np.float32).take(leaf, axis=1)
    cx, cy, gx, gy, ball, rough, stripes, kx, ky, phase, *colors = table                                  # (side, side)
    iy, ix = np.ogrid[:side, :side]

    def texture(start):                                      # a window of the periodic fields, from `start` on
        y, x = (start // BANK + iy) % BANK, (start + ix) % BANK
        return _textures().take(start // SQUARE * SQUARE + y * BANK + x)

    grain = texture((3 * SQUARE * u[13]).astype(np.int32).take(leaf))         # each leaf from another place
    dx, dy = ix.astype(np.float32) - cx, iy.astype(np.float32) - cy
    mix = rough * grain + stripes * (0.5 + 0.5 * np.clip(2.5 * np.sin(kx * dx + ky * dy + phase), -1, 1))
    light = 1 + np.clip(gx * dx + gy * dy - ball * (dx * dx + dy * dy), -0.6, 0.6) + 0.3 * rough * grain
    light += (0.05 + 0.2 * mood[6]) * texture(SQUARE + int(SQUARE * u[14, 0]))                            # clouds
    for k in (1, 2, 3):                                      # a soft shadow, down and to the right of what is in front
        d = max(1, int(k * side * (0.004 + 0.012 * mood[7])))
        light[d:, d:] *= 1 - 0.2 * mood[8] * (leaf[:-d, :-d] > leaf[d:, d:])
    rgb = np.stack([(a + mix * b) * light for a, b in zip(colors[:3], colors[3:], strict=True)], -1)
    image = Image.fromarray(np.clip(255 * rgb, 0, 255).astype(np.uint8))
    if mood[9] < 0.6:                                        # most photographs are a little out of focus
        image = image.filter(ImageFilter.BoxBlur(2.5 * mood[9]))
    return np.asarray(image.reduce(2))


# ----------------------------------------------------------------------------------------------------------------------
# One file

# Seconds between the attempts to read a file, two minutes in all: network folders come back within, and processes wait
# longer for one another.
PAUSES = (0.5, 1, 2, 4, 8, 16, 32, 60)


class Unreadable(ValueError):
    """This one file is at fault: it is gone, or it is no picture that can be decoded."""


def read_file(path, retry=True):
    """-> bytes. An error of the system says nothing about the file (network folders vanish, handles run out): with
    `retry`, try again after PAUSES. OSError if it stays; Unreadable if the file is gone, and it alone."""
    was_missing = False
    for attempt, pause in enumerate([*PAUSES, None] if retry else [None]):
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            problem = error
        is_missing = problem.errno in (errno.ENOENT, errno.ELOOP) and has_entries(os.path.dirname(path) or ".")
        if is_missing and (was_missing or pause is None):    # not at once: its folder may have come back in between
            raise Unreadable("there is no such file")
        was_missing = is_missing
        if pause is None:
            break
        if attempt == 0 and not is_missing:
            print(f"warning: cannot read {path} ({problem.strerror}): trying again for {sum(PAUSES):g} s",
                  file=sys.stderr, flush=True)
        time.sleep(pause)
    raise OSError(problem.errno, problem.strerror + (f", for {sum(PAUSES):g} s" if retry else ""), path)


def has_entries(folder):
    """-> bool: is there anything in this folder? What is left of an unmounted one is missing or empty."""
    try:
        with os.scandir(folder) as found:
            return any(True for _ in found)
    except OSError:
        return False


def read_image(path, least=None, retry=True):
    """Image file -> PIL RGB image, as to_rgb says. least: JPEGs are decoded at 1/2, 1/4 or 1/8 if both sides are still
    at least that. Unreadable, or OSError as read_file says."""
    return decode_image(read_file(path, retry), least)


def decode_image(content, least=None):
    """Bytes of an image file -> PIL RGB image, see read_image. Unreadable; OSError where memory is short."""
    reason = None
    # Pillow refuses a PNG for its comments and profiles, too: only its pixels can make it unreadable.
    for attempt in [content, png_pixels(content)] if content.startswith(PNG) else [content]:
        try:
            with Image.open(io.BytesIO(attempt)) as image:
                if least:
                    image.draft(None, (least, least))        # square, so that a turn does not matter
                return to_rgb(image)
        except MemoryError:
            raise OSError(errno.ENOMEM, "not enough memory to decode an image") from None
        except Exception as error:  # noqa: BLE001         # OSError, SyntaxError, struct.error ...: varies by format
            reason = reason or error
    if not content:
        raise Unreadable("the file is empty")
    if isinstance(reason, UnidentifiedImageError):           # which would name a buffer
        raise Unreadable("its content is no known image format")
    raise Unreadable(" ".join(str(reason).split()) or type(reason).__name__)


PNG = b"\x89PNG\r\n\x1a\n"
PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


def png_pixels(content):
    """Bytes of a PNG -> bytes of a PNG that holds its pixels and orientation alone."""
    kept, start = [PNG], len(PNG)
    while start < len(content):
        end = start + 12 + int.from_bytes(content[start:start + 4], "big")    # length, name, data, checksum
        chunk = content[start:end]
        if chunk[4:8] in PNG_PIXELS:
            kept.append(chunk)
        elif chunk[4:8] == b"eXIf":
            kept.append(chunk[:-4] + zlib.crc32(chunk[4:-4]).to_bytes(4, "big"))
        start = end
    return b"".join(kept)


ORIENTATION = 0x0112                                         # the one tag of EXIF that changes a picture
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}


def orientation(image):
    """Loaded PIL image -> its orientation, 1 (upright) to 8; 1 where it cannot be read."""
    found = orientation_tag(image.info.get("exif", b""))
    if found is None:                                        # TIFF's own tag, XMP
        try:
            found = image.getexif().get(ORIENTATION)
        except Exception:  # noqa: BLE001                  # damaged metadata, and no more than that
            found = None
    return found if found in TURNS else 1


def orientation_tag(exif):
    """Bytes of an EXIF block -> the value of its orientation tag, None without. Pillow would leave out all tags that
    follow a damaged one."""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = {b"II": "little", b"MM": "big"}.get(exif[:2])
    if order is None:
        return None

    def number(start, size):
        return int.from_bytes(exif[start:start + size], order)

    first = number(4, 4)
    for start in range(first + 2, min(first + 2 + 12 * number(first, 2), len(exif)), 12):
        size = {3: 2, 4: 4}.get(number(start + 2, 2))        # SHORT or LONG
        if number(start, 2) == ORIENTATION and size:
            return number(start + 8, size)
    return None


def to_rgb(image):
    """PIL image of any mode -> RGB, upright by its orientation tag; transparency over white; 16-bit grey scaled to 8
    bits. Nothing else in its metadata matters. ValueError for pixels without a known white."""
    image.load()                                             # only then all metadata are there, and TIFFs are turned
    turn = TURNS.get(orientation(image))
    if turn is not None:
        image = image.transpose(turn)
        image.info = {key: value for key, value in image.info.items() if key == "transparency"}  # turn it only once
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers: convert it to 8 or 16 bits")
    if image.mode.startswith("I"):                           # Pillow would clip at 255, that is nearly everywhere
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("its pixels are beyond 16 bits: convert it to 8 or 16 bits")
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


LONGEST = 16  # sides of a crop: of longer pictures only the crop is resized. 20000 x 2 pixels would take 2 GB at 256 px


def prepare_eval(image, size, crop="center"):
    """PIL image -> PIL RGB image (size, size), as reconstruction is scored. `center` (SSDD): short side to `size`,
    bilinear, centre crop, rounding as torchvision does. `adm` (ADM, arXiv 2105.05233; also DC-AE): box-halving while
    the short side is at least 2 size, then bicubic, centre crop. ValueError for another crop."""
    image = to_rgb(image)
    w, h = image.size
    if crop == "center":
        w, h = (size, size * h // w) if w <= h else (size * w // h, size)
        x, y = round((w - size) / 2), round((h - size) / 2)
        kind = Image.BILINEAR
    elif crop == "adm":
        while min(image.size) >= 2 * size:
            image = image.resize((image.width // 2, image.height // 2), Image.BOX)
        scale = size / min(image.size)
        w, h = round(image.width * scale), round(image.height * scale)
        x, y = (w - size) // 2, (h - size) // 2
        kind = Image.BICUBIC
    else:
        raise ValueError(f"crop is {crop!r}: use center or adm")
    if max(w, h) <= LONGEST * size:
        return image.resize((w, h), kind).crop((x, y, x + size, y + size))
    sx, sy = image.width / w, image.height / h
    return image.resize((size, size), kind, box=(x * sx, y * sy, (x + size) * sx, (y + size) * sy))


def prepare_train(image, size, short, u):
    """PIL RGB image -> PIL image (size, size): short side to `short` >= size, bilinear; crop placed by u[0], u[1] in
    [0, 1); mirrored if u[2] < 0.5. Only the crop is resampled, from its exact place, between pixels if need be."""
    w, h = image.size
    side = min(w, h) * size / short
    x, y = u[0] * (w - side), u[1] * (h - side)
    image = image.resize((size, size), Image.BILINEAR, box=(x, y, min(x + side, w), min(y + side, h)))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if u[2] < 0.5 else image


# So many images in a row that cannot be decoded are no accident, and one stand-in for all would be seen too often.
STAND_INS = 64


class ImageDataset(torch.utils.data.Dataset):
    """Item i (of epoch 0) or (epoch, i) -> (float32 (3, size, size) in [-1, 1], i). `images` is an array: file names as
    bytes, pictures (n, h, w, 3) uint8, or indices of built-in images of `split`; `labels` (n,) int64, -1: no class,
    else the number of a name in `classes`; `source` says where the images come from.

    A file that cannot be decoded is named once on stderr and flagged in `skipped`, (n,) uint8 in shared memory, so that
    the finds of all workers add up in int(dataset.skipped.sum()). In training the next readable image stands in for it,
    in evaluation the item is None. OSError where a file cannot be read (see read_file), ValueError where training finds
    STAND_INS images in a row, or all, undecodable; a worker returns them as the item, and Loader raises them."""

    def __init__(self, images, labels, name, size, train, aug_scale=2.0, seed=0, crop="center", split="val",
                 source=None, classes=(), enlarge=False):
        self.images, self.labels, self.name, self.size, self.train = images, labels, name, size, train
        self.aug_scale, self.seed, self.crop, self.split = aug_scale, seed, crop, split
        self.source, self.classes = source or name, list(classes)
        self.enlarge = enlarge                               # crops to more than the file's own pixels, as SSDD does
        self.whole = len(images)                             # of which this may be a subset
        self.skipped = torch.zeros(len(images), dtype=torch.uint8).share_memory_()

    def __len__(self):
        return len(self.images)

    def subset(self, i):
        """-> ImageDataset of the images `i` (indices or a slice), numbered from 0."""
        part = copy.copy(self)
        part.images, part.labels = self.images[i], self.labels[i]
        part.skipped = torch.zeros(len(part.images), dtype=torch.uint8).share_memory_()
        return part

    def content(self):
        """-> str: number of images and a hash of their names relative to the folder, the same wherever that lies."""
        names = [str(self.name)]
        if self.images.dtype.kind == "S":
            ends = [os.path.dirname(self.images[k]) for k in (0, -1)]  # in order: they share what all share
            root = len(os.path.commonpath(ends)) + len(ends[0]) - len(os.path.commonpath(ends[:1]))  # ./ and //, too
            names = [name[root:] for name in self.images.tolist()]
        digest = hashlib.sha256(b"\0".join(os.fsencode(name) for name in names)).hexdigest()
        return f"{len(self)} images, names {digest[:16]}"

    def name_of(self, j):
        """-> str: image j's file; of images without files its number."""
        source = self.images[j]
        return os.fsdecode(source) if isinstance(source, bytes) else str(j)

    def described(self):
        """-> str: how many images these are, and of what."""
        count = f"{len(self)}" if len(self) == self.whole else f"{len(self)} of {self.whole}"
        classes = f" ({len(self.classes)} classes)" if self.classes else ""
        return f"{count} images of {self.source}{classes}"

    def nothing_readable(self):
        return ValueError(f"none of the {len(self)} images of {self.name} can be decoded: check the files named above")

    def decode(self, j, short):
        """Image j -> PIL RGB image, short side >= `short` if the file has that much; None if it is unreadable."""
        source = self.images[j]
        if isinstance(source, np.integer):
            return Image.fromarray(demo_image(self.size, self.seed, self.split, int(source)))
        if isinstance(source, np.ndarray):
            return Image.fromarray(source)
        if self.skipped[j]:
            return None
        path = os.fsdecode(source)
        try:
            return read_image(path, short if self.train else None)
        except Unreadable as error:
            self.skipped[j] = 1
            print(f"warning: skipping unreadable image {path}: {error}", file=sys.stderr, flush=True)
            return None

    def item(self, epoch, i):
        """Image i as it is in `epoch`, (uint8 (3, size, size), i), or None, see above."""
        n = len(self)
        u = np.random.default_rng([ITEM, self.seed, epoch, i]).random(4)
        short = self.size * (1 + (self.aug_scale - 1) * u[3])
        tried = min(n, STAND_INS) if self.train else 1
        for j in range(i, i + tried):
            image = self.decode(j % n, int(np.ceil(short)))
            if image is not None:
                if not self.enlarge:
                    short = max(self.size, min(short, *image.size))
                image = (prepare_train(image, self.size, short, u) if self.train
                         else prepare_eval(image, self.size, self.crop))
                x = np.ascontiguousarray(np.array(image).transpose(2, 0, 1))  # (3, size, size) uint8
                return torch.from_numpy(x), i
        if not self.train:
            return None
        if tried == n:
            raise self.nothing_readable()
        first, last = (os.fsdecode(self.images[k % n]) for k in (i, i + tried - 1))
        raise ValueError(f"{tried} images in a row cannot be decoded, {first} to {last}: remove or replace such files")

    def __getitem__(self, key):
        item = self.levels(key)
        return (from_levels(item[0]), item[1]) if isinstance(item, tuple) else item

    def levels(self, key):
        """The item with its image in the 256 levels of 8 bit: a quarter of what would cross between processes."""
        epoch, i = key if isinstance(key, tuple) else (0, key)
        if not 0 <= i < len(self):
            raise IndexError(f"no image {i} in a data set of {len(self)}")
        try:
            return self.item(epoch, i)
        except (OSError, ValueError) as error:
            if torch.utils.data.get_worker_info() is None:
                raise
            return error                                     # raised here it would reach the user as a stack trace

    def __getitems__(self, keys):
        """A DataLoader's items of a batch, as `levels`; up to the first error, which ends the run: each of the others
        would wait as long."""
        items = []
        for key in keys:
            items.append(self.levels(key))
            if isinstance(items[-1], Exception):
                break
        return items


def from_levels(x):
    """uint8 -> float32 in [-1, 1], any shape."""
    return x.float().div_(127.5).sub_(1)


# ----------------------------------------------------------------------------------------------------------------------
# A set of images

@functools.cache
def say(line):
    """Print a line on stderr, once, and in the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def is_hidden(name):
    """-> bool: is this a file or folder that no user put there as an image?"""
    return name.startswith(".") or name in NO_IMAGES


def fail(error):
    raise error


def list_images(root):
    """Sorted names of all images below `root`; follows links, leaves out hidden files and folders, and says how many
    files of other types there are. OSError: unreadable folder."""
    names, seen, others = [], set(), collections.Counter()
    for folder, dirs, files in os.walk(root, followlinks=True, onerror=fail):
        real = os.path.realpath(folder)
        if real in seen:                                     # a link back up the tree
            dirs.clear()
            continue
        seen.add(real)
        dirs[:] = sorted(d for d in dirs if not is_hidden(d))
        for file in files:
            extension = os.path.splitext(file)[1].lower()
            if is_hidden(file):
                continue
            if extension in EXTENSIONS:
                names.append(os.path.join(folder, file))
            else:
                others[extension or "without extension"] += 1
    if others:
        counts = sorted((-count, extension) for extension, count in others.items())
        types = ", ".join(f"{-count} {extension}" for count, extension in counts[:8])
        more = f" and {len(others) - 8} more" if len(others) > 8 else ""
        say(f"note: {others.total()} files below {root} were left out, being of other types: {types}{more}")
    return sorted(names)


# What a folder of images may call its parts. `test` validates only where nothing else does.
TRAIN_NAMES, VAL_NAMES, TEST_NAMES = ("train", "training"), ("val", "valid", "validation"), ("test", "testing")


def entries(root):
    """-> sorted names of the folders in `root`, and of its files, without hidden ones. OSError."""
    _, folders, files = next(os.walk(root, onerror=fail))
    return [sorted(name for name in names if not is_hidden(name)) for names in (folders, files)]


def split_folders(root):
    """-> {"train": folder, "val": folder}, as far as there are such below `root`; {} where none of its folders is
    called so: a plain tree of images. ValueError where it is not clear which images are meant."""
    below, files = entries(root)
    train, val, test = ([f for f in below if f.lower() in names] for names in (TRAIN_NAMES, VAL_NAMES, TEST_NAMES))
    found = {"train": train, "val": val or test}
    found = {split: folders for split, folders in found.items() if folders}
    if not found:
        return {}
    for folders in found.values():
        if len(folders) > 1:
            raise ValueError(f"{root} holds {slashed(folders)}: keep the one that is meant, move the others elsewhere")
    others = [f for f in below if f not in train + val + test]
    if len(found) < 2 and others:
        raise ValueError(f"{root} holds {slashed(train + val + test)} beside other folders "
                         f"({slashed(others[:3])}), but not both training and validation images: give one "
                         "of its folders, or rename what is a class")
    loose = [f for f in files if f.lower().endswith(EXTENSIONS)]
    if loose:
        raise ValueError(f"{root} holds images ({loose[0]} ...) beside {slashed(train + val + test)}: move them into "
                         "one of these folders, or elsewhere")
    return {split: os.path.join(root, folders[0]) for split, folders in found.items()}


def slashed(folders):
    return " and ".join(f"{folder}/" for folder in folders)


def missing_part(root, split, there):
    """-> ValueError: `root` holds the folder `there` alone, which is not `split`'s."""
    there = os.path.basename(there)
    names = "train/" if split == "train" else "val/ (valid/, validation/, test/)"
    return ValueError(f"{root} holds {there}/ but no {names}: add it, or give {os.path.join(root, there)}, whose "
                      "images then serve for training and validation alike")


def nested_split(parts):
    """Names of images relative to a root, split at the slashes -> a folder, relative too, that holds training images
    in one folder and others in another; None without."""
    held = collections.defaultdict(set)
    for folders in {tuple(part[:-1]) for part in parts}:
        for depth, folder in enumerate(folders):
            held[folders[:depth]].add(folder.lower())
    for folders, children in sorted(held.items()):
        if children.intersection(TRAIN_NAMES) and children.intersection(VAL_NAMES + TEST_NAMES):
            return os.path.join(*folders)
    return None


def split_classes(folders):
    """{split: folder} -> sorted names of the classes, the folders in any of them: a class that one split lacks
    does not shift the others' numbers. Validation images that share no class with the training images have none."""
    classes = {split: set(entries(folder)[0]) for split, folder in folders.items()}
    train, val = classes.get("train", set()), classes.get("val", set())
    if train and val and not train & val:
        say(f"note: {folders['val']} has no class folder of {folders['train']}: its images have no labels")
        val = set()
    return sorted(train | val)


def folder_images(root, split):
    """-> names of the images of `split` in the folder `root`, their labels, the classes, and the folder they are from.
    ValueError: none, or not clear which."""
    folders = split_folders(root)
    if folders and split not in folders:
        raise missing_part(root, split, *folders.values())
    folder = folders.get(split, root)
    names = list_images(folder)
    if not names:
        raise ValueError(f"no images in {folder}: it needs files ending in {' '.join(EXTENSIONS)}, at any depth")
    parts = [f[len(folder):].lstrip(os.sep).split(os.sep) for f in names]
    if folders:
        classes = split_classes(folders)
    else:
        nested = nested_split(parts)
        if nested:
            raise ValueError(f"{os.path.join(root, nested)} holds training and other images: give this folder, or move "
                             "its parts to the top")
        classes = sorted({p[0] for p in parts if len(p) > 1})
    number = {name: k for k, name in enumerate(classes)}
    labels = [number.get(p[0], -1) if len(p) > 1 else -1 for p in parts]
    return names, labels, classes, folder


def download(spec, split):
    """-> (uint8 (n, 32, 32, 3), labels, classes) for cifar10; for imagenette the folder that holds both parts (the copy
    with a short side of 320). Kept in $DCSSDAE_DATA, else ~/.cache/dc-ssdae. OSError, one sentence, if it cannot be
    had."""
    root = os.environ.get("DCSSDAE_DATA") or os.path.join(os.path.expanduser("~"), ".cache", "dc-ssdae")
    datasets = import_torchvision().datasets
    try:
        os.makedirs(root, exist_ok=True)
        with open(os.path.join(root, ".lock"), "w") as lock:
            if os.name == "posix":                           # one process downloads, the others of the machine wait
                import fcntl
                fcntl.flock(lock, fcntl.LOCK_EX)
            if spec == "cifar10":
                found = datasets.CIFAR10(root, train=split == "train", download=True)
                return found.data, found.targets, found.classes
            datasets.Imagenette(root, split=split, size="320px", download=True)
            return os.path.join(root, "imagenette2-320")
    except (OSError, RuntimeError) as error:                 # RuntimeError: torchvision on a damaged archive
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"cannot get {spec} into {root} ({reason}): check the network or give an image folder") from error


def make_dataset(spec, size, train, aug_scale=2.0, seed=0, limit=None, crop="center", split=None,
                 enlarge=False):
    """-> ImageDataset. spec: `demo`, `imagenette`, `cifar10`, or a folder (`./demo` for one of that name) of images at
    any depth: with train/ and val/ (or valid/, validation/, else test/) `train` picks, else all images serve both.
    Training: short side uniform in [size, aug_scale size], random crop, mirror; a short side above the picture's own is
    cut down to that, unless `enlarge` (SSDD), but never below size. Evaluation: prepare_eval with `crop`.
    `demo` is drawn at `size`, so aug_scale has no effect there. limit: that many images, evenly spread over the set.
    split: train or val, where `train` does not say it: train=False, split="train" puts training images through
    prepare_eval. Labels: cifar10's, or the rank of a file's topmost folder among those of both parts, or -1.
    ValueError (bad number, no images, unclear parts), FileNotFoundError, NotADirectoryError, OSError (download), one
    sentence each."""
    if not 0 < size < INF or int(size) != size:
        raise ValueError(f"size is {size}: use a positive whole number of pixels")
    if not 1 <= aug_scale < INF:
        raise ValueError(f"aug_scale is {aug_scale}: use 1 or more, a smaller image cannot hold the crop")
    if not is_whole(seed, 0) or (limit is not None and not is_whole(limit, 1)):
        raise ValueError(f"seed is {seed} and limit is {limit}: use seed >= 0 and limit >= 1 or none")
    if crop not in ("center", "adm"):
        raise ValueError(f"crop is {crop!r}: use center or adm")
    split = split or ("train" if train else "val")
    if spec == "demo":
        images, aug_scale = np.arange(DEMO_LENGTH[split]), 1.0
        labels, classes, source = np.full(len(images), -1), [], f"demo, part {split}"
    elif spec == "cifar10":
        images, labels, classes = download(spec, split)
        source = f"cifar10, part {split}"
    else:
        folder = download(spec, split) if spec == "imagenette" else os.path.expanduser(spec)
        if not os.path.exists(folder):
            raise FileNotFoundError(f"there is no folder {spec}: give demo, imagenette, cifar10 or a folder of images")
        if not os.path.isdir(folder):
            raise NotADirectoryError(f"{spec} is a file: give demo, imagenette, cifar10 or a folder of images")
        names, labels, classes, source = folder_images(folder, split)
        images = np.array([os.fsencode(f) for f in names])   # one block: workers would copy a list, bit by bit
    dataset = ImageDataset(images, np.array(labels), spec, int(size), train, aug_scale, seed, crop, split, source,
                           classes, enlarge)
    n = len(dataset)
    return dataset if limit is None or limit >= n else dataset.subset(np.arange(limit) * n // limit)


def is_whole(value, least):
    """-> bool: is this a whole number of at least `least`?"""
    return isinstance(value, (int, np.integer)) and value >= least


def parts_taken(train, val):
    """Two data sets -> one line: which images train, and which validate."""
    line = f"training on {train.described()}; validating on {val.described()}"
    if train.source == val.source:
        line += ", which train, too: there are no folders train/ and val/"
    return line


# ----------------------------------------------------------------------------------------------------------------------
# Batches

class TrainBatches:
    """Endless lists of (epoch, index), one a step from step `start`: this rank's share of each global batch. Position
    p = step * batch_size + j of the stream lies in epoch p // n, which is a permutation drawn from (seed, epoch)."""

    def __init__(self, n, batch_size, seed, rank, world, start):
        self.n, self.batch_size, self.seed, self.start = n, batch_size, seed, start
        self.first, self.share = rank * batch_size // world, batch_size // world

    def __iter__(self):
        drawn, step = None, self.start
        while True:
            batch, p = [], step * self.batch_size + self.first
            for epoch, k in (divmod(q, self.n) for q in range(p, p + self.share)):
                if epoch != drawn:
                    order, drawn = np.random.default_rng([ORDER, self.seed, epoch]).permutation(self.n), epoch
                batch.append((epoch, int(order[k])))
            yield batch
            step += 1


def collate(items):
    """[(x, i) or None] -> x (b, 3, s, s), index (b,) int64, without the None; b may be 0. With an exception among the
    items: (exception, None)."""
    for item in items:
        if isinstance(item, Exception):
            return item, None
    items = [item for item in items if item is not None]
    x = torch.stack([x for x, _ in items]) if items else torch.empty(0)
    return x, torch.tensor([i for _, i in items], dtype=torch.int64)


KILLED_READER = "DataLoader worker"                          # in torch's message
READER_WAS_KILLED = "a process that reads images was killed, for want of memory most often: use fewer --workers"


class Loader(torch.utils.data.DataLoader):
    """DataLoader whose images become numbers in [-1, 1] on `device`. Leaves out batches without a readable image.
    Raises what its workers met: OSError or ValueError, one sentence; OSError where a worker is killed; ValueError too
    if all images are unreadable, unless may_be_empty."""

    may_be_empty, device = False, "cpu"

    def __iter__(self):
        try:
            yield from self.readable()
        except (RuntimeError, ConnectionError, EOFError) as error:
            is_pipe = self.num_workers > 0 and not isinstance(error, RuntimeError)  # a reader's, cut off
            if not (is_pipe or KILLED_READER in str(error)):
                raise
            raise OSError(READER_WAS_KILLED) from None

    def readable(self):
        """The batches that hold an image."""
        batches = super().__iter__()
        if self.num_workers and threading.current_thread() is threading.main_thread():
            # torch tells of a dead worker from a signal, in the midst of whatever step the program is at, which then
            # cannot save. Without that next() finds it, within 5 seconds.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for x, index in batches:
            if index is None:
                raise x
            if len(index):
                yield from_levels(x.to(self.device, non_blocking=True)), index
            elif self.dataset.skipped.all() and not self.may_be_empty:
                raise self.dataset.nothing_readable()


def make_loader(dataset, batch_size, train, workers=0, seed=0, rank=0, world=1, start=0, may_be_empty=False,
                device="cpu"):
    """-> Loader over x (b, 3, s, s) in [-1, 1] on `device`, index (b,) int64. batch_size counts all `world` processes
    together. Training: endless, b = batch_size / world, from step `start` on (resume); an image's stand-in keeps its
    index.
    Evaluation: this rank's indices rank, rank + world, ... once and in order; the last batch may be smaller.
    ValueError if batch_size is not in [1, 10**6] or, in training, not a multiple of world."""
    if not is_whole(batch_size, 1) or batch_size > LARGEST_BATCH or (train and batch_size % world):
        raise ValueError(f"batch_size is {batch_size}: use a positive multiple of the {world} process(es)")
    if train:
        batches = TrainBatches(len(dataset), batch_size, seed, rank, world, start)
    else:
        indices, share = range(rank, len(dataset), world), max(1, batch_size // world)
        batches = [indices[k:k + share] for k in range(0, len(indices), share)]
    # Workers run torch with one thread as they are. Its own generator: the caller's random state stays as it is.
    loader = Loader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers,
                    generator=torch.Generator(),
                    persistent_workers=workers > 0, pin_memory=torch.cuda.is_available())
    loader.may_be_empty, loader.device = may_be_empty, device
    return loader


# ----------------------------------------------------------------------------------------------------------------------
# Processes and devices

# glibc's mallopt: what memory that is freed stays with the process.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
MMAP_MAX = 65536                                             # glibc's default number of maps of their own
LARGEST_KEPT = 1024                                          # pixels a side up to which freed memory stays


def setup(device=None):
    """(rank, world, device). Under torchrun joins the process group: nccl for tensors on GPUs, gloo for
    others. One process needs no launcher.

    device  "cuda", "mps" or "cpu"; None: the first that is there. ValueError where there is no such device.
    """
    refuse_lone_tasks()
    rank = int(os.environ.get("RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    name = device or best_device()
    if name == "cuda" and local >= torch.cuda.device_count():
        raise ValueError(f"--device cuda: process {local} of this machine needs a GPU of its own, and PyTorch sees "
                         f"{torch.cuda.device_count()} here")
    try:
        device = torch.device("cuda", local) if name == "cuda" else torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: there is no such device here ({first_line(error)})") from None
    if device.type not in ("cuda", "mps", "cpu"):
        raise ValueError(f"--device {name}: expected cuda, mps or cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    keep_freed_memory(True)
    if world > 1 and not dist.is_initialized():
        join_processes("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", rank, world)
    return rank, world, device


def refuse_lone_tasks():
    """ValueError under Slurm's srun without torchrun: each of the tasks would take itself for the only process."""
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or 1)
    if tasks > 1 and "SLURM_PROCID" in os.environ and "RANK" not in os.environ:
        raise ValueError(f"srun started {tasks} tasks, and each would run alone: start one task a node, and in it the "
                         "processes: srun --ntasks-per-node=1 torchrun --nproc_per_node=GPUS ... (docs/training.md)")


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


def default_workers():
    """-> int: processes that read images, for one of this machine's training processes: half of its share of the
    processors that it may use."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    share = processors // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return min(8, share // 2)


class Terminal:
    """A text stream that ends no program: characters that it cannot encode are written as escapes, and once it is gone
    (a closed pipe, a full disk) the rest is left out, with one warning in `other`."""

    def __init__(self, stream, other=None):
        self.stream, self.other = stream, other
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)  # a killed program's lines are there

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with self.kept():
            self.stream.write(text)
        return len(text)

    def flush(self):
        with self.kept():
            self.stream.flush()

    @contextlib.contextmanager
    def kept(self):
        try:
            yield
        except (OSError, ValueError) as error:               # ValueError: the stream is closed
            # What is in its buffer would fail again at the end of the program: let the system swallow it.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)
            if self.other is not None:
                print(f"warning: what follows is not shown: {error}", file=self.other)
            self.stream, self.other = open(os.devnull, "w"), None


def keep_terminals():
    """Make Terminals of stdout and stderr. Where one is closed from the start, the first file that is opened would take
    its number, and whatever a library prints would be written into that file."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    sys.stderr = Terminal(sys.stderr)
    sys.stdout = Terminal(sys.stdout, sys.stderr)


@contextlib.contextmanager
def only_warns(what):
    """What goes wrong inside, which only shows results, is a warning: `what` could not be written."""
    try:
        yield
    except Exception as error:  # noqa: BLE001             # Pillow and matplotlib raise many types
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"warning: could not write {what}: {reason}", file=sys.stderr, flush=True)


def guarded(main):
    """Call main(); what the user can mend ends in one sentence and exit code 1, not in a traceback
    (TRACEBACK=1 shows it)."""
    terminals = sys.stdout, sys.stderr
    keep_terminals()
    try:
        main()
    except (ValueError, OSError) as error:
        close_bars()
        if os.environ.get("TRACEBACK"):
            raise
        sys.exit(last_words(str(error)))
    except KeyboardInterrupt:
        close_bars()
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except (RuntimeError, MemoryError) as error:
        close_bars()
        is_killed_reader = KILLED_READER in str(error)       # torch says so wherever the program is at that moment
        is_known = is_killed_reader or is_out_of_memory(error) or is_lost_connection(error)
        if os.environ.get("TRACEBACK") or not is_known:
            raise
        if is_killed_reader:
            sys.exit(last_words(READER_WAS_KILLED))
        if is_out_of_memory(error):
            sys.exit(last_words(f"out of memory ({first_line(error)}): use a smaller --batch_size; training can also "
                                "split it (--micro_batch) and compute blocks twice (--checkpointing)"))
        sys.exit(last_words("another process has ended: its own message says why; where there is none, it was killed, "
                            "for want of memory most often"))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.stdout.flush()                                   # here, where failing is no error
        sys.stdout, sys.stderr = terminals


def close_bars():
    """End the lines of progress bars, so that what follows stands on one of its own."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def first_line(error):
    """-> str: what an exception says, without what libraries append to it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_out_of_memory(error):
    """Whether a GPU's allocator or a CPU's (by its words) has found no memory."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def is_lost_connection(error):
    """Whether gloo (by its words) or NCCL (by its type) says that a process is gone."""
    signs = ("gloo", "Connection closed", "Connection reset")
    return dist.is_initialized() and (isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs))


LISTEN = datetime.timedelta(seconds=3)                       # so long for the first process's message


def last_words(message):
    """-> what sys.exit gets. Every process is heard, with its rank and host; but what the first one says too, it says
    for all, and the others get 1, which is silent."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return f"error: {message}"
    of_first, key = None, f"error{os.environ.get('TORCHELASTIC_RESTART_COUNT')}"
    with contextlib.suppress(RuntimeError, OSError, ValueError):  # the store may be gone
        store = shared_store()
        if rank == 0:
            store.set(key, message)
        else:
            store.wait([key], LISTEN)
            of_first = store.get(key).decode()
    if rank == 0:
        return f"error: {message}"
    if of_first == message:
        return 1
    return f"error: rank {rank} of {world} on {socket.gethostname()}: {message}"


def shared_store():
    """The processes' key-value store; before they have joined: torchrun's. ValueError where there is none yet."""
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise ValueError("no store")
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=LISTEN)


def check_compiler(device):
    """Compile a trivial function, as --compile will compile networks. ValueError where that fails, for want of a
    compiler most often."""
    try:
        torch.compile(lambda x: 2 * x)(torch.ones(8, device=device))
    except Exception as error:  # noqa: BLE001             # dynamo's and inductor's own types, triton's
        lines = [line for line in str(error).strip().splitlines() if not line.endswith("raised:")]  # a mere heading
        reason = lines[0][:200] if lines else type(error).__name__
        raise ValueError(f"--compile does not work here ({reason}): install a C++ compiler such as g++ (CXX names "
                         "another), or leave --compile out") from None


INF, MANY = float("inf"), 10**12                             # MANY: more steps or images than anybody has
LARGEST_BATCH = 10**6                                        # images a step, over all processes
# What numeric flags may be, in all programs: (lowest, highest, interval), ( and ) for an end that is itself left out.
RANGES = {
    "size": (1, 65536, "[]"), "limit": (1, MANY, "[]"), "workers": (0, 1000, "[]"), "seed": (0, 2**63, "[)"),
    "aug_scale": (1, 100, "[]"), "batch_size": (1, LARGEST_BATCH, "[]"), "micro_batch": (1, MANY, "[]"),
    "steps": (1, MANY, "[]"), "lr": (0, INF, "()"), "warmup": (0, MANY, "[]"), "decay": (0, 1, "[]"),
    "weight_decay": (0, INF, "[)"), "grad_clip": (0, INF, "[)"), "ema": (0, 1, "[)"), "ema_start": (0, MANY, "[]"),
    "enc_width": (0, 64, "(]"), "depth": (0, 1000, "[]"), "window": (1, 1000, "[]"),
    "a": (0, 1, "()"), "b": (0, INF, "()"), "lam": (0, INF, "()"), "t_mean": (-INF, INF, "()"),
    "g_power": (0, INF, "()"), "w_kl": (0, INF, "[)"), "w_gan": (0, INF, "[)"), "w_lpips": (0, INF, "[)"),
    "w_repa": (0, INF, "[)"), "repa_size": (8, 65536, "[]"), "gan_start": (0, MANY, "[]"),
    "keep": (1, 1000, "[]"), "eval_every": (0, MANY, "[]"), "eval_steps": (1, MANY, "[]"),
    "eval_images": (1, MANY, "[]"), "save_every": (1, MANY, "[]"), "log_every": (1, MANY, "[]"),
    "teacher_steps": (1, MANY, "[]"), "t_shift": (0, INF, "()"), "eta": (0, INF, "()"), "last_eta": (0, INF, "()"),
    "mu": (0, 1, "[)"),
    "tol": (0, INF, "[)"), "calibrate": (1, MANY, "[]"), "shard": (1, MANY, "[]"), "rows": (1, 1000, "[]"),
    "rounds": (1, 1000, "[]"),
}


def check_numbers(args, names=tuple(RANGES)):
    """ValueError where one of these flags that was given, a number or a list of them, is not in its range."""
    for name in names:
        low, high, interval = RANGES[name]
        value = getattr(args, name, None)
        numbers = value if isinstance(value, list) else [value]
        for number in numbers:
            if number is not None and not lies_within(number, low, high, interval):
                raise ValueError(f"--{name} {number} is out of range: give a number in "
                                 f"{interval[0]}{low:g}, {high:g}{interval[1]}")


def lies_within(number, low, high, interval):
    """-> bool. NaN lies nowhere, nor does what is no number."""
    if not isinstance(number, (int, float)):
        return False
    is_above = number >= low if interval[0] == "[" else number > low
    is_below = number <= high if interval[1] == "]" else number < high
    return is_above and is_below


def warn_of_idle_flags(parser, args, idle, argv=None):
    """A warning, of the first process, for each flag of the command line that has no effect. idle: {name: why}."""
    nowhere = object()
    given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), nowhere)))  # where no default enters
    for name, why in idle.items():
        if getattr(given, name, nowhere) is not nowhere and os.environ.get("RANK", "0") == "0":
            print(f"warning: --{name} has no effect {why}", file=sys.stderr)


def gathered(value, world):
    """[value of process 0, of process 1, ...], the same list in all processes. All must call this."""
    values = [value]
    if world > 1:
        values = [None] * world
        dist.all_gather_object(values, value)
    return values


def now(device):
    """Seconds, once the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


# ----------------------------------------------------------------------------------------------------------------------
# Files, written whole or not at all

# What reading a damaged file raises, in one library or another.
BROKEN_FILE = (OSError, RuntimeError, ValueError, OverflowError, LookupError, EOFError, TypeError, AttributeError,
               struct.error, pickle.UnpicklingError, SafetensorError)
# ... and what zip archives (torch's files, .npz) and numpy's arrays, which begin with a line of Python, raise besides.
BROKEN_ARCHIVE = (*BROKEN_FILE, zipfile.BadZipFile, zlib.error, SyntaxError, tokenize.TokenError)


def temporary_name(path):
    """-> a name beside `path`, this process's own. OSError as `whole` says."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f"{path} is no ordinary file: give another name")
    return f"{path}.{os.getpid()}.tmp"


@contextlib.contextmanager
def whole(path):
    """Gives a temporary name, this process's own, that takes the place of `path` in the end, or vanishes where an error
    comes. OSError where `path` is a folder, a device or a pipe, which must not be replaced."""
    temporary = temporary_name(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def ready_folder(folder, *names):
    """Before the work: make the folder, and see that files of these names can be written into it. OSError, one
    sentence."""
    try:
        os.makedirs(folder, exist_ok=True)
        for name in names:
            ready_file(os.path.join(folder, name))
    except OSError as error:
        if not error.errno:
            raise
        raise OSError(f"nothing can be written into {folder} ({error.strerror}): choose another --out") from None


def ready_file(path):
    """Before the work: see that a file of this name can be written. OSError where its folder is missing or lets nothing
    in, or where the name is that of a folder, a device or a pipe."""
    temporary = temporary_name(path)
    with open(temporary, "wb"):
        pass
    with contextlib.suppress(FileNotFoundError):             # another run may have cleared up
        os.remove(temporary)


@functools.cache                                             # the lock ends with the file object: with this process
def lock_folder(folder):
    """Keep other runs out of a folder until this process ends, however it ends. ValueError where there is one."""
    if os.name != "posix":
        return None
    import fcntl
    file = open(os.path.join(folder, ".lock"), "a")  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)     # not flock: workers that outlive a killed run inherit that
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ValueError(f"another run is writing into {folder}: choose another --out, or wait") from None
    return file                                              # unlocked where the file system has no locks


def save_grid(path, images, pad=2):
    """Write a PNG of rows of images, white between them. images: (R, C, 3, H, W), or a list of R tensors (C, 3, H, W)
    of one H, W; values in [-1, 1], others are clipped. The file appears complete or not at all."""
    h, w = images[0].shape[-2:]
    grid = np.full((len(images) * (h + pad) + pad, max(map(len, images)) * (w + pad) + pad, 3), 255, np.uint8)
    for r, row in enumerate(images):
        row = (row.detach().float().cpu().clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        for c, image in enumerate(row):                      # (H, W, 3)
            y, x = pad + r * (h + pad), pad + c * (w + pad)
            grid[y:y + h, x:x + w] = image
    with whole(path) as temporary:
        Image.fromarray(grid).save(temporary, format="PNG")


def save_figure(path, figure):
    """Write a matplotlib figure as PNG: whole, or not at all."""
    with whole(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def write_whole(path, data):
    """Text, or an array as .npy, into `path`: whole and on the disk, or not at all. OSError as `whole`."""
    with whole(path) as temporary, open(temporary, "wb") as file:
        if isinstance(data, str):
            file.write(data.encode())
        else:
            np.save(file, data)
        file.flush()
        os.fsync(file.fileno())


def write_json(path, value):
    """A value as JSON into `path`, as write_whole says; null in the place of numbers that are not finite."""
    write_whole(path, json.dumps(strict(value), indent=1, allow_nan=False) + "\n")


def strict(value):
    """The same for strict JSON: None in the place of numbers that are not finite, in dicts and lists too."""
    if isinstance(value, dict):
        return {key: strict(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", default="demo", help="demo, imagenette, cifar10 or a folder")
    parser.add_argument("--split", default="train", choices=list(SPLITS), help="train: as augmented for training")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--aug_scale", type=float, default=2.0, help="largest random enlargement in training")
    parser.add_argument("--enlarge", action="store_true", help="in training, beyond a picture's own pixels too")
    parser.add_argument("--seed", type=int, default=0, help="of the order and the crops")
    parser.add_argument("--rows", type=int, default=8, help="rows and columns of the grid")
    parser.add_argument("--out", default="grid.png", help="PNG to write")
    args = parser.parse_args()
    check_numbers(args)
    ready_file(args.out)
    train, count = args.split == "train", args.rows ** 2
    dataset = make_dataset(args.data, args.size, train, args.aug_scale, args.seed, enlarge=args.enlarge)
    x, _ = next(iter(make_loader(dataset, count, train, seed=args.seed)))
    save_grid(args.out, x.split(args.rows))
    print(f"{args.split}: {dataset.described()}, {len(x)} of them in {args.out}")


if __name__ == "__main__":
    guarded(main)
