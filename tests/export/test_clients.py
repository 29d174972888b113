"""What each client makes of a file: the rows that were measured with the clients' own code, one by one.

(One letter a client: P all of it; i ignores some; w takes some wrongly; x refuses it.) Of diffusers, which is at hand,
it is measured here again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import foreign
import pytest

from finetune import families
from finetune.errors import Fault
from finetune.export import attach, clients, in_weights, named
from finetune.export.content import File
from finetune.export.reading import detach
from finetune.families import Family, Source

CLIENTS = ("diffusers", "sd-scripts", "ComfyUI", "A1111", "Forge", "InvokeAI")
ROWS: list[tuple[str, dict[str, Any], str]] = [
    ("sd", {}, "PPPPPP"),
    ("sd", {"layers": "locon"}, "PPPPPP"),
    ("sd", {"layers": "locon", "alphas": "each"}, "wPPPPP"),
    ("sd", {"layers": "all"}, "PiPPPP"),
    ("sd", {"names": "original"}, "xiPPPi"),
    ("sd", {"text": "lora_te1"}, "PiPPPi"),
    ("sd", {"projections": "qv"}, "xPPPPP"),
    ("sd", {"alphas": "none"}, "PPPPPP"),
    ("sd", {"names": "peft", "layers": "locon"}, "Piiixx"),
    ("sd", {"names": "script", "layers": "locon"}, "iiiixx"),
    ("sd", {"form": "loha"}, "xiPPPP"),
    ("sd", {"text": "flat"}, "Piiixi"),
    ("sdxl", {}, "PPPPPP"),
    ("sdxl", {"names": "original"}, "PPPPPP"),
    ("sdxl", {"layers": "locon", "names": "original"}, "PPPPPP"),
    ("sdxl", {"layers": "locon"}, "PPPiPP"),
    ("sdxl", {"layers": "all", "names": "original"}, "PiPPPP"),
    ("sdxl", {"layers": "all"}, "iiPiPP"),
    ("sdxl", {"projections": "qv"}, "xPPiPP"),
    ("sdxl", {"alphas": "each"}, "wPPPPP"),
    ("sdxl", {"form": "loha"}, "xiPPPP"),
    ("sdxl", {"form": "loha", "names": "original"}, "xiPPPP"),
]


@pytest.fixture(scope="module")
def bases(tiny_models: dict[str, Path]) -> dict[str, Family]:
    return {kind: families.load(Source(str(tiny_models[kind]))) for kind in ("sd", "sdxl")}


@pytest.mark.parametrize(("kind", "how", "expected"), ROWS, ids=str)
def test_the_rows_that_were_measured(
    kind: str,
    how: dict[str, Any],
    expected: str,
    tiny_models: dict[str, Path],
    bases: dict[str, Family],
    tmp_path: Path,
) -> None:
    verdicts = judged(bases[kind], file := foreign.write(tiny_models[kind], tmp_path / "a.safetensors", **how))
    assert tuple(verdicts) == CLIENTS
    assert "".join(letter(verdict) for verdict in verdicts.values()) == expected
    assert (refusal(bases[kind], file) is None) == (expected[0] == "P"), "diffusers itself"


@pytest.mark.parametrize(
    ("kind", "how", "client", "ends"),
    [
        ("sd", {"layers": "all"}, "sd-scripts", ["conv_in", "conv_out", "embedding_linear_1", "embedding_linear_2"]),
        ("sdxl", {"layers": "all"}, "A1111", ["add_embedding_linear_1", "add_embedding_linear_2", "upsamplers_0_conv"]),
        ("sdxl", {"layers": "locon"}, "A1111", ["up_blocks_0_upsamplers_0_conv"]),
        ("sdxl", {"layers": "all"}, "diffusers", ["add_embedding_linear_1", "add_embedding_linear_2"]),
    ],
)
def test_what_is_ignored_is_named(
    kind: str,
    how: dict[str, Any],
    client: str,
    ends: list[str],
    tiny_models: dict[str, Path],
    bases: dict[str, Family],
    tmp_path: Path,
) -> None:
    verdict = judged(bases[kind], foreign.write(tiny_models[kind], tmp_path / "a.safetensors", **how))[client]
    [finding] = verdict.findings
    assert len(finding.names) == len(ends) == verdict.layers - verdict.loaded
    assert all(name.endswith(end) for name, end in zip(sorted(finding.names), ends, strict=True))


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_of_several_alphas_diffusers_takes_as_many_wrongly_as_is_said(
    kind: str, tiny_models: dict[str, Path], bases: dict[str, Family], tmp_path: Path
) -> None:
    file = foreign.write(tiny_models[kind], tmp_path / "a.safetensors", layers="locon", alphas="each")
    [finding] = judged(bases[kind], file)["diffusers"].findings
    assert f"another change of {len(finding.names)} of its" in str(refusal(bases[kind], file))


def test_a_base_that_is_not_told_is_hidden_by_a1111(
    tiny_models: dict[str, Path], bases: dict[str, Family], tmp_path: Path
) -> None:
    for header, hidden in (({}, False), ({"format": "pt"}, True), ({"ss_base_model_version": "sdxl_"}, False)):
        file = foreign.write(tiny_models["sdxl"], tmp_path / "a.safetensors", header=header)
        assert [one.effect for one in judged(bases["sdxl"], file)["A1111"].findings] == ["hides"] * hidden


def judged(family: Family, file: Path) -> dict[str, clients.Verdict]:
    content = named.Content(named.modules(File(file)), type(family), File(file).metadata)
    return {verdict.client: verdict for verdict in clients.judge(content)}


def letter(verdict: clients.Verdict) -> str:
    effects = {finding.effect for finding in verdict.findings}
    return "P" if not effects else "x" if "refuses" in effects else "i" if "ignores" in effects else "w"


def refusal(family: Family, file: Path) -> Fault | None:
    """None where diffusers loads all of it, as its tensors say."""
    try:
        attach(family, file, "tried")
    except Fault as fault:
        return fault
    inside = in_weights.holds(family, "tried")
    detach(family, "tried")
    if inside:  # it was not asked: ask it
        with pytest.raises(ValueError) as error:
            family.pipeline.load_lora_weights(file.parent, weight_name=file.name)
        return Fault(str(error.value))
    return None
