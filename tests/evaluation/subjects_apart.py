"""Train two subjects of one class in one LoRA on toybox, and measure how far each trigger draws its own.

As a script it prints the table of docs/concepts.md: `python tests/evaluation/subjects_apart.py FOLDER [--steps 300]`.
Stopped, the same command goes on. Both subjects are toys, so that nothing but the trigger tells them apart. References
are pictures in scenes that were not trained on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops, ImageFilter

from finetune import cli, shelf
from finetune.evaluation.tables import Table, from_json
from finetune.toybox.scenes import draw_scene
from finetune.toybox.subjects import subject_specs
from finetune.toybox.world import Spec, render

DATASETS = Path(__file__).resolve().parents[2] / "datasets"
TRIGGERS = {"gizmo": "sks", "pip": "zwx"}
SAME, PRIOR, MASKS = "nothing: one trigger for both", "class prompts", "masks"
WAYS: dict[str, tuple[str, ...]] = {
    SAME: (SAME,),
    "a trigger each": (),
    "triggers and class prompts": (PRIOR,),
    "triggers and masks": (MASKS,),
    "all three": (PRIOR, MASKS),
}
"""What is done to keep them apart"""
SEEDS, STEPS = (0, 1), 300
CLASS = "a photo of a toy"


@dataclass(frozen=True)
class Apart:
    """How a run keeps its subjects apart: means over the two, of cosines as toybox's judge sees them."""

    own: float
    """Likeness of a trigger's pictures to its own subject"""
    other: float
    """To the other one"""
    drift: float
    """Likeness of pictures of the bare class to the subjects; lower is better"""
    fidelity: float


def mask(spec: Spec) -> Image.Image:
    """White where the toy is: where the picture is not its empty scene."""
    empty = draw_scene(spec.scene, spec.style, spec.detail, 64)
    other = ImageChops.difference(render(spec), empty).convert("L").point(lambda level: 255 if level > 8 else 0)
    return other.filter(ImageFilter.MaxFilter(3))


def pictures(root: Path) -> None:
    """The data sets' pictures with a trigger of their own each, and masks."""
    for name, trigger in TRIGGERS.items():
        folder, masks = root / name, root / f"{name}-masks"
        folder.mkdir(parents=True, exist_ok=True)
        masks.mkdir(exist_ok=True)
        shipped, specs = DATASETS / name / "pictures", subject_specs(name)[0]
        for file, spec in zip(sorted(shipped.glob("*.png")), specs, strict=True):
            (folder / file.name).write_bytes(file.read_bytes())
            caption = file.with_suffix(".txt").read_text().replace("sks", trigger)
            (folder / file.name).with_suffix(".txt").write_text(caption)
            mask(spec).save(masks / file.name)


def train(root: Path, way: Sequence[str], seed: int, steps: int) -> Path:
    """Train a run of both subjects as it is not yet there."""
    run = root / f"run-{'-'.join(one.split()[0].strip(':') for one in way) or 'plain'}-{seed}-{steps}"
    tables = []
    for name, trigger in TRIGGERS.items():
        data, word = (DATASETS / name / "pictures", "sks") if SAME in way else (root / name, trigger)
        lines = ["[[concepts]]", f'data = "{data}"', f'trigger = "{word}"', f'class_prompt = "{CLASS}"']
        tables.append("\n".join([*lines, *([f'masks = "{root / name}-masks"'] if MASKS in way else [])]))
    settings = shelf.settings()["lora-toybox-subject"].read_text()
    (root / f"{run.name}.toml").write_text("\n\n".join([settings, *tables]))
    words = ["train", "lora", "--config", root / f"{run.name}.toml", "--output", run, "--seed", seed, "--steps", steps]
    words += ["--measure", "off", "--no-report", "--tracker", "none", "--resume-or-begin"]
    words += [] if PRIOR in way else ["--no-prior"]
    if not (run / "adapter.safetensors").is_file():
        cli.main([*map(str, words)])
    return run


def measured(run: Path) -> Table:
    """What `finetune evaluate` finds of the result."""
    references = [DATASETS / name / "references" for name in TRIGGERS]
    words = ["evaluate", run, "--step", "result", "--references", *references, "--steps", 10, "--batch", 8]
    if not (run / "evaluation" / "table.json").is_file():
        cli.main([*map(str, words)])
    return from_json((run / "evaluation" / "table.json").read_text())


def apart(table: Table) -> Apart:
    (first, across), (back, second) = table.bleed
    [result] = table.trained
    drift, fidelity = result.value("class drift"), result.value("fidelity")
    return Apart((first + second) / 2, (across + back) / 2, drift, fidelity)


def markdown(rows: dict[str, list[Apart]]) -> str:
    lines = ["| kept apart by | like its own | like the other | the bare class like them | as the prompt says |",
             "|---|---|---|---|---|"]  # fmt: skip
    for name, seeds in rows.items():
        columns = zip(*((one.own, one.other, one.drift, one.fidelity) for one in seeds), strict=True)
        lines.append(f"| {name} | " + " | ".join(", ".join(f"{v:.2f}" for v in column) for column in columns) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    given = parser.parse_args()
    root = given.folder.resolve()
    pictures(root)
    rows: dict[str, list[Apart]] = {}
    for seed in given.seeds:
        for name, way in WAYS.items():
            rows.setdefault(name, []).append(apart(measured(train(root, way, seed, given.steps))))
            print(markdown(rows), flush=True)


if __name__ == "__main__":
    main()
