"""INT4 and FP8: compressed-tensors' own bytes and values; writing back is a fixed point.

pytest tests/lm/test_int4.py
"""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lm.fp8 import dequantize_fp8, quantize_fp8
from lm.int4 import (
    PackedLinear,
    dequantize_int4,
    pack_int4,
    quantize_int4,
    requantize_int4,
    unpack_int4,
)


def weight(rows: int = 24, columns: int = 96, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 99))
def test_packing_comes_back(rows: int, columns: int, seed: int) -> None:
    values = torch.randint(-8, 8, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack_int4(values)
    assert packed.dtype == torch.int32 and packed.shape == (rows, -(-columns // 8))
    assert torch.equal(unpack_int4(packed, columns), values)


def test_the_lowest_nibble_comes_first() -> None:
    assert pack_int4(torch.tensor([[-8, -7, 0, 0, 0, 0, 0, 7]], dtype=torch.int8)).item() == 0xF8888810 - 2**32


def arguments() -> Any:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    return quantization.QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)


def test_the_bytes_are_those_of_compressed_tensors() -> None:
    args = arguments()
    from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    w = weight()
    packed, scale = quantize_int4(w)
    groups = w.unflatten(1, (-1, 32))
    their_scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    assert torch.equal(scale, their_scale.bfloat16())
    # in float32: for a bfloat16 weight their division rounds once more, which moves a few values by one step
    theirs = quantize(w, scale.float(), zero, args, dtype=torch.int8)
    assert torch.equal(packed, pack_to_int32(theirs, 4))
    assert torch.equal(unpack_from_int32(packed, 4, w.shape), unpack_int4(packed, 96))
    assert torch.equal(dequantize_int4(packed, scale, 96), dequantize(theirs, scale, zero, args, dtype=torch.bfloat16))


@pytest.mark.parametrize("rule", ["minmax", "qat"])
@given(st.integers(0, 50), st.sampled_from([1e-6, 1.0, 300.0]))
def test_writing_back_is_a_fixed_point(rule: Any, seed: int, size: float) -> None:
    packed, scale = quantize_int4(weight(seed=seed) * size, rule=rule)
    again = requantize_int4(dequantize_int4(packed, scale, 96), scale)
    assert torch.equal(again, packed)


def test_every_stored_value_survives() -> None:
    """All sixteen nibbles under every bfloat16 scale that a checkpoint may hold."""
    bits = torch.arange(0x0080, 0x7F80 - 0x0400, dtype=torch.int32).to(torch.int16)  # positive, normal, 8x still finite
    scale = bits.view(torch.bfloat16)[:, None]
    values = torch.arange(-8, 8, dtype=torch.int8).repeat(2).expand(len(scale), 32)
    packed = pack_int4(values)
    assert torch.equal(requantize_int4(dequantize_int4(packed, scale, 32), scale), packed)


def test_rounding_error_is_half_a_step() -> None:
    w = weight()
    packed, scale = quantize_int4(w)
    error = (dequantize_int4(packed, scale.float(), 96) - w).abs().unflatten(1, (-1, 32))
    assert (error <= scale.float()[..., None] * 0.51 + 1e-6).float().mean() > 0.97  # 7.5 clips the largest a little
    assert error.max() <= scale.float().max() * 0.6


def test_zero_groups_stay_zero() -> None:
    packed, scale = quantize_int4(torch.zeros(4, 64))
    assert (dequantize_int4(packed, scale, 64) == 0).all() and (scale > 0).all()


def test_packed_linear_is_the_dense_one() -> None:
    layer = PackedLinear(96, 24)
    layer.weight_packed, layer.weight_scale = quantize_int4(weight())
    assert layer.weight_shape.tolist() == [24, 96]
    x = weight(5, 96, 1)
    assert torch.equal(layer(x), x @ layer.dequantize(torch.float32).T)
    exact = layer.weight_scale.clone()
    layer.to(torch.float16).to(torch.float32)
    assert torch.equal(layer.weight_scale, exact), "a cast must not touch the stored scale"
    assert layer.weight_packed.dtype == torch.int32
    assert sum(t.numel() * t.element_size() for t in layer.state_dict().values()) * 8 / (24 * 96) < 4.6


@pytest.mark.parametrize("shape", [(4, 33), (4,), (2, 4, 32)])
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        quantize_int4(torch.zeros(shape))
    with pytest.raises(ValueError, match="needs a multiple"):
        PackedLinear(33, 4)


# ---- FP8 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(128, 128), (300, 520), (5, 7), (576, 1)])
def test_fp8_blocks(shape: tuple[int, int]) -> None:
    w = weight(*shape)
    stored, scale = quantize_fp8(w)
    assert stored.dtype == torch.float8_e4m3fn and scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    found = dequantize_fp8(stored, scale)
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            block = (slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128))
            wanted = (stored[block].float() * scale[row, column]).to(found.dtype)
            assert torch.equal(found[block], wanted)
    assert (found.float() - w).abs().max() < 0.07 * w.abs().max()


def test_fp8_scale_of_another_matrix_is_refused() -> None:
    stored, _ = quantize_fp8(weight(300, 520))
    with pytest.raises(ValueError, match="scale"):
        dequantize_fp8(stored, torch.ones(2, 5))
