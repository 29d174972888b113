"""One picture file -> an upright, opaque sRGB image, or the reason why not.

Every file is decoded whole: `PIL.Image.verify` passes a truncated JPEG. Nothing is written, moved or repaired.
Any number of threads may decode at once.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

import numpy as np
from PIL import Image, ImageCms, ImageColor, ImageFile, UnidentifiedImageError, features

from finetune.errors import Fault

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".tif", ".tiff", ".gif",
            ".jp2", ".avif", ".heic", ".heif", ".hif", ".jxl")  # fmt: skip
"""Endings of files that are taken for pictures, in lower case."""
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "GIF", "JPEG2000", "AVIF", "HEIF", "JXL")
"""Pillow's names of what is read. Its other formats stay closed: EPS, for one, would run Ghostscript."""
MAX_PIXELS = 89_478_485
"""Larger pictures are refused: 268 MB decoded, the size from which Pillow warns. It would raise at the double only."""

LARGE = 40_000_000
"""Pixels from which pictures are not decoded side by side"""
SPARE = 4
"""How many times the wanted size a reducing decoder must leave, see `reduction`."""

ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""What makes a picture of each EXIF orientation upright"""
NEEDS = {
    "HEIC": ("HEIF", "pillow-heif"),
    "JPEG XL": ("JXL", "pillow-jxl-plugin"),
    "AVIF": ("AVIF", "pillow >= 11.3, or pillow-avif-plugin"),
}
"""Formats whose decoder may be missing: Pillow's name, and what to install."""


