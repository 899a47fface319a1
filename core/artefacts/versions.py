"""Installed packages: the versions that can change the bytes of a result, and optional ones."""

from __future__ import annotations

from ..errors import UserError


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


def require_privacy_extra(module: str, need: str) -> None:
    """Raise `UserError` if a package of the `privacy` extra is missing; `need` is such as `the audit needs RapidFuzz`."""
    from importlib.util import find_spec

    if find_spec(module) is None:
        raise UserError(f"{need}, which is not installed: pip install 'expertctl[privacy]'")
