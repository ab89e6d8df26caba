"""moonkit's models in lm-eval: "moonkit" (weights that run here) and "moonkit-endpoint" (a chat server).

    moonkit eval --tasks gsm8k --model_args pretrained=nano,thinking=true
    python -c "import evals.adapter; from lm_eval.__main__ import cli_evaluate; cli_evaluate()" run --model moonkit ...
    lm_eval.simple_evaluate(model=evals.adapter.Moonkit("nano"), tasks=[...])

    loglikelihood      context, continuation --> packed sequences, the context read once --> (log-probability, greedy?)
    generate_until     context, media ---------> fusion.generate in batches by tokens ----> text after the last thought
                       every answer goes to the store (evals/store.py) as it comes

Importing this module registers both names. Thinking: a prompt from the chat template opens a thought as the model's
profile says; stop strings are looked for in the visible text only, after the thought. Likelihoods of a model that
always thinks mean nothing, so thinking=false must be said for them: raw text is then read as it is, and the chat
template closes the thought at once.
"""

import hashlib
import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from evals import endpoint, plugins  # noqa: F401  (they register themselves)
from evals.media import digest, source
from evals.requests import (
    Answer,
    Heard,
    Options,
    Question,
    Rendered,
    check_names,
    conversation,
    cut,
    likelihoods,
    media_of,
    place_of,
    replies,
)
from evals.store import Store, files_digest, key_of
from fusion.checkpoint import locate, read_config
from fusion.config import KimiConfig
from fusion.generate import ReplyReader, Sampling, generate, stop_ids
from fusion.model import Kimi
from fusion.prompt import Prompt, assemble, pieces_of
from fusion.template import Control, Media, Piece, encode_pieces, merge_text, render, render_with_jinja
from moonvit.packing import PackedPatches

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from lm.cache import LatentCache

log = logging.getLogger(__name__)

Thinking = Literal["auto", "true", "false", "preserved"]
ALWAYS = ("k2_7_code",)  # profiles that cannot answer without a thought
SOMETIMES = ("k2_5", "k2_6")
REPLY_ROOM = 1024  # tokens of a reply that a batch counts with; longer ones grow the cache
LOGIT_ROWS = 512  # positions whose logits are held at once


