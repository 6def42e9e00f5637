"""Architectures: networks that change how tokens mix and route, each as a model of transformers.

A network is a folder ``NAME/`` with ``configuration_NAME.py`` and ``modeling_NAME.py``. Its classes register themselves
with transformers' Auto classes when they are imported; ``everytoken.load_model`` and ``load_tokenizer`` import them
where a folder asks for one, and ``everytoken.register_networks()`` imports all.
"""
