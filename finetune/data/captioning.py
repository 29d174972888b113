"""Captions written by a vision-language model, as `.txt` files beside the pictures. Never over one that is there.

Each file is written as soon as its caption is made, beside its name first and then renamed: what was done before an
interruption stays done, and the next run goes on from there.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import signals, weights
from finetune.data.reading import captions, folder, metadata, pictures
from finetune.data.reading.pictures import BadPicture, printable
from finetune.errors import Failure, Fault

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

Track = Callable[[Sequence[Any], str], Iterable[Any]]
"""Goes through pictures and shows how far it is"""


@dataclass(frozen=True)
class Job:
    """One picture to caption, and the file that its caption goes to."""

    picture: Path
    file: Path


@dataclass(frozen=True)
class Plan:
    """What is to be done in a folder."""

    jobs: tuple[Job, ...]
    kept: tuple[Path, ...]
    """Caption files that are there and stay as they are"""


def plan(path: Path, skip: Sequence[str] = (), overwrite: bool = False, background: str = "white") -> Plan:
    """Which pictures need a caption, and under which names. Every one of them is decoded whole.

    Raises one Fault that lists all that is wrong, before a model is loaded and anything is written.
    """
    pictures.colour(background)
    listing = folder.look(path)
    chosen = [picture for picture in listing.pictures if picture.name not in skip]
    if not chosen:
        raise Fault(folder.none_found(listing))
    if tables := [file.name for file in listing.others if file.name in metadata.TABLES]:
        raise Fault(
            f"{printable(path)}: it has a {tables[0]}, and captions in files of their own would contradict it. Write "
            "them there, or move the pictures that have none to a folder of their own."
        )
    files = folder.caption_files(listing.pictures, listing.captions)
    shared = Counter(files.values())
    faults = [folder.unknown_skip(name, listing.names).text for name in skip if name not in listing.names]
    faults += [f"{printable(file.name)}: whose caption is it? {count} pictures could mean it" for file, count in
               shared.items() if count > 1]  # fmt: skip
    stems = Counter(picture.stem.casefold() for picture in listing.pictures)
    jobs = []
    for picture in chosen:
        own = picture.name if stems[picture.stem.casefold()] > 1 else picture.stem
        job = Job(picture, files.get(picture, picture.with_name(own + folder.CAPTION)))
        if overwrite or picture not in files:
            jobs.append(job)
            faults += _faults(job, background)
    if faults:
        advice = "Put them right, or leave pictures out by name: --skip NAME ..."
        raise Fault(f"{printable(path)}: {len(faults)} problem(s); nothing was written. {advice}", faults)
    kept = () if overwrite else tuple(dict.fromkeys(files[picture] for picture in chosen if picture in files))
    return Plan(tuple(jobs), kept)


def require_writable(path: Path) -> None:
    """Raises Fault when no file can be made in a folder, before a model is loaded for nothing."""
    if not os.access(path, os.W_OK | os.X_OK):
        raise Fault(f"{printable(path)}: files cannot be written there. Give yourself the right, or copy the pictures.")


def write(
    todo: Plan,
    captioner: Captioner,
    trigger: str | None = None,
    template: str | None = None,
    background: str = "white",
    track: Track = lambda items, _: items,
    overwrite: bool = False,
) -> int:
    """Caption each picture and write it down; the number that was written.

    Raises Failure for a caption that comes out empty, or a file that appeared meanwhile; those before it stay.
    """
    if fault := captions.check(trigger, template):
        raise Fault(fault)
    for job in track(todo.jobs, "caption"):
        signals.heed()
        picture, _ = pictures.decode(job.picture, background)
        said = captioner.caption(picture)
        if not said:
            raise Failure(f"{printable(job.picture.name)}: the model had nothing to say. Try another --instruction.")
        _write(job.file, captions.made(said, None, trigger, template) + "\n", overwrite)
    return len(todo.jobs)


class Captioner:
    """An image-to-text model of transformers with its processor: from a folder, or from the hub.

    Only safetensors are read, each checked first, and no code of the model's repository is run.
    """

    def __init__(self, model: Any, processor: Any, instruction: str, longest: int) -> None:
        """`instruction` is for models that are told what to do; those that only describe do not read it."""
        self.model, self.processor = model.eval(), processor
        self.instruction, self.longest = instruction, longest

    @classmethod
    def load(
        cls,
        name: str,
        revision: str | None,
        instruction: str,
        longest: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Captioner:
        """Raises Fault when there is no such model, or it is none that writes about pictures."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from finetune.quiet import quiet

        place = Path(name)
        if place.is_dir():
            _check_folder(place)
        options = {"revision": revision, "trust_remote_code": False, "local_files_only": place.is_dir()}
        try:
            with quiet():
                processor = AutoProcessor.from_pretrained(name, **options)
                model = AutoModelForImageTextToText.from_pretrained(name, use_safetensors=True, dtype=dtype, **options)
        except Fault:
            raise
        except Exception as error:  # foreign configurations raise anything
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise Fault(
                f"--captioner {name}: cannot be loaded ({reason}). Give a folder or a hub name of a model that "
                "transformers knows as image-text-to-text, with safetensors weights."
            ) from error
        if not hasattr(processor, "image_processor"):
            raise Fault(f"--captioner {name}: does not look at pictures. Give an image-text-to-text model.")
        weights.check_finite({"captioner": model})
        return cls(model.to(device), processor, instruction, longest)

    def caption(self, picture: Image) -> str:
        """What the model says of a picture, on one line. Always the same for the same picture: nothing is drawn."""
        import torch

        inputs = self._inputs(picture).to(self.model.device)
        for name, value in inputs.items():
            if torch.is_floating_point(value):
                inputs[name] = value.to(self.model.dtype)
        with torch.no_grad():
            tokens = self.model.generate(**inputs, max_new_tokens=self.longest, do_sample=False)[0]
        given = inputs["input_ids"][0] if "input_ids" in inputs else tokens[:0]
        if len(given) and torch.equal(tokens[: len(given)], given):
            tokens = tokens[len(given) :]  # decoders repeat what they were told
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        return " ".join(str(tokenizer.decode(tokens, skip_special_tokens=True)).split()).rstrip(" .")

    def _inputs(self, picture: Image) -> Any:
        """Pixels, and for models that are told what to do the instruction in their own form of a conversation."""
        if not getattr(self.processor, "chat_template", None):
            return self.processor(images=picture, return_tensors="pt")
        content = [{"type": "image", "image": picture}, {"type": "text", "text": self.instruction}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )


