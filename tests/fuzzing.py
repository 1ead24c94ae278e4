"""Give odd inputs to everything that reads what users write. Nothing may end in a traceback or start on nonsense.

python -m tests.fuzzing --examples 2000 --seed 0

The inputs are drawn by hypothesis: command lines of all programs and JSON files of options, and a tenth as many images,
archives, pickles and checkpoints each. They go to the programs' own entries, in this process. Training stops where its
first iteration would begin; there the options, the model and the first batch are checked. Printed are the numbers of
inputs by kind and outcome, and each failure once; the exit status is 1 if there is any.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import pickle
import re
import shlex
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

import few_shot_learning_system
import learner
import predict
import test as test_entry
import train_maml_system
from experiment_builder import Experiment
from few_shot_learning_system import build_learner
from learner import FewShotLearner
from preprocess import preprocess, staging
from preprocess.pickles import loads
from preprocess.writing import why_unreadable
from tests import made_archives, made_models, made_runs
from utils import compare, entry, export, results
from utils.errors import UserError
from utils.image_cache import open_split
from utils.names import can_name_a_file
from utils.options import ALIASES, all_defaults, declaration, parse_args
from utils.synthetic import write_dataset

ACCEPTED, REFUSED = "accepted", "refused"
MOST_LINES, MOST_CHARACTERS = 8, 2500  # of an error message, without the long words that it quotes
Entry = Callable[[Sequence[str]], object]


class Started(Exception):
    """A training is about to make its first iteration."""


# --- what has to hold ----------------------------------------------------------------------------------------------


def outcome_of(main: Callable[[], object]) -> str:
    """Return how a program ended; AssertionError if its message is not a few lines. Other exceptions pass."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            status = entry.run(main)
        except Started:
            return ACCEPTED
        except SystemExit as stop:  # of argparse
            status = int(stop.code or 0)
    message = errors.getvalue()
    assert status in (0, 2), f"exit status {status}: {message}"
    if status == 0:
        return ACCEPTED
    own = re.sub(r"\S{200,}", "", message)
    assert own.strip() and own.count("\n") <= MOST_LINES and len(own) <= MOST_CHARACTERS, message
    return REFUSED


def check_start(model: FewShotLearner, first_batch: Callable[[], Any]) -> bool:
    """Take the place of `choose_form`, which is called before the first iteration: check what training starts with."""
    options = model.options
    for name, value in dataclasses.asdict(options).items():
        assert not isinstance(value, float) or (math.isfinite(value) and value >= 0), name
        assert not isinstance(value, str) or can_name_a_file(value), name
    assert min(*options.training_task[1:], options.evaluation_task[1]) >= 1
    assert min(options.num_classes_per_set, options.evaluation_task[0]) >= 2
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    if options.batch_size <= 16:
        tasks = model._to_device(first_batch())
        assert len(tasks.x_support) == options.batch_size and tasks.x_support.isfinite().all()
    raise Started


def nothing_but(folder: Path, *names: str) -> None:
    """Raise AssertionError if there is anything else in a folder, hidden or not."""
    others = sorted(path.name for path in folder.iterdir() if path.name not in names)
    assert not others, f"left behind: {others}"


# --- the place where programs run ----------------------------------------------------------------------------------

RUN, OTHER, EXPORTED, OPTIONS_FILE = "run", "other_run", "exported", "options.json"
UNTOUCHED = Path("..", "untouched")  # copies of what a program may change
BEST = f"{RUN}/saved_models/best"
COMMON = shlex.split(
    "--dataset_dir datasets --dataset_name toy --num_classes_per_set 3 --num_samples_per_class 1 --batch_size 2 "
    "--num_target_samples 2 --num_evaluation_tasks 2 --gpu cpu --num_dataprovider_workers 1 --normalization unit"
)
GRADIENT = [*COMMON, *shlex.split("--image_height 8 --image_width 8 --num_stages 1 --cnn_num_filters 2")]
CONTEXT = ["--contextual_grad", "--num_context_params", "2"]
HEAD = [*COMMON, *shlex.split("--head Ridge --image_height 16 --image_width 16 --val_shot 1 --val_query 2")]


