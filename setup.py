"""Maps the three source trees into one package and compiles csrc/cpu. No torch and nothing CUDA at build time."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup
from setuptools.errors import CompileError, LinkError

ROOT = Path(__file__).parent
TREES = {"distilkernels": "python/distilkernels", "distilkernels.kernels": "kernels/distilkernels", "distilkernels.csrc": "csrc"}


def packages() -> list[str]:
    found = list(TREES)
    for name, folder in TREES.items():
        found += [f"{name}.{sub}" for sub in find_packages(str(ROOT / folder))]
    return found


class BuildExtension(build_ext):
    """Adds OpenMP where the compiler has it; without, the kernels run on one thread and say so."""

    def build_extensions(self) -> None:
        if self._links_openmp():
            for extension in self.extensions:
                extension.extra_compile_args += ["-fopenmp"]
                extension.extra_link_args += ["-fopenmp"]
        else:
            print("distilkernels: the compiler has no OpenMP; CPU kernels will run on one thread", file=sys.stderr)
        super().build_extensions()

    def _links_openmp(self) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=["-fopenmp"])
                self.compiler.link_executable(objects, str(Path(folder) / "probe"), extra_postargs=["-fopenmp"])
            except (CompileError, LinkError) as reason:
                print(f"distilkernels: OpenMP probe: {reason}", file=sys.stderr)
                return False
        return True


# one file per instruction set, a minute each
ParallelCompile(default=0).install()

extension = Pybind11Extension(
    "distilkernels._cpp",
    sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cpu").glob("*.cpp")),
    depends=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h")),
    include_dirs=["csrc/cpu"],
    cxx_std=17,
    # no contraction: a logit must round the same way wherever it is compared, so kernels write their fma's out
    extra_compile_args=["-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off"],
)

setup(
    package_dir=TREES,
    packages=packages(),
    package_data={"distilkernels.csrc": ["cuda/*.cu", "cuda/*.cuh", "*.h"], "distilkernels": ["py.typed"]},
    ext_modules=[extension] if extension.sources else [],
    cmdclass={"build_ext": BuildExtension},
)
