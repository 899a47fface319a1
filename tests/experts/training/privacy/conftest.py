"""Blocks of random tokens and tiny models, for private training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from expertctl.core.text.token_store import EncodedDocument, TokenBlocks, TokenStore, write_part

BLOCK = 16


@pytest.fixture
def blocks(tmp_path: Path) -> TokenBlocks:
    folder = tmp_path / "part"
    folder.mkdir()
    ids = np.random.default_rng(0).integers(1, 64, size=(40, 30)).tolist()
    write_part(folder, [EncodedDocument("x" * 30, row) for row in ids], separator=0, vocabulary=64)
    return TokenBlocks(TokenStore(folder), BLOCK)
