"""README.md of what is published: front matter that the hub reads, and a page for people.

Whatever comes from captions, prompts and settings is escaped: as YAML, as Markdown text, or in fences.
"""

from __future__ import annotations

import html
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence

from finetune.evaluation import tables
from finetune.publishing.release import Release

TAGS = ("text-to-image", "diffusers")
EMBEDDING_READERS = ("diffusers", "A1111", "Forge", "ComfyUI", "finetune")
"""Of the file of a new word"""
WEBUI = {"A1111": "AUTOMATIC1111", "Forge": "Forge"}


def card(release: Release) -> str:
    parts = [_front(release), f"# {text(release.title)}", *_page(release)]
    return "\n\n".join(part for part in parts if part) + "\n"


def text(said: str) -> str:
    """One line of plain text in Markdown and HTML."""
    line = re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", " ".join(said.split()))
    line = re.sub(r"^(\d*)([-+.)](?=\s|$)|[-=]+$)", r"\1\\\2", line)  # no list, no heading
    return html.escape(line, quote=False)


def fence(lines: Sequence[str], language: str) -> str:
    """Lines as they are, between more backticks than they hold themselves."""
    ticks = max((len(run) for line in lines for run in re.findall(r"`+", line)), default=0)
    mark = "`" * max(3, ticks + 1)
    return "\n".join([f"{mark}{language}", *lines, mark])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are Markdown already."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _front(release: Release) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=release.base,
        base_model_relation=("adapter" if release.adapts else "finetune") if release.base else None,
        library_name="diffusers" if not (release.adapts and release.files) or release.read_by("diffusers") else None,
        pipeline_tag="text-to-image",
        instance_prompt=_line(release.words[0]) if release.words else None,
        tags=[*TAGS, *_kinds(release), release.tag, *map(_line, release.tags)],
        widget=[{"text": _line(one.prompt), "output": {"url": one.file}} for one in release.drawn] or None,
        license=release.license.get("license"),
        license_name=release.license.get("license_name"),
        license_link=release.license.get("license_link"),
    )
    return f"---\n{data.to_yaml()}\n---"


def _page(release: Release) -> Iterator[str]:
    made = "An adapter" if release.files else "Embeddings" if len(release.taught) > 1 else "An embedding"
    kind = f"{made} ({release.kind}) for" if release.adapts else "A fine-tuned"
    maker = f", by {text(release.author)}" if release.author else ""
    yield f"{kind} {text(release.family)}, trained from {_base(release)}{maker}."
    if release.description:
        yield text(release.description)
    yield from _words(release)
    yield from _pictures(release)
    yield "## Use it"
    yield from (_with_adapter(release) if release.adapts else _with_model(release))
    yield "## Files"
    readers = {**release.files, **dict.fromkeys(release.embeddings, EMBEDDING_READERS)}
    yield table(("file", "for"), [(text(name), ", ".join(use)) for name, use in readers.items()])
    if release.strangers:
        yield "Other programs do not read these files rightly:"
        yield table(("program", "why"), [(name, text(reason)) for name, reason in release.strangers.items()])
    yield "`sha256sum -c checksums.txt` tells whether they arrived whole."
    yield from _measured(release)
    yield from _training(release)
    yield "## Licence"
    yield _licence(release)


def _kinds(release: Release) -> list[str]:
    """As the hub's tags have them"""
    return [kind.replace(" ", "_") for kind in (release.kind or "dreambooth").lower().split(" and ")]


def _base(release: Release) -> str:
    if release.embedded:
        return "toybox, the small model inside finetune"
    if release.base is None:
        return "a base that is not on the hub"
    pinned = f" at revision {text(release.revision)}" if release.revision else ""
    return f"[{text(release.base)}](https://huggingface.co/{release.base}){pinned}"


def _words(release: Release) -> Iterator[str]:
    yield "## Trigger words"
    if release.words:
        yield fence([_line(word) for word in release.words], "text")
    elif release.usage:
        yield f"None: {text(release.usage)}."
    else:
        yield "None: it was trained with captions that say what is to be seen."


