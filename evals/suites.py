"""Benchmarks as lists of questions: one YAML each beside this file, one loader, one way to grade them all.

    load("kimi_humaneval", limit=20)          documents, without lm-eval
    settings("kimi_ocrbench", "k2_7")         tokens, temperature, repeats, frames, pixels
    verdict(document, reply)                  Verdict of evals.graders
    python -m evals.suites                    what there is;  --markdown docs/suites.md writes the page

    suites/NAME.yaml --> evals.loaders (files as published) --> documents --> lm-eval, or your own loop
                                                                   |                 |  replies
                                                                   +---> verdict <---+--> score, status, evidence

A document is a flat dict of text, so that it is a row of a datasets.Dataset:

    id, cluster   which item; items of one problem share a cluster     question   the whole prompt, media as <image>
    task          JSON: kind, gold and data of evals.graders.Task      media      JSON references, opened when shown
    answer        the gold, for reading                                tests      what it tests, for tables by part

Data lies in $MOONKIT_DATA/NAME, in ../shared/data/NAME beside the checkout or in ./data/NAME; else the hub is asked.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib import import_module
from inspect import signature
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from evals.graders import Task, Verdict, grade, visible
from evals.rows import Ref, Source, find_data, open_picture, places

if TYPE_CHECKING:
    import datasets

    from evals.loaders import Item

Document = dict[str, Any]
Profile = Literal["k2_7", "k2_5", "nano"]
FOLDER = Path(__file__).parent / "suites"
FILMS = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".gif")
COSTLY = ("function", "repository", "svg", "plot", "world")  # kinds whose golds are not run while loading


@dataclass(frozen=True)
class Settings:
    """How a suite is run. pixels: of a video's longer side; frames and pixels None: as the processor decides."""

    temperature: float = 1.0
    top_p: float = 0.95
    tokens: int = 98_304  # new tokens, thinking included
    repeats: int = 1  # samples of each question; the score is their mean (avg@k)
    thinking: bool = True
    frames: int | None = None
    pixels: int | None = None
    source: str = ""

    @property
    def generation(self) -> dict[str, Any]:
        """lm-eval's generation_kwargs."""
        kwargs: dict[str, Any] = {"until": [], "max_gen_toks": self.tokens, "do_sample": self.temperature > 0}
        return kwargs | {"temperature": self.temperature} | ({"top_p": self.top_p} if self.temperature > 0 else {})


PROFILES: dict[str, Settings] = {
    "k2_7": Settings(source="sampling of the K2.7-Code card; tokens and repeats of K2.6 where K2.7-Code has none"),
    "k2_5": Settings(source="K2.5 report, thinking mode"),
    "nano": Settings(0.0, 1.0, 256, frames=8, pixels=224, source="small enough for two cores"),
}


def _yaml(path: Path) -> dict[str, Any]:
    """A task's configuration with what it includes; functions stay names. Needs no lm-eval, whose import takes long."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: Function(str(node.value)))
    config = yaml.load(path.read_text(encoding="utf-8"), Loader)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: a suite is a mapping, got {type(config).__name__}")
    included = config.pop("include", [])
    for name in [included] if isinstance(included, str) else included:
        config = _yaml(path.parent / name) | config
    return config


class Function(str):
    """The name of a function, as a YAML has it."""


@lru_cache(maxsize=1)
def _suites() -> dict[str, dict[str, Any]]:
    """All suites' configurations, under their task's name; the protocol is what the file opens with."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        config = _yaml(path)
        if "group" in config:
            continue
        if config["task"] in found:
            raise ValueError(f"{path}: two suites are called {config['task']!r}")
        head = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
        config["metadata"]["protocol"] = " ".join(line[1:].strip() for line in head)
        found[config["task"]] = config
    return found


def _metadata(name: str) -> dict[str, Any]:
    suites = _suites()
    if name not in suites:
        from difflib import get_close_matches

        near = get_close_matches(name, suites, 3, 0.4)
        raise ValueError(f"no suite {name!r}; known: {', '.join(near or suites)}")
    return dict(suites[name]["metadata"])


