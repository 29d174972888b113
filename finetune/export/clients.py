"""What each program that loads adapters makes of a file's names: a table of rules a program, each rule with its reason.

Measured by loading files through each program's own code: diffusers 0.42, sd-scripts (2026-02), ComfyUI 0.33,
AUTOMATIC1111 1.10, Forge (2025-06), InvokeAI (2026-08). None of them says of itself all that is said here. That ComfyUI
and Forge do not know (IA)3 was read in their code: their lists of kinds have no such one (`comfy/weight_adapter`,
`packages_3rdparty/comfyui_lora_collection/lora.py`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from finetune.export.change import MAGNITUDE
from finetune.export.formats import diffusers, kohya
from finetune.export.named import KOHYA, PEFT, Content, Module

Hits = Callable[[Content], list[Module]]
"""Which of a file's modules a rule is about"""
ATTENTION = re.compile(r".*\.attn\d\.to_(q|k|v|out\.0)")
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "out_proj"}
ENDS = ("conv_in", "conv_out", "time_embedding", "add_embedding")
"""Layers of the UNet outside its blocks"""
FEW = 12
"""Names that Forge does without; of more it takes the file for another model's."""


@dataclass(frozen=True)
class Rule:
    effect: Literal["refuses", "ignores", "misreads", "hides"]
    """The whole file; these layers; these layers' values; the file in its list."""
    reason: str
    hits: Hits


@dataclass(frozen=True)
class Finding:
    effect: str
    reason: str
    names: list[str]


@dataclass(frozen=True)
class Verdict:
    client: str
    layers: int
    loaded: int
    findings: list[Finding]

    @property
    def whole(self) -> bool:
        """Whether it loads all of the file, and rightly."""
        return not self.findings

    @property
    def said(self) -> str:
        misread = {name for one in self.findings if one.effect == "misreads" for name in one.names}
        if any(one.effect == "refuses" for one in self.findings):
            return "refuses the file"
        if self.loaded < self.layers:
            return f"ignores {self.layers - self.loaded} of {self.layers} layers"
        if misread:
            return f"takes {len(misread)} of {self.layers} layers for others"
        return "loads it, but hides it" if self.findings else f"loads all {self.layers} layers"


def judge(content: Content) -> list[Verdict]:
    """What each client makes of it of which that is known for the family, in the order of `CLIENTS`."""
    known = content.family.published.clients
    return [_judge(client, rules, content) for client, rules in CLIENTS.items() if client in known]


def made_for(content: Content) -> list[str]:
    """The clients that files with such names and kinds are for."""
    if any(module.spelling in PEFT for module in content):
        return ["diffusers"]
    if any(module.spelling == "tuner" for module in content):
        return []
    others = ("diffusers", "sd-scripts") if _native(content) else ()
    others = others if content.family.published.translated else ("diffusers", *others)
    others = (*others, "ComfyUI", "Forge") if FACTORS.hits(content) else others
    return [name for name in content.family.published.clients if name not in others]


def _judge(client: str, rules: Sequence[Rule], content: Content) -> Verdict:
    hits = [(rule, rule.hits(content)) for rule in (TUNED, *rules)]
    findings = [Finding(rule.effect, rule.reason, [module.name for module in hit]) for rule, hit in hits if hit]
    ignored = {name for one in findings if one.effect == "ignores" for name in one.names}
    unmatched = sum(len(module.keys) for module in content if module.name in ignored)
    if client == "Forge" and unmatched > FEW:
        reason = f"more than {FEW} names that it does not know: it takes the file for another model's"
        findings = [Finding("refuses", reason, sorted(ignored)), *findings]
    refused = any(one.effect == "refuses" for one in findings)
    return Verdict(client, len(content.modules), 0 if refused else len(content.modules) - len(ignored), findings)


def _all_of(*spellings: str) -> Hits:
    return lambda content: [module for module in content if module.spelling in spellings]


def _at(*paths: str, spelling: str | None = None) -> Hits:
    return lambda content: [
        module for module in content
        if module.part == content.family.denoiser_name and (module.path or "").startswith(paths)
        and spelling in (None, module.spelling)
    ]  # fmt: skip


def _when(told: Callable[[Content], bool], hits: Hits) -> Hits:
    return lambda content: hits(content) if told(content) else []


def _has_original(content: Content) -> bool:
    """Whether files of the family have the original code's names."""
    return content.family.published.original is not None


def _unknown(content: Content) -> list[Module]:
    return [module for module in content if module.path is None or f"{module.part}.{module.path}" in content.absent]


def _strangers(content: Content) -> list[Module]:
    """Beside kohya's names."""
    known = tuple(f"{prefix}_" for prefix in kohya.PARTS)
    named = any(module.spelling in KOHYA for module in content)
    return [module for module in content if named and not module.name.startswith(known)]


def _alphas_beside(content: Content) -> list[Module]:
    return [module for module in content if module.spelling == "unknown" and module.name.endswith(".alpha")]


