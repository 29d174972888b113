"""Whether an adapter file is whole, and says the same to every program: checks one by one, then each client's rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from finetune import families
from finetune.errors import Fault
from finetune.export import clients, formats, hashes, in_weights, named
from finetune.export.clients import Verdict
from finetune.export.compare import REROUNDED, coarsest, difference, encoding, prediction
from finetune.export.content import Adapter, File, Layer
from finetune.export.named import Content, Module
from finetune.export.reading import adaptable, attach, detach
from finetune.families import Family
from finetune.families.base import skeleton

LOADED = "verified"


@dataclass(frozen=True)
class Check:
    """A question to the file. `open`: it could not be answered, and `lines` say why."""

    title: str
    state: Literal["holds", "fails", "open"]
    lines: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    path: Path
    format: str
    family: type[Family]
    layers: int
    checks: list[Check]
    verdicts: list[Verdict]
    made_for: list[str]
    """The clients that must load all of it"""

    @property
    def sound(self) -> bool:
        """Nothing is wrong with the file, and the clients that it is made for load all of it rightly."""
        served = all(verdict.whole for verdict in self.verdicts if verdict.client in self.made_for)
        return served and not any(check.state == "fails" for check in self.checks)


def verify(path: Path, base: Family | None = None) -> Report:
    """Ask all that can be asked of the file, with the base's weights or without.

    Raises Fault for a file that cannot be read, is no adapter's, or, without a base, could be for any.
    """
    file = File(path)
    form, modules = formats.format_of(path, file.shapes), named.modules(file)
    adapter, whole = _read(file, modules)
    family = type(base) if base else formats.known_family(adapter)
    expected, unknown = _expected(adapter, family, base)
    unfit = dict(in_weights.unfit(adapter, expected)) if expected else {}
    absent = frozenset(name for name, line in unfit.items() if line == in_weights.ABSENT)
    content = Content(modules, family, file.metadata, absent)
    checks = [
        whole,
        _finite(file),
        _alphas(adapter, form),
        _shapes(unfit, unknown),
        _told(adapter, family, base),
        _hashes(path),
    ]
    if base is not None and not any(check.state == "fails" for check in checks):
        checks += _with_base(path, adapter, content, base)
    return Report(path, form, family, len(modules), checks, clients.judge(content), clients.made_for(content))


def _layers(file: File, modules: Iterable[Module]) -> Iterator[Layer]:
    """Of the modules those that are layers, whole."""
    for module in modules:
        if module.path is not None and module.kind is not None:
            keys = {name: key for name, key in module.keys.items() if name != "alpha"}
            layer = file.layer(str(module.part), module.path, keys, module.alpha)
            with suppress(Fault):
                layer.extent  # noqa: B018  (raises when its tensors do not go together)
                yield layer


def _read(file: File, modules: Iterable[Module]) -> tuple[Adapter, Check]:
    """The adapter, or of a broken one those layers that are whole."""
    title = "every name is a layer's, every layer is whole"
    try:
        return formats.read(file.path), Check(title, "holds")
    except Fault as fault:
        rest = Adapter(list(_layers(file, modules)), file.metadata)
        return replace(rest, family=formats.family_of(rest)), Check(title, "fails", fault.details or [fault.message])


def _finite(file: File) -> Check:
    wrong = []
    for name in file.shapes:
        try:
            file.load(name)
        except Fault:
            wrong.append(f"{name} holds NaN or infinite values")
    return Check("every number is finite", "fails" if wrong else "holds", wrong)


def _alphas(adapter: Adapter, form: str) -> Check:
    """Without alphas every client scales by 1; what the header says of it must not be another number."""
    title, ranked = "alpha is there", [layer for layer in adapter if layer.rank]
    said = adapter.metadata.get("ss_network_alpha"), adapter.metadata.get("ss_network_dim")
    lacking = [layer.name for layer in ranked if layer.alpha is None]
    if form == "kohya" and lacking:
        which = "none of its layers has one" if len(lacking) == len(ranked) else f"{', '.join(lacking[:10])} have none"
        return Check(title, "fails", [f"{which}: every client scales by 1 then, which may not be what was trained"])
    try:
        told = float(said[0] or "") / float(said[1] or "")
    except (ValueError, ZeroDivisionError):
        told = None
    scales = Counter(round(layer.scale, 6) for layer in ranked)
    if told is not None and scales and not any(abs(told - scale) <= 1e-4 * abs(told) for scale in scales):
        found = scales.most_common(1)[0][0]
        line = f"the header says alpha {said[0]} of rank {said[1]}, a scale of {told:g}; the layers have {found:g}"
        return Check(title, "fails", [line])
    return Check(title, "holds", ["none: a scale of 1"] if ranked and len(lacking) == len(ranked) else [])


def _shapes(unfit: Mapping[str, str], unknown: str | None) -> Check:
    title = "every layer fits the model"
    if unknown:
        return Check(title, "open", [unknown])
    return Check(title, "fails" if unfit else "holds", [f"{name}: {line}" for name, line in unfit.items()])


def _expected(adapter: Adapter, family: type[Family], base: Family | None) -> tuple[dict[str, Tensor], str | None]:
    """The base's weights by their layers' names, or hollow ones of the published base that the widths are those of.

    And why there are none.
    """
    if base is not None:
        return in_weights.changeable(adaptable(base)), None
    if formats.text_width(adapter) not in family.published.widths:
        return {}, "by its widths it is for no published base. Name the base: --model"
    return in_weights.changeable(skeleton(family.published, formats.edition(adapter, family))), None


def _told(adapter: Adapter, family: type[Family], base: Family | None) -> Check:
    """What the header says of the base is what the layers are for."""
    title, said = "the header tells the base that the layers are for", adapter.metadata
    version = said.get("ss_base_model_version")
    real = base.edition() if base else family.published.edition({}, formats.text_width(adapter))
    if not version:
        return Check(title, "open", ["it tells none (ss_base_model_version)"])
    width = formats.text_width(adapter)
    owners = [other for other in families.FAMILIES.values() if width in other.published.widths]
    if base is None and owners and family not in owners:
        return Check(title, "fails", [f"it says {version}; layers of such widths are for {owners[0].title}"])
    widths = {edition.width for edition in family.published.editions if edition.version == version}
    known = base is not None or width is not None  # of a transformer the layers do not tell it
    fits = version.startswith(family.published.versions) and (not known or widths <= {real.width})
    return Check(title, "holds" if fits else "fails", [] if fits else [f"it says {version}, where {real.title} it is"])


def _hashes(path: Path) -> Check:
    title, claims = "the hashes in the header hold", hashes.claims(path)
    if not claims:
        return Check(title, "open", ["it tells none"])
    wrong = [f"{claim.name} says {claim.told}; it is {claim.found}" for claim in claims if not claim.holds]
    return Check(title, "fails" if wrong else "holds", wrong)


def _with_base(path: Path, adapter: Adapter, content: Content, base: Family) -> Iterator[Check]:
    """The file on the base, through diffusers and by the formulas of `change`: both say the same."""
    title = "on the base diffusers makes of it what its tensors say"
    with in_weights.changed(base, adapter):
        by_formula = _answers(base, adapter)
    if "diffusers" not in clients.made_for(content):
        finite = all(answer.isfinite().all() for answer in by_formula.values())
        yield Check(title, "open", ["diffusers loads LoRA only on these models; the formulas of its kind were tried"])
        yield Check("the base with it predicts finite numbers", "holds" if finite else "fails")
        return
    try:
        attach(base, path, LOADED)
    except Fault as fault:
        yield Check(title, "fails", [fault.message, *fault.details])
        return
    try:
        by_diffusers = _answers(base, adapter)
    finally:
        detach(base, LOADED)
    yield Check(title, "holds")
    denoiser: Any = families.denoiser(base)
    allowed = REROUNDED[coarsest([*File(path).precisions(), denoiser.dtype])]
    gaps = {what: difference(answer, by_diffusers[what]) for what, answer in by_formula.items()}
    lines = [f"{what}: apart by {gap:.1e} of its norm" for what, gap in gaps.items()]
    yield Check("both predict the same", "holds" if max(gaps.values()) <= allowed else "fails", lines)


def _answers(base: Family, adapter: Adapter) -> dict[str, Tensor]:
    answers = {"prediction": prediction(base)}
    if set(adapter.parts) & set(base.text_encoder_names):
        answers["text encoding"] = encoding(base)
    return answers
