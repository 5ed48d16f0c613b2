"""Silence for libraries that talk while a verb works: what a person needs to know is printed by loku itself."""

from __future__ import annotations

import os
import warnings


def quiet_libraries() -> None:
    """Keep transformers, datasets and tokenizers from printing bars and advice. Errors still come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # PEFT 0.21 still asks transformers 5.23 by an old name; delete with a PEFT that does not.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
