"""``everytoken try coin``: whole audits of honest and inflated jobs."""

from __future__ import annotations

import pytest

pytest.importorskip("cryptography")

from everytoken.audit import trial as module
from everytoken.audit.attacks import ATTACKS
from everytoken.audit.coin import CoIn
from everytoken.core.errors import BadInputError
from everytoken.decoding.trial import Trial, TrialRequest


@pytest.mark.slow
def test_a_trial(monkeypatch, tmp_path):
    """About 4 s."""
    monkeypatch.setattr(module, "LEARN", 12)
    monkeypatch.setattr(module, "JUDGE", 2)
    monkeypatch.setattr(module, "LENGTH", 64)
    result = module.trial(TrialRequest([Trial("coin", CoIn, {"block": 16})]))
    assert list(result.rows) == [module.BASELINE, "coin"]
    assert result.rows["coin"]["caught: copies"] == result.rows[module.BASELINE]["caught: copies"] == 1.0
    assert all(f"caught: {attack}" in result.rows["coin"] for attack in ATTACKS)
    assert 0 < result.rows["coin"]["share opened"] <= 0.4
    assert set(result.traces[0].columns) == set(module.trace_columns(None))
    (tmp_path / "short.txt").write_text("too short")
    for more in ({"model": "x"}, {"prompt": "x"}, {"data": str(tmp_path / "short.txt")}):
        with pytest.raises(BadInputError):
            module.trial(TrialRequest([Trial("coin", CoIn)], **more))
