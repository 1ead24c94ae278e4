"""This module reads pickles that came from elsewhere without running anything that they say.

A pickle is a program. `pickletools.genops` looks it through first: only the instructions that build arrays, lists,
dicts, bytes, strings and numbers, of protocols 0 to 5, Python 2 and 3, are passed on, and large data stay in the file,
which is mapped into memory. Then Python's own unpickler runs what is left, with stand-ins for all that it may call.
"""

import io
import mmap
import pickle
import pickletools
import re
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.archives import is_web_page
from utils.errors import UserError

LARGE = 2**12  # bytes from which on an object stays in the file
RELEASE = 2**26  # bytes after which the memory of what was read is released
# Limits of what a pickle may make out of little: instructions, of 130 bytes of memory at most, and bytes of objects.
FREE_STEPS, BYTES_PER_STEP = 2**21, 64  # so many steps, and one more for each so many bytes of the file
FREE_BYTES, BYTES_PER_BYTE = 2**24, 4

REFUSED = {  # instructions: what they make
    **dict.fromkeys(("INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"), "an instance of a class"),
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), "a registered class"),
    **dict.fromkeys(("PERSID", "BINPERSID"), "an object kept elsewhere"),
    **dict.fromkeys(("NEXT_BUFFER", "READONLY_BUFFER"), "a buffer kept elsewhere"),
    **dict.fromkeys(("EMPTY_SET", "ADDITEMS", "FROZENSET"), "a set"),
}
CHECKED = {  # instructions: what stands for them, so that `persistent_load` sees what they make
    "FRAME": b"",  # it announces a size that changes
    "EMPTY_DICT": pickle.EMPTY_LIST + pickle.BINPERSID,
    "DICT": pickle.LIST + pickle.BINPERSID,
    "REDUCE": pickle.REDUCE + pickle.TUPLE1 + pickle.BINPERSID,
    "BUILD": pickle.TUPLE2 + pickle.BINPERSID,
}
DATA = {"BINSTRING": 5, "BINBYTES": 5, "BINBYTES8": 9, "BYTEARRAY8": 9}  # instructions: where their bytes begin


class RefusedError(Exception):
    """The pickle holds what it must not; the message names it."""


def read_pickle(path: Path) -> Any:
    """Return what the pickle at `path` holds: lists, dicts, arrays, str, numbers, None, and bytes or views of them.

    Arrays cannot be written to. Python 2's strings become Latin-1 text, those from 4 KiB on views of bytes. UserError,
    which names the file and what it holds, for anything else and for a damaged file.
    """
    if is_web_page(path):
        raise UserError(f"{path} is a web page, not a pickle: the download went wrong. Fetch it again")
    if not path.stat().st_size:
        raise UserError(f"{path} is empty. Fetch it again")
    with path.open("rb") as file:
        return loads(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), str(path))


def release(data: Any) -> None:
    """Give back the memory that the mapped file behind `data` takes; what is needed again is read again."""
    while isinstance(data, np.ndarray | memoryview):
        data = data.base if isinstance(data, np.ndarray) else data.obj
    if isinstance(data, mmap.mmap) and hasattr(data, "madvise"):
        data.madvise(mmap.MADV_DONTNEED)


def loads(data: bytes | mmap.mmap, name: str) -> Any:
    """Return what the pickle `data` holds, as read_pickle does; `name` is for errors."""
    try:
        return _finished(_Unpickler(data).load())
    except RefusedError as refused:
        raise UserError(
            f"{name} holds {refused}. It may hold nothing but arrays, lists, dicts, bytes, strings and numbers: "
            "nothing of it was run or used. Fetch it from elsewhere"
        ) from refused
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle raises nearly any type
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{name} is damaged or not a pickle ({what}). Fetch it again") from error


# --- what a pickle may make --------------------------------------------------------------------------------


