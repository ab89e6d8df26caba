"""Questions to begin with: pictures and clips of the world with known answers, a photo, a program, a sum with a tool.

    python -m demo.examples        makes demo/assets/examples/ anew from world/ and asks nano each of them

Every example of the world is held out of nano's training, and nano answers it right (tests/demo/test_chat.py asks it).
The photo is there to be honest with: nano has seen no photo, and what it says about one means nothing.
"""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from world.sample import Sample

FOLDER = Path(__file__).parent / "assets" / "examples"
PHOTOS = Path(__file__).parents[1] / "fusion" / "assets"


@dataclass(frozen=True)
class Example:
    """One question. label: what stands on its button. file: its picture or clip. tools: switched on with it.

    source: family, index and turn of the world's held-out sample, seed 7; right: its answer. Both are None where there
    is no right answer.
    """

    label: str
    question: str
    file: Path | None = None
    tools: tuple[str, ...] = ()
    source: tuple[str, int, int] | None = None
    right: str | None = None

    @property
    def icon(self) -> Path:
        if self.file is None:
            return FOLDER / ("tool.svg" if self.tools else "code.svg")
        return (FOLDER / self.file.name).with_suffix(".icon.png")


EXAMPLES = (
    Example(
        "Say what is in a picture",
        "what is in the picture?",
        FOLDER / "scene.png",
        (),
        ("caption", 4, 0),
        "purple ring middle center, blue star middle center, red ring bottom left",
    ),
    Example(
        "Where one thing is",
        "is the blue cross left or right of the red cross?",
        FOLDER / "crosses.png",
        (),
        ("picture", 5, 2),
        "left",
    ),
    Example(
        "Read two lines",
        "read everything from top to bottom.",
        FOLDER / "lines.png",
        (),
        ("reading", 7, 3),
        "tent desk",
    ),
    Example(
        "Count in a clip",
        "how often does the red shape blink?",
        FOLDER / "blinks.mp4",
        (),
        ("clip", 5, 0),
        "3",
    ),
    Example(
        "Follow two things",
        "what is the colour of what moves left?",
        FOLDER / "moves.mp4",
        (),
        ("clip", 8, 1),
        "cyan",
    ),
    Example(
        "Write a program, run its tests",
        "write f(xs): the sorted list of the negatives of the negative numbers.",
        None,
        (),
        ("function", 7, 1),
        "def f(xs):\n    return sorted(-x for x in xs if x < 0)",
    ),
    Example(
        "A sum with the calculator",
        "calculate 9438*1711 with the tool.",
        None,
        ("calculator",),
        ("tool", 1, 0),
        "16148418",
    ),
    Example(
        "A photo: nano answers noise",
        "what is in the picture?",
        PHOTOS / "photo.jpg",
    ),
)


def sample_of(example: Example) -> "Sample":
    """The world's sample that an example was taken from."""
    from world import sample

    assert example.source is not None, "only examples of the world have a sample"
    family, index, _ = example.source
    return sample(family, index, "heldout", 7, 1)


def draw(example: Example) -> None:
    """Write an example's picture or clip."""
    import av
    from PIL import Image

    from world.sample import Clip

    assert example.file is not None, "an example of words has nothing to draw"
    medium = sample_of(example).media[0]
    example.file.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(medium, Clip):
        Image.fromarray(medium.pixels).save(example.file, optimize=True)
        return
    with av.open(example.file, "w") as container:
        # every frame a key frame, and little loss: these are small drawings with hard edges
        stream = container.add_stream("libx264", Fraction(medium.fps).limit_denominator(), {"crf": "4", "g": "1"})
        stream.height, stream.width = medium.frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for pixels in medium.frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())


def draw_icon(example: Example, side: int = 144) -> None:
    """Write an example's small picture: the whole of it; of a clip the frame with the most on it."""
    from PIL import Image

    from world.sample import Clip

    assert example.file is not None, "the icons of words are drawn by hand"
    if example.source:
        medium = sample_of(example).media[0]
        pixels = max(medium.frames, key=lambda frame: frame.std()) if isinstance(medium, Clip) else medium.pixels
        image = Image.fromarray(pixels)
    else:
        image = Image.open(example.file).convert("RGB")
    scale = side / max(image.size)
    image.resize((round(image.width * scale), round(image.height * scale))).save(example.icon, optimize=True)


def main() -> None:
    """Draw them all, and say what nano answers."""
    from fusion import Kimi

    kimi = Kimi.from_pretrained("nano")
    for example in EXAMPLES:
        if example.source and example.file:
            draw(example)
        if example.file:
            draw_icon(example)
        clip = example.file is not None and example.file.suffix == ".mp4"
        media = [example.file] if example.file else []
        reply = kimi.chat(
            example.question, images=[] if clip else media, videos=media if clip else [], max_new_tokens=128
        )
        print(f"{example.label}: {example.question!r} -> {reply.text!r}, right is {example.right!r}")


if __name__ == "__main__":
    main()
