"""everytoken: methods that treat each token of a language model as a decision, behind a few small contracts.

Importing this package loads neither torch nor transformers; names below are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "AWRS": "everytoken.constraints.awrs",
    "CallableConstraint": "everytoken.constraints.base",
    "Grammar": "everytoken.constraints.grammar",
    "GrammarCompiler": "everytoken.constraints.matcher",
    "GrammarLogitsProcessor": "everytoken.constraints.logits_processor",
    "GrammarMatcher": "everytoken.constraints.matcher",
    "StructuralTag": "everytoken.constraints.grammar",
    "TokenizerInfo": "everytoken.constraints.vocabulary",
    "XGrammar": "everytoken.constraints.xgrammar",
    "DySpec": "everytoken.generation.dyspec",
    "ImplicitReward": "everytoken.core.implicit_reward",
    "LinearDepth": "everytoken.generation.skipdecode",
    "QStarBeam": "everytoken.generation.qstar_beam",
    "R2R": "everytoken.generation.r2r",
    "SkipDecode": "everytoken.generation.skipdecode",
    "SkipDecodeCallback": "everytoken.generation.skipdecode",
    "TokenRouter": "everytoken.generation.routers.modeling_token_router",
    "TokenSelect": "everytoken.generation.tokenselect",
    "ByteEnsemble": "everytoken.tokenization.ensemble",
    "ByteLM": "everytoken.tokenization.byte_lm",
    "DynamicPrefill": "everytoken.tokenization.dynamic_prefill",
    "DynamicTokenizer": "everytoken.tokenization.dynamic_tokenization",
    "ExactBytes": "everytoken.tokenization.exact_bytes",
    "HyperEmbedding": "everytoken.tokenization.hyper",
    "LargeVocabulary": "everytoken.tokenization.large_vocabulary",
    "MeanEmbedding": "everytoken.tokenization.hyper",
    "SupertokenTrainer": "everytoken.tokenization.supertokens",
    "TokenAdapt": "everytoken.tokenization.tokenadapt",
    "TokenHealing": "everytoken.tokenization.token_healing",
    "StochasTok": "everytoken.tokenization.stochastok",
    "CDPOLoss": "everytoken.preference.cdpo",
    "ContrastiveEstimator": "everytoken.preference.cdpo",
    "ContrastivePromptRewards": "everytoken.preference.t_reg",
    "DPOLoss": "everytoken.preference.dpo",
    "IFTSettings": "everytoken.preference.ift",
    "IFTTrainer": "everytoken.preference.ift",
    "ModelLogps": "everytoken.preference.columns",
    "PreferenceTrainer": "everytoken.preference.trainer",
    "RTOConfig": "everytoken.reinforcement.rto",
    "RTOTrainer": "everytoken.reinforcement.rto",
    "RolloutOracle": "everytoken.preference.cdpo",
    "TDPOLoss": "everytoken.preference.tdpo",
    "TGDPOLoss": "everytoken.preference.tgdpo",
    "TREGLoss": "everytoken.preference.t_reg",
    "TokenTrace": "everytoken.core.trace",
    "load_draft": "everytoken.generation.drafts",
    "load_model": "everytoken.core.loading",
    "load_tokenizer": "everytoken.core.loading",
}
__all__ = ["__version__", *sorted(_EXPORTS)]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'everytoken' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