def _not_whole(content: Content) -> list[Module]:
    return [module for module in content if module.spelling in KOHYA and module.path and module.kind is None]


def _halves(content: Content) -> list[Module]:
    return [module for module in content if module.spelling in PEFT and module.kind is None]


def _native(content: Content) -> list[Module]:
    return [module for module in content if module.kind not in ("lora", None)]


def _tucker(content: Content) -> list[Module]:
    return [module for module in content if "lora_mid.weight" in module.tensors]


def _rows(content: Content) -> list[Module]:
    """DoRA of rows by kohya's names"""
    return [m for m in content if m.spelling in KOHYA and MAGNITUDE in m.shapes and m.shapes[MAGNITUDE][0] != 1]


def _dora(content: Content) -> list[Module]:
    return [module for module in content if module.spelling in KOHYA and MAGNITUDE in module.shapes]


def _magnitudes(content: Content) -> list[Module]:
    return [module for module in content if module.spelling in PEFT and MAGNITUDE in module.shapes]


def _scaled(content: Content) -> list[Module]:
    """By diffusers' names, with another alpha than the rank"""
    return [m for m in content if m.spelling in PEFT and m.alpha not in (None, m.shapes["lora_down.weight"][0])]


def _other_alphas(content: Content) -> list[Module]:
    """Not of the alpha that most in the part have, where diffusers takes that one for all."""
    wrong = []
    for part in {module.part for module in content}:
        own = [m for m in content if m.part == part and m.spelling in KOHYA and m.alpha is not None]
        counted = Counter(module.alpha for module in own)
        wrong += [module for module in own if module.alpha != counted.most_common(1)[0][0]]
    return [module for module in wrong if module.text or ATTENTION.fullmatch(module.path or "")]


def _mixed(content: Content) -> list[Module]:
    spellings = {module.spelling for module in content if module.part == content.family.denoiser_name}
    return _all_of("original")(content) if set(KOHYA) <= spellings else []


def _mixed_scripts(content: Content) -> list[Module]:
    """Diffusers looks at the UNet's first name only, to know whether it is to translate them."""
    own = [module for module in content if module.part == content.family.denoiser_name and module.spelling in PEFT]
    return [m for m in own if m.spelling != "peft"] if any(m.spelling == "peft" for m in own) else []


def _some_projections(content: Content) -> list[Module]:
    """A text encoder's attention, of which not all four projections are there"""
    own = [module for module in content if module.text and (module.path or "").endswith(tuple(PROJECTIONS))]
    there: dict[str | None, set[str]] = {}
    for module in own:
        there.setdefault(module.part, set()).add((module.path or "").rpartition(".")[2])
    return [module for module in own if there[module.part] != PROJECTIONS]


def _second_of_some(content: Content) -> list[Module]:
    return [module for module in _some_projections(content) if module.part != content.family.text_encoder_names[0]]


def _foreign_text(content: Content) -> list[Module]:
    """Text encoders by another family's prefix"""
    return [m for m in content if m.text and m.spelling in KOHYA and m.prefix not in content.family.published.text]


def _unnumbered(content: Content) -> list[Module]:
    return _foreign_text(content) if len(content.family.published.text) > 1 else []


def _numbered(content: Content) -> list[Module]:
    return _foreign_text(content) if len(content.family.published.text) == 1 else []


def _flat(content: Content) -> list[Module]:
    """Text encoders' names without `text_model`, as transformers 5 has them"""
    return [m for m in content if m.text and not re.search(r"text_model[._]|text_projection", m.name)]


def _peft_attention(content: Content) -> list[Module]:
    own = [module for module in content if module.part == "unet" and module.spelling in ("peft", "script")]
    return [module for module in own if ATTENTION.fullmatch(module.path or "")]


def _not_recognised(content: Content) -> list[Module]:
    """InvokeAI knows the base by the width of these layers alone."""
    told = re.compile(r".*(attn2\.to_[kv]|time_emb_proj|self_attn\.\w+|transformer_blocks\.[2-9]\..*)")
    return [] if any(told.fullmatch(module.path or "") for module in content) else list(content.modules)


def _kronecker_unknown(content: Content) -> list[Module]:
    own = [module for module in content if module.kind == "lokr"]
    return [] if any({"lokr_w1", "lokr_w2"} <= module.tensors for module in own) else own


def _hidden(content: Content) -> list[Module]:
    """A1111 takes what says nothing for Stable Diffusion 1."""
    said = content.metadata.get("ss_base_model_version", "")
    believed = said if said.startswith("sdxl_") else "sd_v2" if content.metadata.get("ss_v2") == "True" else "sd_v1"
    right = believed.startswith(content.family.published.versions)
    return list(content.modules) if content.metadata and not right else []