def furnish() -> None:
    """Write a data set, a run with a checkpoint, an exported model and a file of options to the present folder."""
    write_dataset(Path("datasets") / "toy", classes=4, images=6)
    options = parse_args([*GRADIENT, *CONTEXT])
    for run in (made_runs.write_run(Path(OTHER)), made_runs.write_run(Path(RUN))):
        made_runs.write_options(run, **dataclasses.asdict(options))
        made_runs.write_results(run, made_runs.result("toy", 0.5))
    row = dict(zip(made_runs.CSV_HEADER.split(","), (float(x) for x in made_runs.ROWS[0].split(",")), strict=True))
    state = {"options": dataclasses.asdict(options), "normalization": None, "history": [row], "sums": {}}
    model = build_learner("cpu", options)
    model.iterations_done = int(row["iterations"])
    model.save_model(run / "saved_models" / "best", state)
    export.export(run, Path(EXPORTED))
    Path(OPTIONS_FILE).write_text(json.dumps({"batch_size": 3, "second_order": "False"}))
    for made in (RUN, OTHER, EXPORTED):
        shutil.copytree(made, UNTOUCHED / made)
    made_models.write_classes(Path("support"), 2, 2)
    made_models.write_classes(Path("query"), 1, 1, seed=6)


def tidy_up() -> None:
    """Undo what earlier inputs did to the run and the exported model, and remove what they made."""
    for made in (RUN, OTHER, EXPORTED, "out", "predictions", "new", "datasets/new"):
        shutil.rmtree(made, ignore_errors=True)
        if (UNTOUCHED / made).is_dir():
            shutil.copytree(UNTOUCHED / made, made)


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """Inside, the present folder is a new one that `furnish` filled.

    No program trains, fetches archives, edits the project's documents or starts processes there.
    """
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="fuzzing_") as name, contextlib.ExitStack() as stack:
        folder = Path(name, "as", "deep", "as", "drawn", "paths", "go", "up")
        folder.mkdir(parents=True)
        os.chdir(folder)
        stack.callback(os.chdir, before)
        furnish()
        stack.enter_context(warnings.catch_warnings(action="ignore"))  # Pillow's, of damaged images
        for owner in (learner.FewShotLearner, few_shot_learning_system.MAMLFewShotClassifier):
            stack.enter_context(mock.patch.object(owner, "choose_form", check_start))
        stack.enter_context(mock.patch.object(train_maml_system.distributed, "launch", side_effect=Started))
        stack.enter_context(mock.patch.object(Experiment, "_train_epoch", side_effect=Started))
        stack.enter_context(mock.patch.object(results, "keep", side_effect=Started))
        stack.enter_context(mock.patch.object(preprocess.fetching, "fetch", side_effect=Started))
        yield folder


# --- words ---------------------------------------------------------------------------------------------------------

NUMBERS = ["nan", "-inf", "inf", "1e400", "-1", "0", "0.5", "1e9", "1e-300", "999999999", "9" * 300, "9" * 5000, "-0"]
NUMBERS += ["²", "٣", "1_0", "0x10", "1,1", "1,²", "-", "3-", "1-2-3-4", "5-5-5-" + "9" * 5000]
TEXTS = [
    "",
    " ",
    "None",
    "null",
    "true",
    "yes",
    "💥",
    "a\nb",
    "\x1b[31m",
    "x" * 300,
    "x" * 5000,
    "\udcff",
    "%s",
    "a" * 30,
]
PATHS = ["absent", "toy", "datasets", "datasets/toy", BEST, RUN, EXPORTED, OPTIONS_FILE, "support", "query", ".", ".."]
PATHS += [
    "/dev/null/x",
    "/proc/x",
    "x" * 300 + "/y",
    "query/class_0/0.png",
    "out",
    "datasets/toy/train",
    "query/class_0",
]
text = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), max_size=8)
odd_words = st.sampled_from([*NUMBERS, *TEXTS, *PATHS]) | text
USUAL = {  # of the options that are text without choices
    **{"dataset_name": "toy", "dataset_dir": "datasets", "test_datasets": "toy", "test_shots": "1,2", "gpu": "cpu"},
    **{"resnet_widths": "2-3-4-5", "continue_from_epoch": "latest", "name_of_args_json_file": OPTIONS_FILE},
}


