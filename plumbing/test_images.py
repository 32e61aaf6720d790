"""Tests of images.py: what becomes of a picture file of any kind.

    python -m pytest plumbing
"""
import errno
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from plumbing.images import Unreadable, read_image, to_rgb

ORIENTATION = 0x0112


def picture(w=60, h=30):
    """A smooth RGB picture with different corners."""
    x, y = np.meshgrid(np.linspace(0, 1, w), np.linspace(0, 1, h))
    return Image.fromarray((255 * np.stack([x, y, x * y], -1)).astype(np.uint8))


def grey(dtype, top):
    """An image of one row of levels from 0 to `top`, six of them."""
    return Image.fromarray(np.linspace(0, top, 6).astype(dtype)[None])


RGB, RAMP = picture(), [[(v, v, v) for v in (0, 51, 102, 153, 204, 255)]]
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
MODES = [
    # file, image, options of Pillow's save, what every pixel or the whole row is, tolerance
    ("opaque.PNG", Image.new("RGBA", (8, 8), (*RED, 255)), {}, RED, 0),
    ("transparent.png", Image.new("RGBA", (8, 8), (*BLUE, 0)), {}, WHITE, 0),
    ("half.webp", Image.new("RGBA", (8, 8), (*RED, 128)), {"lossless": True}, (255, 127, 127), 0),
    ("palette.png", Image.new("RGB", (8, 8), GREEN).quantize(4), {}, GREEN, 2),
    ("palette_transparent.png", Image.new("RGB", (8, 8), BLUE).quantize(4), {"transparency": 0}, WHITE, 0),
    ("colour_transparent.png", Image.new("RGB", (8, 8), BLUE), {"transparency": BLUE}, WHITE, 0),
    ("grey_transparent.png", Image.new("LA", (8, 8), (0, 0)), {}, WHITE, 0),
    ("one_bit.png", Image.new("1", (8, 8), 1), {}, WHITE, 0),
    ("cmyk.JPeG", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), {}, RED, 6),
    ("colour.webp", Image.new("RGB", (8, 8), BLUE), {"lossless": True}, BLUE, 0),
    ("grey8.bmp", grey(np.uint8, 255), {}, RAMP, 0),
    ("grey16.png", grey(np.uint16, 65535), {}, RAMP, 0),
    ("grey16.tif", grey(np.uint16, 65535), {}, RAMP, 0),
    ("grey16.pgm", grey(np.int32, 65535), {}, RAMP, 0),
]


@pytest.mark.parametrize("name,image,options,want,tolerance", MODES, ids=[mode[0] for mode in MODES])
def test_modes(name, image, options, want, tolerance, tmp_path):
    image.save(tmp_path / name, **options)
    got = read_image(tmp_path / name)
    assert got.mode == "RGB" and got.size == image.size
    assert np.abs(np.asarray(got).astype(int) - want).max() <= tolerance


