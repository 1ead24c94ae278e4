"""What a test registers as a user would (rules, heads, networks, options) is forgotten after it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from classification_heads import HEADS
from inner_loop_optimizers import RULES
from meta_neural_network_architectures import BACKBONES, EMBEDDINGS
from utils import options


@contextmanager
def forgotten_afterwards() -> Iterator[None]:
    """Let code register what it likes; on leaving, all is as before."""
    options.load_plugins()
    registries: list[dict[str, Any]] = [RULES, HEADS, BACKBONES, EMBEDDINGS]
    registries += [options.declaration(name).choices for name in ("head", "backbone")]
    before = [*map(dict, registries)], options._current, [*options._checks]
    try:
        yield
    finally:
        for registry, kept in zip(registries, before[0], strict=True):
            registry.clear()
            registry.update(kept)
        options._current, options._checks[:] = before[1:]