def names() -> dict[str, str]:
    """All suites, each with one line about what it asks."""
    return {name: config["metadata"]["asks"] for name, config in _suites().items()}


def version(name: str) -> float:
    """Of a suite: it changes with its prompt or its grader."""
    return float(_metadata(name)["version"])


def settings(name: str, profile: Profile = "k2_7") -> Settings:
    """How a suite is run under a profile. Raises ValueError for an unknown suite or profile."""
    if profile not in PROFILES:
        raise ValueError(f"no profile {profile!r}; known: {', '.join(PROFILES)}")
    own = _metadata(name).get("settings", {})
    if profile == "nano":  # a suite's frames are no reason to give a small model more of them
        return replace(PROFILES[profile], **own.get("nano", {}))
    return replace(PROFILES[profile], **own.get("all", {}), **own.get(profile, {}))


def describe(chosen: Sequence[str], profile: Profile = "k2_7") -> str:
    """A table of the settings of these suites, to be printed before they are run."""
    lines = [
        f"{'suite, profile ' + profile:<32}{'tokens':>8}{'temp':>6}{'top_p':>7}{'avg@':>6}{'frames':>8}{'pixels':>8}"
    ]
    for name in chosen:
        s = settings(name, profile)
        media = f"{s.frames or '-':>8}{s.pixels or '-':>8}"
        lines.append(f"{name:<32}{s.tokens:>8}{s.temperature:>6g}{s.top_p:>7g}{s.repeats:>6}{media}")
    return "\n".join(lines)


def task(name: str, profile: Profile = "k2_7") -> dict[str, Any]:
    """A suite as an inline configuration for lm-eval's list of tasks, with the settings of a profile in place.

    By name, through TaskManager(include_path=str(FOLDER)), a suite runs with the settings that its YAML states.
    """
    chosen, config = settings(name, profile), _resolved(_suites()[name])
    config["metadata"]["profile"] = profile
    return config | {"generation_kwargs": chosen.generation, "repeats": chosen.repeats}


def _resolved(value: Any) -> Any:
    """A copy with functions in the place of their names."""
    if isinstance(value, Function):
        module, _, function = value.rpartition(".")
        return getattr(import_module(module), function)
    if isinstance(value, dict):
        return {key: _resolved(one) for key, one in value.items()}
    return [_resolved(one) for one in value] if isinstance(value, list) else value


# ---- documents


def load(
    name: str, limit: int | None = None, seed: int | None = None, profile: Profile = "k2_7", **options: Any
) -> list[Document]:
    """Documents of a suite; the first `limit`, or with a seed so many drawn. The world's are made from the seed.

    options: the loader's own, as after="2025-01-01" of kimi_livecodebench. Raises ValueError for an unknown suite or
    option, for missing data (naming the places looked at and the layout) and for a broken row (naming file and line).
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    metadata = _metadata(name)
    made = metadata["suite"] == "world"
    options = dict(metadata.get("options", {})) | options
    if made and seed is not None:
        options["seed"] = seed
    items = _items(name, metadata, options)
    if seed is not None and not made:
        drawn = list(items)
        random.Random(f"{name}/{seed}").shuffle(drawn)
        items = iter(drawn)
    words, chosen = _words(metadata), settings(name, profile)
    documents = [_document(item, words, chosen, metadata.get("data", "")) for item in islice(items, limit)]
    if not documents:
        raise ValueError(f"{name}: its data holds no question")
    seen: set[str] = set()
    for document in documents:
        if document["id"] in seen:
            raise ValueError(f"{name}: two questions have the id {document['id']!r}")
        seen.add(document["id"])
    return documents


def source(name: str) -> Source:
    """Where a suite's data comes from. Raises ValueError that names every place looked at and the layout expected."""
    from evals.loaders import layout

    metadata = _metadata(name)
    folder = find_data(metadata["data"])
    stock = _stock(metadata["stock"]) if "stock" in metadata else {}
    online = hub(name)[0]
    config = metadata.get("config") or stock.get("dataset_name")
    split = metadata.get("split") or stock.get("test_split") or stock.get("validation_split") or "test"
    kept = layout(metadata["suite"])
    if folder is None and not (online and metadata["suite"] != "world" and network()):
        looked = "\n".join(f"    {place}" for place in places(metadata["data"]))
        tried = f"and the hub's {online} cannot be reached" if online else "and it is not on the hub"
        raise ValueError(f"no data for {name}: looked in\n{looked}\n{tried}. Layout of the folder:\n{kept}")
    return Source(metadata["data"], folder, kept, online, config, split)


