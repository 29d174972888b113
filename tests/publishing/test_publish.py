"""`finetune publish`: the folder, its card, what is refused, and the way to the hub."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import hub
import planted
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from huggingface_hub import ModelCard, constants
from markdown_it import MarkdownIt
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from finetune import embeddings, families, weights
from finetune.cli import main
from finetune.evaluation.tables import Figure, State, Table, to_json
from finetune.export import attach, formats
from finetune.export.compare import difference, encoding, other_changes, prediction
from finetune.families import FAMILIES
from finetune.pictures import read_settings
from finetune.publishing import upload

REPO = "mary/sks-house"
TOKEN = "hf_" + "Plantedtoken0123456789ABCDEFGHIJKL"
NASTY = '<img src=x onerror=alert(1)> **bold** [x](javascript:alert(1)) | `code` "quoted": {x}\n---\n# head'
USER, HOST = "plantedmary", "plantedhost7"
PICTURE = "Familienfest-4.png"
FILES, LARGE = 10, 6
"""In the folder; those that go to the large file storage"""
DRAW = ["--steps", "1", "--count", "1", "--size", "64"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    """A finished run on pictures with telling names and EXIF data. Read only."""
    root = tmp_path_factory.mktemp("publish")
    exif = Image.Exif()
    exif[0x010E] = planted.PLACE
    for number in range(4):
        name = PICTURE.replace("4", str(number + 4))
        (root / "Zuhause").mkdir(exist_ok=True)
        planted.save(root / "Zuhause", name, number, None, exif=exif)
    main(["train", "lora", "--model", str(tiny_models["sd"]), "--data", str(root / "Zuhause"), "--no-prior",
          "--prompt", "a photo of sks house", "--steps", "2", "--rank", "4", "--alpha", "2", "--validation", "0.25",
          "--text-encoder-lr", "1e-4", "--checkpoint-every", "1", "--tracker", "none", "--author", "Mary <i>M</i>",
          "--tags", "house", "--output", str(root / "run")])  # fmt: skip
    return root / "run"


def likeness(value: float) -> dict[str, Figure]:
    return {"likeness": Figure("likeness", "DINO", value, value - 0.1, value + 0.1, 4, "DINO <b>S</b>", "mean cosine")}


@pytest.fixture(scope="module")
def made(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with its folder as `publish` made it. Read only."""
    mine = tmp_path_factory.mktemp("made") / "run"
    shutil.copytree(run, mine)
    table = Table("run", "short", [State("base", 0, likeness(0.25)), State("result", 2, likeness(0.75))])
    (mine / "evaluation").mkdir()
    (mine / "evaluation" / "table.json").write_text(to_json(table, verdict=None))
    main(["publish", str(mine), "--repo", REPO, *DRAW, "--prompt", "sks house at sea", NASTY,
          "--base-model", "runwayml/stable-diffusion-v1-5", "--license", "creativeml-openrail-m"])  # fmt: skip
    return mine


@pytest.fixture
def words(made: Path, tmp_path: Path) -> list[str]:
    """The same command over a copy of the run."""
    mine = shutil.copytree(made, tmp_path / "run")
    return ["publish", str(mine), "--repo", REPO, *DRAW, "--prompt", "sks house at sea", NASTY,
            "--base-model", "runwayml/stable-diffusion-v1-5", "--license", "creativeml-openrail-m"]  # fmt: skip


@pytest.fixture
def folder(words: list[str]) -> Path:
    return Path(words[1]) / "publish"


@pytest.fixture
def server() -> Iterator[hub.Hub]:
    with hub.serving() as server:
        yield server


@pytest.fixture
def surroundings(server: hub.Hub, tmp_path: Path) -> dict[str, str]:
    """An environment with a token, a user, a host, a home and a key of a tracker."""
    home = tmp_path / USER
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_HOME")}
    return kept | {
        "HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "HOME": str(home), "USER": USER, "LOGNAME": USER, "HOSTNAME": HOST, "WANDB_API_KEY": "0123456789abcdef" * 2,
    }  # fmt: skip


