"""A picture file without what its camera and programs wrote into it: place, time, camera, thumbnails, comments.

Only the orientation and the colour profile stay. JPEG, PNG and WebP keep their compressed pixels as they are; other
kinds are written as PNG or TIFF, which lose nothing.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator

from PIL import Image, ImageOps

from finetune.data.reading import pictures
from finetune.data.reading.pictures import ORIENTATION, TURNS

EXIF = b"Exif\0\0"
PNG = b"\x89PNG\r\n\x1a\n"
KEPT_PNG = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"cICP", b"sBIT", b"bKGD")
"""Chunks of pixels and their colours. Those of animations are not here: a file with them is not taken apart."""
KEPT_WEBP = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ICCP")
IN_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
IN_TIFF = ("CMYK", "LAB", "I;16B")
MARKER = re.compile(rb"\xff+[^\xff\x00\xd0-\xd7]")
"""Within the compressed pixels of a JPEG, the marker that ends them"""


def bare(raw: bytes) -> bytes | None:
    """The picture without metadata, the same to the pixel; None where the file is damaged, animated or unknown."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are said when the picture is decoded
            with Image.open(io.BytesIO(raw), formats=pictures._formats()) as opened:
                if getattr(opened, "n_frames", 1) > 1 and opened.format not in ("MPO", "HEIF"):
                    return None
                if raw.startswith(b"\xff\xd8"):
                    return b"".join(_jpeg(raw, _turn(opened)))
                if raw.startswith(PNG):
                    return PNG + b"".join(_png(raw, _turn(opened)))
                if raw[:4] == b"RIFF" and raw[8:12] == b"WEBP":
                    return _webp(raw, _turn(opened))
                return _again(opened)
    except Exception:  # foreign bytes: whoever decodes the file says what is wrong with it
        return None


def _turn(opened: Image.Image) -> bytes:
    """EXIF data that say how the picture is turned and nothing else; nothing for one that stands upright."""
    try:
        turn = opened.getexif().get(ORIENTATION)
    except Exception:  # broken EXIF data, taken as upright
        return b""
    if turn not in TURNS:
        return b""
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    return exif.tobytes().removeprefix(EXIF)


def _jpeg(raw: bytes, turn: bytes) -> Iterator[bytes]:
    """The segments that stay, up to the end of the first picture; what cameras append is another one."""
    yield b"\xff\xd8"
    if turn:
        yield b"\xff\xe1" + struct.pack(">H", len(EXIF) + len(turn) + 2) + EXIF + turn
    at = 2
    while True:
        while raw[at + 1] == 0xFF:  # fill bytes
            at += 1
        if raw[at] != 0xFF:
            raise ValueError("no marker where one must be")
        marker = raw[at + 1]
        if marker == 0xD9:
            yield b"\xff\xd9"
            return
        (length,) = struct.unpack_from(">H", raw, at + 2)
        end = at + 2 + length
        if _stays(marker, raw[at + 4 : at + 20]):
            yield raw[at:end]
        if marker == 0xDA:  # pixels follow
            found = MARKER.search(raw, end)
            if found is None:
                raise ValueError("its end is missing")
            yield raw[end : found.start()]
            end = found.start()
        at = end


def _stays(marker: int, begin: bytes) -> bool:
    """JFIF, colour profiles, Adobe's colour transform, and all that is no application's and no comment."""
    if marker in (0xE0, 0xE2, 0xEE):
        return begin.startswith((b"JFIF\0", b"ICC_PROFILE\0", b"Adobe"))
    return not (0xE0 <= marker <= 0xEF or marker == 0xFE)


def _png(raw: bytes, turn: bytes) -> Iterator[bytes]:
    at = len(PNG)
    while True:
        length, kind = struct.unpack_from(">I4s", raw, at)
        end = at + 12 + length
        if end > len(raw):
            raise ValueError("cut short")
        if kind in KEPT_PNG:
            yield raw[at:end]
        if kind == b"IHDR" and turn:
            yield struct.pack(">I", len(turn)) + b"eXIf" + turn + struct.pack(">I", zlib.crc32(b"eXIf" + turn))
        if kind == b"IEND":
            return
        at = end


def _webp(raw: bytes, turn: bytes) -> bytes:
    (size,) = struct.unpack_from("<I", raw, 4)
    if size + 8 > len(raw):
        raise ValueError("cut short")
    parts = [[kind, body] for kind, body in _chunks(raw[12 : size + 8]) if kind in KEPT_WEBP]
    for part in parts:
        if part[0] == b"VP8X":  # its flags say which of the others there are
            part[1] = bytes([part[1][0] & ~0x0C | (0x08 if turn else 0)]) + part[1][1:]
    parts += [[b"EXIF", turn]] if turn else []
    body = b"".join(kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for kind, data in parts)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def _chunks(body: bytes) -> Iterable[tuple[bytes, bytes]]:
    at = 0
    while at + 8 <= len(body):
        kind, length = struct.unpack_from("<4sI", body, at)
        yield kind, body[at + 8 : at + 8 + length]
        at += 8 + length + length % 2


def _again(opened: Image.Image) -> bytes | None:
    """The picture written anew, upright."""
    kind = "PNG" if opened.mode in IN_PNG else "TIFF" if opened.mode in IN_TIFF else None
    if kind is None:
        return None
    profile = opened.info.get("icc_profile")
    opened.load()
    picture = ImageOps.exif_transpose(opened)
    see_through = picture.info.get("transparency")
    picture.info = {} if see_through is None else {"transparency": see_through}
    made = io.BytesIO()
    picture.copy().save(made, kind, **({"icc_profile": profile} if profile else {}))
    return made.getvalue()