def usual_values(option: str) -> st.SearchStrategy[Any]:
    """Return values that the option takes, whether or not the others go with them."""
    declared, default = declaration(option), all_defaults()[option]
    if declared.choices:
        return st.sampled_from([*declared.choices, *declared.aliases])
    if isinstance(default, bool) or option == "rotate_classes":
        return st.booleans()
    if option in USUAL or isinstance(default, str):
        return st.just(USUAL.get(option, "x"))
    low = declared.at_least or 0
    if isinstance(default, float) or option.endswith("_reg"):
        return st.floats(low, low + 1)
    return st.integers(int(low), int(low) + 4) if low or default is not None else st.just("None")


def misspelt(name: str) -> st.SearchStrategy[str]:
    ways = [name.upper(), name[:-1], f"{name}s", name.replace("_", "-"), name.replace("_", ""), name[::-1], f"-{name}"]
    return st.sampled_from(ways)


def words_of(flags: Mapping[str, st.SearchStrategy[Any]], most: int = 4) -> st.SearchStrategy[list[str]]:
    """Return words of a command line: mostly flags with values that they take, and all that may be wrong."""
    names = st.sampled_from(list(flags))
    good = names.flatmap(lambda name: st.tuples(st.just(f"--{name}"), flags[name].map(str)))
    bad = st.one_of(
        st.tuples(names.map("--{}".format), odd_words),
        st.builds("--{}={}".format, names, odd_words).map(lambda word: (word,)),
        st.tuples(names.flatmap(misspelt).map("--{}".format), odd_words),
        st.tuples(names.map("--{}".format)),
        st.tuples(odd_words.filter(lambda word: word not in ("-h",))),
    )
    return st.lists(st.integers(0, 3).flatmap(lambda n: good if n else bad), max_size=most).map(
        lambda pieces: [word for piece in pieces for word in piece]
    )


# --- command lines -------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    program: str
    words: list[str]


ENTRIES: dict[str, Entry] = {
    "train_maml_system.py": train_maml_system.main,
    "test.py": test_entry.main,
    "predict.py": predict.main,
    "utils.results": results.main,
    "utils.compare": compare.main,
    "utils.export": export.main,
    "preprocess.py": preprocess.main,
}


def command_lines() -> st.SearchStrategy[Line]:
    options = {name: usual_values(name) for name in all_defaults()}
    training = options | {alias: options[name] for alias, name in ALIASES.items()}
    paths = st.sampled_from(PATHS)
    files = st.sampled_from([BEST, EXPORTED, *PATHS])
    shares = st.sampled_from(["0.5 0.25 0.25", "nan nan nan", "1 0 0", "-1 1 1", "inf 0 0", "0.3 0.3"]).map(str)
    programs = {
        "train_maml_system.py": (st.sampled_from([GRADIENT, HEAD]), training, 10),
        "test.py": (
            st.just(["--load", BEST, "--episode", "2", "--query", "2", "--dataset_dir", "datasets", "--gpu", "cpu"]),
            {flag: options[name] for flag, name in test_entry.FLAGS.items()} | {"load": files},
            4,
        ),
        "predict.py": (
            st.just(["--load", BEST, "--support", "support", "--query", "query", "--gpu", "cpu"]),
            {"load": files, "support": paths, "query": paths, "out": paths, "gpu": st.just("cpu")},
            2,
        ),
        "utils.results": (st.just([]), {"docs": st.just("")}, 1),
        "utils.compare": (
            st.sampled_from([[RUN, OTHER], [RUN], [RUN], []]),
            {"to": st.sampled_from(["page.html", "page.txt", "run/logs"])},
            1,
        ),
        "utils.export": (st.sampled_from([[RUN, EXPORTED], []]), {}, 1),
        "preprocess.py": (
            st.sampled_from([["--dataset_dir", "datasets"], []]),
            {
                "datasets": st.sampled_from(["toy", "new", "CUB", "../up", ".hidden", "omniglot"]),
                "from_folder": paths,
                "split": shares,
                "csv": paths,
                "seed": st.integers(-1, 3),
                "dataset_dir": paths,
                "download": st.just(""),
            },
            3,
        ),
    }

    def of(program: str) -> st.SearchStrategy[Line]:
        base, flags, _ = programs[program]
        flags = flags or {"help": st.just("")}
        drawn = words_of(flags) if program != "preprocess.py" else words_of(flags).map(split_shares)
        return st.builds(lambda first, more: Line(program, [*first, *more]), base, drawn)

    weighted = [program for program, (_, _, weight) in programs.items() for _ in range(weight)]
    return st.sampled_from(weighted).flatmap(of)


