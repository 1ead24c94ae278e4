"""Files that are damaged, of another kind, or made to do harm, and the readers that have to notice it."""

import logging
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from preprocess import staging
from preprocess.preprocess import prepare
from tests.made_archives import pack, png
from tests.torture_lab import SHAPE, contents, experiment, lasting
from utils import checkpoints
from utils.environment import read_environments
from utils.errors import UserError
from utils.image_cache import open_split
from utils.options import read_json
from utils.records import read_run
from utils.report import write_report
from utils.results import collect

FOREIGN = {
    "empty": b"",
    "an image": png(0),
    "a zip file": b"PK\x05\x06" + bytes(18),
    "zeros": bytes(5000),
    "a web page": b"<!doctype html><title>404</title>",
    "deep JSON": b"[" * 100_000,
    "other JSON": b'{"a": [1, null, "x"], "b": {}}',
    "JSON of another shape": b'[[1], {"model": 5}, null]',
    "other CSV": b"epoch,iterations,train_loss\n1,x,\n,,\n",
    "text with a null byte": b"epoch,iterations\n\0,1\n",
    "a long line": b"1" * 200_000 + b"\n",
}


class Kind(NamedTuple):
    """A kind of file, and what reads it as the commands do."""

    path: Path
    read: Callable[[], object]
    is_summed: bool = True  # a text without a checksum may hold another digit after that


def kinds(work: Path) -> Iterator[Kind]:
    """Yield the kinds of files in a folder where everything was done once."""
    run, datasets, exported = experiment(work), work / "datasets", work / "exported"
    logs = run / "logs"
    yield Kind(run / "saved_models" / "latest", lambda: lasting(checkpoints.load(run / "saved_models" / "latest")))
    for name in ("model.safetensors", "options.json"):
        yield Kind(exported / name, lambda: lasting(checkpoints.load(exported)), name != "options.json")
    for name in ("summary_statistics.csv", "test_summary.json", "diagnostics.jsonl", "confusion_toy_1shot.csv"):
        yield Kind(logs / name, lambda: shown(run), False)
    yield Kind(logs / "options.json", lambda: shown(run), False)
    yield Kind(run / "visual_outputs" / "sample_episode_toy.npz", lambda: shown(run))
    for name in ("summary_statistics.csv", "test_summary.json", "environment.json", "options.json"):
        yield Kind(logs / name, lambda: collect([work / "experiments"]), False)
    yield Kind(logs / "environment.json", lambda: read_environments(logs / "environment.json"), False)
    yield Kind(logs / "options.json", lambda: read_json(logs / "options.json"), False)
    for suffix in ("npy", "json"):
        yield Kind(datasets / ".cache" / "toy" / f"train_3x8x8.{suffix}", lambda: pixels(datasets))
    for name in ("toy.zip", "toy.tar.gz"):
        archive = work / "archives" / name.replace(".", "_") / name
        archive.parent.mkdir(parents=True)
        pack(archive, {f"{split}/{split}/{i}.png": png(i) for split in staging.SPLITS for i in range(4)})
        yield Kind(archive, partial(prepared, archive.parent))
    made = prepare("toy", archive.parent)
    yield Kind(made / staging.CONTENTS_FILE, lambda: staging.check_complete(made), False)


def shown(run: Path) -> object:
    found = read_run(run)
    return write_report(found), repr(found)


def pixels(datasets: Path) -> object:
    split = open_split(datasets, "toy", "train", SHAPE)
    return split.images.tobytes(), split.class_names, split.class_sizes.tolist()


def prepared(folder: Path) -> object:
    shutil.rmtree(folder / "toy", ignore_errors=True)
    return contents(prepare("toy", folder))


