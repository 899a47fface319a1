"""Computation of output tensors: one class per action of the tensor plan, chosen by `action_of`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.artefacts.numeric import FLOATING, encode
from ...core.errors import UserError
from ...core.hooks.merging import TensorGroup, TensorMerge
from ..sources.models import StoredTensor
from ..sources.vocabularies.row_mapping import VocabularyPlan
from .output_files import OutputFiles
from .reading import PIECE_NUMBERS, Reader
from .tally import Tally
from .tensor_plan import TensorPlan


@dataclass(frozen=True)
class MergeTools:
    """Method, reader and device that all actions of a merge share."""

    method: TensorMerge
    reader: Reader
    vocabulary: VocabularyPlan | None = None
    device: str = "cpu"
    survey: Any = None
    """Result of the method's survey."""
    tally: Tally = field(default_factory=Tally)

    @property
    def in_torch(self) -> bool:
        """Whether the method gets torch tensors rather than numpy arrays."""
        return self.method.arrays == "torch" or self.device != "cpu"

    def as_inputs(self, arrays: Mapping[StoredTensor, NDArray[Any]]) -> Mapping[StoredTensor, Any]:
        """Return arrays as the method takes them."""
        if not self.in_torch:
            return arrays
        import torch

        return {stored: torch.from_numpy(array).to(self.device) for stored, array in arrays.items()}


@dataclass(frozen=True)
class Action(ABC):
    """Computation of the bytes of one output tensor."""

    tensor: TensorPlan
    tools: MergeTools

    @abstractmethod
    def pieces(self) -> Iterator[Any]:
        """Yield the bytes of the tensor in pieces, as buffers."""

    def known_digest(self) -> str | None:
        """Return the digest of the output if it is known without computing it."""
        return None

    def verify(self, digest: str) -> None:  # noqa: B027  # most outputs have no digest to compare with
        """Check the digest of the output; raises `UserError` if an input was changed."""


class Compute(Action):
    """Writes values that the plan holds."""

    def pieces(self) -> Iterator[Any]:
        assert self.tensor.values is not None
        yield encode(self.tensor.values, self.tensor.dtype)


class CopyBytes(Action):
    """Copies an input byte by byte; hashing is slower than copying, so only the output is hashed."""

    def pieces(self) -> Iterator[Any]:
        return self.tools.reader.raw(self.tensor.experts[0], hashed=False)

    def known_digest(self) -> str | None:
        return self.tools.reader.known_digest(self.tensor.experts[0])

    def verify(self, digest: str) -> None:
        self.tools.reader.note(self.tensor.experts[0], digest)


class Concatenate(Action):
    """Writes the first input, or all inputs of a stack one after another, in the output's dtype."""

    def pieces(self) -> Iterator[Any]:
        reader, dtype = self.tools.reader, self.tensor.dtype
        for stored in self.tensor.experts if self.tensor.action == "stack" else self.tensor.experts[:1]:
            if not stored.is_plain:
                yield encode(reader.read(stored), dtype)
            elif stored.dtype == dtype:
                yield from reader.raw(stored)
            else:
                for piece in reader.pieces(stored):
                    yield encode(piece, dtype)


@dataclass(frozen=True)
class RequireEqual(Action):
    """Checks that all inputs are equal before it copies the first one."""

    copy: Action

    def pieces(self) -> Iterator[Any]:
        reader, first = self.tools.reader, self.tensor.inputs[0]
        for stored in self.tensor.inputs:
            for _ in reader.raw(stored):
                pass
        for stored in self.tensor.inputs:
            if reader.digests[stored.entry] != reader.digests[first.entry]:
                raise self._difference(first, stored)
        yield from self.copy.pieces()

    def known_digest(self) -> str | None:
        return self.copy.known_digest()

    def verify(self, digest: str) -> None:
        self.copy.verify(digest)

    def _difference(self, first: StoredTensor, other: StoredTensor) -> UserError:
        dtype, hint = self.tensor.dtype, ""
        reason = f"has dtype {dtype}, which cannot be averaged"
        if dtype in FLOATING:
            reason, hint = "is shared by all experts", "; to use the first one, set --option discard=true"
        return UserError(
            f"tensor '{self.tensor.name}' {reason}, but differs between {first.entry.file} and {other.entry.file}{hint}"
        )


