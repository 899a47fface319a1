"""Conversion between stored floating-point dtypes and float32 arrays with numpy alone.

Importing torch takes seconds and few tensor operations of a merge need it. numpy has no bfloat16, whose 16 bits are
the upper half of a float32; the rare 8-bit floats are converted by torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Dtype:
    """One dtype of safetensors files."""

    torch: str
    """torch's name."""
    num_bytes: int
    """Bytes per element."""
    numpy: str | None
    """numpy's code; None if numpy has no such dtype."""
    is_floating: bool = False
    words: tuple[str, ...] = ()
    """Names in settings, the preferred one first."""


DTYPES = {
    "F64": Dtype("float64", 8, "<f8", True, ("float64",)),
    "F32": Dtype("float32", 4, "<f4", True, ("float32", "fp32")),
    "F16": Dtype("float16", 2, "<f2", True, ("float16", "fp16")),
    "BF16": Dtype("bfloat16", 2, None, True, ("bfloat16", "bf16")),
    "F8_E4M3": Dtype("float8_e4m3fn", 1, None, True),
    "F8_E5M2": Dtype("float8_e5m2", 1, None, True),
    "I64": Dtype("int64", 8, "<i8"),
    "I32": Dtype("int32", 4, "<i4"),
    "I16": Dtype("int16", 2, "<i2"),
    "I8": Dtype("int8", 1, "i1"),
    "U64": Dtype("uint64", 8, "<u8"),
    "U32": Dtype("uint32", 4, "<u4"),
    "U16": Dtype("uint16", 2, "<u2"),
    "U8": Dtype("uint8", 1, "u1"),
    "BOOL": Dtype("bool", 1, "?"),
}
"""All dtypes, by safetensors' name."""
FLOATING = tuple(name for name, dtype in DTYPES.items() if dtype.is_floating)
_BFLOAT16_NAN = 0x7FC0
_BLOCK = 1 << 14
"""Numbers that are rounded at a time: memory that is allocated anew for more of them costs more than rounding."""


def dtype_of_word(word: str) -> str:
    """Return safetensors' name of a dtype given as `bfloat16`, `fp16`, `F32` ...; raises `UserError` if unknown."""
    plain = word.removeprefix("torch.")
    for name in FLOATING:
        if plain == name or plain.lower() in DTYPES[name].words:
            return name
    known = ", ".join(dtype.words[0] for dtype in DTYPES.values() if dtype.words)
    raise UserError(f"'{word}' is not a supported dtype; use one of {known}")


_EXPONENT_BITS = {
    "F64": ("<u8", 0x7FF << 52),
    "F32": ("<u4", 0xFF << 23),
    "F16": ("<u2", 0x1F << 10),
    "BF16": ("<u2", 0xFF << 7),
    "F8_E4M3": ("u1", 0x7F),
    "F8_E5M2": ("u1", 0x1F << 2),
}
"""Bits that are all set only in infinities and NaN, as (type of a stored number, mask)."""


def is_finite(raw: Any, dtype: str) -> bool:
    """Return whether the buffer `raw` of stored numbers contains neither NaN nor infinity; integers never do."""
    import numpy as np

    if dtype not in _EXPONENT_BITS or not len(raw):
        return True
    kind, mask = _EXPONENT_BITS[dtype]
    return int((np.frombuffer(raw, kind) & mask).max()) != mask


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
    if DTYPES[dtype].numpy is None:
        import torch

        codes = torch.arange(256, dtype=torch.uint8).view(getattr(torch, DTYPES[dtype].torch))
        return np.asarray(codes.float().numpy()[np.frombuffer(raw, "u1")]).reshape(shape)
    numbers: NDArray[Any] = np.frombuffer(raw, DTYPES[dtype].numpy).reshape(shape)
    return numbers.astype("<f4") if dtype == "F16" else numbers


def encode(numbers: NDArray[Any], dtype: str) -> NDArray[np.uint8]:
    """Encode an array as bytes, (bytes,), rounded to nearest even; overflow becomes infinity, NaN stays NaN."""
    import numpy as np

    flat = np.ascontiguousarray(numbers).reshape(-1)
    if dtype == "BF16":
        return _to_bfloat16(flat.astype("<f4", copy=False)).view("u1")
    if DTYPES[dtype].numpy is None:
        import torch

        kind = getattr(torch, DTYPES[dtype].torch)
        return np.asarray(torch.from_numpy(flat.copy()).to(kind).view(torch.uint8).numpy())
    with np.errstate(over="ignore", invalid="ignore"):
        return flat.astype(DTYPES[dtype].numpy, copy=False).view("u1")


def _to_bfloat16(numbers: NDArray[np.float32]) -> NDArray[np.uint16]:
    import numpy as np

    bits = numbers.view("<u4")
    halves: NDArray[np.uint16] = np.empty(bits.size, "<u2")
    scratch = np.empty(min(_BLOCK, bits.size), "<u4")
    for begin in range(0, bits.size, _BLOCK):
        block = bits[begin : begin + _BLOCK]
        rounded = np.right_shift(block, 16, out=scratch[: block.size])
        np.bitwise_and(rounded, 1, out=rounded)
        np.add(rounded, 0x7FFF, out=rounded)
        np.add(rounded, block, out=rounded)
        halves[begin : begin + _BLOCK] = rounded.view("<u2")[1::2]
    is_nan = numbers != numbers
    if is_nan.any():
        halves[is_nan] = _BFLOAT16_NAN
    return halves
