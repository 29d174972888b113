"""What several processes hold of a training: the same weights each, or each a part of them (FSDP2's `DTensor`s).

What is shared out is gathered for checkpoints and export, and shared out again; all else passes through. DeepSpeed,
which shares out in a way of its own, is in `zero`.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from finetune import engine, families, zero
from finetune.batches import Batch
from finetune.errors import Failure, Fault
from finetune.families import Family

Pass = tuple[int, Batch]
"""The number of a step's part, and pictures of it."""


def prepare(model: nn.Module, optimizer: Any, accelerator: Accelerator, max_grad_norm: float) -> tuple[nn.Module, Any]:
    """Accelerate's `prepare`. FSDP too keeps fp32 and computes under autocast: each engine trains the same numbers.

    `max_grad_norm`: for engines that clip by themselves; 0 leaves gradients as they are.
    """
    if engine.running(accelerator) == "deepspeed":
        return zero.prepare(model, optimizer, accelerator, max_grad_norm)
    if engine.running(accelerator) == "fsdp":
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
        model.forward = accelerator.autocast()(model.forward)
    return accelerator.prepare(model, optimizer)


def again(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The model, prepared again after other parameters of it need gradients than did: DDP waits for those it knew."""
    if accelerator.num_processes == 1:
        return model
    return accelerator.prepare_model(accelerator.unwrap_model(model, keep_fp32_wrapper=False))


def adding_up(model: Any, accelerator: Accelerator) -> AbstractContextManager[None]:
    """Around a forward and backward pass whose gradients are not yet a step's all: nothing is sent, or nothing done."""
    return zero.adding_up(model) if engine.running(accelerator) == "deepspeed" else accelerator.no_sync(model)


def gathered(tree: Any, keep: bool) -> Any:
    """The tree with whole tensors, on the CPU. All processes must ask; without `keep` one gets None instead of them."""
    if isinstance(tree, DTensor):
        whole = tree.full_tensor()
        return whole.cpu() if keep else None
    if isinstance(tree, dict):
        return {name: gathered(part, keep) for name, part in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(gathered(part, keep) for part in tree)
    return tree


def like(value: Any, parameter: Tensor) -> Any:
    """A whole tensor of a parameter's shape, shared out as the parameter is. All processes must ask."""
    if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


def optimizer_state(state: Mapping[str, Any], optimizer: Any) -> dict[str, Any]:
    """An optimizer's whole state, shared out as its parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        return dict(state)
    told = {
        number: {name: like(value, parameters[number]) for name, value in of_one.items()}
        for number, of_one in state["state"].items()
    }
    return {**state, "state": told}


def evened(passes: Sequence[Pass], accelerator: Accelerator) -> list[Pass]:
    """As many passes in every process, where each of them asks all processes for weights; those added weigh nothing."""
    if not engine.is_sharding(accelerator):
        return list(passes)
    count = torch.tensor([len(passes)], device=accelerator.device)
    missing = int(accelerator.gather(count).max()) - len(passes)
    part, batch = passes[0]
    return [*passes, *[(part, replace(batch, shares=torch.zeros_like(batch.shares)))] * missing]


class Whole:
    """The pipeline's parts with all their weights, in the leading process: what draws, compares and writes needs them.

    Made before the model is shared out. Where nothing is, it does nothing.
    """

    def __init__(self, family: Family, accelerator: Accelerator) -> None:
        self.family, self.leads = family, accelerator.is_main_process
        self.parts = families.modules(family) if engine.running(accelerator) == "fsdp" else {}
        self.outlines = {name: _outline(part) for name, part in self.parts.items() if self.leads}

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Inside, the leading process's pipeline holds them. All processes must enter."""
        self.put()
        try:
            yield
        finally:
            if self.leads and self.parts:
                self.family.pipeline.register_modules(**self.parts)

    def put(self) -> None:
        """The leading process's pipeline takes them, for good. All processes must ask."""
        for name, part in self.parts.items():
            weights = {key: _whole(value, self.leads) for key, value in part.state_dict().items()}
            if self.leads:
                filled = copy.deepcopy(self.outlines[name])
                filled.load_state_dict(weights, assign=True)
                self.family.pipeline.register_modules(**{name: filled})


def require_no_questions(asks: bool, accelerator: Accelerator) -> None:
    """Refuse a loss that asks the frozen base about some pictures: one process would wait for the others' weights."""
    if asks and engine.running(accelerator) == "fsdp":
        raise Fault(
            "--engine fsdp: the frozen base would be asked about some pictures and not about others, by some processes "
            "and not by others. Say --prior-from pictures and no --unmasked-prior, or take the engine ddp."
        )


def require_equal(parameters: Mapping[str, Tensor], accelerator: Accelerator) -> None:
    """Every process must have trained the same weights, to the bit. Raises Failure, in all of them, where not."""
    hashed = hashlib.sha256()
    for parameter in parameters.values():
        hashed.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    mine = torch.frombuffer(bytearray(hashed.digest()), dtype=torch.int64).to(accelerator.device)[None]
    each = accelerator.gather(mine).cpu()  # (processes, 4)
    other = [str(rank) for rank, digest in enumerate(each) if not torch.equal(digest, each[0])]
    if other:
        raise Failure(
            f"the processes did not train the same weights: those of process {', '.join(other)} are not process 0's. "
            "Nothing was exported. Look for other hardware, drivers or versions on one of the machines."
        )


def _whole(value: Tensor, keep: bool) -> Tensor | None:
    """On the device that it is shared out over, or None."""
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    return whole.detach() if keep else None


def _outline(module: nn.Module) -> nn.Module:
    """A copy without weights."""
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in module.parameters()
    }
    return copy.deepcopy(module, empty)
