"""OpenMoE: a mixture of experts with a capacity limit, as a transformers model."""

from .configuration_openmoe import OpenMoeConfig
from .modeling_openmoe import OpenMoeForCausalLM, OpenMoeModel

__all__ = ["OpenMoeConfig", "OpenMoeForCausalLM", "OpenMoeModel"]