class Heard(logging.Handler):
    """This handler notes whether there was a warning."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def spoilt(whole: bytes, rng: random.Random, tries: int) -> Iterator[tuple[str, bytes]]:
    """Yield what was done to a file and what it holds then."""
    yield from FOREIGN.items()
    for _ in range(tries):
        length = rng.randrange(1, len(whole))
        if whole[length - 1 : length] != b"\n":  # after fewer lines a log is one of a run that has come less far
            yield f"cut to {length} of {len(whole)} bytes", whole[:length]
        place, bit = rng.randrange(len(whole)), rng.randrange(8)
        flipped = whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :]
        yield f"bit {bit} of byte {place} flipped", flipped


def use(kind: Kind, expected: object, is_cut: bool = False) -> str:
    """Read a spoilt file; return what is wrong with how that ends, "" if it is refused, healed or without effect."""
    heard = Heard()
    logging.getLogger().addHandler(heard)
    try:
        found = kind.read()
    except UserError as error:
        names = (str(kind.path), str(kind.path.parent), f"{kind.path.name}: ")  # a data set has its own name
        is_named = any(name in str(error) for name in names)
        return "" if is_named and "\n" not in str(error) else f"not a line that names the file: {error}"
    except Exception as error:
        return f"a traceback: {error!r}"
    finally:
        logging.getLogger().removeHandler(heard)
    return "" if found == expected or heard.texts or not (kind.is_summed or is_cut) else "used without a word"


def harmful(folder: Path) -> Iterator[tuple[str, Kind]]:
    """Yield files made to do harm; reading one has to raise UserError, and must not make FOLDER/ran."""
    state = {"network": {"w": torch.zeros(3)}}
    code = {"network": Runs(folder / "ran")}
    load = Kind(folder / "file", partial(checkpoints.load, folder / "file"))

    def saved(held: object, **more: Any) -> Kind:
        torch.save(held, folder / "file", **more)
        return load

    yield "a checkpoint with code", saved(code)
    yield "an old checkpoint with code", saved(code, _use_new_zipfile_serialization=False)
    (folder / "file").write_bytes(pickle.dumps(code, protocol=2))
    yield "a pickle with code", load
    yield "a checkpoint of a huge tensor", saved({"network": {"w": torch.zeros(1).expand(10**6, 10**6)}})
    saved(state)
    with zipfile.ZipFile(folder / "file", "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("file/data/1", bytes(2**28))
    yield "a checkpoint that unpacks to far more", load
    for name, held in FOREIGN_STATES.items():
        yield f"a checkpoint with {name}", saved(state | held)
    for name, members in archives().items():
        yield f"an archive with {name}", Kind(folder / "toy", partial(prepared_of, folder, members))


class Runs:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


FOREIGN_STATES: dict[str, dict[str, object]] = {
    "a number for weights": {"network": 5},
    "texts for weights": {"network": {"w": "x"}},
    "numbers for names": {"network": {1: torch.zeros(1)}},
    "a text for options": {"options": "x"},
    "a list for options": {"options": [1]},
    "a number for history": {"history": 3},
    "texts for epochs": {"history": ["x"]},
    "epochs without numbers": {"history": [{}]},
    "a text for iterations": {"iterations_done": "x"},
    "a list for sums": {"sums": [1]},
    "an empty optimiser": {"optimizer": {}},
    "a text for the normalisation": {"normalization": "x"},
    "a number for the form": {"form": 3},
    "a list for images": {"images": [1]},
}


def archives() -> dict[str, dict[str, bytes]]:
    """Return the members of harmful zip files."""
    bomb = BytesIO()
    Image.new("1", (15_000, 15_000)).save(bomb, "PNG", compress_level=1)
    return {
        "a name that leads out": {"../../train/a/0.png": png(0)},
        "an absolute name": {"/train/a/0.png": png(0)},
        "an image of 225 million pixels": {"train/a/0.png": bomb.getvalue()},
        "a web page for an image": {"train/a/0.png": FOREIGN["a web page"]},
        "far more than it takes": {f"train/a/{k}.png": bytes(2**25) for k in range(4)},
    }


def prepared_of(folder: Path, members: dict[str, bytes]) -> object:
    """Make a data set of a zip file with these members."""
    with zipfile.ZipFile(folder / "toy.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return prepared(folder)
