"""Optimizers and schedules by name: each one learns, each schedule is its formula, what cannot be is refused."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from PIL import Image
from torch import Tensor, nn

from finetune import cli, optim
from finetune.adapters import Group
from finetune.errors import Fault
from finetune.settings import Optim

CPU = torch.device("cpu")
RATES = {"prodigy": 1.0, "lion8bit": 3e-3, "schedulefree": 3e-2}


def asked(name: str, **settings: object) -> Optim:
    return Optim(optimizer=name, **{"lr": RATES.get(name, 1e-2), **settings})  # type: ignore[arg-type]


def regression() -> tuple[nn.Parameter, nn.Parameter, Tensor, Tensor]:
    """A low-rank fit that begins as an adapter does: y = x A B, B = 0."""
    generator = torch.Generator().manual_seed(0)
    x, a, w = (torch.randn(*shape, generator=generator) for shape in ((64, 96), (96, 64), (96, 96)))
    return nn.Parameter(0.1 * a), nn.Parameter(torch.zeros(64, 96)), x, x @ w * 0.1


def step(optimizer: torch.optim.Optimizer, a: Tensor, b: Tensor, x: Tensor, y: Tensor) -> float:
    loss = ((x @ a @ b - y) ** 2).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


@pytest.mark.parametrize("name", sorted(optim.KNOWN))
def test_every_optimizer_learns_and_goes_on_from_its_state_to_the_bit(name: str) -> None:
    """Prodigy's first steps are tiny: it is still finding its rate."""
    a, b, x, y = regression()
    optimizer = optim.optimizer([Group("a", [a], asked(name).lr), Group("b", [b], asked(name).lr)], asked(name), CPU)
    losses = [step(optimizer, a, b, x, y) for _ in range(120)]
    assert losses[-1] < 0.5 * losses[0]
    kept, values = copy.deepcopy(optimizer.state_dict()), [a.detach().clone(), b.detach().clone()]
    onward = [step(optimizer, a, b, x, y) for _ in range(5)]
    again = [nn.Parameter(value) for value in values]
    other = optim.optimizer([Group("ab", [p], asked(name).lr) for p in again], asked(name), CPU)
    other.load_state_dict(kept)
    assert [step(other, *again, x, y) for _ in range(5)] == onward


@pytest.mark.parametrize("name", [name for name, known in optim.KNOWN.items() if known.foreach])
def test_all_parameters_at_once_step_as_one_by_one_to_the_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a GPU trains an adapter; a CPU and a whole model go one by one. Either goes on from the other's state."""

    def made(device: str) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
        weights = list(regression()[:2])
        return optim.optimizer([Group("ab", weights, 1e-2)], asked(name), torch.device(device)), weights

    (together, ours), (alone, theirs) = made("cuda"), made("cpu")
    assert together.param_groups[0]["foreach"] and not alone.param_groups[0]["foreach"]
    x, y = regression()[2:]
    for number in range(6):
        assert step(together, *ours, x, y) == step(alone, *theirs, x, y)
        if number == 2:
            kept = copy.deepcopy(together.state_dict()), copy.deepcopy(alone.state_dict())
            together.load_state_dict(kept[1])
            alone.load_state_dict(kept[0])
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    monkeypatch.setattr(optim, "FEW", 10)
    assert not made("cuda")[0].param_groups[0]["foreach"]


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adafactor", "came", "schedulefree"])
def test_each_group_trains_at_its_own_rate(name: str) -> None:
    a, b, x, y = regression()
    torch.nn.init.constant_(b, 0.01)
    before = a.detach().clone(), b.detach().clone()
    settings = asked(name, weight_decay=0.0)
    optimizer = optim.optimizer([Group("a", [a], 1e-5), Group("b", [b], 1e-2)], settings, CPU)
    step(optimizer, a, b, x, y)
    moved = [float((now.detach() - was).abs().mean()) for now, was in zip((a, b), before, strict=True)]
    assert 0 < 100 * moved[0] < moved[1]


def test_weights_are_settled_while_they_are_used_and_put_back_to_the_bit() -> None:
    a, b, x, y = regression()
    settings = asked("schedulefree")
    plain = optim.optimizer([Group("ab", [a, b], settings.lr)], settings, CPU)
    wrapped = Accelerator(cpu=True).prepare(plain)
    for _ in range(9):
        step(wrapped, a, b, x, y)
    training = b.detach().clone()
    z = plain.state[b]["z"]
    with optim.settled(wrapped):
        average = b.detach().clone()
        torch.testing.assert_close(training, 0.9 * average + 0.1 * z, rtol=1e-5, atol=1e-6)
    assert torch.equal(b, training)
    step(wrapped, a, b, x, y)
    optim.settle(wrapped)
    assert plain.param_groups[0]["train_mode"] is False


def test_settling_changes_nothing_of_an_ordinary_optimizer() -> None:
    a, b, x, y = regression()
    optimizer = optim.optimizer([Group("ab", [a, b], 1e-2)], asked("adamw"), CPU)
    step(optimizer, a, b, x, y)
    before = b.detach().clone()
    with optim.settled(optimizer):
        assert torch.equal(b, before)
    optim.settle(optimizer)
    assert torch.equal(b, before)


