"""The floor of everything that writes tokens: the Decoder contract, its loops, the Matcher protocol, trials."""
