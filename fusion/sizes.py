"""moonkit sizes: how big every preset or checkpoint is, counted on the meta device.

moonkit sizes                     all presets
moonkit sizes --model k2_7_code   one preset, part by part
moonkit sizes --model FOLDER      a checkpoint, from its config.json alone
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from fusion.config import PRESETS, KimiConfig
from fusion.projector import Projector
from lm.model import count_parameters
from moonvit.encoder import MoonViT


@dataclass(frozen=True)
class Sizes:
    """Parameter counts, activated parameters and cache cost. Nothing is downloaded or allocated."""

    model: Annotated[str | None, tyro.conf.arg(metavar="NAME|FOLDER")] = None
    """A preset's name or a folder with a config.json. Left out: all presets."""


def count(config: KimiConfig) -> dict[str, int]:
    """Parameters of each part of a model; keys as in lm.model.count_parameters plus tower, projector and whole."""
    parts = count_parameters(config.text)
    with torch.device("meta"):
        tower = MoonViT(config.vision) if config.vision else None
        projector = Projector(config.projector, config.vision, config.text.hidden_size) if config.vision else None
    for name, module in (("tower", tower), ("projector", projector)):
        parts[name] = sum(parameter.numel() for parameter in module.parameters()) if module is not None else 0
    parts["whole"] = parts["total"] + parts["tower"] + parts["projector"] + parts["router_biases"]
    return parts


def main() -> None:
    """The verb."""
    arguments = tyro.cli(Sizes, prog="moonkit sizes")
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if arguments.model is None:
        table = Table(
            title="presets",
            caption="activated: per token, with embedding and head; cache: per token in bf16",
            box=box.SIMPLE_HEAD,
            show_edge=False,
        )
        for column in ("preset", "parameters", "activated", "experts", "cache"):  # fits 80 columns
            table.add_column(column, justify="left" if column == "preset" else "right", no_wrap=True)
        for name, preset in PRESETS.items():
            config = preset()
            text, parts = config.text, count(config)
            experts = f"{text.num_experts_per_tok} of {text.n_routed_experts} + {text.n_shared_experts}"
            cache = f"{2 * text.cache_dim * text.num_hidden_layers:,} B"
            row = (f"{parts['whole']:,}", f"{parts['activated']:,}", experts)
            table.add_row(name, *row, cache)
        console.print(table)
        return
    if arguments.model in PRESETS:
        config = PRESETS[arguments.model]()
    else:
        from fusion.checkpoint import read_config

        if not Path(arguments.model).is_dir():
            raise FileNotFoundError(
                f"{arguments.model!r} is neither a preset ({', '.join(PRESETS)}) nor a folder with a config.json"
            )
        config = read_config(Path(arguments.model))
    parts, text = count(config), config.text
    table = Table(title=arguments.model, show_header=False)
    table.add_column(justify="left")
    table.add_column(justify="right")
    for name, value in parts.items():
        table.add_row(name.replace("_", " "), f"{value:,}")
    dense_bytes = 2 * parts["whole"]
    packed = dense_bytes - 2 * parts["experts"] + parts["experts"] * 4.5 / 8
    table.add_row("weights in bfloat16", f"{dense_bytes / 2**30:,.2f} GiB")
    table.add_row("with INT4 experts", f"{packed / 2**30:,.2f} GiB")
    per_token = 2 * text.cache_dim * text.num_hidden_layers
    table.add_row(f"cache per token ({text.cache_dim} elements a layer, bf16)", f"{per_token:,} B")
    context = text.max_position_embeddings
    table.add_row(f"cache of a full context ({context:,})", f"{per_token * context / 2**30:,.2f} GiB")
    console.print(table)


if __name__ == "__main__":
    main()
