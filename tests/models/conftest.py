"""Fixtures of the tests of models."""

from .hub_fixtures import hub, repo

__all__ = ["hub", "repo"]
