"""Which layouts of several sequences a model reads exactly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from loku.data.packing import Layout, lay_out, to_device
from loku.evaluation.modes import evaluating
from loku.evaluation.token_tree import ATTENTION_SHARE, ERROR, SHARE, ancestor_mask, tree_support
from loku.losses.lm_head import HeadSpec, last_hidden_state, unwrapped

TINY = ([1, 2, 3, 4, 5, 6], [7, 2, 9], [2, 1, 2, 1])  # the flash check's sequences


def layout_of(model: nn.Module, head: HeadSpec) -> tuple[Layout, str | None]:
    """Return the best layout that a model reads exactly, and the reason where it is not the packed one.

    No list of architectures is trusted. Packed rows are token trees without branches, so `tree_support` tells; where
    attention is a flash kernel, which takes borders and no mask, packed sequences are compared with sequences read one
    by one. State-space models, ALiBi and positions that cannot be given are found out this way. Modes are restored.
    """
    balance = ATTENTION_SHARE * head.module.weight.shape[1]
    with evaluating(model):
        if _takes_borders(model):
            reason = _flash_disagreement(model, head)
            return Layout("padded" if reason else "flash", balance=balance), reason
        support = tree_support(model, head)
    if isinstance(support, str):
        return Layout("padded", balance=balance), support.replace("token tree", "packed row")
    return Layout("packed", support.longest, support.balance), None


def _takes_borders(model: nn.Module) -> bool:
    """Whether attention is a flash kernel."""
    return "flash" in str(getattr(unwrapped(model).config, "_attn_implementation", ""))


def model_inputs(block: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return what of a block (`lay_out`) goes into the model; the mask of packed rows is made here, on its device."""
    if "lasts" not in block:
        return block
    mask = ancestor_mask(block["lasts"], dtype)
    return {"input_ids": block["input_ids"], "position_ids": block["position_ids"], "attention_mask": mask}


def _flash_disagreement(model: nn.Module, head: HeadSpec) -> str | None:
    """Return how states of sequences side by side differ from those of each on its own, or None."""
    weight = head.module.weight

    def states(sequences: tuple[list[int], ...]) -> Tensor:
        (block,), _ = lay_out(sequences, Layout("flash"), 0)
        return last_hidden_state(model, to_device(block, weight.device), head)[0].float()

    try:
        with torch.no_grad():
            packed = states(TINY)
            alone = torch.cat([states((sequence,)) for sequence in TINY])
            mixed = states(([token for sequence in TINY for token in sequence],))
    except Exception as error:  # whatever a model's own code raises, the padded layout remains
        message = " ".join(str(error).split())[:200]
        return f"the check of its packed attention failed ({type(error).__name__}: {message})"
    off, effect, size = (float(x.abs().max()) for x in (packed - alone, mixed - alone, alone))
    exact = weight.dtype in (torch.float32, torch.float64)
    if effect > 0 and off <= SHARE * effect and (off <= ERROR * size or not exact):
        return None
    return f"its hidden states on packed sequences are not those of the sequences (off by {off:.1e} of {size:.1e})"
