"""Greedy decoding of a batch with a key-value cache; rows that have ended make room."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from loku.losses.lm_head import unwrapped

Choice = Callable[[Tensor, Sequence[int]], Tensor]  # next tokens from logits (rows, vocabulary) and the prompts' places

KEPT_SHARE = 0.75  # ended rows are dropped once no more than this share is left: dropping copies the cache
TINY = ((1, 2, 3, 4, 5), (6, 4, 2))  # the check's prompts, and what follows each of them
TINY_NEXT = ((3, 1), (5, 2))
ERROR = 1e-4  # most that the check's logits may differ in float32, of their size
ERROR_HALF = 0.05  # likewise in half precision


class Decoder:
    """The state of a batch that is being decoded: its cache, and which positions of it are padding."""

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], pad_id: int) -> None:
        from transformers import DynamicCache

        self.model = model
        self.device = next(model.parameters()).device
        self.cache = DynamicCache(config=unwrapped(model).config)
        longest = max(map(len, prompts))
        self.mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=self.device)
        ids = torch.tensor([[pad_id] * (longest - len(row)) + list(row) for row in prompts], device=self.device)
        self.logits = self._run(ids, (self.mask.cumsum(dim=1) - 1).clamp(min=0))

    def feed(self, tokens: Int[Tensor, " rows"]) -> None:
        """Append one token to each row and compute the logits that follow it."""
        positions = self.mask.sum(dim=1, keepdim=True)
        self.mask = torch.cat([self.mask, torch.ones_like(positions)], dim=1)
        self.logits = self._run(tokens.to(self.device).unsqueeze(1), positions)

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Drop all other rows."""
        rows = rows.to(self.device)
        self.cache.batch_select_indices(rows)
        self.mask, self.logits = self.mask[rows], self.logits[rows]

    def _run(self, ids: Int[Tensor, "rows new"], positions: Int[Tensor, "rows new"]) -> Float[Tensor, "rows vocab"]:
        found = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return found.logits[:, -1]


def decode(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    stops: Sequence[int],
    pad_id: int,
    choose: Choice | None = None,
) -> list[list[int]]:
    """Continue each prompt by at most its limit (at least 1) of tokens, up to and without a stop token.

    Greedily, and the first of equally likely tokens is taken, as by `model.generate`; or by `choose`, which gets logits
    (rows x vocabulary) with the prompts' places and returns a token for each. The model must be one that
    `decodes_plainly`, in eval mode and without gradients.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    decoder = Decoder(model, prompts, pad_id)
    rows = list(range(len(prompts)))  # the prompt that each row of the cache continues
    alive = set(rows)
    while True:
        chosen = decoder.logits.argmax(dim=-1) if choose is None else choose(decoder.logits, rows)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if row not in alive:
                continue
            if token in stops:
                alive.discard(row)
                continue
            answers[row].append(token)
            if len(answers[row]) >= limits[row]:
                alive.discard(row)
        if not alive:
            return answers
        if len(alive) <= KEPT_SHARE * len(rows):
            kept = torch.tensor([place for place, row in enumerate(rows) if row in alive])
            rows = [row for row in rows if row in alive]
            decoder.keep(kept)
            chosen = chosen[kept.to(chosen.device)]
        decoder.feed(chosen)


def decodes_plainly(model: nn.Module) -> str | None:
    """Return why a model cannot be decoded by `decode`, or None when it can; `model.generate` always remains.

    Two tiny prompts of different length are decoded together by given tokens, one of them dropped on the way, and the
    logits must be those of whole sequences without a cache. The model must be in eval mode.
    """
    parameter = next(model.parameters())
    whole = [[*prompt, *more] for prompt, more in zip(TINY, TINY_NEXT, strict=True)]
    width = max(map(len, whole))
    try:
        with torch.no_grad():
            decoder = Decoder(model, TINY, 0)
            found = [(0, 0, decoder.logits[0]), (1, 0, decoder.logits[1])]
            decoder.feed(torch.tensor([row[0] for row in TINY_NEXT]))
            found += [(0, 1, decoder.logits[0]), (1, 1, decoder.logits[1])]
            decoder.keep(torch.tensor([1]))
            decoder.feed(torch.tensor([TINY_NEXT[1][1]]))
            found.append((1, 2, decoder.logits[0]))
            expected = model(
                input_ids=torch.tensor([row + [0] * (width - len(row)) for row in whole], device=parameter.device),
                attention_mask=torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in whole]).to(
                    parameter.device
                ),
                use_cache=False,
            ).logits.float()
        allowed = ERROR if parameter.dtype in (torch.float32, torch.float64) else ERROR_HALF
        for row, step, logits in found:
            plain = expected[row, len(TINY[row]) - 1 + step]
            error = float((logits.float() - plain).abs().max())
            if not error <= allowed * float(plain.abs().max()):
                return f"its logits differ with a cache (by {error:.1e})"
    except Exception as error:  # whatever a model's own code raises, model.generate remains
        message = " ".join(str(error).split())[:200]
        return f"the check of its cache failed ({type(error).__name__}: {message})"
    return None
