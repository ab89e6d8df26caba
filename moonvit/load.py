"""Safetensors folders, read with suspicion; and the tower alone out of any checkpoint that holds one.

In: a folder with config.json and one or more .safetensors. Out: `Shards`, which knows every tensor's name, dtype and
shape before a byte of weights is read; `load_tower`, a MoonViT.

    file -- threads read ahead, 8 MiB at a time --> memory of each tensor's own --> the model, without a copy
"""

import json
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moonvit.config import MediaConfig, VisionConfig
from moonvit.encoder import MoonViT

INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}


@dataclass(frozen=True)
class Stored:
    """A tensor as a file's header describes it."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # of its bytes, in the file


class Shards:
    """All tensors of a checkpoint folder, by name. Checks files against their headers and the index.

    Raises FileNotFoundError for missing files, ValueError for truncated or contradictory ones; each names the file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / INDEX
        files = sorted(folder.glob("*.safetensors"))
        listed: dict[str, str] | None = None
        if index.is_file():
            listed = read_json(index).get("weight_map")
            if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
                raise ValueError(f"{index}: has no weight_map from tensor names to files")
            outside = [file for file in listed.values() if Path(file).name != file]
            if outside:
                raise ValueError(f"{index}: points outside of the folder ({outside[0]!r})")
            files = sorted(folder / file for file in set(listed.values()))
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise FileNotFoundError(
                    f"{folder}: {len(missing)} of {len(files)} shards are missing: {_some(missing)}"
                )
        if not files:
            if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
                raise ValueError(f"{folder}: only pickled weights (.bin/.pt); convert them to safetensors first")
            raise FileNotFoundError(f"{folder}: no .safetensors file")
        self.tensors: dict[str, Stored] = {}
        for file in files:
            for name, stored in _header(file).items():
                if name in self.tensors:
                    raise ValueError(f"{file}: tensor {name} is also in {self.tensors[name].file.name}")
                self.tensors[name] = stored
        if listed is not None:
            absent = [n for n, file in listed.items() if n not in self.tensors or self.tensors[n].file.name != file]
            if absent:
                raise ValueError(f"{index}: {len(absent)} tensors are not where it says: {_some(absent)}")
        self.nbytes = sum(_nbytes(stored) for stored in self.tensors.values())

    def read(
        self, names: Callable[[str], bool], progress: Callable[[int, int], None] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Every tensor whose name is wanted, file by file, in the order of their bytes; each in memory of its own.

        Read, not mapped: a mapped page would count beside the tensor that is made of it. Raises ValueError for a file
        that became shorter since its header was read.
        """
        chosen = [name for name in self.tensors if names(name)]
        chosen.sort(key=lambda name: (self.tensors[name].file, self.tensors[name].start))
        total = sum(_nbytes(self.tensors[name]) for name in chosen)
        ahead = min(_AHEAD, total // 32)
        done = 0
        buffers: dict[str, Tensor] = {}
        left: dict[str, int] = {}
        waiting: deque[tuple[Future[None], list[_Piece]]] = deque()
        with ThreadPoolExecutor(_READERS) as pool:
            on_the_way = 0
            pieces = _pieces([(name, self.tensors[name]) for name in chosen])
            while True:
                group = next(pieces, None)
                if group is not None:
                    for piece in group:
                        if piece.name not in buffers:
                            left[piece.name] = _nbytes(piece.stored)
                            buffers[piece.name] = torch.empty(left[piece.name], dtype=torch.uint8)
                    waiting.append((pool.submit(_fill, group, buffers), group))
                    on_the_way += sum(piece.length for piece in group)
                while waiting and (group is None or on_the_way > ahead or len(waiting) > 64):
                    reading, arrived = waiting.popleft()
                    reading.result()
                    for piece in arrived:
                        on_the_way -= piece.length
                        left[piece.name] -= piece.length
                        if left[piece.name] == 0:
                            yield piece.name, buffers.pop(piece.name).view(piece.stored.dtype).view(piece.stored.shape)
                            done += _nbytes(piece.stored)
                            if progress is not None:
                                progress(done, total)
                if group is None:
                    return


_READERS = 2
_PIECE = 2**23  # bytes: small tensors are gathered up to this size, large ones are cut
_AHEAD = 2**26


@dataclass(frozen=True)
class _Piece:
    """A stretch of a tensor: `length` bytes from `offset` on."""

    name: str
    stored: Stored
    offset: int
    length: int


def _pieces(tensors: list[tuple[str, Stored]]) -> Iterator[list[_Piece]]:
    """Groups of pieces of one file, about `_PIECE` bytes each, in order."""
    group: list[_Piece] = []
    size = 0
    for name, stored in tensors:
        nbytes = _nbytes(stored)
        for offset in range(0, max(nbytes, 1), _PIECE):
            piece = _Piece(name, stored, offset, min(_PIECE, nbytes - offset))
            if group and (size + piece.length > _PIECE or stored.file != group[0].stored.file):
                yield group
                group, size = [], 0
            group.append(piece)
            size += piece.length
    if group:
        yield group


def _fill(group: list[_Piece], buffers: dict[str, Tensor]) -> None:
    with group[0].stored.file.open("rb", buffering=0) as opened:
        for piece in group:
            room = buffers[piece.name].numpy().data[piece.offset : piece.offset + piece.length]
            opened.seek(piece.stored.start + piece.offset)
            while room:
                got = opened.readinto(room)
                if not got:
                    raise ValueError(f"{piece.stored.file}: cannot be read (it ends inside of {piece.name})")
                room = room[got:]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError, or ValueError that names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON ({str(error)[:100]})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, not a {type(value).__name__}")
    return value


def _header(file: Path) -> dict[str, Stored]:
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, 2**30):
            raise ValueError(f"{file}: is truncated or no safetensors file ({size:,} bytes)")
        try:
            header = json.loads(opened.read(length))
        except ValueError:
            raise ValueError(f"{file}: is no safetensors file (its header is not JSON)") from None
    if not isinstance(header, dict):
        raise ValueError(f"{file}: is no safetensors file (its header is not an object)")
    header.pop("__metadata__", None)
    tensors = {}
    end = 0
    for name, entry in header.items():
        try:
            dtype, shape, (first, last) = (
                entry["dtype"],
                tuple(map(int, entry["shape"])),
                map(int, entry["data_offsets"]),
            )
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{file}: the header entry of {name} is malformed") from None
        if dtype not in _DTYPES:
            raise ValueError(f"{file}: tensor {name} has the unknown dtype {dtype}")
        tensors[name] = Stored(file, _DTYPES[dtype], shape, 8 + length + first)
        if first < 0 or last - first != _nbytes(tensors[name]):
            raise ValueError(f"{file}: tensor {name} of shape {shape} does not fit its {last - first} bytes")
        end = max(end, last)
    if size < 8 + length + end:
        raise ValueError(f"{file}: is truncated: {size:,} bytes, the header speaks of {8 + length + end:,}")
    return tensors


def _nbytes(stored: Stored) -> int:
    count = stored.dtype.itemsize
    for side in stored.shape:
        count *= side
    return count


def _some(names: list[str], most: int = 20) -> str:
    shown = ", ".join(sorted(names)[:most])
    return shown + (f" ... and {len(names) - most} more" if len(names) > most else "")


def name_differences(missing: list[str], unexpected: list[str], where: Path | str) -> ValueError:
    """The error for a checkpoint whose tensors are not the model's: lists the names."""
    parts = [f"{len(missing)} tensors are missing: {_some(missing)}"] if missing else []
    parts += [f"{len(unexpected)} are unexpected: {_some(unexpected)}"] if unexpected else []
    return ValueError(f"{where}: " + "; ".join(parts))


# ---- the tower's names -----------------------------------------------------------------------------------------------

_BLOCK_PARTS = {  # transformers' names of a block's parts, to the released ones
    "norm1": "norm0",
    "norm2": "norm1",
    "mlp.fc1": "mlp.fc0",
    "mlp.fc2": "mlp.fc1",
    "attn.proj": "wo",
}


def tower_name(name: str) -> tuple[str, str] | None:
    """The released name of a tower tensor without prefix, and which part of it this is; None for other tensors.

    Part is "" for a whole tensor, "q", "k" or "v" for transformers' separate projections. Knows the released names
    (with or without vision_tower.), transformers' in-memory names and those that its save_pretrained writes.
    """
    native = re.match(r"(?:model\.)?vision_tower\.layers\.(\d+)\.(.+)\.(weight|bias)$", name)
    if native:
        index, part, kind = native.groups()
        projection = re.match(r"attn\.([qkv])_proj$", part)
        if projection:
            return f"encoder.blocks.{index}.wqkv.{kind}", projection[1]
        return f"encoder.blocks.{index}.{_BLOCK_PARTS.get(part, part)}.{kind}", ""
    rest = re.sub(r"^(?:model\.)?vision_tower\.", "", name)
    if rest == name and not name.startswith(("patch_embed.", "encoder.blocks.", "encoder.final_layernorm.")):
        return None
    rest = rest.removeprefix("encoder.") if rest.startswith("encoder.patch_embed.") else rest
    rest = "encoder." + rest if rest.startswith("final_layernorm.") else rest
    return rest.replace("pos_emb.position_embeddings", "pos_emb.weight"), ""


def join_qkv(parts: dict[str, Tensor], heads: int) -> Tensor:
    """transformers' q, k and v to one released wqkv: rows of q and k go from halves back to interleaved pairs."""
    q, k = (parts[name].unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2) for name in "qk")
    return torch.cat([q, k, parts["v"]])


