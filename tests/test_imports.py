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
stood = {name: sys.modules[name] for name in LATER if name in sys.modules}
assert all(isinstance(module, Later) for module in stood.values()), stood
assert LATER.keys() - stood.keys() <= {"torch.distributed.fsdp.wrap"}, LATER.keys() - stood.keys()
loaded = [name for name in sys.modules if name not in LATER]
left = ("scipy.linalg", "sympy", "torch._dynamo.", "torch._inductor", "torch._prims.", "torch._refs", "torch._decomp.",
        "torch.fx.experimental.symbolic_shapes", "torch.distributed.tensor.", "torch.distributed.fsdp.", "urllib3",
        "torch.distributed.elastic", "diffusers.models.transformers.ace_step_transformer")
assert not [name for name in loaded if name.startswith(left)], [name for name in loaded if name.startswith(left)]

weight = torch.nn.Parameter(torch.ones(3))
optimizer = torch.optim.AdamW([weight], lr=0.1)
weight.square().sum().backward()
optimizer.step()
assert weight.max() < 1
from accelerate.utils import is_compiled_module
assert not is_compiled_module(torch.nn.Linear(1, 1))
from torch.distributed.tensor import DTensor
assert not isinstance(weight, DTensor) and not isinstance(weight, (str, DTensor))
from transformers.distributed.utils import is_dtensor
assert not is_dtensor(weight)
assert {name: sys.modules[name] for name in stood} == stood
"""

ASKED = """
import diffusers
assert diffusers.AutoencoderKL is diffusers.models.autoencoders.AutoencoderKL
assert diffusers.models.transformers.FluxTransformer2DModel is diffusers.FluxTransformer2DModel
assert diffusers.models.autoencoders.VQModel.__module__ == "diffusers.models.autoencoders.vq_model"
assert isinstance(sys.modules["diffusers.models.autoencoders"], Later)
diffusers.models.autoencoders.autoencoder_kl
try:
    diffusers.models.autoencoders.nothing
except AttributeError:
    pass
else:
    raise AssertionError

import scipy.optimize, scipy.stats, transformers.loss.loss_for_object_detection as loss
assert scipy.optimize.minimize_scalar(lambda x: (x - 2) ** 2).x.round(3) == 2
assert [each.tolist() for each in loss.linear_sum_assignment([[1, 0], [0, 1]])] == [[0, 1], [1, 0]]
assert scipy.stats.beta.ppf(0.5, 1, 1) == 0.5

from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():  # LSTM's are among the operators that PyTorch follows in Python
    assert torch.nn.LSTM(2, 3)(torch.ones(4, 1, 2))[0].shape == (4, 1, 3)
assert torch._meta_registrations.activate_meta

import transformers.distributed.mixin as mixin
assert "colwise" in mixin.ALL_PARALLEL_STYLES and mixin.ALL_PARALLEL_STYLES["colwise"].input_layouts.is_replicate()
assert mixin.replace_layer_number_by_wildcard("layers.3.weight") == "layers.*.weight"
import torch.distributed.tensor.placement_types
from transformers.distributed.checkpoint import Shard, _StridedShard
assert torch.distributed.tensor.Shard is torch.distributed.tensor.placement_types.Shard
assert isinstance(torch.distributed.tensor.Shard(0), Shard)
assert not isinstance(torch.distributed.tensor.Shard(0), _StridedShard)
assert issubclass(torch.distributed.tensor.DTensor, DTensor) and Shard(1).dim == 1
class Own(DTensor):
    pass
assert issubclass(Own, torch.distributed.tensor.DTensor)

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
