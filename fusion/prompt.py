"""A conversation becomes token ids and patches.

    messages -- template.py --> pieces: text, control tokens, media
      image  -> resize, cut into patches -> as many <|media_pad|> as the tower will make tokens
      clip   -> chunks of <= 4 frames, each `timestamp<|media_begin|>video<|media_content|>pads<|media_end|>`
    pieces -- tokenizer --> Prompt(ids, media)

Only the template can make control tokens; the same strings inside a user's text stay text.
Source: released processor and chat template of Kimi-K2.5 (pads expanded here, not in the model).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from fusion.config import Profile
from fusion.template import Control, Media, Piece, encode_pieces, render, render_with_jinja
from moonvit.config import MediaConfig
from moonvit.image import Resize, image_patches, load_image, plan_resize
from moonvit.packing import PackedPatches, pack
from moonvit.video import read_video, timestamp_text

if TYPE_CHECKING:
    from fusion.model import Kimi


@dataclass(frozen=True)
class Item:
    """One image or one chunk of a clip, as the prompt holds it."""

    kind: str  # "image" or "video"
    tokens: int
    size: tuple[int, int]  # width and height of the file
    plan: Resize  # how it was resized and padded
    timestamp: float | None = None  # seconds; of the chunk's first frame


@dataclass(frozen=True)
class Prompt:
    """What the model reads. Checks itself when made.

    ids: int64 (tokens,), with one <|media_pad|> per vision token. media: all patches in order of appearance, or None.
    thinking: the prompt ends inside an open <think>, so the reply starts with thoughts.
    """

    ids: Tensor
    media: PackedPatches | None = None
    items: tuple[Item, ...] = ()
    thinking: bool = False

    def __post_init__(self) -> None:
        if self.ids.ndim != 1 or self.ids.dtype != torch.int64 or len(self.ids) == 0:
            raise ValueError(
                f"prompt ids must be a non-empty int64 vector, got {self.ids.dtype} {tuple(self.ids.shape)}"
            )
        made = self.media.tokens if self.media else []
        if self.items and [item.tokens for item in self.items] != made:
            raise ValueError(f"prompt describes items of {[i.tokens for i in self.items]} tokens but holds {made}")

    def __len__(self) -> int:
        return len(self.ids)


def prepare(
    kimi: "Kimi",
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None = None,
    thinking: bool = True,
    preserve_thinking: bool | None = None,
    max_frames: int = 480,
    profile: Profile | None = None,
) -> Prompt:
    """Render, load the media, cut them into patches and tokenise. Media of every message count, also of tool results.

    profile: another chat format of the family than the checkpoint's own, by the built-in rules.
    Raises ValueError for malformed messages, unreadable media, and media for a text-only model.
    """
    pieces = pieces_of(kimi, messages, tools, thinking, preserve_thinking, profile=profile)
    return assemble(kimi, pieces, max_frames)


def pieces_of(
    kimi: "Kimi",
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None = None,
    thinking: bool = True,
    preserve_thinking: bool | None = None,
    add_generation_prompt: bool = True,
    profile: Profile | None = None,
) -> list[Piece]:
    """A conversation in the model's own format (or in `profile`'s): by the checkpoint's template when it has one."""
    if kimi.tokenizer is None:
        raise ValueError("this model was loaded without a tokenizer (no tiktoken.model in its folder)")
    if profile is not None and profile not in get_args(Profile):
        raise ValueError(f"no chat format {profile!r}; known: {', '.join(get_args(Profile))}")
    own = profile is None or profile == kimi.config.profile
    profile = profile or kimi.config.profile
    if kimi.chat_template is None or not own:
        return render(
            messages,
            profile=profile,
            tools=tools,
            thinking=thinking,
            preserve_thinking=preserve_thinking,
            add_generation_prompt=add_generation_prompt,
        )
    # K2.7-Code's own wrapper forces both flags; render() does the same for the built-in profile
    forced = profile == "k2_7_code"
    if forced and not thinking:
        raise ValueError("Kimi-K2.7-Code always thinks: thinking=False is not available for it")
    return render_with_jinja(
        kimi.chat_template,
        messages,
        tools,
        kimi.tokenizer.special,
        add_generation_prompt=add_generation_prompt,
        thinking=thinking,
        preserve_thinking=forced or bool(preserve_thinking),
    )


def assemble(kimi: "Kimi", pieces: Sequence[Piece], max_frames: int = 480, rules: MediaConfig | None = None) -> Prompt:
    """Load the media, cut them into patches and tokenise. rules: how media are cut, where not by the model's own."""
    if kimi.tokenizer is None:
        raise ValueError("this model was loaded without a tokenizer (no tiktoken.model in its folder)")
    config, tokenizer, rules = kimi.config, kimi.tokenizer, rules or kimi.config.media
    if config.vision is None and any(isinstance(piece, Media) for piece in pieces):
        raise ValueError("this checkpoint is text-only: it has no vision tower, so it cannot take images or video")

    items: list[Item] = []
    patches: list[PackedPatches] = []
    expanded: list[Piece] = []
    for piece in pieces:
        if not isinstance(piece, Media):
            expanded.append(piece)
        elif piece.kind == "image":
            image = load_image(piece.source)
            plan = plan_resize(*image.size, rules, rules.in_patch_limit)
            patches.append(image_patches(image, rules))
            items.append(Item("image", patches[-1].tokens[0], image.size, plan))
            expanded.append(piece)
        elif rules.rule == "kimi_vl":
            raise ValueError("Kimi-VL takes no video: send the frames as images")
        else:
            # frames that carry their rate (an object with `frames` and `fps`), or a file; either may say how many
            # frames per second to look at (`sample_fps`) and how large they may be (`frame_patches`)
            frames = getattr(piece.source, "frames", piece.source)
            rate = getattr(piece.source, "fps", None)
            pace = getattr(piece.source, "sample_fps", None) or rules.sample_fps
            limits = (rules.in_patch_limit_each_frame, getattr(piece.source, "frame_patches", None))
            limit = min((n for n in limits if n is not None), default=None)
            own = replace(rules, sample_fps=pace, in_patch_limit_each_frame=limit)
            video = read_video(frames, own, fps=rate, max_frames=max_frames)
            for chunk in video.chunks:
                patches.append(chunk.patches(own))
                items.append(Item("video", patches[-1].tokens[0], video.size, chunk.plan, chunk.timestamp))
                stamp = timestamp_text(chunk.timestamp, rules.timestamp_mode)
                expanded += [
                    stamp,
                    Control("<|media_begin|>"),
                    "video",
                    Control("<|media_content|>"),
                    Media("image", None),
                ]
                expanded.append(Control("<|media_end|>"))

    pad, left = config.media_placeholder_token_id, iter(items)
    ids: list[int] = []
    for token in encode_pieces(expanded, tokenizer):
        ids += [pad] * next(left).tokens if isinstance(token, Media) else [token]
    open_thought = ids[-1] == tokenizer.special.get("<think>")
    return Prompt(torch.tensor(ids), pack(patches) if patches else None, tuple(items), open_thought)
