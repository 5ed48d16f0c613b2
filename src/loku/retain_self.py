"""Retain rows for those who have none: text sampled from the target model itself."""

from __future__ import annotations

import re
from collections.abc import Sequence

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
    """Sample texts from the model, at temperature 1, that say nothing of the forget set.

    Sampling starts where a user's question would start (the template's opening), so that the texts are what the model
    says when asked; without a template it starts at the beginning of a sequence. A sample that shares five words in a
    row with a forget answer is dropped and replaced. No text is longer than what the model can read. Deterministic for
    a seed.

    Raises InputError when most samples had to be dropped: then the model speaks of little else.
    """
    start = _opening(tokenizer, template)
    context = context_length(model)
    if context is not None:
        length = min(length, max(1, context - len(start)))
    forbidden = {gram for record in forget for gram in _grams(_secret(record))}
    texts: list[str] = []
    was_training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            for _ in range(4 * (rows // batch_size + 1)):
                texts += [text for text in _sample(model, tokenizer, start, batch_size, length) if text.strip()]
                texts = [
                    text for text in texts if forbidden.isdisjoint(_grams(text)) and _is_trainable(text, tokenizer)
                ]
                if len(texts) >= rows:
                    break
    finally:
        model.train(was_training)
    if len(texts) < rows:
        raise InputError(
            f"--retain self found only {len(texts)} of {rows} sampled texts that do not repeat the forget set.",
            "Give retain rows of your own with --retain, or ask for fewer with --self-rows.",
        )
    return load_records([{"text": text} for text in texts[:rows]], option="--retain")


def _is_trainable(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"]) > 1  # nothing in one token can be predicted


def _secret(record: Record) -> str:
    return " ".join([record.answer or "", record.text or "", *(content for _, content in record.messages)])


def _grams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + OVERLAP_WORDS]) for i in range(len(words) - OVERLAP_WORDS + 1)}


def _opening(tokenizer: PreTrainedTokenizerBase, template: TagTemplate | ChatTemplate | None) -> list[int]:
    text = ""
    if isinstance(template, TagTemplate):
        text = template.question_start_tag.rstrip()
        ids = tokenizer(text)["input_ids"]
    elif isinstance(template, ChatTemplate):
        asked = [{"role": "user", "content": MARKER}]
        rendered = render_chat(tokenizer, asked, generation=False, where="--retain self")
        ids = tokenizer(rendered.split(MARKER)[0], add_special_tokens=False)["input_ids"]
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
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, start: list[int], rows: int, length: int
) -> list[str]:
    ids = torch.tensor([start] * rows, device=model.device)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length,
        pad_token_id=tokenizer.pad_token_id,
    )
    return [tokenizer.decode(row, skip_special_tokens=True) for row in out]
