"""Pushing to file systems of fsspec: resuming, replacing, refusing."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pushed_artefacts import contents, write_large_expert

from expertctl import UserError
from expertctl.core.manifests.pulling import pull
from expertctl.core.manifests.pushing import push
from expertctl.core.remote.index import INDEX_FILE, read_index
from expertctl.core.remote.transfers import Transfer
from expertctl.core.remote.urls import open_remote

MB = 1_000_000


def card(manifest: object) -> str:
    return "# a card\n"


class Cutting(MemoryFileSystem):
    """A store whose uploads fail as long as `cuts` are left; a file appears when all of it has arrived."""

    protocol = "cutting"
    store: dict[str, Any] = {}  # noqa: RUF012  # fsspec's own, shared by instances
    pseudo_dirs = [""]  # noqa: RUF012
    cuts = 0
    refusal: Exception | None = None
    sent: Counter[str] = Counter()  # noqa: RUF012
    part_sizes: set[int | None] = set()  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("cutting://"))

    def put_file(self, lpath: str, rpath: str, *arguments: Any, **options: Any) -> None:
        if type(self).refusal is not None:
            raise type(self).refusal
        type(self).part_sizes.add(options.pop("chunksize", None))
        type(self).sent[Path(rpath).name] += Path(lpath).stat().st_size
        if type(self).cuts:
            type(self).cuts -= 1
            raise ConnectionResetError(errno.ECONNRESET, "the connection was cut, https://user:word@store?token=secret")
        super().put_file(lpath, rpath, *arguments, **options)


@pytest.fixture(autouse=True)
def _surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("expertctl.core.remote.retries.FIRST_WAIT_S", 0.001)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fsspec.register_implementation("cutting", Cutting, clobber=True)
    Cutting.store.clear()
    Cutting.pseudo_dirs[:] = [""]
    Cutting.cuts, Cutting.refusal, Cutting.sent = 0, None, Counter()
    yield
    Cutting.store.clear()


@pytest.fixture
def law(tmp_path: Path) -> Path:
    write_large_expert(tmp_path / "law", MB, shards=3)
    return tmp_path / "law"


def index_of(url: str) -> Any:
    with open_remote(url) as remote:
        return read_index(remote)


def remote_files(url: str) -> dict[str, bytes]:
    fs, root = fsspec.core.url_to_fs(url)
    return {path.removeprefix(root).lstrip("/"): fs.cat_file(path) for path in fs.find(root)}


def test_ten_cuts_in_one_push(law: Path) -> None:
    Cutting.cuts = 10
    push(law, "cutting://bucket/law", card=card, transfer=Transfer(3, 1000))
    pushed = remote_files("cutting://bucket/law")
    pushed.pop(INDEX_FILE)
    assert pushed == contents(law)
    assert Cutting.cuts == 0
    sizes = {name: len(content) for name, content in pushed.items()}
    assert sum(Cutting.sent.values()) <= sum(sizes.values()) + 10 * max(sizes.values()), "a cut costs at most a file"
    assert index_of("cutting://bucket/law").complete


def test_a_push_that_ended_early_is_refused_by_pull_and_resumed(law: Path, tmp_path: Path) -> None:
    sizes = {name: len(content) for name, content in contents(law).items()}
    real = Cutting.put_file

    def fails_for_the_last_shard(self: Cutting, lpath: str, rpath: str, *arguments: Any, **options: Any) -> None:
        if rpath.endswith("part-2.safetensors"):
            Cutting.cuts = 100
        real(self, lpath, rpath, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cutting, "put_file", fails_for_the_last_shard)
        with pytest.raises(UserError, match="run the same command again") as cut:
            push(law, "cutting://bucket/law", card=card, transfer=Transfer(1, 1000))
    assert not [secret for secret in ("secret", "word@") if secret in str(cut.value)]
    assert not index_of("cutting://bucket/law").complete
    with pytest.raises(UserError, match="was not pushed to the end"):
        pull("cutting://bucket/law", None, card=card, output=tmp_path / "pulled")
    Cutting.cuts, Cutting.sent = 0, Counter()
    done = push(law, "cutting://bucket/law", card=card, transfer=Transfer(1, 1000))
    assert 0 < done.sent < done.files
    assert sum(Cutting.sent.values()) == done.bytes < sum(sizes.values())
    pull("cutting://bucket/law", None, card=card, output=tmp_path / "pulled")
    assert contents(tmp_path / "pulled") == contents(law)
    assert push(law, "cutting://bucket/law", card=card).sent == 0


def test_a_file_that_shrank_at_the_remote_is_sent_again(law: Path) -> None:
    push(law, "cutting://bucket/law", card=card)
    fs = fsspec.filesystem("cutting")
    fs.rm_file("/bucket/law/expert.json")
    fs.pipe_file("/bucket/law/part-1.safetensors", b"short")
    index = index_of("cutting://bucket/law")
    fs.pipe_file(f"/bucket/law/{INDEX_FILE}", type(index)(index.files, False).text().encode())
    assert push(law, "cutting://bucket/law", card=card).sent == 2
    assert remote_files("cutting://bucket/law")["part-1.safetensors"] == contents(law)["part-1.safetensors"]


@pytest.mark.parametrize("with_index", [True, False])
def test_another_artefact_is_replaced_only_with_force_and_without_leftovers(
    law: Path, tmp_path: Path, with_index: bool
) -> None:
    write_large_expert(tmp_path / "tax", 10_000, seed=1)
    push(law, "cutting://bucket/it", card=card)
    if not with_index:
        fsspec.filesystem("cutting").rm_file(f"/bucket/it/{INDEX_FILE}")
    before = remote_files("cutting://bucket/it")
    with pytest.raises(UserError, match="exists already; use --force"):
        push(tmp_path / "tax", "cutting://bucket/it", card=card)
    assert remote_files("cutting://bucket/it") == before
    push(tmp_path / "tax", "cutting://bucket/it", card=card, force=True)
    replaced = remote_files("cutting://bucket/it")
    replaced.pop(INDEX_FILE)
    assert replaced == contents(tmp_path / "tax")


def test_a_damaged_index_is_replaced_only_with_force(law: Path) -> None:
    push(law, "cutting://bucket/law", card=card)
    fsspec.filesystem("cutting").pipe_file(f"/bucket/law/{INDEX_FILE}", b"{}")
    with pytest.raises(UserError, match=r"is damaged .*; push the artefact again with --force"):
        push(law, "cutting://bucket/law", card=card)
    push(law, "cutting://bucket/law", card=card, force=True)
    assert index_of("cutting://bucket/law").complete


def test_files_of_others_are_left_alone(law: Path) -> None:
    fsspec.filesystem("cutting").pipe_file("/bucket/data/table.csv", b"1,2")
    with pytest.raises(UserError, match="holds other files"):
        push(law, "cutting://bucket/data", card=card)
    assert remote_files("cutting://bucket/data") == {"table.csv": b"1,2"}


def test_a_damaged_artefact_is_not_pushed(law: Path) -> None:
    (law / "notes" / "lines.txt").write_text("another line\n")
    with pytest.raises(UserError, match=r"file notes/lines\.txt was changed"):
        push(law, "cutting://bucket/law", card=card)
    assert remote_files("cutting://bucket/law") == {}


def test_a_folder_without_a_manifest_comes_back_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "text" / "a").mkdir(parents=True)
    (tmp_path / "text" / "a" / "one.txt").write_text("one")
    (tmp_path / "text" / "two.txt").write_text("two")
    push(tmp_path / "text", "cutting://bucket/text", card=card)
    assert pull("cutting://bucket/text", None, card=card, output=tmp_path / "back").manifest is None
    assert contents(tmp_path / "back") == contents(tmp_path / "text")


class NoCredentialsError(Exception):
    """Has the name of botocore's."""


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        (PermissionError(13, "Forbidden"), "access is denied .*check the credentials"),
        (NoCredentialsError("Unable to locate credentials"), "access is denied"),
        (FileNotFoundError("The specified bucket does not exist"), "does not exist; check the URL"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_refusals_are_one_line_and_not_repeated(law: Path, refusal: Exception, said: str) -> None:
    Cutting.refusal = refusal
    with pytest.raises(UserError, match=said) as refused:
        push(law, "cutting://bucket/law", card=card)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("law", "is no URL"),
        ("https://host/law", "plain HTTP servers take no uploads"),
        ("nothing://x/y", "unknown protocol 'nothing'"),
        ("zip://a::memory://b", "chain of URLs"),
        ("hub:law", "is no repository of the hub"),
        ("s3://", r"^s3:// names no folder; write s3://PLACE/FOLDER$"),
        ("file:///", "names no folder"),
        ("dir://x", r"^dir://x cannot be opened \(AttributeError"),
        ("reference://x", r"^reference://x cannot be opened \(TypeError"),
    ],
)
def test_urls_that_take_no_push(law: Path, url: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        push(law, url, card=card)


@pytest.mark.parametrize("place", ["", "/sub"])
@pytest.mark.parametrize("force", [False, True])
def test_an_artefact_is_not_pushed_into_itself(law: Path, place: str, force: bool) -> None:
    before = contents(law)
    with pytest.raises(UserError, match="is in the folder that is to be pushed; choose another URL"):
        push(law, f"file://{law}{place}", card=card, force=force)
    assert contents(law) == before


def test_options_of_the_hub_are_for_the_hub(law: Path) -> None:
    with pytest.raises(UserError, match="--private and --revision are for repositories of the hub"):
        push(law, "memory://law", card=card, private=True)


@pytest.mark.parametrize(("stores", "expected"), [(("cutting",), 8 << 20), ((), None)])
def test_stores_that_upload_in_parts_are_told_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stores: tuple[str, ...], expected: int | None
) -> None:
    """A connection that drops costs a part, not a file: of S3 and Google Cloud Storage, which repeat parts."""
    monkeypatch.setattr("expertctl.core.remote.upload.STORES", stores)
    Cutting.part_sizes.clear()
    write_large_expert(tmp_path / "law", MB)
    push(tmp_path / "law", "cutting://models/law", card=card)
    assert Cutting.part_sizes == {expected}
