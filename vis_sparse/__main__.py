"""`python -m vis_sparse` is `vis-sparse`, for launchers that want a module."""

from .cli.main import app

app(prog_name="vis-sparse")
