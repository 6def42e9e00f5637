"""The grammar engine: a grammar's automaton as tables, the masks of a vocabulary's tokens, and matchers that follow
texts.

``pushdown`` turns a grammar into ``tables``. The kernels run them: ``layout`` (how stacks lie in memory), ``run``
(following
bytes), ``analysis`` (which tokens are allowed), ``trie`` (the vocabulary). ``compiled``, ``compiler`` and
``matcher`` are what
users hold; ``reference`` says the same in plain Python and is what the kernels are tested against.

The engine imports ``grammar``; nothing in ``grammar`` imports the engine. This file imports nothing, so that a
``TokenizerInfo``
can be made without loading numba.
"""
