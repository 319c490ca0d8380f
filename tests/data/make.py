"""Makes the sets beside this file from the full ones: `python -m tests.data.make FOLDER`, see README.md.

A full set holds every tensor. Here a random tensor becomes its place in torch's stream of random numbers, and only
results that a test compares are kept.
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from ..goldens import DATA, drawn, normals

# of the official InternVL run; the YOPO sets tell theirs, and their norms and inputs are one and seven further
SEEDS = {"internlm2-224": 1009, "internlm2-dyn-56": 1010, "internlm2-vit6b-56": 1007, "phi3-su-56": 1017}
SCALES = [(0.15, 0), (0.15, 1), (0.2, 1), (0.2, 0.6), (0.25, 0), (0.5, 0), (0.3, 0), (0.05, 0), (0.1, 0), (1, 0)]
RESULTS = ("hidden_states", "prefill_logits", "decode_tokens", "decode_logits", "dense_causal_prefill_logits")


def place(tensor: np.ndarray, streams: dict[int, np.ndarray]) -> list:
    """[seed, first, shape, scale, shift] of a random tensor."""
    flat = tensor.ravel()
    for seed, stream in streams.items():
        for scale, shift in SCALES:
            values = stream * np.float32(scale) + np.float32(shift)
            for first in np.flatnonzero(np.abs(values[: 1 - flat.size or None] - flat[0]) <= 1e-6).tolist():
                if np.allclose(values[first : first + flat.size], flat, rtol=0, atol=1e-6):
                    return [seed, first, list(tensor.shape), scale, shift]
    raise ValueError(f"a tensor of shape {tensor.shape}: expected one that torch drew from seeds {list(streams)}")


def yopo(file: Path) -> tuple[dict, dict, dict]:
    """(texts by file name, random tensors, results) of a full set."""
    with np.load(file) as z:
        arrays = dict(z)
    config = json.loads(str(arrays.pop("config_json")))
    random = {name: tensor for name, tensor in arrays.items() if name.startswith("w/") or name == "inputs_embeds"}
    results = {name: arrays[name] for name in ("headmask", "logits_rows")}
    # the official decode at batch 2 forgets the masks of sample 1; `single_*` is the same, run sample by sample
    results |= {name: arrays.get(f"single_{name}", arrays[name]) for name in RESULTS}
    return {"config.json": json.dumps(config, indent=1)}, random, results


def internvl2(folder: Path) -> tuple[dict, dict, dict]:
    texts = {name: (folder / name).read_text() for name in ("config.json", "generation_config.json")}
    inputs, expected = (load_file(folder / f"{kind}.safetensors") for kind in ("inputs", "expected"))
    del inputs["image_flags"], expected["vit_embeds"]
    return texts, load_file(folder / "model.safetensors"), inputs | expected


def bits(tensors: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([tensor.ravel() for tensor in tensors.values()]).view(np.int32)


def write(folder: Path, seed: int, texts: dict, random: dict, results: dict) -> None:
    streams = {number: normals(number, 700_000) for number in (seed, seed + 1, seed + 7)}
    table = {name: place(tensor, streams) for name, tensor in random.items()}
    official = bits(random)
    ulps = official - bits(drawn(table, np.zeros_like(official)))
    assert abs(ulps).max() < 128, f"{folder.name}: a number that torch drew is far from the one that normals gives"
    rows = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in table.items()]
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (texts | {"drawn.json": "{\n" + ",\n".join(rows) + "\n}"}).items():
        (folder / name).write_text(text.rstrip("\n") + "\n")
    np.savez_compressed(folder / "numbers.npz", ulps=ulps.astype(np.int8), **results)


if __name__ == "__main__":
    full = Path(sys.argv[1])
    for file in sorted((full / "yopo").glob("*.npz")):
        texts, random, results = yopo(file)
        write(DATA / "yopo" / file.stem, json.loads(texts["config.json"])["seed"], texts, random, results)
    for name, seed in SEEDS.items():
        write(DATA / "internvl2" / name, seed, *internvl2(full / "internvl2" / name))
