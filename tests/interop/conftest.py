"""Talks with other libp2p implementations, downloaded ones: only ``make interop`` runs them."""

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    asked_for = any("interop" in argument for argument in config.args)
    return None if asked_for else True
