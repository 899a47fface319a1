"""Our reader and writer against the safetensors library, and against files that are damaged in every way."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from expertctl.core.artefacts.safetensors_io import (
    Checkpoint,
    checkpoint_files,
    dtype_name,
    new_file,
    read_header,
    tensor_bytes,
    tensor_digest,
    torch_dtype,
    write_tensors,
)
from expertctl.core.errors import UserError

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


def some_tensors() -> dict[str, torch.Tensor]:
    """One tensor of every dtype, and the shapes that are easy to get wrong."""
    source = torch.Generator().manual_seed(3)
    tensors = {
        f"of.{str(dtype).removeprefix('torch.')}": torch.randint(0, 2, (3, 5), generator=source).to(dtype)
        for dtype in DTYPES
    }
    return tensors | {
        "random": torch.randn(7, 3, generator=source),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "bf16": torch.randn(9, generator=source).to(torch.bfloat16),
        "not.contiguous": torch.randn(4, 6, generator=source).T,
        "größe": torch.ones(1),
    }


def assert_same(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        assert bytes(tensor_bytes(actual[name])) == bytes(tensor_bytes(tensor)), name


def read_all(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.read(name) for name in checkpoint}


# --- against the library ---


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in some_tensors().items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same(read_all(Checkpoint.of_folder(tmp_path)), tensors)


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model.safetensors", some_tensors())
    assert_same(load_file(tmp_path / "model.safetensors"), some_tensors())


def test_a_header_says_what_the_tensors_are_without_reading_them(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model.safetensors", some_tensors())
    entries = read_header(tmp_path / "model.safetensors")
    for name, tensor in some_tensors().items():
        entry = entries[name]
        assert (torch_dtype(entry.dtype), entry.shape) == (tensor.dtype, tuple(tensor.shape))
        assert entry.num_bytes == tensor.numel() * tensor.element_size()


def test_data_begins_at_a_multiple_of_eight_as_the_format_asks(tmp_path: Path) -> None:
    for length in range(9):
        write_tensors(tmp_path / "model.safetensors", {"n" * (length + 1): torch.ones(2)})
        (entry,) = read_header(tmp_path / "model.safetensors").values()
        assert entry.begin % 8 == 0


def test_a_read_tensor_is_in_memory_of_its_own(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model.safetensors", {"a": torch.zeros(4)})
    checkpoint = Checkpoint.of_folder(tmp_path)
    checkpoint.read("a").add_(1)
    assert checkpoint.read("a").sum() == 0


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda name: name != "__metadata__"
)
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@given(st.dictionaries(names, st.tuples(st.sampled_from(DTYPES), shapes), max_size=5), st.integers(0, 2**32 - 1))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_written_tensors_are_read_back_bit_by_bit(
    tmp_path: Path, kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]], seed: int
) -> None:
    """Random bits, so that NaNs with payloads and denormals are among the numbers."""
    source = random.Random(seed)
    tensors = {}
    for name, (dtype, shape) in kinds.items():
        count = torch.Size(shape).numel()
        if dtype == torch.bool or not count:
            tensors[name] = torch.zeros(shape, dtype=dtype)
        else:
            raw = bytearray(source.randbytes(count * dtype.itemsize))
            tensors[name] = torch.frombuffer(raw, dtype=torch.uint8).view(dtype).reshape(shape)
    digests = write_tensors(tmp_path / "model.safetensors", tensors)
    checkpoint = Checkpoint([tmp_path / "model.safetensors"])
    assert_same(read_all(checkpoint), tensors)
    assert checkpoint.digests() == digests
    assert_same(load_file(tmp_path / "model.safetensors"), tensors)


# --- digests ---


def test_a_digest_is_sha256_over_dtype_shape_and_bytes() -> None:
    tensor = torch.tensor([[1.0, 2.0, 3.0]])
    expected = hashlib.sha256(b"F32:1,3:" + struct.pack("<3f", 1, 2, 3)).hexdigest()
    assert tensor_digest(tensor) == expected


def test_digests_are_the_same_in_memory_and_in_files_however_they_are_sharded(tmp_path: Path) -> None:
    tensors = some_tensors()
    in_memory = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    assert write_tensors(tmp_path / "model.safetensors", tensors) == in_memory
    in_order = list(tensors)
    for part, chosen in enumerate((in_order[:5], in_order[5:])):
        write_tensors(tmp_path / f"part-{part}.safetensors", {name: tensors[name] for name in chosen})
    assert Checkpoint([tmp_path / "model.safetensors"]).digests() == in_memory
    assert Checkpoint(sorted(tmp_path.glob("part-*"))).digests() == in_memory


def test_digests_tell_dtype_shape_and_order_of_numbers_apart() -> None:
    zeros = torch.zeros(2, 4)
    alike = [zeros, zeros.reshape(4, 2), zeros.reshape(8), zeros.to(torch.int32), torch.zeros(2, 2, 2)]
    assert len({tensor_digest(tensor) for tensor in alike}) == len(alike)


def test_large_tensors_are_hashed_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertctl.core.artefacts.safetensors_io.CHUNK_BYTES", 7)
    tensor = torch.randn(11, 3)
    write_tensors(tmp_path / "model.safetensors", {"a": tensor})
    checkpoint = Checkpoint.of_folder(tmp_path)
    assert [len(chunk) for chunk in checkpoint.chunks("a")] == [7] * 18 + [6]
    assert checkpoint.digest("a") == tensor_digest(tensor)


def test_every_dtype_that_can_be_written_has_a_name() -> None:
    assert {torch_dtype(dtype_name(dtype)) for dtype in DTYPES} == set(DTYPES)
    with pytest.raises(UserError, match="complex64"):
        dtype_name(torch.complex64)


# --- writing ---


def write_all(path: Path, shapes: Any, tensors: Any) -> dict[str, str]:
    with new_file(path, shapes) as file:
        for name, tensor in tensors:
            file.add(name, tensor)
    return file.digests()


def test_tensors_are_written_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    shapes_of = {f"t{index}": ("F32", (2,)) for index in range(3)}
    digests = write_all(path, shapes_of, ((name, torch.full((2,), float(name[1]))) for name in shapes_of))
    assert load_file(path)["t2"].tolist() == [2, 2]
    assert digests == Checkpoint([path]).digests()


@pytest.mark.parametrize(
    "tensors",
    [
        [],
        [("a", torch.ones(3))],
        [("b", torch.ones(2))],
        [("a", torch.ones(2).half())],
        [("a", torch.ones(2))] * 2,
    ],
    ids=["none", "shape", "name", "dtype", "too many"],
)
def test_a_file_other_than_announced_is_never_left_behind(tmp_path: Path, tensors: Any) -> None:
    with pytest.raises((AssertionError, KeyError), match=r"announced|b"):
        write_all(tmp_path / "model.safetensors", {"a": ("F32", (2,))}, tensors)
    assert list(tmp_path.iterdir()) == []


def test_failing_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"a": torch.ones(2)})

    def failing() -> Any:
        yield "a", torch.zeros(2)
        raise UserError("the second cannot be read")

    with pytest.raises(UserError, match="second"):
        write_all(path, {"a": ("F32", (2,)), "b": ("F32", (2,))}, failing())
    assert load_file(path)["a"].tolist() == [1, 1]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


# --- damage ---


def raw_file(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """Write a file with any header: text, bytes, or what JSON can say."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + data)
    return path


