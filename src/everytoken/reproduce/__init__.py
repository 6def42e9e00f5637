"""One experiment per paper: baseline and method in one run, against the paper's figure."""
