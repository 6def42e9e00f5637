"""The next token: decoders callable as transformers' ``custom_generate``. Contract: ``base.Decoder``."""