def rates(settings: Optim, steps: int) -> list[list[float]]:
    """The rates of two groups at each step."""
    groups = [Group(str(lr), [nn.Parameter(torch.zeros(1))], lr) for lr in (1e-3, 1e-4)]
    optimizer = optim.optimizer(groups, settings, CPU)
    schedule = optim.schedule(optimizer, settings, steps)
    seen = []
    for _ in range(steps):
        seen.append(schedule.get_last_lr())
        optimizer.step()
        schedule.step()
    return [*seen, schedule.get_last_lr()]


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("name", ["constant_with_warmup", "cosine", "linear"])
def test_schedules_are_those_of_diffusers(name: str, warmup: int) -> None:
    ours = rates(Optim(schedule=name.partition("_")[0], warmup=warmup, optimizer="adamw"), 40)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=40)
    (factor,) = reference.lr_lambdas
    expected = [[lr * factor(step) for lr in (1e-3, 1e-4)] for step in range(41)]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(expected))


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("warmup", [0, 7])
def test_the_polynomial_schedule_is_its_formula_for_each_group(warmup: int, power: float) -> None:
    """diffusers' own, which ends at 1e-7, is as near as that."""
    ours = rates(Optim(schedule="polynomial", schedule_power=power, warmup=warmup, optimizer="adamw"), 40)
    factors = [s / warmup if s < warmup else ((40 - s) / (40 - warmup)) ** power for s in range(41)]
    expected = [[lr * factor for lr in (1e-3, 1e-4)] for factor in factors]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(expected))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    reference = get_scheduler("polynomial", optimizer, num_warmup_steps=warmup, num_training_steps=40, power=power)
    (whole,) = reference.lr_lambdas
    assert [first for first, _ in ours] == pytest.approx([1e-3 * whole(step) for step in range(41)], abs=2e-7)


def test_the_rate_is_the_one_that_weights_move_by() -> None:
    """Adam moves a weight by about its rate, and Prodigy by the rate that it has found."""
    a, b, x, y = regression()
    optimizer = optim.optimizer([Group("ab", [a, b], 2.0)], asked("prodigy", lr=2.0, weight_decay=0.0), CPU)
    seen = []
    for _ in range(60):
        seen.append(optim.rate(optimizer))
        assert seen[-1] == 2.0 * optimizer.param_groups[0]["d"]
        step(optimizer, a, b, x, y)
    assert seen[0] == pytest.approx(2e-6) and seen[-1] > 100 * seen[0]
    before = b.detach().clone()
    rate = optim.rate(optimizer)
    step(optimizer, a, b, x, y)
    assert 0.1 * rate < float((b.detach() - before).abs().mean()) < rate
    for name in ("adamw", "schedulefree"):
        assert optim.rate(optim.optimizer([Group("a", [a], 3e-3)], asked(name, lr=3e-3), CPU)) == 3e-3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (Optim(optimizer="prodigy"), r"--lr 0.0001: it finds the rate itself.*Say --lr 1"),
        (Optim(optimizer="prodigy", lr=1, text_encoder_lr=0.1), r"one rate for all.*--text-encoder-lr 1"),
        (Optim(optimizer="schedulefree", schedule="cosine"), r"--schedule cosine.*--schedule constant"),
        (Optim(schedule_power=0), r"--schedule-power 0: more than 0"),
    ],
)
def test_what_cannot_be_is_refused_with_advice(settings: Optim, said: str) -> None:
    with pytest.raises(Fault, match=said):
        optim.check(settings)


@pytest.mark.parametrize("name", ["prodigy", "schedulefree", "came"])
def test_a_missing_library_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = optim.KNOWN[name].package
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Fault, match=rf"--optimizer {name}: needs the library {package}.*`pip install {package}`"):
        optim.check(asked(name))


@pytest.mark.parametrize("name", ["pagedadamw8bit", "lion8bit", "adafactor", "prodigy", "schedulefree", "came"])
def test_every_optimizer_trains_from_the_command_line(name: str, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for number, colour in enumerate(["red", "orange"]):
        Image.new("RGB", (64, 64), colour).save(tmp_path / "pictures" / f"{number}.png")
    given = ["--model", tiny_models["sd"], "--data", tmp_path / "pictures", "--output", tmp_path / "run"]
    rest = ["--prompt", "a photo of sks dog", "--no-prior", "--tracker", "none", "--rank", "4", "--steps", "3"]
    words = [*given, *rest, "--optimizer", name, "--lr", RATES.get(name, 1e-2), "--schedule-power", "1.5"]
    cli.main(["train", "lora", *map(str, words)])
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and (lines[0]["lr"] == 1e-6) == (name == "prodigy")  # Prodigy begins with d = 1e-6
    assert f'optimizer = "{name}"' in (tmp_path / "run" / "settings.toml").read_text()
