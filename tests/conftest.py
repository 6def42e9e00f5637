"""Small real models: random Llamas of a few thousand weights, and the embedded model where it matters."""

from __future__ import annotations

import os

import pytest

from everytoken.core.converted import cache_dir

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# the converted model is shared by all tests, read-only, while each test's cache is its own; the first that needs it
# converts it
os.environ.setdefault("EVERYTOKEN_MODELS", str(cache_dir() / "models"))
# which way of running weights is chosen must not depend on the clock
os.environ.setdefault("EVERYTOKEN_CALIBRATE", "0")
# processes side by side: each on one thread, or their threads wait for each other
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

from everytoken.testing.models import tiny_llama as tiny_llama  # tests import it from here

# the first example may compile kernels; a commit is judged by the same examples every time, and
# EVERYTOKEN_EXPLORE=1 draws new ones
settings.register_profile("everytoken", deadline=None, derandomize=not os.environ.get("EVERYTOKEN_EXPLORE"))
settings.load_profile("everytoken")


def pytest_addoption(parser):
    group = parser.getgroup("everytoken")
    group.addoption(
        "--reproductions",
        choices=("all", "changed"),
        default="all",
        help="quick experiments and long pages: all of them, or those that the change since --since calls for",
    )
    group.addoption("--since", default="", help="a commit; empty or unknown: those whose turn it is")


def called_for(config, pages=(), tests=()):
    """Names of the methods whose quick experiments run, of the long pages, and of the rotating tests that run."""
    from .selection import changed_since, commits, long_pages, rotating, select

    since = config.getoption("--since")
    changed, turn = changed_since(since) if since else None, commits()
    return select(changed, turn), long_pages(changed, turn, pages), rotating(changed, turn, tests)


@pytest.hookimpl(tryfirst=True)  # before -m chooses by the marks
def pytest_collection_modifyitems(config, items):
    """Tests of the embedded model and rotating ones belong to the full tier; what a change does not call for is left
    out: experiments, long pages, rotating tests.
    """
    for item in items:
        if "embedded" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
    marked = {
        kind: {
            item: (*mark.args, item.nodeid)[0] for item in items if (mark := item.get_closest_marker(kind)) is not None
        }
        for kind in ("reproduction", "long_page", "rotating")
    }
    for item in marked["rotating"]:
        item.add_marker(pytest.mark.slow)
    if config.getoption("--reproductions") == "all" or not any(marked.values()):
        return
    pages, tests = (set(marked[kind].values()) for kind in ("long_page", "rotating"))
    chosen = set().union(*called_for(config, pages, tests))
    dropped = [item for named in marked.values() for item, name in named.items() if name not in chosen]
    items[:] = [item for item in items if item not in dropped]
    config.hook.pytest_deselected(items=dropped)


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--reproductions") == "changed" and not hasattr(config, "workerinput"):
        names, *_ = called_for(config)
        terminalreporter.write_line(f"quick experiments called for: {', '.join(sorted(names)) or 'none'}")


@pytest.fixture(scope="session")
def embedded():
    """The embedded model and its tokenizer (converted on first use)."""
    from everytoken.core.loading import load_model, load_tokenizer

    return load_model(), load_tokenizer()


@pytest.fixture(scope="session")
def embedded_tokenizer():
    from everytoken.core.loading import load_tokenizer

    return load_tokenizer()