def _pictures(release: Release) -> Iterator[str]:
    yield "## Pictures"
    how = ", ".join(f"{name} {text(value)}" for name, value in release.drawing.items())
    under = ", under a mask of everything" if release.inpaints else ""
    yield f"Drawn with {how}{under}; each file holds its settings."
    rows = [(f"![{text(one.prompt)}]({one.file})", text(one.prompt), str(one.seed)) for one in release.drawn]
    yield table(("picture", "prompt", "seed"), rows)
    if release.strength:
        least = "the new words" if release.taught else "the base"
        yield f"One prompt and seed at several strengths; 0 is {least} alone:\n\n![strengths]({release.strength})"


def _with_adapter(release: Release) -> Iterator[str]:
    """By each program that reads one of the files."""
    prompt = _line(release.drawn[0].prompt)
    if release.embedded:
        yield "**finetune**"
        given = ["--adapter", next(iter(release.files))] if release.files else []
        given += ["--embedding", *release.embeddings] if release.taught else []
        yield fence([shlex.join(["finetune", "generate", "--model", "toybox", *given, "--prompt", prompt])], "sh")
        return
    if release.base and (release.read_by("diffusers") or not release.files):
        yield "**diffusers**"
        adapter = [f'pipeline.load_lora_weights("{release.repo}")'] if release.files else []
        yield fence([*_loaded(release, release.base), *_taught(release), *adapter, *_drawn(release)], "python")
        yield from _scheduler(release)
    if release.base and (file := release.read_by("PEFT")):
        yield "**PEFT**, for diffusers' pipeline"
        lines = [*_loaded(release, release.base), *_taught(release), *_injected(release.repo, file), *_drawn(release)]
        yield fence(lines, "python")
        yield from _scheduler(release)
    if release.skipped:
        yield f"It was trained with clip skip {release.clip_skip}: set that in your program too."
    if release.taught:
        put, said = f"put {text(', '.join(release.embeddings))} into", text(", ".join(release.taught))
        there = text(", ".join(f"embedding:{word}" for word in release.taught))
        yield f"**AUTOMATIC1111, Forge**: {put} `embeddings`. Prompts call it by its file's name, {said}: keep that."
        yield f"**ComfyUI**: {put} `models/embeddings`, and write {there} for {said}."
    if file := release.read_by("ComfyUI"):
        yield f"**ComfyUI**: put {text(file)} into `models/loras`; the node *Load LoRA* loads it."
    webui = [name for name in WEBUI if name in release.files.get(release.main, ())]
    if webui:
        yield (
            f"**{', '.join(WEBUI[name] for name in webui)}**: put {text(release.main)} into `models/Lora`, with its "
            ".json and .preview.png beside it, and write"
        )
        yield fence([f"{prompt} <lora:{release.name}:1>"], "text")


def _taught(release: Release) -> list[str]:
    """The new words put in: a file of one tensor as it is, of several each to its text encoder."""
    if [*release.encoders] == [""]:
        return [
            f'pipeline.load_textual_inversion("{release.repo}", weight_name="{file}")' for file in release.embeddings
        ]
    lines = ["", "from huggingface_hub import hf_hub_download", "from safetensors.torch import load_file", ""]
    for word, file in zip(release.taught, release.embeddings, strict=True):
        lines.append(f'words = load_file(hf_hub_download("{release.repo}", "{file}"))')
        for tensor, part in release.encoders.items():
            tokenizer = part.replace("text_encoder", "tokenizer")
            lines += ["pipeline.load_textual_inversion(", f'    words["{tensor}"], token="{word}",',
                      f"    text_encoder=pipeline.{part}, tokenizer=pipeline.{tokenizer},", ")"]  # fmt: skip
    return lines if release.taught else []


