"""Packing loses nothing, mixes nothing, and refuses what does not fit.

pytest tests/moonvit/test_packing.py
"""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moonvit.packing import PackedPatches, pack, plan_packs

LENGTHS = st.lists(st.integers(1, 50), max_size=60)


@given(LENGTHS, st.integers(50, 120), st.integers(1, 6))
def test_every_item_lies_in_one_pack_within_the_budget(lengths: list[int], budget: int, open_packs: int) -> None:
    packs = list(plan_packs(lengths, budget, open_packs))
    assert sorted(index for each in packs for index in each) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in each) <= budget for each in packs)
    assert all(each == sorted(each) for each in packs)
    assert packs == list(plan_packs(iter(lengths), budget, open_packs))


@given(LENGTHS, st.integers(50, 120))
def test_one_open_pack_keeps_the_order(lengths: list[int], budget: int) -> None:
    packs = list(plan_packs(lengths, budget, open_packs=1))
    assert [index for each in packs for index in each] == list(range(len(lengths)))


@given(LENGTHS, st.integers(50, 120), st.integers(1, 6))
def test_no_two_neighbours_of_an_unbounded_plan_would_fit_together(
    lengths: list[int], budget: int, open_packs: int
) -> None:
    """With enough open packs no two packs could have been one, so at most one is less than half full."""
    used = [sum(lengths[i] for i in each) for each in plan_packs(lengths, budget, open_packs=1000)]
    assert sum(2 * size <= budget for size in used) <= 1


def test_packs_of_real_sizes_are_full() -> None:
    """Photos and charts of many sizes: eight open packs fill over 95 %, one alone does not."""
    draw = torch.Generator().manual_seed(0)
    lengths = (torch.randint(4, 40, (4000, 2), generator=draw) // 2 * 2).prod(1).tolist()
    filled = {}
    for open_packs in (1, 8):
        packs = list(plan_packs(lengths, 4096, open_packs))
        filled[open_packs] = sum(lengths) / (4096 * len(packs))
    assert filled[8] > 0.95 > filled[1], filled


def test_an_item_waits_a_bounded_time() -> None:
    seen: list[int] = []

    def arrivals() -> Any:
        for index in range(10_000):
            seen.append(index)
            yield 7

    for number, each in enumerate(plan_packs(arrivals(), 20, open_packs=4)):
        assert len(seen) - each[0] <= 4 * 2 + 1
        if number == 50:
            return


@pytest.mark.parametrize(
    ("lengths", "budget", "open_packs", "message"),
    [
        ([5, 101], 100, 8, "item 1 has 101 patches, more than the whole budget of 100"),
        ([5], 0, 8, "must be at least 1"),
        ([5], 10, 0, "must be at least 1"),
        ([3, 0], 10, 8, "item 1 has 0 patches"),
    ],
)
def test_what_cannot_fit_is_refused(lengths: list[int], budget: int, open_packs: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(plan_packs(lengths, budget, open_packs))


def test_packing_and_splitting() -> None:
    items = [PackedPatches(torch.randn(t * h * w, 3, 14, 14), torch.tensor([[t, h, w]])) for t, h, w in GRIDS]
    packed = pack(items)
    assert packed.lengths == [t * h * w for t, h, w in GRIDS]
    assert packed.tokens == [h * w // 4 for _, h, w in GRIDS]
    for before, after in zip(items, packed.split(), strict=True):
        assert torch.equal(before.pixels, after.pixels) and torch.equal(before.grid_thw, after.grid_thw)


GRIDS = [(1, 2, 4), (4, 6, 2), (3, 2, 2), (1, 8, 8)]
PIXELS = torch.zeros(8, 3, 14, 14)


@pytest.mark.parametrize(
    ("pixels", "grid", "message"),
    [
        (PIXELS, torch.tensor([[1, 2, 6]]), "describes 12 patches but pixels holds 8"),
        (PIXELS, torch.tensor([[1, 1, 8]]), "must be even"),
        (PIXELS, torch.tensor([[2, 2, 2], [0, 2, 2]]), "item 1 has grid 0x2x2"),
        (PIXELS, torch.tensor([[1, -2, -4]]), "every side must be at least 1"),
        (PIXELS, torch.tensor([1, 2, 4]), r"must be \(items, 3\)"),
        (PIXELS, torch.zeros(0, 3, dtype=torch.int64), "at least one item"),
        (PIXELS, torch.tensor([[1.0, 2.0, 4.0]]), "must be int64"),
        (PIXELS.to(torch.uint8), torch.tensor([[1, 2, 4]]), "floating point"),
        (PIXELS[:, :1], torch.tensor([[1, 2, 4]]), r"\(patches, 3, size, size\)"),
        (PIXELS[..., :7], torch.tensor([[1, 2, 4]]), r"\(patches, 3, size, size\)"),
        (PIXELS.numpy(), torch.tensor([[1, 2, 4]]), "needs two tensors"),
        (PIXELS, [[1, 2, 4]], "needs two tensors"),
    ],
)
def test_contradictions_are_refused(pixels: Any, grid: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedPatches(pixels, grid)


def test_packs_of_nothing_and_of_different_patch_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing to pack"):
        pack([])
    other = PackedPatches(torch.zeros(4, 3, 16, 16), torch.tensor([[1, 2, 2]]))
    with pytest.raises(ValueError, match="different sizes"):
        pack([PackedPatches(PIXELS, torch.tensor([[1, 2, 4]])), other])
