"""Start-up: `import everytoken`, the command line's help, and loading the embedded model after first use.

Fresh processes.
"""

from __future__ import annotations

import statistics
import subprocess
import sys

from common import report
from everytoken.core.converted import embedded_folder

LOAD = """
import time, torch, transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM
began = time.perf_counter()
from everytoken.core.loading import load_model
load_model()
print(time.perf_counter() - began)
"""
IMPORT = "import time; began = time.perf_counter(); import everytoken; print(time.perf_counter() - began)"
CLI = "import time; began = time.perf_counter(); import everytoken.cli.app; print(time.perf_counter() - began)"
PEER = "import time; began = time.perf_counter(); import transformers, torch; print(time.perf_counter() - began)"


def median(code: str, repeats: int = 5) -> float:
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(repeats)
    ]
    return statistics.median(float(run.stdout.strip().splitlines()[-1]) for run in runs)


if __name__ == "__main__":
    embedded_folder()
    rows = [
        {"what": "import everytoken", "seconds": median(IMPORT), "goal": "under 1"},
        {"what": "import the command line", "seconds": median(CLI), "goal": ""},
        {"what": "import torch and transformers (peer)", "seconds": median(PEER), "goal": ""},
        {"what": "load the embedded model (libraries imported)", "seconds": median(LOAD), "goal": "under 2"},
    ]
    report("core", rows, "Medians of 5 fresh processes.")