class MergeWhole(Action):
    """Calls the method with whole tensors, with rows rearranged if the vocabularies differ."""

    def pieces(self) -> Iterator[Any]:
        yield encode(self.numbers(), self.tensor.dtype)

    def numbers(self) -> NDArray[Any]:
        """Return the merged tensor as float32 (or float64), before rounding to the output dtype."""
        return self.call(self.arrays())

    def arrays(self) -> Mapping[StoredTensor, NDArray[Any]]:
        """Return all inputs as float arrays, with the rows of the output."""
        arrays = {stored: self.tools.reader.read(stored) for stored in self.tensor.inputs}
        if self.tensor.is_vocabulary:
            assert self.tools.vocabulary is not None
            stored_by_model = dict(zip(self.tensor.expert_names, self.tensor.experts, strict=True))
            if self.tensor.seed is not None and self.tensor.seed_name is not None:
                stored_by_model[self.tensor.seed_name] = self.tensor.seed
            rearranged = self.tools.vocabulary.rearrange(
                {model: arrays[stored] for model, stored in stored_by_model.items()}
            )
            arrays = {stored: rearranged[model] for model, stored in stored_by_model.items()}
        return arrays

    def group(self, arrays: Mapping[StoredTensor, NDArray[Any]]) -> TensorGroup:
        """Return float arrays as the method takes them."""
        tensor, tools = self.tensor, self.tools
        inputs = tools.as_inputs(arrays)
        statistics = tools.as_inputs(
            {stored: tools.reader.read(stored) for stored in tensor.statistics if stored is not None}
        )
        return TensorGroup(
            name=tensor.name,
            experts=tuple(inputs[stored] for stored in tensor.experts),
            expert_names=tensor.expert_names,
            weights=tensor.weights,
            seed_or_none=inputs[tensor.seed] if tensor.seed is not None else None,
            statistics=tuple(statistics[stored] if stored is not None else None for stored in tensor.statistics),
            survey=tools.survey,
            tally=tools.tally.add,
        )

    def call(self, arrays: Mapping[StoredTensor, NDArray[Any]]) -> NDArray[Any]:
        """Call the method on float arrays and check the shape of its result."""
        tensor, tools, group = self.tensor, self.tools, self.group(arrays)
        merged: Any = tools.method.merge(group, tensor.options)
        shape = group.experts[0].shape
        if tuple(merged.shape) != tuple(shape):
            raise UserError(
                f"merge method '{tools.method.name}' returned shape {list(merged.shape)} for tensor '{tensor.name}'; "
                f"expected {list(shape)}"
            )
        return _as_array(merged) if tools.in_torch else merged


class MergePieces(MergeWhole):
    """Calls an element-wise method with one flat piece of the tensor at a time."""

    def pieces(self) -> Iterator[Any]:
        reader = self.tools.reader
        iterators = {stored: reader.pieces(stored) for stored in self.tensor.inputs}
        for _ in range(0, self.tensor.num_numbers, reader.piece_numbers):
            pieces = {stored: next(iterator) for stored, iterator in iterators.items()}
            yield encode(self.call(pieces), self.tensor.dtype)
        for iterator in iterators.values():  # read to the end, where the digest is checked
            next(iterator, None)


def merge_tensor(
    tensor: TensorPlan, tools: MergeTools, files: OutputFiles, is_stopped: Callable[[], bool] = bool
) -> str | None:
    """Compute and write a planned tensor and return its digest; None if it was stopped before the end."""
    action = action_of(tensor, tools)
    region = files.region(tensor, action.known_digest())
    for piece in action.pieces():
        if is_stopped():
            return None
        files.write(region, piece)
    action.verify(region.digest())
    return region.digest()


def action_of(tensor: TensorPlan, tools: MergeTools) -> Action:
    """Return the computation of a planned tensor."""
    if tensor.action == "merge":
        return (MergePieces if is_piecewise(tensor, tools.method) else MergeWhole)(tensor, tools)
    if tensor.action == "computed":
        return Compute(tensor, tools)
    first = tensor.experts[0]
    is_same = first.is_plain and (first.dtype, first.shape) == (tensor.dtype, tensor.shape)
    copy = (CopyBytes if is_same and tensor.action != "stack" else Concatenate)(tensor, tools)
    return RequireEqual(tensor, tools, copy) if tensor.action == "require_equal" else copy


def is_piecewise(tensor: TensorPlan, method: TensorMerge) -> bool:
    """Return whether the method merges a tensor piece by piece."""
    has_whole_inputs = tensor.is_vocabulary or any(not stored.is_plain for stored in tensor.inputs)
    return method.elementwise and not has_whole_inputs and not tensor.statistics


def bytes_needed(tensor: TensorPlan, method: TensorMerge, piece_numbers: int = PIECE_NUMBERS) -> int:
    """Return the estimated memory for merging one tensor, in bytes."""
    width = 8 if any(stored.dtype == "F64" for stored in tensor.inputs) else 4
    if tensor.action != "merge" or is_piecewise(tensor, method):
        return (len(tensor.inputs) + 3) * piece_numbers * width
    return (len(tensor.inputs) + 2) * tensor.num_numbers * width


def _as_array(merged: Any) -> NDArray[Any]:
    import torch

    width = torch.float64 if merged.dtype == torch.float64 else torch.float32
    return np.asarray(merged.detach().to("cpu", width).numpy())
