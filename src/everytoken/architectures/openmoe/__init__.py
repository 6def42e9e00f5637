"""OpenMoE: a mixture of experts with a capacity limit, as a transformers model."""
