"""Images in, batches out: folders, two downloadable sets and a built-in image generator, decoded with Pillow.

    python data.py --data demo --out grid.png            # look at your data: a grid of what training would see

Images are float32 (3, size, size) in [-1, 1]. An item depends on (seed, epoch, index) alone and the order on (seed,
epoch) alone, so a run gets the same batches with any number of workers or processes, and after a resume.
"""
import collections
import contextlib
import copy
import functools
import json
import os
import sys
import unicodedata

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter

from plumbing.files import save_grid
from plumbing.flags import count, make_parser, natural, positive
from plumbing.images import Unreadable, read_image
from plumbing.process import guarded, leave_signals_to_parent, say

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
NO_IMAGES = ("__MACOSX", "@eaDir")                           # folders that systems fill with copies, beside hidden ones
DEMO_LENGTH = {"train": 100_000, "val": 2_000}
SPLITS = {"train": 0, "val": 1}
# First key of every random stream: without it (seed, epoch) and (seed, epoch, 0) would be one stream to numpy.
ORDER, ITEM, DEMO = 1, 2, 3

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
# From a picture to an item

LONGEST = 16  # sides of a crop: of longer pictures only the crop is resized. 20000 x 2 pixels would take 2 GB at 256 px


def prepare_eval(image, size, crop="center"):
    """PIL RGB image -> PIL image (size, size), as reconstruction is scored. `center` (SSDD): short side to `size`,
    bilinear, centre crop, rounding as torchvision does. `adm` (ADM, arXiv 2105.05233; also DC-AE): box-halving while
    the short side is at least 2 size, then bicubic, centre crop. ValueError for another crop."""
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
    in evaluation the item is None. OSError where the disk fails, ValueError where training finds no stand-in."""

    def __init__(self, images, labels, name, size, train, aug_scale, seed, crop, split, source, classes, enlarge):
        self.images, self.labels, self.name, self.size, self.train = images, labels, name, size, train
        self.aug_scale, self.seed, self.crop, self.split = aug_scale, seed, crop, split
        self.source, self.classes = source, classes
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

    def name_of(self, j):
        """-> str: image j's file; of images without files its number."""
        source = self.images[j]
        return os.fsdecode(source) if isinstance(source, bytes) else str(j)

    def described(self):
        """-> str: how many images these are, and of what."""
        number = f"{len(self)}" if len(self) == self.whole else f"{len(self)} of {self.whole}"
        classes = f" ({len(self.classes)} classes)" if self.classes else ""
        return f"{number} images of {self.source}{classes}"

    def nothing_readable(self):
        return ValueError(f"too few images of {self.name} can be decoded: check the files named above")

    def decode(self, j, least):
        """Image j -> PIL RGB image, short side >= `least` if the file has that much; None if it is unreadable."""
        source = self.images[j]
        if isinstance(source, np.integer):
            return Image.fromarray(demo_image(self.size, self.seed, self.split, int(source)))
        if isinstance(source, np.ndarray):
            return Image.fromarray(source)
        if self.skipped[j]:
            return None
        try:
            return read_image(self.name_of(j), least if self.train else None)
        except Unreadable as error:
            self.skipped[j] = 1
            print(f"warning: skipping unreadable image {self.name_of(j)}: {error}", file=sys.stderr, flush=True)
            return None

    def levels(self, key):
        """The item with its image in the 256 levels of 8 bit: a quarter of what would cross between processes."""
        epoch, i = key if isinstance(key, tuple) else (0, key)
        n = len(self)
        if not 0 <= i < n:
            raise IndexError(f"no image {i} in a data set of {n}")
        u = np.random.default_rng([ITEM, self.seed, epoch, i]).random(4)
        short = self.size * (1 + (self.aug_scale - 1) * u[3])
        least = int(np.ceil(short))
        image, j = self.decode(i, least), i
        while image is None and self.train:
            j += 1
            if j == i + min(n, STAND_INS):
                raise self.nothing_readable()
            image = self.decode(j % n, least)
        if image is None:
            return None
        if self.train:
            if not self.enlarge:
                short = max(self.size, min(short, *image.size))
            image = prepare_train(image, self.size, short, u)
        else:
            image = prepare_eval(image, self.size, self.crop)
        return np.ascontiguousarray(np.array(image).transpose(2, 0, 1)), i    # (3, size, size) uint8

    def __getitem__(self, key):
        item = self.levels(key)
        return None if item is None else (from_levels(torch.from_numpy(item[0])), item[1])

    def __getitems__(self, keys):
        """A DataLoader's items of a batch, as `levels`."""
        return [self.levels(key) for key in keys]


def from_levels(x):
    """uint8 -> float32 in [-1, 1], any shape."""
    return x.float().div_(127.5).sub_(1)


# ----------------------------------------------------------------------------------------------------------------------
# A set of images

