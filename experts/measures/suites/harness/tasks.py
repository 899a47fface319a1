"""Tasks by name, opened with their data before any model is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .....core.errors import UserError, did_you_mean, first_line, unknown_name

LOCAL_FORMATS = ("json", "csv", "text", "parquet", "arrow", "pandas", "xml", "webdataset")
"""Values of `dataset_path` that read the files in `dataset_kwargs: data_files`."""
FEWSHOT_SEED = 1234
"""lm-eval's own default."""


def find_tasks(names: Sequence[str], folder: Path | None, *, download: bool) -> Any:
    """Return lm-eval's `TaskManager` with tasks, groups and tags of these names.

    `folder` holds task files beside lm-eval's own. Those are read, in some ten seconds, only if the folder does not have all.
    Raises `UserError` for a name that is in neither, and for a task whose data is not on this machine unless `download`.
    """
    manager = _manager(folder, with_own=False) if folder is not None else None
    if manager is None or not all(_is_complete(name, manager.task_index) for name in names):
        manager = _manager(folder, with_own=True)
    for name in names:
        if name not in manager.task_index:
            raise _unknown(name, manager, folder)
    if not download:
        for name in names:
            for task, config in _configs(name, manager.task_index):
                _require_local(task, config)
    return manager


def open_tasks(manager: Any, names: Sequence[str]) -> dict[str, Any]:
    """Return tasks as lm-eval's `evaluate` takes them, with their data and no answers yet.

    Raises `UserError` for a task that runs code of models, and for one that fails to open.
    """
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        try:
            opened = manager.load([name])
        except Exception as error:  # of datasets, of yaml, of functions in task files
            raise UserError(
                f"task '{name}' cannot be opened: {type(error).__name__}: {first_line(error):.300}; correct its file or data"
            ) from error
        for part, content in opened.items():
            loaded[part] |= content
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"task '{name}' runs code that models write; use `eval --generate` with --run-code")
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"task '{name}' shows images, and the models read text; leave it out")
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def _manager(folder: Path | None, *, with_own: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if folder is None else str(folder), include_defaults=with_own)


def _is_complete(name: str, index: Mapping[str, Any]) -> bool:
    """Return whether a task, or all that a group or tag names, is in an index."""
    return name in index and all(
        task in index or set(config) - {"task", "group"} for task, config in _configs(name, index)
    )


def _unknown(name: str, manager: Any, folder: Path | None) -> UserError:
    own = [task for task, entry in manager.task_index.items() if _is_below(entry.yaml_path, folder)]
    if folder is not None and own:
        return unknown_name("task", name, own, listed_as=f"{folder} has, beside lm-eval's own")
    guess = did_you_mean(name, manager.all_tasks)
    return UserError(f"no task '{name}'{guess}; `lm-eval ls tasks` lists lm-eval's own, and --tasks-folder adds files")


def _is_below(path: Path | None, folder: Path | None) -> bool:
    return path is not None and folder is not None and folder.resolve() in Path(path).resolve().parents


def _configs(name: str, index: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the names and settings of the tasks in a task, group or tag, as their files have them."""
    entry = index.get(name)
    if entry is None:
        return
    members: Any = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else None
    if entry.kind.name == "TAG":
        members = sorted(entry.tags)
    if not isinstance(members, list):
        yield name, entry.cfg or {}
        return
    for member in members:
        inner = member if isinstance(member, str) else member.get("group", member.get("task"))
        if isinstance(inner, str) and inner != name and inner in index:
            yield from _configs(inner, index)
        else:
            yield str(inner), member if isinstance(member, dict) else {}


def _require_local(task: str, config: Mapping[str, Any]) -> None:
    """Raise `UserError` for a task whose data has to be downloaded, as far as its file says so."""
    source, arguments = config.get("dataset_path"), config.get("dataset_kwargs") or {}
    files = str(arguments.get("data_files", "")) + str(arguments.get("data_dir", ""))
    if source is None or "custom_dataset" in config or (Path(str(source)).exists() and "://" not in files):
        return
    if source in LOCAL_FORMATS and "://" not in files:
        return
    what = source if source not in LOCAL_FORMATS else files
    if source not in LOCAL_FORMATS and _is_cached(str(source), config.get("dataset_name")):
        return
    raise UserError(
        f"task '{task}' reads '{what:.100}' from the network, which is not used without --download; or write a task file "
        "with local data and give --tasks-folder"
    )


def _is_cached(source: str, name: object) -> bool:
    """Return whether the datasets library has kept this dataset from an earlier download."""
    from datasets import config

    folder = Path(config.HF_DATASETS_CACHE) / source.replace("/", "___")
    return folder.is_dir() and (name is None or (folder / str(name)).is_dir())
