"""Libraries are imported without what only costs time and memory, and have it all the same when they ask for it."""

from __future__ import annotations

import subprocess
import sys

TRAINED = """
import sys, gc
import finetune as ft
ft.Training, ft.Run, ft.export
from finetune.imports import LATER, Later
import torch
assert gc.isenabled()
stood = {name: sys.modules[name] for name in LATER}
assert all(isinstance(module, Later) for module in stood.values()), stood
assert not any(name.startswith(("scipy.linalg", "torch._dynamo.", "torch._inductor")) for name in sys.modules
               if name not in LATER)

weight = torch.nn.Parameter(torch.ones(3))
optimizer = torch.optim.AdamW([weight], lr=0.1)
weight.square().sum().backward()
optimizer.step()
assert weight.max() < 1
from accelerate.utils import is_compiled_module
assert not is_compiled_module(torch.nn.Linear(1, 1))
assert {name: sys.modules[name] for name in LATER} == stood
"""

ASKED = """
import scipy.optimize, scipy.stats, transformers.loss.loss_for_object_detection as loss
assert scipy.optimize.minimize_scalar(lambda x: (x - 2) ** 2).x.round(3) == 2
assert [each.tolist() for each in loss.linear_sum_assignment([[1, 0], [0, 1]])] == [[0, 1], [1, 0]]
assert scipy.stats.beta.ppf(0.5, 1, 1) == 0.5

import torch._dynamo.config
real = sys.modules["torch._dynamo"]
assert not isinstance(real, Later) and torch._dynamo is real
assert torch._dynamo.config is sys.modules["torch._dynamo.config"] is real.config
assert torch._dynamo.config.__spec__.origin.endswith("config.py")
from diffusers.models.attention import BasicTransformerBlock
from torch._dynamo import trace_rules
assert id(BasicTransformerBlock) in trace_rules._allowed_callable_ids  # as diffusers has marked it
from transformers.masking_utils import TransformGetItemToIndex
with TransformGetItemToIndex():
    pass
seen = []
compiled = torch.compile(lambda x: x + 1, backend=lambda graph, given: seen.append(graph) or graph.forward)
assert compiled(torch.ones(1)) == 2 and seen
optimizer.step()
"""


def test_a_training_asks_for_no_compiler_and_no_scipy_and_who_asks_has_the_real_ones() -> None:
    subprocess.run([sys.executable, "-c", TRAINED + ASKED], check=True)
