"""The canvas: text that is written in any order. See ``base`` for the contract, ``denoising`` for its main sampler."""