@dataclass(frozen=True)
class Pair:
    """A context and its continuation as ids. media: the context's, whose <|media_pad|> are among the ids."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    media: PackedPatches | None = None


def is_small(config: KimiConfig) -> bool:
    """A model for one or two cores, like the one in the box."""
    return config.text.hidden_size < 1024


@register_model("moonkit")
class Moonkit(TemplateLM):
    """A Kimi model that runs here. Arguments as in `--model_args`; see __init__."""

    MULTIMODAL = True

    def __init__(
        self,
        pretrained: str | Path | Kimi = "nano",
        *,
        path: str | None = None,
        dtype: str | None = None,
        experts: str = "auto",
        device: str | None = None,
        thinking: bool | str = "auto",
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int = 0,
        max_gen_toks: int | None = None,
        max_batch_tokens: int | None = None,
        max_length: int | None = None,
        frames: int = 480,
        pixels: int | None = None,
        store: str | Path | Store | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        trust_remote_code: bool = False,
        **unknown: Any,
    ) -> None:
        """Load the model.

        pretrained (or path): folder, hub id, "nano", "untrained:tiny", or a Kimi. dtype: None for the checkpoint's, and
        float32 for a small model on a CPU. experts: INT4 ones packed, or dense, faster where they are small (auto).
        thinking: auto (as the profile does), true, false, preserved (K2.6: earlier thoughts stay). temperature, top_p,
        top_k, max_gen_toks: win over what a task says. seed: of sampled replies, with their keys. max_batch_tokens:
        tokens side by side. frames: most frames of a clip. pixels: images and frames are cut down to about
        pixels x pixels. store: folder in which answers are kept. Raises ValueError for arguments that do not fit.
        """
        super().__init__()
        known = [name for name in self.__init__.__annotations__ if name not in ("unknown", "return")]  # type: ignore[misc]
        check_names("moonkit", unknown, known)
        if path is not None and pretrained != "nano":
            raise ValueError(f"pretrained={pretrained} and path={path}: give one of them")
        if batch_size not in (None, 1, "1") or max_batch_size is not None:
            log.warning("batch_size is ignored: batches are made by tokens (max_batch_tokens)")
        mode = str(thinking).lower()
        if mode not in ("auto", "true", "false", "preserved"):
            raise ValueError(f"thinking must be auto, true, false or preserved, got {thinking!r}")
        for name, value in {"max_gen_toks": max_gen_toks, "max_batch_tokens": max_batch_tokens, "frames": frames,
                            "pixels": pixels, "max_length": max_length}.items():  # fmt: skip
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if pixels is not None and pixels < 28:
            raise ValueError(f"pixels must be at least 28, one token, got {pixels}")
        self.given = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "max_tokens": max_gen_toks}
        self.seed, self.frames, self.pixels = int(seed), frames, pixels
        self.store = store if isinstance(store, Store) or store is None else Store(store)
        self.heard: Heard | None = None
        where = _device(device)
        if isinstance(pretrained, Kimi):
            self.name, self.kimi = "a Kimi", pretrained.eval()
        else:
            self.name = str(path or pretrained)
            if experts not in ("auto", "packed", "dense"):
                raise ValueError(f"experts must be auto, packed or dense, got {experts!r}")
            little = self.name.startswith("untrained:") or is_small(read_config(locate(self.name)))
            wanted = ("float32" if little and where == "cpu" else None) if dtype in (None, "auto") else str(dtype)
            held: Any = ("dense" if little else "packed") if experts == "auto" else experts
            self.kimi = Kimi.from_pretrained(self.name, wanted, where, held).eval()
        if self.kimi.tokenizer is None:
            raise ValueError(f"{self.name} has no tokenizer (no tiktoken.model in its folder), so it cannot be asked")
        self.tokens = self.kimi.tokenizer
        self.thinking = mode
        self.profile = self.kimi.config.profile
        if mode in ("true", "preserved") and self.profile not in (*ALWAYS, *SOMETIMES, "k2_thinking"):
            raise ValueError(f"thinking={mode}: a model of the {self.profile} kind has no thoughts to open")
        self._max_length = min(max_length or 10**9, self.kimi.config.text.max_position_embeddings)
        self.max_batch_tokens = max_batch_tokens or (32_768 if self.kimi.device.type == "cpu" else 262_144)
        self.max_gen_toks = max_gen_toks or (4096 if self.thinks else 256)
        rules = self.kimi.config.media
        if pixels is not None:
            patches = (pixels // 14) ** 2
            each = rules.in_patch_limit_each_frame
            rules = replace(
                rules,
                in_patch_limit=min(rules.in_patch_limit, patches),
                in_patch_limit_each_frame=patches if each is None else min(each, patches),
            )
        self.rules = rules
        self._identity: dict[str, Any] | None = None

    # ---- what it is ----------------------------------------------------------------------------------------------

    @property
    def thinks(self) -> bool:
        """Whether a prompt from the chat template opens a thought."""
        return self.thinking in ("true", "preserved") or (
            self.thinking == "auto" and self.profile in (*ALWAYS, *SOMETIMES, "k2_thinking")
        )

    @property
    def chats(self) -> bool:
        return True

    @property
    def identity(self) -> dict[str, Any]:
        """What an answer depends on besides the question: hashes, number format, and how media are cut."""
        if self._identity is None:
            text = self.kimi.config.text
            self._identity = {
                "weights_sha256": self._weights(),
                "tokenizer_sha256": _tokenizer_digest(self.kimi),
                "template_sha256": _sha(self.kimi.chat_template or f"profile {self.profile}"),
                "dtype": str(self.kimi.dtype).removeprefix("torch."),
                "thinking": self.thinking,
                "frames": self.frames,
                "pixels": self.pixels,
                "max_length": self._max_length if self._max_length < text.max_position_embeddings else None,
            }
        return self._identity

    def _weights(self) -> str:
        if self.name == "a Kimi" or self.name.startswith("untrained:"):
            sum_ = hashlib.sha256()
            for name, tensor in sorted(self.kimi.state_dict().items()):
                sum_.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                sum_.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            return sum_.hexdigest()
        folder = locate(self.name)
        names = ("config.json", "model.safetensors.index.json", "preprocessor_config.json")
        files = sorted(folder.glob("*.safetensors")) + [folder / name for name in names if (folder / name).is_file()]
        return files_digest(files)

    def get_model_info(self) -> dict[str, Any]:
        """For lm-eval's results."""
        return {
            "model_num_parameters": sum(p.numel() for p in self.kimi.parameters()),
            "model_dtype": str(self.kimi.dtype),
            "model_revision": "N/A",
            "model_sha": self.identity["weights_sha256"],
            "tokenizer_sha256": self.identity["tokenizer_sha256"],
            "template_sha256": self.identity["template_sha256"],
            "thinking": self.thinking,
        }

    @property
    def parameters(self) -> dict[str, Any]:
        """For the run folder: the settings in force."""
        given = {name: value for name, value in self.given.items() if value is not None}
        return given | {
            "thinking": self.thinking,
            "dtype": str(self.kimi.dtype).removeprefix("torch."),
            "device": str(self.kimi.device),
            "seed": self.seed,
            "max_gen_toks": self.max_gen_toks,
            "max_batch_tokens": self.max_batch_tokens,
            "frames": self.frames,
            "pixels": self.pixels,
            "profile": self.profile,
        }

    @property
    def device(self) -> torch.device:
        return self.kimi.device

    @property
    def eot_token_id(self) -> int:
        return self.kimi.config.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.kimi.config.bos_token_id

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def tokenizer_name(self) -> str:
        """Tokenizer, template and thinking in one name: lm-eval keys built prompts by it."""
        parts = self.identity["tokenizer_sha256"][:16], self.identity["template_sha256"][:16], self.thinking
        return "moonkit-" + "-".join(parts)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.tokens.encode(string)

    # ---- prompts -------------------------------------------------------------------------------------------------

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The checkpoint's own, or the name of the built-in one."""
        return (self.kimi.chat_template or f"built-in: {self.profile}") if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> Rendered:
        """A conversation as the model was trained to read it. The result reads as text and keeps its messages."""
        messages = [{"role": m["role"], "content": m["content"]} for m in chat_history]
        pieces = self._chat(messages, add_generation_prompt)
        text = "".join(piece.name if isinstance(piece, Control) else str(piece) for piece in pieces)
        return Rendered(text, messages, add_generation_prompt)

    def _chat(self, messages: Sequence[dict[str, Any]], open: bool) -> list[Piece]:
        preserve = True if self.thinking == "preserved" else None
        if self.profile in ALWAYS and not self.thinks:  # K2.7's template has no such form; K2.6's closes the thought
            flags: dict[str, Any] = {"add_generation_prompt": open, "thinking": False, "preserve_thinking": True}
            template = self.kimi.chat_template
            if template is None:
                pieces = render(messages, profile="k2_6", **flags)
            else:
                pieces = render_with_jinja(template, messages, None, self.tokens.special, **flags)
        else:
            pieces = pieces_of(self.kimi, messages, None, self.thinks, preserve, open)
        if not open:  # the answer has begun: what follows continues it
            ends = [index for index, piece in enumerate(pieces) if piece == Control("<|im_end|>")]
            pieces = pieces[: ends[-1]] if ends else pieces
        return pieces

    def _pieces(self, context: str, media: Sequence[Any]) -> list[Piece]:
        """A request's context. Raises ValueError when its media do not fit its places."""
        made = [source(medium, self.frames, self.kimi.config.media.sample_fps) for medium in media]
        if isinstance(context, Rendered):
            messages = conversation(context, media)
            fresh = iter(made)
            for message in messages:
                if isinstance(message["content"], list):
                    message["content"] = [
                        part if part["type"] == "text" else {"type": part["type"], part["type"]: next(fresh)}
                        for part in message["content"]
                    ]
            return self._chat(messages, context.open)
        if not media:
            return [context]
        pieces: list[Piece] = []
        fresh = iter(made)
        for part in conversation(context, media)[0]["content"]:
            if part["type"] == "text":
                pieces.append(part["text"])
            elif part["type"] == "video":
                pieces.append(Media("video", next(fresh)))
            else:
                pieces += [Control("<|media_begin|>"), "image", Control("<|media_content|>")]
                pieces += [Media("image", next(fresh)), Control("<|media_end|>")]
        return merge_text(pieces)

    def _prompt(self, pieces: Sequence[Piece]) -> Prompt:
        return assemble(self.kimi, pieces, max_frames=max(self.frames, 480) + 1, rules=self.rules)

    # ---- likelihoods ---------------------------------------------------------------------------------------------

    def _refuse_thinking(self, requests: Sequence["Instance"]) -> None:
        """Likelihoods of a model whose prompts open a thought are those of an answer that it would never give."""
        opened = any(isinstance(r.args[0], Rendered) and r.args[0].open for r in requests) and self.thinks
        always = self.profile in ALWAYS and self.thinking != "false"
        if requests and (always or opened or self.thinking in ("true", "preserved")):
            tasks = ", ".join(sorted({str(r.task_name) for r in requests}))
            raise ValueError(
                f"{tasks}: likelihoods are asked of a model that thinks before it answers; take a task that generates, "
                "or say thinking=false (--model_args thinking=false) to score it as a plain language model"
            )

    def loglikelihood(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding would say it) of each continuation; contexts may hold media."""
        self._refuse_thinking(requests)
        keyed = []
        for request in requests:
            context, continuation = request.args[0], request.args[1]
            media = media_of(request)
            asked: dict[str, Any] = {"kind": "loglikelihood", "model": self.identity, "text": str(context)}
            if isinstance(context, Rendered):
                asked |= {"messages": context.messages, "open": context.open}
            asked |= {"continuation": continuation, "media": [digest(medium) for medium in media]}
            keyed.append((key_of(asked), request))

        def score(places: list[int]) -> Iterator[tuple[int, Any]]:
            pairs = []
            for place in places:
                request = keyed[place][1]
                try:
                    pairs.append(self._pair(request.args[0], request.args[1], media_of(request)))
                except ValueError as error:
                    raise ValueError(f"{place_of(request)}: {error}") from None
            for index, (value, greedy) in self._score(pairs):
                self.cache_hook.add_partial("loglikelihood", keyed[places[index]][1].args, (value, greedy))
                yield places[index], [value, greedy]

        values = likelihoods(keyed, self.store, score, disable_tqdm)
        return [(float(value), bool(greedy)) for value, greedy in values]

    def _pair(self, context: str, continuation: str, media: Sequence[Any] = ()) -> Pair:
        """Ids of both. Spaces at the end of the context go to the continuation, as in TemplateLM."""
        pieces = self._pieces(context, media)
        head, tail = list(pieces), ""
        if head and isinstance(head[-1], str):
            tail = str(head.pop())
        spaces = len(tail) - len(tail.rstrip())
        if spaces:
            continuation, tail = tail[-spaces:] + continuation, tail[:-spaces]
        known = self.tokens.encode(tail)
        said = self.tokens.encode(tail + continuation)[len(known) :]
        if media:
            prompt = self._prompt(head)
            ids, packed = [*prompt.ids.tolist(), *known], prompt.media
        else:
            ids, packed = [*(i for i in encode_pieces(head, self.tokens) if isinstance(i, int)), *known], None
        if not ids:
            ids = [self.prefix_token_id]
            if said and said[0] == self.prefix_token_id:
                said = said[1:]
        if not said:
            raise ValueError(f"the continuation {continuation!r} has no tokens")
        return Pair(tuple(ids), tuple(said), packed)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = dict(self._score([Pair(tuple(context), tuple(said)) for _, context, said in requests]))
        return [found[index] for index in range(len(requests))]

    @torch.inference_mode()
    def _score(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """(place, (log-probability, greedy)) of each pair, long ones first; no order besides.

        Pairs whose input is the same are read once: four one-letter choices cost one pass. Continuations of a context
        share its cache. The rest is packed end to end, `max_batch_tokens` at a time.
        """
        inputs: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        cuts: dict[int, tuple[int, ...]] = {}
        for place, pair in enumerate(pairs):
            if len(pair.continuation) > self.max_length:
                raise ValueError(
                    f"a continuation of {len(pair.continuation):,} tokens exceeds the context ({self.max_length:,})"
                )
            whole = pair.context + pair.continuation
            if len(whole) > self.max_length + 1:
                if pair.media is not None:
                    raise ValueError(
                        f"context and continuation have {len(whole):,} tokens, more than the {self.max_length:,} of "
                        "the model, and a context with images cannot be cut; use smaller ones (pixels=...)"
                    )
                log.warning("a context is cut on the left by %d tokens to fit", len(whole) - self.max_length - 1)
                whole = whole[-(self.max_length + 1) :]
            cuts[place] = whole[:-1]
            inputs[(id(pair.media) if pair.media is not None else 0, *whole[:-1])].append(place)
        # by context, so that its continuations come together
        families: dict[tuple[Any, ...], list[list[int]]] = defaultdict(list)
        for key, places in inputs.items():
            longest = min(len(pairs[place].continuation) for place in places)
            start = len(cuts[places[0]]) - max(len(pairs[place].continuation) for place in places) + 1
            shared = start if longest and start > 1 else 0
            families[(key[0], cuts[places[0]][: shared - 1] if shared else places[0])].append(places)
        alone: list[list[int]] = []
        for (_, prefix), members in families.items():
            if not isinstance(prefix, tuple) or len(members) == 1 or len(prefix) < 8:
                alone += members
            else:
                yield from self._score_family(pairs, cuts, members, len(prefix))
        alone.sort(key=lambda places: -len(cuts[places[0]]))
        while alone:
            batch = [alone.pop(0)]
            room = self.max_batch_tokens - len(cuts[batch[0][0]])
            while alone and len(cuts[alone[0][0]]) <= room:
                room -= len(cuts[alone[0][0]])
                batch.append(alone.pop(0))
            yield from self._score_packed(pairs, cuts, batch)

    def _embed(self, ids: Sequence[int], media: PackedPatches | None) -> Tensor:
        known = torch.tensor(ids, device=self.kimi.device)
        return self.kimi.embed(known, media.to(self.kimi.device) if media is not None else None)

    def _score_packed(
        self, pairs: Sequence[Pair], cuts: Mapping[int, tuple[int, ...]], batch: Sequence[list[int]]
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        lengths = [len(cuts[places[0]]) for places in batch]
        parts = [self._embed(cuts[places[0]], pairs[places[0]].media) for places in batch]
        hidden = self.kimi.language_model(torch.cat(parts), lengths)
        for places, states in zip(batch, hidden.split(lengths), strict=True):
            yield from self._read(pairs, places, states)

    def _score_family(
        self, pairs: Sequence[Pair], cuts: Mapping[int, tuple[int, ...]], members: list[list[int]], prefix: int
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        """The common beginning once into a cache, then every continuation on a copy of it."""
        first = members[0][0]
        language = self.kimi.language_model
        cache = language.new_cache(1, prefix)
        for part in self._embed(cuts[first][:prefix], pairs[first].media).split(2048):
            language(part, cache=cache)
        members = sorted(members, key=lambda places: -len(cuts[places[0]]))
        each = len(cuts[members[0][0]])
        step = max(1, self.max_batch_tokens // max(1, each))
        for at in range(0, len(members), step):
            some = members[at : at + step]
            copies: LatentCache = cache.select([0] * len(some))
            new = [len(cuts[places[0]]) - prefix for places in some]
            ids = [token for places in some for token in cuts[places[0]][prefix:]]
            hidden = language(language.embed(torch.tensor(ids, device=self.kimi.device)), new, copies)
            for places, states in zip(some, hidden.split(new), strict=True):
                yield from self._read(pairs, places, states)

    def _read(
        self, pairs: Sequence[Pair], places: list[int], states: Tensor
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Log-probabilities from the hidden states before each token of the continuations that end here."""
        lengths = {place: len(pairs[place].continuation) for place in places}
        count = max(lengths.values())
        totals, greedy = dict.fromkeys(places, 0.0), dict.fromkeys(places, True)
        for start in range(0, count, LOGIT_ROWS):  # a whole window's logits would be gigabytes
            table = self.kimi.language_model.logits(states[len(states) - count :][start : start + LOGIT_ROWS])
            table = table.log_softmax(-1)
            best = table.argmax(-1)
            for place, length in lengths.items():
                skip = count - length  # rows before this continuation begins
                first = max(start, skip)
                said = torch.tensor(pairs[place].continuation[first - skip : start + len(table) - skip]).to(
                    table.device
                )
                if len(said):
                    rows = table[first - start :]
                    totals[place] += float(rows.gather(1, said[:, None]).sum())
                    greedy[place] &= bool((best[first - start :] == said).all())
        for place in places:
            yield place, (totals[place], greedy[place])

    def loglikelihood_rolling(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows of the model's context; each token is predicted once."""
        self._refuse_thinking(requests)
        asked = [{"kind": "rolling", "model": self.identity, "text": str(request.args[0])} for request in requests]
        keyed = [(key_of(each), request) for each, request in zip(asked, requests, strict=True)]

        def score(places: list[int]) -> Iterator[tuple[int, Any]]:
            windows: list[Pair] = []
            owners: list[int] = []
            left: dict[int, int] = {}
            totals: dict[int, float] = {}
            for place in places:
                ids = self.tok_encode(str(keyed[place][1].args[0]))
                rolling = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
                mine = [Pair(tuple(a), tuple(b)) for a, b in map(make_disjoint_window, rolling)]
                windows += mine
                owners += [place] * len(mine)
                left[place], totals[place] = len(mine), 0.0
                if not mine:
                    yield place, 0.0
            parts: dict[int, list[tuple[int, float]]] = defaultdict(list)
            for index, (value, _) in self._score(windows):
                place = owners[index]
                parts[place].append((index, value))
                if len(parts[place]) == left[place]:
                    total = sum(value for _, value in sorted(parts[place]))  # in order: the same sum in any batch
                    self.cache_hook.add_partial("loglikelihood_rolling", keyed[place][1].args, total)
                    yield place, total

        return [float(value) for value in likelihoods(keyed, self.store, score, disable_tqdm)]

    # ---- generation ----------------------------------------------------------------------------------------------

    def generate_until(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[str]:
        """The visible text of each reply, cut at the first `until`."""
        return replies(self, requests, disable_tqdm)

    def produce(self, asked: list[Question]) -> Iterator[tuple[Question, Answer]]:
        """Batches by tokens, task by task and of questions with the same options; the longest first."""
        groups: dict[tuple[str, Options], list[Question]] = defaultdict(list)
        for question in asked:
            groups[str(question.request.task_name), question.options].append(question)
        for (_, options), group in groups.items():
            group.sort(key=lambda question: -len(question.context))
            room = min(options.max_tokens, REPLY_ROOM)
            batch: list[tuple[Question, Prompt]] = []
            longest = 0
            for question in group:
                prompt = self._fitting(question)
                if isinstance(prompt, Answer):
                    yield question, prompt
                    continue
                wide = max(longest, len(prompt)) + room
                if batch and wide * (len(batch) + 1) > self.max_batch_tokens:
                    yield from self._generate(batch, options)
                    batch, longest = [], 0
                batch.append((question, prompt))
                longest = max(longest, len(prompt))
            if batch:
                yield from self._generate(batch, options)

    def _fitting(self, question: Question) -> Prompt | Answer:
        """The prompt, cut on the left if it is plain text that does not fit; an Answer that says so if it cannot be."""
        try:
            prompt = self._prompt(self._pieces(question.context, question.media))
        except (ValueError, OSError) as failure:
            raise ValueError(f"{question.where}: {failure}") from failure
        if len(prompt) == 0 or len(prompt) < self.max_length - min(question.options.max_tokens, self.max_length // 2):
            return prompt
        if not isinstance(question.context, Rendered) and not question.media:
            keep = self.max_length - min(question.options.max_tokens, self.max_length // 2)
            if len(prompt) > keep:
                log.warning("%s: the prompt is cut on the left from %d to %d tokens", question.where, len(prompt), keep)
                return Prompt(prompt.ids[-keep:])
        if len(prompt) < self.max_length:
            return prompt
        error = f"the prompt has {len(prompt):,} tokens and the context of the model is {self.max_length:,}"
        log.warning("%s: %s; it counts as truncated", question.where, error)
        tokens = {"prompt": len(prompt), "completion": 0, "thinking": 0, "media": 0}
        return Answer("", finish_reason="length", tokens=tokens, error=error)

    def _generate(self, batch: list[tuple[Question, Prompt]], options: Options) -> Iterator[tuple[Question, Answer]]:
        """Replies of one batch as they end. A batch that does not fit the memory is halved, with one line said."""
        open_ = list(range(len(batch)))
        try:
            for index, answer in self._side_by_side(batch, options):
                open_.remove(index)
                yield batch[index][0], answer
        except torch.OutOfMemoryError:
            if len(open_) == 1:
                raise
            self.max_batch_tokens = max(1, self.max_batch_tokens // 2)
            log.warning("out of memory: batches are now of %d tokens", self.max_batch_tokens)
            torch.cuda.empty_cache()
            half = len(open_) // 2
            for part in (open_[:half], open_[half:]):
                yield from self._generate([batch[index] for index in part], options)

    def _side_by_side(self, batch: list[tuple[Question, Prompt]], options: Options) -> Iterator[tuple[int, Answer]]:
        kimi, started = self.kimi, time.perf_counter()
        sampling = Sampling(options.max_tokens, options.temperature, options.top_p, options.top_k)
        ends = stop_ids(kimi)
        prompts = [prompt for _, prompt in batch]
        readers = [ReplyReader(self.tokens, prompt, sampling, ends, 0, None) for prompt in prompts]
        overlaps = max((len(stop) for stop in options.until), default=0)
        looked = [0] * len(batch)
        finished: set[int] = set()
        seeds = [question.seed for question, _ in batch]
        for step, tokens in enumerate(generate(kimi, prompts, sampling, finished, seeds), 1):
            for index, token in tokens.items():
                reader = readers[index]
                for _ in reader.feed(token):
                    pass
                visible = reader.text.lstrip() if prompts[index].thinking or reader.thinking else reader.text
                hit = len(visible) > looked[index] and cut(visible[max(0, looked[index] - overlaps) :], options.until)
                looked[index] = len(visible)
                full = len(prompts[index]) + step >= self.max_length or step >= options.max_tokens
                if reader.ended or full or isinstance(hit, str):
                    finished.add(index)
                    yield index, self._answer(reader, prompts[index], options, started)

    def _answer(self, reader: ReplyReader, prompt: Prompt, options: Options, started: float) -> Answer:
        reply = list(reader.finish())[-1].reply
        assert reply is not None, "the last event carries the reply"
        text = reply.text.lstrip() if prompt.thinking or reply.thinking else reply.text
        short = cut(text, options.until)
        usage = reply.usage
        tokens = {
            "prompt": usage.prompt_tokens,
            "completion": usage.completion_tokens,
            "thinking": usage.thinking_tokens,
            "media": usage.media_tokens,
        }
        reason = "stop" if short is not None else reply.finish_reason
        seconds = round(time.perf_counter() - started, 3)
        return Answer(text if short is None else short, reply.thinking, reason, tokens, seconds)


def _device(name: str | None) -> str:
    """lm-eval's command line always says cuda:0; without one the model runs where it can."""
    if name in (None, "auto", "cuda:0", "cuda") and not torch.cuda.is_available():
        return "mps" if name == "auto" and torch.backends.mps.is_available() else "cpu"
    return "cuda" if name in (None, "auto") else str(name)


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _tokenizer_digest(kimi: Kimi) -> str:
    assert kimi.tokenizer is not None
    sum_ = hashlib.sha256()
    for token, rank in sorted(kimi.tokenizer.ranks.items(), key=lambda item: item[1]):
        sum_.update(b"%d %s\n" % (rank, token.hex().encode()))
    for number, name in sorted(kimi.tokenizer.names.items()):
        sum_.update(f"{number} {name}\n".encode())
    return sum_.hexdigest()
