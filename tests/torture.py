"""Tries to break the program, and counts how often that succeeds: make torture

python -m tests.torture --seed 7                 the moments and places are drawn anew from each seed
python -m tests.torture --only kills disks       some sections
python -m tests.torture --short                  as in `make test`

Everything is real, and small: commands in processes of their own, a file system that is full, damaged files. A section
prints how many things it tried and how many of these ended as they should. The exit status is 1 if any did not.
"""

import argparse
import logging
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np

import utils.images
from tests.forked import Command, Operations, die, halt, until
from tests.made_archives import png
from tests.torture_damage import harmful, kinds, spoilt, use
from tests.torture_lab import Lab, Stage, contents, differences, experiment

Problems = Iterator[str]  # one for each thing tried; "" where it ended as it should


def kills(lab: Lab) -> Problems:
    """A command that is killed at any moment and given again ends as if nothing had happened."""
    for number in range(len(lab.stages) if lab.short else 30):
        stage = lab.stages[number % len(lab.stages)]
        what = f"{stage.name}, {killed(lab, stage)}"
        yield given_again(lab, stage, what)


def killed(lab: Lab, stage: Stage) -> str:
    """Start a stage, kill it at a random moment before its end, and say when that was."""
    whole = lab.whole(stage)
    while True:
        lab.reset(stage)
        if lab.rng.random() < 0.5 or stage.name == "checkpoint writing":
            operation = lab.rng.randint(1, whole.operations)
            what = f"killed at file operation {operation} of {whole.operations}"
            command = lab.start(stage, Operations(lab.work).at(operation, die))
        else:
            delay = lab.rng.uniform(0, whole.seconds)
            what = f"killed after {delay:.3f} of {whole.seconds:.3f} s"
            command = lab.start(stage)
            command.ends_within(delay)
            command.kill()
        if command.wait() == -signal.SIGKILL:  # else it was faster than the first time
            return what


def disks(lab: Lab) -> Problems:
    """A disk that becomes full at any moment, or is read-only, is one line that names it; nothing is lost by it."""
    whole = {stage: lab.whole(stage) for stage in lab.stages}
    with small_disk(lab.work):
        for stage in lab.stages if lab.short else 4 * lab.stages:
            lab.reset(stage)
            before, operations = contents(lab.work), Operations(lab.work)
            moment = lab.rng.randint(1, whole[stage].operations)
            what = f"{stage.name}, disk full from file operation {moment} of {whole[stage].operations} on"
            run = lab.start(stage, operations.at(moment, partial(fill, lab.work)))
            problem = "" if run.wait() == 0 else not_one_line(run, lab.work)
            lost = before.keys() - contents(lab.work).keys()  # damaged checkpoints and logs are errors of `contents`
            (lab.work / FILLER).unlink(missing_ok=True)
            if problem or lost:
                yield f"{what}: {problem or f'lost {lost}'}"
            else:
                yield given_again(lab, stage, what)
        for stage in lab.stages[:: 3 if lab.short else 1]:
            lab.reset(stage)
            run, what = lab.start(stage, print_to_a_full_disk), f"{stage.name}, what it prints on a full disk"
            problem = not_one_line(run, "what is printed") if run.wait() else ""
            yield f"{what}: {problem}" if problem else given_again(lab, stage, what)
            lab.reset(stage)
            before = contents(lab.work)
            with read_only(lab.work):
                run = lab.start(stage, lambda: os.environ.update(XDG_CACHE_HOME=str(lab.folder / "own")))
                status = run.wait()
            problem = not_one_line(run, lab.work) if status != 0 else ""
            if status == 0 and stage.name != "cache building":  # which takes the user's own folder then
                problem = "nothing was said"
            what = f"{stage.name} on a read-only disk"
            yield f"{what}: {problem}" if problem else differences(what, before, contents(lab.work))