class _Dtype:
    """This class stands for numpy.dtype while a pickle is read: a number or string type, never objects or fields."""

    def __init__(self, code: str, *_: object) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?(b1|[iu][1248]|f[248]|[SU]\d{1,4})", code):
            raise RefusedError(f"an array of type {code!r}" + (" (Python objects)" if "O" in str(code) else ""))
        self.dtype = np.dtype(code)

    def set_state(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """This class stands for numpy.ndarray while a pickle is read: the contents may come after the object."""

    array: np.ndarray

    def set_state(self, state: tuple[Any, ...]) -> None:
        shape, dtype, is_fortran, data = state[-4:]
        self.array = _frombuffer(data, dtype, shape, "F" if is_fortran else "C").array


class _Dict(dict[Any, Any]):
    """This class stands for dict, which would hash any key: that of nested tuples may take years."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, str | int | float | bytes):
            raise RefusedError(f"a dict with a {type(key).__name__} as key")
        super().__setitem__(key, value)


_Dict.__name__ = "dict"  # in error messages

_NDARRAY = "numpy.ndarray"  # only named in pickles, as the class to make


def _reconstruct(kind: object, shape: object, code: object) -> _Array:
    if kind != _NDARRAY or shape != (0,):
        raise RefusedError("an array of an unusual kind")
    return _Array()


def _frombuffer(data: Any, dtype: _Dtype, shape: tuple[int, ...], order: Any) -> _Array:
    data = data.encode("latin1") if isinstance(data, str) else data  # Python 2's bytes
    flat = np.frombuffer(data, dtype.dtype) if len(data) else np.empty(0, dtype.dtype)
    made = _Array()
    made.array = flat.reshape(shape, order=order)
    return made


def _scalar(dtype: _Dtype, data: Any) -> int | float | str | bytes:
    return _frombuffer(data, dtype, (), "C").array.item()


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise RefusedError(f"text in the encoding {encoding!r}")
    return text.encode("latin1")


def _bytes(data: Any = b"", encoding: str = "latin1") -> bytes | memoryview:
    """Return bytes as Python 3 writes them in old protocols. Of a number, bytes() would make as many zeros."""
    if isinstance(data, str):
        return _encode(data, encoding)
    return data if isinstance(data, bytes) else memoryview(data)


ALLOWED: dict[str, Any] = {
    "numpy.ndarray": _NDARRAY, "numpy.dtype": _Dtype, "_codecs.encode": _encode,
    **{f"numpy.{core}.multiarray.{name}": function
       for core in ("core", "_core") for name, function in (("_reconstruct", _reconstruct), ("scalar", _scalar))},
    **{f"numpy.{core}.numeric._frombuffer": _frombuffer for core in ("core", "_core")},
    **{f"{module}.{name}": _bytes for module in ("builtins", "__builtin__") for name in ("bytes", "bytearray")},
}  # fmt: skip


# --- reading -----------------------------------------------------------------------------------------------


class _Unread(bytes):
    """These bytes have a length but no contents; they stand for large ones that nobody needs in memory."""

    size = 0

    def __len__(self) -> int:
        return self.size


class _File:
    """This is a pickle in the form that genops reads. A size beyond its end is an error before it takes memory."""

    def __init__(self, data: bytes | mmap.mmap) -> None:
        self.data = data
        self.at = self.released = 0  # how far it was read, and its memory released

    def tell(self) -> int:
        return self.at

    def read(self, size: int) -> bytes:
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise EOFError(f"{size} bytes announced, but only {len(self.data) - start} left")
        if self.at - self.released > RELEASE:
            self.released = self.at
            release(self.data)
        if size < LARGE:
            return self.data[start : self.at]
        unread = _Unread()
        unread.size = size
        return unread

    def readline(self) -> bytes:
        start, end = self.at, self.data.find(b"\n", self.at)
        self.at = end + 1 if end >= 0 else len(self.data)
        if self.data[start - 1 : start] == pickle.STRING:
            return b"''\n"  # genops takes strings for ASCII, but Python 2's are not
        return self.data[start : self.at]


class _Unpickler(pickle.Unpickler):
    """Python's unpickler runs a checked copy of the pickle `data` here."""

    def __init__(self, data: bytes | mmap.mmap) -> None:
        self.views: list[memoryview] = []  # of large data
        self.made, self.max_made = 0, FREE_BYTES + len(data) * BYTES_PER_BYTE  # bytes
        super().__init__(io.BytesIO(self.checked(data)), encoding="latin1")

    def checked(self, data: bytes | mmap.mmap) -> bytearray:
        """Return the instructions of `data`, with large data as persistent ids and objects numbered without gaps."""
        file, copy, max_steps = _File(data), bytearray(), FREE_STEPS + len(data) // BYTES_PER_STEP
        numbers: dict[int, int] = {}  # Python's own reader makes a table as long as the highest one
        operations: Iterable[tuple[Any, Any, Any]] = pickletools.genops(file)  # type: ignore[arg-type]
        for step, (opcode, argument, start) in enumerate(operations):
            name, data_start = opcode.name, start + DATA.get(opcode.name, 0)
            if step == max_steps:
                raise RefusedError(f"more objects than its size allows, {max_steps:,}")
            if name in REFUSED:
                raise RefusedError(REFUSED[name])
            if name in CHECKED:
                copy += CHECKED[name]
            elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
                number = len(numbers) if argument is None else argument
                copy += pickle.LONG_BINPUT + struct.pack("<I", numbers.setdefault(number, len(numbers)))
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                copy += pickle.LONG_BINGET + struct.pack("<I", numbers[argument])
            elif name in DATA and file.at - data_start >= LARGE:
                copy += pickle.BININT + struct.pack("<i", len(self.views)) + pickle.BINPERSID
                self.views.append(memoryview(data)[data_start : file.at])
            else:
                copy += data[start : file.at]
        return copy

    def persistent_load(self, what: Any) -> Any:
        """Return what a checked instruction makes of `what` it left: a number, the items of a dict, or a tuple."""
        if isinstance(what, int):
            return self.views[what]
        if isinstance(what, list):
            target = _Dict()
            for key, value in zip(what[::2], what[1::2], strict=True):
                target[key] = value
            return target
        made, *state = what
        if state and not isinstance(made, _Array | _Dtype):
            raise RefusedError(f"a {type(made).__name__} with attributes of its own")
        if state:
            made.set_state(*state)
        array = getattr(made, "array", None)  # of one text that is in the file once, a hundred may be made
        self.made += sys.getsizeof(made) if array is None else array.nbytes
        if self.made > self.max_made:
            raise RefusedError("objects of many times its size")
        return made

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in ALLOWED:
            raise RefusedError(f"{module}.{name}".encode("unicode_escape").decode())
        return ALLOWED[f"{module}.{name}"]


def _finished(value: Any) -> Any:
    """Return `value` with arrays in the place of their stand-ins; whatever a data set has no use for is refused."""
    root = [value]
    todo: list[list[Any] | dict[Any, Any]] = [root]
    seen = set()
    while todo:
        box = todo.pop()
        if id(box) not in seen:
            seen.add(id(box))  # a list may hold itself, or another one many times
            pairs: Iterable[tuple[Any, Any]] = enumerate(box) if isinstance(box, list) else list(box.items())
            for key, item in pairs:
                if isinstance(item, _Array):
                    box[key] = item.array
                elif isinstance(item, list | dict):
                    todo.append(item)
                elif item is not None and not isinstance(item, str | bytes | memoryview | int | float):
                    raise RefusedError(f"a {type(item).__name__}")
    return root[0]
