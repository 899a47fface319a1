"""Stored numbers decoded and encoded without torch, as torch does it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from expertctl.core.artefacts.numeric import DTYPES, decode, dtype_of_word, encode, is_finite
from expertctl.core.errors import UserError

KINDS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def numbers() -> torch.Tensor:
    """Return numbers of every size, ties between two bfloat16 values and infinities among them."""
    source = torch.Generator().manual_seed(0)
    scale = torch.tensor(10.0) ** torch.randint(-40, 38, (50_000,), generator=source)
    values = torch.randn(50_000, generator=source) * scale
    halves = torch.arange(0, 2**16, dtype=torch.int32) * 2**16 + 2**15
    ties = halves.view(torch.float32)
    return torch.cat([values, ties[torch.isfinite(ties)], torch.tensor([float("inf"), -float("inf"), 0.0, -0.0])])


@pytest.mark.parametrize("dtype", KINDS)
def test_encoding_rounds_as_torch_does(dtype: str) -> None:
    values = numbers()
    expected = values.to(KINDS[dtype]).view(torch.uint8).numpy()
    np.testing.assert_array_equal(encode(values.numpy(), dtype), expected)


@pytest.mark.parametrize("dtype", KINDS)
def test_decoding_gives_the_stored_numbers(dtype: str) -> None:
    stored = numbers().to(KINDS[dtype])
    raw = stored.view(torch.uint8).numpy().tobytes()
    decoded = decode(raw, dtype, tuple(stored.shape))
    expected = stored.double().numpy() if dtype == "F64" else stored.float().numpy()
    assert decoded.dtype == expected.dtype
    np.testing.assert_array_equal(decoded, expected)
    np.testing.assert_array_equal(encode(decoded, dtype).tobytes(), raw)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_not_a_number_stays_that(dtype: str) -> None:
    raw = encode(np.array([np.nan, 1.0], "f4"), dtype).tobytes()
    assert np.isnan(decode(raw, dtype, (2,))).tolist() == [True, False]


def test_integers_and_scratch_space() -> None:
    assert decode(np.array([3, -4], "<i8").tobytes(), "I64", (2,)).tolist() == [3, -4]
    scratch = np.empty(10, "<u4")
    raw = encode(np.array([1.5, 2.5], "f4"), "BF16").tobytes()
    decoded = decode(raw, "BF16", (2,), scratch)
    assert decoded.tolist() == [1.5, 2.5]
    assert np.shares_memory(decoded, scratch)


def test_dtypes_as_people_write_them() -> None:
    assert [dtype_of_word(word) for word in ("bfloat16", "bf16", "torch.float16", "F32")] == [
        "BF16",
        "BF16",
        "F16",
        "F32",
    ]
    with pytest.raises(UserError, match="'int4' is not a supported dtype"):
        dtype_of_word("int4")


@pytest.mark.parametrize("dtype", KINDS)
def test_every_nan_and_infinity_is_noticed(dtype: str) -> None:
    """All 8- and 16-bit patterns, or as many of the wider ones, one at a time."""
    bytes_each = DTYPES[dtype].num_bytes
    patterns = np.arange(2 ** min(8 * bytes_each, 16), dtype="<u8") << (8 * bytes_each - min(8 * bytes_each, 16))
    stored = torch.from_numpy(patterns.astype(f"<u{bytes_each}").view("u1")).view(KINDS[dtype])
    expected = torch.isfinite(stored.double() if dtype == "F64" else stored.float()).tolist()
    raw = stored.view(torch.uint8).numpy().tobytes()
    actual = [is_finite(raw[at : at + bytes_each], dtype) for at in range(0, len(raw), bytes_each)]
    assert actual == expected
    assert is_finite(b"", dtype)
    assert is_finite(b"\xff" * 8, "I64")
