"""Write the recorded numbers of this folder from the full recordings, ../shared/golden beside the repository.

python tests/golden/compress.py
"""

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
FULL = HERE.parents[2] / "shared" / "golden"
REMADE = re.compile(r"(x|y)_(support|target)|query|support|(support|query)_labels|rand_matrix|state/.*")
HEAD_ARRAYS = re.compile(r"(?!dual|passes).*_(default|unnormalized|tiled|exact|f(32|64)_it\d+|nocheck_f64)|dual_exact")
FACTS = (
    *("cxgrad/manifest.json", "cxgrad/official_sampler.json", "metaoptnet/state_dicts.json"),
    "../facts/official_json_keys.json",
)


def is_kept(part: str, name: str) -> bool:
    """Return whether an array is stored: recipes do not make it again, and tests read it (few do of a head's)."""
    unread = part.startswith("heads_") and not HEAD_ARRAYS.fullmatch(name)
    return not unread and not REMADE.fullmatch(name)


def recorded(program: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the arrays to store as (part/name, array)."""
    for file in sorted((FULL / program).glob("*.npz")):
        with np.load(file) as arrays:
            yield from ((f"{file.stem}/{name}", arrays[name]) for name in arrays.files if is_kept(file.stem, name))


def compress(program: str) -> None:
    """Write one file: the distinct numbers of each type end to end, and an index of (type, start, shape) by name."""
    starts: dict[tuple[str, bytes], int] = {}
    numbers: dict[str, list[np.ndarray]] = defaultdict(list)
    lengths: dict[str, int] = defaultdict(int)
    index = {}
    for name, array in recorded(program):
        kind, content = array.dtype.name, array.tobytes()
        if (kind, content) not in starts:
            starts[kind, content] = lengths[kind]
            numbers[kind].append(array.ravel())
            lengths[kind] += array.size
        index[name] = (kind, starts[kind, content], array.shape)
    text = np.frombuffer(json.dumps(index).encode(), np.uint8)
    joined = {kind: np.concatenate(parts) for kind, parts in numbers.items()}
    np.savez_compressed(HERE / f"{program}.npz", index=text, **joined)


if __name__ == "__main__":
    for program in ("cxgrad", "metaoptnet"):
        compress(program)
    for name in FACTS:
        shutil.copyfile(FULL / name, HERE / Path(name).name)