def entry(begin: Any, end: Any, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    write_tensors(whole, {"a": torch.randn(3), "b": torch.randn(2, 2), "c": torch.empty(0)})
    content = whole.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for size in range(len(content)):
        cut.write_bytes(content[:size])
        with pytest.raises(UserError, match=r"cut\.safetensors is damaged: .*; download or create it again"):
            read_header(cut)


def test_bytes_too_many_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"a": torch.randn(3)})
    with path.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(UserError, match=r"it has [\d,]+ bytes, its header requires"):
        read_header(path)


GARBAGE = {
    "no json": (b"{not json}", b""),
    "no utf-8": (b'{"\xff": 1}', b""),
    "a list": ([], b""),
    "a number": (3, b""),
    "a number without end": (b"1" * 5000, b""),
    "brackets without end": (b"[" * 100_000, b""),
    "record is a number": ({"a": 5}, b""),
    "record is a list": ({"a": [0, 8]}, b""),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, b"x" * 8),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, b"x" * 8),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, b"x" * 8),
    "offsets are words": ({"a": entry("0", "8")}, b"x" * 8),
    "offsets are fractions": ({"a": entry(0.0, 8.0)}, b"x" * 8),
    "three offsets": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, b"x" * 8),
    "shape is a number": ({"a": entry(0, 8, shape=2)}, b"x" * 8),
    "shape has words": ({"a": entry(0, 8, shape=["2"])}, b"x" * 8),
    "shape has fractions": ({"a": entry(0, 8, shape=[2.0])}, b"x" * 8),
    "shape is negative": ({"a": entry(0, 8, shape=[-1, -2])}, b"x" * 8),
    "shape is larger than the data": ({"a": entry(0, 8, shape=[4])}, b"x" * 8),
    "shape is smaller than the data": ({"a": entry(0, 8, shape=[1])}, b"x" * 8),
    "dtype is a list": ({"a": entry(0, 8, dtype=["F32"])}, b"x" * 8),
    "begin after end": ({"a": entry(8, 0)}, b"x" * 8),
    "before the data": ({"a": entry(-8, 0)}, b""),
    "beyond the file": ({"a": entry(0, 1 << 60, shape=[1 << 58])}, b"x" * 8),
    "gap": ({"a": entry(0, 8), "b": entry(12, 20)}, b"x" * 20),
    "gap at the beginning": ({"a": entry(4, 12)}, b"x" * 12),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, b"x" * 12),
    "the same bytes twice": ({"a": entry(0, 8), "b": entry(0, 8)}, b"x" * 8),
}


