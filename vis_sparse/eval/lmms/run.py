"""Several plans on several tasks of lmms-eval: one run a pair, each kept in files of its own, so that a run that was
stopped goes on where it was."""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from lmms_eval import evaluator
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import handle_non_serializable

from ...calibration.fingerprint import of_checkpoint, of_versions
from ...calibration.records import SampleError
from ...patches.errors import PatchError
from ...plans.budgets import load_heads
from ...plans.files import load_plan, shown_names
from ...plans.layer_plan import HeadFile, LayerPlan, PlanError, reason
from ...plans.scores import Calibration
from ..tasks import folder
from ..tasks.tiny import made_by
from ..timing import machine_facts
from .columns import COLUMNS
from .model import load

DENSE = "dense"
_SAMPLES_LEAVE_OUT = ("arguments", "doc")  # as lmms-eval's own samples files do


@dataclass(frozen=True)
class Settings:
    """What has to be the same for the files of an earlier run to count. model: a checkpoint folder or name. limit:
    samples of each task. paired: of those, how many are timed under the unpatched model too. dtype, device, base: as
    in `load`; batch_size: of lmms-eval."""

    model: str
    limit: int | None = None
    batch_size: int = 1
    paired: int = 32
    calibration: str | None = None
    heads: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    base: str | None = None


def evaluate(
    settings: Settings,
    plans: list[str],
    tasks: list[str],
    out: Path,
    on_pair: Callable[[str, str, bool], None] = lambda task, plan, is_known: None,
) -> list[dict]:
    """Run every plan on every task, all plans of a task in a row; returns the rows of `summary`.

    out: for each pair `<task>/<plan>.json` with its results, and with it `<task>/<plan>.<subtask>.jsonl`, a line a
    sample. A pair whose results are there from the same settings, checkpoint, plan, calibration, task and versions is
    read, not run; one that is there from others is said to be on stderr, and run anew. on_pair(task, plan, is it read):
    called before each pair. Raises PatchError, PlanError, or SampleError for a task that lmms-eval does not know.
    """
    if len({_file_name(plan) for plan in plans}) < len(plans):
        raise PlanError(f"plan: got {', '.join(plans)}, expected plans of different names")
    made_from = _made_from(settings)
    if settings.calibration is not None:
        Calibration.load(settings.calibration)  # before anything is measured
    if settings.heads not in (None, "first"):
        load_heads(settings.heads)
    manager = task_manager(tasks)
    contents = {plan: made_from | _contents(settings, plan) for plan in plans}
    named = {plan: asdict(settings) | {"plan": plan, "contents": contents[plan]} for plan in plans}
    model, pairs, names = None, {}, shown_names(plans)
    for task in tasks:
        for plan in plans:
            file = out / task / f"{_file_name(plan)}.json"
            kept = _kept(file, named[plan])
            on_pair(task, plan, kept is not None)
            if kept is None:
                model = model or _load(settings)
                kept = _run(model, settings, named[plan], task, manager, file)
            pairs[task, plan] = kept
    return summary(pairs, names)


def task_manager(tasks: list[str]) -> TaskManager:
    """lmms-eval's index of tasks. Its own are some thousand files, which are left out where they are not needed."""
    for with_defaults in (False, True):
        manager = TaskManager(include_path=str(folder()), include_defaults=with_defaults)
        unknown = [task for task in tasks if task not in manager.all_tasks]
        if not unknown:
            return manager
    raise SampleError(f"tasks: got {', '.join(unknown)}, expected tasks of lmms-eval or of {folder()}")


def _load(settings: Settings):
    model = load(
        settings.model,
        plan=DENSE,
        dtype=settings.dtype,
        device=settings.device,
        base=settings.base,
        batch_size=settings.batch_size,
    )
    model.clean = lambda: None  # lmms-eval frees a model after its tasks; this one has more to come
    return model


