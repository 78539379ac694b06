"""Builds the two optional native modules with CMake; everything else is in pyproject.toml.

SEME_NATIVE  unset: build seme._C if a compiler is there, else install pure Python with a warning
             1: it must build; 0: do not build
SEME_CUDA    unset: build seme._C_cuda if nvcc is there, a failure is a warning; 1: it must build; 0: do not
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()


def switch(name: str) -> str:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        sys.exit(f"{name}={value!r}: expected 0, 1 or unset")
    return value


class CMakeExtension(Extension):
    def __init__(self, name: str, strict: bool, defines: list[str]) -> None:
        super().__init__(name, sources=[], optional=not strict)
        self.defines = defines


class CMakeBuild(build_ext):
    def build_extension(self, ext: CMakeExtension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(self.build_temp).resolve() / ext.name
        work.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(work), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSEME_OUTPUT_DIR={target.parent}",
            *ext.defines,
        ]  # fmt: skip
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(work)], check=True)
        except (subprocess.CalledProcessError, OSError) as e:
            # An error setuptools knows: it is fatal for a strict extension and a warning for an optional one.
            raise CompileError(f"building {ext.name} failed: {e}") from e


extensions = []
if switch("SEME_NATIVE") != "0":
    sanitize = os.environ.get("SEME_SANITIZE", "")
    extensions.append(CMakeExtension("seme._C", switch("SEME_NATIVE") == "1", [f"-DSEME_SANITIZE={sanitize}"]))
if switch("SEME_CUDA") == "1" or (switch("SEME_CUDA") == "" and shutil.which("nvcc")):
    extensions.append(CMakeExtension("seme._C_cuda", switch("SEME_CUDA") == "1", ["-DSEME_CUDA=ON"]))

setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})
