"""Tasks of lmms-eval, and those of `vis_sparse.eval.tasks`, as calibration data."""

from __future__ import annotations

from collections.abc import Iterator

from ..calibration.records import Record, SampleError


def task_records(name: str) -> Iterator[Record]:
    """The questions of a task, or of a group's tasks in turn, from its training split if it has one.

    Raises SampleError if lmms-eval is missing or does not know the task, or for documents that are no question about
    one image.
    """
    try:
        from lmms_eval.tasks import get_task_dict

        from .lmms.run import task_manager
    except ImportError as error:
        raise SampleError(f"data: lmms:{name} needs lmms-eval (pip install 'vis_sparse[eval]'): {error}") from None
    kinds = [_records(task) for task in _tasks(get_task_dict([name], task_manager([name])))]
    while kinds:
        for kind in tuple(kinds):
            record = next(kind, None)
            if record is None:
                kinds.remove(kind)
            else:
                yield record


def _tasks(found: dict) -> Iterator:
    """The tasks of a dictionary with groups in it."""
    for value in found.values():
        if isinstance(value, dict):
            yield from _tasks(value)
        else:
            yield value


def _records(task) -> Iterator[Record]:
    name = task.config.task
    docs = task.training_docs() if task.has_training_docs() else task.eval_docs
    for number, doc in enumerate(docs):
        images, question, answer = task.doc_to_visual(doc), task.doc_to_text(doc), task.doc_to_target(doc)
        if not isinstance(images, list) or len(images) != 1 or not isinstance(question, str):
            raise SampleError(f"data: lmms:{name}, document {number}: expected a question about one image")
        if isinstance(answer, list) and answer:  # several that are right, or of several turns
            answer = answer[0]
        yield Record(images[0], question, answer if isinstance(answer, str) else None)
