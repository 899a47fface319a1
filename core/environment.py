"""What our processes tell the libraries below before those are imported."""

from __future__ import annotations

import os

LIBRARY_SETTINGS = {
    # Everything is read from this machine; nothing here may ask a hub, and only what the user sends leaves.
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "true",
}


def prepare_libraries() -> None:
    """Set the defaults of the libraries for this process and those it starts; what the user set stays."""
    for name, value in LIBRARY_SETTINGS.items():
        os.environ.setdefault(name, value)
