"""The last word of a passage, as LAMBADA asks for it (Paperno et al. 2016, arXiv 1606.06031), on rows of one's own."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from loku.data.encoding import Encoder
from loku.data.prompts import TagTemplate
from loku.data.sources import RecordSet
from loku.errors import InputError
from loku.evaluation.probing import plain_set
from loku.evaluation.results import SetResults
from loku.evaluation.scoring import BATCH_TOKENS, score
from loku.models import check_fits


def measure_cloze(
    model: nn.Module,
    tokenizer: Any,
    rows: RecordSet,
    *,
    max_length: int,
    seed: int = 42,
    batch_tokens: int = BATCH_TOKENS,
) -> SetResults:
    """Return `accuracy`: the share of rows all of whose completion's tokens are the model's first choice.

    Teacher-forced, which is the same as greedy decoding here: up to the first miss both read the same tokens. The end
    of sequence does not count. `probability` is exp(mean log p) of the completion's tokens.

    Raises InputError for rows that are not prompt/completion, and for prompts that leave no room for the completion.
    """
    encoder = Encoder(tokenizer, TagTemplate(), max_length=max_length)
    examples = []
    for row in rows:
        if not row.verbatim:
            raise InputError(
                f"Row {row.index} of '{rows.name}' is no cloze.", "Give rows of prompt/completion: passage, last word."
            )
        example = encoder.encode(row, "The cloze rows:")[0]
        if len(example.input_ids) >= max_length:
            raise InputError(
                f"Row {row.index} of '{rows.name}' is longer than {max_length} tokens.", "Raise max_length."
            )
        examples.append(example)
    check_fits(model, tokenizer, max(len(example.input_ids) for example in examples))
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    scores = score(model, examples, pad_id=pad_id, eos_ids=(tokenizer.eos_token_id,), batch_tokens=batch_tokens)
    numbers = []
    for found in scores:
        logprobs = found.logprobs[found.answer]
        accuracy, probability = float(found.answer_hits.all()), math.exp(float(logprobs.mean()))
        numbers.append({"index": found.index, "accuracy": accuracy, "probability": probability})
    return plain_set(numbers, ("accuracy", "probability"), seed)