class BadPicture(Fault):
    """A file that cannot be trained on, and why. Raised while reading; the file is left as it is."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{printable(path)}: {reason}")
        self.path = path
        self.reason = reason


class _Unfit(Exception):
    """The reason, found somewhere that does not know the path."""


@dataclass(frozen=True)
class Facts:
    """What was found while decoding a picture."""

    height: int
    """Pixels, upright"""
    width: int
    turned: bool
    """The EXIF orientation was applied."""
    transparent: bool
    """Some pixels were (partly) transparent; they lie on the background colour now."""
    notes: tuple[str, ...] = ()
    """What is odd about the file and did not prevent its use."""
    digest: str = field(default="", compare=False)
    """SHA-256 of the pixels as they are trained (upright, sRGB, on the background) and of their size."""
    reducible: bool = field(default=False, compare=False)
    """A JPEG, whose decoder can give it at 1/2, 1/4 or 1/8 of its size in a fraction of the time"""


def decode(path: Path, background: str = "white") -> tuple[Image.Image, Facts]:
    """The picture in RGB, 8 bits, sRGB; upright; on the background where it was transparent; without metadata.

    Raises BadPicture with the reason when the file is not a whole picture that can be turned into that, and Fault
    when `background` is no colour.
    """
    picture, facts = _decode(path, background)
    return picture, replace(facts, digest=_digest(picture))


def reduction(facts: Facts, scaled: tuple[int, int]) -> int:
    """By how much the decoder may reduce a picture that is scaled to `scaled` (height, width) afterwards: 1, 2, 4, 8.

    A JPEG decoder that reduces averages in the DCT domain and in linear steps of 8 bits: not the same pixels as Lanczos
    on the whole picture. So it must leave at least four times the size that is wanted. Measured on photos of 1,280 to
    1,920 pixels, reduced and then scaled, against scaled from the whole: at four times the size 55.8 dB at worst and at
    most 4 levels of 255 (rounding to 8 bits alone gives 58.9 dB); at twice the size 50.6 dB and 11 levels; at the size
    itself 38.8 dB and 39 levels. 12 megapixels take 0.76 s whole, 0.22 s at 1/2, 0.14 s at 1/4, 0.09 s at 1/8.
    """
    if not facts.reducible:
        return 1
    room = min(facts.height // max(1, scaled[0]), facts.width // max(1, scaled[1]))
    return max((by for by in (1, 2, 4, 8) if by * SPARE <= room), default=1)


def decode_reduced(path: Path, by: int, background: str = "white") -> Image.Image:
    """What `decode` gives, at 1/by of its size (rounded up) where the decoder can: see `reduction`; `by` is 1, 2, 4, 8.

    No digest is computed, and none belongs to it. Raises as `decode` does.
    """
    return _decode(path, background, by)[0]


def _decode(path: Path, background: str, by: int = 1) -> tuple[Image.Image, Facts]:
    """The picture, and the facts without a digest."""
    behind = colour(background)
    try:
        _check_file(path)
        # Not by its name: Pillow maps some kinds of TIFF into memory then, and scrambles those that are turned.
        with _pillow() as notes, path.open("rb") as file, Image.open(file, formats=_formats()) as opened:
            _check_kind(opened)
            reducible = opened.format in ("JPEG", "MPO")
            if reducible and by > 1 and min(opened.size) >= by:
                opened.draft(None, (opened.width // by, opened.height // by))
            with _room(opened):
                upright, turned = _upright(opened, notes)
                profile = opened.info.get("icc_profile")
                colours, alpha = _colours_and_alpha(upright)
                picture = _to_srgb(colours, profile, notes)
    except Exception as error:  # decoders of foreign bytes raise anything: whatever it is, it is this file's fault
        raise BadPicture(path, _reason(path, error)) from error
    opaque = np.asarray(alpha if alpha is not None else 255)
    transparent = bool(opaque.min() < 255)
    if transparent and alpha is not None:
        if not opaque.any():
            notes.append(f"entirely transparent: nothing but the background ({background}) is left")
        picture = Image.composite(picture, Image.new("RGB", picture.size, behind), alpha)
    picture.info = {}  # no camera, place or profile goes further
    said = tuple(dict.fromkeys(notes))
    return picture, Facts(picture.height, picture.width, turned, transparent, said, reducible=reducible)


def _digest(picture: Image.Image) -> str:
    hashed = hashlib.sha256(f"{picture.width} x {picture.height} {picture.mode}".encode())
    strip = max(1, 1_000_000 // picture.width)  # lines at once: the pixels as bytes are never there as a whole
    for top in range(0, picture.height, strip):
        hashed.update(picture.crop((0, top, picture.width, min(top + strip, picture.height))).tobytes())
    return hashed.hexdigest()


def colour(name: str) -> tuple[int, int, int]:
    """A colour's name or #rrggbb -> red, green, blue. Raises Fault for anything else."""
    with suppress(ValueError):
        parts = ImageColor.getrgb(name)
        if len(parts) == 3:  # not 4, which would be see-through itself
            return parts
    near = get_close_matches(name.lower(), ImageColor.colormap, n=1)
    hint = f" Nearest name: {near[0]}." if near else ""
    raise Fault(f"background {name!r} is not a colour. Give a name such as white, or #rrggbb.{hint}")


def printable(name: Path | str) -> str:
    """A file name that any terminal can show: bytes that are not UTF-8 and control characters are escaped."""
    text = str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


@cache
def _formats() -> list[str]:
    """Those of FORMATS that this installation can open."""
    with _lock:
        if find_spec("pillow_heif"):
            import_module("pillow_heif").register_heif_opener()
        if find_spec("pillow_jxl"):
            import_module("pillow_jxl")  # registers itself
        Image.init()
    return [name for name in FORMATS if name in Image.OPEN and not (name == "AVIF" and not features.check("avif"))]


_lock = threading.RLock()
_large = threading.Lock()
_listener = threading.local()
"""`notes`: the list that the warnings of this thread go to while it decodes"""
_filter = ("always", None, UserWarning, re.compile(r"PIL\."), 0)
"""The filter that lets the same warning through for every file, not for the first alone"""
_say_otherwise = warnings.showwarning
"""What shows the warnings that are not ours"""
_decoding = 0
"""Threads that decode at the moment"""
_truncated_allowed = False
"""What LOAD_TRUNCATED_IMAGES was before the first of them began"""


