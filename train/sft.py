"""moonkit sft: fine-tune a model that has been trained, with the same step, loop and optimizer (Muon here too).

    moonkit sft recipes/nano.py --model runs/nano/model

The recipe's function `sft()` returns the Run; its schedule is short and its rate low (see `short`). K2.5's first
fine-tuning is zero-vision: text only, with image operations as calls of a tool; whether that or ordinary vision SFT is
trained is the mixture's choice.
"""

import tyro

from train.pretrain import Options, apply, finish, load_recipe
from train.schedule import Schedule, cosine


def short(tokens: float, peak: float = 2e-4, sequence: int = 1024) -> Schedule:
    """A schedule for fine-tuning: 3 % warm-up, then cosine to a tenth of the peak."""
    return cosine(peak, tokens, 0.03 * tokens, 0.1 * peak, sequence)


def main() -> None:
    """The verb."""
    options = tyro.cli(Options, prog="moonkit sft", description=__doc__)
    part = options.part or "sft"
    run = apply(options, load_recipe(options.recipe, part))
    if run.start is None:
        raise ValueError("fine-tuning starts from a trained model: name its folder with --model")
    finish(options, run, part)


if __name__ == "__main__":
    main()
