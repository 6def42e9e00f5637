"""An OpenAI-compatible server over any causal model of transformers, with the decoders and grammars of this house."""
