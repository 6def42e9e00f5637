"""What networks that draw images share: digits, tokenizers of images, guidance, adaptive norms, measures and pictures.

Images are ``[B, channels, height, width]`` with values from -1 (black) to 1 (white).
"""
