"""Kimi K2's and K2.5's own numbers, as far as they are published: a plan to read, and a run for who has the machine.

    moonkit pretrain recipes/k2_7.py --dry-run --ranks 2048      stages, steps, tokens, parameters, memory per rank

From the reports: the language model's shape, WSD with 500 warm-up steps to 2e-4, 10T tokens stable, 5.5T of cosine to
2e-5, 400B + 60B of annealing to 7e-6 (the last at 32,768 tokens), then YaRN to 262,144; batches of 67M tokens (2**26);
weight decay 0.1; QK-Clip at tau 100 (Kimi K2 report, section 2.5 and algorithm 1). Early fusion, 10 % of all tokens
from pictures and clips from the first step on (Kimi K2.5 report, table 1: the best row of its ablation; that of the
released model is not published).

Not published, and set here by us: momentum 0.95 with Nesterov (Moonlight's), the router's speed 1e-3 (DeepSeek-V3's),
the tokens of the extension stage, the norm of the gradient's clip, and what the corpora hold. `data/` is yours: folders
of text, and JSONL or parquet of conversations with images.
"""

from dataclasses import replace

from lm.config import Yarn
from train.data import Mixture, Source
from train.loop import BatchSize, Optimization, Run
from train.schedule import Schedule, Stage, k2

MIXTURE = Mixture(
    (
        Source("web", "text", 0.40, corpus="data/web"),
        Source("code", "code", 0.25, corpus="data/code"),
        Source("mathematics", "text", 0.15, corpus="data/mathematics"),
        Source("knowledge", "text", 0.10, corpus="data/knowledge"),
        Source("pictures", "vision", 0.08, corpus="data/pictures.jsonl"),
        Source("clips", "clip", 0.02, corpus="data/clips.jsonl"),
    )
)


def schedule() -> Schedule:
    """K2's stages, and the extension by YaRN whose length the report leaves open."""
    stages = list(k2().stages)
    last = stages[-1].end
    stages.append(Stage("extension", 20e9, last, last, sequence=131_072, yarn=Yarn()))
    return Schedule(tuple(stages))


def run() -> Run:
    """Joint pre-training at full size: 1.03T parameters in the language model, 417M in the tower."""
    from fusion.config import k2_7_code

    config = k2_7_code()
    return Run(
        # YaRN comes in with the last stage; until then positions are read as they are
        model=replace(config, text=replace(config.text, yarn=None)),
        mixture=MIXTURE,
        schedule=schedule(),
        batch=BatchSize(lanes=16_384, lanes_per_micro_batch=1, patch_budget=16_384),
        optimization=Optimization(weight_decay=0.1, tau=100.0, router_still=("extension",)),
        tokenizer="data/tokenizer",
        precision="bfloat16",
        parallel="fsdp",
        recompute=True,
        workers=8,
    )
