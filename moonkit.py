"""The command line: a short table from verb to the module that does it.

    moonkit ask -i photo.png "What is this?"      is      python -m fusion.generate -i photo.png "What is this?"

Nothing heavy is imported before a verb is chosen.
"""

import os
import sys
from importlib import import_module

VERBS = {
    "tour": ("evals.tour", "ask the model in the box about a fresh picture, clip, program and sum (default)"),
    "stages": ("fusion.stages", "walk one photo and one clip through every stage, with shapes and timings"),
    "ask": ("fusion.generate", "ask a model about images, clips or nothing at all; streams the answer"),
    "demo": ("demo.app", "open the page: chat with pictures and clips, see what the model sees, compare, measure"),
    "score": ("evals.world", "score a model on held-out questions, beside chance, majority and blindness"),
    "eval": ("evals.run", "evaluate a model or a server: lm-eval's command line with our suites; list, regrade"),
    "eval agent": ("evals.agents", "let a model work with tools on repositories and repairs, and grade what it leaves"),
    "eval report": ("evals.report", "tables, intervals and a page with every sample, from one run or more"),
    "eval contamination": ("evals.contamination", "how much of a benchmark stands in training data; perturbed twins"),
    "sandbox check": ("agent.selftest", "attack the sandboxes of this machine, and say what holds"),
    "quantize": ("fusion.quantize", "write a checkpoint with its experts in 4 bits, as released"),
    "sizes": ("fusion.sizes", "parameter counts, cache and memory of every preset or of a checkpoint folder"),
    "tokenizer": ("lm.bpe", "train a small tokenizer of the same kind on your own text"),
    "data": ("train.show", "show what is trained on, token by token with the loss mask in colour"),
    "pretrain": ("train.pretrain", "train a model from random weights by a recipe; continues after a kill"),
    "sft": ("train.sft", "fine-tune a trained model by a recipe"),
    "ablate": ("recipes.ablations", "change one choice of the recipe at a time; a curve and a table for each"),
    "plot": ("train.plot", "draw the curves of one or more runs"),
    "bench": ("bench.run", "measure speed beside peers and what the machine can do: vision, prefill, decode, ..."),
    "bench train": ("train.bench", "measure a training step and its parts, beside transformers when it is installed"),
}

HELP = """moonkit: images, video and text in, text out; the Kimi K2 to K2.7-Code system in one toolkit.

usage: moonkit VERB [options]        moonkit VERB --help shows a verb's options

{verbs}

start here:
  moonkit tour                                     no downloads, under a minute
  moonkit ask --model PATH -i photo.png "How many people are there?"

PATH is a folder with a released checkpoint (Kimi-K2.x, Kimi-VL, Moonlight) or a hub id.
"""


def main() -> None:
    """Entry point of the console script."""
    arguments = sys.argv[1:]
    verb, options = (arguments[0], arguments[1:]) if arguments else ("tour", [])
    if " ".join(arguments[:2]) in VERBS:  # verbs of two words
        verb, options = " ".join(arguments[:2]), arguments[2:]
    if verb in ("-h", "--help", "help"):
        width = max(map(len, VERBS))
        print(HELP.format(verbs="\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in VERBS.items())), end="")
        return
    if verb in ("-V", "--version"):
        from importlib.metadata import version

        print("moonkit", version("moonkit"))
        return
    if verb not in VERBS:
        from difflib import get_close_matches

        near = get_close_matches(verb, VERBS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"verbs: {', '.join(VERBS)}"
        print(f"moonkit: no verb {verb!r}; {hint} (moonkit --help)", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"moonkit {verb}", *options]
    try:
        import_module(VERBS[verb][0]).main()
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # `moonkit ... | head`
            sys.stderr.close()
            sys.exit(141)
        if os.environ.get("MOONKIT_TRACEBACK"):
            raise
        print(f"moonkit {verb}: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