def hub(name: str) -> tuple[str, str]:
    """A suite's data set on the hub ("" where it has none), and the name of its folder here."""
    metadata = _metadata(name)
    stock = _stock(metadata["stock"]) if "stock" in metadata else {}
    return metadata.get("hub") or stock.get("dataset_path", ""), metadata.get("data", "")


@lru_cache(maxsize=1)
def network() -> bool:
    """Whether the hub answers; HF_HUB_OFFLINE is respected."""
    import socket
    from urllib.parse import urlsplit

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        address = urlsplit(constants.ENDPOINT)
        socket.create_connection((address.hostname or "", address.port or 443), timeout=3).close()
    except OSError:
        return False
    return True


def _items(name: str, metadata: Mapping[str, Any], options: Mapping[str, Any]) -> "Iterator[Item]":
    from evals.loaders import LOADERS

    suite = metadata["suite"]
    known = list(signature(LOADERS[suite]).parameters)[1:]
    if set(options) - set(known):
        wrong = ", ".join(sorted(set(options) - set(known)))
        raise ValueError(f"{name} has no option {wrong}; known: {', '.join(known) or 'none'}")
    if suite == "world":
        return LOADERS[suite](Source("world", None), **options)
    return LOADERS[suite](source(name), **options)


@lru_cache(maxsize=64)
def _template(text: str) -> Any:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    return SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True).from_string(
        text
    )


def _words(metadata: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], str]:
    """The prompt of fields: the YAML's own template, or the wording of the lm-eval task that it names as "stock"."""
    if "stock" not in metadata:
        template = _template(metadata["prompt"])
        return lambda fields: template.render(**fields)
    wording = _stock(metadata["stock"])["doc_to_text"]
    before = _template(metadata.get("before", ""))
    if isinstance(wording, Function):
        say = _function(_stock_path(metadata["stock"]).parent, wording)
        return lambda fields: before.render(**fields) + str(say(dict(fields)))
    # lm-eval also takes a field's bare name for its text
    template = _template(wording if "{{" in wording else "{{" + wording + "}}")
    return lambda fields: before.render(**fields) + template.render(**fields)


def _stock_path(name: str) -> Path:
    """The file of one of lm-eval's own tasks, by its name under lm_eval/tasks."""
    from importlib.util import find_spec

    spec = find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the wording of {name} is lm-eval's, which is not installed; pip install lm-eval")
    return Path(next(iter(spec.submodule_search_locations))) / "tasks" / name


def _function(folder: Path, name: str) -> Callable[[Mapping[str, Any]], str]:
    """A function of a file beside a task's YAML, "utils.doc_to_text"; lm-eval itself is not imported."""
    from importlib.util import module_from_spec, spec_from_file_location

    file, _, function = name.rpartition(".")
    spec = spec_from_file_location(f"lm_eval_wording_{folder.name}", folder / f"{file}.py")
    assert spec is not None and spec.loader is not None, f"{folder} has no {file}.py"
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return cast("Callable[[Mapping[str, Any]], str]", getattr(module, function))


@lru_cache(maxsize=32)
def _stock(name: str) -> dict[str, Any]:
    return _yaml(_stock_path(name))