@pytest.mark.parametrize("case", GARBAGE)
def test_a_header_that_makes_no_sense_is_refused(tmp_path: Path, case: str) -> None:
    path = raw_file(tmp_path / "model.safetensors", *GARBAGE[case])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        Checkpoint([path])


@pytest.mark.parametrize("length", [1 << 20, 1 << 40, 1 << 62, (1 << 64) - 1])
def test_a_header_length_beyond_the_file_is_refused_without_reading(tmp_path: Path, length: int) -> None:
    path = raw_file(tmp_path / "model.safetensors", {}, length=length)
    with pytest.raises(UserError, match="its header is truncated, or it is not a safetensors file"):
        read_header(path)


def test_a_shape_of_thousands_of_dimensions_is_refused_at_once(tmp_path: Path) -> None:
    """Their product alone would take minutes."""
    path = tmp_path / "x.safetensors"
    header = json.dumps({"w": {"dtype": "F32", "shape": [10**18] * 100_000, "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(UserError, match="has 100,000 dimensions"):
        read_header(path)


def test_a_dtype_that_is_not_known_is_named(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "model.safetensors", {"a": entry(0, 8, dtype="F33")}, b"x" * 8)
    with pytest.raises(UserError, match=r"model\.safetensors: tensor 'a' has unsupported dtype F33"):
        read_header(path)


def test_an_empty_checkpoint_and_metadata_are_fine(tmp_path: Path) -> None:
    assert read_header(raw_file(tmp_path / "a.safetensors", {})) == {}
    assert read_header(raw_file(tmp_path / "b.safetensors", {"__metadata__": {"format": "pt"}})) == {}


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"a": torch.randn(300)})
    checkpoint = Checkpoint([path])
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="ends within tensor 'a'"):
        checkpoint.read("a")
    with pytest.raises(UserError, match="ends within tensor 'a'"):
        checkpoint.digest("a")


def test_an_unknown_tensor_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model.safetensors", {"model.norm.weight": torch.ones(1)})
    with pytest.raises(UserError, match=r"did you mean 'model\.norm\.weight'"):
        Checkpoint.of_folder(tmp_path).read("model.norm.weigth")


# --- folders ---


def write_sharded(folder: Path, shards: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    weight_map = {}
    for file, tensors in shards.items():
        save_file(dict(tensors), folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_shards_are_read_as_one_checkpoint(tmp_path: Path) -> None:
    parts = {ONE: {"a": torch.ones(2), "c": torch.zeros(1)}, TWO: {"b": torch.randn(3)}}
    write_sharded(tmp_path, parts)
    assert_same(read_all(Checkpoint.of_folder(tmp_path)), parts[ONE] | parts[TWO])


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path, {ONE: {"a": torch.ones(2)}, TWO: {"b": torch.ones(2)}})
    (tmp_path / TWO).unlink()
    with pytest.raises(UserError, match=f"lists {TWO}, which does not exist"):
        checkpoint_files(tmp_path)


def test_a_tensor_that_the_index_promises_and_no_shard_holds_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path, {ONE: {"a": torch.ones(2)}, TWO: {"b": torch.ones(2)}})
    save_file({"other": torch.ones(2)}, tmp_path / TWO)
    with pytest.raises(UserError, match=f"places 'b' in {TWO}, which does not hold it"):
        Checkpoint.of_folder(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path, {ONE: {"a": torch.ones(2)}, TWO: {"b": torch.ones(2)}})
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / TWO)
    with pytest.raises(UserError, match=r"tensor 'a' is in both .* and "):
        Checkpoint.of_folder(tmp_path)


@pytest.mark.parametrize(
    "weight_map",
    [None, [], {"a": 3}, {"a": ["x"]}, {"a": "../other/model.safetensors"}, {"a": "/etc/passwd"}, {"a": ""}],
    ids=str,
)
def test_an_index_that_makes_no_sense_or_points_elsewhere_is_refused(tmp_path: Path, weight_map: Any) -> None:
    (tmp_path / "other").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "other" / "model.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        checkpoint_files(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path: Path, name: str) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / name)
    with pytest.raises(UserError, match=rf"only pickled weights \({name}\).*save_pretrained\(NEW_FOLDER\)"):
        Checkpoint.of_folder(tmp_path)


def test_folders_without_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a checkpoint folder"):
        checkpoint_files(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        checkpoint_files(tmp_path / "nothing")
