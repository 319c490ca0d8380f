"""Evaluate plans with lmms-eval, through its own Python interface.

    python examples/evaluate_with_lmms_eval.py

`vis_sparse` is one of lmms-eval's models once both are installed; a plan is one of its arguments. Prints, for dense and
two plans on a task of the shipped tiny LLaVA, the exact matches on the first 12 documents with the decoder's FLOPs and
the KV cache of a sample, which are logged as metrics of the task. For a checkpoint and a task of yours change
`FOLDER` and `TASK`. `vis-sparse eval` does the same for several plans and tasks, with tables and a picture.
"""

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

from vis_sparse.eval.tasks import folder
from vis_sparse.eval.tiny import checkpoint

FOLDER, TASK = checkpoint("llava"), "digit_grid_count"

# only for the tasks of the shipped models; lmms-eval knows its own without
manager = TaskManager(include_path=str(folder()), include_defaults=False)
for plan in ("dense", "auto", "yopo-25"):
    arguments = f"pretrained={FOLDER},plan={plan},calibration={FOLDER / 'heads.safetensors'},dtype=float32"
    results = simple_evaluate("vis_sparse", arguments, tasks=[TASK], task_manager=manager, limit=12, device="cpu")
    found = {name.split(",")[0]: value for name, value in results["results"][TASK].items()}
    print(
        f"{plan}: exact match {found['exact_match']:.0%}, {found['gflops']:.2f} GFLOPs of {found['gflops_dense']:.2f}, "
        f"KV cache {found['kv_mib']:.2f} MiB of {found['kv_mib_dense']:.2f}"
    )
