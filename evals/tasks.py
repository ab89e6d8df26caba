"""lm-eval's tasks with ours among them: quick to find, settings in place, broken rows named.

    Tasks(include_path=..., profile="nano", repeats=4).load(["kimi_gsm8k"])

lm-eval indexes 13,000 tasks in about ten seconds; here that waits until a name is asked for that is none of ours.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets.exceptions import DatasetNotFoundError
from lm_eval.tasks import TaskManager

from evals.stock import Factory, not_there

log = logging.getLogger(__name__)


class Tasks(TaskManager):
    """lm-eval's tasks, ours first: its own 13,000 are indexed (seconds) only when something else is asked for."""

    def __init__(
        self,
        verbosity: str | None = None,
        include_path: str | Path | list[str | Path] | None = None,
        include_defaults: bool = True,
        metadata: dict[str, Any] | None = None,
        *,
        profile: str | None = None,
        repeats: int | None = None,
    ) -> None:
        paths = [] if include_path is None else include_path if isinstance(include_path, list) else [include_path]
        self._paths: list[str | Path] = [*suite_folder(), *paths]
        self._more = include_defaults
        self.profile, self.repeats = profile, repeats
        if profile:
            metadata = {"profile": profile} | (metadata or {})
        super().__init__(None, self._paths, False, metadata)
        self._factory = Factory(meta=metadata)
        self._loaded: dict[str, Any] = {}

    def _index_all(self) -> bool:
        """Index lm-eval's own tasks too; False if that is done."""
        if not self._more:
            return False
        self._more = False
        log.info("indexing lm-eval's own tasks")
        super().__init__(None, self._paths, True, self.metadata)
        self._factory = Factory(meta=self.metadata)
        return True

    def match_tasks(self, task_list: list[str]) -> list[str]:
        """As in lm-eval; a name that nobody knows is a ValueError with the nearest."""
        if any(sign in name for name in task_list for sign in "*?["):
            self._index_all()
        found = super().match_tasks(task_list)
        if not found and self._index_all():
            found = super().match_tasks(task_list)
        if not found and not all(Path(name).is_dir() for name in task_list):
            from difflib import get_close_matches

            near = get_close_matches(task_list[0], self.all_tasks, 3, 0.6)
            hint = f"did you mean {', '.join(near)}?" if near else "`moonkit eval list` shows ours"
            raise ValueError(f"no task {task_list[0]!r}; {hint} (all of lm-eval's: moonkit eval ls tasks)")
        return found

    def _entry(self, name: str) -> Any:
        found = super()._entry(name)
        if found is None and not Path(name).suffix and self._index_all():
            found = super()._entry(name)
        return found

    def load(self, task_list: Any) -> Any:
        """The same objects for the same list, with our settings in place and broken rows named."""
        key = repr(task_list)
        if key not in self._loaded:
            names = task_list if isinstance(task_list, list) else [task_list]
            for name in names:
                if isinstance(name, str) and self._entry(name) is None and not Path(name).is_file():
                    self.match_tasks([name])
            try:
                try:
                    loaded = super().load(task_list)
                except KeyError:
                    if not self._index_all():  # a group of ours may name tasks of lm-eval's
                        raise
                    loaded = super().load(task_list)
            except (ConnectionError, DatasetNotFoundError) as error:
                raise not_there(error, list(map(str, names))) from error
            for name, task in loaded["tasks"].items():
                self._settle(name, task)
            self._loaded[key] = loaded
        return self._loaded[key]

    def _settle(self, name: str, task: Any) -> None:
        if self.profile and name in suite_names():
            from evals import suites

            chosen = suites.settings(name, self.profile)  # type: ignore[arg-type]
            task.set_config("generation_kwargs", chosen.generation)
            task.set_config("repeats", chosen.repeats)
        if self.repeats is not None and task.OUTPUT_TYPE == "generate_until":
            task.set_config("repeats", self.repeats)
        for method in ("fewshot_context", "process_results"):
            _name_rows(name, task, method)


def _name_rows(name: str, task: Any, method: str) -> None:
    """Let errors about a document say which one it is."""
    import jinja2

    inner = getattr(task, method)

    def named(doc: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return inner(doc, *args, **kwargs)
        except (LookupError, TypeError, ValueError, AttributeError, AssertionError, jinja2.TemplateError) as e:
            if type(e) is LookupError:  # NLTK's word for data of its own that is not here
                raise ValueError(f"{name}: {' '.join(str(e).replace('*', ' ').split())[:300]}") from e
            what = f"it has no {e}" if isinstance(e, KeyError) else f"{e}"
            row = doc.get("id", doc.get("task_id")) if isinstance(doc, Mapping) else None
            shown = row if row is not None else json.dumps(doc, default=str)[:120]
            raise ValueError(f"{name}, row {shown}: a broken row, {type(e).__name__}: {what}") from e

    setattr(task, method, named)


def suite_folder() -> list[Path]:
    folder = Path(__file__).parent / "suites"
    return [folder] if any(folder.glob("*.yaml")) else []


def suite_names() -> set[str]:
    if not suite_folder():
        return set()
    from evals import suites

    return set(suites.names())
