"""The package: what is in the wheel and the sdist, the ways to build it, and what importing it costs.

Nothing here needs a network: builds run without isolation, on copies of the tree. The C++ sources are compiled
once, for the wheel that is built from the sdist, and without optimization, which takes the compiler most of its time;
the module that all other tests run is compiled with it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
IGNORED = (".git", ".venv*", ".*_cache", ".hypothesis", ".benchmarks", "build", "dist", "*.egg-info", "__pycache__")
LINUX = sys.platform == "linux"

COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler to build the wheel with")


BARE = ("-S",)
"""Without site-packages: an editable install of seme in there would answer for any seme that a test imports."""


def run(*arguments: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A new Python, without the variables that change a build, and without a network for pip."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SEME_", "CXX", "CUDA", "PYTHON"))}
    env |= {"PIP_NO_INDEX": "1", **variables}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def copy_tree(to: Path) -> Path:
    """The repository as a clone has it: nothing built."""
    return Path(shutil.copytree(ROOT, to, ignore=shutil.ignore_patterns(*IGNORED, "*.so", "*.pyd")))


def pip_wheel(tree: Path, to: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return run(
        *("-m", "pip", "wheel", "--verbose", "--no-build-isolation", "--no-deps", "--wheel-dir", to, "."),
        cwd=tree,
        **variables,
    )


@pytest.fixture(scope="session")
def quick(tmp_path_factory) -> dict[str, str]:
    """Variables of a build whose compiler does not optimize, whatever it is told."""
    script = tmp_path_factory.mktemp("compiler") / "quick-c++"
    script.write_text(
        f"""#!/bin/sh
for argument; do
    shift
    [ "$argument" = -O3 ] && argument=-O0
    set -- "$@" "$argument"
done
exec {COMPILER} "$@"
"""
    )
    script.chmod(0o755)
    return {"CXX": str(script)}


def unpack(wheels: Path) -> Path:
    """The only wheel in a folder, unpacked beside it: what an install puts into site-packages."""
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(wheels / "site")
    return wheels / "site"


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def compiled(files: Iterable[str]) -> set[str]:
    return {f for f in files if f.endswith((".so", ".pyd"))}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return copy_tree(tmp_path_factory.mktemp("source") / "tree")


@pytest.fixture(scope="module")
def built(tree, quick, tmp_path_factory) -> Path:
    """A folder with the sdist and the wheel made from it; a torch that cannot be imported stands in the way."""
    out = tmp_path_factory.mktemp("dist")
    trap = tmp_path_factory.mktemp("trap")
    (trap / "torch.py").write_text("raise RuntimeError('the build imported torch')\n")
    variables = {"SEME_NATIVE": "1", "SEME_CUDA": "0", "PYTHONPATH": str(trap), **quick}
    done = run("-m", "build", "--no-isolation", "--outdir", out, tree, cwd=out, **variables)
    assert done.returncode == 0, done.stdout
    return out


@pytest.fixture(scope="module")
def site(built) -> Path:
    return unpack(built)


@pytest.fixture(scope="module")
def pure(tree, tmp_path_factory) -> tuple[str, Path]:
    """pip's output and the unpacked wheel, built with a compiler that always fails."""
    out = tmp_path_factory.mktemp("pure")
    done = pip_wheel(tree, out, CXX=shutil.which("false") or "false", CUDACXX="no-such-nvcc")
    assert done.returncode == 0, done.stdout
    return done.stdout, unpack(out)


def test_package_list_is_the_folders():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in ROOT.glob("seme/**/__init__.py")}
    found |= {".".join(("seme", *p.parent.relative_to(ROOT).parts)) for p in ROOT.glob("kernels/**/__init__.py")}
    assert listed == sorted(found)


@needs_compiler
def test_wheel_holds_the_package_and_nothing_else(tree, site):
    expected = {f for f in names(tree) if f.startswith("seme/")}
    expected |= {f"seme/{f}" for f in names(tree) if f.startswith("kernels/")}
    found = {f for f in names(site) if ".dist-info/" not in f}
    assert found - compiled(found) == expected
    assert {f.partition(".")[0] for f in compiled(found)} == {"seme/_C"}
    metadata = {f.partition(".dist-info/")[2] for f in names(site)}
    assert {"entry_points.txt", "licenses/LICENSE", "METADATA", "RECORD"} <= metadata