def _injected(repo: str, file: str) -> list[str]:
    """PEFT's own way, a part of the pipeline at a time."""
    return [
        "",
        "import json",
        "",
        "from huggingface_hub import hf_hub_download",
        "from peft import get_peft_config, inject_adapter_in_model, set_peft_model_state_dict",
        "from safetensors import safe_open",
        "",
        f'with safe_open(hf_hub_download("{repo}", "{file}"), "pt") as adapter:',
        '    for part, told in json.loads(adapter.metadata()["peft_config"]).items():',
        "        model = getattr(pipeline, part)",
        '        model = getattr(model, "text_model", model)',
        '        own = {name.removeprefix(f"{part}.").removeprefix("text_model."): adapter.get_tensor(name)',
        '               for name in adapter.keys() if name.startswith(f"{part}.")}',
        "        inject_adapter_in_model(get_peft_config(told), model)",
        "        set_peft_model_state_dict(model, own)",
    ]


def _with_model(release: Release) -> Iterator[str]:
    yield "**diffusers**"
    yield fence([*_loaded(release, release.repo), *_drawn(release)], "python")


def _loaded(release: Release, model: str) -> list[str]:
    pinned = f", revision={_python(release.revision)}" if release.adapts and release.revision else ""
    return [
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        f"pipeline = DiffusionPipeline.from_pretrained({_python(model)}{pinned}, torch_dtype=torch.float16)",
        'pipeline.to("cuda")',
    ]


def _drawn(release: Release) -> list[str]:
    prompt = _python(_line(release.drawn[0].prompt))
    skipped = f", clip_skip={release.skipped}" if release.skipped else ""
    if not release.inpaints:
        return [f"picture = pipeline({prompt}{skipped}).images[0]"]
    return [
        "from diffusers.utils import load_image",
        "",
        'image, mask = load_image("picture.png"), load_image("mask.png")  # white is drawn anew',
        f"picture = pipeline({prompt}, image=image, mask_image=mask, strength=1.0{skipped}).images[0]",
    ]


def _scheduler(release: Release) -> Iterator[str]:
    if release.from_noise:
        yield "It was trained down to pure noise (zero terminal SNR), so draw with a scheduler that begins there:"
        yield fence(["from diffusers import DDIMScheduler", "",
                     "pipeline.scheduler = DDIMScheduler.from_config(",
                     '    pipeline.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"',
                     ")"], "python")  # fmt: skip


def _measured(release: Release) -> Iterator[str]:
    if release.measured is None:
        return
    base, result = release.measured
    rows = [
        (text(one.title), tables.said(base, name), tables.said(result, name), text(one.judge), text(one.scale))
        for name, one in result.figures.items()
    ]
    yield "## How good it is"
    yield table(("measure", "base", "this", "metric model", "what it is"), rows)
    yield "In parentheses the interval in which 95 of 100 resamplings of the prompts lie; all pictures of fixed seeds."


def _training(release: Release) -> Iterator[str]:
    yield "## Training"
    yield table(("setting", "value"), [(text(name), text(value)) for name, value in release.training.items()])
    if release.held_out:
        yield "Loss on pictures that were held out of the training, always at the same noise and timesteps:"
        yield table(("step", "loss"), [(str(step), f"{loss:.4f}") for step, loss in _some(release.held_out)])


def _some(told: Mapping[int, float], most: int = 12) -> list[tuple[int, float]]:
    """The first, the last and some between."""
    rows = sorted(told.items())
    if len(rows) <= most:
        return rows
    return [rows[round(place * (len(rows) - 1) / (most - 1))] for place in range(most)]


def _licence(release: Release) -> str:
    told = release.license
    if not told:
        return "Not stated. The base has a licence of its own."
    name = text(told.get("license_name") or told["license"])
    link = told.get("license_link", "")
    said = f"[{name}]({link})" if re.fullmatch(r"https://[\w./%#?=&+~-]+", link) else name
    return f"{said}. The base has a licence of its own."


def _line(said: str) -> str:
    return " ".join(said.split())


def _python(said: str) -> str:
    return json.dumps(said, ensure_ascii=False)
