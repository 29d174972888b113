r"""Prompts as the field's clients read them: weights, and more than the 77 tokens that a text encoder takes at once.

    prompt = {text | "(" prompt [":" number] ")"}

`(words)` weighs 1.1, `(words:1.3)` what it says, and what is nested is multiplied; `\(`, `\)` and `\\` are the letters
themselves. As in ComfyUI, a weight w moves each of the words' embeddings z away from what the empty prompt has in that
place: z' = empty + w (z - empty); and a prompt goes on in further chunks of 75 tokens, no word of up to 8 tokens being
cut. The denoiser attends to the chunks one behind the other; the pooled embedding is that of the first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from finetune import families
from finetune.errors import Fault
from finetune.families import Conditions, Family, TakesTokens, zeroed

USUAL = 1.1
"""What parentheses without a number weigh"""
WHOLE = 8
"""Tokens of the longest word that is not cut where a chunk ends"""
ARGUMENTS = {"text": "prompt_embeds", "pooled": "pooled_prompt_embeds"}
"""What diffusers' pipelines call the conditions."""
SYMBOL = re.compile(r"\\[\\()]|[()]|[^\\()]+|\\")
SAID = re.compile(r"(?<!\\)\([^()]*:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)")
"""A weight with its number"""
NUMBER = re.compile(r"(.*):\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*", re.DOTALL)
Chunk = list[tuple[int, float]]
"""Tokens with their weights"""


@dataclass(frozen=True)
class Prompt:
    """A prompt as a family's tokenizers have it."""

    text: str
    """Without its marks"""
    weighted: bool
    chunks: tuple[list[Chunk], ...]
    """Of each tokenizer"""

    @property
    def length(self) -> int:
        """In chunks"""
        return max(len(chunks) for chunks in self.chunks)


def parse(prompt: str) -> list[tuple[str, float]]:
    """The prompt's texts with their weights. Raises Fault for parentheses that do not match."""
    open_: list[list[tuple[str, float]]] = [[]]
    for symbol in SYMBOL.findall(prompt):
        if symbol == "(":
            open_.append([])
        elif symbol != ")":
            open_[-1].append((symbol[-1] if symbol in (r"\(", r"\)", r"\\") else symbol, 1.0))
        elif len(open_) == 1:
            raise _unmatched(prompt, ")")
        else:
            inner, weight = _weight(open_.pop())
            open_[-1] += [(text, own * weight) for text, own in inner]
    if len(open_) > 1:
        raise _unmatched(prompt, "(")
    return _joined(open_[0])


def unweighted(family: Family, prompt: str) -> str:
    r"""The prompt of a family that knows no weights: as it is but for `\(`, `\)` and `\\`, which are the letters.

    Parentheses are a text's own there, and no tokens are counted. Raises Fault for `(words:1.2)`, which says a weight.
    """
    if found := SAID.search(prompt):
        raise Fault(
            f"prompt {prompt!r}: `{found[0]}` weighs words, which {family.title} does not know: its text encoders read "
            "sentences. Say it in words; for the letters themselves write `\\(`."
        )
    return re.sub(r"\\([\\()])", r"\1", prompt)


def read(family: Family, prompt: str) -> Prompt:
    """Raises Fault for parentheses that do not match, and for a family whose prompts are not put together of tokens."""
    if not isinstance(family, TakesTokens):
        raise Fault(f"{family.title} takes prompts as they are; this needs embeddings of single words, as CLIP gives.")
    parts = _parts(family, prompt)
    chunks = tuple(_chunks(family, tokenizer, parts) for tokenizer in families.tokenizers(family))
    text = "".join(text for text, _ in parts)
    return Prompt(text, any(weight != 1 for _, weight in parts), chunks)


def plain(family: Family, text: str) -> Prompt:
    """A prompt without marks: parentheses are the letters themselves."""
    chunks = tuple(
        _chunks(family, tokenizer, _spelled(family, [(text, 1.0)])) for tokenizer in families.tokenizers(family)
    )
    return Prompt(text, False, chunks)


