"""Shared by all tests: one torch thread, so that results do not depend on the machine's cores, no
deadlines for hypothesis, because they would time the machine, a cache of its own, and what workers
share out."""

import hypothesis
import pytest
import torch

from .checkpoints import tiny_checkpoint

__all__ = ["tiny_checkpoint"]

torch.set_num_threads(1)
hypothesis.settings.register_profile("petalnode", deadline=None)
hypothesis.settings.load_profile("petalnode")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Digests of files that tests make are not remembered in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Workers take whole files, whose fixtures are made once then; but all of tests/cli is one's.

    Those start swarms of real processes, which shall not meet another such swarm. They take the
    longest of all: in the order of collection they come first.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return "cli" if nodeid.startswith("tests/cli/") else nodeid.split("::")[0]

    config.option.loadscopereorder = False
    return ByFile(config, log)
