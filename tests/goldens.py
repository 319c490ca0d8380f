"""The numbers of the official codes in tests/data: results are stored there, random tensors are drawn again."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

DATA = Path(__file__).parent / "data"
YOPO = sorted(folder.name for folder in (DATA / "yopo").iterdir())
INTERNVL2 = sorted(folder.name for folder in (DATA / "internvl2").iterdir())


def normals(seed: int, count: int) -> np.ndarray:
    """What `torch.randn` draws on a CPU after `torch.manual_seed(seed)`, float32, but for the last few bits.

    Spelled out, since torch promises no version the numbers of another, and numpy promises these for RandomState.
    count: a multiple of 16, of which each block of 8 pairs of 24 random bits makes 16 numbers (Box and Muller).
    Logarithm, sine and cosine are in float64 and rounded, so that every machine rounds to the same.
    """
    bits = np.frombuffer(np.random.RandomState(seed).bytes(4 * count), "<u4")
    uniform = (bits & 0xFFFFFF).reshape(-1, 2, 8) / 2**24
    radius = np.sqrt(-2 * np.log(1 - uniform[:, 0]).astype(np.float32))
    angle = (np.float32(2 * np.pi) * uniform[:, 1].astype(np.float32)).astype(np.float64)
    return np.stack([radius * f(angle).astype(np.float32) for f in (np.cos, np.sin)], axis=1).ravel()


def drawn(table: dict[str, list], ulps: np.ndarray) -> dict[str, np.ndarray]:
    """The float32 tensors of a set's drawn.json, by name, to the last bit.

    table: name -> [seed, first, shape, scale, shift]: the seed's numbers from the `first` on, times scale, plus shift.
    ulps: for each number, in the table's order, how many floats torch's is above the one that `normals` gives.
    """
    ends = {}
    for seed, first, shape, *_ in table.values():
        ends[seed] = max(ends.get(seed, 0), first + int(np.prod(shape)))
    streams, tensors, start = {seed: normals(seed, end) for seed, end in ends.items()}, {}, 0
    for name, (seed, first, shape, scale, shift) in table.items():
        count = int(np.prod(shape))
        tensor = streams[seed][first : first + count] * np.float32(scale) + np.float32(shift)
        tensors[name] = (tensor.view(np.int32) + ulps[start : start + count]).view(np.float32).reshape(shape)
        start += count
    return tensors


def load(name: str) -> tuple[dict, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(config, random tensors, results) of a set such as "yopo/c1_w3_L4_r2_s5"."""
    folder = DATA / name
    config, table = (json.loads((folder / file).read_text()) for file in ("config.json", "drawn.json"))
    with np.load(folder / "numbers.npz") as numbers:
        results = dict(numbers)
    return config, drawn(table, results.pop("ulps")), results


def write_checkpoint(name: str, folder: Path) -> dict[str, np.ndarray]:
    """Writes an InternVL2 set's model as the official code saved it, and returns the results."""
    for file in (DATA / "internvl2" / name).glob("*config.json"):
        shutil.copy(file, folder)
    _, weights, results = load(f"internvl2/{name}")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return results
