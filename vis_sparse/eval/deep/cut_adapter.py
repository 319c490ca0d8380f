"""Cuts what an adapter of the deep model adds to keys and values to a rank: `python -m vis_sparse.eval.deep.cut_adapter
--adapter FOLDER --rank 24`, in place.

Of every map the directions stay that matter most for the rows that enter it under the adapter's plan, visual and text
rows weighed alike, as `vis_sparse.fit` chooses them.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vis_sparse.calibration.fit import of_rank
from vis_sparse.eval.deep import adapter_files
from vis_sparse.eval.deep.answers import asked
from vis_sparse.eval.deep.decoder import SCALE
from vis_sparse.eval.deep.export import SHIPPED, weights_of
from vis_sparse.eval.deep.front import planned, work_of
from vis_sparse.eval.deep.model import Model
from vis_sparse.eval.deep.planned import PlannedDecoder
from vis_sparse.eval.tiny.smol_files import ADAPTED_MODEL, ADAPTER, ADAPTER_CONFIG, SIDES, adapter_difference, merged
from vis_sparse.plans.carried import plans_of_folder

SEED, BATCHES = 5, 12
SHOWN = ("page", "grid", "page", "shape")


class Watched(PlannedDecoder):
    """Adds up the squares (in, in) of the rows that enter a layer's first products, by layer and lane."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.squares: dict[tuple[int, int], Tensor] = {}
        self._seen = 0  # lanes of the layer that runs

    def _linears(self, layer: int, number: int, rows: Tensor) -> Tensor:
        self._seen = self._seen + 1 if number == 0 else 0
        if number == 0:
            flat, key = rows.flatten(0, 1).double(), (layer, self._seen)
            self.squares[key] = self.squares.get(key, 0) + flat.T @ flat
        return super()._linears(layer, number, rows)


@torch.no_grad()
def squares(folder: Path) -> dict[int, Tensor]:
    """By layer, of the rows under an adapter and its plan."""
    added, (plan,) = adapter_difference(folder), plans_of_folder(folder).values()
    work = work_of(plan)
    model = Model(lambda state: planned({key: merged(key, own, added) for key, own in state.items()}, work, Watched))
    model.load(weights_of(folder, SHIPPED))
    adapter_files.merge(model.projector, added)
    model.decoder.refresh()
    for number in range(BATCHES):
        found = asked(model, [SEED, number], SHOWN, "train")
        model.decoder(found.embedded, *found.inputs)
    sums: dict[int, Tensor] = {}
    for (layer, _), square in model.decoder.squares.items():
        sums[layer] = sums.get(layer, 0) + square / square.trace()
    return sums


def cut(folder: Path, squares: Mapping[int, Tensor], rank: int) -> None:
    """Leave no more than `rank` in what an adapter's folder adds to keys and values; squares: by layer, of the rows."""
    tensors, config = load_file(folder / ADAPTER), json.loads((folder / ADAPTER_CONFIG).read_text())
    for layer, square in squares.items():
        for name in ("k_proj", "v_proj"):
            module = f"layers.{layer}.self_attn.{name}"
            a, b = (f"{ADAPTED_MODEL}language_model.{module}{SIDES[side]}" for side in (".a", ".b"))
            if len(tensors[a]) <= rank:
                continue
            small = of_rank(tensors[b].double() @ tensors[a].double(), square, rank)
            tensors |= {key: each.half().contiguous() for key, each in zip((a, b), small, strict=True)}
            config["rank_pattern"][module], config["alpha_pattern"][module] = rank, int(SCALE * rank)
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    (folder / ADAPTER).chmod(0o644)  # safetensors lets nobody else read its files
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--rank", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    cut(given.adapter, squares(given.adapter), given.rank)
