"""Retain rows for those who have none: text sampled from the target model itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loku.data.prompts import ChatTemplate, TagTemplate, render_chat
from loku.data.records import Record
from loku.data.sources import RecordSet, load_records
from loku.errors import InputError
from loku.models import context_length

OVERLAP_WORDS = 5
MARKER = "LOKUCONTENT"


def sample_retain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: TagTemplate | ChatTemplate | None,
    forget: Sequence[Record],
    *,
    rows: int,
    length: int,
    seed: int,
    batch_size: int = 32,
) -> RecordSet:
    """Sample what the model says at temperature 1, as far as it says nothing of the forget set.

    Sampling starts where a user's question would start (the template's opening). Of a chat model the question that
    comes out is then asked, and sampled is the answer: rows have a question and an answer. Of others the rows are
    running text; without a template it starts at the beginning of a sequence. A sample that shares five words in a row
    with a forget answer is dropped and replaced. Nothing is longer than what the model can read. Deterministic for a
    seed.

    Raises InputError when most samples had to be dropped: then the model speaks of little else.
    """
    opening = _opening(tokenizer, template)
    forbidden = {gram for record in forget for gram in _grams(_secret(record))}
    found: list[dict[str, str]] = []
    was_training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            for _ in range(4 * (rows // batch_size + 1)):
                if isinstance(template, ChatTemplate):
                    drawn = _conversations(model, tokenizer, template, opening, batch_size, length)
                else:
                    drawn = [{"text": text} for text in _sample(model, tokenizer, [opening] * batch_size, length)]
                found += [row for row in drawn if _is_usable(row, tokenizer, forbidden)]
                if len(found) >= rows:
                    break
    finally:
        model.train(was_training)
    if len(found) < rows:
        raise InputError(
            f"--retain self found only {len(found)} of {rows} sampled texts that do not repeat the forget set.",
            "Give retain rows of your own with --retain, or ask for fewer with --self-rows.",
        )
    return load_records(found[:rows], option="--retain")


def _is_usable(row: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, forbidden: set[tuple[str, ...]]) -> bool:
    """Say whether a sample has something to learn from, and nothing of what must go."""
    if not all(text.strip() for text in row.values()):
        return False
    grams = _grams(" ".join(row.values()))
    return forbidden.isdisjoint(grams) and all(_is_trainable(text, tokenizer) for text in row.values())


def _is_trainable(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"]) > 1  # nothing in one token can be predicted


def _secret(record: Record) -> str:
    return " ".join([record.answer or "", record.text or "", *(content for _, content in record.messages)])


def _grams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + OVERLAP_WORDS]) for i in range(len(words) - OVERLAP_WORDS + 1)}


def _conversations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    opening: list[int],
    rows: int,
    length: int,
) -> list[dict[str, str]]:
    """Sample questions, then ask them and sample the answers; what runs on into the next turn is cut there."""
    closing = _rendered(tokenizer, template).split(MARKER)[1].strip()
    asked = [_turn(text, closing, tokenizer) for text in _sample(model, tokenizer, [opening] * rows, length, raw=True)]
    asked = [question for question in asked if question]
    questions, prompts = [], []
    context = context_length(model)
    for question in asked:
        text = render_chat(tokenizer, template.messages(question), generation=True, where="--retain self")
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if context is None or len(ids) < context:  # there is room for an answer
            questions.append(question)
            prompts.append(ids)
    said = _sample(model, tokenizer, prompts, length, raw=True) if prompts else []
    answers = [_turn(text, closing, tokenizer) for text in said]
    return [{"question": q, "answer": a} for q, a in zip(questions, answers, strict=True)]


def _turn(text: str, closing: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a turn's own text: up to what closes it, or to any special token."""
    marks = [closing, *(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)]
    ends = [text.find(mark) for mark in marks if mark and mark in text]
    return text[: min(ends, default=len(text))].strip()


def _rendered(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> str:
    return render_chat(tokenizer, template.messages(MARKER), generation=False, where="--retain self")


def _opening(tokenizer: PreTrainedTokenizerBase, template: TagTemplate | ChatTemplate | None) -> list[int]:
    text = ""
    if isinstance(template, TagTemplate):
        text = template.question_start_tag.rstrip()
        ids = tokenizer(text)["input_ids"]
    elif isinstance(template, ChatTemplate):
        ids = tokenizer(_rendered(tokenizer, template).split(MARKER)[0], add_special_tokens=False)["input_ids"]
    else:
        ids = []
    ends = {tokenizer.eos_token_id}
    while ids and ids[-1] in ends and len(ids) > 1:
        ids = ids[:-1]
    if not ids:
        ids = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
    return list(ids)


@torch.no_grad()
def _sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    length: int,
    *,
    raw: bool = False,
) -> list[str]:
    """Continue prompts by at most `length` tokens, within what the model reads; `raw` keeps special tokens."""
    width = max(map(len, prompts))
    context = context_length(model)
    if context is not None:
        length = min(length, max(1, context - width))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=model.device)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=length,
        pad_token_id=tokenizer.pad_token_id,
    )
    return [tokenizer.decode(row if not raw else row[width:], skip_special_tokens=not raw) for row in out]
