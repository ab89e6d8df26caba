"""moonkit stages: one photo, one clip and one question, through every stage of the model, in the order of the code.

    moonkit stages                            the bundled photo and clip, and the model in the box
    moonkit stages --image my.jpg --model PATH
    moonkit stages --picture seen.png         also draw what the model sees

Each line names the file where that step lives. Timings are of this run on this machine.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Stages:
    """Walk a photo and a clip through every stage of the model, with shapes, token counts and timings."""

    model: str = "nano"
    """Folder or hub id of a checkpoint. The default is the model in the box, whose small world holds no photos."""
    image: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A photo instead of the bundled one."""
    video: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A clip instead of the bundled one."""
    question: str = "What is in the photo, and what happens in the clip?"
    """What to ask."""
    picture: Annotated[Path | None, tyro.conf.arg(metavar="PNG")] = None
    """Also draw the photo's tokens and the clip's chunks into this file."""


def bundled(name: str) -> Path:
    """A file that ships inside the package."""
    return Path(str(files("fusion") / "assets" / name))


class Printer:
    """Prints one line per stage: where in the code, what came out, how long it took."""

    def __init__(self, console: "Console") -> None:
        self.console = console

    @contextmanager
    def __call__(self, where: str) -> Iterator[list[str]]:
        said: list[str] = []
        started = time.perf_counter()
        yield said
        milliseconds = 1000 * (time.perf_counter() - started)
        self.console.print(f"  [cyan]{where:<24}[/] {said[0]}  [dim]{milliseconds:,.0f} ms[/]", soft_wrap=True)
        for line in said[1:]:
            self.console.print(f"  {'':<24} {line}", soft_wrap=True)


def main() -> None:
    """The verb."""
    arguments = tyro.cli(Stages, prog="moonkit stages")
    from rich.console import Console

    console = Console(highlight=False)
    console.print("[bold]moonkit stages[/]: from a photo, a clip and a question to words\n")
    walk(arguments, console)


def walk(arguments: Stages, console: "Console") -> None:
    """Run every stage once and print it."""
    stage = Printer(console)
    with stage("importing torch") as said:
        import torch

        from fusion.drawing import draw_items
        from fusion.generate import decode, prefill, stop_ids
        from fusion.look import items_of
        from fusion.model import Kimi
        from fusion.template import Control, Media, render
        from moonvit.image import image_patches, load_image, plan_resize
        from moonvit.packing import pack
        from moonvit.video import read_video, timestamp_text

        said.append(f"torch {torch.__version__}, {torch.get_num_threads()} threads")

    untrained = arguments.model.startswith("untrained:")
    with stage("fusion/checkpoint.py") as said:
        kimi = Kimi.from_pretrained(arguments.model)
        count = sum(parameter.numel() for parameter in kimi.parameters())
        said.append(f"{arguments.model}: {count:,} parameters, {str(kimi.dtype).removeprefix('torch.')}")
        if untrained:
            said.append("[yellow]untrained: random weights. Every stage runs; what it says means nothing.[/]")
    config, tokenizer = kimi.config, kimi.tokenizer
    if config.vision is None or tokenizer is None:
        raise ValueError(f"the walk needs a model that sees and has a tokenizer; {arguments.model} is text-only")

    console.print("\n[bold]1. Pixels become patches[/]")
    photo, clip = arguments.image or bundled("photo.jpg"), arguments.video or bundled("clip.mp4")
    with stage("moonvit/image.py") as said:
        image = load_image(photo)
        plan = plan_resize(image.width, image.height, config.media, config.media.in_patch_limit)
        picture = image_patches(image, config.media)
        _, rows, columns = picture.grid_thw[0].tolist()
        said.append(f"{photo.name}: {image.width}x{image.height} pixels, resized to {plan.width}x{plan.height},")
        said.append(
            f"padded by {plan.pad_right} right and {plan.pad_bottom} below -> {rows}x{columns} patches of 14x14"
        )
        said.append(f"= {len(picture.pixels):,} patches -> {picture.tokens[0]:,} tokens (2x2 patches each)")
    with stage("moonvit/video.py") as said:
        video = read_video(clip, config.media)
        chunks = [chunk.patches(config.media) for chunk in video.chunks]
        frames = sum(len(chunk.frames) for chunk in video.chunks)
        said.append(
            f"{clip.name}: {video.num_frames} frames at {video.fps:.3g}/s, {frames} sampled -> {len(chunks)} chunks"
        )
        for chunk, patches in zip(video.chunks, chunks, strict=True):
            t, h, w = patches.grid_thw[0].tolist()
            stamp = timestamp_text(chunk.timestamp, config.media.timestamp_mode)
            said.append(f"chunk at {stamp}: {t}x{h}x{w} patches -> {patches.tokens[0]} tokens")
    with stage("moonvit/packing.py") as said:
        packed = pack([picture, *chunks])
        said.append(f"{len(packed)} items end to end, pixels {tuple(packed.pixels.shape)}, nothing padded")

    console.print("\n[bold]2. The conversation becomes token ids[/]")
    messages: list[dict[str, Any]] = [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": photo}},
                {"type": "video_url", "video_url": {"url": clip}},
                {"type": "text", "text": arguments.question},
            ],
        }
    ]
    with stage("fusion/template.py") as said:
        shown = []
        for piece in render(messages, profile=config.profile):
            if isinstance(piece, Control):
                shown.append(f"[magenta]{piece.name}[/]")
            elif isinstance(piece, Media):
                shown.append(f"[green]({piece.kind})[/]")
            else:
                shown.append(piece.replace("\n", "\\n").replace("[", r"\["))
        said += [f"chat format {config.profile}; only the template can make these control tokens:", "".join(shown)]
    with stage("fusion/prompt.py") as said:
        prompt = kimi.prepare(messages)
        vision_tokens = sum(item.tokens for item in prompt.items)
        said.append(
            f"{len(prompt):,} ids: {vision_tokens:,} <|media_pad|> places and {len(prompt) - vision_tokens} of text"
        )
    if arguments.picture:
        draw_items(items_of(kimi, prompt)).save(arguments.picture)
        console.print(f"  drawn into {arguments.picture}")

    console.print("\n[bold]3. The model reads[/]")
    device = kimi.device
    with torch.inference_mode():
        assert prompt.media is not None
        media = prompt.media.to(device)
        with stage("moonvit/encoder.py") as said:
            features = kimi.vision_tower(media)
            tower = config.vision
            said.append(f"{tower.num_layers} blocks, attention inside each item -> features {tuple(features.shape)}")
        with stage("fusion/projector.py") as said:
            said.append(f"4 patches become one token of the language model: {tuple(kimi.mm_projector(features).shape)}")
        with stage("fusion/model.py") as said:
            embeddings = kimi.embed(prompt.ids.to(device), media)
            said.append(f"vision tokens spliced into the text embeddings: {tuple(embeddings.shape)} (tower run again)")
        with stage("lm/model.py") as said:
            from lm.taps import Taps

            taps = Taps()
            kimi.language_model(embeddings, taps=taps)
            text = config.text
            said.append(f"{text.num_hidden_layers} layers: latent attention (lm/attention.py), experts (lm/moe.py)")
            used = [len(routing.chosen.unique()) for routing in taps.routing]
            said.append(
                f"each token chose {text.num_experts_per_tok} of {text.n_routed_experts} experts; "
                f"{min(used)}-{max(used)} experts used in a layer"
            )
        cache = kimi.language_model.new_cache(1, len(prompt) + 64)
        with stage("lm/cache.py") as said:
            logits = prefill(kimi, prompt, cache)
            said.append(
                f"prefill keeps {cache.cache_dim} elements per token and layer, {cache.bytes_per_token:,} bytes in all"
            )

        console.print("\n[bold]4. The model writes[/]")
        ids: list[int] = []
        ends = stop_ids(kimi)
        with stage("fusion/generate.py") as said:
            started = time.perf_counter()
            while len(ids) < 32:
                ids.append(int(logits.argmax()))
                if ids[-1] in ends:
                    break
                logits = decode(kimi, ids[-1:], cache)[0]
            rate = len(ids) / (time.perf_counter() - started)
            said.append(f"{len(ids)} tokens, the likeliest each time, {rate:.0f} tokens/s")
    console.print()
    words = tokenizer.decode(ids, skip_special=True)
    console.print(f"  {words!r}" + ("  (random weights: noise, as it should be)" if untrained else ""), markup=False)
    console.print(
        "\nNext: moonkit ask --help, moonkit sizes, moonkit bench; the README names the files to read, in order."
    )


if __name__ == "__main__":
    main()