note = functools.cache(say)                                  # a folder that serves twice is remarked on once


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
            if extension in EXTENSIONS and not is_hidden(file):
                names.append(os.path.join(folder, file))
            elif not is_hidden(file) and file != LABELS:
                others[extension or "without extension"] += 1
    if others:
        types = ", ".join(f"{n} {extension}" for extension, n in others.most_common(8))
        note(f"note: {others.total()} files below {root} were left out, being of other types: {types}")
    return sorted(names)


# What a folder of images may call its parts. The first of these names that is there counts: test/ only without others.
PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test", "testing")}
LABELS = "dataset.json"                                      # of a folder as EDM and REPA pack it


def folders_in(root):
    """-> sorted names of the folders in `root`, without hidden ones. OSError."""
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not is_hidden(entry.name))


def split_folders(root):
    """-> {"train": folder, "val": folder}, as far as there are such below `root`; {}: it is one tree of images."""
    found = {}
    for split, names in PARTS.items():
        there = [f for f in folders_in(root) if f.lower() in names]
        if there:
            found[split] = os.path.join(root, min(there, key=lambda f: names.index(f.lower())))
    return found


def packed_labels(folder):
    """-> {name of an image within `folder`: its class number} of a folder as EDM and REPA pack it, whose own folders
    00000/, 00001/ ... are no classes; None for any other. ValueError where the file says something else."""
    path = os.path.join(folder, LABELS)
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            labels = dict(json.load(file)["labels"] or [])   # null: without labels
        are_numbers = all(isinstance(k, int) for k in labels.values())
    except (ValueError, TypeError, LookupError):
        are_numbers = False
    if not are_numbers:
        raise ValueError(f'{path} should read {{"labels": [["00000/img00000000.png", 3], ...]}}')
    return labels


def class_name(folder):
    """Systems spell accents in one character or in two: the same name is the same class."""
    return unicodedata.normalize("NFC", folder)


def split_classes(folders):
    """{split: folder} -> sorted names of the classes, the folders in any of them: a class that one split lacks
    does not shift the others' numbers. Validation images that share no class with the training images have none."""
    classes = {split: {class_name(f) for f in folders_in(folder)} for split, folder in folders.items()}
    train, val = classes.get("train", set()), classes.get("val", set())
    if train and val and not train & val:
        note(f"note: {folders['val']} has no class folder of {folders['train']}: its images have no labels")
        val = set()
    return sorted(train | val)


def folder_images(root, split):
    """-> names of the images of `split` in the folder `root`, their labels, the classes, and the folder they are from.
    ValueError: there are none."""
    folders = split_folders(root)
    if folders and split not in folders:
        there, = folders.values()
        raise ValueError(f"{root} holds {os.path.basename(there)}/ but no {split}/: add it, or give {there}, whose "
                         "images then serve for training and validation alike")
    folder = folders.get(split, root)
    names = list_images(folder)
    if not names:
        raise ValueError(f"no images in {folder}: it needs files ending in {' '.join(EXTENSIONS)}, at any depth")
    below = [name[len(folder):].lstrip(os.sep).split(os.sep) for name in names]  # each image's folders and file
    packed = {part: packed_labels(part) for part in folders.values() or [root]}
    if any(labels is not None for labels in packed.values()):
        numbers = [number for labels in packed.values() for number in (labels or {}).values()]
        classes = [str(k) for k in range(max(numbers, default=-1) + 1)]
        labels = [(packed[folder] or {}).get("/".join(path), -1) for path in below]
        return names, labels, classes, folder
    tops = [class_name(path[0]) if len(path) > 1 else None for path in below]
    classes = split_classes(folders) if folders else sorted({top for top in tops if top is not None})
    number = {name: k for k, name in enumerate(classes)}
    return names, [number.get(top, -1) for top in tops], classes, folder


