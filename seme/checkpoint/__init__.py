"""Checkpoints on disk: reading, writing, finding them."""

from seme.checkpoint.hub import ModelRef, identity, local_path, locate, resolve, same_model
from seme.checkpoint.reader import Checkpoint
from seme.checkpoint.safetensors import Stored
from seme.checkpoint.writer import Layout, Writer, beside, check_free, completed, layout, reserved, tidy

__all__ = [
    "Checkpoint",
    "Layout",
    "ModelRef",
    "Stored",
    "Writer",
    "beside",
    "check_free",
    "completed",
    "identity",
    "layout",
    "local_path",
    "locate",
    "reserved",
    "resolve",
    "same_model",
    "tidy",
]