@contextmanager
def _pillow() -> Iterator[list[str]]:
    """Pillow as it is needed here: truncated files raise whatever others set; its warnings become this thread's notes.

    Both are settings of the whole process. The first is changed by the first thread that decodes and put back by the
    last. `warnings.catch_warnings` is of no use: threads that leave it in another order than they entered leave each
    other's settings behind. Instead a listener that passes on what is not ours stays in place.
    """
    global _decoding, _truncated_allowed
    notes: list[str] = []
    with _lock:
        _listen()
        if not _decoding:
            _truncated_allowed = ImageFile.LOAD_TRUNCATED_IMAGES
        _decoding += 1
        ImageFile.LOAD_TRUNCATED_IMAGES = False  # it would fill what is missing with grey
    _listener.notes = notes
    try:
        yield notes
    finally:
        _listener.notes = None
        with _lock:
            _decoding -= 1
            if not _decoding:
                ImageFile.LOAD_TRUNCATED_IMAGES = _truncated_allowed


def _listen() -> None:
    """Put the listener in place, if others have replaced it since (a `catch_warnings` that ended, say)."""
    global _say_otherwise
    if warnings.showwarning is not _hear:
        _say_otherwise, warnings.showwarning = warnings.showwarning, _hear
    if list(warnings.filters[:1]) != [_filter]:
        warnings.filterwarnings("always", category=UserWarning, module=_filter[3].pattern)


def _hear(
    message: Warning | str, category: type[Warning], filename: str, lineno: int,
    file: TextIO | None = None, line: str | None = None,
) -> None:  # fmt: skip
    """Take a warning as a note while this thread decodes; pass it on otherwise."""
    notes = getattr(_listener, "notes", None)
    if notes is None:
        _say_otherwise(message, category, filename, lineno, file, line)
    elif category is UserWarning:
        notes.append(" ".join(str(message).split()))


def _check_file(path: Path) -> None:
    """Refuse what is not a regular file: to open a pipe would wait for ever."""
    if not path.exists():
        raise _Unfit("a link to a file that is not there" if path.is_symlink() else "there is no such file")
    if not path.is_file():
        raise _Unfit("not a regular file")


def _check_kind(opened: Image.Image) -> None:
    """Refuse by the header, before memory is spent on pixels."""
    width, height = opened.size
    if width * height > MAX_PIXELS:
        raise _Unfit(f"{width} x {height} pixels; at most {MAX_PIXELS / 1e6:.0f} megapixels are read: scale it down")
    # An MPO is a camera's JPEG with a second view or gain map behind the picture itself, which comes first.
    frames = getattr(opened, "n_frames", 1)
    if frames > 1 and opened.format not in ("MPO", "HEIF"):
        what = "pages" if opened.format == "TIFF" else "frames (it is animated)"
        raise _Unfit(f"has {frames} {what}; save the one to learn as a PNG or JPEG")


@contextmanager
def _room(opened: Image.Image) -> Iterator[None]:
    """Threads decode large pictures one after the other: each takes several copies of its pixels while that goes on."""
    if opened.width * opened.height <= LARGE:
        yield
        return
    with _large:
        yield


def _upright(opened: Image.Image, notes: list[str]) -> tuple[Image.Image, bool]:
    """The picture (perhaps `opened` itself), decoded and upright by its EXIF orientation; whether it was turned."""
    before = _orientation(opened, notes) or opened.info.get("original_orientation", 1)  # pillow-heif turns on its own
    opened.load()
    left = _orientation(opened, notes)  # none for a TIFF: Pillow turns it while it loads
    return (opened.transpose(TURNS[left]) if left else opened), before in TURNS


def _orientation(opened: Image.Image, notes: list[str]) -> int | None:
    """The EXIF orientation, None when the picture is upright."""
    try:
        value = opened.getexif().get(ORIENTATION)
    except Exception as error:  # a broken EXIF block raises as many things as a broken picture
        notes.append(f"its EXIF data cannot be read ({_first_line(error)}): taken as upright")
        return None
    return value if value in TURNS else None


