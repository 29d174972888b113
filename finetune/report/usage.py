"""What each file of a run is for, and the lines that use what was trained."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from finetune.config import new_words
from finetune.evaluation.tables import RESULT
from finetune.glance import EMBEDDED
from finetune.report.facts import Facts

ADAPTER, MODEL, BEST = "adapter.safetensors", "model/", "best/"
WHAT = {
    ADAPTER: "the adapter as it was after the last step, for diffusers and PEFT",
    MODEL: "the whole model as it was after the last step, a diffusers folder",
    BEST: "what was chosen as the best, in the same form",
    "settings.toml": "every setting: `finetune train --config settings.toml --output again` runs it again",
    "run.json": "how far it is",
    "log.jsonl": "loss, rate, gradient norm and seconds of each step",
    "pictures.json": "what it trains on, with the crops",
    "report.html": "this page",
    "checkpoints/": "whole states of the training: what --resume goes on from, and what can be exported",
    "evaluation/": "pictures and tables of `finetune evaluate`",
    "measured/": "pictures and tables that were made while it trained",
    "samples/": "pictures drawn on the way; each holds its prompt, seed and settings",
    "logs/": "the curves for TensorBoard: `tensorboard --logdir logs`",
    "publish/": "what `finetune publish` sends",
}


@dataclass(frozen=True)
class Use:
    """One way to use what was trained."""

    title: str
    text: str
    lines: str = ""
    """A command or a piece of Python"""


def what(name: str) -> str:
    """What a file of a run's folder is for; empty for a stranger."""
    if match := re.fullmatch(r"(adapter|model)-0*(\d+)(\.safetensors|/)", name):
        return f"the {match[1]} as it was after step {match[2]}"
    return WHAT.get(name, "")


def words(facts: Facts) -> list[str]:
    """The new words that it taught, where their files are there."""
    there = {one.name for one in facts.files}
    return [word for word in new_words(facts.settings) if f"{word}.safetensors" in there]


def prompt(facts: Facts) -> str:
    """One that shows what was learned."""
    if facts.table is not None and (told := facts.table.facts.get("prompts")):
        return str(told[0][0])
    said = facts.setting("samples", "sample_prompts") or [facts.setting("data", "prompt")]
    return str(said[0] or f"a photo of {facts.setting('data', 'trigger') or '...'}")


def chosen(facts: Facts) -> tuple[str | None, str | None]:
    """What to take: the file or folder, and the step to export it from where it is a checkpoint only."""
    there = {one.name for one in facts.files}
    written = ADAPTER, MODEL, *(f"{word}.safetensors" for word in words(facts))
    result = next((name for name in written if name in there), None)
    best = facts.verdict.best if facts.verdict else RESULT
    if BEST in there:
        inside = next((name for name in written if (facts.folder / BEST / name).exists()), None)
        return (f"{BEST}{inside}" if inside else result), None
    if best == RESULT or not (match := re.fullmatch(r"step-(\d+)", best)):
        return result, None
    saved = next((name for name in (f"adapter-{match[1]}.safetensors", f"model-{match[1]}/") if name in there), None)
    return saved, str(int(match[1]))


def uses(facts: Facts) -> Iterator[Use]:
    """The ways there are, the next thing to do first."""
    run = str(facts.folder)
    if facts.state in ("stopped", "interrupted", "failed"):
        yield Use(
            "Go on", "The training goes on from its newest checkpoint.", shell("train", "--output", run, "--resume")
        )
    file, step = chosen(facts)
    if facts.table is None and (file or any(one.name == "checkpoints/" for one in facts.files)):
        text = "Likeness, prompt fidelity, copies, and which checkpoint is the best. Then make this page again."
        yield Use("Measure it", text, "\n".join([shell("evaluate", run), shell("report", run)]))
    if file is None and step is None:
        return
    said, model = prompt(facts), str(facts.setting("model", "model") or EMBEDDED)
    whole, new = file is not None and file.endswith("/"), words(facts)
    alone = file is not None and file.removeprefix(BEST).removesuffix(".safetensors") in new
    if file is not None:
        given = ["--model", f"{run}/{file.rstrip('/')}"] if whole else ["--model", model]
        given += [] if whole or alone else ["--adapter", f"{run}/{file}"]
        beside = f"{run}/{file.rpartition('/')[0]}".rstrip("/")
        given += ["--embedding", *(f"{beside}/{word}.safetensors" for word in new)] if new else []
        yield Use("Draw", "", shell("generate", *given, "--prompt", said, "--output", "pictures"))
    if new:
        yield from _embeddings(new, model)
    if not (alone or (new and file is None)):
        yield from _elsewhere(facts, model, said, file, step, whole)
    yield Use("Publish", "Makes a folder with card and pictures, and sends nothing yet.",
              shell("publish", run, "--repo", "USER/NAME"))  # fmt: skip


def _embeddings(new: list[str], model: str) -> Iterator[Use]:
    if model == EMBEDDED:
        return
    files = ", ".join(f"{word}.safetensors" for word in new)
    yield Use(
        "The new words in other programs",
        f"Put {files} into embeddings (AUTOMATIC1111, Forge) or models/embeddings (ComfyUI) under that name: prompts "
        f"call it {new[0]}, in ComfyUI embedding:{new[0]}. diffusers has load_textual_inversion.",
    )


def _elsewhere(facts: Facts, model: str, said: str, file: str | None, step: str | None, whole: bool) -> Iterator[Use]:
    if model == EMBEDDED:
        yield Use("In other programs", "Runs on toybox, the small model inside finetune, are for finetune alone.")
        return
    if file is not None:
        yield Use("diffusers", "", _python(facts, model, said, file.rstrip("/"), whole))
    form = "single-file" if whole else "kohya"
    place = ("Stable-diffusion", "checkpoints") if whole else ("Lora", "loras")
    text = (
        f"Writes the file that they read. Put it into models/{place[0]} (AUTOMATIC1111, Forge) or "
        f"models/{place[1]} (ComfyUI)."
    )
    if not whole:
        text += f" In A1111 and Forge the prompt calls it by its name: {said} <lora:NAME:1>. In ComfyUI: Load LoRA."
    which = ["--step", step] if step else []
    yield Use("AUTOMATIC1111, Forge, ComfyUI, InvokeAI", text,
              shell("export", str(facts.folder), *which, "--format", form, "--output", "files"))  # fmt: skip


def _python(facts: Facts, model: str, said: str, file: str, whole: bool) -> str:
    base = f"{facts.folder}/{file}" if whole else model
    load = "from_single_file" if base.endswith(".safetensors") else "from_pretrained"
    revision = facts.setting("model", "revision")
    pinned = f", revision={_quoted(revision)}" if revision and not whole else ""
    folder, _, name = f"{facts.folder}/{file}".rpartition("/")
    adapter = [] if whole else [f"pipeline.load_lora_weights({_quoted(folder)}, weight_name={_quoted(name)})"]
    return "\n".join([
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        f"pipeline = DiffusionPipeline.{load}({_quoted(base)}{pinned}, torch_dtype=torch.float16).to(\"cuda\")",
        *adapter,
        f"pipeline({_quoted(said)}).images[0].save(\"picture.png\")",
    ])  # fmt: skip


def shell(*words: str) -> str:
    """The line that is typed."""
    return shlex.join(["finetune", *words])


def _quoted(said: str) -> str:
    return json.dumps(str(said), ensure_ascii=False)
