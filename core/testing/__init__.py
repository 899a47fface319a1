"""Test helpers for expertctl and its plugins, which run on a CPU and download nothing.

>>> from expertctl.core.testing import assert_merge_ok, fresh_plugins, tiny_model_folder
"""

from __future__ import annotations

from .fixtures import fresh_plugins, tiny_model_folder
from .merging import assert_merge_ok, in_numpy, tensor_group

__all__ = ["assert_merge_ok", "fresh_plugins", "in_numpy", "tensor_group", "tiny_model_folder"]