def download(spec, split):
    """-> (uint8 (n, 32, 32, 3), labels, classes) for cifar10; for imagenette the folder that holds both parts (the copy
    with a short side of 320). Kept in $DCSSDAE_DATA, else ~/.cache/dc-ssdae. OSError, one sentence, if it cannot be
    had."""
    from torchvision import datasets
    root = os.environ.get("DCSSDAE_DATA") or os.path.join(os.path.expanduser("~"), ".cache", "dc-ssdae")
    try:
        os.makedirs(root, exist_ok=True)
        with open(os.path.join(root, ".lock"), "w") as lock:
            with contextlib.suppress(ImportError):           # Windows has no such locks
                import fcntl
                fcntl.flock(lock, fcntl.LOCK_EX)             # one process downloads, the others of the machine wait
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
    prepare_eval. Labels: cifar10's, a dataset.json's (EDM, REPA), or the rank of a file's topmost folder among those of
    both parts, or -1.
    ValueError (bad number, no images, a part is missing), FileNotFoundError, OSError (download), one sentence each."""
    if aug_scale < 1:
        raise ValueError(f"--aug_scale {aug_scale}: below 1 the resized picture would not hold the crop")
    split = split or ("train" if train else "val")
    if spec == "demo":
        images, aug_scale = np.arange(DEMO_LENGTH[split]), 1.0
        labels, classes, source = np.full(len(images), -1), [], f"demo, part {split}"
    elif spec == "cifar10":
        images, labels, classes = download(spec, split)
        source = f"cifar10, part {split}"
    else:
        folder = download(spec, split) if spec == "imagenette" else os.path.expanduser(spec)
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"there is no folder {spec}: give demo, imagenette, cifar10 or a folder of images")
        names, labels, classes, source = folder_images(folder, split)
        images = np.array([os.fsencode(f) for f in names])   # one block: workers would copy a list, bit by bit
    dataset = ImageDataset(images, np.array(labels, np.int64), spec, size, train, aug_scale, seed, crop, split, source,
                           classes, enlarge)
    n = len(dataset)
    return dataset if limit is None or limit >= n else dataset.subset(np.arange(limit) * n // limit)


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
            for q in range(p, p + self.share):
                epoch, k = divmod(q, self.n)
                if epoch != drawn:
                    order, drawn = np.random.default_rng([ORDER, self.seed, epoch]).permutation(self.n), epoch
                batch.append((epoch, int(order[k])))
            yield batch
            step += 1


def collate(items):
    """[(x, i) or None] -> x (b, 3, s, s) uint8, index (b,) int64, without the None; (None, empty) where all are.
    Arrays and no tensors: these cross between processes in /dev/shm, which is small in containers, and where it is full
    the batch would be lost without an error."""
    items = [item for item in items if item is not None]
    x = np.stack([x for x, _ in items]) if items else None
    return x, np.array([i for _, i in items], np.int64)


class Loader(torch.utils.data.DataLoader):
    """DataLoader whose images become numbers in [-1, 1] on `device`. Leaves out batches without a readable image."""

    device = "cpu"

    def __iter__(self):
        try:
            for x, index in super().__iter__():
                if len(index):
                    x = torch.from_numpy(x)
                    if torch.device(self.device).type == "cuda":
                        x = x.pin_memory()                   # or the copy would wait for what the GPU still has to do
                    yield from_levels(x.to(self.device, non_blocking=True)), torch.from_numpy(index)
        except (OSError, ValueError) as error:
            if "\nOriginal Traceback" not in str(error):     # which torch puts into the message of a worker's error
                raise
            said = str(error).strip().splitlines()[-1]       # OSError: ...
            raise type(error)(said.partition(": ")[2]) from error


def make_loader(dataset, batch_size, train, workers=0, seed=0, rank=0, world=1, start=0, device="cpu"):
    """-> Loader over x (b, 3, s, s) in [-1, 1] on `device`, index (b,) int64. batch_size counts all `world` processes
    together. Training: endless, b = batch_size / world, from step `start` on (resume); a stand-in comes with the index
    of the unreadable image that it replaces. Evaluation: this rank's indices rank, rank + world, ... once and in order;
    the last batch may be smaller. OSError and ValueError as ImageDataset says."""
    if train:
        batches = TrainBatches(len(dataset), batch_size, seed, rank, world, start)
    else:
        indices, share = range(rank, len(dataset), world), max(1, batch_size // world)
        batches = [indices[k:k + share] for k in range(0, len(indices), share)]
    # Workers run torch with one thread as they are. Its own generator: the caller's random state stays as it is.
    loader = Loader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers,
                    generator=torch.Generator(), worker_init_fn=leave_signals_to_parent)
    loader.device = device
    return loader


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data", type=str, default="demo", help="demo, imagenette, cifar10 or a folder [%(default)s]")
    add("--split", type=str, default="train", choices=list(SPLITS), help="train: as augmented for it [%(default)s]")
    add("--size", type=count, default=64, help="pixels [%(default)s]")
    add("--aug_scale", type=positive, default=2.0, help="largest random enlargement in training [%(default)s]")
    add("--enlarge", action="store_true", help="in training, beyond a picture's own pixels too")
    add("--seed", type=natural, default=0, help="of the order and the crops [%(default)s]")
    add("--rows", type=count, default=8, help="rows and columns of the grid [%(default)s]")
    add("--out", type=str, default="grid.png", help="PNG to write [%(default)s]")
    args = parser.parse_args()
    train = args.split == "train"
    dataset = make_dataset(args.data, args.size, train, args.aug_scale, args.seed, enlarge=args.enlarge)
    for x, _ in make_loader(dataset, args.rows ** 2, train, seed=args.seed):
        save_grid(args.out, x.split(args.rows))
        print(f"{args.split}: {dataset.described()}, {len(x)} of them in {args.out}")
        return
    raise dataset.nothing_readable()


if __name__ == "__main__":
    guarded(main)