def runs(lab: Lab) -> Problems:
    """A second run in a folder is refused and told of the first; what may go on at once does."""
    training = lab.stage("training")
    whole = lab.whole(training)
    for end in (signal.SIGCONT, signal.SIGKILL):
        lab.reset(training)
        operations, middle = Operations(lab.work), whole.operations // 2
        first = lab.start(training, operations.at(middle, halt))
        first.halts()
        second = lab.start(training, name="second")
        problem = not_one_line(second, lab.work) if second.wait() else "the second run was not refused"
        if not problem and not re.search(
            rf"process {first.pid} on {platform.node()} \(since \d{{4}}-", second.printed()
        ):
            problem = f"the first run is not named: {second.printed()}"
        os.kill(first.pid, end)
        if end == signal.SIGCONT and first.wait():
            problem = f"the first run was disturbed: {first.printed()}"
        first.wait()
        what = "two trainings in one folder" + (", the first killed" if end == signal.SIGKILL else "")
        yield f"{what}: {problem}" if problem else given_again(lab, training, what)
    for name in ("preprocessing", "cache building", "testing", "export", "results table"):
        stage = lab.stage(name)
        expected = lab.whole(stage).contents
        lab.reset(stage)
        both = [lab.start(stage, name=name) for name in ("first", "second")]
        failed = [run.printed() for run in both if run.wait()]
        what = f"{stage.name}, twice at once"
        yield f"{what}: {failed[0]}" if failed else differences(what, expected, contents(lab.work))


def damage(lab: Lab) -> Problems:
    """A file that is cut, flipped, of another kind or made to do harm is refused in one line, or made anew."""
    export = lab.stage("export")
    lab.whole(export)
    lab.reset(export)
    lab.start(export).wait()
    for kind in kinds(lab.work):
        expected, whole = kind.read(), kind.path.read_bytes()
        for what, data in spoilt(whole, lab.rng, 2 if lab.short else 20):
            kind.path.write_bytes(data)
            problem = use(kind, expected, is_cut=what.startswith("cut"))
            yield f"{kind.path.relative_to(lab.work)}, {what}: {problem}" if problem else ""
        kind.path.write_bytes(whole)
    newest = experiment(lab.work) / "saved_models" / "latest"
    for what, data in list(spoilt(newest.read_bytes(), lab.rng, 1))[-2:]:
        lab.reset(lab.stage("testing"))
        newest.write_bytes(data)
        yield given_again(lab, lab.stage("training"), f"training goes on though its newest checkpoint is {what}")
    place = lab.folder / "harmful"
    place.mkdir()
    for what, kind in harmful(place):
        problem = use(kind, None) or "its code ran" * (place / "ran").exists()
        yield f"{what}: {problem}" if problem else ""


def clock(lab: Lab) -> Problems:
    """Times that make no sense decide nothing: neither those of files nor that of the clock."""
    training = lab.stage("training")
    whole = lab.whole(training)
    for name in ("in reverse order", "in the future", "long ago")[: 1 if lab.short else 3]:
        lab.reset(lab.stage("testing"))
        models = experiment(lab.work) / "saved_models"
        (models / "latest").write_bytes((models / "epoch_1").read_bytes())
        caches = {path: path.stat().st_ino for path in (lab.work / "datasets" / ".cache").rglob("*.*")}
        for number, path in enumerate(sorted(lab.work.rglob("*"), reverse=True)):
            moment = {"in the future": 2**32, "long ago": 0, "in reverse order": 10**9 - 1000 * number}[name]
            os.utime(path, (moment, moment), follow_symlinks=False)
        problem = given_again(lab, training, f"times of files {name}")
        stale = any(path.stat().st_ino != inode for path, inode in caches.items())
        yield problem or "the cache was built anew" * stale
    lab.reset(training)
    operations = Operations(lab.work)
    lab.start(training, operations.at(lab.rng.randint(1, whole.operations), die)).wait()
    if lab.start(training, set_clock_back).wait():
        yield "clock set back: the training failed"
    else:
        yield differences("clock set back", whole.contents, contents(lab.work))


def set_clock_back() -> None:
    """Have this process's clock start in 1970 and go backwards."""
    time.time = map(float, range(10**5, 0, -1)).__next__