def _portable(item: "Item", folder: str) -> dict[str, Any]:
    """A task as plain JSON. Folders in it are written relative to the data's, whose name it then holds."""
    task, root = asdict(item.task), find_data(folder) if folder else None
    data = dict(task["data"])
    for key in ("repository", "environment"):
        if root is not None and isinstance(data.get(key), str) and Path(data[key]).is_relative_to(root):
            data[key] = str(Path(data[key]).relative_to(root))
            task["root"] = folder
    return task | {"data": data} | ({"editable": list(item.editable)} if item.editable else {})


def task_of(document: Mapping[str, Any]) -> Task:
    """The task of a document, with its folders as they are on this machine."""
    fields = json.loads(document["task"])
    data = fields["data"]
    if "root" in fields:
        folder = find_data(fields["root"])
        if folder is None:
            raise ValueError(f"{document['id']}: the data folder {fields['root']!r} is gone")
        data |= {
            key: str(folder / data[key]) for key in ("repository", "environment") if isinstance(data.get(key), str)
        }
    return Task(fields["kind"], fields["gold"], data)


def _document(item: "Item", words: Callable[[Mapping[str, Any]], str], chosen: Settings, folder: str) -> Document:
    if item.task.kind not in COSTLY:
        try:
            grade(item.task, "")
        except ValueError as error:
            raise ValueError(f"{item.where}: {error}") from None
    fields = dict(item.fields)
    if item.media:  # a marker that a question happens to spell would shift every picture after it
        fields = {k: v.replace("<image>", "< image >") if isinstance(v, str) else v for k, v in fields.items()}
    question = words({"images": "<image>" * len(item.media)} | fields)
    shown = {"frames": chosen.frames, "pixels": chosen.pixels}
    media = [json.dumps(json.loads(ref.text()) | {k: v for k, v in shown.items() if v}) for ref in item.media]
    text = json.dumps(_portable(item, folder), ensure_ascii=False, sort_keys=True)
    return {
        "id": item.id,
        "cluster": item.cluster or item.id,
        "question": question.strip("\n"),
        "media": media,
        "task": text,
        "answer": item.answer or (item.task.gold if isinstance(item.task.gold, str) else json.dumps(item.task.gold)),
        "tests": item.tests,
    }


def media(document: Mapping[str, Any]) -> list[Any]:
    """The pictures (PIL, RGB) and videos (evals.media.Video) of a document, in the order of its <image> marks."""
    return [_open(text) for text in document["media"]]


def _open(text: str) -> Any:
    fields = json.loads(text)
    frames, pixels = fields.pop("frames", None), fields.pop("pixels", None)
    ref = Ref(**fields)
    if ref.name == "world":
        return _from_world(ref)
    folder = None if ref.name.startswith("hub:") else find_data(ref.name)
    film = Path(ref.file).suffix.lower() in FILMS or ref.start is not None
    if film or (folder is not None and (folder / ref.file).is_dir()):
        return _video(ref, folder, frames, pixels)
    return open_picture(ref, folder)


def _from_world(ref: Ref) -> Any:
    from PIL import Image as PIL

    from evals.loaders import world_sample
    from world.sample import Image

    medium = world_sample(ref.file).media[ref.at or 0]
    if isinstance(medium, Image):
        return PIL.fromarray(medium.pixels)
    from evals.media import Video

    return Video(frames=tuple(map(PIL.fromarray, medium.frames)), fps=medium.fps)


def _video(ref: Ref, folder: Path | None, frames: int | None, pixels: int | None) -> Any:
    from evals.media import Video
    from evals.moments import Moments

    path = (folder or Path()) / ref.file
    if not path.exists():
        raise ValueError(f"{path}: the video is missing")
    if ref.start is None and path.is_file():
        return Video(path=path, max_frames=frames, pixels=pixels)
    part = Moments(path, ref.start, ref.end, 2.0, frames, pixels)
    return Video(frames=cast("tuple[Any, ...]", part), fps=part.fps, max_frames=frames)


# ---- grading


