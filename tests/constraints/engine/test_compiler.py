"""The compiler: its cache, and threads that want the same grammar."""

from __future__ import annotations

import json
import threading

import pytest

import everytoken.constraints.engine.compiler as module
from everytoken.constraints import jit
from everytoken.constraints.engine.compiler import GrammarCompiler, warm_kernels
from everytoken.constraints.grammar import GrammarError
from everytoken.constraints.jit import kernels_kept
from everytoken.core.errors import BadInputError

from ..common import BYTES, PERSON


def test_the_compiler_caches_and_threads_share_one_compilation(info, monkeypatch):
    warm_kernels()  # a grammar of its own is compiled for it
    compiler = GrammarCompiler(info, cache_limit=2)
    made = []
    original = module.GrammarCompiler._compile
    monkeypatch.setattr(
        module.GrammarCompiler, "_compile", lambda self, grammar: made.append(1) or original(self, grammar)
    )
    results = []
    threads = [threading.Thread(target=lambda: results.append(compiler.compile_json_schema(PERSON))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and len({id(item) for item in results}) == 1
    compiler.compile_regex("a+")
    compiler.compile_grammar('root ::= "x"')
    assert compiler.compile_json_schema(json.loads(json.dumps(PERSON))) is not results[0]  # pushed out
    assert compiler.compile_builtin_json_grammar() is compiler.compile_builtin_json_grammar()
    compiler.clear_cache()
    with pytest.raises(GrammarError):
        compiler.compile_regex("(")
    assert not compiler._busy
    with pytest.raises(BadInputError, match="not JSON"):
        compiler.compile_json_schema({"a": object()})


def test_kernels_are_warmed_ahead_and_the_wait_is_said(monkeypatch, caplog):
    """After warming all kernels are known; where some are missing, the first grammar says what it waits for."""
    warm_kernels(background=True).join()
    assert kernels_kept()
    compiler = GrammarCompiler(BYTES, cache_limit=0)
    monkeypatch.setattr(module, "_prepared", threading.Event())
    monkeypatch.setattr(jit, "_announced", threading.Event())
    compiler.compile_regex("a")
    assert not caplog.records
    monkeypatch.setattr(module, "_prepared", threading.Event())
    monkeypatch.setattr(jit, "_announced", threading.Event())
    monkeypatch.setattr(jit, "kernels_kept", lambda: False)
    compiler.compile_regex("a")
    compiler.compile_regex("b")
    assert [record.message.startswith("Compiling the grammar engine's kernels") for record in caplog.records] == [True]
