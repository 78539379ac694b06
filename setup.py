"""Builds the two compiled modules with CMake; everything else is in pyproject.toml.

SEME_NATIVE  unset: build seme._C; a failure is a warning and the install goes on in pure Python
             1: it must build; 0: build nothing that is compiled (SEME_CUDA=1 excepted)
SEME_CUDA    unset: build seme._C_cuda; no nvcc or a failure is a warning; 1: it must build; 0: do not
SEME_SANITIZE  e.g. address,undefined: instrument seme._C

CMake's own variables are honoured: CXX, CXXFLAGS, CUDACXX, CUDAARCHS, CMAKE_BUILD_PARALLEL_LEVEL.
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
    """The value of a tri-state variable: "", "0" or "1"."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        sys.exit(f"{name}={value!r}: expected 0, 1 or unset")
    return value


def find_nvcc() -> str | None:
    """The CUDA compiler: $CUDACXX, else nvcc on PATH, else in $CUDA_HOME, $CUDA_PATH or /usr/local/cuda."""
    if os.environ.get("CUDACXX"):
        return shutil.which(os.environ["CUDACXX"])
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(f"{home}/bin" for home in homes if home))


class CMakeExtension(Extension):
    """A module that CMakeLists.txt knows how to build."""

    def __init__(self, name: str, variable: str) -> None:
        super().__init__(name, sources=[], optional=switch(variable) != "1")
        self.variable = variable


class CMakeBuild(build_ext):
    """Runs CMake once per module, so that a broken CUDA toolkit never costs the CPU kernels."""

    def build_extension(self, ext: CMakeExtension) -> None:
        """Build `ext`; a CompileError is fatal if its variable is 1, else setuptools turns it into a warning."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.unlink(missing_ok=True)  # build/ outlives a build: a failure must not ship the module of an earlier one
        try:
            self.cmake(ext, target)
        except (ImportError, OSError, subprocess.CalledProcessError) as e:
            reason = "CMake failed, see above" if isinstance(e, subprocess.CalledProcessError) else e
            remedy = f"; seme works without it, {ext.variable}=1 makes this an error" if ext.optional else ""
            raise CompileError(f"{ext.name} was not built: {reason}{remedy}") from e

    def cmake(self, ext: CMakeExtension, target: Path) -> None:
        """Configure and build the module at `target`."""
        import pybind11

        work = Path(self.build_temp).resolve() / ext.name
        work.mkdir(parents=True, exist_ok=True)
        defines = {
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "SEME_OUTPUT_DIR": str(target.parent),
            "SEME_SANITIZE": os.environ.get("SEME_SANITIZE", ""),
        }
        if ext.name == "seme._C_cuda":
            nvcc = find_nvcc()
            if nvcc is None:
                raise FileNotFoundError("nvcc was not found (in CUDACXX, PATH, CUDA_HOME, /usr/local/cuda)")
            defines |= {"SEME_CUDA": "ON", "CMAKE_CUDA_COMPILER": nvcc}
        # Scripts of a virtual environment that is not activated; in an isolated build pip has set PATH already.
        path = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
        program = shutil.which("cmake", path=path)
        if program is None:
            raise FileNotFoundError("cmake was not found")
        run = {"check": True, "env": {**os.environ, "PATH": path}}
        # --fresh: a cache of an earlier isolated build points at a ninja that is gone.
        configure = [program, "--fresh", "-G", "Ninja", "-S", str(ROOT), "-B", str(work)]
        subprocess.run([*configure, *(f"-D{name}={value}" for name, value in defines.items())], **run)
        subprocess.run([program, "--build", str(work)], **run)
        if not target.is_file():
            raise FileNotFoundError(f"CMake reported success, but {target} is not there")


extensions = []
if switch("SEME_CUDA") == "1" or (switch("SEME_CUDA") == "" and switch("SEME_NATIVE") != "0"):
    extensions.append(CMakeExtension("seme._C_cuda", "SEME_CUDA"))
if switch("SEME_NATIVE") != "0":
    extensions.append(CMakeExtension("seme._C", "SEME_NATIVE"))

setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})
