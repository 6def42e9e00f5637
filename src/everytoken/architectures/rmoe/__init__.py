"""RMoE: a mixture of experts whose routers know the earlier layers' choices, as a transformers model."""
