"""How tokens mix and route: networks as transformers models, and what their routers decide."""
