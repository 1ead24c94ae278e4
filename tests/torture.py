"""Tries to break the program, and counts how often that succeeds: make torture

python -m tests.torture --seed 7                 the moments and places are drawn anew from each seed
python -m tests.torture --only kills disks       some sections
python -m tests.torture --short                  as in `make test`

Everything is real, and small: commands in processes of their own, a file system that is full, damaged files. A section
prints how many things it tried and how many of these ended as they should. The exit status is 1 if any did not.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.forked import Command, Operations, die, until

from tests.torture_lab import STAGES, Lab, contents, differences

Problems = Iterator[str]  # one for each thing tried; "" where it ended as it should


def kills(lab: Lab) -> Problems:
    """A command that is killed at any moment and given again ends as if nothing had happened."""
    for number in range(len(STAGES) if lab.short else 30):
        stage = STAGES[number % len(STAGES)]
        whole = lab.whole(stage)
        lab.reset(stage)
        operations = Operations(lab.work)
        if number % 2 or stage.name == "checkpoint writing":
            moment = lab.rng.randint(1, whole.operations)
            what = f"{stage.name}, killed at file operation {moment} of {whole.operations}"
            status = lab.start(stage, lambda: operations.watch(moment, die)).wait()
        else:
            delay = lab.rng.uniform(0, whole.seconds)
            what = f"{stage.name}, killed after {delay:.3f} of {whole.seconds:.3f} s"
            command = lab.start(stage)
            until(lambda: command.status() is not None, delay)
            command.kill()
            status = command.wait()
        again = lab.start(stage)
        if again.wait():
            yield f"{what}: given again it printed {again.printed()}"
        else:
            yield differences(what, whole.contents, contents(lab.work))


SECTIONS: dict[str, Callable[[Lab], Problems]] = {section.__name__: section for section in (kills,)}


def run(name: str, lab: Lab) -> list[str]:
    """Run a section, print its line and return what went wrong."""
    begun = time.monotonic()
    found = list(SECTIONS[name](lab))
    wrong = [problem for problem in found if problem]
    for problem in wrong:
        print(f"{name}: {problem}")
    print(f"{name}: {len(found)} tries, {len(found) - len(wrong)} ok, {time.monotonic() - begun:.0f} seconds", flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of all that is drawn at random")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections")
    parser.add_argument("--short", action="store_true", help="fewer tries")
    options = parser.parse_args()
    print(f"seed {options.seed}")
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="torture_") as folder:
        lab = Lab(Path(folder), options.seed, options.short)
        for name in options.only:
            wrong += run(name, lab)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
