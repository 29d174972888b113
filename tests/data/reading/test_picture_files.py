"""Faults rows 3-5, 7-13 and 44 on one file: what becomes of it, or why it is refused."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import sys
import time
import types
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile, PngImagePlugin

from finetune.data.reading import pictures
from finetune.data.reading.pictures import BadPicture, Facts, decode
from finetune.errors import Fault

RED, GREEN, WHITE = (255, 0, 0), (0, 128, 0), (255, 255, 255)
in_one_folder = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def photo(width: int = 48, height: int = 32) -> Image.Image:
    """Smooth colours that differ at every corner."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def reason(path: Path) -> str:
    with pytest.raises(BadPicture) as caught:
        decode(path)
    assert str(path) in str(caught.value)
    return caught.value.reason


def test_a_photo_is_read_as_it_is(tmp_path: Path) -> None:
    picture, facts = decode(saved(tmp_path / "a.png", photo()))
    assert np.array_equal(picture, photo())
    assert facts == Facts(height=32, width=48, turned=False, transparent=False)


# --- files that are no whole picture -------------------------------------------------------------------------------


def test_empty_text_page_and_pointer_are_told_apart(tmp_path: Path) -> None:
    contents = {
        b"": "the file is empty (0 bytes)",
        b"hello, this is my cat": "text, not a picture (it begins 'hello, this is my cat')",
        b"<!DOCTYPE html>\n<html>" + b" " * 99: "text, not a picture (it begins '<!DOCTYPE html> <html>')",
        b"version https://git-lfs.github.com/spec/v1\n": "a Git LFS pointer, not the picture itself",
        b"\0" * 5000: "begins with zero bytes only: its content was lost, in copying perhaps",
        b"\x13\x37\xfe\xfd" * 50: "not a picture of a kind that is known here",
        b"II*\0\xff\xff\xff\x7f and so on": "begins as a TIFF picture, but is damaged, cut short or of a variant",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n": "text, not a picture (it begins '%!PS-Adobe-3.0",
    }
    for content, expected in contents.items():
        (tmp_path / "a.jpg").write_bytes(content)
        assert reason(tmp_path / "a.jpg").startswith(expected)


@pytest.mark.parametrize("kind", ["JPEG", "progressive JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "JPEG2000"])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.97])
def test_truncated_files_are_refused(tmp_path: Path, kind: str, kept: float) -> None:
    buffer = io.BytesIO()
    photo(160, 120).save(buffer, kind.split()[-1], progressive=kind.startswith("prog"))
    whole = buffer.getvalue()
    path = tmp_path / "cut.jpg"
    path.write_bytes(whole)
    decode(path)
    path.write_bytes(whole[: int(len(whole) * kept)])
    assert "cut short" in reason(path)


def test_a_truncated_jpeg_is_refused_though_verify_passes_it_and_others_allow_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "a.jpg", photo(400, 300), quality=95)
    path.write_bytes(path.read_bytes()[:-2000])
    with Image.open(path) as opened:
        opened.verify()
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert "truncated" in reason(path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True  # what others chose for themselves is theirs


@in_one_folder
@given(kind=st.sampled_from(["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"]), data=st.data())
def test_damaged_bytes_give_a_picture_or_a_reason_and_never_another_error(
    kind: str, data: st.DataObject, tmp_path: Path
) -> None:
    buffer = io.BytesIO()
    photo().save(buffer, kind, exif=_exif(6)) if kind in ("JPEG", "PNG", "WEBP", "TIFF") else photo().save(buffer, kind)
    raw = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "a.jpg"
    path.write_bytes(raw)
    try:
        picture, facts = decode(path)
    except BadPicture as bad:
        assert bad.reason and "\n" not in bad.reason
    else:
        assert picture.mode == "RGB" and picture.size == (facts.width, facts.height)
    assert path.read_bytes() == raw


def test_lost_links_and_pipes_are_refused_and_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert reason(tmp_path / "link.jpg") == "a link to a file that is not there"
    assert reason(tmp_path / "pipe.jpg") == "not a regular file"
    assert reason(tmp_path / "none.jpg") == "there is no such file"


# --- orientation ---------------------------------------------------------------------------------------------------


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = orientation
    return exif


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, kind: str) -> None:
    turn = Image.Transpose
    stored = {  # how a camera that was held so stores what it saw
        1: [], 2: [turn.FLIP_LEFT_RIGHT], 3: [turn.ROTATE_180], 4: [turn.FLIP_TOP_BOTTOM], 5: [turn.TRANSPOSE],
        6: [turn.ROTATE_90], 7: [turn.TRANSVERSE], 8: [turn.ROTATE_270],
    }[orientation]  # fmt: skip
    image = photo()
    for step in stored:
        image = image.transpose(step)
    options = {"quality": 100} | ({"lossless": True} if kind == "webp" else {})
    picture, facts = decode(saved(tmp_path / f"a.{kind}", image, exif=_exif(orientation), **options))
    assert facts == Facts(32, 48, turned=orientation != 1, transparent=False)
    assert np.abs(np.asarray(picture, dtype=int) - np.asarray(photo(), dtype=int)).max() <= (16 if kind == "jpg" else 0)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_means_nothing_is_left(tmp_path: Path, orientation: int) -> None:
    assert not decode(saved(tmp_path / "a.jpg", photo(), exif=_exif(orientation)))[1].turned


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0II*\0" + b"\xff" * 40, b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12"]
)
def test_a_broken_exif_block_does_not_hinder(tmp_path: Path, exif: bytes) -> None:
    picture, facts = decode(saved(tmp_path / "a.png", photo(), exif=exif))
    assert np.array_equal(picture, photo()) and not facts.turned


