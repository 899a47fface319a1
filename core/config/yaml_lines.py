"""YAML parsing with the line number of every key, for error messages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError

KeyPath = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, extended to read `1e-3` as a float (YAML 1.1 requires a dot)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(path: Path) -> tuple[Any, dict[KeyPath, int]]:
    """Return a YAML file's content ({} if empty) and the line of every key; raises `UserError` if it is not valid."""
    documents = parse_documents(path)
    if len(documents) > 1:
        raise UserError(f"{path}:{documents[1][1][()]}: not valid YAML: a second document; write one document")
    return documents[0] if documents else ({}, {})


def parse_documents(path: Path) -> list[tuple[Any, dict[KeyPath, int]]]:
    """Return content and lines, as `parse_yaml`, of each document of a YAML file (separated by `---`) that is not empty."""
    documents = []
    with _yaml_errors_as_user_errors(path):
        loader = _Loader(path.read_text(encoding="utf-8"))
        while loader.check_node():
            node = loader.get_node()
            assert node is not None
            lines: dict[KeyPath, int] = {}
            _note_lines(node, (), lines, path)
            content = loader.construct_document(node)
            if content is not None:
                documents.append((content, lines))
    return documents


@contextmanager
def _yaml_errors_as_user_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except (ValueError, RecursionError) as error:  # such as an impossible date, a list that contains itself
        raise UserError(f"{path}: not valid YAML: {error}") from None


def _note_lines(node: yaml.Node, at: KeyPath, lines: dict[KeyPath, int], path: Path) -> None:
    lines.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # yaml.load rejects it
            here = (*at, key.value)
            if here in lines:
                raise UserError(f"{path}:{key.start_mark.line + 1}: duplicate key '{key.value}'")
            lines[here] = key.start_mark.line + 1
            _note_lines(value, here, lines, path)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _note_lines(item, (*at, index), lines, path)
