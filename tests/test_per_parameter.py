"""An optimizer for each parameter: the steps and the state of one over all, early or not; bf16 weights that learn."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from finetune import keys, optim
from finetune.adapters import Group
from finetune.errors import Fault
from finetune.per_parameter import InBackward, PerParameter
from finetune.rounding import stochastic
from finetune.settings import Full, Optim, Train

CPU = torch.device("cpu")
SEPARABLE = sorted(name for name, known in optim.KNOWN.items() if known.separable)
RATES = {"lion8bit": 3e-3, "prodigy": 1.0}


class Net(nn.Module):
    """Two layers large enough for 8-bit state, one too small for it, and one that is used every other time."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(96, 128), nn.Linear(128, 96)
        self.odd = nn.Linear(96, 4)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = (0.1 * torch.randn(parameter.shape, generator=generator)).to(dtype)

    def loss(self, number: int) -> Tensor:
        x = torch.randn(16, 96, generator=torch.Generator().manual_seed(number)).to(self.first.weight.dtype)
        error = (self.second(self.first(x).relu()) - x.roll(1, 1)).square().mean()
        return error + self.odd(x).square().mean() if number % 2 else error


def groups(net: Net, lr: float) -> list[Group]:
    return [
        Group("body", [*net.first.parameters(), *net.second.parameters()], lr),
        Group("odd", [*net.odd.parameters()], lr if lr == RATES["prodigy"] else lr / 2),
    ]


def made(name: str) -> Callable[[list[Group]], torch.optim.Optimizer]:
    return partial(optim.optimizer, settings=Optim(optimizer=name, lr=RATES.get(name, 1e-2)), device=CPU)  # type: ignore[arg-type]


def by_chance(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """The draws follow from the numbers alone: enough for a test."""
    return stochastic(value, keys.generator(0, "rounding", repr(float(value.double().sum()))))


def wrapped(net: Net, name: str, kind: str) -> tuple[Any, InBackward | None]:
    """One optimizer, one for each parameter, or the same in the backward pass; as the loop has it, in Accelerate's."""
    parts, make = groups(net, RATES.get(name, 1e-2)), made(name)
    inner = make(parts) if kind == "one" else PerParameter(parts, make, by_chance)
    early = InBackward(inner) if kind == "early" else None  # type: ignore[arg-type]
    return Accelerator(cpu=True).prepare(inner), early


def train(net: Net, optimizer: Any, early: InBackward | None, steps: range) -> list[float]:
    """Steps of two passes at a falling rate; their gradients' norms."""
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    norms = []
    for number in steps:
        (0.5 * net.loss(2 * number)).backward()
        loss = net.loss(2 * number + number % 2)
        if early:
            with early.last_pass(loss.detach()):
                loss.backward()
            norms.append(early.norm(early.optimizer.own))
        else:
            loss.backward()
            norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), float("inf"))))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return norms


def same(one: Any, other: Any) -> bool:
    """Whether two trees are equal to the bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("kind", ["each", "early"])
@pytest.mark.parametrize("name", SEPARABLE)
def test_one_parameter_at_a_time_is_one_optimizer_to_the_bit(name: str, kind: str) -> None:
    """Weights, state and gradient norms; and either goes on from the other's state."""
    whole, parted = Net(), Net()
    one, (each, early) = wrapped(whole, name, "one")[0], wrapped(parted, name, kind)
    assert train(whole, one, None, range(6)) == train(parted, each, early, range(6))
    assert same(whole.state_dict(), parted.state_dict())
    assert same(one.state_dict(), each.state_dict())
    kept = copy.deepcopy(one.state_dict()), copy.deepcopy(each.state_dict())
    back, (on, early) = wrapped(whole, name, "one")[0], wrapped(parted, name, kind)
    back.load_state_dict(kept[1])
    on.load_state_dict(kept[0])
    assert train(whole, back, None, range(6, 9)) == train(parted, on, early, range(6, 9))
    with optim.settled(back), optim.settled(on):
        assert same(whole.state_dict(), parted.state_dict())
    assert same(whole.state_dict(), parted.state_dict())
    assert same(back.state_dict(), on.state_dict())


def test_prodigy_is_not_separable() -> None:
    """Its rate is found over all parameters: one at a time it trains something else, so it is refused."""
    assert [name for name in optim.KNOWN if name not in SEPARABLE] == ["prodigy"]
    whole, parted = Net(), Net()
    train(whole, wrapped(whole, "prodigy", "one")[0], None, range(6))
    train(parted, wrapped(parted, "prodigy", "each")[0], None, range(6))
    assert not same(whole.state_dict(), parted.state_dict())


def test_a_state_of_other_groups_is_refused() -> None:
    net = Net()
    each, _ = wrapped(net, "adamw", "each")
    state = each.state_dict()
    with pytest.raises(ValueError, match="zip"):
        each.load_state_dict({**state, "param_groups": state["param_groups"][:1]})


