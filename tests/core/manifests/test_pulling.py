"""Pulling over real sockets that break, and from remotes that are unfinished, lie, or are hostile."""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cutting_servers import CuttingHandler, FileHandler, Traffic, serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pushed_artefacts import contents, write_large_expert
from reporters import Recorder

from expertctl import UserError, verify
from expertctl.core.manifests.pulling import pull
from expertctl.core.manifests.pushing import push
from expertctl.core.remote.index import INDEX_FILE
from expertctl.core.remote.transfers import Transfer

MB = 1_000_000
PART = 1 << 18


def card(manifest: object) -> str:
    return "# a card\n"


@pytest.fixture(autouse=True)
def _surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertctl.core.remote.retries.FIRST_WAIT_S", 0.001)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A folder that holds a pushed expert of 4 MB, `law`."""
    write_large_expert(tmp_path / "own" / "law", 4 * MB, shards=2)
    push(tmp_path / "own" / "law", f"file://{tmp_path}/store/law", card=card)
    return tmp_path / "store"


def pulled(url: str, output: Path, *, jobs: int = 4, **options: Any) -> Path:
    return pull(url, None, card=card, output=output, transfer=Transfer(jobs, PART), **options).folder


def pull_with_cuts(tmp_path: Path, num_bytes: int, part_bytes: int) -> None:
    manifest = write_large_expert(tmp_path / "own" / "big", num_bytes, shards=3)
    push(tmp_path / "own" / "big", f"file://{tmp_path}/store/big", card=card)
    cuts = [num_bytes // 11 * number for number in range(1, 11)]
    traffic, progress = Traffic(cuts), Recorder()
    with serving(FileHandler, traffic, root=tmp_path / "store") as url:
        done = pull(
            f"{url}/big",
            None,
            card=card,
            output=tmp_path / "pulled",
            transfer=Transfer(4, part_bytes, progress),
        )
    assert traffic.cuts == []
    assert done.manifest is not None
    assert done.manifest.digest == manifest.digest
    assert contents(done.folder) == contents(tmp_path / "own" / "big")
    assert verify(done.folder) == []
    size = sum(map(len, contents(done.folder).values()))
    index = len((tmp_path / "store" / "big" / INDEX_FILE).read_bytes())
    assert size <= traffic.total - index <= size + 10 * part_bytes
    assert progress.steps[-1][1] == progress.steps[-1][2]


def test_ten_cuts_cost_at_most_a_part_each(tmp_path: Path) -> None:
    pull_with_cuts(tmp_path, 20 * MB, PART)


@pytest.mark.slow
def test_ten_cuts_of_two_hundred_megabytes_cost_at_most_a_part_each(tmp_path: Path) -> None:
    pull_with_cuts(tmp_path, 200 * MB, 4 << 20)


PULL = """
import sys
from pathlib import Path
from expertctl.core.manifests.pulling import pull
from expertctl.core.remote.transfers import Transfer
pull(sys.argv[1], None, card=str, output=Path(sys.argv[2]), transfer=Transfer(1, {part}))
"""


@pytest.mark.parametrize("force", [False, True])
def test_a_pull_that_was_killed_goes_on_where_it_was(tmp_path: Path, force: bool) -> None:
    write_large_expert(tmp_path / "own" / "big", 4 * MB)
    push(tmp_path / "own" / "big", f"file://{tmp_path}/store/big", card=card)
    traffic = Traffic(hold_after=2 * MB)
    script = (
        PULL.format(part=PART)
        .replace("Transfer(1", f"force={force}, transfer=Transfer(1")
        .replace("transfer=force", "force")
    )
    if force:
        (tmp_path / "pulled").mkdir()
        (tmp_path / "pulled" / "old").write_text("old")
    with serving(FileHandler, traffic, root=tmp_path / "store") as url:
        words = [sys.executable, "-c", script, f"{url}/big", str(tmp_path / "pulled")]
        process = subprocess.Popen(words, stderr=subprocess.PIPE)
        assert traffic.held.wait(60), process.communicate(timeout=10)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert (tmp_path / "pulled").exists() == force
        traffic.hold_after = None
        traffic.released.set()
        again = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    assert contents(tmp_path / "pulled") == contents(tmp_path / "own" / "big")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "own", "pulled", "store"]
    largest = traffic.by_path["/big/part-0.safetensors"]
    assert largest <= (tmp_path / "pulled" / "part-0.safetensors").stat().st_size + 2 * PART