def tiff(levels, bits, photometric):
    """Bytes of a TIFF of one row of grey levels, which Pillow cannot write."""
    packed = "".join(format(level, f"0{bits}b") for level in levels)
    if bits == 16:                                          # in the byte order of the file
        pixels = struct.pack(f"<{len(levels)}H", *levels)
    else:
        pixels = int(packed, 2).to_bytes(len(packed) // 8, "big")
    start = 8 + 2 + 9 * 12 + 4                              # of the pixels
    tags = [(256, len(levels)), (257, 1), (258, bits), (259, 1), (262, photometric), (273, start), (277, 1), (278, 1),
            (279, len(pixels))]
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + rows + bytes(4) + pixels


@pytest.mark.parametrize("levels,bits,photometric,want", [
    ([0, 25700, 65535, 257], 16, 1, [0, 100, 255, 1]),
    ([0, 25700, 65535, 257], 16, 0, [255, 155, 0, 254]),    # white is zero
    ([0, 1606, 4095, 16], 12, 1, [0, 100, 255, 1]),
    ([0, 100, 255, 1], 8, 0, [255, 155, 0, 254]),
])
def test_white_of_a_tiff(levels, bits, photometric, want, tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff(levels, bits, photometric))
    assert np.asarray(read_image(tmp_path / "a.tif"))[0, :, 1].tolist() == want


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_orientation(name, orientation, tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    RGB.save(tmp_path / name, exif=exif)
    with Image.open(tmp_path / name) as image:
        want = np.asarray(ImageOps.exif_transpose(image))
    got = read_image(tmp_path / name)
    assert np.array_equal(got, want)
    assert np.array_equal(to_rgb(got), want)                # turned once, not twice


def exif_block(*entries):
    """An EXIF block of (tag, type, count, 4 bytes of value or offset) in this order."""
    rows = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + rows + bytes(4)


TURNED = (ORIENTATION, 3, 1, b"\6\0\0\0")                   # lying on its side
DAMAGED = {
    "make as rational": (0x010F, 5, 1, b"ab\0\0"),
    "make beyond the end": (0x010F, 2, 2**31, b"\xff\xff\xff\x7f"),
    "unknown type": (0x0110, 99, 7, bytes(4)),
    "resolution as text": (0x011A, 2, 3, b"72\0\0"),
    "unit out of range": (0x0128, 3, 1, b"\xff\xff\0\0"),
    "no directory": (0x8769, 4, 1, b"\xff\xff\xff\xff"),
}


@pytest.mark.filterwarnings("ignore")                       # Pillow's, of damaged EXIF
@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_exif_hides_neither_picture_nor_orientation(damage, tmp_path):
    for name in ("a.jpg", "b.png", "c.webp"):
        RGB.save(tmp_path / name, exif=exif_block(TURNED, DAMAGED[damage]))
        assert read_image(tmp_path / name).size == (30, 60)
        RGB.save(tmp_path / name, exif=exif_block(DAMAGED[damage], TURNED))
        assert read_image(tmp_path / name).size in ((30, 60), (60, 30))       # Pillow may not see what follows


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("junk", [b"Exif\0\0", b"Exif\0\0MM", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0no TIFF"])
def test_metadata_that_is_none(junk, tmp_path):
    RGB.save(tmp_path / "a.jpg", exif=junk, icc_profile=b"no profile", xmp=b"<x tiff:Orientation=", comment=b"\xff\0")
    assert read_image(tmp_path / "a.jpg").size == (60, 30)


def test_jpegs_are_decoded_smaller_where_that_is_enough(tmp_path):
    picture(1000, 640).save(tmp_path / "a.jpg")
    for least, size in ((None, (1000, 640)), (400, (1000, 640)), (320, (500, 320)), (81, (250, 160)), (1, (125, 80))):
        assert read_image(tmp_path / "a.jpg", least).size == size
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    picture(160, 2000).save(tmp_path / "b.jpg", exif=exif)  # narrow and turned: 160 // 100 allows no reduction
    assert read_image(tmp_path / "b.jpg", 100).size == (2000, 160)


@pytest.mark.parametrize("name,content,words", [
    ("empty.jpg", lambda good: b"", "no known image format"),
    ("text.png", lambda good: b"no picture at all", "no known image format"),
    ("cut.jpg", lambda good: good[:900], "truncated"),
])
def test_unreadable(name, content, words, tmp_path):
    picture(80, 60).save(tmp_path / "good.jpg")
    (tmp_path / name).write_bytes(content((tmp_path / "good.jpg").read_bytes()))
    with pytest.raises(Unreadable, match=words) as error:
        read_image(tmp_path / name)
    assert "\n" not in str(error.value)


def test_floating_point_pixels_have_no_known_white(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(Unreadable, match="floating-point"):
        read_image(tmp_path / "a.tiff")


def test_a_missing_file_is_its_own_fault_and_a_missing_folder_the_disks(tmp_path):
    folder = tmp_path / "mounted"
    folder.mkdir()
    for path in (folder / "a.png", folder / "n01" / "a.png"):                # an unmounted folder is empty
        with pytest.raises(FileNotFoundError):
            read_image(path)
    RGB.save(folder / "b.png")
    with pytest.raises(Unreadable, match="no such file"):
        read_image(folder / "a.png")


def test_errors_of_the_disk_are_no_fault_of_the_file(tmp_path, monkeypatch):
    def fail(path, mode):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr("builtins.open", fail)
    with pytest.raises(OSError, match="Input/output error") as error:
        read_image(tmp_path / "a.png")
    assert error.value.errno == errno.EIO
