"""Shared by the tests of train/: one thread."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads cost small models more than they bring, and on a busy machine they wait for each other for minutes.

    The loop also sets a mode that other tests do not want.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
