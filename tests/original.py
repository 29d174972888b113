"""Stable Diffusion 1.x, 2.x and SDXL checkpoints in the original layout (one file), written from a diffusers pipeline.

The names are those of the CompVis and Stability-AI code: UNet blocks counted through, VAE attention as 1x1
convolutions, SDXL's second text encoder as OpenCLIP names it.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
UNET = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}


def _unet_name(name: str) -> str:
    for ours, theirs in UNET.items():
        if name.startswith(ours + "."):
            return theirs + _resnet_part(name[len(ours) :])
    block = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)(.*)", name)
    assert block, name
    way, i, kind, j, rest = block[1], int(block[2]), block[3], int(block[4]), block[5]
    place = 3 * i + j + (way == "down")
    blocks = "input_blocks" if way == "down" else "output_blocks"
    if kind == "resnets":
        return f"{blocks}.{place}.0{_resnet_part(rest)}"
    if kind == "attentions":
        return f"{blocks}.{place}.1{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{3 * i + 3}.0.op{rest.removeprefix('.conv')}"
    return f"output_blocks.{3 * i + 2}.{{up{i}}}.conv{rest.removeprefix('.conv')}"


def _resnet_part(rest: str) -> str:
    part, _, leaf = rest.lstrip(".").rpartition(".")
    return f".{RESNET.get(part, part)}.{leaf}" if part else f".{leaf}"


def _unet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The upsampler's place in its block depends on whether the block has attention."""
    named = {}
    for name, value in state.items():
        new = _unet_name(name)
        if up := re.search(r"\{up(\d+)\}", new):
            attends = any(key.startswith(f"up_blocks.{up[1]}.attentions") for key in state)
            new = new.replace(up[0], "2" if attends else "1")
        named[f"model.diffusion_model.{new}"] = value
    return named


def _vae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    levels = 1 + max(int(m[1]) for name in state if (m := re.match(r"decoder\.up_blocks\.(\d+)", name)))
    named = {}
    for name, value in state.items():
        new = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", new)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = new.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
        new = new.replace("conv_shortcut", "nin_shortcut")
        if "attn_1" in new:
            for ours, theirs in ATTENTION.items():
                new = new.replace(f"attn_1.{ours}.", f"attn_1.{theirs}.")
            value = value[:, :, None, None] if value.ndim == 2 else value
        named[f"first_stage_model.{new}"] = value
    return named


def _clip(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}text_model.{name.removeprefix('text_model.')}": value for name, value in state.items()}


def _open_clip(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """SD 2's has no projection, and transformers calls its parts without `text_model.`"""
    state = {name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": value
             for name, value in state.items()}  # fmt: skip
    named = {
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "ln_final.weight": state["text_model.final_layer_norm.weight"],
        "ln_final.bias": state["text_model.final_layer_norm.bias"],
    }
    if "text_projection.weight" in state:
        named["text_projection"] = state["text_projection.weight"].T.contiguous()
    layers = 1 + max(int(m[1]) for name in state if (m := re.search(r"layers\.(\d+)", name)))
    parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj"}  # fmt: skip
    for i in range(layers):
        ours, theirs = f"text_model.encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for leaf in ("weight", "bias"):
            fused = [state[f"{ours}self_attn.{p}_proj.{leaf}"] for p in "qkv"]
            named[f"{theirs}attn.in_proj_{leaf}"] = torch.cat(fused)
            named |= {f"{theirs}{new}.{leaf}": state[f"{ours}{old}.{leaf}"] for old, new in parts.items()}
    return {prefix + name: value for name, value in named.items()}


def save(pipeline: DiffusionPipeline, file: Path) -> Path:
    """One file that holds the UNet, the VAE and the text encoders."""
    tensors = _unet(pipeline.unet.state_dict()) | _vae(pipeline.vae.state_dict())
    if hasattr(pipeline, "text_encoder_2"):
        tensors |= _clip(pipeline.text_encoder.state_dict(), "conditioner.embedders.0.transformer.")
        tensors |= _open_clip(pipeline.text_encoder_2.state_dict(), "conditioner.embedders.1.model.")
    elif pipeline.text_encoder.config.hidden_size == 1024:  # SD 2
        tensors |= _open_clip(pipeline.text_encoder.state_dict(), "cond_stage_model.model.")
    else:
        tensors |= _clip(pipeline.text_encoder.state_dict(), "cond_stage_model.transformer.")
    save_file({name: value.contiguous() for name, value in tensors.items()}, file)
    return file
