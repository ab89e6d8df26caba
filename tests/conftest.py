"""Shared by all tests: reproducible property tests, and the folder of real data that some tests need.

HYPOTHESIS_PROFILE=random draws new examples on every run; the default draws the same ones everywhere.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("random", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
# threads beyond the cores that this process may use wait for each other at every product
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, cores))


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For tests of code that shares its work out to threads, also where the tests run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data() -> Path:
    """Real data: $MOONKIT_DATA, or ../shared/data beside the repository; tests skip where it is absent."""
    folder = Path(os.environ.get("MOONKIT_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}; set MOONKIT_DATA")
    return folder