@pytest.fixture
def send(words: list[str], surroundings: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`publish --yes` in a process of its own, with the real client of the hub."""

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "finetune", *words, "--yes", *more]
        return subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=120)

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(words: list[str], status: int = 2) -> str:
        with pytest.raises(SystemExit) as stop:
            main(words)
        said = capsys.readouterr()
        assert stop.value.code == status, said
        return " ".join((said.out + said.err).split())

    return run


# --- the folder ----------------------------------------------------------------------------------------------------


def test_the_adapter_is_there_in_each_format_and_equals_what_was_trained(made: Path) -> None:
    trained = formats.read(made / "adapter.safetensors")
    for name, form in {"sks-house.safetensors": "kohya", "pytorch_lora_weights.safetensors": "diffusers"}.items():
        file = made / "publish" / name
        assert formats.format_of(file, weights.read_header(file)[0]) == form
        written = formats.read(file)
        assert written.dtypes() == {torch.float16}
        assert not other_changes(trained, written, torch.float16)
        assert weights.read_metadata(file)["modelspec.trigger_phrase"] == "a photo of sks house"


def test_diffusers_finds_its_file_where_only_the_repository_is_named(made: Path) -> None:
    pipeline = tiny.pipeline("sd")
    pipeline.load_lora_weights(str(made / "publish"))
    adapter = formats.read(made / "adapter.safetensors")
    [name] = pipeline.get_active_adapters()
    assert {name: len(adapter.layers)} == {name: sum(name in getattr(layer, "lora_A", ()) for part in
            (pipeline.unet, pipeline.text_encoder) for layer in part.modules())}  # fmt: skip


def test_pictures_are_drawn_from_fixed_seeds_and_hold_their_settings(made: Path, run: Path, tmp_path: Path) -> None:
    folder = made / "publish"
    told = read_settings(folder / "images" / "01-seed0.png")
    assert (told["prompt"], told["seed"], told["steps"], told["model"]) == ("sks house at sea", 0, 1, "local")
    [adapter] = told["adapters"]
    published = (folder / "pytorch_lora_weights.safetensors").read_bytes()
    assert adapter["sha256"] == hashlib.sha256(published).hexdigest()
    assert (folder / "sks-house.preview.png").read_bytes() == (folder / "images" / "01-seed0.png").read_bytes()

    again = shutil.copytree(run, tmp_path / "run")
    main(["publish", str(again), "--repo", REPO, *DRAW, "--prompt", "sks house at sea"])
    for name in ("01-seed0.png", "strength.png"):
        one, other = (Image.open(place / "publish" / "images" / name) for place in (made, again))
        assert one.tobytes() == other.tobytes(), name
    assert Image.open(folder / "images" / "strength.png").width > 6 * 192


def test_sidecars_and_checksums(made: Path) -> None:
    folder = made / "publish"
    content = (folder / "sks-house.safetensors").read_bytes()
    tensors = content[8 + int.from_bytes(content[:8], "little") :]
    site = json.loads((folder / "sks-house.civitai.info").read_text())
    [file] = site["files"]
    assert file["hashes"]["SHA256"] == hashlib.sha256(content).hexdigest().upper()
    assert file["hashes"]["AutoV2"] == file["hashes"]["SHA256"][:10]
    assert file["hashes"]["AutoV3"] == hashlib.sha256(tensors).hexdigest()[:12].upper()
    assert site["trainedWords"] == ["a photo of sks house"]
    assert site["baseModel"] == "Other", "tiny models are none of the base models"
    webui = json.loads((folder / "sks-house.json").read_text())
    assert (webui["activation text"], webui["preferred weight"]) == ("a photo of sks house", 1)

    lines = [line.split("  ", 1) for line in (folder / "checksums.txt").read_text().splitlines()]
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {name for _, name in lines} == there - {"checksums.txt", ".publish.json"}
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest for digest, name in lines)


@pytest.mark.parametrize(
    ("kind", "flags", "readers", "left"),
    [
        ("sd", ["--method", "loha", "--text-encoder-lr", "1e-3"],
         {"sks-house.safetensors": "ComfyUI, A1111, Forge, InvokeAI", "sks-house-peft.safetensors": "PEFT, finetune"},
         ["pytorch_lora_weights.safetensors"]),
        ("sd", ["--method", "dora"], {"pytorch_lora_weights.safetensors": "diffusers"}, ["sks-house.safetensors"]),
        ("klein", [], {"pytorch_lora_weights.safetensors": "diffusers"}, ["sks-house.safetensors"]),
        ("flux", ["--method", "oft"], {"sks-house-peft.safetensors": "PEFT, finetune"},
         ["sks-house.safetensors", "pytorch_lora_weights.safetensors"]),
    ],
    ids=["loha", "dora", "klein", "oft"],
)  # fmt: skip
def test_of_every_method_there_is_what_a_program_reads(
    kind: str, flags: list[str], readers: dict[str, str], left: list[str], run: Path,
    tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The card names for each file the programs that read it rightly, and no others; PEFT's lines in it do."""
    mine = tmp_path / "run"
    main(["train", "lora", "--model", str(tiny_models[kind]), "--data", str(run.parent / "Zuhause"), "--no-prior",
          "--prompt", "a photo of sks house", "--steps", "2", "--rank", "4", "--lr", "1e-1", "--tracker", "none",
          "--resolution", "64", "--output", str(mine), *flags])  # fmt: skip
    capsys.readouterr()
    main(["publish", str(mine), "--repo", REPO, *DRAW, "--base-model", "a/b"])
    told = [line.removeprefix("left out: ") for line in capsys.readouterr().out.splitlines() if "left out:" in line]
    folder, trained = mine / "publish", formats.read(mine / "adapter.safetensors")
    assert [line.partition(":")[0] for line in told] == left
    assert {file.name for file in folder.glob("*.safetensors")} == readers.keys()
    assert (folder / "sks-house.json").exists() == ("sks-house.safetensors" in readers)
    for name in readers:
        assert not other_changes(trained, formats.read(folder / name), torch.float16)
    page = Page(MarkdownIt("commonmark", {"html": True}).enable("table").render((folder / "README.md").read_text()))
    assert all(f"{name}\n{programs}\n" in page.text for name, programs in readers.items())
    spoken = {"AUTOMATIC1111": "A1111", "ComfyUI:": "ComfyUI", "load_lora_weights": "diffusers", "PEFT,": "PEFT"}
    for word, program in spoken.items():
        assert (word in page.text) == any(program in programs for programs in readers.values()), word
    assert f"An adapter ({trained.layers[0].said})" in page.text
    if "PEFT" in "".join(readers.values()):
        pipeline = DiffusionPipeline.from_pretrained(tiny_models[kind])
        monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, file: str(folder / file))
        lines = page.text.partition("import json\n")[2].partition("picture =")[0]
        exec(f"import json\n{lines}", {"pipeline": pipeline})
        theirs, ours = families.wrap(pipeline), families.load(families.Source(str(tiny_models[kind])))
        before = prediction(ours)
        attach(ours, mine / "adapter.safetensors", "ours")
        gap = difference(prediction(ours), prediction(theirs))
        assert gap < 2e-3 and gap < 0.1 * difference(before, prediction(ours))
        if ours.trained_text_encoders and "--text-encoder-lr" in flags:
            assert difference(encoding(ours), encoding(theirs)) < 2e-3


