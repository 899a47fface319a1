"""Versions of the installed packages that can change the bytes of a result."""

from __future__ import annotations


def tool_versions() -> dict[str, str]:
    """Return the version of each package that can change the bytes of a result."""
    return {name: package_version(name) for name in ("expertctl", "torch", "transformers", "tokenizers", "safetensors")}


def package_version(name: str) -> str:
    """Return the version of a distribution, or `not installed`."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
