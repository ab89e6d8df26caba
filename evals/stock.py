"""lm-eval's own tasks on data of this machine: what a task would load from the hub is looked for in a folder first.

    moonkit eval --tasks humaneval,mbpp,gsm8k,ifeval          MOONKIT_DATA=... or ./data; no network

    a task's dataset_path   -- known to a suite of ours? --> $MOONKIT_DATA/humaneval/HumanEval.jsonl.gz   (as published)
    "openai/openai_humaneval"  -- else a copy of the hub's --> $MOONKIT_DATA/openai/openai_humaneval      (git clone)
                               -- else -------------------> the hub, or what datasets has cached of it

Rows keep their published fields, so that a task's own wording and metrics see what they would see from the hub.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from lm_eval.tasks._factory import TaskFactory

from evals.rows import Row, Source, find_data, places

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "dev", "test", "prompt")
# MBPP's own parts, by number of the task: https://github.com/google-research/google-research/tree/master/mbpp
MBPP = {"prompt": range(1, 11), "test": range(11, 511), "validation": range(511, 601), "train": range(601, 975)}


def _by_split(config: str | None, split: str) -> tuple[str, ...]:
    """Where the hub's copies keep a split."""
    inside = [f"{config}/{split}*.parquet"] if config else []
    return (
        *inside,
        f"data/{split}*.parquet",
        f"{split}*.parquet",
        f"{split}.jsonl*",
        f"{config or '*'}/{split}.jsonl*",
    )


# files of a split where they are not called as the split is
NAMED: dict[str, Callable[[str | None, str], tuple[str, ...]]] = {
    "humaneval": lambda config, split: ("HumanEval.jsonl*",) if split == "test" else (),
    "humaneval_plus": lambda config, split: ("HumanEvalPlus.jsonl*",) if split == "test" else (),
    "mbpp": lambda config, split: ("mbpp.jsonl*",) if split in MBPP else (),
    "ifeval": lambda config, split: (
        ("input_data.jsonl*", "en_input_data.jsonl*", "ifeval_input_data.jsonl*") if split == "train" else ()
    ),
    "gpqa": lambda config, split: (f"{config}.csv", f"dataset/{config}.csv") if split == "train" else (),
}


class Splits(dict[str, Any]):
    """A data set's splits. Asking for one that is not here is a ValueError that says where it was looked for."""

    def __init__(self, found: Mapping[str, Any], path: str, folder: Path) -> None:
        super().__init__(found)
        self.path, self.folder = path, folder

    def __missing__(self, split: str) -> Any:
        here = ", ".join(self) or "none"
        raise ValueError(f"{self.path}: the split {split!r} is wanted, and {self.folder} has {here}")


@lru_cache(maxsize=1)
def kept() -> dict[str, str]:
    """The hub's data sets that suites of ours read too, each with the name of its folder."""
    from evals import suites

    found = {}
    for name in suites.names():
        hub, folder = suites.hub(name)
        if hub and folder:
            found[hub] = folder
    return found


def rows(source: Source, config: str | None, split: str) -> Iterator[Row] | None:
    """Rows of a split as they were published; None where the folder does not have it."""
    assert source.folder is not None, "local data lies in a folder"
    patterns = (*NAMED.get(source.name, lambda *_: ())(config, split), *_by_split(config, split))
    for pattern in patterns:
        files = sorted(path for path in source.folder.glob(pattern) if path.is_file())
        if files:
            found = (row for path in files for row in source.read(path))
            if source.name == "mbpp" and pattern.startswith("mbpp.jsonl"):
                return (row for row in found if row.whole("task_id") in MBPP[split])
            return found
    return None


def _fields(name: str, row: Row) -> dict[str, Any]:
    """A row's fields as the hub has them."""
    values = dict(row.values)
    if name == "ifeval":  # the multilingual files write the language before each instruction
        values["instruction_id_list"] = [str(one).removeprefix("en:") for one in row.list("instruction_id_list")]
    return values


def load(path: str, config: str | None) -> Splits | None:
    """A data set of the hub from its local folder; None where this machine has none. ValueError: a broken row."""
    import datasets

    name = kept().get(path)
    folder = find_data(name) if name else None
    if name is None or folder is None:
        return None
    source = Source(name, folder)
    found = {}
    for split in SPLITS:
        read = rows(source, config, split)
        if read is not None:
            found[split] = datasets.Dataset.from_list([_fields(name, row) for row in read])
    if not found:
        raise ValueError(f"{path}: {folder} holds none of its splits ({', '.join(SPLITS)})")
    return Splits(found, path, folder)


class Factory(TaskFactory):
    """lm-eval's builder of tasks, which looks at home first."""

    def _load_full_config(self, entry: Any, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        config = super()._load_full_config(entry, overrides)
        path = config.get("dataset_path")
        if isinstance(path, str) and "custom_dataset" not in config and not Path(path).exists():
            place = find_data(path) if path.count("/") == 1 else None
            if place is not None:  # a copy of the hub's repository, under its whole name
                return config | {"dataset_path": str(place)}
            if kept().get(path) and find_data(kept()[path]):
                name = config.get("dataset_name")
                log.info("%s: %s is read from %s", config["task"], path, find_data(kept()[path]))

                def local(*_: Any, path: str = path, name: str | None = name, **__: Any) -> Any:
                    return load(path, name)

                config["custom_dataset"] = local
            elif path.count("/") == 1:
                _no_waiting()
        return config


def _no_waiting() -> None:
    """Where the hub does not answer, what is cached of it is looked at at once, without half a minute of tries."""
    import datasets
    import huggingface_hub

    from evals import suites

    if not suites.network():
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True


def not_there(error: Exception, names: list[str]) -> ValueError:
    """What to say when a task's data is neither here nor to be had."""
    hint = "\n".join(f"    {place}" for place in places("OWNER/NAME"))
    return ValueError(
        f"no data for {', '.join(names)}: {' '.join(str(error).split())}. Without a network, a copy of the hub's data "
        f"set is looked for in\n{hint}\nand, where a suite of ours reads it too, in that suite's folder "
        "(`moonkit eval list`)"
    )
