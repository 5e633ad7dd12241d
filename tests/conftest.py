"""Shared by all tests: one torch thread, so that results do not depend on the machine's cores."""

import torch

from .checkpoints import tiny_checkpoint

__all__ = ["tiny_checkpoint"]

torch.set_num_threads(1)
