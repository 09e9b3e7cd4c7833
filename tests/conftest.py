"""Every test sees NaN-filled ``torch.empty`` and the same seed."""

import os
import sys

if "PYTEST_XDIST_WORKER" in os.environ:  # processes share the cores: a thread that spins takes its neighbour's (read when libgomp is loaded)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from distilkernels.backends import cpp

# Triton reads this once, when it is imported: decided here, before anything can.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def _nan_filled_and_seeded():
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(params=cpp.available_isas() if cpp._cpp is not None else [])
def isa(request):
    """Every instruction set of this machine, in force for the test."""
    best = cpp.isa()
    cpp.set_isa(request.param)
    yield request.param
    cpp.set_isa(best)


@pytest.fixture
def threads():
    """``torch.set_num_threads``, taken back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_report_header(config):
    import distilkernels
    from distilkernels import backends

    served = [name for name in backends.ORDER if backends.module(name).why_not("vocab_stats", torch.empty(1, 1, 8)) is None]
    return f"distilkernels {distilkernels.__version__}, Python {sys.version.split()[0]}, torch {torch.__version__}, backends: {', '.join(served)}"