def split_shares(words: list[str]) -> list[str]:
    """Return the words with those of --split apart, as a shell passes them."""
    return [part for word in words for part in (word.split(" ") if word[:1].isdigit() or "nan" in word else [word])]


def run_line(line: Line) -> str:
    tidy_up()
    return outcome_of(lambda: ENTRIES[line.program](line.words))


# --- JSON files ----------------------------------------------------------------------------------------------------

ODD_VALUES: list[Any] = [
    math.nan,
    math.inf,
    10**400,
    -(10**19),
    1e-320,
    True,
    None,
    [],
    {},
    [1],
    {"a": 1},
    "a\0b",
    "\ud800",
]
RAW = [
    b"",
    b"null",
    b"[1]",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"batch_size": 2, "batch_size": 3}',
    b'{"batch_size": 1e999}',
    b'{"batch_size": ' + b"9" * 5000 + b"}",
    b'{"seed": -0}',
    b"\xff\xfe{\x00}\x00",
    b'\xef\xbb\xbf{"batch_size": 2}',
    b'{"experiment_name": "\xe9"}',
    b'{"batch_size": 2',
    b'{"batch_size": 2} {}',
    b'{"dataset_name": "\x00"}',
]


def json_files() -> st.SearchStrategy[bytes]:
    """Return contents of a file of options."""
    names = st.sampled_from([*all_defaults(), *ALIASES])
    usual = names.flatmap(lambda name: st.tuples(st.just(name), usual_values(ALIASES.get(name, name))))
    as_text = usual.map(lambda pair: (pair[0], str(pair[1])))
    odd = st.tuples(names, st.sampled_from(ODD_VALUES) | odd_words)
    foreign = st.tuples(text, st.recursive(st.none() | st.booleans() | st.floats() | text, st.lists, max_leaves=4))
    kinds = st.sampled_from([usual, usual, as_text, odd, foreign]).flatmap(lambda pairs: pairs)
    whole = st.lists(kinds, max_size=4).map(lambda pairs: json.dumps(dict(pairs)).encode())
    return st.one_of(whole, whole, whole, st.sampled_from(RAW), mutated(whole))


def run_json(content: bytes) -> str:
    Path("drawn.json").write_bytes(content)
    # What the file says has to count, so only what keeps a run small is on the command line.
    words = [*GRADIENT, "--name_of_args_json_file", "drawn.json"]
    return outcome_of(lambda: train_maml_system.main(words))


# --- bytes ---------------------------------------------------------------------------------------------------------


