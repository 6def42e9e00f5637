"""One network for text in any order: masked diffusion, insertion and any-subset models share it."""