def load_tower(
    path_or_hub_id: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> MoonViT:
    """See MoonViT.from_pretrained."""
    folder = resolve(path_or_hub_id)
    raw = read_json(folder / "config.json")
    vision = raw.get("vision_config", raw if raw.get("model_type") == "moonvit" else None)
    if vision is None:
        raise ValueError(f"{folder}: model_type {raw.get('model_type')!r} has no vision tower")
    config = VisionConfig.from_dict(vision)
    preprocessor = folder / "preprocessor_config.json"
    media = MediaConfig.from_dict(read_json(preprocessor)) if preprocessor.is_file() else None
    shards = Shards(folder)
    with torch.device("meta"):
        tower = MoonViT(config, media)
    expected = {name: tuple(tensor.shape) for name, tensor in tower.state_dict().items()}
    named = {name: found for name in shards.tensors if (found := tower_name(name)) is not None}
    there = {target for target, _ in named.values()}
    if there != set(expected):
        raise name_differences(sorted(set(expected) - there), sorted(there - set(expected)), folder)
    state: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in shards.read(named.__contains__):
        target, part = named[name]
        tensor = tensor.to(device=device, dtype=dtype)
        if part:
            parts.setdefault(target, {})[part] = tensor
            if len(parts[target]) < 3:
                continue
            tensor = join_qkv(parts.pop(target), config.num_heads)
        if tuple(tensor.shape) != expected[target]:
            raise ValueError(f"{folder}: {name} has shape {tuple(tensor.shape)}, the config wants {expected[target]}")
        state[target] = tensor
    if parts:
        raise name_differences(sorted(parts), [], folder)
    tower.load_state_dict(state, assign=True)
    return tower.eval()


# ---- where a checkpoint is -------------------------------------------------------------------------------------------


def resolve(path_or_hub_id: str | Path) -> Path:
    """A local folder; a hub id (owner/name) is downloaded, or taken from the local cache.

    Raises FileNotFoundError or NotADirectoryError that says what was tried.
    """
    if not isinstance(path_or_hub_id, str | Path):
        raise ValueError(f"a checkpoint is a folder or a hub id, got {type(path_or_hub_id).__name__}")
    if not str(path_or_hub_id):
        raise FileNotFoundError("no such folder: ''")
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{path} is a file; give the folder that holds config.json and the weights")
    text = str(path_or_hub_id)
    if not re.fullmatch(r"[\w\-.]+/[\w\-.]+", text) or text.startswith("."):
        raise FileNotFoundError(f"no such folder: {text}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "tiktoken.model", "*.jinja"]
    try:
        return Path(snapshot_download(text, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise FileNotFoundError(f"{text} is no local folder, and the hub could not give it ({reason})") from None
