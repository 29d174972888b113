"""A signal in each phase of a command, sent from within it: what is done is kept, and the next command goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_captioners
from driver import Place

from finetune import class_pictures, cli, ledger, loop
from finetune.data import captioning
from finetune.data.checking import looks
from finetune.export import stream
from finetune.families import base, source

Ended = Callable[..., tuple[int, str]]
STOPPED, REFUSED = 75, 2
SAME = "what is done is kept. Go on with the same command."


def asked_in(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, *numbers: int) -> None:
    """Send this process a signal each time that it calls a function, until there are no more."""
    before, left = getattr(owner, name), list(numbers or (signal.SIGTERM,))

    def watched(*given: object, **more: object) -> object:
        if left:
            os.kill(os.getpid(), left.pop(0))
        return before(*given, **more)

    monkeypatch.setattr(owner, name, watched)


@pytest.mark.parametrize(
    ("owner", "name", "drawn"),
    [pytest.param(looks, "look", 0, marks=pytest.mark.slow), (source.Source, "load", 0), (class_pictures, "_draw", 2)],
    ids=["looking", "loading", "drawing"],
)
def test_before_the_run_has_begun_the_same_command_goes_on(
    owner: object, name: str, drawn: int, place: Place, monkeypatch: pytest.MonkeyPatch, ended: Ended
) -> None:
    """No folder is left, in which `--resume` would find nothing. Class pictures stay."""
    with monkeypatch.context() as patch:
        asked_in(patch, owner, name)
        assert ended(*place.start()) == (STOPPED, f"Stopped by SIGTERM; {SAME}")
    assert not place.run.exists()
    assert len(list(place.cache.glob("class-pictures/*/*.png"))) == drawn
    assert ended(*place.start()) == (0, "")
    assert place.logged() == [1, 2, 3, 4]


def test_between_class_pictures(place: Place, monkeypatch: pytest.MonkeyPatch, ended: Ended) -> None:
    """What is not drawn yet is not waited for."""
    monkeypatch.setattr(class_pictures, "BATCH", 1)
    asked_in(monkeypatch, class_pictures, "_draw")
    assert ended(*place.start())[0] == STOPPED
    assert len(list(place.cache.glob("class-pictures/*/*.png"))) == 1


def test_while_caching_resume_goes_on(place: Place, monkeypatch: pytest.MonkeyPatch, ended: Ended) -> None:
    """What was computed before the signal is kept, although no shard of the cache was full."""
    monkeypatch.setattr("finetune.data.encoding.WORKERS", 1)
    computed: list[object] = []
    encode = base.encode_with_vae
    monkeypatch.setattr(base, "encode_with_vae", lambda *given: computed.append(1) or encode(*given))
    with monkeypatch.context() as patch:
        asked_in(patch, base, "encode_with_vae")
        status, said = ended(*place.start())
    assert (status, said) == (STOPPED, said) and f"Go on: `finetune train --output {place.run} --resume`" in said
    before = len(computed)
    assert 0 < before < 10
    entry = ledger.seen(place.run)
    assert entry is not None and entry.state == "stopped" and entry.step == 0
    status, said = ended(*place.start())
    assert status == REFUSED and "an unfinished run is there (stopped, 0 of 4 steps)" in said
    assert ended(*place.resume()) == (0, "")
    assert len(computed) == 10, "nothing is computed twice"
    assert place.logged() == [1, 2, 3, 4]


def test_while_exporting_the_run_is_finished(place: Place, monkeypatch: pytest.MonkeyPatch, ended: Ended) -> None:
    """Nothing but the export is left, which is short: it is done, and the run is as if nobody had asked."""
    asked_in(monkeypatch, stream, "write")
    assert ended(*place.start()) == (0, "")
    entry = ledger.seen(place.run)
    assert entry is not None and entry.state == "finished" and place.product()


def test_in_the_last_step_the_export_is_left(place: Place, monkeypatch: pytest.MonkeyPatch, ended: Ended) -> None:
    with monkeypatch.context() as patch:
        asked_in(patch, loop.Training, "_step", *([0] * 3), signal.SIGUSR1)
        status, said = ended(*place.start())
    assert status == STOPPED and "Stopped by SIGUSR1 after step 4 of 4" in said
    assert not (place.run / "adapter.safetensors").exists()
    assert ended(*place.resume()) == (0, "")
    assert place.product() and place.logged() == [1, 2, 3, 4]


def test_a_second_ctrl_c_stops_at_once(place: Place, monkeypatch: pytest.MonkeyPatch, ended: Ended) -> None:
    before = signal.getsignal(signal.SIGINT)
    asked_in(monkeypatch, class_pictures, "sample", signal.SIGINT)
    asked_in(monkeypatch, class_pictures, "save_png", signal.SIGINT)
    status, said = ended(*place.start())
    assert (status, said) == (130, "Stopped.")
    assert signal.getsignal(signal.SIGINT) is before


def test_filling_the_cache_is_stopped_and_gone_on_with(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ended: Ended
) -> None:
    words = ["data", "cache", str(place.pictures), "--model", str(place.model), "--resolution", "64"]
    words += ["--max-upscale", "4"]
    monkeypatch.setattr("finetune.data.encoding.WORKERS", 1)
    with monkeypatch.context() as patch:
        asked_in(patch, base, "encode_with_vae")
        status, said = ended(*words)
    assert status == STOPPED and f"Stopped by SIGTERM; {SAME}" in said
    cli.main(words)
    assert "computed: 2 of 3 pictures" in capsys.readouterr().out


def test_captioning_is_stopped_and_gone_on_with(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: Ended
) -> None:
    for file in place.pictures.glob("*.txt"):
        file.unlink()
    words = ["data", "caption", str(place.pictures), "--captioner", str(tiny_captioners.blip(tmp_path / "blip"))]
    words += ["--longest", "5"]
    with monkeypatch.context() as patch:
        asked_in(patch, captioning.Captioner, "caption")
        status, said = ended(*words)
    assert status == STOPPED and f"Stopped by SIGTERM; {SAME}" in said
    assert [file.name for file in place.pictures.glob("*.txt")] == ["0.txt"]
    assert ended(*words)[0] == 0
    assert sorted(file.name for file in place.pictures.glob("*.txt")) == ["0.txt", "1.txt", "2.txt"]
