"""Conversion between stored floating-point dtypes and float32 arrays with numpy alone.

Importing torch takes seconds and few tensor operations of a merge need it. numpy has no bfloat16, whose 16 bits are
the upper half of a float32; the rare 8-bit floats are converted by torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FLOATING = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_EIGHT_BITS = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_NUMPY = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
}
_BFLOAT16_NAN = 0x7FC0

_DTYPE_WORDS = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "fp32": "F32",
    "fp16": "F16",
    "bf16": "BF16",
}


def dtype_of_word(word: str) -> str:
    """Return safetensors' name of a dtype given as `bfloat16`, `fp16`, `F32` ...; raises `UserError` if unknown."""
    plain = word.removeprefix("torch.")
    if plain in FLOATING:
        return plain
    if plain.lower() in _DTYPE_WORDS:
        return _DTYPE_WORDS[plain.lower()]
    raise UserError(f"'{word}' is not a supported dtype; use one of {', '.join(list(_DTYPE_WORDS)[:4])}")


def working_dtype(dtype: str) -> str:
    """Return the dtype for computations on a stored dtype: float64 for F64, otherwise float32."""
    return "float64" if dtype == "F64" else "float32"


def decode(raw: Any, dtype: str, shape: tuple[int, ...], scratch: NDArray[np.uint32] | None = None) -> NDArray[Any]:
    """Decode the buffer `raw` into an array: floats as float32 or float64, integers unchanged.

    float32 and float64 results are views of the buffer, so the result must not be modified. `scratch`, an array of
    at least as many elements, receives a bfloat16 result and saves the allocation, which costs more than decoding.
    """
    import numpy as np

    if dtype == "BF16":
        bits = np.frombuffer(raw, "<u2")
        wide = np.empty(bits.size, "<u4") if scratch is None else scratch[: bits.size]
        np.copyto(wide, bits)
        np.left_shift(wide, 16, out=wide)
        return wide.view("<f4").reshape(shape)
    if dtype in _EIGHT_BITS:
        return np.asarray(_float8_values(dtype)[np.frombuffer(raw, "u1")]).reshape(shape)
    numbers: NDArray[Any] = np.frombuffer(raw, _NUMPY[dtype]).reshape(shape)
    return numbers.astype("<f4") if dtype == "F16" else numbers


def encode(numbers: NDArray[Any], dtype: str) -> NDArray[np.uint8]:
    """Encode an array as the bytes of a stored dtype, rounded to nearest (ties to even); shape (bytes,).

    Overflow becomes infinity, as in torch; NaN stays NaN.
    """
    import numpy as np

    flat = np.ascontiguousarray(numbers).reshape(-1)
    if dtype == "BF16":
        return _to_bfloat16(flat.astype("<f4", copy=False)).view("u1")
    if dtype in _EIGHT_BITS:
        return _to_float8(flat, dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        return flat.astype(_NUMPY[dtype], copy=False).view("u1")


def _to_bfloat16(numbers: NDArray[np.float32]) -> NDArray[np.uint16]:
    import numpy as np

    bits = numbers.view("<u4")
    rounded = np.right_shift(bits, 16)
    np.bitwise_and(rounded, 1, out=rounded)
    np.add(rounded, 0x7FFF, out=rounded)
    np.add(rounded, bits, out=rounded)
    np.right_shift(rounded, 16, out=rounded)
    halves: NDArray[np.uint16] = rounded.astype("<u2")
    is_nan = numbers != numbers
    if is_nan.any():
        halves[is_nan] = _BFLOAT16_NAN
    return halves


def _float8_values(dtype: str) -> NDArray[np.float32]:
    """Return the 256 values of an 8-bit floating-point dtype."""
    import torch

    codes = torch.arange(256, dtype=torch.uint8).view(getattr(torch, _EIGHT_BITS[dtype]))
    numbers: NDArray[np.float32] = codes.float().numpy()
    return numbers


def _to_float8(numbers: NDArray[Any], dtype: str) -> NDArray[np.uint8]:
    import numpy as np
    import torch

    kind = getattr(torch, _EIGHT_BITS[dtype])
    result: NDArray[np.uint8] = torch.from_numpy(np.array(numbers)).to(kind).view(torch.uint8).numpy()
    return result
