"""Cuts what an adapter of the deep model adds to keys and values to a rank: `python -m vis_sparse.eval.deep.cut_adapter
--adapter FOLDER --rank 24`, in place.

Of every map the directions stay that matter most for the rows that enter it under the adapter's plan, visual and text
rows weighed alike, as `vis_sparse.fit` chooses them.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vis_sparse.calibration.fit import of_rank
from vis_sparse.eval.deep import adapter_files
from vis_sparse.eval.deep.decoder import SCALE
from vis_sparse.eval.deep.export import SHIPPED, weights_of
from vis_sparse.eval.deep.front import planned, work_of
from vis_sparse.eval.deep.model import Model
from vis_sparse.eval.deep.planned import PlannedDecoder
from vis_sparse.eval.deep.projector import projected
from vis_sparse.eval.deep.sequences import sequences, visual_places
from vis_sparse.eval.deep.vision import features, seen
from vis_sparse.eval.tiny.smol_files import ADAPTED_MODEL, ADAPTER, ADAPTER_CONFIG, SIDES, adapter_difference, merged
from vis_sparse.plans.carried import plans_of_folder

SEED, BATCHES = 5, 12
SHOWN = ("page", "grid", "page", "shape")


class Watched(PlannedDecoder):
    """Adds up the squares (in, in) of the rows that enter a layer's first products, by layer and lane."""

    squares: dict[int, list[Tensor]]

    def _linears(self, layer: int, number: int, rows: Tensor) -> Tensor:
        if number == 0:
            flat = rows.flatten(0, 1).double()
            self.squares.setdefault(layer, []).append(flat.T @ flat)
        return super()._linears(layer, number, rows)


@torch.no_grad()
def squares(folder: Path) -> dict[int, Tensor]:
    """By layer, of the rows under an adapter and its plan."""
    added, (plan,) = adapter_difference(folder), plans_of_folder(folder).values()
    work = work_of(plan)

    def watched(state: dict[str, Tensor]) -> Watched:
        plain = planned({key: merged(key, value, added) for key, value in state.items()}, work)
        plain.__class__, plain.squares = Watched, {}
        return plain

    model = Model(watched)
    model.load(weights_of(folder, SHIPPED))
    adapter_files.merge(model.projector, added)
    decoder = model.decoder
    decoder.refresh()
    sums: dict[int, list[Tensor]] = {}
    for number in range(BATCHES):
        data = sequences(model.tokenizer, np.random.default_rng([SEED, number]), SHOWN, ())
        with torch.autocast("cpu", torch.bfloat16):
            visual = projected(model.projector, features(model.tower, seen(data.images).pixels)[0])
        embedded = decoder.embeddings[data.ids].float()
        embedded = embedded.masked_scatter(visual_places(data.ids)[..., None], visual.float())
        decoder(embedded, data.positions, data.visible())
        for layer, lanes in decoder.squares.items():
            sums[layer] = [a + b for a, b in zip(sums[layer], lanes, strict=True)] if layer in sums else lanes
        decoder.squares = {}
    return {layer: sum(lane / lane.trace() for lane in lanes) for layer, lanes in sums.items()}


def cut(folder: Path, rank: int) -> None:
    tensors, config = load_file(folder / ADAPTER), json.loads((folder / ADAPTER_CONFIG).read_text())
    for layer, square in squares(folder).items():
        for name in ("k_proj", "v_proj"):
            module = f"layers.{layer}.self_attn.{name}"
            a, b = (f"{ADAPTED_MODEL}language_model.{module}{SIDES[side]}" for side in (".a", ".b"))
            if len(tensors[a]) <= rank:
                continue
            small = of_rank(tensors[b].double() @ tensors[a].double(), square, rank)
            tensors |= {key: each.half().contiguous() for key, each in zip((a, b), small, strict=True)}
            config["rank_pattern"][module], config["alpha_pattern"][module] = rank, int(SCALE * rank)
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    (folder / ADAPTER).chmod(0o644)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--rank", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    cut(given.adapter, given.rank)
