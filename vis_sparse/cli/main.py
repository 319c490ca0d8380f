"""The program `vis-sparse`: nothing but its commands put together.

A command is a function in a module of its own that imports torch and transformers only when it runs, so that
`vis-sparse --help` is quick. Adding one is one line below.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import typer
from typer.core import TyperGroup

from .. import __version__
from ..calibration.records import SampleError
from ..checkpoints.errors import CheckpointError
from ..layout.image_grids import ShapeError
from ..layout.layout import LayoutError
from ..plans.layer_plan import PlanError
from .bench import bench_command
from .bench_calibration import bench_calibration_command
from .bench_kernels import bench_kernels_command
from .calibrate import calibrate_command
from .convert import convert_command
from .demo import demo_command
from .doctor import doctor_command
from .evaluate import eval_command
from .finetune import finetune_command
from .fit import fit_command
from .flops import flops_command
from .plan import plan_app
from .report import report_command
from .search import search_command


class _OneLineErrors(TyperGroup):
    """Errors in what the user gave are one line on stderr and exit code 2; a traceback is for bugs."""

    def make_context(self, *args, **kwargs):
        with _in_one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx):
        try:
            with _in_one_line():
                return super().invoke(ctx)
        except (PlanError, LayoutError, ShapeError, SampleError, CheckpointError) as error:
            _refuse(error)
        except ValueError as error:
            from ..patches.errors import PatchError  # torch comes with it, so not for the errors above

            if not isinstance(error, PatchError):
                raise
            _refuse(error)


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Wrong arguments of any command."""
    try:
        yield
    except typer.BadParameter.__base__ as error:  # UsageError, by a name that every typer has
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        _refuse(error.format_message())


def _refuse(error: ValueError | str) -> NoReturn:
    typer.echo(f"vis-sparse: {' '.join(str(error).split())}", err=True)
    raise typer.Exit(2) from None


app = typer.Typer(
    cls=_OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    help="Sparse computation for the visual tokens of multimodal LLMs.",
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"vis-sparse {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.add_typer(plan_app, name="plan")
app.command("flops", epilog="Example: vis-sparse flops --model llava-1.5-7b --plan dense,auto,yopo-12")(flops_command)
bench_app = typer.Typer()
bench_app.callback(
    invoke_without_command=True, epilog="Example: vis-sparse bench --model llava-1.5-7b --layers 2 --plan yopo-12"
)(bench_command)
bench_app.command("kernels", epilog="Example: vis-sparse bench kernels --settings 24x24 --radius 2 --most-heads 4")(
    bench_kernels_command
)
bench_app.command("calibration", epilog="Example: vis-sparse bench calibration --model qwen2-vl-2b --layers 2")(
    bench_calibration_command
)
app.add_typer(bench_app, name="bench")
app.command("demo", epilog="Example: vis-sparse demo --questions 100")(demo_command)
app.command("eval", epilog="Example: vis-sparse eval --plan dense,yopo-25,yopo-12 --tasks digit_grid --limit 200")(
    eval_command
)
app.command("report", epilog="Example: vis-sparse report out/eval/results.json --out report.html")(report_command)
app.command("calibrate", epilog="Example: vis-sparse calibrate --model DIR --data tiny-train --out calib.safetensors")(
    calibrate_command
)
app.command("search", epilog="Example: vis-sparse search --model DIR --data tiny-train --budget 0.12 --out plan.yaml")(
    search_command
)
app.command("fit", epilog="Example: vis-sparse fit --model DIR --data tiny-train --plan plan.yaml --out fitted")(
    fit_command
)
app.command(
    "finetune", epilog="Example: vis-sparse finetune --model DIR --data d.json --plan yopo-12 --out tuned --lora 64"
)(finetune_command)
app.command("convert-internvl2", epilog="Example: vis-sparse convert-internvl2 InternVL2-8B InternVL2-8B-hf")(
    convert_command
)
app.command("doctor", epilog="Example: vis-sparse doctor --json report.json")(doctor_command)
