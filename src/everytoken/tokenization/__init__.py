"""Text to tokens: methods that change how text is cut. Contract: ``base.Retokenizer``."""
