"""Numbers recorded from the official programs on fixed inputs, which every clone has.

`cxgrad.npz` (CxGrad, MAML++ and ALFA) and `metaoptnet.npz` hold them bit for bit, each distinct array once; what
`recipes` makes again is not stored. `compress.py` writes both files from the full recordings. docs/arithmetic.md says
in words what the programs computed.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent


def load(program: str, part: str) -> dict[str, np.ndarray]:
    """Return the arrays of one recorded part (such as a case of CxGrad) by name; they may be written to."""
    with np.load(HERE / f"{program}.npz") as file:
        numbers = {kind: file[kind] for kind in file.files}
    index: dict[str, tuple[str, int, list[int]]] = json.loads(numbers.pop("index").tobytes())
    found = {}
    for name, (kind, start, shape) in index.items():
        if name.startswith(f"{part}/"):
            flat = numbers[kind][start : start + int(np.prod(shape))]
            found[name.removeprefix(f"{part}/")] = flat.reshape(shape).copy()
    return found


def facts(name: str) -> Any:
    """Return the content of a JSON file: `manifest`, `official_sampler`, `state_dicts` or `official_json_keys`."""
    return json.loads((HERE / f"{name}.json").read_text())
