"""A run's folder made by hand, as a training and `finetune evaluate` leave it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune import ledger
from finetune.pictures import save_png

PROMPTS = ("a photo of sks dog on a sofa", "a red sks dog")
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "\u202egnp.exe \u200f\u05d0\u05d1",
    "'; </style></script><b>& \U0001f436 {{ 7 * 7 }}",
)
"""What a caption, a prompt, a name or a setting may hold"""
MEASURES = {
    "likeness": ("DINO", (0.1, 0.5, 0.7, 0.72)),
    "fidelity": ("CLIP-T", (0.3, 0.31, 0.3, 0.2)),
    "class drift": ("PRES", (0.1, 0.1, 0.2, 0.6)),
    "diversity": ("DIV", (0.6, 0.5, 0.4, 0.1)),
    "drift": ("drift", (None, 0.01, 0.02, 0.2)),
    "copies": ("copies", (0.0, 0.0, 0.0, 0.75)),
}
"""Of the base and three states"""
STATES = (("base", 0), ("step-000100", 100), ("step-000200", 200), ("result", 300))


def picture(path: Path, colour: int, size: tuple[int, int] = (64, 64)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(colour).integers(0, 60, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise + np.array([colour % 190, 90, 190 - colour % 190], dtype=np.uint8)).save(path)
    return path


def drawn(path: Path, colour: int, prompt: str, size: tuple[int, int] = (64, 64)) -> None:
    picture(path, colour, size)
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    save_png(image, path, {"prompt": prompt, "seed": 0})


def table(concepts: Sequence[str] = ("sks dog",), **more: Any) -> dict[str, Any]:
    """As `tables.to_json` writes it."""
    states = [
        {
            "name": name, "step": step, "validation": None,
            "figures": {
                measure: {
                    "measure": measure, "title": title, "value": values[number], "low": values[number] - 0.05,
                    "high": values[number] + 0.05, "units": 2, "judge": "DINO ViT-S/16", "scale": "cosine",
                    "values": [values[number]] * 2,
                }
                for measure, (title, values) in MEASURES.items() if values[number] is not None
            },
            "copies": [] if name == "base" else [
                {"file": f"{name}/subject-01-seed0.png", "picture": "1.png", "similarity": 0.97, "alarm": step == 300},
                {"file": f"{name}/subject-02-seed0.png", "picture": "0.png", "similarity": 0.61, "alarm": False},
            ],
        }
        for number, (name, step) in enumerate(STATES)
    ]  # fmt: skip
    return {
        "run": "run", "protocol": "short", "states": states, "concepts": list(concepts),
        "facts": {"prompts": [list(PROMPTS)], "class prompts": ["a photo of a dog"], "unrelated prompts": ["a car"]},
        "bleed": [] if len(concepts) < 2 else [[0.7, 0.2], [0.1, None]],
        "verdict": {
            "word": "over-trained", "state": "result", "best": "step-000200",
            "reason": "fidelity to the prompts is 0.200 (0.150 to 0.250), all of it below the floor 0.270",
            "best_reason": "the earliest within 0.01 of the highest likeness",
            "advice": "Take step-000200. Train for fewer steps.",
        },
        **more,
    }  # fmt: skip


def settings(run: Path, **tables: dict[str, Any]) -> None:
    told = {"data": {"data": "photos", "prompt": "a photo of sks dog"}, "train": {"steps": 300}} | tables
    lines = ['recipe = "lora"']
    for name, group in told.items():
        lines += ["", f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in group.items())]
    (run / "settings.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def log(run: Path, steps: int, tail: str = "") -> None:
    lines = [
        json.dumps({
            "step": step, "loss": 0.3 + 0.2 / step, "grad_norm": 1.0, "lr": 1e-4, "seconds": 0.5, "time": 1.0,
            **({"validation": 0.3 - step / 2000} if step % 100 == 0 else {}),
        })
        for step in range(1, steps + 1)
    ]  # fmt: skip
    (run / "log.jsonl").write_text("".join(f"{line}\n" for line in lines) + tail, encoding="utf-8")


def state(run: Path, state: str = "finished", step: int = 300) -> None:
    ledger.write(run, ledger.Entry("lora", 300), state=state, step=step)


def begun(run: Path) -> Path:
    """A run that has taken no step."""
    run.mkdir(parents=True)
    settings(run)
    state(run, "running", 0)
    return run


def whole(run: Path, captions: Sequence[str] = ("a photo of sks dog", "sks dog, asleep"), side: int = 64) -> Path:
    """A finished one with all there is."""
    begun(run)
    state(run)
    log(run, 300)
    (run / "adapter.safetensors").write_bytes(bytes(1000))
    (run / "adapter-000200.safetensors").write_bytes(bytes(1000))
    photos = [run.parent / "photos" / f"{number}.png" for number in range(len(captions))]
    pictures = [
        {
            "name": f"{number}.png", "path": str(picture(photos[number], 40 * number, (side, side))),
            "captions": [caption], "concept": 0, "held": number == 1,
            "crops": [[0.0, 0.1, 1.0, 0.9] if number else [0.0, 0.0, 1.0, 1.0]], "sizes": ["64 x 64"],
        }
        for number, caption in enumerate(captions)
    ]  # fmt: skip
    (run / "pictures.json").write_text(json.dumps({"count": len(captions), "held": 1, "pictures": pictures}))
    for number, (name, _) in enumerate(STATES):
        for row, prompt in enumerate(PROMPTS, 1):
            drawn(run / f"evaluation/{name}/subject-{row:02d}-seed0.png", 30 * number + row, prompt, (side, side))
        drawn(run / f"evaluation/{name}/class-01-seed0.png", 50 * number, "a photo of a dog", (side, side))
        drawn(run / f"evaluation/{name}/unrelated-01-seed0.png", 10 * number, "a car", (side, side))
    (run / "evaluation/table.json").write_text(json.dumps(table()))
    for step in (100, 200):
        drawn(run / f"samples/step-{step:06d}-0.png", step, "a photo of sks dog")
    return run
