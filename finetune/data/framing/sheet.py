"""A contact sheet: each picture whole, with its crops drawn in, its size, what is kept of it, and its caption."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from finetune.data.framing import frames, geometry, masks
from finetune.data.framing.frames import Framed
from finetune.data.framing.geometry import Geometry
from finetune.data.reading import pictures
from finetune.data.reading.pictures import BadPicture
from finetune.errors import Fault
from finetune.pictures import Font, plain, wrap

COLUMNS, ROWS = 5, 4
SIDE = 288
"""The square in pixels that each picture is fitted into"""
THUMB = 52
"""Height of the small pictures of what the model sees, where that is more than one crop"""
GAP = 10
PAPER, INK, QUIET, BAD, ODD = "white", "black", "#666666", "#c1121f", "#b35900"
COLOURS = ("#0057d9", "#1a8f3c", "#8f2fb3", "#b37700")
"""Of the crops at each resolution, in the order of the resolutions"""
UNTRAINED = np.array([255, 0, 200])
"""Colour laid over what a mask leaves out"""
Track = Callable[[Sequence[Framed], str], Iterable[Framed]]
"""Goes through the pictures and shows how far it is."""


def write(
    framed: Sequence[Framed],
    output: Path,
    title: str,
    background: str = "white",
    most_pages: int = 0,
    overwrite: bool = False,
    track: Track = lambda framed, _: framed,
) -> list[Path]:
    """Write the pages as PNG: `output`, then with -2, -3, ... before its suffix. Their files, in order.

    Pictures that cannot be trained come first. Nothing but pixels gets into the files. Raises Fault, before anything
    is written, when a page is there already and is not to be overwritten, or the folder is not.
    """
    count = -(-len(framed) // (COLUMNS * ROWS))
    found = files(output, min(count, most_pages or count), overwrite)
    for file, page in zip(found, pages(framed, title, background, most_pages, track), strict=True):
        beside = file.with_name(f".{file.name}.{os.getpid()}.writing")
        page.save(beside, format="PNG")
        os.replace(beside, file)
    return found


def files(output: Path, count: int, overwrite: bool) -> list[Path]:
    """Where so many pages go. Raises Fault when they cannot."""
    if output.suffix.lower() != ".png":
        raise Fault(f"--output {output}: the sheet is written as PNG; give a name that ends in .png.")
    if not output.parent.is_dir():
        raise Fault(f"--output {output}: there is no folder {output.parent}; nothing was created.")
    found = [output if n == 1 else output.with_stem(f"{output.stem}-{n}") for n in range(1, count + 1)]
    if (there := [file.name for file in found if file.exists()]) and not overwrite:
        raise Fault(f"--output {output}: {', '.join(there)} there already. Give another name, or --overwrite.")
    return found


def pages(
    framed: Sequence[Framed],
    title: str,
    background: str = "white",
    most_pages: int = 0,
    track: Track = lambda framed, _: framed,
) -> Iterator[Image.Image]:
    """The sheet page by page, each made when it is asked for: pictures that cannot be trained first."""
    ordered, each, colours = sorted(framed, key=lambda one: not one.faults), COLUMNS * ROWS, _colours(framed)
    shown = ordered[: most_pages * each] if most_pages else ordered
    heading = f"{title}: {len(ordered)} picture{'s' * (len(ordered) != 1)}"
    heading += f", {len(shown)} of them shown" if len(shown) < len(ordered) else ""
    cells: list[Image.Image] = []
    for done, one in enumerate(track(shown, "contact sheet"), 1):
        cells.append(cell(one, colours, background))
        if done % each == 0 or done == len(shown):
            number, count = -(-done // each), -(-len(shown) // each)
            header = _header(heading + f", page {number} of {count}" * (count > 1), ordered, colours, number == 1)
            yield _assembled(header, cells)
            cells = []


def cell(one: Framed, colours: dict[int, str], background: str = "white") -> Image.Image:
    """One picture with what there is to say of it: SIDE + 2 GAP wide, as high as it must be."""
    try:
        picture = pictures.decode(one.example.path, background)[0]
    except BadPicture:
        shown, strip = _cross(), None
    else:
        shown, strip = _whole(one, picture, colours), _strip(one, picture, colours)
    lines = _lines(one, colours)
    font = _font()
    height = SIDE + (THUMB + GAP if strip else 0) + len(lines) * _tall(font) + 3 * GAP
    made = Image.new("RGB", (SIDE + 2 * GAP, height), PAPER)
    made.paste(shown, (GAP + (SIDE - shown.width) // 2, GAP + (SIDE - shown.height) // 2))
    y = SIDE + 2 * GAP
    if strip:
        made.paste(strip, (GAP, y))
        y += THUMB + GAP
    draw = ImageDraw.Draw(made)
    for text, colour in lines:
        draw.text((GAP, y), text, colour, font)
        y += _tall(font)
    if one.faults:
        draw.rectangle((2, 2, made.width - 3, made.height - 3), outline=BAD, width=4)
    return made


def _whole(one: Framed, picture: Image.Image, colours: dict[int, str]) -> Image.Image:
    """The picture; what no crop shows is faded, what the mask leaves out coloured, each crop outlined."""
    thumb = _fitted(picture, SIDE)
    crops = [(colours[side], _upright(view)) for side, views in one.views.items() for view in views]
    boxes = list(dict.fromkeys((colour, view.box) for colour, view in crops))
    pixels = np.asarray(thumb).astype(np.float32)
    if one.example.mask is not None and not one.faults:
        full = Geometry((thumb.height, thumb.width), (0, 0), (thumb.height, thumb.width))
        trained = masks.averaged(masks.levels(one.example), full, (thumb.height, thumb.width))[..., None]
        pixels += (UNTRAINED - pixels) * (1 - trained) * 0.45
    outside = np.ones((thumb.height, thumb.width, 1), np.float32)
    places = [(colour, _at(box, thumb.size)) for colour, box in boxes]
    for _, (left, top, right, bottom) in places:
        outside[top:bottom, left:right] = 0
    if places or one.faults:
        pixels += (255 - pixels) * outside * 0.6
    drawn = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(drawn)
    known = list(colours.values())
    for colour, (left, top, right, bottom) in places:
        inset = 3 * known.index(colour)  # crops at several resolutions often lie in one place
        if min(right - left, bottom - top) > 2 * inset + 6:
            left, top, right, bottom = left + inset, top + inset, right - inset, bottom - inset
        draw.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=3)
    if one.focus is not None:
        _draw_focus(draw, one.focus[0] * thumb.width, one.focus[1] * thumb.height)
    return drawn


def _strip(one: Framed, picture: Image.Image, colours: dict[int, str]) -> Image.Image | None:
    """What the model sees, crop by crop, mirror images too; None where the outline says it all."""
    views = [(side, view) for side, found in one.views.items() for view in found]
    if len(views) < 2 or all(len(found) < 2 for found in one.views.values()):
        return None
    strip, x = Image.new("RGB", (SIDE, THUMB), PAPER), 0
    turned = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for number, (side, view) in enumerate(views):
        seen = geometry.crop(turned if view.mirrored else picture, view)
        scale = min((THUMB - 4) / seen.height, 2 * THUMB / seen.width)
        width, height = max(4, round(seen.width * scale)), max(4, round(seen.height * scale))
        if x + width + 4 > SIDE - (36 if number < len(views) - 1 else 0):
            ImageDraw.Draw(strip).text((x + 2, THUMB // 2), f"+{len(views) - number}", QUIET, _font(), "lm")
            break
        strip.paste(colours[side], (x, 0, x + width + 4, height + 4))
        strip.paste(seen.resize((width, height), Image.Resampling.LANCZOS), (x + 2, 2))
        x += width + 8
    return strip


def _lines(one: Framed, colours: dict[int, str]) -> list[tuple[str, str]]:
    """What stands below a picture, line by line, with the colour of each."""
    said = [(text, INK) for text in _wrapped(frames.name(one.example), 2)]
    for side, views in one.views.items():
        said += [(text, colours[side]) for text in _wrapped(_placement(views), 3)]
    if not one.faults:
        for side, reason in one.reasons.items():
            said += [(text, ODD) for text in _wrapped(f"not trained at {side}: {reason}", 5)]
    for fault in one.faults:
        said += [(text, BAD) for text in _wrapped(fault, 8)]
    captions = [caption for caption in one.example.captions if caption]
    if captions:
        said += [(text, QUIET) for text in _wrapped(f'"{captions[0]}"', 3)]
    if len(captions) > 1:
        said.append((f"and {len(captions) - 1} more caption{'s' * (len(captions) > 2)}", QUIET))
    return said


def _placement(views: Sequence[Geometry]) -> str:
    """ "1440 x 1080 -> 640 x 448, x0.44, 93 % kept, mirrored too" """
    first = views[0]
    places = len({view.crop for view in views if not view.mirrored})
    parts = [
        f"{first.original[1]} x {first.original[0]} -> {first.target[1]} x {first.target[0]}",
        f"x{first.scale:.2f}",
        f"{first.kept:.0%} kept",
        *([f"{places} places"] if places > 1 else []),
        *(["mirrored too"] if any(view.mirrored for view in views) else []),
    ]
    return ", ".join(parts)


def _header(title: str, framed: Sequence[Framed], colours: dict[int, str], whole: bool) -> Image.Image:
    """The title; where it is whole also what is done to the pictures, and the buckets in their proportions."""
    width = COLUMNS * (SIDE + 2 * GAP)
    big, font = _font(24), _font()
    head = Image.new("RGB", (width, 64 + (180 + 12 * 20 if whole else 0)), PAPER)
    draw = ImageDraw.Draw(head)
    draw.text((GAP, GAP), plain(title), INK, big)
    y = 2 * GAP + _tall(big)
    if not whole:
        return head.crop((0, 0, width, y))
    x = GAP
    for side, colour in colours.items() if len(colours) > 1 else ():
        draw.text((x, y), f"--resolution {side}", colour, font)
        x += round(font.getlength(f"--resolution {side}")) + 3 * GAP
    y += _tall(font) if len(colours) > 1 else 0
    faults = sum(bool(one.faults) for one in framed)
    lines = [(f"{faults} cannot be trained as they are: framed in red", BAD)] if faults else []
    lines += [(line, QUIET) for line in frames.placement(framed)]
    for line, colour in lines:
        for text in wrap(plain(line), font, width - 2 * GAP)[:2]:
            draw.text((GAP, y), text, colour, font)
            y += _tall(font)
    y = _draw_table(draw, frames.table(framed), y + GAP, width)
    return head.crop((0, 0, width, y))


def _draw_table(draw: ImageDraw.ImageDraw, table: dict[tuple[int, int], int], y: int, width: int) -> int:
    """The buckets side by side, drawn in proportion, with size and number of pictures. Where they end."""
    font, x = _font(), GAP
    most = max((max(size) for size in table), default=1)
    for done, ((tall, wide), count) in enumerate(table.items()):
        if x + 110 > width - 60:
            draw.text((x, y + 30), f"+{len(table) - done} sizes", QUIET, font)
            break
        h, w = max(2, round(tall / most * 70)), max(2, round(wide / most * 70))
        draw.rectangle((x, y + 70 - h, x + w, y + 70), outline=INK, fill="#e8eef7")
        draw.text((x, y + 74), f"{wide} x {tall}", INK, font)
        draw.text((x, y + 74 + _tall(font)), f"{count} picture{'s' * (count != 1)}", ODD if count == 1 else QUIET, font)
        x += 110
    return y + (80 + 2 * _tall(font) if table else 0)


def _assembled(header: Image.Image, cells: Sequence[Image.Image]) -> Image.Image:
    rows = [cells[start : start + COLUMNS] for start in range(0, len(cells), COLUMNS)]
    heights = [max(one.height for one in row) for row in rows]
    page = Image.new("RGB", (header.width, header.height + sum(heights)), PAPER)
    page.paste(header, (0, 0))
    y = header.height
    for row, height in zip(rows, heights, strict=True):
        for column, one in enumerate(row):
            page.paste(one, (column * (SIDE + 2 * GAP), y))
        y += height
    return page


def _colours(framed: Iterable[Framed]) -> dict[int, str]:
    sides = sorted({side for one in framed for side in (*one.views, *one.reasons)})
    return {side: COLOURS[number % len(COLOURS)] for number, side in enumerate(sides)}


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    """Scaled into a square: smoothly down, up by whole pixels so that nothing looks better than it is."""
    scale = side / max(picture.size)
    if scale >= 2:
        return picture.resize((picture.width * int(scale), picture.height * int(scale)), Image.Resampling.NEAREST)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def _upright(view: Geometry) -> Geometry:
    """The same place in the picture as it is, not mirrored."""
    return view.mirror() if view.mirrored else view


def _at(box: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Shares (top, left, bottom, right) -> pixels (left, top, right, bottom), at least one wide and high."""
    top, left, bottom, right = box
    x, y = min(round(left * size[0]), size[0] - 1), min(round(top * size[1]), size[1] - 1)
    return x, y, max(round(right * size[0]), x + 1), max(round(bottom * size[1]), y + 1)


def _draw_focus(draw: ImageDraw.ImageDraw, x: float, y: float) -> None:
    for radius, colour, width in ((7, "white", 4), (7, BAD, 2)):
        draw.line((x - radius, y, x + radius, y), colour, width)
        draw.line((x, y - radius, x, y + radius), colour, width)


def _cross() -> Image.Image:
    """In place of a picture that cannot be read."""
    empty = Image.new("RGB", (SIDE, SIDE), "#eeeeee")
    draw = ImageDraw.Draw(empty)
    draw.line((40, 40, SIDE - 40, SIDE - 40), BAD, 6)
    draw.line((40, SIDE - 40, SIDE - 40, 40), BAD, 6)
    return empty


def _wrapped(text: str, most: int) -> list[str]:
    """Lines that fit below a picture, no more than `most`; the last ends in ... where there is more."""
    font = _font()
    lines = wrap(plain(text), font, SIDE)
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while font.getlength(f"{last} ...") > SIDE:
        last = last[:-1]
    return [*lines[: most - 1], f"{last} ..."]


def _font(size: int = 14) -> Font:
    return ImageFont.load_default(size)


def _tall(font: Font) -> int:
    _, top, _, bottom = font.getbbox("Agy|")
    return round((bottom - top) * 1.3)
