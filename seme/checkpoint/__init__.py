"""Checkpoints on disk: reading, writing, finding them."""

from seme.checkpoint.hub import ModelRef, local_path, locate, resolve, same_model
from seme.checkpoint.reader import Checkpoint
from seme.checkpoint.safetensors import Stored
from seme.checkpoint.writer import Layout, Writer, check_free, layout

__all__ = [
    "Checkpoint",
    "Layout",
    "ModelRef",
    "Stored",
    "Writer",
    "check_free",
    "layout",
    "local_path",
    "locate",
    "resolve",
    "same_model",
]