def test_a_connection_that_stays_down_is_one_line_and_keeps_what_has_arrived(store: Path, tmp_path: Path) -> None:
    traffic = Traffic()
    with serving(FileHandler, traffic, root=store) as url:
        traffic.cuts = [MB, *[1] * 1000]
        with pytest.raises(UserError, match=r"cannot be reached .*then run the same command again"):
            pulled(f"{url}/law", tmp_path / "pulled", jobs=1)
        assert not (tmp_path / "pulled").exists()
        traffic.cuts, sent = [], traffic.total
        pulled(f"{url}/law", tmp_path / "pulled", jobs=1)
    size = sum(map(len, contents(tmp_path / "pulled").values()))
    assert traffic.total - sent < size - MB // 2


def test_a_server_that_stops_sending_is_not_waited_for(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertctl.core.remote.urls.TIMEOUT_S", 0.05)
    monkeypatch.setattr("expertctl.core.remote.urls.MIN_BYTES_PER_S", 1e9)
    traffic = Traffic(hold_after=MB)
    with (
        serving(FileHandler, traffic, root=store) as url,
        pytest.raises(UserError, match=r"cannot be reached \(FSTimeoutError"),
    ):
        pulled(f"{url}/law", tmp_path / "pulled")


def test_a_file_in_the_cache_is_not_downloaded_again(store: Path, tmp_path: Path) -> None:
    traffic = Traffic()
    with serving(FileHandler, traffic, root=store) as url:
        pulled(f"{url}/law", tmp_path / "one")
        sent = traffic.total
        pulled(f"{url}/law", tmp_path / "two")
        assert traffic.total - sent < 10_000
        digest = hashlib.sha256((store / "law" / "part-1.safetensors").read_bytes()).hexdigest()
        damaged = tmp_path / "cache" / "expertctl" / "files" / digest
        content = bytearray(damaged.read_bytes())
        damaged.unlink()  # a link to the pulled files
        content[-1] ^= 1
        damaged.write_bytes(content)
        pulled(f"{url}/law", tmp_path / "three")
    assert contents(tmp_path / "three") == contents(tmp_path / "one") == contents(store / "law")


def test_the_cache_is_bounded(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertctl.core.remote.file_cache.MAX_CACHE_BYTES", 3 * MB)
    pulled(f"file://{store}/law", tmp_path / "pulled")
    cached = [path.stat().st_size for path in (tmp_path / "cache" / "expertctl" / "files").iterdir()]
    assert cached
    assert sum(cached) <= 3 * MB


def test_a_folder_that_another_tool_copied_needs_no_index(store: Path, tmp_path: Path) -> None:
    (store / "law" / INDEX_FILE).unlink()
    with serving(FileHandler, Traffic(), root=store) as url:
        assert contents(pulled(f"{url}/law", tmp_path / "pulled")) == contents(store / "law")


# --- remotes that are unfinished or lie ---


def change_index(store: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((store / "law" / INDEX_FILE).read_text())
    change(content)
    (store / "law" / INDEX_FILE).write_text(json.dumps(content))


def shorter(store: Path) -> None:
    path = store / "law" / "part-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def longer(store: Path) -> None:
    path = store / "law" / "part-1.safetensors"
    path.write_bytes(path.read_bytes() + b"x")


def other_bytes(store: Path) -> None:
    path = store / "law" / "part-1.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def no_file(store: Path) -> None:
    (store / "law" / "part-1.safetensors").unlink()


LIES = {
    shorter: "part-1.safetensors has .* bytes where .* are announced",
    longer: "part-1.safetensors has .* bytes where .* are announced",
    other_bytes: "part-1.safetensors does not have the sha256",
    no_file: "part-1.safetensors is missing",
    lambda store: (store / "law" / "expert.json").unlink(): "was not pushed to the end",
    lambda store: change_index(store, lambda index: index.update(complete=False)): "was not pushed to the end",
    lambda store: change_index(store, lambda index: index["files"].pop("notes/lines.txt")): "do not agree on",
    lambda store: change_index(store, lambda index: index.update(format=2)): "is damaged",
    lambda store: change_index(store, lambda index: index["files"]["part-1.safetensors"].update(size=1 << 50)): (
        "part-1.safetensors has .* bytes where 1,125,899,906,842,624 are announced"
    ),
    lambda store: (store / "law" / INDEX_FILE).write_text("[" * 100_000): "is damaged",
    lambda store: (store / "law" / INDEX_FILE).write_bytes(b"\xff\xfe"): "is damaged",
    lambda store: (store / "law" / "expert.json").write_text("{}"): "does not have the sha256",
    lambda store: [path.unlink() for path in (store / "law").glob(".*")] and (store / "law" / "expert.json").unlink(): (
        "no manifest and no index"
    ),
}


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: LIES[lie])
def test_a_remote_that_is_unfinished_or_lies_is_refused_by_name(
    lie: Callable[[Path], object], store: Path, tmp_path: Path
) -> None:
    lie(store)
    with serving(FileHandler, Traffic(), root=store) as url, pytest.raises(UserError, match=LIES[lie]) as refused:
        pulled(f"{url}/law", tmp_path / "pulled")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "pulled").exists()


def test_a_lie_that_index_and_server_agree_on_is_found_by_the_manifest(store: Path, tmp_path: Path) -> None:
    other_bytes(store)
    content = (store / "law" / "part-1.safetensors").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    change_index(store, lambda index: index["files"]["part-1.safetensors"].update(sha256=digest))
    with pytest.raises(UserError, match=r"tensor tensor\.1 was changed"):
        pulled(f"file://{store}/law", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_a_server_without_ranges_is_refused(store: Path, tmp_path: Path) -> None:
    with (
        serving(FileHandler, Traffic(), root=store, ranges=False) as url,
        pytest.raises(UserError, match="does not support ranged reads"),
    ):
        pulled(f"{url}/law", tmp_path / "pulled")


def test_a_file_that_the_disk_has_no_room_for_is_refused_before_a_byte(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_index(store, lambda index: index["files"]["part-1.safetensors"].update(size=1 << 50))
    monkeypatch.setattr("expertctl.core.remote.download._check_size", lambda *arguments: None)  # the server lies too
    with pytest.raises(UserError, match=r"1,125,.* bytes are to be written to .*free some space"):
        pulled(f"file://{store}/law", tmp_path / "pulled")


class EndlessHandler(CuttingHandler):
    """Announces 100 bytes and sends them without end."""

    sent = 0

    def do_HEAD(self) -> None:  # noqa: N802
        self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", "100")
        self.end_headers()

    def do_GET(self) -> None:  # noqa: N802
        self.send_response(206)
        self.end_headers()
        self.close_connection = True
        with contextlib.suppress(OSError):
            while EndlessHandler.sent < 400 * MB:
                EndlessHandler.sent += self.wfile.write(b"0" * MB)


def test_an_answer_without_end_does_not_fill_the_memory(tmp_path: Path) -> None:
    with serving(EndlessHandler, Traffic()) as url, pytest.raises(UserError, match="is damaged"):
        pulled(f"{url}/law", tmp_path / "pulled")
    assert EndlessHandler.sent < 100 * MB


hostile_names = st.one_of(
    st.sampled_from(
        [
            "../x",
            "/etc/passwd",
            "a/../../x",
            "a\0b",
            "",
            ".",
            "..",
            "a//b",
            ".hidden",
            "a/.git/config",
            "C:\\x",
            "a\nb",
            "a\x1b[2Jb",
            "\ud800",
            "a" * 300,
        ]
    ),
    st.lists(st.sampled_from(["..", ".", "", "a", "\\", "\0", "b" * 256]), min_size=2, max_size=4).map("/".join),
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.builds(
            lambda name, size: {"format": 1, "complete": True, "files": {name: {"size": size, "sha256": "0" * 64}}},
            hostile_names,
            st.integers(-1, 10),
        ),
        st.builds(lambda files: {"format": 1, "complete": True, "files": files}, anything),
        anything,
    )
)
def test_a_hostile_index_writes_nothing_outside(tmp_path: Path, index: object) -> None:
    store = tmp_path / "hostile"
    store.mkdir(exist_ok=True)
    (store / INDEX_FILE).write_text(json.dumps(index))
    before = sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts)
    said = ""
    try:
        pulled(f"file://{store}", tmp_path / "pulled")
    except UserError as error:
        said = str(error)
    if said:
        assert not {"\n", "\0", "\x1b"} & set(said)
        assert sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts) == before
    else:
        assert index == {"format": 1, "complete": True, "files": {}} or list((tmp_path / "pulled").iterdir()) == []
        (tmp_path / "pulled").rmdir()


def test_names_and_targets(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no URL"):
        pulled(str(store / "law"), tmp_path / "pulled")
    with pytest.raises(UserError, match="no workspace here"):
        pull(f"file://{store}/law", None, card=card)
    (tmp_path / "pulled").mkdir()
    with pytest.raises(UserError, match="exists already; use --force"):
        pulled(f"file://{store}/law", tmp_path / "pulled")
    with pytest.raises(UserError, match="no manifest and no index"):
        pulled(f"file://{store}/nothing", tmp_path / "other")