def _run(model, settings: Settings, named: dict, task: str, manager: TaskManager, file: Path) -> dict:
    model.use_plan(named["plan"], calibration=settings.calibration, heads=settings.heads, paired=settings.paired)
    results = evaluator.simple_evaluate(
        model=model,
        tasks=[task],
        task_manager=manager,
        limit=settings.limit,
        batch_size=settings.batch_size,
        device=settings.device,
        log_samples=True,
        # what lmms-eval's own command line hands over: images are not read again for scoring
        cli_args=argparse.Namespace(process_with_media=False, output_path=str(file.parent), reasoning_tags=None),
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    failed, answers = {}, {}
    for name, samples in results["samples"].items():
        lines = [{key: value for key, value in s.items() if key not in _SAMPLES_LEAVE_OUT} for s in samples]
        _write(file.with_suffix(f".{name}.jsonl"), "".join(_json(line) + "\n" for line in lines))
        failed[name] = {s["doc_id"]: _error(s) for s in samples if _error(s)}
        answers[name] = {str(s["doc_id"]): s["filtered_resps"] for s in samples}
    kept = {
        "settings": named,
        "results": results["results"],
        "higher_is_better": results["higher_is_better"],
        "samples": {name: len(samples) for name, samples in results["samples"].items()},
        "answers": answers,
        "failed": failed,
        "strip": model.meter.strip,
        "versions": results["versions"],
        "lmms_eval": results["lmms_eval_version"],
        "run": machine_facts(torch.device(settings.device)),
    }
    _write(file, _json(kept, indent=2) + "\n")  # last: its presence says that the pair is done
    return json.loads(file.read_text())


def _error(sample: dict) -> str | None:
    return next((counts["error"] for counts in sample["token_counts"] if counts and "error" in counts), None)


def _kept(file: Path, named: dict) -> dict | None:
    """The results in a file, if they are from what is named; why not goes to stderr."""
    if not file.is_file():
        return None
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        before = dict(kept["settings"])
    except (ValueError, KeyError, TypeError):
        print(f"{file}: expected the results of an earlier run; measured again", file=sys.stderr)
        return None
    if before == named:
        return kept
    contents, earlier = named["contents"], before.get("contents") or {}
    changed = [name for name in named if name != "contents" and named[name] != before.get(name)]
    changed += [f"{name} (what is in it)" for name in contents if contents[name] != earlier.get(name)]
    changed += [name for name in earlier if name not in contents]
    print(f"{file}: is of another {', '.join(changed) or 'run'}; measured again", file=sys.stderr)
    return None


def _made_from(settings: Settings) -> dict[str, str]:
    """What all results of a run depend on, beside its settings: checkpoint, tasks, versions."""
    try:
        checkpoint = of_checkpoint(settings.model)
    except (OSError, ValueError) as error:
        raise PatchError(f"model: got {settings.model!r}, expected a multimodal checkpoint ({reason(error)})") from None
    return {"model": checkpoint, "tasks": made_by()} | of_versions("lmms_eval")


def _contents(settings: Settings, plan: str) -> dict[str, str]:
    """Hex digests of what a plan, its mask files and the score files say."""
    recipe = load_plan(plan)
    files = {"calibration": settings.calibration, "heads": settings.heads}
    for layer in (recipe.default, *(changes for _, changes in recipe.entries)):
        heads = layer.heads if isinstance(layer, LayerPlan) else layer.get("heads")
        if isinstance(heads, HeadFile):
            files[f"heads of {plan}"] = heads.file
    digests = {name: _digest(Path(file)) for name, file in files.items() if file is not None}
    return digests | {"plan": hashlib.sha256(repr(recipe).encode()).hexdigest()}


def _digest(file: Path) -> str:
    """Of a file's bytes; of one that is missing, which is refused where it is read, nothing."""
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def _file_name(plan: str) -> str:
    """A plan may be a path."""
    return Path(plan).stem if plan.endswith((".yaml", ".yml")) else plan


def _json(data, **options) -> str:
    return json.dumps(data, default=handle_non_serializable, ensure_ascii=False, **options)


def _write(file: Path, text: str) -> None:
    unfinished = file.with_name(file.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(file)


def summary(pairs: dict[tuple[str, str], dict], names: dict[str, str]) -> list[dict]:
    """One row a task (subtasks of groups by themselves), plan and metric of the task: {model, task, plan, metric,
    value, stderr, higher_is_better, samples, same_as_dense, failed: {document: error}} and those of `COLUMNS` (None
    where not known). names: what rows call the plans. same_as_dense: share of answers equal to the dense run's, if
    there is one. strip: `plan_strip` of one prompt. Last, machine, versions and date of the run."""
    rows = []
    for (task, plan), kept in pairs.items():
        dense = pairs.get((task, DENSE)) if plan != DENSE else None
        for name, samples in kept["samples"].items():
            values = {key.split(",")[0]: value for key, value in kept["results"][name].items() if "," in key}
            same = None if dense is None else _same(kept["answers"][name], dense["answers"][name])
            costs = {column: values.get(column) for column in COLUMNS if column != "failed"}
            for metric, value in values.items():
                if metric in COLUMNS or "_stderr" in metric or not isinstance(value, int | float):
                    continue
                stderr = values.get(f"{metric}_stderr_clt")
                rows.append(
                    {
                        "model": "/".join(Path(kept["settings"]["model"]).parts[-2:]),
                        "task": name,
                        "plan": names[plan],
                        "metric": metric,
                        "value": value,
                        "stderr": stderr if isinstance(stderr, int | float) else None,
                        "higher_is_better": kept["higher_is_better"][name].get(metric),
                        "samples": samples,
                        "same_as_dense": same,
                        "failed": kept["failed"][name],
                        **costs,
                        "strip": kept.get("strip"),
                        **kept["run"],
                    }
                )
    return rows


def _same(answers: dict, others: dict) -> float:
    return statistics.mean(answers[number] == others[number] for number in answers)
