"""moonkit pretrain: train a model from random weights, pictures and text together from the first step.

    moonkit pretrain recipes/nano.py --minutes 10                   the recipe's schedule in ten minutes
    moonkit pretrain recipes/nano.py                                again after a kill: continues where it was
    moonkit pretrain recipes/nano.py --part letters --model runs/nano/model     the next part, from these weights
    torchrun --nproc-per-node 2 -m train.pretrain recipes/nano.py   the same run on two ranks
    moonkit pretrain recipes/k2_7.py --dry-run                      the whole plan; nothing is trained

A recipe is a Python file with a function `run()` that returns a train.loop.Run.
"""

import sys
from dataclasses import dataclass, replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from train.loop import Run, train
from train.parallel import Ranks, start


@dataclass(frozen=True)
class Options:
    """What may be said on the command line. Everything else stands in the recipe."""

    recipe: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE.py")]
    """A Python file that defines run() -> train.loop.Run."""
    part: Annotated[str | None, tyro.conf.arg(metavar="FUNCTION")] = None
    """Another function of the file that returns a Run: recipes of several parts say which."""
    model: Annotated[str | None, tyro.conf.arg(metavar="FOLDER|HUB ID|nano")] = None
    """A checkpoint to start from, nano for the one in the box. Left out: what the recipe says, for most random
    weights."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """The run folder. Left out: runs/ with the names of recipe and part. A folder with checkpoints of the same run is
    continued."""
    minutes: float | None = None
    """The schedule in so many minutes of training, added up over restarts."""
    steps: int | None = None
    """The schedule in so many steps."""
    seed: int | None = None
    """Of weights and data."""
    workers: int | None = None
    """Processes that make data."""
    precision: Literal["auto", "float32", "bfloat16"] | None = None
    """auto: bfloat16 on GPUs that have it, else float32, but for Newton-Schulz where AMX is fast. Weights are float32
    with all."""
    parallel: Literal["ddp", "fsdp"] | None = None
    """Under torchrun: whole models with summed gradients, or sliced ones."""
    recompute: bool = False
    """Less memory for a third more compute: activations are made again in the backward."""
    export_steps: int | None = None
    """Write a model folder every so many steps, besides the one at the end."""
    checkpoint_minutes: float | None = None
    """Minutes between checkpoints."""
    tensorboard: bool = False
    """Also write RUN/tensorboard."""
    dry_run: bool = False
    """Print stages, parameters and memory, and leave."""
    ranks: int = 1
    """For --dry-run: plan for so many ranks."""


def load_recipe(path: Path, name: str = "run") -> Run:
    """What the recipe's function returns. Raises ValueError when it returns something else, or is not there."""
    if not path.is_file():
        raise FileNotFoundError(f"no recipe at {path}")
    spec = spec_from_file_location(f"recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{path} defines no function {name}() that returns a train.loop.Run")
    run: Any = function()
    if not isinstance(run, Run):
        raise ValueError(f"{path}: {name}() must return a train.loop.Run, got {type(run).__name__}")
    return run


def apply(options: Options, run: Run) -> Run:
    """The recipe's run with what the command line says instead."""
    names = ("seed", "workers", "precision", "parallel")
    given: dict[str, Any] = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.minutes is not None or options.steps is not None:
        given |= {"minutes": options.minutes, "steps": options.steps}
    if options.recompute:
        given["recompute"] = True
    if options.model is not None:
        given["start"] = options.model
    saving = {"export_steps": options.export_steps, "minutes": options.checkpoint_minutes}
    saving |= {"tensorboard": options.tensorboard or None}
    chosen: dict[str, Any] = {name: value for name, value in saving.items() if value is not None}
    return replace(run, saving=replace(run.saving, **chosen), **given)


def main() -> None:
    """The verb."""
    options = tyro.cli(Options, prog="moonkit pretrain", description=__doc__)
    finish(options, apply(options, load_recipe(options.recipe, options.part or "run")), options.part)


def finish(options: Options, run: Run, part: str | None) -> None:
    """Plan or train, and leave with the status of the signal that stopped it."""
    if options.dry_run:
        from train.plan import describe_run

        print(describe_run(run, options.ranks))
        return
    ranks: Ranks = start(run.parallel)
    name = f"{options.recipe.stem}-{part}" if part else options.recipe.stem
    outcome = train(run, options.out or Path("runs") / name, ranks)
    if outcome.signal is not None:
        sys.exit(128 + outcome.signal)


if __name__ == "__main__":
    main()
