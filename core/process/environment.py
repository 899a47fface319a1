"""What our processes tell the libraries below before those are imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

BARS_SETTING = "HF_HUB_DISABLE_PROGRESS_BARS"
LIBRARY_SETTINGS = {
    # Everything is read from this machine; nothing here may ask a hub, and only what the user sends leaves.
    "HF_HUB_OFFLINE": "1",
    BARS_SETTING: "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "true",
}


def prepare_libraries() -> None:
    """Set the defaults of the libraries for this process and those it starts; what the user set stays."""
    for name, value in LIBRARY_SETTINGS.items():
        os.environ.setdefault(name, value)


@contextmanager
def without_loading_bars() -> Iterator[None]:
    """Keep transformers' loading bars off the screen for the block; what the user had comes back after it.

    Someone who asked for bars with HF_HUB_DISABLE_PROGRESS_BARS=0 keeps them. The setting is one for the process,
    so loads in several threads should take turns.
    """
    from transformers.utils import logging

    if os.environ.get(BARS_SETTING) == "0":
        yield
        return
    # not by its public switch, which would also forget which of the hub's bars the user had on
    before = logging._tqdm_active
    logging._tqdm_active = False
    try:
        yield
    finally:
        logging._tqdm_active = before
