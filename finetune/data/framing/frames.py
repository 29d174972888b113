"""How each picture is trained: its sizes, its crops and mirror images; or why it cannot be, told and not raised."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from finetune.data.examples import Example
from finetune.data.framing import buckets, geometry, masks
from finetune.data.framing.buckets import Unfit
from finetune.data.framing.geometry import Geometry
from finetune.data.reading import pictures
from finetune.data.reading.pictures import BadPicture, printable
from finetune.errors import Fault
from finetune.settings import Framing


@dataclass(frozen=True)
class Framed:
    """How one picture is trained at each resolution, or why not."""

    example: Example
    views: dict[int, tuple[Geometry, ...]] = field(default_factory=dict)
    """By resolution: crops and mirror images, all of one size"""
    reasons: dict[int, str] = field(default_factory=dict)
    """By resolution: why the picture is not trained at it"""
    faults: tuple[str, ...] = ()
    """Why it cannot be trained at all, without the file's name"""
    advice: tuple[str, ...] = ()
    """What can be done about these"""
    focus: tuple[float, float] | None = None
    """The point that its crops keep in view"""


def frame(
    examples: Iterable[Example], framing: Framing, resolutions: Sequence[int], multiple: int, seed: int = 0
) -> Iterator[Framed]:
    """How each picture is trained, one after the other. `multiple`: of the model's sides, in pixels.

    Random crops that show nothing of a picture's mask are not taken; if all are so, the one around its middle is.
    Raises Fault at once for settings that make no sense, whatever the pictures.
    """
    check(framing)
    if len(set(resolutions)) < len(resolutions) or not resolutions:
        raise Fault(
            f"--resolution {' '.join(map(str, resolutions)) or 'without a value'}: give each once, at least one."
        )
    for resolution in resolutions:
        buckets.require_multiple(resolution, multiple)
    return (_frame(example, framing, resolutions, multiple, seed) for example in examples)


def check(framing: Framing) -> None:
    """Refuse settings that make no sense, before a model or a picture is read."""
    ill = []
    if any(side < 1 for side in framing.resolution):
        ill.append(f"--resolution {' '.join(map(str, framing.resolution))}: a side in pixels, 1 or more.")
    if not (math.isfinite(framing.max_upscale) and framing.max_upscale > 0):
        ill.append(f"--max-upscale {framing.max_upscale:g}: a factor above 0; 1 enlarges nothing.")
    if not 0 <= framing.min_kept <= 1:
        ill.append(f"--min-kept {framing.min_kept:g}: a share, 0 to 1; 0 refuses no picture.")
    if framing.crop_variants < 1:
        ill.append(f"--crop-variants {framing.crop_variants}: one place at least.")
    if framing.focus is not None and not all(0 <= share <= 1 for share in framing.focus):
        given = " ".join(f"{share:g}" for share in framing.focus)
        ill.append(f"--focus {given}: shares of width and height, each 0 to 1; 0.5 0.5 is the centre.")
    if framing.focus is not None and framing.crop != "focus":
        ill.append(f"--focus goes with --crop focus; --crop {framing.crop} would not look at it.")
    if ill:
        raise Fault(
            ill[0] if len(ill) == 1 else "settings of the framing that make no sense:", ill if len(ill) > 1 else ()
        )


def describe(framed: Sequence[Framed]) -> list[str]:
    """Lines for the run's summary: the sizes with their numbers of pictures, enlargement, crops, masks."""
    counts = table(framed)
    return [*([f"trained at {_sizes(counts)}"] if counts else []), *placement(framed)]


def placement(framed: Sequence[Framed]) -> list[str]:
    """`describe` without the sizes."""
    views = [view for one in framed for found in one.views.values() for view in found]
    lines = []
    if small := [one for one in framed if any(view.scale > 1 for found in one.views.values() for view in found)]:
        most = max(view.scale for view in views)
        lines.append(f"smaller than they are trained, enlarged up to x{most:.2f}: {_names(small)}")
    if views:
        kept = dict.fromkeys(f"{share:.0%}" for share in (min(v.kept for v in views), max(v.kept for v in views)))
        lines.append(f"the crops keep {' to '.join(kept)} of each picture")
    fine = [one for one in framed if not one.faults]
    for resolution in sorted({number for one in fine for number in one.reasons}):
        lines.append(f"not trained at {resolution}: {_names([one for one in fine if resolution in one.reasons])}")
    if masked := [one for one in fine if one.example.mask is not None]:
        whole = [one for one in fine if one.example.mask is None]
        lines.append(f"{len(masked)} masked" + (f"; without a mask, trained whole: {_names(whole)}" if whole else ""))
    return lines


def table(framed: Iterable[Framed]) -> dict[tuple[int, int], int]:
    """The buckets (height, width) with their numbers of pictures, largest and tallest first."""
    counts = Counter(found[0].target for one in framed for found in one.views.values())
    return dict(sorted(counts.items(), key=lambda entry: (-math.prod(entry[0]), -entry[0][0])))


def name(example: Example) -> str:
    """What the user calls a picture."""
    return printable(example.name or example.path.name)


def _frame(example: Example, framing: Framing, resolutions: Sequence[int], multiple: int, seed: int) -> Framed:
    try:
        facts = example.facts or pictures.decode(example.path)[1]
    except BadPicture as error:
        return Framed(example, faults=(error.reason,))
    example = replace(example, facts=facts)
    mask, fault = masks.read(example)
    if fault:
        return Framed(example, faults=(fault,))
    focus = _focus(example, framing, mask)
    if framing.crop == "focus" and focus is None:
        advice = ("Give --focus X Y for all, or each a mask or a focus in its table; or --crop centre.",)
        return Framed(example, faults=("no focus for a crop to keep in view",), advice=advice)
    views: dict[int, tuple[Geometry, ...]] = {}
    reasons: dict[int, Unfit] = {}
    for resolution in resolutions:
        try:
            target = buckets.bucket((facts.height, facts.width), resolution, multiple, framing)
        except Unfit as error:
            reasons[resolution] = error
            continue
        found = geometry.views(facts, target, framing, focus, seed)
        if mask is not None:
            found = tuple(view for view in found if masks.shown(mask, view) > 0)
        if mask is not None and framing.crop == "random" and not found:
            found = geometry.views(facts, target, replace(framing, crop="focus"), masks.middle(mask))
        if found:
            views[resolution] = found
        else:
            why = "the crop shows nothing that its mask lets through"
            reasons[resolution] = Unfit(why, "To crop around the masks: --crop focus.")
    told = {resolution: error.message for resolution, error in reasons.items()}
    if views:
        return Framed(example, views, told, focus=focus)
    least = reasons[min(reasons)]
    return Framed(example, {}, told, (least.message,), (least.advice,), focus)


def _focus(example: Example, framing: Framing, mask: masks.Levels | None) -> tuple[float, float] | None:
    """The picture's own point, else the setting's, else the middle of its mask."""
    if framing.crop != "focus":
        return None
    return example.focus or framing.focus or (None if mask is None else masks.middle(mask))


def _sizes(counts: dict[tuple[int, int], int], most: int = 12) -> str:
    said = [f"{width} x {height} ({count})" for (height, width), count in counts.items()]
    return ", ".join(said[:most]) + (f" and {len(said) - most} other sizes" if len(said) > most else "")


def _names(framed: Sequence[Framed], most: int = 6) -> str:
    """ "2 (a.jpg, b.jpg)" """
    said = [name(one.example) for one in framed[:most]] + (["..."] if len(framed) > most else [])
    return f"{len(framed)} ({', '.join(said)})"
