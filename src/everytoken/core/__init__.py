"""What every station uses: log-probabilities, traces, loading, seeding, errors.

Nothing here imports torch at import time.
"""