def _faults(job: Job, background: str) -> list[str]:
    try:
        pictures.decode(job.picture, background)
    except BadPicture as error:
        return [f"{printable(job.picture.name)}: {error.reason}"]
    return []


def _check_folder(place: Path) -> None:
    """Every weight file whole, and none of them a pickle (rows 38 and 40)."""
    files = sorted(place.glob(f"*{weights.SUFFIX}"))
    for file in files:
        weights.check_file(file)
    if not files:
        pickles = [file.name for file in sorted(place.iterdir()) if file.suffix in weights.PICKLES]
        why = ", only pickles, which can run code when they are loaded: save it with safetensors first"
        raise Fault(f"--captioner {place}: holds no {weights.SUFFIX} weights{why if pickles else ''}.", pickles)


def _write(file: Path, text: str, overwrite: bool) -> None:
    """Whole or not at all, and not over a file that is there unless that was asked for."""
    beside = file.with_name(f".{file.name}.{os.getpid()}.writing")
    try:
        with beside.open("x", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        if not overwrite:
            file.open("x").close()  # fails where a file has appeared since
        os.replace(beside, file)
    except FileExistsError:
        raise Failure(f"{printable(file.name)}: was made by something else meanwhile; it was left as it is.") from None
    except OSError as error:
        raise Failure(f"{printable(file)}: cannot be written: {os.strerror(error.errno or 0)}.") from error
    finally:
        beside.unlink(missing_ok=True)
