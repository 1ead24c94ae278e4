"""The inputs and the networks' weights of all recordings, made again bit for bit.

Everything is drawn from numpy's legacy generator, whose stream never changes, in float64 and rounded once to float32.
"""

from collections.abc import Iterable, Sequence

import numpy as np

Arrays = dict[str, np.ndarray]
EPISODES = {"5w1s": (2001, 5, 1, 3, 16, 2), "5w5s": (2002, 5, 5, 3, 32, 2), "3w4s": (2003, 3, 4, 2, 8, 3)}


def tasks(
    seed: int = 4321, batches: int = 5, tasks: int = 2, way: int = 3, shot: int = 2, query: int = 3, size: int = 20
) -> Arrays:
    """Return `x_support`, `x_target` (batches, tasks, way, images, 3, size, size), `y_support` and `y_target`.

    A class is a pattern of 4x4 cells, an image is the pattern with noise, in steps of 1/64.
    """
    random = np.random.RandomState(seed)
    images = np.empty((batches, tasks, way, shot + query, 3, size, size), np.float32)
    for place in np.ndindex(batches, tasks, way):
        pattern = np.kron(random.randn(3, -(-size // 4), -(-size // 4)), np.ones((4, 4)))[:, :size, :size]
        noisy = 0.5 + 0.12 * pattern + 0.14 * random.randn(shot + query, 3, size, size)
        images[place] = np.clip(np.floor(noisy * 64), 0, 63) / 64
    labels = np.broadcast_to(np.arange(way)[:, None], images.shape[:4])
    return {
        "x_support": images[:, :, :, :shot],
        "x_target": images[:, :, :, shot:],
        "y_support": labels[..., :shot].copy(),
        "y_target": labels[..., shot:].copy(),
    }


def episode(seed: int, way: int, shot: int, query: int, dim: int, tasks: int) -> Arrays:
    """Return the embeddings of episodes, their labels in any order, and the weights of the logits in the loss."""
    random = np.random.RandomState(seed)
    parts: dict[str, list[np.ndarray]] = {"query": [], "support": [], "support_labels": [], "query_labels": []}
    for _ in range(tasks):
        centres = random.randn(way, dim)
        of_support, of_query = (random.permutation(np.repeat(np.arange(way), n)) for n in (shot, query))
        parts["support"].append(centres[of_support] + 0.5 * random.randn(way * shot, dim))
        parts["query"].append(centres[of_query] + 0.5 * random.randn(way * query, dim))
        parts["support_labels"].append(of_support)
        parts["query_labels"].append(of_query)
    weights = random.randn(tasks, way * query, way).astype(np.float32)
    found = {name: np.stack(rows) for name, rows in parts.items()}
    return {n: a.astype(a.dtype if "labels" in n else np.float32) for n, a in found.items()} | {"rand_matrix": weights}


def network_state(listed: Iterable[tuple[str, Sequence[int], str]], seed: int) -> Arrays:
    """Return an array for each (name, shape, type) of a state dict, drawn in that order; a counter of batches is 0."""
    random = np.random.RandomState(seed)
    state = {}
    for name, shape, _ in listed:
        if name.endswith("num_batches_tracked"):
            state[name] = np.zeros(shape, np.int64)
            continue
        if name.endswith("running_var"):
            array = random.uniform(0.5, 1.5, size=shape)
        elif name.endswith(("running_mean", ".bias")):
            array = 0.1 * random.randn(*shape)
        elif len(shape) == 4:
            array = random.randn(*shape) * np.sqrt(2.0 / (shape[0] * shape[2] * shape[3]))
        else:
            array = 1.0 + 0.1 * random.randn(*shape)
        state[name] = array.astype(np.float32)
    return state


def images(seed: int, count: int, size: int) -> np.ndarray:
    """Return the images (count, 3, size, size) of a recorded embedding."""
    return np.random.RandomState(seed).randn(count, 3, size, size).astype(np.float32)