TUNED = Rule("refuses", "PEFT's own names, which PEFT alone reads", lambda c: [m for m in c if m.spelling == "tuner"])
FACTORS = Rule("ignores", "it does not know (IA)3", lambda content: [m for m in content if m.kind == "ia3"])
ABSENT = Rule("ignores", "no such layer in the model", _unknown)
BROKEN = Rule("refuses", "a layer's tensors are not whole, or it does not know one of them", _not_whole)
FLAT = Rule("ignores", "text encoder without `text_model` in its names", _flat)
COLUMNS = Rule("misreads", "it knows DoRA of columns only", _rows)
UNPATCHED = Rule(
    "misreads", "it divides DoRA by the length of the base's rows, which is right for files made for it alone", _rows
)
HALF_LOADED = (
    Rule("ignores", "UNet attention by diffusers' names", _peft_attention),
    Rule("misreads", "alpha in diffusers' header, which it does not read", _scaled),
    Rule("misreads", "DoRA by diffusers' names: it leaves the magnitude out", _magnitudes),
)

CLIENTS: dict[str, tuple[Rule, ...]] = {
    "diffusers": (
        Rule("refuses", "kohya's names beside diffusers' alpha in the header",
             _when(lambda c: diffusers.HEADER in c.metadata, _all_of(*KOHYA))),
        Rule("refuses", "it does not translate kohya's names of this family",
             _when(lambda c: not c.family.published.translated, _all_of(*KOHYA))),
        Rule("refuses", "names of another kind beside kohya's: it translates none", _strangers),
        Rule("refuses", "alpha tensors beside diffusers' names", _alphas_beside),
        Rule("refuses", "the original code's names are known for SDXL only",
             _when(lambda c: not _has_original(c), _all_of("original"))),
        Rule("refuses", "it loads LoRA only, on these models", _native),
        Rule("refuses", "convolutions with a core (Tucker)", _tucker),
        Rule("refuses", "a text encoder needs all of q, k, v and out", _some_projections),
        BROKEN,
        Rule("refuses", "a layer's tensors are not whole", _halves),
        Rule("ignores", "the original code's names beside diffusers' in one file", _mixed),
        Rule("ignores", "two spellings of diffusers' names in one file", _mixed_scripts),
        Rule("ignores", "add_embedding by kohya's names", _at("add_embedding", spelling="kohya")),
        Rule("misreads", "it takes one alpha for all of attention and text encoders", _other_alphas),
        Rule("misreads", "it leaves DoRA's magnitude out", _dora),
        ABSENT,
    ),
    "sd-scripts": (
        Rule("ignores", "it knows kohya's names only", _all_of(*PEFT)),
        Rule("ignores", "networks.lora loads LoRA only; `--network_module lycoris.kohya` loads these", _native),
        Rule("ignores", "the original code's names are known for SDXL only",
             _when(lambda c: not _has_original(c), _all_of("original"))),
        Rule("ignores", "text encoder by another family's prefix", _foreign_text),
        Rule("ignores", "it adapts no layers outside the UNet's blocks", _at(*ENDS)),
        Rule("ignores", "a layer's tensors are not whole", _not_whole),
        Rule("misreads", "networks.lora leaves DoRA's magnitude out", _dora),
        FLAT,
        ABSENT,
    ),
    "ComfyUI": (BROKEN, *HALF_LOADED, UNPATCHED, FACTORS, FLAT, ABSENT),
    "A1111": (
        Rule("ignores", "it knows kohya's names only", _all_of(*PEFT)),
        BROKEN,
        Rule("ignores", "these by diffusers' paths; it knows the original code's",
             _when(_has_original, _at("up_blocks.0.upsamplers", "add_embedding", spelling="kohya"))),
        Rule("ignores", "text encoder without its number", _unnumbered),
        Rule("ignores", "of the second text encoder it takes all of q, k, v and out, or none", _second_of_some),
        COLUMNS,
        FLAT,
        ABSENT,
        Rule("hides", "the header does not tell this base: ss_base_model_version", _hidden),
    ),
    "Forge": (BROKEN, *HALF_LOADED, UNPATCHED, FACTORS, FLAT, ABSENT),
    "InvokeAI": (
        Rule("refuses", "it knows kohya's names only", _all_of(*PEFT)),
        Rule("refuses", "a text encoder without its number", _unnumbered),
        Rule("refuses", "the original code's names beside diffusers' in one file", _mixed),
        Rule("refuses", "no layer by which it could know the base", _not_recognised),
        Rule("refuses", "LoKr without a layer that has both factors whole", _kronecker_unknown),
        BROKEN,
        Rule("ignores", "the original code's names are known for SDXL only",
             _when(lambda c: not _has_original(c), _all_of("original"))),
        Rule("ignores", "text encoder by another family's prefix", _numbered),
        COLUMNS,
        FLAT,
        ABSENT,
    ),
}  # fmt: skip
"""Adding a client: its line here. What is ignored is ignored without a word in most of them."""
