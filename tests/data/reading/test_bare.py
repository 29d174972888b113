"""Pictures without metadata (row 44): the same to the pixel, and nothing of place, camera or author in the bytes."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageDraw
from PIL.PngImagePlugin import PngInfo

from finetune.data.reading import pictures
from finetune.data.reading.bare import bare

SECRET = b"Planted-Camera-7"
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def exif(turn: int = 1) -> bytes:
    made = Image.Exif()
    made[0x0112], made[0x010F] = turn, SECRET.decode()
    made.get_ifd(0x8825)[29] = SECRET.decode()  # the date of the GPS fix
    made.get_ifd(0x8825)[2] = (48.0, 51.0, 29.9)
    return made.tobytes()


def drawn(mode: str = "RGB") -> Image.Image:
    image = Image.linear_gradient("L").resize((40, 24)).convert("RGBA")
    ImageDraw.Draw(image).ellipse((4, 3, 20, 16), (200, 40, 90, 120))
    return image.convert(mode)


def saved(mode: str, kind: str, turn: int = 1, **more: object) -> bytes:
    made = io.BytesIO()
    drawn(mode).save(made, kind, exif=exif(turn), **more)  # type: ignore[arg-type]
    return made.getvalue()


def decoded(folder: Path, raw: bytes) -> tuple[str, bool]:
    (folder / "picture").write_bytes(raw)
    facts = pictures.decode(folder / "picture")[1]
    return facts.digest, facts.turned


CASES = [
    ("RGB", "JPEG", {"comment": SECRET, "xmp": SECRET, "quality": 90}),
    ("L", "JPEG", {"progressive": True}),
    ("CMYK", "JPEG", {"icc_profile": b""}),
    ("RGB", "JPEG", {"icc_profile": PROFILE, "restart_marker_blocks": 1}),
    ("RGBA", "PNG", {"icc_profile": PROFILE}),
    ("LA", "PNG", {}),
    ("RGB", "PNG", {}),
    ("RGBA", "WEBP", {"lossless": True, "xmp": SECRET, "icc_profile": PROFILE}),
    ("RGB", "WEBP", {"quality": 80}),
    ("RGB", "TIFF", {}),
    ("CMYK", "TIFF", {}),
    ("L", "TIFF", {}),
]


@pytest.mark.parametrize("turn", [1, 6, 2])
@pytest.mark.parametrize(("mode", "kind", "more"), CASES)
def test_row_44_pixels_stay_and_metadata_go(
    tmp_path: Path, mode: str, kind: str, more: dict[str, object], turn: int
) -> None:
    if kind == "PNG":
        info = PngInfo()
        info.add_text("Author", SECRET.decode())
        info.add_itxt("XML:com.adobe.xmp", SECRET.decode())
        more = {**more, "pnginfo": info}
    raw = saved(mode, kind, turn, **more)
    assert SECRET in raw
    plain = bare(raw)
    assert plain is not None and SECRET not in plain
    with Image.open(io.BytesIO(plain)) as opened:
        left = opened.getexif()
        assert (kind == "TIFF" or set(left) <= {0x0112}) and 0x010F not in left and not left.get_ifd(0x8825)
    assert decoded(tmp_path, plain)[0] == decoded(tmp_path, raw)[0]
    if kind != "TIFF":
        assert decoded(tmp_path, plain)[1] == (turn != 1)
        assert len(plain) < len(raw)
    assert bare(plain) == plain or kind == "TIFF"


def test_what_cameras_append_goes_too(tmp_path: Path) -> None:
    first, second = saved("RGB", "JPEG"), saved("L", "JPEG")
    plain = bare(first + second + SECRET)
    assert plain is not None and SECRET not in plain and plain.count(b"\xff\xd8\xff") == 1
    assert decoded(tmp_path, plain)[0] == decoded(tmp_path, first)[0]


def test_paletted_pictures_keep_their_transparency(tmp_path: Path) -> None:
    made = io.BytesIO()
    drawn("RGBA").convert("P").save(made, "GIF", transparency=3, comment=SECRET)
    plain = bare(made.getvalue())
    assert plain is not None and SECRET not in plain
    assert decoded(tmp_path, plain)[0] == decoded(tmp_path, made.getvalue())[0]


def test_a_moving_picture_does_not_become_a_still_one() -> None:
    for kind in ("GIF", "PNG", "WEBP"):
        made = io.BytesIO()
        drawn().save(made, kind, save_all=True, append_images=[drawn("L").convert("RGB").rotate(90)])
        assert bare(made.getvalue()) is None


@settings(deadline=None, max_examples=80)
@given(at=st.integers(0, 400), byte=st.integers(0, 255), end=st.integers(0, 700), kind=st.sampled_from("JP"))
def test_damaged_bytes_never_raise(at: int, byte: int, end: int, kind: str) -> None:
    raw = bytearray(saved("RGB", "JPEG" if kind == "J" else "PNG"))
    raw[at % len(raw)] = byte
    bare(bytes(raw[:end]))
    bare(bytes(raw))
