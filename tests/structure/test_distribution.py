"""Wheel, source distribution, and the wheel built from it hold every module and data file of the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("cli", "core", "experts", "merge", "plugins")
LEFT_OUT = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "tests", "quickstart")


def build(kind: str, source: Path, target: Path) -> Path:
    """Build a `wheel` or `sdist` of a source folder without network access and return its path."""
    target.mkdir()
    script = f"import sys, setuptools.build_meta as backend; backend.build_{kind}(sys.argv[1])"
    subprocess.run([sys.executable, "-c", script, target], cwd=source, check=True, capture_output=True)
    (path,) = target.iterdir()
    return path


def package_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if name.startswith("expertctl/")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("wheel")
    return build("wheel", shutil.copytree(ROOT, root / "checkout", symlinks=True, ignore=LEFT_OUT), root / "out")


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    files = [path for folder in ("expertctl", *FOLDERS) for path in (ROOT / folder).rglob("*")]
    expected = {
        f"expertctl/{path.relative_to(ROOT).as_posix().removeprefix('expertctl/')}"
        for path in files
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert package_files(wheel) == expected


def test_a_wheel_from_the_source_distribution_is_the_same(wheel: Path, tmp_path: Path) -> None:
    checkout = shutil.copytree(ROOT, tmp_path / "checkout", symlinks=True, ignore=LEFT_OUT)
    sdist = build("sdist", checkout, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    again = build("wheel", source, tmp_path / "again")
    assert package_files(again) == package_files(wheel)
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert all(first.read(name) == second.read(name) for name in package_files(wheel))


def test_the_installed_package_shows_its_help_from_anywhere(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = "import expertctl, sys; from expertctl.cli.main import main; print(expertctl.__file__); sys.exit(main(['--help']))"
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == str(tmp_path / "site" / "expertctl" / "__init__.py")
    assert "federate" in result.stdout
