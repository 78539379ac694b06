"""Triton kernels run in its interpreter where there is no GPU. It has to know before its first import."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config):
    config.addinivalue_line("markers", "large: needs tens of gigabytes")
