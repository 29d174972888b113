"""What a file that is made of others says of them: all that is still true, and nothing that is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from finetune import provenance
from finetune.export.metadata import OWN, own, passed_on
from finetune.settings import Adapter

LAYERS = {field.name for field in fields(Adapter)}
"""What our own table says of the layers."""
STALE = ("modelspec.thumbnail", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args")
"""Of the old layers. What is written tells of its own."""
TITLES = {"modelspec.title": "modelspec.merged_from", "modelspec.trigger_phrase": "modelspec.trigger_phrase"}
"""Where several files say different things, both are of use."""


def carried_metadata(
    sources: Sequence[Mapping[str, str]], pipeline: str, tool: Mapping[str, Any], remade: bool
) -> dict[str, str]:
    """The header of a file that was made from files with these headers: `ss_*` and `modelspec.*` that all of them say
    alike, and our own table.

    `pipeline`: the class that the adapter is for. `tool`: what was done, added to our table's `tools`. `remade`: the
    layers are of another rank or kind, so what our table says of these is left out. Hashes are never carried over.
    """
    kept = {
        key: value
        for key, value in passed_on(sources[0]).items()
        if key not in STALE and all(other.get(key) == value for other in sources[1:])
    }
    for key, joint in TITLES.items():
        told = list(dict.fromkeys(source[key] for source in sources if source.get(key)))
        if len(sources) > 1 and told:
            kept[joint] = ", ".join(told)
    return {**kept, OWN: provenance.dumps(_own(sources, pipeline, tool, remade))}


def _own(sources: Sequence[Mapping[str, str]], pipeline: str, tool: Mapping[str, Any], remade: bool) -> dict[str, Any]:
    tables = [own(source) for source in sources]
    one = len(tables) == 1
    table = dict(tables[0]) if one else {"sources": [{k: v for k, v in t.items() if k != "tools"} for t in tables]}
    earlier = table.pop("tools", [])
    if one and remade:
        table = {key: value for key, value in table.items() if key not in LAYERS}
    done = {key: value for key, value in {**tool, "software": provenance.software()}.items() if value is not None}
    return {**table, "pipeline": pipeline, "tools": [*(earlier if isinstance(earlier, list) else []), done]}