@pytest.mark.parametrize(
    ("recipe", "kind", "flags", "made", "programs"),
    [
        ("textual_inversion", "sdxl", [], "An embedding (textual inversion)", 3),
        ("pivotal", "sd", ["--no-prior", "--rank", "4", "--word-lr", "1e-1", "--text-encoder-lr", "1e-3"],
         "An adapter (LoRA and textual inversion)", 5),
    ],
)  # fmt: skip
def test_new_words_are_published_as_programs_load_them(
    recipe: str, kind: str, flags: list[str], made: str, programs: int, run: Path, tiny_models: dict[str, Path],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str],
) -> None:  # fmt: skip
    """With the adapter, where there is one. Pictures are drawn with them; the card's lines load what was trained."""
    mine, word = tmp_path / "run", "houseness"
    main(["train", recipe, "--model", str(tiny_models[kind]), "--data", str(run.parent / "Zuhause"), "--word", word,
          "--prompt", f"a photo of {word}", "--steps", "2", "--lr", "1e-1", "--tracker", "none", "--resolution", "64",
          "--output", str(mine), *flags])  # fmt: skip
    ask = ["publish", str(mine), "--repo", REPO, *DRAW, "--base-model", "a/b"]
    assert "Its word is" in refused([*ask, "--prompt", "a house"])
    if flags:
        assert f"would be {word}.safetensors" in refused([f"mary/{word}" if part == REPO else part for part in ask])
    main(ask)
    folder, file = mine / "publish", mine / f"{word}.safetensors"
    published = folder / file.name
    assert published.read_bytes() == file.read_bytes()
    adapter = folder / "pytorch_lora_weights.safetensors"
    assert adapter.exists() == (folder / "images" / "strength.png").exists() == bool(flags)
    site = json.loads((folder / f"{word}.civitai.info").read_text())
    assert (site["model"]["type"], site["trainedWords"]) == ("TextualInversion", [word])
    assert site["files"][0]["name"] == published.name
    assert json.loads((folder / f"{word}.json").read_text())["activation text"] == word
    assert f"  {published.name}\n" in (folder / "checksums.txt").read_text()

    drawn = [
        "generate",
        "--model",
        str(tiny_models[kind]),
        "--embedding",
        str(published),
        "--seed",
        "0",
        "--size",
        "64",
    ]
    drawn += ["--adapter", str(adapter)] * bool(flags) + ["--steps", "1", "--guidance", "5", "--output"]
    main([*drawn, str(tmp_path / "drawn"), "--prompt", f"a photo of {word}"])
    [picture] = (tmp_path / "drawn").glob("*.png")
    shown = [Image.open(one).tobytes() for one in (picture, folder / "images" / "01-seed0.png")]
    assert shown[0] == shown[1] == Image.open(folder / f"{word}.preview.png").tobytes()

    card = ModelCard.load(folder / "README.md")
    page = Page(MarkdownIt("commonmark", {"html": True}).enable("table").render(card.text))
    assert made in page.text and page.elements.count("strong") == programs
    assert {"textual_inversion", *(["lora"] if flags else [])} <= set(card.data.tags)
    assert (card.data.instance_prompt, card.data.base_model_relation) == (word, "adapter")
    assert (
        f"models/embeddings, and write embedding:{word} for {word}." in page.text
        and "vectors of a new word\n4" in page.text
    )
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, file: str(folder / file))
    lines = page.text.partition('pipeline.to("cuda")\n')[2].partition("picture =")[0].replace(REPO, str(folder))
    pipeline = DiffusionPipeline.from_pretrained(tiny_models[kind])
    exec(lines, {"pipeline": pipeline})
    ours = families.load(families.Source(str(tiny_models[kind])))
    before = prediction(ours)
    embeddings.put_on(ours, embeddings.read(file))
    if flags:
        attach(ours, mine / "adapter.safetensors", "ours")
    asked, theirs = [f"a photo of {word}"], families.wrap(pipeline)
    with torch.no_grad():
        for name, told in ours.encode_prompts(asked).items():
            assert difference(told, theirs.encode_prompts(asked)[name]) < 2e-3
    assert difference(prediction(ours), prediction(theirs)) < 2e-3
    assert (difference(before, prediction(ours)) > 2e-2) == bool(flags), "the adapter's"

    file.unlink()
    assert f"not there any more: no {file.name}" in refused(ask)


