"""`finetune report`: the page of a run, through the command line, on folders made by hand and by a training."""

from __future__ import annotations

import json
import re
import shutil
import threading
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import runs
from PIL import Image

from finetune import cli, disk, ledger
from finetune.report import page
from finetune.report.serving import Server


class Read(HTMLParser):
    """What a browser would make of a page: tags with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def reported(run: Path, *words: str) -> Read:
    cli.main(["report", str(run), *words])
    return Read((run / "report.html").read_text(encoding="utf-8"))


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", *words])
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_a_whole_run_is_told_with_its_verdict_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs.whole(tmp_path / "run")
    read = reported(run)
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    text = read.text
    for said in (
        "Over-trained", "Result: fidelity to the prompts is 0.200 (0.150 to 0.250), all of it below the floor 0.270.",
        "Take step 200.", "Best of those measured: step 200", "300 of 300 steps: finished", "lora on toybox",
        "chosen: step 200", "Fidelity (CLIP-T)", "Measured with DINO ViT-S/16", "0.720 (0.670 to 0.770)", "base 0.1",
        "Loss on held-out pictures", "lowest: step 300", "result: alarm, 1 of the 2 nearest looks like a copy",
        "step 200: no alarm", "0.970 alike", "2 pictures, 1 of them held out", "sks dog, asleep", "the bare class",
        "--adapter", "adapter-000200.safetensors", "steps 300", "pictures drawn on the way",
    ):  # fmt: skip
        assert said in text, said
    assert text.index("Over-trained") < text.index("Figures")
    levels = [int(tag[1]) for tag, _ in read.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in pairwise(levels))
    assert len(read.all("svg")) >= 10 and all("role" in one or "aria-hidden" in one for one in read.all("svg"))
    assert "the concepts stay apart" not in text


def test_the_page_stands_alone(tmp_path: Path) -> None:
    """Nothing from anywhere else; its policy lets a browser ask for nothing, and run and style nothing but its own."""
    read = reported(runs.whole(tmp_path / "run"))
    pictures = read.all("img")
    # two in the head, four rows of four states, two copies of two states, two samples, two of the data
    assert len(pictures) == 2 + 16 + 8 + 2 + 2
    assert all((one["src"] or "").startswith("data:image/webp;base64,") and one["alt"] for one in pictures)
    linked = {value for _, attributes in read.tags for name, value in attributes.items() if name in ("src", "href")}
    assert all(str(one).startswith(("data:", "#")) for one in linked)
    assert not any(name.startswith("on") or name == "style" for _, attributes in read.tags for name in attributes)
    (policy,) = [one["content"] or "" for one in read.all("meta") if one.get("http-equiv")]
    assert "default-src 'none'; img-src data:; style-src 'sha256-" in policy and "connect-src" not in policy
    assert "unsafe" not in policy and len(re.findall("sha256-", policy)) == 2


def test_pictures_are_small_and_carry_nothing_but_pixels(tmp_path: Path) -> None:
    run = runs.whole(tmp_path / "run", side=700)
    photo = tmp_path / "photos" / "0.png"
    exif = Image.Exif()
    exif[0x010F] = "a maker"
    Image.open(photo).save(photo.with_suffix(".jpg"), exif=exif)
    told = (run / "pictures.json").read_text().replace("0.png", "0.jpg", 2)
    (run / "pictures.json").write_text(told)
    read = reported(run)
    assert {int(one["width"] or 0) for one in read.all("img")} == {320, 64, 200}
    assert b"a maker" not in b"".join(map(decoded, read.all("img")))


def decoded(image: dict[str, str | None]) -> bytes:
    with urllib.request.urlopen(image["src"] or "") as data:
        return bytes(data.read())


def test_what_users_say_is_escaped_wherever_it_stands(tmp_path: Path) -> None:
    run = runs.whole(tmp_path / 'a <i>run</i>"', captions=runs.HOSTILE)
    runs.settings(run, data={"prompt": runs.HOSTILE[0]}, output={"title": runs.HOSTILE[1]}, model={"model": "a/b"})
    told = runs.table(concepts=runs.HOSTILE[:2])
    told["facts"]["prompts"] = [list(runs.HOSTILE[:2])]
    told["verdict"]["reason"] = told["verdict"]["advice"] = runs.HOSTILE[3]
    for state in told["states"]:
        for figure in state["figures"].values():
            figure["judge"] = figure["scale"] = runs.HOSTILE[3]
        for pair in state["copies"]:
            pair["picture"] = runs.HOSTILE[1]
    (run / "evaluation/table.json").write_text(json.dumps(told))
    runs.drawn(run / "samples" / "step-000100-0.png", 1, runs.HOSTILE[1])
    (run / "<b>x").write_text("")
    clean = reported(runs.whole(tmp_path / "clean")).tags
    read = reported(run)
    assert {tag for tag, _ in read.tags} <= {tag for tag, _ in clean}
    assert len(read.all("script")) == 1 and not any("onerror" in attributes for _, attributes in read.tags)
    assert all((one["src"] or "").startswith("data:image/webp") for one in read.all("img"))
    for said in runs.HOSTILE:
        assert " ".join(said.split()) in read.text
    assert 'a <i>run</i>"' in read.text and "49" not in read.text.partition("& \U0001f436 ")[2][:12]
    alts = [one["alt"] or "" for one in read.all("img")]
    assert any(runs.HOSTILE[1] in one for one in alts)
    assert "--adapter 'a <i>" in read.text or f"'{run}/adapter-000200.safetensors'" in read.text


def test_a_run_that_only_began(tmp_path: Path) -> None:
    read = reported(runs.begun(tmp_path / "run"))
    for said in (
        "Not measured", "0 of 300 steps: was interrupted", "No step was taken yet", "Nothing was measured yet",
        "None were drawn", "has not told its pictures", "finetune train --output", "settings.toml",
    ):  # fmt: skip
        assert said in read.text, said
    assert not read.all("img")


def test_while_it_runs_it_says_how_long_it_goes_on(tmp_path: Path) -> None:
    run = runs.begun(tmp_path / "run")
    runs.log(run, 100, tail='{"step": 101, "lo')
    held = ledger.hold(run)
    try:
        text = reported(run).text
    finally:
        held.release()
    assert "In training" in text and "100 of 300 steps: is being trained, about 0:01:40 left" in text
    assert "lowest at step 100: 0.2500" in text and "cannot be read" not in text


def test_what_is_broken_is_said_and_the_rest_is_there(tmp_path: Path) -> None:
    run = runs.whole(tmp_path / "run")
    lines = (run / "log.jsonl").read_text().splitlines()
    lines[5:7] = ["{broken", '{"step": 7, "loss": NaN, "seconds": 0.5}']
    (run / "log.jsonl").write_text("\n".join(lines) + "\n")
    (run / "evaluation/table.json").write_text('{"run": "run", "states": [')
    (run / "settings.toml").write_text("[data\n")
    (run / "run.json").write_text("")
    (run / "pictures.json").write_text('[{"name": 3}]')
    next((run / "samples").glob("*-000100-0.png")).write_bytes(b"\x89PNG half")
    text = reported(run).text
    for said in (
        "1 of 300 lines of log.jsonl cannot be read", "not a finite number at step 7", "settings.toml cannot be read",
        "evaluation/table.json cannot be read", "run.json is missing or cannot be read", "Not measured",
        "has not told its pictures", "no picture", "300 of ? steps",
    ):  # fmt: skip
        assert said in text, said


def test_what_was_measured_while_training_stands_in_for_an_evaluation(tmp_path: Path) -> None:
    run = runs.whole(tmp_path / "run")
    shutil.move(run / "evaluation", run / "measured")
    assert "Over-trained" in reported(run).text
    (run / "evaluation").mkdir()
    fuller = runs.table()
    fuller["verdict"]["word"] = "good"
    (run / "evaluation/table.json").write_text(json.dumps(fuller))
    assert "Over-trained" not in reported(run).text and "Good" in reported(run).text


def test_several_concepts_get_a_matrix(tmp_path: Path) -> None:
    run = runs.whole(tmp_path / "run")
    (run / "evaluation/table.json").write_text(json.dumps(runs.table(concepts=("sks dog", "zwx cat"))))
    text = reported(run).text
    assert "like zwx cat" in text and "prompts of sks dog 0.700 0.200" in text and "prompts of zwx cat 0.100 -" in text


def test_how_to_use_it_follows_from_what_there_is(tmp_path: Path) -> None:
    run = runs.whole(tmp_path / "run")
    assert "In other programs" in reported(run).text, "toybox is for finetune alone"
    runs.settings(run, model={"model": "user/base", "revision": "abc"})
    text = reported(run).text
    assert f'pipeline.load_lora_weights("{run}", weight_name="adapter-000200.safetensors")' in text
    assert 'DiffusionPipeline.from_pretrained("user/base", revision="abc"' in text
    assert f"finetune export {run} --step 200 --format kohya --output files" in text and "models/loras" in text
    (run / "best").mkdir()
    (run / "best/adapter.safetensors").write_bytes(b"")
    assert f"--adapter {run}/best/adapter.safetensors" in reported(run).text
    shutil.rmtree(run / "best")
    (run / "adapter.safetensors").unlink()
    (run / "adapter-000200.safetensors").unlink()
    (run / "model").mkdir()
    told = runs.table()
    told["verdict"]["best"] = "result"
    (run / "evaluation/table.json").write_text(json.dumps(told))
    text = reported(run).text
    assert f"finetune generate --model {run}/model --prompt" in text and "single-file" in text
    assert f'from_pretrained("{run}/model", torch_dtype=torch.float16)' in text


def test_a_table_cannot_name_pictures_of_others(tmp_path: Path) -> None:
    run = runs.whole(tmp_path / "run")
    runs.picture(tmp_path / "secret.png", 7)
    told = runs.table()
    for state in told["states"]:
        for pair in state["copies"]:
            pair["file"] = "../../secret.png"
    (run / "evaluation/table.json").write_text(json.dumps(told))
    assert len([one for one in reported(run).all("img") if (one["alt"] or "").startswith("sample:")]) == 0


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other").mkdir()
    assert "no run: it has neither settings.toml nor run.json" in refused(capsys, str(tmp_path / "other"))
    assert "there is no such folder" in refused(capsys, str(tmp_path / "none"))
    assert not [*(tmp_path / "other").iterdir()]


def test_other_files_are_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, mine = runs.begun(tmp_path / "run"), tmp_path / "mine.html"
    mine.write_text("<p>mine")
    assert "is no report, so it is not written over" in refused(capsys, str(run), "--output", str(mine))
    assert mine.read_text() == "<p>mine"
    assert "there is no folder" in refused(capsys, str(run), "--output", str(tmp_path / "no" / "page.html"))
    (run / "report.html").write_text("<p>mine")
    assert "is no report" in refused(capsys, str(run))
    (run / "report.html").unlink()
    for _ in range(2):  # its own it writes over
        cli.main(["report", str(run), "--output", str(tmp_path / "page.html")])
    assert not (run / "report.html").exists()


def test_a_folder_that_may_only_be_read_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    run = runs.begun(tmp_path / "run")
    monkeypatch.setattr(disk, "write_text", denied)
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", str(run)])
    assert stop.value.code == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "could not be written (Permission denied). Name another file: --output." in said


def test_a_browser_is_asked_to_show_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: bool(shown.append(address)))
    run = runs.begun(tmp_path / "run")
    cli.main(["report", str(run), "--open"])
    assert shown == [(run / "report.html").as_uri()]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(runs.begun(tmp_path / "run"), 0) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def asked(address: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers)) as answer:
        return str(answer.read().decode())


def test_served_it_follows_the_run(server: Server) -> None:
    before, version = asked(server.address), asked(f"{server.address}version")
    assert f'data-version="{version}"' in before and "No step was taken yet" in before
    assert "connect-src &#39;self&#39;" in before and not (server.run / "report.html").exists()
    assert asked(f"{server.address}version") == version
    runs.log(server.run, 20)
    assert asked(f"{server.address}version") != version
    assert "Loss of 20 steps" in asked(server.address)


def test_it_is_served_to_this_machine_alone(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert server.address.startswith("http://127.0.0.1:")
    for address, headers in ((server.address, {"Host": "evil.example"}), (f"{server.address}../run.json", {})):
        with pytest.raises(urllib.error.HTTPError) as stop:
            asked(address, **headers)
        assert stop.value.code in (404, 421)
    assert "cannot be had" in refused(capsys, str(server.run), "--serve", "--port", str(server.server_port))
    assert "--serve writes nothing" in refused(capsys, str(server.run), "--serve", "--output", "page.html")
    shutil.rmtree(server.run)
    with pytest.raises(urllib.error.HTTPError) as gone:
        asked(server.address)
    assert gone.value.code == 410


def train(model: Path, run: Path, *words: str) -> Path:
    for number in range(3):
        runs.picture(run.parent / "pictures" / f"{number}.png", 40 * number, (64, 80))
    given = ["--model", str(model), "--data", str(run.parent / "pictures"), "--prompt", "sks dog", "--no-prior"]
    sizes = ["--steps", "4", "--checkpoint-every", "2", "--sample-every", "2", "--sample-steps", "2", "--lr", "1e-3"]
    cli.main(["train", "lora", "--output", str(run), "--tracker", "none", *given, *sizes, *words])
    return run


def test_a_training_keeps_its_report(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    write = page.write

    def listened(run: Path, file: Path) -> None:
        write(run, file)
        made.append(Read(file.read_text(encoding="utf-8")).text)

    monkeypatch.setattr(page, "write", listened)
    run = train(tiny_models["sd"], tmp_path / "run", "--validation", "0.3", "--no-buckets")
    assert [re.findall(r"(\d) of 4 steps: (is being trained|finished)", one)[0] for one in made] == [
        ("1", "is being trained"), ("2", "is being trained"), ("4", "is being trained"), ("4", "finished"),
    ]  # fmt: skip
    assert "step 2" in made[1] and "adapter.safetensors" in made[3] and "3 pictures, 1 of them held out" in made[0]
    told = json.loads((run / "pictures.json").read_text())
    assert [one["name"] for one in told["pictures"]] and told["count"] == 3 and told["held"] == 1
    top, left, bottom, right = told["pictures"][0]["crops"][0]
    assert (top, bottom) == (0, 1) and left == pytest.approx(0.1, abs=0.02) and right == pytest.approx(0.9, abs=0.02)
    after = reported(run)
    assert "sks dog" in after.text and len(after.all("img")) == 3 + 2


def test_a_report_that_fails_never_ends_a_training(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: object) -> None:
        raise disk.Failure("no room for it")

    monkeypatch.setattr(page, "write", failing)
    run = train(tiny_models["sd"], tmp_path / "run")
    assert (run / "adapter.safetensors").is_file() and not (run / "report.html").exists()
    assert caplog.text.count("the report could not be made: no room for it") == 1


def test_no_report_is_made_where_none_is_wanted(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    assert not (train(tiny_models["sd"], tmp_path / "run", "--no-report") / "report.html").exists()
