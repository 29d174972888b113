"""What the header of a weight file says of it: ModelSpec, kohya's `ss_*` and our own settings, for whoever shows them.

ModelSpec 1.0.1 (https://github.com/Stability-AI/ModelSpec); `ss_*`: kohya-ss/sd-scripts, library/train_util.py. Every
value is text. Nothing is told that is not named here or in `provenance`. A date is told only where one is given: the
same training gives the same bytes.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from finetune import provenance
from finetune.data.examples import Example
from finetune.export import hashes
from finetune.export.change import MAGNITUDE
from finetune.export.content import Adapter
from finetune.families.base import Edition, Family

SPEC = "1.0.1"
OWN = "finetune"
"""The settings that may be told, as JSON"""
EPOCH = "SOURCE_DATE_EPOCH"
"""Seconds since 1970 that a build takes for now (https://reproducible-builds.org/specs/source-date-epoch)."""
ORIGINAL = "https://github.com/Stability-AI/generative-models"
"""`modelspec.implementation` of whole checkpoints with the original names"""
FREE_TEXTS = ("title", "author", "license", "description")
"""Settings that go into ModelSpec's fields of these names as they are"""
KNOWN = ("modelspec.", "ss_", OWN)
"""What headers' fields begin with that anybody reads. Others may hold anything: they are passed on to nobody."""
ALGORITHMS = {"lora": "lora", "loha": "loha", "lokr": "lokr", "ia3": "ia3", "diff": "full"}
"""What LyCORIS calls each kind"""
UNIQUE = ("lora_adapter_metadata", *hashes.BLANKS)
"""What belongs to one file and its names and bytes, and is never passed on to another."""


def of_run(
    family: Family, settings: Mapping[str, Any], kind: str | None = "lora", examples: Sequence[Example] = ()
) -> dict[str, str]:
    """All that a file of what was trained on this base says. `kind`: as in `of_edition`."""
    edition, captions = family.edition(), [caption for example in examples for caption in example.captions]
    made = of_training(settings, edition, type(family.pipeline).__name__, captions, len(examples))
    return of_edition(edition, kind) | made


def of_edition(edition: Edition, kind: str | None = "lora") -> dict[str, str]:
    """What the base is. `kind`: ModelSpec's word for what is added to it; None for a whole checkpoint."""
    told = {
        "modelspec.sai_model_spec": SPEC,
        "modelspec.architecture": edition.architecture + (f"/{kind}" if kind else ""),
        "modelspec.implementation": edition.implementation if kind else ORIGINAL,
        "modelspec.title": f"{edition.title}{' adapter' if kind else ''}",
        "ss_base_model_version": edition.version,
        "ss_v2": str(edition.second),
    }
    return told | ({"modelspec.prediction_type": edition.prediction} if edition.prediction else {})


def of_whole(metadata: Mapping[str, str], edition: Edition) -> dict[str, str]:
    """What a whole checkpoint says that holds what these headers tell of."""
    told = {name: value for name, value in passed_on(metadata).items() if not name.startswith("ss_network_")}
    base = of_edition(edition, None)
    return {**base, **told, **{name: base[name] for name in ("modelspec.architecture", "modelspec.implementation")}}


def of_layers(adapter: Adapter) -> dict[str, str]:
    """What the adapter is: its module, rank, alpha and what else sd-scripts would have to be told to make it."""
    ranks, kinds = Counter(layer.rank for layer in adapter if layer.rank), {layer.kind for layer in adapter}
    if not kinds <= ALGORITHMS.keys():
        return {}  # no module of theirs makes it
    algorithm = ", ".join(sorted(ALGORITHMS[kind] for kind in kinds))
    if not ranks:
        return {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps({"algo": algorithm})}
    rank = ranks.most_common(1)[0][0]
    alphas = Counter(round(layer.scale * layer.rank, 9) for layer in adapter if layer.rank == rank)
    args: dict[str, str] = {}
    if dora := any(MAGNITUDE in layer.shapes for layer in adapter):
        args["dora_wd"] = "True"
    if native := bool(dora or kinds - {"lora"}):
        args["algo"] = algorithm
    if spatial := [layer for layer in adapter if len(layer.shapes.get("lora_down.weight", ())) == 4]:
        args |= {"conv_dim": str(spatial[0].rank), "conv_alpha": _number(spatial[0].scale * (spatial[0].rank or 0))}
    told = {
        "ss_network_module": "lycoris.kohya" if native else "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": _number(alphas.most_common(1)[0][0]),
    }
    return told | ({"ss_network_args": json.dumps(args, sort_keys=True)} if args else {})


def of_training(
    settings: Mapping[str, Any],
    edition: Edition,
    pipeline: str | None = None,
    captions: Iterable[str] = (),
    pictures: int = 0,
) -> dict[str, str]:
    """How it was made: the settings that may be told, in the words of each of those who read them.

    `pipeline`: its class. `captions`: told as the frequency of their tags where the setting `tell_captions` allows it.
    `pictures`: their number.
    """
    given = dict(provenance.leaves(settings))
    words, slider = triggers(settings), settings.get("slider") or {}
    model = provenance.public_model(str(given.get("model") or ""))
    sides = given.get("resolution") or (edition.resolution,)
    named = words[0] if words else f"from {slider['negative']} to {slider['positive']}" if slider else None
    told = {
        OWN: provenance.dumps({**provenance.public(settings), "pipeline": pipeline, "software": provenance.software()}),
        "modelspec.resolution": f"{max(sides)}x{max(sides)}",
        "modelspec.title": given.get("title") or (f"{named} ({edition.title})" if named else None),
        "modelspec.usage_hint": usage(slider),
        "modelspec.trigger_phrase": ", ".join(words),
        "modelspec.tags": ", ".join([*(given.get("tags") or ()), *(["slider"] if slider else [])]),
        "ss_output_name": given.get("title"),
        "ss_resolution": f"({max(sides)}, {max(sides)})",
        "ss_sd_model_name": model if model != provenance.LOCAL else None,
        "ss_num_train_images": str(pictures) if pictures else None,
        "ss_clip_skip": str(given.get("clip_skip") or edition.clip_skip or "") or None,
        "ss_max_token_length": str(75 * chunks) if (chunks := given.get("text_chunks")) else None,
    }
    told |= {f"modelspec.{name}": given.get(name) for name in FREE_TEXTS if given.get(name)}
    if given.get("tell_captions") and (tags := _tags(captions)):
        told["ss_tag_frequency"] = json.dumps({"captions": tags}, ensure_ascii=False)
    return {name: value for name, value in told.items() if value} | date()


def triggers(settings: Mapping[str, Any]) -> list[str]:
    """The words that call what was learned: the triggers, or else the prompts that stand for all captions."""
    data = settings.get("data")
    data = data if isinstance(data, Mapping) else settings
    each = [data, *(data.get("concepts") or ())]
    for name in ("trigger", "prompt"):
        if words := [str(one[name]) for one in each if one.get(name)]:
            return list(dict.fromkeys(words))
    return []


def usage(slider: Mapping[str, Any]) -> str | None:
    """What the strengths of a slider do, by its settings; None without."""
    if not slider:
        return None
    return (
        f'a slider for "{slider["target"]}": strengths above 0 lead to "{slider["positive"]}", below 0 to '
        f'"{slider["negative"]}"'
    )


def date(now: datetime | None = None) -> dict[str, str]:
    """The given time, or the one that the environment fixes for reproducible builds, or none."""
    if now is None and (fixed := os.environ.get(EPOCH, "")).isdigit():
        now = datetime.fromtimestamp(int(fixed), UTC)
    return {"modelspec.date": now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")} if now else {}


def passed_on(metadata: Mapping[str, str]) -> dict[str, str]:
    """What of a file's header is still true of another file with the same adapter, in words that are known."""
    return {name: value for name, value in metadata.items() if name.startswith(KNOWN) and name not in UNIQUE}


def own(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What this toolkit has written of the training; empty for others' files."""
    try:
        return dict(json.loads(metadata.get(OWN, "{}")))
    except (ValueError, TypeError):
        return {}


def _tags(captions: Iterable[str]) -> dict[str, int]:
    """As often as each stands between commas, the most frequent first."""
    tags = (" ".join(part.split()) for caption in captions for part in caption.split(","))
    return dict(Counter(tag for tag in tags if tag).most_common())


def _number(value: float) -> str:
    """Without the rounding error of alpha / rank * rank."""
    return f"{round(value, 6):g}"