# --- transparency --------------------------------------------------------------------------------------------------


def test_hidden_pixels_stay_hidden(tmp_path: Path) -> None:
    """`convert("RGB")` would show the red."""
    image = Image.new("RGBA", (4, 4), (*RED, 0))
    image.putpixel((0, 0), (*GREEN, 255))
    path = saved(tmp_path / "a.png", image)
    picture, facts = decode(path)
    assert facts.transparent
    assert picture.getpixel((0, 0)) == GREEN and picture.getpixel((3, 3)) == WHITE
    assert decode(path, "#102030")[0].getpixel((3, 3)) == (0x10, 0x20, 0x30)


@pytest.mark.parametrize(
    "mode", ["RGBA", "LA", "P", "PA", "L with a key", "RGB with a key", "1 with a key", "I;16 key"]
)
def test_every_way_to_be_transparent_lies_on_the_background(tmp_path: Path, mode: str) -> None:
    """Black pixels, of which the left half is transparent."""
    alpha = Image.new("L", (4, 4), 255)
    alpha.paste(0, (0, 0, 2, 4))
    key: dict[str, object] = {}
    if mode == "P":
        image = Image.new("P", (4, 4), 1)
        image.paste(0, (0, 0, 2, 4))
        image.putpalette([*RED, 0, 0, 0])
        key = {"transparency": b"\0\xff"}
    elif mode == "I;16 key":
        image = Image.fromarray(np.tile(np.array([40000, 40000, 0, 0], np.uint16), (4, 1)))
        key = {"transparency": 40000}
    elif mode.endswith("a key"):
        image = Image.new(mode.split()[0], (4, 4), 0)
        image.paste(WHITE if mode.startswith("RGB") else 255, (0, 0, 2, 4))
        key = {"transparency": WHITE if mode.startswith("RGB") else 1 if mode.startswith("1") else 255}
    else:
        image = Image.new(mode.replace("PA", "RGBA"), (4, 4), 0)
        image.putalpha(alpha)
        image = image.convert(mode)
    path = saved(tmp_path / ("a.tif" if mode == "PA" else "a.png"), image, **key)
    picture, facts = decode(path, "blue")
    assert facts.transparent
    assert [picture.getpixel((x, 1)) for x in range(4)] == [(0, 0, 255)] * 2 + [(0, 0, 0)] * 2


