"""moonkit ablate: one choice of the recipe changed at a time, at a scale of minutes; a curve and a table for each.

    moonkit ablate fusion        pictures from the first step, or later and denser, at equal picture tokens
    moonkit ablate optimizer     MuonClip or AdamW, at equal tokens
    moonkit ablate sft           no fine-tuning, zero-vision (text alone), or with pictures
    moonkit ablate sparsity      8, 16 or 32 times as many experts as run, at equal activated parameters

An arm is a Run. All arms of an ablation share shape, seed and data, up to the one thing that it asks about; each is
trained in a run folder of its own, so a killed ablation continues, and then answers the same held-out questions.

    runs/ablations/fusion/early, middle, late  -->  docs/ablations/fusion.md, fusion.png
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fusion.config import KimiConfig, nano
from train.data import Mixture, Source
from train.loop import BatchSize, Optimization, Run, train
from train.schedule import wsd
from train.sft import short

if TYPE_CHECKING:
    from fusion.model import Kimi

LANES, SEQUENCE = 4, 1024


@dataclass(frozen=True)
class Ablation:
    """A question, the runs that answer it, and the families they are scored on."""

    title: str
    arms: dict[str, Run]  # in the table's order; an arm may start from an earlier one's model: start="arm:NAME"
    families: tuple[str, ...]


def small(experts: int = 32) -> KimiConfig:
    """nano at three fifths of its width and depth: two experts of `experts` run for each token."""
    config = nano()
    text = replace(
        config.text,
        hidden_size=96,
        intermediate_size=192,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        n_routed_experts=experts,
        num_experts_per_tok=2,
        q_lora_rank=64,
        kv_lora_rank=32,
        routed_scaling_factor=1.414,  # 1 / norm of two equal shares
    )
    assert config.vision is not None, "nano sees"
    vision = replace(config.vision, hidden_size=96, num_layers=3, intermediate_size=288)
    return replace(config, text=text, vision=vision)


def _source(name: str, group: str, weight: float, families: dict[str, float], **more: Any) -> Source:
    return Source(name, group, weight, families, levels=(1, 1), **more)


def _pictures(weight: float, after: int = 0, plain: float = 0.5) -> Source:
    families = {"thing": 0.7, "caption": 0.15, "picture": 0.15}
    return _source("pictures", "vision", weight, families, after=after, plain=plain)


def _words(weight: float, plain: float = 0.5) -> tuple[Source, ...]:
    return (
        _source("code", "code", 0.5 * weight, {"function": 1.0}, plain=plain),
        _source("sums", "text", 0.5 * weight, {"sum": 1.0}, plain=plain),
    )


def _run(mixture: Mixture, tokens: float, config: KimiConfig | None = None) -> Run:
    return Run(
        model=config or small(),
        mixture=mixture,
        schedule=wsd(peak=3e-3, tokens=tokens, warmup=0.02 * tokens, decay=0.3 * tokens, end=1e-4, sequence=SEQUENCE),
        batch=BatchSize(lanes=LANES, lanes_per_micro_batch=LANES, patch_budget=SEQUENCE),
        optimization=Optimization(weight_decay=0.05, tau=30.0, router_speed=3e-3),
        tokenizer=str(files("fusion") / "assets" / "nano"),
        seed=3,
    )


def fusion(tokens: float) -> Ablation:
    """20 % pictures all through, 40 % from the middle, 80 % in the last quarter (K2.5 report, table 1, in small)."""
    arms = {}
    for name, begin, share in (("early", 0.0, 0.2), ("middle", 0.5, 0.4), ("late", 0.75, 0.8)):
        mixture = Mixture((_pictures(share, round(begin * tokens / LANES)), *_words(1 - share)))
        arms[name] = _run(mixture, tokens)
    return Ablation("Early or late vision, at equal picture tokens", arms, ("thing", "picture", "function", "sum"))


def optimizer(tokens: float) -> Ablation:
    """MuonClip beside AdamW, which also gets a smaller rate: the better one counts."""
    mixture = Mixture((_pictures(0.5), *_words(0.5)))
    muon = _run(mixture, tokens)
    adam = replace(muon, optimization=replace(muon.optimization, kind="adamw"))
    slow = wsd(peak=1e-3, tokens=tokens, warmup=0.02 * tokens, decay=0.3 * tokens, end=1e-4, sequence=SEQUENCE)
    arms = {"MuonClip": muon, "AdamW": adam, "AdamW, rate 1e-3": replace(adam, schedule=slow)}
    return Ablation("MuonClip or AdamW, at equal tokens", arms, ("thing", "picture", "function", "sum"))


def sft(tokens: float) -> Ablation:
    """The same pre-trained model, which has read few conversations, after three kinds of fine-tuning."""
    base = _run(Mixture((_pictures(0.6, plain=0.9), *_words(0.4, plain=0.9))), tokens)

    def chat(name: str, group: str, weight: float, families: dict[str, float]) -> Source:
        return Source(name, group, weight, families, levels=(1, 1))

    words = (
        chat("code", "code", 0.4, {"function": 1.0}),
        chat("sums", "text", 0.3, {"sum": 1.0}),
        chat("image operations", "tool", 0.3, {"proxy": 0.7, "tool": 0.3}),
    )
    seeing = (*words, chat("pictures", "vision", 1.0, {"thing": 0.4, "caption": 0.2, "picture": 0.4}))
    tuned = replace(base, schedule=short(0.3 * tokens, peak=1e-3, sequence=SEQUENCE), start="arm:none", seed=4)
    resting = ("vision_tower.", "mm_projector.")
    arms = {
        "none": base,
        "zero-vision": replace(tuned, mixture=Mixture(words), frozen=resting),
        "with pictures": replace(tuned, mixture=Mixture(seeing)),
    }
    return Ablation("No, zero-vision or vision fine-tuning", arms, ("thing", "picture", "function", "sum"))


def sparsity(tokens: float) -> Ablation:
    """Two experts run in every arm; there are 16, 32 or 64 to choose from (Kimi K2 report, section 2.3)."""
    mixture = Mixture((_pictures(0.5), *_words(0.5)))
    arms = {f"sparsity {experts // 2}": _run(mixture, tokens, small(experts)) for experts in (16, 32, 64)}
    return Ablation("Sparsity, at equal activated parameters", arms, ("thing", "picture", "function", "sum"))


ABLATIONS: dict[str, Callable[[float], Ablation]] = {
    "fusion": fusion,
    "optimizer": optimizer,
    "sft": sft,
    "sparsity": sparsity,
}


# ---- running one -----------------------------------------------------------------------------------------------------


def run_arms(ablation: Ablation, folder: Path) -> dict[str, Path]:
    """Train what is not yet trained; the run folder of each arm."""
    places = {name: folder / name.replace(", ", "-").replace(" ", "-").lower() for name in ablation.arms}
    for name, run in ablation.arms.items():
        if run.start is not None:
            run = replace(run, start=str(places[run.start.removeprefix("arm:")] / "model"), tokenizer=None)
        if not (places[name] / "model").is_dir():
            print(f"\n{ablation.title}: {name}")
            outcome = train(run, places[name])
            if outcome.signal is not None:
                raise KeyboardInterrupt
    return places


def final_losses(folder: Path, share: float = 0.05) -> tuple[dict[str, float], dict[str, Any]]:
    """Mean loss of each group over the last steps, and the last record."""
    from train.plot import read_steps

    steps = read_steps(folder)
    last = steps[-max(1, round(share * len(steps))) :]
    groups = dict.fromkeys(name for record in last for name in record["losses"])
    means = {}
    for group in groups:
        values = [record["losses"][group] for record in last if group in record["losses"]]
        means[group] = sum(values) / len(values)
    return means, steps[-1]


def score(kimi: "Kimi", families: tuple[str, ...], n: int) -> dict[str, str]:
    """Share of right answers with its 95 % interval, per family: held-out questions of level 1."""
    from evals.world import answer, questions, summarize

    cells = {}
    for family in families:
        said = summarize(family, answer(kimi, questions(family, n, "heldout", 7, level=1)))
        low, high = said.interval
        cells[family] = f"{100 * said.share:.1f} ({100 * low:.0f} - {100 * high:.0f})"
    return cells


def table(ablation: Ablation, places: dict[str, Path], n: int) -> list[str]:
    """Markdown rows: parameters, tokens, minutes, losses at the end, held-out scores."""
    from fusion.model import Kimi

    rows: list[dict[str, str]] = []
    for name, place in places.items():
        losses, last = final_losses(place)
        kimi = Kimi.from_pretrained(str(place / "model"), dtype="float32", experts="dense").eval()
        row = {
            "": name,
            "parameters": f"{sum(p.numel() for p in kimi.parameters()):,}",
            "tokens": f"{last['tokens']:,}",
            "minutes": f"{last['seconds'] / 60:.1f}",
        }
        row |= {f"loss: {group}": f"{value:.3f}" for group, value in losses.items()}
        row |= score(kimi, ablation.families, n)
        rows.append(row)
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in row.items() if key))
    columns = list(dict.fromkeys(key for row in rows for key in row if not key.startswith("loss")))
    ends = list(dict.fromkeys(key for row in rows for key in row if key.startswith("loss")))
    columns = [*columns[:4], *ends, *columns[4:]]
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    lines += ["| " + " | ".join(row.get(column, "-") for column in columns) + " |" for row in rows]
    return lines


@dataclass(frozen=True)
class Arguments:
    """Train the arms of an ablation, score them, and write its curve and table."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="|".join((*ABLATIONS, "all")))]
    """Which one."""
    tokens: float = 1.2e6
    """Of each arm's pre-training."""
    n: int = 200
    """Held-out questions of each family."""
    runs: Path = Path("runs/ablations")
    """Run folders; arms that are trained there already are not trained again."""
    out: Path = Path("docs/ablations")
    """Where curve and table go."""

    def __post_init__(self) -> None:
        if self.name not in (*ABLATIONS, "all"):
            raise ValueError(f"no ablation {self.name!r}; there are {', '.join(ABLATIONS)} and all")
        if not self.tokens >= 1e4:
            raise ValueError(f"--tokens must be at least 10,000, got {self.tokens:,.0f}")
        if self.n < 1:
            raise ValueError(f"--n must be at least 1, got {self.n}")