def mutated(contents: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Return contents with some bytes changed, put in or left out, or cut off."""
    place = st.floats(0, 1, exclude_max=True)
    change = st.tuples(place, st.sampled_from(("flip", "insert", "delete", "cut", "zeros")), st.integers(0, 255))
    return st.builds(with_changes, contents, st.lists(change, min_size=1, max_size=4))


def with_changes(content: bytes, changes: Sequence[tuple[float, str, int]]) -> bytes:
    data = bytearray(content)
    for place, kind, value in changes:
        at = int(place * len(data))
        if kind == "flip" and data:
            data[at] ^= value or 1
        elif kind == "insert":
            data[at:at] = bytes([value]) * (value % 9 + 1)
        elif kind == "delete":
            del data[at : at + value]
        elif kind == "zeros":
            data[at : at + value] = bytes(len(data[at : at + value]))
        elif kind == "cut":
            del data[at:]
    return bytes(data)


def perhaps_mutated(contents: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return st.one_of(contents, mutated(contents))


# --- images --------------------------------------------------------------------------------------------------------

MODES = (
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "I;16",
    "F",
)
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "MPO", "ICO", "TGA", "PDF")
SIZES = ((1, 1), (1, 500), (500, 1), (7, 3), (64, 64), (2, 2))


class Picture(NamedTuple):
    name: str
    content: bytes
    channels: int


@st.composite
def pictures(draw: st.DrawFn) -> Picture:
    mode, kind, size = draw(st.sampled_from(MODES)), draw(st.sampled_from(FORMATS)), draw(st.sampled_from(SIZES))
    image = Image.new(mode, size)
    with contextlib.suppress(ValueError):  # modes without a raw form of their own
        noise = np.random.default_rng(draw(st.integers(0, 99))).bytes(8 * math.prod(size))
        image = Image.frombytes(mode, size, noise[: len(image.tobytes())])
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        options["transparency"] = draw(st.sampled_from((0, 5, b"\0\x80\xff", (1, 2, 3))))
    if draw(st.booleans()):
        exif = Image.Exif()
        exif[0x0112] = draw(st.sampled_from((0, 1, 3, 6, 8, 77)))  # which side is up
        options["exif"] = exif
    if kind in ("GIF", "PNG", "TIFF", "WEBP") and draw(st.booleans()):
        options |= {"save_all": True, "append_images": [image.copy()]}
    out = io.BytesIO()
    try:
        image.save(out, kind, **options)
    except Exception:  # Pillow has many reasons not to write an image
        assume(False)
    suffix = draw(st.sampled_from((f".{kind.lower()}", ".png", ".JPG", "", ".dat")))
    return Picture(f"drawn{suffix}", draw(perhaps_mutated(st.just(out.getvalue()))), draw(st.sampled_from((1, 3))))


def run_picture(picture: Picture) -> str:
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name, "images", "train", "a")
        folder.mkdir(parents=True)
        (folder / picture.name).write_bytes(picture.content)
        reason = why_unreadable(picture.content)
        try:
            split = open_split(Path(name), "images", "train", (picture.channels, 8, 6), workers=1)
        except UserError as error:
            assert picture.name in str(error), f"the file is not named: {error}"
            assert reason, f"preprocessing takes what training refuses: {error}"
            return REFUSED
        assert split.images.shape == (1, 8, 6, picture.channels) and np.isfinite([*split.mean, *split.std]).all()
        return ACCEPTED


# --- archives ------------------------------------------------------------------------------------------------------


class Archive(NamedTuple):
    files: dict[str, bytes]  # name -> content, in the folder of archives
    dataset: str


class Harmful:
    """Read by Python's own unpickler, this makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mknod, ("harm",)


@st.composite
def archives(draw: st.DrawFn) -> Archive:
    """Draw a zip or tar of class folders, or MetaOptNet's pickles, as they are or with some bytes changed."""
    if draw(st.booleans()):
        return Archive(draw(pickled_sets()), "CIFAR_FS")
    usual = st.builds("{}/{}.png".format, st.sampled_from(("train/a", "train/b", "val/c", "test/d")), st.integers(0, 3))
    odd = st.sampled_from(("../up.png", "/abs.png", "train/../../x/y.png", f"train/a/{'n' * 300}.png", "C:\\x.png"))
    names, contents = usual, st.integers(0, 3).map(made_archives.png)
    if draw(st.booleans()):
        names, contents = st.one_of(usual, odd, text.filter(bool)), st.one_of(contents, st.binary(max_size=9))
    chosen = draw(st.lists(names, min_size=1, max_size=8, unique=True))
    suffix = draw(st.sampled_from((".zip", *made_archives.TAR_MODES)))
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = made_archives.pack(Path(folder, f"drawn{suffix}"), {name: draw(contents) for name in chosen})
        return Archive({path.name: draw(perhaps_mutated(st.just(path.read_bytes())))}, "drawn")


@st.composite
def pickled_sets(draw: st.DrawFn) -> dict[str, bytes]:
    rng, protocol = np.random.default_rng(draw(st.integers(0, 9))), draw(st.integers(0, 4))
    files = {}
    for i, split in enumerate(("train", "val", "test")):
        held: dict[str, Any] = {
            "data": rng.integers(0, 256, (6, 32, 32, 3), np.uint8),
            "labels": [3 * i, 3 * i + 1] * 3,
        }
        files[f"CIFAR_FS_{split}.pickle"] = pickle.dumps(held, protocol)
    spoilt = draw(st.sampled_from(list(files)))
    junk = st.recursive(st.none() | st.integers() | text | st.binary(max_size=9), st.lists, max_leaves=5)
    odd = st.one_of(st.just(Harmful()), junk, st.fixed_dictionaries({"data": junk, "labels": junk}))
    other = odd.map(lambda value: pickle.dumps(value, protocol))
    files[spoilt] = draw(st.one_of(st.just(files[spoilt]), mutated(st.just(files[spoilt])), other, mutated(other)))
    return files


def run_archive(archive: Archive) -> str:
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name, "datasets")
        folder.mkdir()
        for file, content in archive.files.items():
            (folder / file).write_bytes(content)
            if file.endswith(".pickle"):
                with contextlib.suppress(UserError):
                    loads(content, file)
        words = ["--datasets", archive.dataset, "--dataset_dir", str(folder)]
        found = outcome_of(lambda: exit_with(preprocess.main(words)))
        nothing_but(Path(name), "datasets")
        nothing_but(folder, *archive.files, *([archive.dataset] if found == ACCEPTED else []))
        if found == ACCEPTED:
            staging.check_complete(folder / archive.dataset)
            nothing_but(folder / archive.dataset, *staging.SPLITS, staging.CONTENTS_FILE)
        assert not Path("harm").exists(), "code in a pickle was run"
        return found