@in_one_folder
@given(
    pixels=st.lists(st.tuples(*[st.integers(0, 255)] * 4), min_size=4, max_size=4),
    behind=st.tuples(*[st.integers(0, 255)] * 3),
)
def test_partly_transparent_pixels_are_mixed(pixels, behind, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = saved(tmp_path / "a.png", Image.fromarray(np.array(pixels, np.uint8).reshape(2, 2, 4)))
    picture, facts = decode(path, "#{:02x}{:02x}{:02x}".format(*behind))
    rgba = np.array(pixels, float).reshape(2, 2, 4)
    alpha = rgba[..., 3:] / 255
    assert np.abs(np.asarray(picture) - (rgba[..., :3] * alpha + np.array(behind) * (1 - alpha))).max() <= 1
    assert facts.transparent == (alpha.min() < 1)


def test_an_entirely_transparent_picture_is_noted(tmp_path: Path) -> None:
    facts = decode(saved(tmp_path / "a.png", Image.new("RGBA", (4, 4), (*RED, 0))))[1]
    assert facts.notes == ("entirely transparent: nothing but the background (white) is left",)


def test_an_alpha_channel_that_is_opaque_changes_nothing(tmp_path: Path) -> None:
    picture, facts = decode(saved(tmp_path / "a.png", photo().convert("RGBA")))
    assert np.array_equal(picture, photo()) and not facts.transparent


@pytest.mark.parametrize("name", ["wite", "", "#12", "#11223344", "rgb(1,2)"])
def test_a_background_that_is_no_colour_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(Fault, match="is not a colour") as caught:
        decode(saved(tmp_path / "a.png", photo()), name)
    assert "Nearest name: white" in str(caught.value) or name != "wite"


# --- colours -------------------------------------------------------------------------------------------------------


@in_one_folder
@given(mode=st.sampled_from(["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I;16B"]),
       kind=st.sampled_from(["png", "tif", "jpg", "webp", "gif", "bmp", "avif", "jp2"]),
       size=st.tuples(st.integers(1, 9), st.integers(1, 9)))  # fmt: skip
def test_every_mode_in_every_format_becomes_rgb(mode: str, kind: str, size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    try:
        Image.new(mode, size).save(path)
    except (OSError, ValueError, KeyError, SystemError):
        return  # this format has no such mode
    picture, facts = decode(path)
    assert picture.mode == "RGB" and picture.size == size == (facts.width, facts.height)


@pytest.mark.parametrize(("kind", "mode"), [("png", "I;16"), ("tif", "I;16"), ("tif", "I;16B"), ("jp2", "I;16")])
def test_16_bit_grey_is_rescaled(tmp_path: Path, kind: str, mode: str) -> None:
    """Pillow would clip 40000 to 255."""
    values = np.array([[0, 128, 257, 40000, 65535, 30000]], np.uint16)
    image = Image.fromarray(values)
    if mode == "I;16B":
        image = Image.frombytes("I;16B", image.size, values.astype(">u2").tobytes())
    picture, _ = decode(saved(tmp_path / f"a.{kind}", image))
    assert [picture.getpixel((x, 0)) for x in range(6)] == [(v, v, v) for v in (0, 0, 1, 156, 255, 117)]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_grey_of_unknown_range_is_refused(tmp_path: Path, mode: str) -> None:
    assert "range is not known" in reason(saved(tmp_path / "a.tif", Image.new(mode, (4, 4))))


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    picture, _ = decode(saved(tmp_path / "a.tif", Image.new("CMYK", (2, 2), (0, 255, 255, 0))))
    assert picture.getpixel((0, 0)) == RED
    picture, _ = decode(saved(tmp_path / "a.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=100))
    assert np.abs(np.subtract(picture.getpixel((4, 4)), RED)).max() <= 3


def wide_profile() -> bytes:
    """sRGB with red and blue swapped: an ICC profile whose effect cannot be missed."""
    raw = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", raw[128:132])[0]
    tags = [bytearray(raw[132 + 12 * i : 144 + 12 * i]) for i in range(count)]
    names = {b"rXYZ": b"bXYZ", b"bXYZ": b"rXYZ"}
    for i, tag in enumerate(tags):
        tag[:4] = names.get(bytes(tag[:4]), bytes(tag[:4]))
        raw[132 + 12 * i : 144 + 12 * i] = tag
    return bytes(raw)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_an_icc_profile_is_converted_to_srgb(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGB", (4, 4), RED).convert(mode)
    picture, facts = decode(saved(tmp_path / "a.png", image, icc_profile=wide_profile()))
    assert np.abs(np.subtract(picture.getpixel((0, 0)), (0, 0, 255))).max() <= 2
    assert facts.notes == ()


def test_an_srgb_profile_changes_nothing(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture, _ = decode(saved(tmp_path / "a.png", photo(), icc_profile=profile))
    assert np.abs(np.subtract(np.asarray(picture, int), np.asarray(photo(), int))).max() <= 1


def test_a_grey_picture_with_an_rgb_profile_is_read(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture, facts = decode(saved(tmp_path / "a.jpg", Image.new("L", (8, 8), 100), icc_profile=profile))
    assert np.abs(np.subtract(picture.getpixel((4, 4)), (100, 100, 100))).max() <= 1 and facts.notes == ()


@pytest.mark.parametrize("profile", [b"garbage", wide_profile()[:200]])
def test_a_broken_profile_is_noted_and_the_colours_taken_as_srgb(tmp_path: Path, profile: bytes) -> None:
    picture, facts = decode(saved(tmp_path / "a.png", photo(), icc_profile=profile))
    assert np.array_equal(picture, photo())
    assert len(facts.notes) == 1 and "colour profile cannot be used" in facts.notes[0]


def test_a_profile_for_other_colours_is_noted(tmp_path: Path) -> None:
    facts = decode(saved(tmp_path / "a.tif", Image.new("CMYK", (4, 4)), icc_profile=wide_profile()))[1]
    assert facts.notes == (
        "its colour profile cannot be used (it is for RGB colours, the picture is CMYK): taken as sRGB",
    )


# --- kinds that are refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "word"), [("a.gif", "frames (it is animated)"), ("a.webp", "frames (it is animated)"),
                                            ("a.png", "frames (it is animated)"), ("a.tif", "pages")])  # fmt: skip
def test_animations_are_refused_with_the_way_out(tmp_path: Path, name: str, word: str) -> None:
    path = saved(
        tmp_path / name, Image.new("RGB", (4, 4), RED), save_all=True, append_images=[Image.new("RGB", (4, 4))]
    )
    assert reason(path) == f"has 2 {word}; save the one to learn as a PNG or JPEG"


def test_a_camera_s_jpeg_with_a_second_view_is_read(tmp_path: Path) -> None:
    """Phones put a gain map or depth map behind the photo (MPO); Pillow calls that animated."""
    path = tmp_path / "a.jpg"
    photo().save(path, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    assert decode(path)[1].width == 48


def png_of_size(path: Path, width: int, height: int) -> Path:
    """A PNG whose header claims a size; a few bytes on disk."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0")),
        (b"IEND", b""),
    ]
    body = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body))
    return path


@pytest.mark.parametrize("side", [10_000, 14_000, 60_000])
def test_too_many_pixels_are_refused_before_they_are_decoded(
    tmp_path: Path, side: int, recwarn: pytest.WarningsRecorder
) -> None:
    assert "at most 89 megapixels are read" in reason(png_of_size(tmp_path / "bomb.png", side, side))
    assert not recwarn.list


def test_a_decoder_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_formats", lambda: ["JPEG", "PNG"])
    heads = {"heic": (b"\0\0\0\x18ftypheic", "pillow-heif"), "avif": (b"\0\0\0\x18ftypavif", "pillow-avif-plugin"),
             "jxl": (b"\xff\x0a", "pillow-jxl-plugin")}  # fmt: skip
    for suffix, (head, package) in heads.items():
        (tmp_path / f"a.{suffix}").write_bytes(head + b"\0" * 80)
        assert f"install {package}" in reason(tmp_path / f"a.{suffix}").replace("pillow >= 11.3, or ", "")
    (tmp_path / "renamed.jpg").write_bytes(heads["heic"][0] + b"\0" * 80)
    assert "HEIC format, which needs a decoder" in reason(tmp_path / "renamed.jpg")


def test_plug_ins_are_used_where_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = []
    plug_in = types.ModuleType("pillow_heif")
    plug_in.register_heif_opener = lambda: registered.append("heif")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", plug_in)
    monkeypatch.setattr(pictures, "find_spec", lambda name: name == "pillow_heif")
    pictures._formats.__wrapped__()
    assert registered == ["heif"]


def test_a_phone_s_heic_is_upright_where_the_plug_in_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif").register_heif_opener()
    pictures._formats.cache_clear()
    path = saved(tmp_path / "a.heic", photo().transpose(Image.Transpose.ROTATE_90), exif=_exif(6).tobytes(), quality=95)
    picture, facts = decode(path)
    assert facts == Facts(32, 48, turned=True, transparent=False)
    assert np.abs(np.asarray(picture, dtype=int) - np.asarray(photo(), dtype=int)).mean() < 8


def test_nothing_of_the_metadata_goes_further(tmp_path: Path) -> None:
    exif = _exif(1)
    exif[0x010F] = "SecretCam"
    exif.get_ifd(0x8825)[1] = "N"
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "SecretPlace")
    for path, options in ((tmp_path / "a.jpg", {"exif": exif, "comment": b"SecretPlace"}),
                          (tmp_path / "a.png", {"exif": exif, "pnginfo": text}),
                          (tmp_path / "a.webp", {"exif": exif, "xmp": b"SecretPlace"})):  # fmt: skip
        image = photo() if path.suffix != ".png" else photo().convert("RGBA")
        picture, _ = decode(saved(path, image, **options))
        again = tmp_path / f"again{path.suffix}"
        picture.save(again)
        assert b"Secret" in path.read_bytes() and b"Secret" not in again.read_bytes()
        assert not Image.open(again).getexif()


@in_one_folder
@given(st.text(min_size=1, max_size=20))
def test_any_name_can_be_printed(name: str) -> None:
    shown = pictures.printable(name)
    assert shown.isprintable()
    shown.encode("utf-8")
    if name.isprintable():
        assert shown == name


def test_names_that_are_not_utf8_can_be_printed() -> None:
    assert pictures.printable(os.fsdecode(b"caf\xe9\n.jpg")) == "caf\\xe9\\n.jpg"


@pytest.mark.parametrize("size", [(1, 1), (700, 3), (1200, 900), (1_000_003, 2)])
def test_the_digest_is_that_of_all_pixels(tmp_path: Path, size: tuple[int, int]) -> None:
    picture, facts = decode(saved(tmp_path / "a.png", photo(*size)))
    assert facts.digest == hashlib.sha256(f"{size[0]} x {size[1]} RGB".encode() + picture.tobytes()).hexdigest()
    assert decode(saved(tmp_path / "b.bmp", picture))[1].digest == facts.digest  # whatever file they lie in
    picture.putpixel((size[0] - 1, size[1] - 1), (1, 2, 3))
    assert decode(saved(tmp_path / "a.png", picture))[1].digest != facts.digest


# --- several threads, and decoders that reduce ---------------------------------------------------------------------


def test_threads_decode_at_once_each_with_its_own_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's warnings and its LOAD_TRUNCATED_IMAGES belong to the whole process."""
    good = [saved(tmp_path / f"good{i}.jpg", photo(90 + i, 70)) for i in range(4)]
    odd = [saved(tmp_path / f"odd{i}.png", photo(90 + i, 70), icc_profile=b"garbage") for i in range(4)]
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\x03\0"
    warned = [saved(tmp_path / f"warned{i}.jpg", photo(90 + i, 70), exif=exif) for i in range(4)]
    cut = [saved(tmp_path / f"cut{i}.jpg", photo(90 + i, 70)) for i in range(4)]
    for path in cut:
        path.write_bytes(path.read_bytes()[:-300])

    def look(path: Path) -> Facts | str:
        try:
            return decode(path)[1]
        except BadPicture as bad:
            return bad.reason

    expected = {path: look(path) for path in [*good, *odd, *warned, *cut]}
    assert all(isinstance(one, Facts) and "Corrupt EXIF" in one.notes[0] for p in warned if (one := expected[p]))
    assert all("cut short" in str(expected[path]) for path in cut)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    mixed = [path for four in zip(good, odd, warned, cut, strict=True) for path in four] * 6
    with ThreadPoolExecutor(4) as pool:
        for path, found in zip(mixed, pool.map(look, mixed), strict=True):
            assert found == expected[path], path
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_large_pictures_are_decoded_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [saved(tmp_path / f"{number}.png", photo()) for number in range(4)]
    inside, most = 0, {}
    upright = pictures._upright

    def slow(opened: Image.Image, notes: list[str]) -> tuple[Image.Image, bool]:
        nonlocal inside
        inside += 1
        most[limit] = max(most.get(limit, 0), inside)
        time.sleep(0.05)
        inside -= 1
        return upright(opened, notes)

    monkeypatch.setattr(pictures, "_upright", slow)
    for limit in (1000, 10_000):
        monkeypatch.setattr(pictures, "LARGE", limit)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(decode, paths))
    assert most[1000] == 1 and most[10_000] > 1


def test_warnings_of_others_are_shown_as_before(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", photo())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        decode(path)
        warnings.warn("mine", UserWarning, stacklevel=1)
    decode(path)
    with pytest.warns(UserWarning, match="another"):
        warnings.warn("another", UserWarning, stacklevel=1)
    assert [str(one.message) for one in said] == ["mine"]


def test_a_decoder_reduces_only_where_four_times_the_wanted_size_is_left(tmp_path: Path) -> None:
    picture, facts = decode(saved(tmp_path / "a.jpg", photo(1600, 1200), quality=95))
    assert [pictures.reduction(facts, size) for size in ((16, 16), (75, 100), (76, 100), (150, 200), (151, 200))] == [
        8, 4, 2, 2, 1,
    ]  # fmt: skip
    assert pictures.reduction(decode(saved(tmp_path / "a.png", photo(1600, 1200)))[1], (16, 16)) == 1
    for by in (1, 2, 4, 8):
        reduced = pictures.decode_reduced(tmp_path / "a.jpg", by)
        assert reduced.size == (1600 // by, 1200 // by)
        size = (1600 // by // 4, 1200 // by // 4)
        difference = np.subtract(
            *(np.asarray(p.resize(size, Image.Resampling.LANCZOS), float) for p in (picture, reduced))
        )
        assert np.abs(difference).max() <= 2


@in_one_folder
@given(size=st.tuples(st.integers(1, 70), st.integers(1, 70)), by=st.sampled_from([1, 2, 4, 8]),
       orientation=st.sampled_from([1, 6]))  # fmt: skip
def test_a_reduced_picture_has_the_size_of_a_reduced_picture(
    size: tuple[int, int], by: int, orientation: int, tmp_path: Path
) -> None:
    path = saved(tmp_path / "a.jpg", photo(*size), exif=_exif(orientation))
    by = by if min(size) >= by else 1
    expected = [-(-side // by) for side in size]
    assert list(pictures.decode_reduced(path, by).size) == (expected if orientation == 1 else expected[::-1])
