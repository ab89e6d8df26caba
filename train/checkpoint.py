"""Checkpoints of a run that survive a kill at any moment, and continue on another number of ranks.

    RUN/step-000400/   weights and optimizer in float32 (torch.distributed.checkpoint: each rank its slices),
                       state.json: progress and the data's position
    RUN/LATEST         the name of the newest
    RUN/config.json    what the run is; a run continues only with an equal one, or with another schedule from where
                       both have been the same so far (WSD: a longer or a shorter stable stage)

Written as .writing-000400, forced to the disk, then renamed: a folder with a step's name is always whole. The last two
stay. Nothing in a training step draws random numbers; torch's generator is kept for what a recipe's hooks may draw.
"""

import dataclasses
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint import load as load_tensors
from torch.distributed.checkpoint import save as save_tensors
from torch.distributed.checkpoint.api import CheckpointException

from fusion.model import Kimi
from lm.config import Yarn
from train import parallel
from train.data import merge
from train.parallel import Ranks
from train.schedule import Schedule, Stage

if TYPE_CHECKING:
    from train.loop import Progress, Run, Trainer

# of a Run: may change between two starts, because no weight depends on it
_FREE = ("saving", "workers", "parallel", "evaluate", "evaluate_steps")


def describe(value: Any) -> Any:
    """Dataclasses, mappings, functions and the like as plain JSON, the same for equal values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: describe(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): describe(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [describe(each) for each in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return str(value)


def differences(old: Any, new: Any, at: str = "") -> list[str]:
    """Names of the fields in which two descriptions differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in dict.fromkeys([*old, *new]):
            where = f"{at}.{key}" if at else key
            found += differences(old.get(key), new.get(key), where)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [text for i, (a, b) in enumerate(zip(old, new, strict=True)) for text in differences(a, b, f"{at}[{i}]")]
    return [] if old == new else [f"{at} was {_short(old)}, is {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


class Checkpoints:
    """The run folder. Made before the model, so that another run's folder is refused early."""

    def __init__(self, folder: Path, run: "Run", ranks: Ranks) -> None:
        """Raises ValueError when the folder holds checkpoints of a run with another config."""
        self.folder, self.run, self.ranks = folder, run, ranks
        config = describe(run) | {"model": describe(run.config())}
        path, latest = folder / "config.json", self.latest()
        if latest is not None:
            old = json.loads(path.read_text(encoding="utf-8"))
            new = json.loads(json.dumps(config))
            for key in _FREE:
                old.pop(key, None), new.pop(key, None)
            if _may_reschedule(old, new, latest):
                old["schedule"] = new["schedule"]
            found = differences(old, new)
            if found:
                more = f" (and {len(found) - 5} more)" if len(found) > 5 else ""
                raise ValueError(
                    f"{folder} holds a run with another config, so it cannot be continued with this one: "
                    f"{'; '.join(found[:5])}{more}. Name another folder with --out, or remove this one"
                )
        if ranks.first:
            folder.mkdir(parents=True, exist_ok=True)
            for left in [*folder.glob(".writing-*"), *folder.glob(".old-*")]:  # of a process that was killed
                shutil.rmtree(left)
            write_text(path, json.dumps(config, indent=1) + "\n")

    def latest(self) -> Path | None:
        """The newest whole checkpoint."""
        pointer = self.folder / "LATEST"
        if pointer.exists():
            named = self.folder / pointer.read_text(encoding="utf-8").strip()
            if named.is_dir():
                return named
        found = sorted(self.folder.glob("step-*"))
        return found[-1] if found else None

    def load(self, trainer: "Trainer", progress: "Progress") -> dict[str, Any] | None:
        """Put the newest checkpoint into trainer and progress; the data's state. None: the run starts now."""
        path = self.latest()
        if path is None:
            return None
        try:
            stored = json.loads((path / "state.json").read_text(encoding="utf-8"))
            reader = FileSystemReader(path)
            known = reader.read_metadata().state_dict_metadata
            tensors: dict[str, Any] = {f"model/{name}": t for name, t in trainer.kimi.state_dict().items()}
            slots: dict[int, dict[str, Tensor]] = {}
            numbers = {name: number for number, (name, _) in enumerate(_optimized(trainer))}
            by_name = dict(_optimized(trainer))
            for key, meta in known.items():
                if key.startswith("optimizer/"):
                    _, name, part = key.split("/")
                    parameter, shape = by_name[name], getattr(meta, "size", None)
                    assert shape is not None, f"{key} is not a tensor"
                    like = torch.zeros_like(parameter) if shape == parameter.shape else torch.zeros(tuple(shape))
                    tensors[key] = slots.setdefault(numbers[name], {})[part] = like.detach()
            tensors["generator"] = torch.get_rng_state()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process")
                load_tensors(tensors, storage_reader=reader, no_dist=not _distributed())
        except (OSError, KeyError, json.JSONDecodeError, CheckpointException, EOFError, RuntimeError) as error:
            detail = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise ValueError(
                f"checkpoint {path} cannot be read ({detail[0]}); move it away to continue from the one before"
            ) from error
        torch.set_rng_state(tensors["generator"])
        whole = trainer.optimizer.state_dict()
        trainer.optimizer.load_state_dict({"state": slots, "param_groups": whole["param_groups"]})
        trainer.optimizer.newton_schulz_calls = stored["newton_schulz_calls"]
        for field in dataclasses.fields(progress):
            if field.name in stored["progress"]:
                setattr(progress, field.name, stored["progress"][field.name])
        return stored["data"]

    def save(self, trainer: "Trainer", progress: "Progress", data: dict[str, Any]) -> None:
        """Write a checkpoint and drop all but the last few. A collective call."""
        name = f"{progress.step:06d}"
        draft, target = self.folder / f".writing-{name}", self.folder / f"step-{name}"
        parts = [data]
        if _distributed():
            parts = [{} for _ in range(self.ranks.world_size)]
            dist.all_gather_object(parts, data)
        if target.exists():
            return  # this step is already there
        if self.ranks.first:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
        _wait()
        tensors: dict[str, Any] = {f"model/{key}": value for key, value in trainer.kimi.state_dict().items()}
        for key, parameter in _optimized(trainer):
            for part, value in trainer.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{key}/{part}"] = value
        tensors["generator"] = torch.get_rng_state()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*assuming the intent is to save in a single process")
            save_tensors(tensors, storage_writer=FileSystemWriter(draft, sync_files=True), no_dist=not _distributed())
        if self.ranks.first:
            state = {
                "progress": dataclasses.asdict(progress),
                "data": merge(parts),
                "newton_schulz_calls": trainer.optimizer.newton_schulz_calls,
            }
            write_text(draft / "state.json", json.dumps(state))
            _sync(draft)
            os.replace(draft, target)
            _sync(self.folder)
            write_text(self.folder / "LATEST", target.name + "\n")
            for old in sorted(self.folder.glob("step-*"))[: -self.run.saving.keep]:
                away = self.folder / f".old-{old.name}"
                os.replace(old, away)  # at once, so that no half-deleted folder has a step's name
                shutil.rmtree(away)
        _wait()

    def export(self, kimi: Kimi, folder: Path) -> None:
        """A checkpoint folder that Kimi.from_pretrained reads. A collective call."""
        if _distributed() and self.ranks.mode == "fsdp":
            state = parallel.full_state(kimi)
            if self.ranks.first:
                with torch.device("meta"):
                    whole = Kimi(kimi.config)
                whole.tokenizer, whole.chat_template = kimi.tokenizer, kimi.chat_template
                whole.load_state_dict(state, assign=True)
                whole.save_pretrained(folder, overwrite=True)
        elif self.ranks.first:
            kimi.save_pretrained(folder, overwrite=True)
        _wait()


def _may_reschedule(old: dict[str, Any], new: dict[str, Any], checkpoint: Path) -> bool:
    """Whether the schedules of two configs have been the same up to a checkpoint, counted in their own tokens."""
    if any(config.get(key) is not None for config in (old, new) for key in ("steps", "minutes")):
        return False  # a step then moves along the schedule in proportion to its length
    try:
        position = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["progress"]["position"]
        return _schedule(old).same_until(_schedule(new), position)
    except (OSError, KeyError, TypeError, ValueError):
        return False  # what is wrong is said where it is loaded


def _schedule(config: dict[str, Any]) -> Schedule:
    stages = config["schedule"]["stages"]
    return Schedule(tuple(Stage(**stage | {"yarn": stage["yarn"] and Yarn(**stage["yarn"])}) for stage in stages))


def _optimized(trainer: "Trainer") -> list[tuple[str, Any]]:
    """Names and parameters in the optimizer's order."""
    groups = trainer.optimizer.param_groups
    return [pair for group in groups for pair in zip(group["names"], group["params"], strict=True)]


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _wait() -> None:
    if _distributed():
        dist.barrier()


def write_text(path: Path, text: str) -> None:
    """Replace a file at once: whoever reads it, also after a kill, sees the old text or the new."""
    draft = path.with_name(path.name + ".writing")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """Force a folder's names to the disk, where the system can."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
