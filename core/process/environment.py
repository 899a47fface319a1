"""Settings of the libraries for models, made before they are imported: environment variables, and what may be logged."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

BARS_SETTING = "HF_HUB_DISABLE_PROGRESS_BARS"
OFFLINE_SETTING = "HF_HUB_OFFLINE"
OFFLINE_BY_DEFAULT = "EXPERTCTL_HUB_OFFLINE_BY_DEFAULT"
"""Set if HF_HUB_OFFLINE is ours, not the user's: commands that name a repository of the hub may then contact it."""
LIBRARY_SETTINGS = {
    # No library may contact a hub on its own.
    OFFLINE_SETTING: "1",
    BARS_SETTING: "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "true",
}


def prepare_libraries() -> None:
    """Set the defaults for this process and its children; variables that the user set are kept."""
    if not {OFFLINE_SETTING, "TRANSFORMERS_OFFLINE"} & os.environ.keys():
        os.environ[OFFLINE_BY_DEFAULT] = "1"
    for name, value in LIBRARY_SETTINGS.items():
        os.environ.setdefault(name, value)
    # PEFT imports it wherever it is installed, and it warns of kernels that it does without
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@contextmanager
def without_loading_bars() -> Iterator[None]:
    """Hide transformers' loading bars within the block and restore the previous setting afterwards.

    With HF_HUB_DISABLE_PROGRESS_BARS=0 the bars are shown. The setting is global to the process, so loads in
    several threads must take turns.
    """
    from transformers.utils import logging

    if os.environ.get(BARS_SETTING) == "0":
        yield
        return
    # not the public function, which would also reset the hub's own progress bar settings
    previous = logging._tqdm_active
    logging._tqdm_active = False
    try:
        yield
    finally:
        logging._tqdm_active = previous
