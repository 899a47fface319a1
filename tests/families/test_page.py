"""docs/families.md has every family of the installed transformers that is a causal language model of text."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import transformers
from family_checks import CHECKS
from tiny_families import EXCLUDED, FAMILIES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
pytestmark = pytest.mark.skipif(
    f"transformers {transformers.__version__}," not in PAGE.read_text(encoding="utf-8"),
    reason="the page is of another version of transformers",
)


def test_every_model_type_is_tried_or_left_out_for_a_reason() -> None:
    assert not FAMILIES.keys() & EXCLUDED.keys()
    assert {*FAMILIES, *EXCLUDED} == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_the_page_is_printed_by_its_script(documented: dict[str, dict[str, str]]) -> None:
    specification = importlib.util.spec_from_file_location("page", Path(__file__).parent / "page.py")
    assert specification is not None
    assert specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    assert documented.keys() == FAMILIES.keys()
    assert all(cells.keys() == CHECKS.keys() for cells in documented.values())
    assert script.page(documented) == PAGE.read_text(encoding="utf-8")
