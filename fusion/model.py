"""The whole model on one screen: pictures and text in, logits out.

    ids       [user] [media] x x x x x [end] How many? ...      x: <|media_pad|>, one per vision token
    embed       e1     e2   v1 v2 v3 v4 v5  e3   e4  e5         v: vision_tower -> mm_projector, spliced in
    logits    language_model(embeddings)

`Kimi` is the module, and the handle through which people use it: from_pretrained, chat, stream, prepare, logits,
save_pretrained. Their work is done in checkpoint.py, prompt.py and generate.py.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fusion.config import PRESETS, KimiConfig, Profile
from fusion.projector import Projector
from lm.cache import LatentCache
from lm.model import LanguageModel
from lm.taps import Taps
from moonvit.encoder import MoonViT
from moonvit.packing import PackedPatches, in_packs

if TYPE_CHECKING:
    from fusion.checkpoint import Progress
    from fusion.generate import Reply, StreamEvent
    from fusion.prompt import Prompt
    from lm.tokenizer import Tokenizer
    from moonvit.image import ImageSource
    from moonvit.video import VideoSource


class Kimi(nn.Module):
    """A Kimi model: vision tower, projector, language model; text-only when `config.vision` is None."""

    tokenizer: "Tokenizer | None" = None
    chat_template: str | None = None  # the checkpoint's own chat_template.jinja, when it has one

    def __init__(self, config: KimiConfig) -> None:
        super().__init__()
        self.config = config
        if config.vision:
            self.vision_tower = MoonViT(config.vision, config.media)
            self.mm_projector = Projector(config.projector, config.vision, config.text.hidden_size)
        self.language_model = LanguageModel(config.text)

    def forward(
        self,
        ids: Tensor,
        media: PackedPatches | None = None,
        lengths: Sequence[int] | None = None,
        cache: LatentCache | None = None,
        taps: Taps | None = None,
    ) -> Tensor:
        """Final hidden states (tokens, dim) of token ids (tokens,); `language_model.logits` makes words of them.

        lengths: tokens of each sequence in `ids`; None means one. media: all pictures, in the order of their pads.
        """
        return self.language_model(self.embed(ids, media), lengths, cache, taps)

    def embed(self, ids: Tensor, media: PackedPatches | None = None) -> Tensor:
        """Text embeddings with the vision tokens in the places that <|media_pad|> holds for them: (tokens, dim)."""
        embeddings = self.language_model.embed(ids)
        slots = ids == self.config.media_placeholder_token_id
        if media is None:
            if self.config.vision and bool(slots.any()):
                raise ValueError(f"the prompt has {int(slots.sum())} <|media_pad|> tokens but no pictures came with it")
            return embeddings
        return splice(embeddings, slots, self.see(media), media.tokens)

    def see(self, media: PackedPatches, patch_budget: int | None = None) -> Tensor:
        """Vision tokens of all items, end to end: (tokens, dim).

        Without gradient, at most `patch_budget` patches (or one item) run at a time: a long clip costs no more
        memory than a short one. Items never see each other, so the result is the same. None: 32,768 on an
        accelerator, 1,024 on a CPU, where activations that outgrow the caches are slower.
        """
        if self.config.vision is None:
            raise ValueError("this checkpoint is text-only: it has no vision tower, so it cannot take images or video")
        if patch_budget is None:
            patch_budget = 1024 if self.device.type == "cpu" else 32_768
        if torch.is_grad_enabled() or len(media.pixels) <= patch_budget:
            return self.mm_projector(self.vision_tower(media))
        budget = max(patch_budget, *media.lengths)
        return torch.cat(in_packs(media.split(), budget, lambda packed: self.mm_projector(self.vision_tower(packed))))

    @property
    def device(self) -> torch.device:
        return self.language_model.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.model.embed_tokens.weight.dtype

    # ---- what people call ----------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        experts: Literal["packed", "dense"] = "packed",
        progress: "Progress | None" = None,
    ) -> "Kimi":
        """Load a checkpoint folder or hub id: Kimi-K2.x, Kimi-VL, Moonlight, or one that moonkit saved.

        dtype None keeps the checkpoint's. experts "packed" keeps INT4 experts in 4 bits and dequantises them as they
        are used; "dense" dequantises once (training needs it). "untrained:tiny" or "untrained:nano" gives a preset
        with random weights. Raises FileNotFoundError or one-line ValueErrors that name the file or tensor at fault.
        """
        from fusion.checkpoint import load_model

        return load_model(path_or_hub_id, dtype, device, experts, progress)

    @classmethod
    def untrained(cls, preset: str = "tiny", seed: int = 0) -> "Kimi":
        """A preset with random weights and moonkit's own tokenizer: every stage runs, its words mean nothing."""
        from fusion.checkpoint import bundled_tokenizer

        if preset not in ("tiny", "nano"):
            known = "tiny, nano" if preset in PRESETS else f"tiny, nano; released shapes: {', '.join(PRESETS)}"
            raise ValueError(f"{preset!r} cannot be made untrained: only the small presets can (known: {known})")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            kimi = cls(PRESETS[preset]())
        kimi.tokenizer = bundled_tokenizer(preset)
        kimi.language_model.stack_experts()
        return kimi.eval()

    def prepare(
        self,
        messages: "Sequence[dict[str, Any]]",
        *,
        tools: "Sequence[dict[str, Any]] | None" = None,
        thinking: bool = True,
        preserve_thinking: bool | None = None,
        max_frames: int = 480,
        profile: Profile | None = None,
    ) -> "Prompt":
        """OpenAI-style messages to token ids and patches; see fusion.prompt.prepare."""
        from fusion.prompt import prepare

        return prepare(self, messages, tools, thinking, preserve_thinking, max_frames, profile)

    @torch.inference_mode()
    def logits(self, prompt: "Prompt", taps: Taps | None = None) -> Tensor:
        """float32 (tokens, vocab) for every position of a prompt."""
        media = prompt.media.to(self.device) if prompt.media else None
        return self.language_model.logits(self(prompt.ids.to(self.device), media, taps=taps))

    def chat(
        self,
        text: str,
        images: "Sequence[ImageSource]" = (),
        videos: "Sequence[VideoSource]" = (),
        *,
        system: str | None = None,
        tools: "Sequence[dict[str, Any]] | None" = None,
        thinking: bool = True,
        max_new_tokens: int = 1024,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        stop: Sequence[str] = (),
        thinking_budget: int | None = None,
        max_frames: int = 480,
    ) -> "Reply":
        """Ask one question about images and clips (they come before the text, in the order given)."""
        for name, given in (("images", images), ("videos", videos)):
            if not isinstance(given, list | tuple):
                raise ValueError(f"{name} must be a list, also of one: {name}=[...]; got {type(given).__name__}")
        if not isinstance(text, str):
            raise ValueError(f"the question must be a str, got {type(text).__name__}")
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": image}} for image in images]
        parts += [{"type": "video_url", "video_url": {"url": video}} for video in videos]
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": text}]})
        events = self.stream(
            messages,
            tools=tools,
            thinking=thinking,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=stop,
            thinking_budget=thinking_budget,
            max_frames=max_frames,
        )
        reply = list(events)[-1].reply
        assert reply is not None, "the last event of a stream carries the reply"
        return reply

    def stream(
        self,
        messages: "Sequence[dict[str, Any]]",
        *,
        tools: "Sequence[dict[str, Any]] | None" = None,
        thinking: bool = True,
        preserve_thinking: bool | None = None,
        max_new_tokens: int = 1024,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        stop: Sequence[str] = (),
        thinking_budget: int | None = None,
        max_frames: int = 480,
        profile: Profile | None = None,
        turn: AbstractContextManager[Any] | None = None,
        halt: Callable[[], bool] | None = None,
    ) -> "Iterator[StreamEvent]":
        """Answer an OpenAI-style conversation piece by piece; the last event carries the whole Reply.

        temperature 0 is greedy. thinking_budget: thinking tokens after which </think> is forced. stop: strings that
        end the visible text. max_frames: a clip that samples to more frames is refused. profile: the chat format of
        another model of the family than the checkpoint's own. turn, halt: to share a machine, and to stop; see
        fusion.generate.stream. Errors in the arguments are raised here, not at the first event.
        """
        from fusion.generate import Sampling, stream

        strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
        sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed, strings, thinking_budget)
        prompt = self.prepare(
            messages,
            tools=tools,
            thinking=thinking,
            preserve_thinking=preserve_thinking,
            max_frames=max_frames,
            profile=profile,
        )
        # tool-call ids count over the whole conversation
        calls = sum(len(message.get("tool_calls") or ()) for message in messages)
        return stream(self, prompt, sampling, calls, tools, turn, halt)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write a checkpoint in the released layout; reading it back gives the same bytes."""
        from fusion.checkpoint import save_model

        save_model(self, folder, **options)


def splice(embeddings: Tensor, slots: Tensor, vision: Tensor, tokens: Sequence[int]) -> Tensor:
    """Put vision tokens (vision tokens, dim) into the rows where `slots` (tokens,) is True, item by item.

    Each run of slots belongs to one item and must have exactly its number of tokens: checking the total alone would
    let two pictures swap rows. The result has the vision tokens' dtype, as in the released code.
    """
    edges = torch.diff(slots.long(), prepend=slots.new_zeros(1).long(), append=slots.new_zeros(1).long())
    runs = ((edges == -1).nonzero() - (edges == 1).nonzero()).flatten().tolist()
    if len(runs) != len(tokens):
        raise ValueError(
            f"the prompt has {len(runs)} runs of <|media_pad|> but {len(tokens)} images or chunks came with it; "
            "prompt and pixels were built from different media"
        )
    for index, (run, count) in enumerate(zip(runs, tokens, strict=True)):
        if run != count:
            raise ValueError(
                f"item {index}: the prompt has {run} <|media_pad|> tokens but the vision tower made {count} features; "
                "they must match one to one, so prompt and pixels were built from different media"
            )
    embeddings = embeddings.to(vision.dtype)
    return embeddings.masked_scatter(slots[:, None], vision)