def main() -> None:
    """The verb."""
    from train.plot import draw

    arguments = tyro.cli(Arguments, prog="moonkit ablate")
    for name in ABLATIONS if arguments.name == "all" else (arguments.name,):
        ablation = ABLATIONS[name](arguments.tokens)
        folder = arguments.runs / name
        asked = folder / "asked.json"
        if asked.exists() and json.loads(asked.read_text())["tokens"] != arguments.tokens:
            raise ValueError(f"{folder} holds arms of another length; name another --runs, or remove it")
        folder.mkdir(parents=True, exist_ok=True)
        asked.write_text(json.dumps({"tokens": arguments.tokens}) + "\n")
        places = run_arms(ablation, folder)
        lines = table(ablation, places, arguments.n)
        arguments.out.mkdir(parents=True, exist_ok=True)
        draw(list(places.values()), arguments.out / f"{name}.png", smooth=20)
        command = f"moonkit ablate {name} --tokens {arguments.tokens:.3g} --n {arguments.n}"
        text = [
            f"# {ablation.title}",
            "",
            f"`{command}`, {time.strftime('%Y-%m-%d')}. One seed. Losses: means over the last 5 % of steps, nats per",
            f"target token. Scores: percent right of {arguments.n} held-out questions of level 1, with 95 % intervals.",
            "",
            *lines,
            "",
            f"![curves]({name}.png)",
        ]
        (arguments.out / f"{name}.md").write_text("\n".join(text) + "\n", encoding="utf-8")
        print(f"\n{arguments.out / f'{name}.md'}, {arguments.out / f'{name}.png'}")


if __name__ == "__main__":
    main()