def conditions(family: Family, prompts: Sequence[str]) -> Conditions:
    """What the denoiser is told of these, without marks: in one chunk as diffusers cuts them, or in the family's number
    of chunks, what is longer being cut and what is shorter filled up. Gradients flow as in `Family.encode_prompts`."""
    chunks = families.chunks(family)
    if chunks == 1:
        return family.encode_prompts(prompts)
    told = _stacked([_encoded(family, plain(family, prompt), chunks) for prompt in prompts])
    return zeroed(family.pipeline, prompts, told)


def is_read_otherwise(family: Family) -> bool:
    """Whether prompts are read in another way than the pipeline itself reads them."""
    return isinstance(family, TakesTokens) and (family.clip_skip != family.own_layer or family.chunks > 1)


def without_marks(family: Family, prompts: Sequence[str], negative: str) -> dict[str, Tensor]:
    """Prompts as they are, as embeddings that a pipeline takes."""
    positive, against = conditions(family, prompts), conditions(_unskipped(family), [negative] * len(prompts))
    return _named(positive, against)


def arguments(family: Family, prompts: Sequence[Prompt], negative: Prompt) -> dict[str, Any]:
    """The prompts as a pipeline takes them: as texts where it understands all of them as they are, else as embeddings.

    All must be of the same length, or none longer than the negative prompt.
    """
    if not is_read_otherwise(family) and not any(one.weighted or one.length > 1 for one in (*prompts, negative)):
        # SDXL takes no negative prompt and an empty one differently; no words mean none, as without the option.
        without = [negative.text] * len(prompts) if negative.text else None
        return {"prompt": [one.text for one in prompts], "negative_prompt": without}
    return embeddings(family, prompts, negative)


def embeddings(family: Family, prompts: Sequence[Prompt], negative: Prompt) -> dict[str, Tensor]:
    """The prompts as a pipeline takes them: as embeddings, all as long as the longest."""
    length = max(families.chunks(family), *(one.length for one in (*prompts, negative)))
    positive = _stacked([_encoded(family, one, length) for one in prompts])
    against = _stacked([_encoded(_unskipped(family), negative, length)] * len(prompts))
    return _named(positive, zeroed(family.pipeline, [negative.text] * len(prompts), against))


def _unskipped(family: Family) -> Family:
    """The same that reads its own layer: so diffusers reads the negative prompt, whatever its `clip_skip`."""
    made: Any = family
    return replace(made, clip_skip=made.own_layer) if isinstance(family, TakesTokens) else family


def _named(positive: Conditions, against: Conditions) -> dict[str, Tensor]:
    return {ARGUMENTS[name]: value for name, value in positive.items()} | {
        f"negative_{ARGUMENTS[name]}": value for name, value in against.items()
    }


def _parts(family: Family, prompt: str) -> list[tuple[str, float]]:
    """The texts with their weights, the words of textual inversions spelled as the tokenizers have them."""
    return _spelled(family, parse(prompt))


def _spelled(family: Family, parts: list[tuple[str, float]]) -> list[tuple[str, float]]:
    for word in sorted({word for tokenizer in families.tokenizers(family) for word in tokenizer.get_added_vocab()}):
        spelled, letters = re.compile(re.escape(word), re.IGNORECASE), word.replace("\\", r"\\")
        parts = [(spelled.sub(letters, text), weight) for text, weight in parts]
    return parts


def _weight(parts: list[tuple[str, float]]) -> tuple[list[tuple[str, float]], float]:
    """What stands between parentheses without the number at its end, and the number."""
    found = NUMBER.fullmatch(parts[-1][0]) if parts else None
    if found is None:
        return parts, USUAL
    return [*parts[:-1], (found[1], parts[-1][1])], float(found[2])