@pytest.mark.parametrize("name", [name for name in SEPARABLE if name != "schedulefree"])
def test_bf16_weights_learn_as_float32_ones_do(name: str) -> None:
    """The state is that of float32 weights, the weights are bf16, and what is wide is given back after each step."""
    wide, narrow = Net(), Net(torch.bfloat16)
    whole, (each, _) = wrapped(wide, name, "one")[0], wrapped(narrow, name, "each")
    start = float(sum(narrow.loss(n).detach() for n in range(100, 110))) / 10
    train(wide, whole, None, range(60))
    train(narrow, each, None, range(60))
    ends = [float(sum(net.loss(n).detach().float() for n in range(100, 110))) / 10 for net in (wide, narrow)]
    assert ends[0] < 0.9 * start
    assert abs(ends[1] - ends[0]) < 0.1 * (start - ends[0])
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    tensors = [t for state in each.optimizer.parts for s in state.state.values() for t in s.values()]
    assert {t.dtype for t in tensors if isinstance(t, Tensor)} <= {torch.float32, torch.uint8}
    assert all(p.numel() == 0 and p.grad is None for p in each.optimizer.wide.values())


def test_bf16_weights_move_where_plain_rounding_leaves_them() -> None:
    """AdamW's steps of 1e-4 from a weight of 1, whose neighbours are 2 ** -8 and 2 ** -7 away."""
    plain, chance = (nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16)) for _ in range(2))
    make = partial(optim.optimizer, settings=Optim(optimizer="adamw", weight_decay=0), device=CPU)
    step = [0]

    def keyed(parameter: nn.Parameter, value: Tensor) -> Tensor:
        return stochastic(value, keys.generator(0, "rounding", step[0]))

    ordinary, each = make([Group("p", [plain], 1e-4)]), PerParameter([Group("p", [chance], 1e-4)], make, keyed)
    for step[0] in range(200):
        plain.grad, chance.grad = torch.ones_like(plain), torch.ones_like(chance)
        ordinary.step()
        each.step()
    assert (plain == 1).all()
    moved = 1 - chance.detach().double()
    assert abs(float(moved.mean()) - 200 * 1e-4) < 4 * float(moved.std()) / 64


def test_gradients_of_a_whole_model_are_never_held_together() -> None:
    net = Net()
    _, early = wrapped(net, "adamw", "early")
    assert early is not None
    held: list[int] = []
    take = early._take

    def watched(parameter: nn.Parameter) -> None:
        held.append(sum(p.grad is not None for p in net.parameters()))
        take(parameter)

    early._take = watched  # type: ignore[method-assign]
    loss = net.loss(1)
    with early.last_pass(loss.detach()):
        loss.backward()
    assert held == [1] * 6
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("broken", ["loss", "first", "later"])
def test_from_a_gradient_that_is_not_finite_on_nothing_steps(broken: str) -> None:
    net = Net()
    _, early = wrapped(net, "adamw", "early")
    assert early is not None
    before = copy.deepcopy(net.state_dict())
    order: list[nn.Parameter] = []
    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(order.append)  # type: ignore[arg-type]
    net.loss(1).backward()
    net.zero_grad()
    victim = {"first": order[0], "later": order[3]}.get(broken)
    if victim is not None:
        victim.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    loss = net.loss(1)
    with early.last_pass(loss.detach() if victim is not None else torch.tensor(float("nan"))):
        loss.backward()
    assert len(early.optimizer.stepped) == (3 if broken == "later" else 0)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert len(changed) == len(early.optimizer.stepped)
    assert (early.norm(early.optimizer.own) == float("inf")) == (victim is not None)
    assert all(p.grad is None for p in net.parameters())


class Engine:
    """What is asked of an Accelerator."""

    def __init__(self, processes: int = 1, kind: str = "NO") -> None:
        from accelerate.utils import DistributedType

        self.num_processes, self.distributed_type = processes, DistributedType(kind)


BF16, EARLY = Full(weights="bf16"), Full(optimizer_in_backward=True)


@pytest.mark.parametrize(
    ("full", "settings", "train", "engine", "said"),
    [
        (EARLY, Optim(max_grad_norm=0), Train(), Engine(2, "MULTI_GPU"), "2 processes average their gradients"),
        (EARLY, Optim(max_grad_norm=0), Train(precision="fp16"), Engine(), "--precision bf16 or fp32"),
        (EARLY, Optim(max_grad_norm=0), Train(), Engine(1, "DEEPSPEED"), "DeepSpeed holds and steps the weights"),
        (BF16, Optim(), Train(precision="bf16"), Engine(2, "FSDP"), "FSDP holds and steps the weights"),
        (BF16, Optim(), Train(precision="fp16"), Engine(), "--weights bf16 --precision fp16.*--precision bf16"),
    ],
)
def test_engines_that_step_otherwise_are_refused(
    full: Full, settings: Optim, train: Train, engine: Any, said: str
) -> None:
    with pytest.raises(Fault, match=said):
        optim.check_full(full, settings, train, engine)


def test_several_processes_may_hold_bf16_weights() -> None:
    optim.check_full(BF16, Optim(), Train(precision="bf16"), Engine(2, "MULTI_GPU"))  # type: ignore[arg-type]