def exit_with(status: int) -> None:
    """End as the program of a `main` that returns its exit status does."""
    raise SystemExit(status)


# --- checkpoints ---------------------------------------------------------------------------------------------------


@st.composite
def checkpoint_files(draw: st.DrawFn) -> bytes:
    """Draw a checkpoint with some of its values or bytes changed, in torch's present and in its earlier form."""
    state = torch.load(UNTOUCHED / BEST, weights_only=True)
    keys = st.sampled_from([*state])
    junk = st.sampled_from(
        [None, 3, "x", [], [1, 2], {}, {"a": 1}, {1: torch.zeros(2)}, torch.zeros(3), (1.0, "y"), math.nan]
    )
    for key in draw(st.lists(keys, max_size=2)):
        if isinstance(state.get(key), dict) and state[key] and draw(st.booleans()):
            inner = draw(st.sampled_from([*state[key]]))
            state[key] = state[key] | {inner: draw(junk)}
        elif draw(st.booleans()):
            state[key] = draw(junk)
        else:
            state.pop(key, None)
    out = io.BytesIO()
    torch.save(state, out, _use_new_zipfile_serialization=draw(st.booleans()))
    return draw(perhaps_mutated(st.just(out.getvalue())))


class Checkpoint(NamedTuple):
    program: str
    content: bytes


def checkpoints_for_programs() -> st.SearchStrategy[Checkpoint]:
    return st.builds(Checkpoint, st.sampled_from(("train_maml_system.py", "test.py", "predict.py")), checkpoint_files())


def run_checkpoint(checkpoint: Checkpoint) -> str:
    """Train on from a checkpoint, test it or predict with it."""
    folder = Path("drawn_run")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "latest").write_bytes(checkpoint.content)
    load = ["--load", str(folder / "latest"), "--gpu", "cpu"]
    words = {
        "train_maml_system.py": [*GRADIENT, *CONTEXT, "--save_path", str(folder)],
        "test.py": [*load, "--episode", "2", "--query", "2", "--dataset_dir", "datasets", "--dataset", "toy"],
        "predict.py": [*load, "--support", "support", "--query", "query", "--out", str(folder / "out")],
    }
    return outcome_of(lambda: ENTRIES[checkpoint.program](words[checkpoint.program]))


# --- files of runs and of exported models --------------------------------------------------------------------------

READERS = {  # by a file, those that read it
    f"{RUN}/logs/options.json": (["utils.compare", RUN, OTHER], ["utils.results", RUN]),
    f"{RUN}/logs/summary_statistics.csv": (["utils.compare", RUN, OTHER], ["utils.results", RUN]),
    f"{RUN}/logs/test_summary.json": (
        ["utils.compare", RUN, OTHER],
        ["utils.results", RUN],
        ["utils.export", RUN, EXPORTED],
    ),
    f"{EXPORTED}/options.json": (
        ["test.py", "--load", EXPORTED, "--episode", "2", "--dataset_dir", "datasets", "--gpu", "cpu"],
        ["utils.export", RUN, EXPORTED],
    ),
    f"{EXPORTED}/model.safetensors": (["test.py", "--load", EXPORTED], ["utils.export", RUN, EXPORTED]),
}


