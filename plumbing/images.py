"""From a picture file to an upright PIL RGB image."""
import io
import os

import numpy as np
from PIL import ExifTags, Image

# What turns a picture upright, by the value of its orientation tag.
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}


class Unreadable(ValueError):
    """This one file is at fault: it is gone, or it is no picture that can be decoded."""


def read_image(path, least=None):
    """Image file -> PIL RGB image, as to_rgb says. least: JPEGs are decoded at 1/2, 1/4 or 1/8 if both sides are still
    at least that. Unreadable; OSError where the disk fails, which says nothing about the file."""
    try:
        with open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        if not os.listdir(os.path.dirname(path) or "."):    # what is left of an unmounted folder is missing or empty
            raise
        raise Unreadable("there is no such file") from None
    try:
        with Image.open(io.BytesIO(content)) as image:
            if least:
                image.draft(None, (least, least))           # square, so that a turn does not matter
            return to_rgb(image)
    except MemoryError:
        raise
    except Image.UnidentifiedImageError:                    # its message would name a buffer
        raise Unreadable("its content is no known image format") from None
    except Exception as error:  # noqa: BLE001 OSError, SyntaxError, struct.error ...: every format has its own
        raise Unreadable(" ".join(str(error).split()) or type(error).__name__) from None


def to_rgb(image):
    """PIL image of any mode -> RGB, upright by its orientation tag; transparency over white; grey of 12 or 16 bits
    scaled to 8. Nothing else in its metadata matters. ValueError for pixels without a known white."""
    image.load()                                            # only then all metadata are there, and TIFFs are turned
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers: convert it to 8 or 16 bits")
    if image.mode.startswith("I"):                          # Pillow would clip at 255, that is nearly everywhere
        rgb = Image.fromarray(grey_levels(image)).convert("RGB")
    elif "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        over = image.convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", image.size, "white"), over).convert("RGB")
    else:
        rgb = image if image.mode == "RGB" else image.convert("RGB")
    # Not ImageOps.exif_transpose: it also writes the other tags anew, and fails where one of them is damaged.
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # noqa: BLE001 damaged metadata, and no more than that
        turn = None
    if turn is not None:
        rgb = rgb.transpose(turn)
        rgb.info = {}                                       # or who looks at its tag would turn it again
    return rgb


def grey_levels(image):
    """PIL image of integers beyond 8 bits -> uint8 (h, w)."""
    tiff = getattr(image, "tag_v2", {})                     # other formats are scaled to 16 bits
    white = 4095 if tiff.get(ExifTags.Base.BitsPerSample) == (12,) else 65535
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > white:
        raise ValueError("its pixels are beyond 16 bits: convert it to 8 or 16 bits")
    if tiff.get(ExifTags.Base.PhotometricInterpretation) == 0:  # white is zero
        grey = white - grey
    return ((255 * grey + white // 2) // white).astype(np.uint8)
