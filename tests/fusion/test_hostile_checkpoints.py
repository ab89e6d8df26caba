"""Broken checkpoints: each gives one clear line that names the file or tensor, and leaves nothing half-written.

pytest tests/fusion/test_hostile_checkpoints.py
"""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusion.model import Kimi
from moonvit.encoder import MoonViT
from tests.fusion.make_checkpoint import fill, k2_5_config, k2_5_names, write
from tests.reference import small

CONFIG = small({"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2})
GATE = "language_model.model.layers.1.mlp.gate.weight"
PACKED = "language_model.model.layers.1.mlp.experts.0.up_proj.weight_packed"
WQKV = "vision_tower.encoder.blocks.0.wqkv.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    return write(folder, k2_5_config(CONFIG), fill(k2_5_names(CONFIG)), shards=3)


def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change a JSON file."""

    def run(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        changed = change(value)
        (folder / name).write_text(json.dumps(value if changed is None else changed))

    return run


def text_config(**changes: Any) -> Callable[[Path], None]:
    return edit("config.json", lambda c: c["text_config"].update(changes))


def vision_config(**changes: Any) -> Callable[[Path], None]:
    return edit("config.json", lambda c: c["vision_config"].update(changes))


def top(**changes: Any) -> Callable[[Path], None]:
    return edit("config.json", lambda c: c.update(changes))


def shard(folder: Path, number: int = 1) -> Path:
    return sorted(folder.glob("*.safetensors"))[number]


def cut(to: float) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        path = shard(folder)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * to)])

    return run


def header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Change a shard's header without touching its data."""

    def run(folder: Path) -> None:
        path = shard(folder)
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        value = json.loads(data[8 : 8 + length])
        change(value)
        new = json.dumps(value).encode()
        path.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])

    return run


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    """Replace a tensor, or take it out of shard and index."""

    def run(folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        path = folder / index["weight_map"][name]
        tensors = load_file(path)
        new = change(tensors.pop(name))
        if new is None:
            del index["weight_map"][name]
        else:
            tensors[name] = new
        save_file(tensors, path)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return run


def extra(name: str) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        save_file({name: torch.zeros(2)}, folder / "model-00009-of-000003.safetensors")
        edit(INDEX, lambda i: i["weight_map"].update({name: "model-00009-of-000003.safetensors"}))(folder)

    return run


INDEX = "model.safetensors.index.json"


def first(entries: dict[str, Any]) -> dict[str, Any]:
    return next(value for key, value in entries.items() if key != "__metadata__")


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    # config.json
    "no config": (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
    "empty config": (lambda f: (f / "config.json").write_text(""), "config.json: is not JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object"),
    "deep config": (lambda f: (f / "config.json").write_text("[" * 100_000), "is not JSON"),
    "binary config": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\0"), "config.json: is not JSON"),
    "unknown model": (top(model_type="llama"), "model_type 'llama' is not known"),
    "no model type": (edit("config.json", lambda c: c.pop("model_type") and None), "model_type None"),
    "unknown text key": (text_config(qk_norm=True), "text_config: unknown keys qk_norm"),
    "unknown vision key": (vision_config(register_tokens=4), "vision_config: unknown keys register_tokens"),
    "text_config is a list": (top(text_config=[]), "text_config must be an object"),
    "size is a string": (text_config(hidden_size="64"), "hidden_size must be int, got '64'"),
    "size is a list": (vision_config(vt_hidden_size=[64]), "wrong type|must be"),
    "negative layers": (text_config(num_hidden_layers=-1), "num_hidden_layers must be positive"),
    "no heads": (vision_config(vt_num_attention_heads=0), "num_heads must be positive"),
    "softmax router": (text_config(scoring_func="softmax"), "scoring_func='softmax' is not implemented"),
    "other merge": (vision_config(merge_type="none"), "merge_type='none' is not implemented"),
    "other projector": (vision_config(mm_projector_type="mlp"), "mm_projector_type 'mlp' is not implemented"),
    "other activation": (vision_config(projector_hidden_act="relu"), "projector_hidden_act 'relu'"),
    "projector width": (vision_config(text_hidden_size=128), "text_hidden_size is 128 but"),
    "pad outside": (top(media_placeholder_token_id=999_999), "outside the vocabulary"),
    "pad is a string": (top(media_placeholder_token_id="x"), "wrong type"),
    "other quantization": (
        text_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantization 'gptq'",
    ),
    "8 bits": (
        edit(
            "config.json",
            lambda c: c["text_config"]["quantization_config"]["config_groups"]["group_0"]["weights"].update(num_bits=8),
        ),
        "num_bits",
    ),
    "unknown profile": (top(moonkit_profile="k9"), "moonkit_profile 'k9' is unknown"),
    "preprocessor is junk": (lambda f: (f / "preprocessor_config.json").write_text("{"), "preprocessor_config.json"),
    "unknown preprocessing": (
        lambda f: (f / "preprocessor_config.json").write_text('{"media_proc_cfg": {"upscale": 2}}'),
        "unknown media_proc_cfg keys upscale",
    ),
    # files
    "no weights": (lambda f: [p.unlink() for p in f.glob("model*")], "no .safetensors file"),
    "pickles only": (
        lambda f: [*(p.unlink() for p in f.glob("model*")), (f / "pytorch_model.bin").write_bytes(b"x")],
        "only pickled weights",
    ),
    "a shard is missing": (lambda f: shard(f).unlink(), "1 of 3 shards are missing: model-00002"),
    "a shard is empty": (cut(0), "truncated or no safetensors file"),
    "a shard ends in its header": (cut(0.001), "truncated or no safetensors file"),
    "a shard is half": (cut(0.5), "is truncated: .* bytes, the header speaks of"),
    "a shard lacks its last byte": (lambda f: cut(1 - 1 / shard(f).stat().st_size)(f), "is truncated"),
    "a shard is text": (lambda f: shard(f).write_text("<html>not found</html>" * 9), "no safetensors file"),
    "a header that claims 2^62 bytes": (
        lambda f: shard(f).write_bytes(struct.pack("<Q", 2**62) + b"{}"),
        "truncated or no safetensors file",
    ),
    "a header that is a list": (
        lambda f: shard(f).write_bytes(struct.pack("<Q", 2) + b"[]"),
        "header is not an object",
    ),
    "an unknown dtype": (header(lambda h: first(h).update(dtype="Q9")), "unknown dtype Q9"),
    "offsets that do not fit": (header(lambda h: first(h).update(data_offsets=[0, 1])), "does not fit its 1 bytes"),
    "negative offsets": (header(lambda h: first(h).update(data_offsets=[-8, 0])), "does not fit"),
    "offsets past the end": (
        header(lambda h: first(h).update(data_offsets=[o + 10**9 for o in first(h)["data_offsets"]])),
        "is truncated",
    ),
    "a header entry without shape": (header(lambda h: first(h).pop("shape")), "malformed"),
    # index
    "index is junk": (lambda f: (f / INDEX).write_text("{"), "index.json: is not JSON"),
    "index without a map": (lambda f: (f / INDEX).write_text("{}"), "has no weight_map"),
    "index points outside": (
        edit(INDEX, lambda i: i["weight_map"].update({GATE: "../../etc/passwd"})),
        "points outside of the folder",
    ),
    "index names the wrong shard": (
        edit(
            INDEX,
            lambda i: i["weight_map"].update(
                {GATE: next(v for v in i["weight_map"].values() if v != i["weight_map"][GATE])}
            ),
        ),
        "1 tensors are not where it says",
    ),
    "index names a tensor that is nowhere": (
        edit(INDEX, lambda i: i["weight_map"].update({"language_model.ghost": next(iter(i["weight_map"].values()))})),
        "not where it says: language_model.ghost",
    ),
    # tensors
    "a tensor is missing": (tensor(GATE, lambda t: None), f"1 tensors are missing: {GATE}"),
    "a packed part is missing": (
        tensor(PACKED.replace("packed", "scale"), lambda t: None),
        "experts.0.up_proj.weight .only packed, shape",
    ),
    "an unexpected tensor": (extra("language_model.model.layers.1.mlp.experts.9.up_proj.weight"), "1 are unexpected"),
    "a draft-model layer": (extra("language_model.model.layers.2.enorm.weight"), "unexpected: .*layers.2.enorm"),
    "a wrong shape": (tensor(GATE, lambda t: t.T.contiguous()), f"{GATE} has shape \\[64, 4\\], the config wants"),
    "one column less": (tensor(WQKV, lambda t: t[:, 1:].contiguous()), "wqkv.weight has shape"),
    "packed for another width": (tensor(PACKED, lambda t: t[:, 1:].contiguous()), "weight_packed has shape"),
    "packed as floats": (tensor(PACKED, lambda t: t.float()), "weight_packed has dtype torch.float32"),
    "weights as integers": (tensor(GATE, lambda t: t.to(torch.int32)), "has dtype torch.int32"),
    "weight_shape of another matrix": (
        tensor(PACKED.replace("packed", "shape"), lambda t: t + 1),
        r"weight_shape says \[33, 65\], the config \[32, 64\]",
    ),
    "more layers than weights": (text_config(num_hidden_layers=3), "tensors are missing: .*layers.2"),
    "fewer layers than weights": (text_config(num_hidden_layers=1), "are unexpected: .*layers.1"),
    "another vocabulary": (text_config(vocab_size=500), "embed_tokens.weight has shape"),
    # tokenizer
    "broken tokenizer": (lambda f: (f / "tiktoken.model").write_text("!!"), "tiktoken.model, line 1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_one_clear_line(good: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    damage, message = BROKEN[name]
    damage(folder)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        Kimi.from_pretrained(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500
    assert sorted(tmp_path.rglob("*")) == before


def test_the_good_one_loads(good: Path) -> None:
    assert Kimi.from_pretrained(good).language_model.logits is not None
    assert MoonViT.from_pretrained(good).config == CONFIG.vision


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("/nonexistent/folder", FileNotFoundError, "no such folder: /nonexistent/folder"),
        ("", FileNotFoundError, "no such folder: ''"),
        ("no-slash", FileNotFoundError, "no such folder: no-slash"),
        (__file__, NotADirectoryError, "is a file; give the folder"),
    ],
)
def test_paths_that_lead_nowhere(path: str, error: Any, message: str) -> None:
    for load in (Kimi.from_pretrained, MoonViT.from_pretrained):
        with pytest.raises(error, match=message):
            load(path)


def test_a_hub_id_without_a_network_says_what_was_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nobody/nothing is no local folder, and the hub could not give it"):
        Kimi.from_pretrained("nobody/nothing")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float99"}, "dtype 'float99' is unknown"),
        ({"dtype": "int8"}, "dtype 'int8' is unknown"),
        ({"dtype": "nn"}, "dtype 'nn' is unknown"),
        ({"experts": "sparse"}, "experts must be"),
    ],
)
def test_wrong_options(good: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Kimi.from_pretrained(good, **options)


@pytest.mark.parametrize(
    "name", ["no config", "a shard is half", "an unknown dtype", "no heads", "index points outside", "one column less"]
)
def test_the_tower_alone_is_as_careful(good: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(good, tmp_path / "model")
    BROKEN[name][0](tmp_path / "model")
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        MoonViT.from_pretrained(tmp_path / "model")
    assert "\n" not in str(caught.value)


SAVE = """
import sys, torch
from fusion import Kimi
kimi = Kimi.untrained("nano")
print("ready", flush=True)
while True:
    kimi.save_pretrained(sys.argv[1], overwrite=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_kill_9_while_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Whenever the process dies, the folder is the old checkpoint or the new one, never a mixture."""
    target = tmp_path / "model"
    Kimi.untrained("nano").save_pretrained(target)
    for delay in (0.02, 0.06, 0.13, 0.21):
        process = subprocess.Popen([sys.executable, "-c", SAVE, str(target)], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        survivors = [p for p in (target, *tmp_path.glob(".model.old-*")) if (p / "config.json").is_file()]
        assert survivors, "one whole checkpoint is always there"
        assert Kimi.from_pretrained(survivors[0]).tokenizer is not None
    Kimi.untrained("tiny").save_pretrained(target, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "the next save clears what the dead left"