def test_a_whole_model_is_published_as_diffusers_loads_it(
    run: Path, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    main(["train", "dreambooth", "--model", str(tiny_models["sd"]), "--data", str(run.parent / "Zuhause"),
          "--no-prior", "--prompt", "a photo of sks house", "--steps", "1", "--tracker", "none",
          "--output", str(tmp_path / "run")])  # fmt: skip
    main(["publish", str(tmp_path / "run"), "--repo", REPO, *DRAW, "--base-model", "a/b", "--title", "- 1. Haus",
          "--single-file"])  # fmt: skip
    folder = tmp_path / "run" / "publish"
    trained, published = (DiffusionPipeline.from_pretrained(place) for place in (tmp_path / "run" / "model", folder))
    for name, tensor in trained.unet.state_dict().items():
        assert torch.equal(tensor, published.unet.state_dict()[name])
    whole = StableDiffusionPipeline.from_single_file(
        str(folder / f"{REPO.partition('/')[2]}.safetensors"), config=str(folder), local_files_only=True
    )
    for name, tensor in trained.unet.state_dict().items():
        assert torch.allclose(tensor, whole.unet.state_dict()[name].float(), rtol=1e-3, atol=1e-6)
    card = ModelCard.load(folder / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == ("a/b", "finetune")
    assert f'from_pretrained("{REPO}"' in card.text and "lora" not in card.data.tags
    assert "<h1>- 1. Haus</h1>" in MarkdownIt().render(card.text)
    assert not (folder / "images" / "strength.png").exists()


# --- the card ------------------------------------------------------------------------------------------------------


def test_the_front_matter_is_what_the_hub_reads(made: Path, server: hub.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    card = ModelCard.load(made / "publish" / "README.md")
    data = card.data
    assert (data.base_model, data.base_model_relation) == ("runwayml/stable-diffusion-v1-5", "adapter")
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "creativeml-openrail-m", "diffusers", "text-to-image",
    )  # fmt: skip
    assert data.instance_prompt == "a photo of sks house"
    assert {"lora", "stable-diffusion", "house"} <= set(data.tags)
    nasty = " ".join(NASTY.split())
    assert [one["text"] for one in data.widget] == ["sks house at sea", nasty]
    assert all((made / "publish" / one["output"]["url"]).is_file() for one in data.widget)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    card.validate()
    assert server.calls("POST", "validate-yaml")


def test_the_bases_licence_is_asked_of_the_hub_and_never_guessed(
    run: Path, server: hub.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = {"license": "other", "license_name": "its-own", "license_link": "https://example.org/terms"}
    server.repos["a/b"] = hub.Repo(private=False, card={**terms, "language": "en"})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    mine = shutil.copytree(run, tmp_path / "run")
    for base, told in (("a/b", terms), ("a/unknown", {})):
        main(["publish", str(mine), "--repo", REPO, *DRAW, "--base-model", base, "--overwrite"])
        data = ModelCard.load(mine / "publish" / "README.md").data.to_dict()
        assert {name: value for name, value in data.items() if name.startswith("license")} == told


def test_every_edition_has_the_names_that_others_call_it_by() -> None:
    editions = [edition for family in FAMILIES.values() for edition in family.published.editions]
    assert {one.webui for one in editions} == {"SD1", "SD2", "SDXL", "Unknown"}, "all that AUTOMATIC1111 has"
    own = [one for one in editions if one.webui != "Unknown"]
    assert all(one.site.startswith(("SD 1.5", "SD 2.1", "SDXL 1.0")) for one in own)
    assert all(one.tag in ("stable-diffusion", "stable-diffusion-xl") for one in own)
    assert all(one.site and one.tag for one in editions)


class Page(HTMLParser):
    """Elements, pictures, links and the text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.pictures: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.pictures += [value or "" for name, value in attrs if name == "src"]
        self.links += [value or "" for name, value in attrs if name == "href"]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_what_was_said_and_runs_none_of_it(made: Path) -> None:
    card = ModelCard.load(made / "publish" / "README.md")
    page = Page(MarkdownIt("commonmark", {"html": True}).enable("table").render(card.text))
    nasty = " ".join(NASTY.split())
    assert nasty in page.text and "Mary <i>M</i>" in page.text
    assert not {"i", "b", "script"} & set(page.elements)
    assert page.elements.count("strong") == 3, "the programs' names"
    assert page.elements.count("h1") == 1 and page.elements.count("table") == 5
    assert page.pictures == ["images/01-seed0.png", "images/02-seed0.png", "images/strength.png"]
    assert all(link.startswith("https://huggingface.co/") for link in page.links)
    assert f'pipeline.load_lora_weights("{REPO}")' in page.text
    assert "<lora:sks-house:1>" in page.text and "models/loras" in page.text
    for told in ("rank\n4", "alpha\n2", "steps\n2", "pictures\n3", "size\n64x64"):
        assert told in page.text, told
    assert "Loss on pictures that were held out" in page.text
    measured = ("DINO", "0.250 (0.150 to 0.350)", "0.750 (0.650 to 0.850)", "DINO <b>S</b>", "mean cosine")
    assert "\n".join(measured) in page.text


# --- refused -------------------------------------------------------------------------------------------------------


def plant_text(said: str) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        with (folder / "README.md").open("a") as file:
            file.write(f"\nIt is {said}.\n")

    return plant


def plant_png(folder: Path) -> None:
    info = PngInfo()
    info.add_itxt("comment", f"by {USER}", zip=True)
    Image.open(folder / "images" / "01-seed0.png").save(folder / "images" / "01-seed0.png", pnginfo=info)


def plant_exif(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = planted.PLACE
    Image.new("RGB", (8, 8)).save(folder / "images" / "extra.jpg", exif=exif)


def plant_header(folder: Path) -> None:
    file = folder / "sks-house.safetensors"
    tensors = weights.load_tensors(file)
    save_file(tensors, file, {**weights.read_metadata(file), "modelspec.author": f"/srv/{USER}/x"})


def plant_bytes(folder: Path) -> None:
    with (folder / "extra.bin").open("wb") as file:
        file.write(b"\xff\x00" * (1 << 21) + TOKEN.encode())  # across the pieces that are read at once


@pytest.mark.parametrize(
    ("plant", "where", "kind", "secret"),
    [
        (plant_text(f"hf_{'a1B2' * 9}"), "README.md", "an access token (Hugging Face)", "a1B2"),
        (plant_text(TOKEN), "README.md", "the value of HF_TOKEN", TOKEN),
        (plant_text("mypassword-in-the-environment"), "README.md", "the value of SITE_PASSWORD", "mypassword"),
        (plant_text("0123456789abcdef0123456789abcdef01234567"), "README.md", "40 hexadecimal digits", "abcdef"),
        (plant_text("api_key = 'abcdefgh12345678'"), "README.md", "a password or key", "abcdefgh"),
        (plant_text(f"made by {USER.upper()}\\_2"), "README.md", "the user's name", USER),
        (plant_text(f"made on {HOST}.local"), "README.md", "the host's name", HOST),
        (plant_text("at /srv/models/sd15.ckpt"), "README.md", "an absolute path", "/srv"),
        (plant_text("at &#47;srv/models/sd15.ckpt"), "README.md", "an absolute path", "/srv"),
        (plant_text("at ~/models"), "README.md", "a path below a home folder", "~/models"),
        (plant_text(r"at D:\models\sd"), "README.md", "a path of Windows", r"models\sd"),
        (plant_text(f"after {PICTURE}"), "README.md", "a name from the training data", "Familienfest"),
        (plant_text("seen at zuhause"), "README.md", "a name from the training data", "zuhause"),
        (plant_png, "images/01-seed0.png", "the user's name", USER),
        (plant_exif, "images/extra.jpg", "EXIF", planted.PLACE),
        (plant_header, "sks-house.safetensors", "an absolute path", USER),
        (plant_bytes, "extra.bin", "the value of HF_TOKEN", TOKEN),
        (lambda folder: (folder / f"{USER}.txt").write_text("x"), "a file's name", "the user's name", USER),
    ],
)
def test_what_is_private_is_refused_by_file_and_kind(
    words: list[str], folder: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch,
    plant: Callable[[Path], object], where: str, kind: str, secret: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("USER", USER)
    monkeypatch.setenv("HOSTNAME", HOST)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("SITE_PASSWORD", "mypassword-in-the-environment")
    plant(folder)
    said = refused(words)
    assert f"- {where}: {kind}" in said and "Nothing was sent" in said
    assert secret.lower() not in said.replace(str(folder), "").lower()


def test_private_prompts_are_refused_before_a_picture_is_drawn(
    run: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", USER)
    ask = ["publish", str(run), "--repo", REPO]
    for prompt, kind in ((f"by {USER}", "the user's name"), (f"{TOKEN} house", "an access token")):
        said = refused([*ask, "--prompt", prompt])
        assert f"- prompts: {kind}" in said and not (run / "publish").exists()
    assert "the user's name" in refused([*ask, "--title", f"{USER} house"])


def test_a_name_may_be_told_on_purpose(
    words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.setenv("USER", "mary")  # is the repository's owner, too
    plant_text("made by mary after Familienfest-4.png")(folder)
    assert "README.md: a name from the training data" in refused(words)
    main([*words, "--may-tell", "Familienfest-4.png", "Familienfest-4"])
    assert "made by mary after Familienfest-4.png" in (folder / "README.md").read_text()


def test_what_was_measured_since_is_not_passed_over(words: list[str], refused: Callable[..., str]) -> None:
    file = Path(words[1]) / "evaluation" / "table.json"
    file.write_text(file.read_text().replace("0.75", "0.5"))
    assert "made with other settings, or of another state of the run. --overwrite makes it anew" in refused(words)
    file.write_text("{")
    assert "table.json: this table cannot be read" in refused(words)


def test_what_makes_no_sense(run: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "there is no such folder" in refused(["publish", str(tmp_path / "none"), "--repo", REPO])
    assert "no run" in refused(["publish", str(tmp_path), "--repo", REPO])
    assert "the one or the other" in refused(["publish", str(run), "--repo", REPO, "--dry-run", "--yes"])
    assert "looks like user/name" in refused(["publish", str(run), "--repo", "house"])
    half = shutil.copytree(run, tmp_path / "half")
    entry = json.loads((half / "run.json").read_text())
    (half / "run.json").write_text(json.dumps({**entry, "state": "stopped"}))
    assert "not finished (stopped, 2 of 2 steps)" in refused(["publish", str(half), "--repo", REPO])
    hub_run = shutil.copytree(run, tmp_path / "toybox")
    file = hub_run / "adapter.safetensors"
    header = weights.read_metadata(file)
    own = json.dumps({**json.loads(header["finetune"]), "model": "toybox"})
    save_file(weights.load_tensors(file), file, {**header, "finetune": own})
    said = refused(["publish", str(hub_run), "--repo", REPO, "--base-model", "a/b"])
    assert "the run tells its base itself: toybox" in said
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    said = refused(["publish", str(run), "--repo", REPO, "--output", str(tmp_path / "other"), "--overwrite"])
    assert "`publish` did not make what is there" in said and (tmp_path / "other" / "thesis.txt").is_file()


def test_other_settings_need_overwrite(words: list[str], refused: Callable[..., str]) -> None:
    said = refused([*words[:-1], "mit"])
    assert "license: creativeml-openrail-m, now mit" in said and "--overwrite" in said


# --- to the hub ----------------------------------------------------------------------------------------------------


def test_one_commit_with_all_files_and_nothing_private(
    send: Callable[..., subprocess.CompletedProcess[str]], folder: Path, server: hub.Hub,
    surroundings: dict[str, str], run: Path,
) -> None:  # fmt: skip
    plant_text("a good one")(folder)  # whoever looked at the folder may change its card
    done = send()
    assert done.returncode == 0, done.stderr
    repo = server.repos[REPO]
    assert repo.private and len(repo.commits) == 1
    assert repo.files == {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*")
                          if path.is_file() and path.name != ".publish.json"}  # fmt: skip
    assert b"It is a good one." in repo.files["README.md"]
    assert f"{server.url}/{REPO}/commit/" in done.stdout
    assert server.authorised == {f"Bearer {TOKEN}", ""}, "the storage is asked without"

    sent, said = server.sent().lower(), (done.stdout + done.stderr).lower()
    secrets = (TOKEN, USER, HOST, surroundings["HOME"], surroundings["WANDB_API_KEY"], str(run), str(folder),
               "Zuhause", "Familienfest", planted.PLACE)  # fmt: skip
    for secret in secrets:
        assert secret.lower().encode() not in sent, secret
    assert TOKEN.lower() not in said

    again = send()
    assert again.returncode == 0 and "has all of it already" in again.stdout
    assert len(repo.commits) == 1 and len(server.calls("PUT", "/storage/")) == LARGE


def test_dropped_connections_are_tried_again_and_nothing_is_there_twice(
    send: Callable[..., subprocess.CompletedProcess[str]], server: hub.Hub
) -> None:
    server.before = hub.once(lambda method, path: method == "PUT")
    server.after = hub.once(lambda method, path: "/commit/" in path)  # done, but its answer is lost
    done = send("--public")
    assert done.returncode == 0, done.stderr
    assert "the connection was lost" in done.stdout
    repo = server.repos[REPO]
    assert not repo.private and len(repo.commits) == 1 and len(repo.files) == FILES
    assert len(server.calls("PUT", "/storage/")) == LARGE + 1


def test_a_killed_upload_goes_on(
    words: list[str], send: Callable[..., subprocess.CompletedProcess[str]], surroundings: dict[str, str],
    server: hub.Hub,
) -> None:  # fmt: skip
    command = [sys.executable, "-m", "finetune", *words, "--yes"]
    process = subprocess.Popen(command, env=surroundings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def kill(method: str, path: str) -> bool:
        if "/commit/" in path and process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        return False

    server.before = kill
    assert process.wait(120) == -signal.SIGKILL
    assert not server.repos[REPO].commits
    uploaded = server.calls("PUT", "/storage/")
    assert send().returncode == 0
    assert server.calls("PUT", "/storage/") == uploaded, "what had arrived was not sent again"
    assert len(server.repos[REPO].commits) == 1 and len(server.repos[REPO].files) == FILES


def test_a_lost_hub_is_said(
    words: list[str], refused: Callable[..., str], server: hub.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "WAITS", (0, 0))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.before = lambda method, path: True
    said = refused([*words, "--yes"], status=1)
    assert said.count("trying again in 0 s") == 2
    assert "The same command goes on" in said and TOKEN not in said


def test_a_public_repository_is_not_taken_for_a_private_one(
    words: list[str], refused: Callable[..., str], server: hub.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.repos[REPO] = hub.Repo(private=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "everyone can read it" in refused([*words, "--yes"])
    assert not server.repos[REPO].files


def test_without_a_token_nothing_begins(
    words: list[str], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    assert "no access token for the hub" in refused([*words, "--yes"])


def test_offline_is_said(words: list[str], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "HF_HUB_OFFLINE is set" in refused([*words, "--yes"], status=1)
