"""Every decoder on every causal family of transformers: plain's text, or a refusal that the documentation names."""

from __future__ import annotations

import re

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .families import EXCLUDED, all_families
from .matrix import DECODERS, REASONS, SAME, TABLE, UNTRIED, Family, documented

FEW = ("bloom", "cohere2", "deepseek_v3", "gemma2", "gpt2", "gpt_oss", "lfm3", "llama", "mistral", "qwen2")


@pytest.mark.parametrize("name", FEW)
def test_a_family_of_the_commit_tier(name):
    family = Family(name)
    cells = {decoder: family.cell(decoder) for decoder in DECODERS}
    assert cells == cells | tried(name)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in all_families() if name not in FEW])
def test_a_family(name):
    family = Family(name)
    cells = {decoder: family.cell(decoder) for decoder in DECODERS}
    assert set(cells.values()) <= {SAME, *REASONS}
    assert cells == cells | tried(name)


def tried(name):
    """A family's cells of the documentation's table, but for those that it says were not tried."""
    return {decoder: cell for decoder, cell in documented().get(name, {}).items() if cell != UNTRIED}


def test_the_table_names_every_family_and_has_no_fault():
    table, text = documented(), TABLE.read_text(encoding="utf-8")
    assert set(FEW) <= set(table) <= set(all_families())
    assert {cell for cells in table.values() for cell in cells.values()} <= {SAME, UNTRIED, *REASONS}
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text), name
    for name in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(EXCLUDED):
        assert name not in table
    assert f"refused of {len(table)}" in text