def _joined(parts: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Neighbours of the same weight as one."""
    joined: list[tuple[str, float]] = []
    for text, weight in parts:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        elif text:
            joined.append((text, weight))
    return joined


def places(family: Family, prompt: str) -> list[tuple[str, list[int]]]:
    """The prompt's words, and where in the embeddings that the denoiser attends to each has its tokens."""
    tokenizer = families.tokenizers(family)[0]
    words: list[tuple[str, list[int]]] = []
    chunks: list[Chunk] = [[]]
    for word, tokens in _laid_out(family, tokenizer, _parts(family, prompt), chunks):
        words.append((word, [chunk * tokenizer.model_max_length + 1 + place for chunk, place in tokens]))
    return words


def _chunks(family: Family, tokenizer: Any, parts: Sequence[tuple[str, float]]) -> list[Chunk]:
    chunks: list[Chunk] = [[]]
    for _ in _laid_out(family, tokenizer, parts, chunks):
        pass
    return chunks


def _laid_out(
    family: Family, tokenizer: Any, parts: Sequence[tuple[str, float]], chunks: list[Chunk]
) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Fill the chunks; gives each word with the chunks and places of its tokens."""
    room = tokenizer.model_max_length - 2
    for text, weight in parts:
        for word in text.split():
            vectors = family.pipeline.maybe_convert_prompt(word, tokenizer)  # textual inversions may be of several
            tokens, where = tokenizer(vectors, add_special_tokens=False).input_ids, []
            if room - len(chunks[-1]) < len(tokens) <= WHOLE:
                chunks.append([])
            for token in tokens:
                if len(chunks[-1]) == room:
                    chunks.append([])
                where.append((len(chunks) - 1, len(chunks[-1])))
                chunks[-1].append((token, weight))
            yield word, where


def _encoded(family: Family, prompt: Prompt, length: int) -> Conditions:
    """Conditions of one prompt, (1, length * 77, D) and (1, D): it is filled up with empty chunks, or cut."""
    assert isinstance(family, TakesTokens), "`read` has refused it"
    filled = [[*chunks[:length], *[[]] * (length - len(chunks))] for chunks in prompt.chunks]
    said = family.encode_tokens(_ids(family, filled))
    if prompt.weighted:
        empty = family.encode_tokens(_ids(family, [[[]]] * len(filled)))["text"]
        weights = _weights(filled[0], said["text"])
        said["text"] = torch.where(weights == 1, said["text"], empty + weights * (said["text"] - empty))
    return {name: value.flatten(0, 1)[None] if name == "text" else value[:1] for name, value in said.items()}


def _ids(family: Family, chunks: Sequence[Sequence[Chunk]]) -> list[Tensor]:
    """(chunks, 77) of each tokenizer: begin, tokens, end, and the padding that the tokenizer has."""
    found = []
    for tokenizer, own in zip(families.tokenizers(family), chunks, strict=True):
        rows = [[tokenizer.bos_token_id, *(token for token, _ in chunk), tokenizer.eos_token_id] for chunk in own]
        size, padding = tokenizer.model_max_length, tokenizer.pad_token_id
        found.append(torch.tensor([row + [padding] * (size - len(row)) for row in rows]))
    return found


def _weights(chunks: Sequence[Chunk], like: Tensor) -> Tensor:
    """(chunks, 77, 1): 1 at begin, end and padding."""
    weights = torch.ones(like.shape[:2])
    for row, chunk in enumerate(chunks):
        weights[row, 1 : 1 + len(chunk)] = torch.tensor([weight for _, weight in chunk])
    return weights[..., None].to(like.device, like.dtype)


def _stacked(conditions: Sequence[Conditions]) -> Conditions:
    return {name: torch.cat([one[name] for one in conditions]) for name in conditions[0]}


def _unmatched(prompt: str, which: str) -> Fault:
    other = "never closed" if which == "(" else "never opened"
    return Fault(f"prompt {prompt!r}: a `{which}` is {other}. For the letter itself write `\\{which}`.")
