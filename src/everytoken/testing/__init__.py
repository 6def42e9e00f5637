"""Conformance batteries: what every implementation of a contract promises, as tests that other packages can run too.

A battery is a class of pytest tests. Inherit it and say what is to be tested::

    # tests/test_my_decoder.py of another package
    from everytoken.testing.decoder import DecoderConformance
    from mypackage import MyDecoder

    class TestMyDecoder(DecoderConformance):
        decoders = (MyDecoder,)

- ``decoder.DecoderConformance``: decoders (``everytoken.decoding.base``);
- ``canvas.CanvasConformance``: samplers that write in any order (``everytoken.decoding.canvas.base``);
- ``matcher.MatcherConformance``: matchers (``everytoken.decoding.matcher``);
- ``preference_loss.CHECKS``: functions that each check one promise of a loss (``everytoken.preference.base``);
- ``reducer.ReducerConformance``: reducers of visual tokens (``everytoken.reduction.base``);
- ``architecture.ArchitectureConformance``: networks of methods (``everytoken.architectures.base``);
- ``models``: tiny random models and a tokenizer to test with.

pytest is needed where a battery is imported, not for ``everytoken`` itself.
"""