@needs_compiler
def test_sdist_holds_all_that_a_build_and_a_test_need(tree, built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        found = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    made = {f for f in found if f in ("PKG-INFO", "setup.cfg") or f.startswith("seme.egg-info/")}
    kept_out = {f for f in names(tree) if f.startswith((".", "build/", "seme.egg-info/"))}
    assert found - made == names(tree) - kept_out
    assert not compiled(found)


@needs_compiler
def test_version_is_that_of_the_module(site):
    import seme

    (metadata,) = site.glob("*.dist-info/METADATA")
    assert f"\nVersion: {seme.__version__}\n" in metadata.read_text()


@needs_compiler
@pytest.mark.skipif(not LINUX, reason="reads ELF files")
def test_binaries_know_nothing_of_torch(site):
    modules = [*site.glob("seme/_C*.so"), *ROOT.glob("seme/_C*.so")]  # the latter: what is installed here, CUDA too
    assert modules
    for module in modules:
        dynamic = subprocess.run(["readelf", "-d", module], check=True, capture_output=True, text=True).stdout
        needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
        allowed = r"(libc|libm|libstdc\+\+|libgcc_s|libpthread|libdl|librt|ld-linux.*)\.so\.\d+"
        assert needed
        assert not [n for n in needed if not re.fullmatch(allowed, n)], module
        symbols = subprocess.run(["nm", "-DC", module], check=True, capture_output=True, text=True).stdout
        assert "PyInit__C" in symbols
        assert not re.search(r"torch|\bc10::|\bat::", symbols), module


def test_broken_compiler_gives_a_warning_and_pure_python(pure):
    output, site = pure
    assert re.search(r"warning: .*seme\._C was not built: CMake failed.*SEME_NATIVE=1 makes this an error", output)
    assert re.search(r"warning: .*seme\._C_cuda was not built: nvcc was not found.*SEME_CUDA=1 makes this", output)
    assert not compiled(names(site))
    why = "from seme import native; print(native.why_not('_C'))"
    done = run(*BARE, "-c", why, cwd=site, PYTHONPATH=str(site))
    assert done.stdout == "No module named 'seme._C'\n"


def test_strict_native_build_fails_with_a_broken_compiler(tree, tmp_path):
    done = pip_wheel(tree, tmp_path, CXX=shutil.which("false") or "false", SEME_NATIVE="1", SEME_CUDA="0")
    assert done.returncode != 0
    assert "error: seme._C was not built: CMake failed, see above\n" in done.stdout
    assert not list(tmp_path.iterdir())


def test_strict_cuda_build_fails_without_nvcc(tree, tmp_path):
    done = pip_wheel(tree, tmp_path, CUDACXX="no-such-nvcc", SEME_CUDA="1")
    assert done.returncode != 0
    assert "error: seme._C_cuda was not built: nvcc was not found" in done.stdout
    assert not list(tmp_path.iterdir())


def test_native_off_gives_a_wheel_for_every_machine(tree, tmp_path):
    done = pip_wheel(tree, tmp_path, SEME_NATIVE="0")
    assert done.returncode == 0, done.stdout
    assert [p.name.partition("-py3")[2] for p in tmp_path.iterdir()] == ["-none-any.whl"]
    assert not compiled(names(unpack(tmp_path)))


def test_switch_takes_three_values(tree, tmp_path):
    done = pip_wheel(tree, tmp_path, SEME_NATIVE="yes")
    assert done.returncode != 0
    assert "SEME_NATIVE='yes': expected 0, 1 or unset" in done.stdout


def stub_sources(tree: Path) -> None:
    """Replaces the C++ sources by an empty module, which compiles in a second or two."""
    shutil.rmtree(tree / "csrc" / "cpu")
    (tree / "csrc" / "bindings.cpp").write_text(
        '#include <pybind11/pybind11.h>\nPYBIND11_MODULE(_C, m) { m.attr("stub") = true; }\n'
    )


@needs_compiler
def test_failed_build_does_not_ship_the_module_of_an_earlier_one(quick, tmp_path):
    tree = copy_tree(tmp_path / "tree")
    stub_sources(tree)
    assert pip_wheel(tree, tmp_path / "first", SEME_CUDA="0", **quick).returncode == 0
    assert compiled(names(unpack(tmp_path / "first")))
    (tree / "csrc" / "bindings.cpp").write_text("not C++\n")
    assert pip_wheel(tree, tmp_path / "second", SEME_CUDA="0", **quick).returncode == 0
    assert not compiled(names(unpack(tmp_path / "second")))


WHERE = """
import importlib.util, sys, site
[site.addsitedir(folder) for folder in sys.argv[1:]]
import seme
print(importlib.util.find_spec("seme.kernels").origin)
import seme.kernels
"""


def kernels_of(cwd: Path, *sites: Path) -> Path:
    """The file of seme.kernels, for a Python started in `cwd` with `sites` as site-packages."""
    done = run(*BARE, "-c", WHERE, *sites, cwd=cwd)
    assert done.returncode == 0, done.stdout
    return Path(done.stdout.strip())


def test_kernels_of_a_wheel(pure, tmp_path):
    assert kernels_of(tmp_path, pure[1]) == pure[1] / "seme" / "kernels" / "__init__.py"


def test_kernels_of_a_wheel_with_python_started_in_the_checkout(pure):
    assert kernels_of(ROOT, pure[1]) == ROOT / "kernels" / "__init__.py"


def test_kernels_of_a_checkout_that_is_not_installed(tree):
    assert kernels_of(tree) == tree / "kernels" / "__init__.py"


def test_package_of_the_same_name_is_not_taken_for_ours(pure, tmp_path):
    """Hugging Face has a package named kernels; it lies beside an installed seme."""
    site = Path(shutil.copytree(pure[1], tmp_path / "site"))
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("raise RuntimeError('not ours')\n")
    assert kernels_of(tmp_path, site) == site / "seme" / "kernels" / "__init__.py"
    done = run(*BARE, "-c", "import seme; print(list(seme.__path__))", cwd=site)
    assert done.stdout == f"{[str(site / 'seme')]}\n"


EDITABLE = """
import sys
from setuptools.build_meta import build_editable
build_editable(sys.argv[1], {"editable_mode": sys.argv[2]})
"""


@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_kernels_of_an_editable_install(tmp_path, mode):
    tree = copy_tree(tmp_path / "tree")
    (tmp_path / "wheel").mkdir()
    done = run("-c", EDITABLE, tmp_path / "wheel", mode, cwd=tree, SEME_NATIVE="0")
    assert done.returncode == 0, done.stdout
    found = kernels_of(tmp_path, unpack(tmp_path / "wheel"))
    assert found.is_relative_to(tree)
    assert found.read_text() == (tree / "kernels" / "__init__.py").read_text()
    assert kernels_of(tree, tmp_path / "wheel" / "site").is_relative_to(tree)


@needs_compiler
def test_editable_install_puts_the_module_beside_its_sources(quick, tmp_path):
    tree = copy_tree(tmp_path / "tree")
    stub_sources(tree)
    (tmp_path / "wheel").mkdir()
    done = run("-c", EDITABLE, tmp_path / "wheel", "lenient", cwd=tree, SEME_NATIVE="1", SEME_CUDA="0", **quick)
    assert done.returncode == 0, done.stdout
    assert [f.partition(".")[0] for f in compiled(names(tree))] == ["seme/_C"]
    where = "import sys, site; site.addsitedir(sys.argv[1]); import seme._C; print(seme._C.stub, seme._C.__file__)"
    done = run(*BARE, "-c", where, unpack(tmp_path / "wheel"), cwd=tmp_path)
    assert done.stdout.startswith(f"True {tree / 'seme' / '_C'}")


HEAVY = ("torch", "numpy", "transformers", "triton", "safetensors", "huggingface_hub", "rich", "yaml")


@pytest.mark.parametrize(
    "code",
    [
        "import seme",
        "import seme, seme.ops, seme.methods",
        "from seme import cli; sys.argv = ['seme', '--help']; cli.main()",
    ],
    ids=["import", "ops-and-methods", "help"],
)
def test_import_is_light(code):
    """Under half a second and without the libraries that a merge on the CPU does not need."""
    watch = f"import atexit, sys; atexit.register(lambda: print('loaded', *[m for m in {HEAVY} if m in sys.modules]))"
    seconds = []
    for _ in range(5):  # the best of five, since the tests share the machine; an import of torch alone takes a second
        start = time.perf_counter()
        done = run("-c", f"{watch}\n{code}", cwd=ROOT)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stdout
        assert done.stdout.splitlines()[-1] == "loaded"
    assert min(seconds) < 0.5
