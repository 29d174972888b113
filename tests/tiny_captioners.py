"""Tiny random vision-language models of real classes: BLIP, which only describes; LLaVA, which is told what to do."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WORDS = ["red", "green", "blue", "cat", "dog", "toy", "small", "large", "on", "under", "the", "table"]
TEMPLATE = (
    "{% for m in messages %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>{% else %} {{ c.text }}{% endif %}{% endfor %}{% endfor %}"
)


def blip(folder: Path) -> Path:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    text = {
        "vocab_size": len(vocabulary), "hidden_size": 16, "encoder_hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64, "bos_token_id": 5,
        "eos_token_id": 3, "pad_token_id": 0, "sep_token_id": 3,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=_vision()))
    tokenizer = BertTokenizer(vocab=vocabulary, additional_special_tokens=["[DEC]", "[ENC]"])
    _save(model, BlipProcessor(BlipImageProcessorPil(size=_size()), tokenizer), folder)
    return folder


def llava(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", "<image>", *WORDS]
    plain = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    text = LlamaConfig(vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                       num_attention_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=2)  # fmt: skip
    config = LlavaConfig(vision_config=CLIPVisionConfig(**_vision()), text_config=text, image_token_id=3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    images = CLIPImageProcessorPil(size=_size(), crop_size=_size())
    processor = LlavaProcessor(
        images, tokenizer, patch_size=16, vision_feature_select_strategy="default", chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )  # fmt: skip
    _save(model, processor, folder)
    return folder


def _vision() -> dict[str, int]:
    return {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 32, "patch_size": 16, "projection_dim": 16}  # fmt: skip


def _size() -> dict[str, int]:
    return {"height": 32, "width": 32}


def _save(model: torch.nn.Module, processor: object, folder: Path) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
