"""Everything that only a GPU can say, in one run of under nine minutes, and the tables of docs/kernels.md made from it.

`python -m vis_sparse.eval.gpu run` (or `make gpu`) measures; `... tables RESULTS` writes the tables.
"""
