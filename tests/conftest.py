"""Shared by all tests: one torch thread, so that results do not depend on the machine's cores, and
no deadlines for hypothesis, because they would time the machine."""

import hypothesis
import torch

from .checkpoints import tiny_checkpoint

__all__ = ["tiny_checkpoint"]

torch.set_num_threads(1)
hypothesis.settings.register_profile("petalnode", deadline=None)
hypothesis.settings.load_profile("petalnode")
