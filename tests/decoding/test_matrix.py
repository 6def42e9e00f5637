"""Every decoder on every causal family of transformers: plain's text, or a refusal that the documentation names."""

from __future__ import annotations

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .families import EXCLUDED, all_families
from .matrix import DECODERS, REASONS, SAME, Family, documented

FEW = ("bloom", "cohere2", "deepseek_v3", "gemma2", "gpt2", "gpt_oss", "lfm3", "llama", "mistral", "qwen2")


@pytest.mark.parametrize("name", FEW)
def test_a_family_of_the_commit_tier(name):
    family = Family(name)
    assert {decoder: family.cell(decoder) for decoder in DECODERS} == documented()[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in all_families() if name not in FEW])
def test_a_family(name):
    family = Family(name)
    assert {decoder: family.cell(decoder) for decoder in DECODERS} == documented()[name]


def test_the_table_is_complete_and_has_no_fault():
    table = documented()
    assert set(table) == set(all_families())
    assert set(table) | set(EXCLUDED) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert {cell for cells in table.values() for cell in cells.values()} <= {SAME, *REASONS}