def _colours_and_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours in L, RGB, CMYK or LAB, and how opaque each pixel is (L), None where all are."""
    if image.mode.startswith("I;16"):
        return _grey16(image)
    if image.mode in ("I", "F"):
        raise _Unfit("32 bits a pixel, whose range is not known; save it with 8 or 16 bits a channel")
    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        whole = image.convert("LA" if grey else "RGBA")
        return whole.convert("L" if grey else "RGB"), whole.getchannel("A")
    if grey:
        return image.convert("L"), None
    return (image if image.mode in ("RGB", "CMYK", "LAB") else image.convert("RGB")), None


def _grey16(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """0 .. 65535 to 0 .. 255. Pillow's own conversion clips: 40000 becomes 255."""
    values = np.asarray(image).astype(np.uint32)
    see_through = image.info.get("transparency")  # PNG: the one value that is transparent
    alpha = None if see_through is None else Image.fromarray(np.where(values == see_through, 0, 255).astype(np.uint8))
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)), alpha


def _to_srgb(image: Image.Image, profile: bytes | None, notes: list[str]) -> Image.Image:
    """RGB in sRGB, by the embedded ICC profile. One that cannot be used is noted, and the values taken as sRGB."""
    srgb = ImageCms.createProfile("sRGB")
    if image.mode == "LAB":
        return _transform(image, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")), srgb)
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            space = source.profile.xcolor_space.strip()
            if space == "RGB" and image.mode == "L":  # grey pictures are often tagged with an RGB profile
                image = image.convert("RGB")
            if {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}.get(space) != image.mode:
                raise ImageCms.PyCMSError(f"it is for {space} colours, the picture is {image.mode}")
            return _transform(image, source, srgb)
        except (OSError, ImageCms.PyCMSError) as error:
            notes.append(f"its colour profile cannot be used ({_first_line(error)}): taken as sRGB")
    return image.convert("RGB")


def _transform(image: Image.Image, source: ImageCms.ImageCmsProfile, srgb: ImageCms.core.CmsProfile) -> Image.Image:
    made = ImageCms.applyTransform(image, ImageCms.buildTransform(source, srgb, image.mode, "RGB"))
    assert made is not None  # None is for transforms in place
    return made


def _reason(path: Path, error: Exception) -> str:
    """Why the file cannot be used, in the user's words."""
    if isinstance(error, _Unfit):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):
        return f"too large: {_first_line(error)}; at most {MAX_PIXELS / 1e6:.0f} megapixels are read: scale it down"
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read: {os.strerror(error.errno)}"
    return _what_it_is(path) if isinstance(error, UnidentifiedImageError) else _damaged(error)


def _damaged(error: Exception) -> str:
    return f"cut short or damaged ({_first_line(error)})"


def _what_it_is(path: Path) -> str:
    """The reason for a file that Pillow does not know as a picture, from its first bytes."""
    with path.open("rb") as handle:
        head = handle.read(64)
    if not head:
        return "the file is empty (0 bytes)"
    if not head.strip(b"\0"):
        return "begins with zero bytes only: its content was lost, in copying perhaps"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the picture itself: run `git lfs pull`"
    kind = _kind(head)
    if kind in NEEDS and NEEDS[kind][0] not in _formats():
        return f"a picture in {kind} format, which needs a decoder: install {NEEDS[kind][1]}, or save it as PNG or JPEG"
    if kind:
        return f"begins as a {kind} picture, but is damaged, cut short or of a variant that is not supported"
    try:
        text = head.decode("utf-8-sig", "ignore" if len(head) == 64 else "strict")
    except UnicodeDecodeError:
        text = "\0"
    if text.strip() and all(letter.isprintable() or letter.isspace() for letter in text):
        return f"text, not a picture (it begins {' '.join(text.split())[:24]!r})"
    return "not a picture of a kind that is known here"


def _kind(head: bytes) -> str | None:
    """The format that the first bytes stand for."""
    magic = {
        b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF8": "GIF", b"BM": "BMP", b"II*\0": "TIFF",
        b"MM\0*": "TIFF", b"\xff\x0a": "JPEG XL", b"\0\0\0\x0cJXL ": "JPEG XL", b"\0\0\0\x0cjP  ": "JPEG 2000",
    }  # fmt: skip
    if head[4:8] == b"ftyp":
        return {b"avif": "AVIF", b"avis": "AVIF"}.get(
            head[8:12], "HEIC" if head[8:11] in (b"hei", b"hev", b"mif", b"msf") else None
        )
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WebP"
    return next((name for start, name in magic.items() if head.startswith(start)), None)


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