def verdict(document: Mapping[str, Any], reply: str, truncated: bool = False) -> Verdict:
    """Grade one whole reply to a document, thoughts included: the single entry for every suite.

    truncated: the reply ended at the token limit. A reply graded before is not graded again, except after an
    infra_error. Raises ValueError for a document that is no suite's.
    """
    if "task" not in document:
        raise ValueError(f"not a document of these suites: it has {', '.join(map(repr, document))} but no 'task'")
    key = hashlib.sha256(json.dumps([document["task"], str(reply), bool(truncated)]).encode()).digest()
    if key in _graded:
        return _graded[key]
    found = grade(task_of(document), _answer(document, str(reply)), truncated)
    if found.status != "infra_error":
        if len(_graded) >= 20_000:
            _graded.clear()
        _graded[key] = found
    return found


def kind(document: Mapping[str, Any]) -> str:
    """The kind of evals.graders.Task that a document has."""
    return str(json.loads(document["task"])["kind"])


def _answer(document: Mapping[str, Any], reply: str) -> str:
    """What is graded of a reply: the reply, or, where whole files are asked for, those files as JSON."""
    editable = json.loads(document["task"]).get("editable")
    if not editable:
        return reply
    from evals.repositories import whole_files

    said, unfinished = visible(reply)
    files = {} if unfinished else whole_files(said, editable)
    return json.dumps(files) if files else reply


FORMS = {"swebench": "agent", "aider_polyglot": "tries", "quixbugs": "agent"}
"""Suites that `moonkit eval agent` plays, by their loader, and how it plays them unless told."""


def problems(name: str, limit: int | None = None) -> Iterator[Any]:
    """evals.repositories.Problem of a suite that has files to work on: work(problem, policy). Ids are those of `load`.

    Raises ValueError for another suite, for missing data and, when it is reached, for a broken row."""
    from evals.loaders import swe_problems
    from evals.repositories import aider_polyglot, quixbugs

    form(name)
    kind, found = _metadata(name)["suite"], source(name)
    if kind == "swebench":
        made: Iterator[Any] = (problem for _, problem in swe_problems(found))
    elif found.folder is None:
        raise ValueError(f"{name} is a folder of files; layout:\n{found.layout}")
    elif kind == "aider_polyglot":
        made = (replace(each, id=f"polyglot/{each.id}") for each in aider_polyglot(found.folder))
    else:
        made = iter(quixbugs(found.folder))
    return islice(made, limit)


def _plays(name: str) -> bool:
    return _metadata(name)["suite"] in FORMS


def form(name: str) -> str:
    """How `moonkit eval agent` plays a suite: "agent", or "tries". Raises ValueError for one that it cannot play."""
    kind = _metadata(name)["suite"]
    if kind not in FORMS:
        known = [each for each in names() if _plays(each)]
        raise ValueError(f"{name} has no files to work on; an agent can be given {', '.join(known)}")
    return FORMS[kind]


_graded: dict[bytes, Verdict] = {}


# ---- for lm-eval


def dataset(
    name: str, profile: Profile = "k2_7", options: Mapping[str, Any] | None = None, **metadata: Any
) -> "dict[str, datasets.Dataset]":
    """lm-eval's custom_dataset: called with the YAML's metadata and the run's.

    lm-eval's --metadata '{"options": {"after": "2025-01-01"}}' reaches the loader of the suite that is run.
    """
    import datasets

    return {"test": datasets.Dataset.from_list(load(name, profile=profile, **(options or {})))}


def doc_to_image(document: Mapping[str, Any]) -> list[Any]:
    """lm-eval's doc_to_image: pictures and videos mixed, in order."""
    return media(document)


def keep_all(replies: Any, documents: Any) -> list[list[str]]:
    """lm-eval's filter: every sample of every question, so that avg@k is a mean over k."""
    return [list(each) for each in replies]


