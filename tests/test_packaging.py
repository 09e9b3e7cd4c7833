"""sdist → wheel → install, with no torch at build time and no OpenMP where the compiler has none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler")


def run(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory):
    """An environment in which ``import torch`` fails, as in a build."""
    folder = tmp_path_factory.mktemp("shadow")
    (folder / "torch.py").write_text("raise ImportError('the build must not need torch')\n")
    return os.environ | {"PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory, without_torch):
    """The source archive of the files that git tracks, built from a copy so that no stray build output helps."""
    source, out = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("sdist")
    ignore = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", "demo-output", ".hypothesis", "results")
    shutil.copytree(ROOT, source, ignore=ignore)
    run([sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(out), str(source)], env=without_torch)
    (archive,) = out.glob("*.tar.gz")
    return archive


def unpacked(sdist, folder: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data") if sys.version_info >= (3, 12) else archive.extractall(folder)
    (tree,) = folder.iterdir()
    return tree


def wheel_of(tree: Path, out: Path, env: dict) -> Path:
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(tree)], env=env)
    (wheel,) = out.glob("*.whl")
    return wheel


USE = """
    import sys, torch
    sys.path.insert(0, {path!r})
    import distilkernels as dk
    assert dk.__file__.startswith({path!r}), dk.__file__
    import distilkernels.kernels, distilkernels.csrc
    from distilkernels import backends
    cpp = backends.module("cpp")
    z = torch.randn(3, 999, requires_grad=True)
    teacher = dk.capture_topk(torch.randn(3, 999), 7)
    a = dk.topk_distill_loss(z, teacher, backend="cpp")
    b = dk.topk_distill_loss(z, teacher, backend="reference")
    torch.testing.assert_close(torch.autograd.grad(a, z), torch.autograd.grad(b, z))
    print("openmp", cpp.openmp())
"""


def use(wheel: Path, folder: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    # not in site-packages order: the test process has the package installed in editable mode
    return run([sys.executable, "-c", textwrap.dedent(USE).format(path=str(folder))], cwd=folder)


def test_wheel_from_sdist(sdist, tmp_path, without_torch):
    wheel = wheel_of(unpacked(sdist, tmp_path / "tree"), tmp_path / "out", without_torch)
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in ("distilkernels/__init__.py", "distilkernels/py.typed", "distilkernels/primitives/vocab_stats.py",
                   "distilkernels/kernels/vocab_stats.py", "distilkernels/cli/capture.py", "distilkernels/csrc/__init__.py",
                   "distilkernels/csrc/philox.h", "distilkernels/csrc/cuda/topk_select.cu", "distilkernels/csrc/cuda/ptx.cuh"):  # fmt: skip
        assert wanted in names
    assert any(n.startswith("distilkernels/_cpp.") and n.endswith(".so") for n in names)
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert not any(n.startswith(("tests/", "benchmarks/", "kernels/", "csrc/")) for n in names)
    metadata = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert "Requires-Dist: torch>=2.6" in metadata and "License-Expression: Apache-2.0" in metadata
    for extra in ("triton", "cuda", "transformers", "capture", "test", "bench"):
        assert f"Provides-Extra: {extra}" in metadata
    assert "openmp True" in use(wheel, tmp_path / "installed")


def test_a_compiler_without_openmp(sdist, tmp_path, without_torch):
    """The build says so, succeeds, and the kernels run on one thread. Compiled without optimisation, which is not what is tested here."""
    compiler = shutil.which("c++") or shutil.which("g++")
    wrapper = tmp_path / "c++"
    wrapper.write_text(f'#!/bin/sh\nfor a in "$@"; do [ "$a" = "-fopenmp" ] && {{ echo "no OpenMP" >&2; exit 1; }}; done\nexec {compiler} "$@" -O0\n')
    wrapper.chmod(0o755)
    env = without_torch | {"CC": str(wrapper), "CXX": str(wrapper), "LDSHARED": f"{wrapper} -shared", "LDCXXSHARED": f"{wrapper} -shared"}
    wheel = wheel_of(unpacked(sdist, tmp_path / "tree"), tmp_path / "out", env)
    assert "openmp False" in use(wheel, tmp_path / "installed")
