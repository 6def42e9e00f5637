"""Every decoder on every causal family of transformers: plain's text, or a refusal that the documentation names."""

from __future__ import annotations

import re

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .families import EXCLUDED, all_families
from .matrix import DECODERS, REASONS, SAME, TABLE, Family, documented

FEW = ("bloom", "cohere2", "deepseek_v3", "gemma2", "gpt2", "gpt_oss", "lfm3", "llama", "mistral", "qwen2")


@pytest.mark.parametrize("name", FEW)
def test_a_family_of_the_commit_tier(name):
    family = Family(name)
    assert {decoder: family.cell(decoder) for decoder in DECODERS} == documented()[name]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in all_families() if name not in FEW])
def test_a_family(name):
    family = Family(name)
    assert {decoder: family.cell(decoder) for decoder in DECODERS} == documented()[name]


def test_the_table_names_every_family_has_every_cell_and_no_fault():
    table, text = documented(), TABLE.read_text(encoding="utf-8")
    assert set(table) == set(all_families())
    assert all(set(cells) == set(DECODERS) for cells in table.values())
    assert {cell for cells in table.values() for cell in cells.values()} <= {SAME, *REASONS}
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text), name
    for name in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(EXCLUDED):
        assert name not in table
    for decoder in DECODERS:  # refusals are counted in it
        assert f" {sum(cells[decoder] != SAME for cells in table.values())} |" in text.split("refused of")[1]
    assert f"refused of {len(table)}" in text