class Spoilt(NamedTuple):
    program: str
    words: list[str]
    file: str
    content: bytes


@st.composite
def spoilt_files(draw: st.DrawFn) -> Spoilt:
    """Draw a file, mostly with bytes or a value changed, and a program that reads it."""
    file = draw(st.sampled_from(list(READERS)))
    program, *words = draw(st.sampled_from(READERS[file]))
    content = (UNTOUCHED / file).read_bytes()
    if file.endswith(".json") and draw(st.booleans()):
        held: Any = json.loads(content)
        row = held[0] if isinstance(held, list) else held
        inner = draw(st.sampled_from([row, *(value for value in row.values() if isinstance(value, dict) and value)]))
        inner[draw(st.sampled_from(list(inner)))] = draw(st.sampled_from(ODD_VALUES))
        return Spoilt(program, words, file, json.dumps(held).encode())
    return Spoilt(program, words, file, draw(st.one_of(perhaps_mutated(st.just(content)), st.sampled_from(RAW))))


def run_spoilt(spoilt: Spoilt) -> str:
    tidy_up()
    Path(spoilt.file).write_bytes(spoilt.content)
    return outcome_of(lambda: ENTRIES[spoilt.program](spoilt.words))


# --- all of them ---------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    inputs: Callable[[], st.SearchStrategy[Any]]
    run: Callable[[Any], str]
    share: float  # of --examples


KINDS = {
    "command lines": Kind(command_lines, run_line, 0.6),
    "JSON files": Kind(json_files, run_json, 0.4),
    "images": Kind(pictures, run_picture, 0.1),
    "archives": Kind(archives, run_archive, 0.1),
    "checkpoints": Kind(checkpoints_for_programs, run_checkpoint, 0.1),
    "files of runs": Kind(spoilt_files, run_spoilt, 0.1),
}


class Tally(NamedTuple):
    """The tally holds what came of all inputs."""

    counts: Counter[tuple[str, str]]  # by kind, and by program where it has several; and outcome
    failures: dict[str, str]  # where it happened -> the first input and the traceback


def fuzz(examples: int, start: int, kinds: Sequence[str] = tuple(KINDS)) -> Tally:
    """Draw so many command lines and JSON files, and in proportion the other kinds, and return what came of them."""
    tally = Tally(Counter(), {})
    with workplace():
        for name in kinds:
            attempt(name, max(1, round(KINDS[name].share * examples)), start, tally)
    return tally


def attempt(name: str, examples: int, start: int, tally: Tally) -> None:
    kind = KINDS[name]
    usual = settings(max_examples=examples, deadline=None, database=None, phases=(Phase.generate,))

    @seed(start)
    @settings(usual, suppress_health_check=list(HealthCheck))
    @given(kind.inputs())
    def each(drawn: Any) -> None:
        of = f"{name}, {drawn.program}" if hasattr(drawn, "program") else name
        try:
            tally.counts[of, kind.run(drawn)] += 1
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{of}: {type(error).__name__} in {frame.filename}:{frame.lineno}: {str(error)[:60]}"
            tally.counts[of, "failed"] += 1
            tally.failures.setdefault(where, f"{of}: {drawn!r:.1500}\n{traceback.format_exc():.6000}")

    each()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=2000, help="command lines and JSON files together [2000]")
    parser.add_argument("--seed", type=int, default=0, help="another one draws other inputs [0]")
    asked = parser.parse_args(argv)
    tally = fuzz(asked.examples, asked.seed)
    for (kind, found), count in sorted(tally.counts.items()):
        print(f"{count:6,} {kind}: {found}")
    print(f"{sum(tally.counts.values()):6,} inputs, {len(tally.failures)} different failures")
    for where, failure in tally.failures.items():
        print(f"\n{where}\n{failure}")
    return bool(tally.failures)


if __name__ == "__main__":
    sys.exit(main())
