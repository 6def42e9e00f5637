"""How tokens mix and route: networks as transformers models, one folder each."""