def world(lab: Lab) -> Problems:
    """Processes and files that are not the command's own change under it."""
    caching, training, testing = map(lab.stage, ("cache building", "training", "testing"))
    for changed in CHANGES_OF_IMAGES:
        lab.reset(testing)
        own_images(lab)
        before = contents(lab.work / "datasets" / ".cache")
        changed(lab.work / "datasets" / "toy" / "train" / "train_0")
        again = lab.start(training)
        problem = again.printed() if again.wait() else ""
        if "warning: the images of toy/train have changed since the run was started" not in again.printed():
            problem = f"no warning: {again.printed()}"
        stale = before == contents(lab.work / "datasets" / ".cache")
        yield f"{changed.__name__}: {problem or 'the old cache was used'}" if problem or stale else ""
    lab.reset(caching)
    builder = lab.start(caching, slow_decoding)
    children = Path(f"/proc/{builder.pid}/task/{builder.pid}/children")
    until(children.read_text)
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    builder.wait()
    problem = not_one_line(builder, lab.work)
    yield f"a decoding process killed: {problem}" if problem else given_again(lab, caching, "a decoding process killed")


def own_images(lab: Lab) -> None:
    """Copy the images, which are a link, so that they may be changed."""
    images = lab.work / "datasets" / "toy"
    target = images.resolve()
    images.unlink()
    shutil.copytree(target, images)


def replaced(folder: Path) -> None:
    (folder / "0.png").write_bytes(png(10**6))


def added(folder: Path) -> None:
    (folder / "more.png").write_bytes(png(10**6))


def removed(folder: Path) -> None:
    (folder / "0.png").unlink()


def slow_decoding() -> None:
    """Decode so slowly that a decoding process can be killed meanwhile."""
    decode = utils.images.decode_image

    def slowly(path: Path, shape: utils.images.ImageShape) -> np.ndarray:
        time.sleep(0.05)
        return decode(path, shape)

    utils.images.decode_image = slowly


def given_again(lab: Lab, stage: Stage, what: str) -> str:
    """Return what is wrong where a stage that was disturbed is not completed by the same command."""
    again = lab.start(stage)
    if again.wait():
        return f"{what}: given again it printed {again.printed()}"
    return differences(what, lab.whole(stage).contents, contents(lab.work))


def not_one_line(run: Command, named: object) -> str:
    """Return what is wrong with the end of a command that should say in one line what the cause is; "" if nothing."""
    printed = run.printed()
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    is_plain = run.wait() == 2 and len(errors) == 1 and str(named) in errors[0] and "Traceback" not in printed
    return "" if is_plain else f"status {run.wait()}, {printed}"


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Put a real file system of 8 MiB in the place of a folder; raises Skipped where that is not permitted."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        raise Skipped("mounting a small file system needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Let nobody write to a small disk, root neither."""
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)


def print_to_a_full_disk() -> None:
    """Send what this process prints, less its errors, to where nothing can be written."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def fill(folder: Path) -> None:
    """Take all room that is left on a disk."""
    with suppress(OSError), (folder / FILLER).open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


class Skipped(Exception):
    """A section cannot be tried on this machine; the text says why."""


SECTIONS: dict[str, Callable[[Lab], Problems]] = {
    section.__name__: section for section in (kills, disks, runs, damage, clock, world)
}
FILLER = ".filler"
CHANGES_OF_IMAGES = (replaced, added, removed)


def tried(name: str, lab: Lab) -> list[str]:
    """Return what came of each try of a section; what it draws depends on the seed and its name only."""
    lab.rng.seed(f"{lab.seed} {name}")
    return list(SECTIONS[name](lab))


def run(name: str, lab: Lab) -> list[str]:
    """Run a section, print its line and return what went wrong."""
    begun = time.monotonic()
    try:
        found = tried(name, lab)
    except Skipped as reason:
        print(f"{name}: 0 tries, skipped: {reason}")
        return []
    wrong = [problem for problem in found if problem]
    for problem in wrong:
        print(f"{name}: {problem}")
    print(
        f"{name}: {len(found)} tries, {len(found) - len(wrong)} ok, {time.monotonic() - begun:.0f} seconds", flush=True
    )
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of all that is drawn at random")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections")
    parser.add_argument("--short", action="store_true", help="fewer tries")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    logging.getLogger().addHandler(logging.NullHandler())  # warnings of what is read here are what is to be
    wrong: list[str] = []
    with (
        tempfile.TemporaryDirectory(prefix="torture_") as folder,
        closing(Lab(Path(folder), options.seed, options.short)) as lab,
    ):
        for name in options.only:
            wrong += run(name, lab)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
