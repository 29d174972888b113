"""From examples to what an epoch goes through. All faults of all pictures are said at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from finetune import settings
from finetune.data.examples import Example, Item
from finetune.data.framing.frames import Framed, frame, name
from finetune.data.reading import captions
from finetune.errors import Fault
from finetune.settings import Framing


def plan(
    examples: Sequence[Example],
    framing: Framing,
    resolutions: Sequence[int],
    multiple: int,
    texts: settings.Captions | None = None,
    seed: int = 0,
) -> list[Item]:
    """The items of the examples, in their order, one for each resolution. `multiple`: of the model's sides, in pixels.

    A picture that is too small for one of several resolutions is trained at the others (`frames.describe` says so).
    Raises one Fault that lists every picture that cannot be trained as the settings have it.
    """
    framed = list(frame(examples, framing, resolutions, multiple, seed))
    require(framed)
    return items(framed, texts or settings.Captions(), seed)


def require(framed: Sequence[Framed]) -> None:
    """Raise a Fault that lists the pictures that cannot be trained, if there are any."""
    ill = [one for one in framed if one.faults]
    if not ill:
        return
    faults = [f"{name(one.example)}: {fault}" for one in ill for fault in one.faults]
    advice = " ".join(dict.fromkeys(advice for one in ill for advice in one.advice))
    leave = "Or leave them out: --skip NAME ..."
    raise Fault(f"{len(ill)} of {len(framed)} pictures cannot be trained as they are. {advice} {leave}", faults)


def items(framed: Iterable[Framed], texts: settings.Captions, seed: int = 0) -> list[Item]:
    """The items of pictures that are without fault."""
    made = []
    for one in framed:
        facts = one.example.facts
        assert facts is not None
        variants = captions.variants(one.example.captions, texts, seed, facts.digest)
        made += [Item(one.example, views, variants) for views in one.views.values()]
    return made