def process_results(document: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """lm-eval's process_results: the mean score of a question's samples, and what went wrong.

    A reply may carry `truncated` or `finish_reason`, as evals.adapter's do. A sample whose grading failed is left out
    of the mean and counted; a question without any graded sample has no score.
    """
    replies = results[0] if isinstance(results[0], list | tuple) else results
    verdicts = [verdict(document, reply, was_truncated(reply)) for reply in replies]
    scores = [v.score for v in verdicts if v.score is not None]
    counts = {
        "truncated": sum(v.status == "truncated" for v in verdicts) / len(verdicts),
        "infra_errors": float(len(verdicts) - len(scores)),
    }
    return ({"score": sum(scores) / len(scores)} if scores else {}) | counts


def was_truncated(reply: Any) -> bool:
    """Whether a reply says of itself that it ended at the token limit."""
    return bool(getattr(reply, "truncated", False)) or getattr(reply, "finish_reason", None) == "length"


def total(values: Sequence[float]) -> float:
    """lm-eval's aggregation of counts."""
    return float(sum(values))


# ---- the page


def markdown() -> Iterator[str]:
    """docs/suites.md: each suite, what it asks, its data, its grader, its settings and its protocol."""
    from evals.loaders import layout

    yield "# Suites"
    yield ""
    yield "Written by `python -m evals.suites --markdown docs/suites.md`; `evals/suites/NAME.yaml` is what it reads."
    yield ""
    yield "Data lies in `$MOONKIT_DATA/NAME`, in `../shared/data/NAME` beside the checkout or in `./data/NAME`."
    yield "Without a folder the hub is asked, where the suite has a data set there and there is a network. Profiles:"
    yield "`k2_7` (the default), `k2_5`, and `nano`, which keeps every budget small for the model in the box: 256 new"
    yield "tokens, greedy, one sample, at most 8 frames of a video."
    yield ""
    yield f"`moonkit eval agent` lets a model work on {', '.join(f'`{name}`' for name in names() if _plays(name))}"
    yield "(evals/agents.py), with tools in a sandbox or by aider's two tries, under the same settings."
    groups: dict[str, list[str]] = {}
    for name in names():
        groups.setdefault(_metadata(name)["part"], []).append(name)
    for part in ("coding", "vision", "video", "text", "world"):
        yield ""
        yield f"## {part.capitalize()}"
        yield ""
        yield "| suite | what it asks | grader | k2_7: tokens, avg@k | k2_5: tokens, avg@k | frames, pixels |"
        yield "| --- | --- | --- | --- | --- | --- |"
        for name in groups.get(part, []):
            meta, new, old = _metadata(name), settings(name, "k2_7"), settings(name, "k2_5")
            video = f"{new.frames}, {new.pixels}" if new.frames else "-"
            yield (
                f"| `{name}` | {meta['asks']} | {meta['grader']} | {new.tokens:,}, {new.repeats} "
                f"| {old.tokens:,}, {old.repeats} | {video} |"
            )
        for name in groups.get(part, []):
            meta = _metadata(name)
            yield ""
            yield f"**`{name}`**. {meta['protocol']}"
            if meta["suite"] != "world":
                yield ""
                online = hub(name)[0]
                other = f", or the hub's `{online}`" if online else ""
                yield f"Data: the folder `{meta['data']}`{other}."
                yield ""
                yield "```text"
                yield layout(meta["suite"])
                yield "```"


@dataclass(frozen=True)
class Arguments:
    """List the suites, or write their page."""

    markdown: Path | None = None
    """Write the page about all suites into this file."""
    show: str | None = None
    """Show the first question of this suite."""
    profile: Profile = "k2_7"
    """Settings to list: k2_7, k2_5 or nano."""


def main() -> None:
    """python -m evals.suites"""
    import tyro

    arguments = tyro.cli(Arguments, prog="python -m evals.suites")
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(markdown()) + "\n", encoding="utf-8")
    elif arguments.show:
        document = load(arguments.show, 1, profile=arguments.profile)[0]
        print(describe([arguments.show], arguments.profile), "", *(f"{k}: {v}" for k, v in document.items()), sep="\n")
    else:
        for name, asks in names().items():
            here = (
                "made here"
                if _metadata(name)["part"] == "world"
                else find_data(_metadata(name)["data"]) and "data here"
            )
            print(f"{name:<28}{here or '-':<11}{asks}")
        print("", describe(list(names()), arguments.profile), sep="\n")


if __name__ == "__main__":
    main()
