"""URLs: which texts are some, missing packages, and secrets that no message shows."""

from __future__ import annotations

import sys

import pytest

from expertctl import UserError
from expertctl.core.remote.urls import is_url, open_remote, without_secrets


@pytest.mark.parametrize("text", ["s3://b/x", "hub:owner/name", "file:///x", "abfs+x://y"])
def test_urls(text: str) -> None:
    assert is_url(text)


@pytest.mark.parametrize("text", ["owner/name", "C:\\x", "/abs", "", "law", "c:/x", "1s3://x", None])
def test_paths_and_names_are_no_urls(text: str) -> None:
    assert not is_url(text)


@pytest.mark.parametrize(("scheme", "module", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs")])
def test_a_missing_package_is_one_line_with_the_command(
    scheme: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with (
        pytest.raises(UserError, match=rf'pip install "expertctl\[{extra}\]"') as missing,
        open_remote(f"{scheme}://b"),
    ):
        pass
    assert "\n" not in str(missing.value)


def test_secrets_are_left_out() -> None:
    text = "GET https://me:word@host/file?X-Amz-Signature=abc failed: Bearer hf_abcdefgh123, token hf_ABCDEFGHIJ"
    shown = without_secrets(text)
    assert shown == "GET https://host/file?... failed: Bearer ... token hf_..."
    assert without_secrets("s3://bucket/law") == "s3://bucket/law"
