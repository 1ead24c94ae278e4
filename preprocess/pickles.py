"""Reading pickles that came from elsewhere without running anything that they say.

A pickle is a program. This reader knows only the instructions that build arrays, lists, dicts, bytes, strings
and numbers, of protocols 0 to 5, Python 2 and 3; any other ends in an error that names it. Files are mapped
into memory and large arrays are views of them, so that reading one takes hardly any.
"""

import mmap
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.archives import is_web_page
from utils.errors import UserError

LARGE = 2**12  # bytes from which on an object stays in the file
RELEASE = 2**26  # bytes after which what was read is given back
# Limits of what a pickle may make out of little: instructions, of 130 bytes of memory at most, and bytes of objects.
FREE_STEPS, BYTES_PER_STEP = 2**21, 64  # so many steps, and one more for each so many bytes of the file
FREE_BYTES, BYTES_PER_BYTE = 2**24, 4


class RefusedError(Exception):
    """What a pickle holds that it must not, in words."""


def read_pickle(path: Path) -> Any:
    """What the pickle at `path` holds: lists, dicts, arrays, str, numbers, None, and bytes, which may be memoryviews.

    Arrays cannot be written to. Python 2's strings come as Latin-1 text, those from 4 KiB on as bytes. UserError,
    which names the file and what it holds, for anything else and for a damaged file.
    """
    if is_web_page(path):
        raise UserError(f"{path} is a web page, not a pickle: the download went wrong. Fetch it again")
    if not path.stat().st_size:
        raise UserError(f"{path} is empty. Fetch it again")
    with path.open("rb") as file:
        return loads(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), str(path))


def release(data: np.ndarray | memoryview) -> None:
    """Give back the memory that the file behind data of read_pickle takes; it is read again when needed."""
    base: Any = data
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    _release(base)


def _release(data: Any) -> None:
    if isinstance(data, mmap.mmap) and hasattr(data, "madvise"):
        data.madvise(mmap.MADV_DONTNEED)


def loads(data: bytes | mmap.mmap, name: str) -> Any:
    """As read_pickle, of data in memory; `name` is for errors."""
    try:
        return _finished(_Unpickler(_Source(data)).load())
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


class _Source:
    """The file that the unpickler reads; sizes beyond its end are noticed before any memory is taken."""

    def __init__(self, data: bytes | mmap.mmap) -> None:
        self.data, self.view = data, memoryview(data)
        self.at = self.released = 0  # how far it was read, and given back

    def read(self, size: int) -> bytes | memoryview:
        start, self.at = self.at, self.at + size
        if self.at > len(self.view):
            raise EOFError(f"{size} bytes announced, but only {len(self.view) - start} left")
        if self.at - self.released > RELEASE:
            self.released = self.at
            _release(self.data)
        return self.view[start : self.at] if size >= LARGE else self.data[start : self.at]

    def readline(self) -> bytes:
        start, end = self.at, self.data.find(b"\n", self.at)
        self.at = end + 1 if end >= 0 else len(self.view)
        return self.data[start : self.at]


class _Dtype:
    """Stands for numpy.dtype while a pickle is read: a number or string type, never objects or fields."""

    def __init__(self, code: str, *_: object) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?(b1|[iu][1248]|f[248]|[SU]\d{1,4})", code):
            raise RefusedError(f"an array of type {code!r}" + (" (Python objects)" if "O" in str(code) else ""))
        self.dtype = np.dtype(code)

    def set_state(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for numpy.ndarray while a pickle is read, which gives the contents after the object."""

    array: np.ndarray

    def set_state(self, state: tuple[Any, ...]) -> None:
        shape, dtype, is_fortran, data = state[-4:]
        self.fill(data, dtype, shape, "F" if is_fortran else "C")

    def fill(self, data: Any, dtype: _Dtype, shape: tuple[int, ...], order: Any) -> None:
        data = data.encode("latin1") if isinstance(data, str) else data  # Python 2's bytes
        flat = np.frombuffer(data, dtype.dtype) if len(data) else np.empty(0, dtype.dtype)
        self.array = flat.reshape(shape, order=order)


_NDARRAY = "numpy.ndarray"  # only named in pickles, as the class to make


def _reconstruct(kind: object, shape: object, code: object) -> _Array:
    if kind != _NDARRAY or shape != (0,):
        raise RefusedError("an array of an unusual kind")
    return _Array()


def _frombuffer(data: Any, dtype: _Dtype, shape: tuple[int, ...], order: Any) -> _Array:
    array = _Array()
    array.fill(data, dtype, shape, order)
    return array


def _scalar(dtype: _Dtype, data: Any) -> int | float | str | bytes:
    return _frombuffer(data, dtype, (), "C").array.item()


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise RefusedError(f"text in the encoding {encoding!r}")
    return text.encode("latin1")


def _bytes(data: Any = b"", encoding: str = "latin1") -> bytes | memoryview:
    """As Python 3 writes bytes in old protocols. Of a number, bytes() would make as many zeros."""
    if isinstance(data, str):
        return _encode(data, encoding)
    return data if isinstance(data, bytes) else memoryview(data)


ALLOWED: dict[str, object] = {
    "numpy.ndarray": _NDARRAY, "numpy.dtype": _Dtype, "_codecs.encode": _encode,
    **{f"numpy.{core}.multiarray.{name}": function
       for core in ("core", "_core") for name, function in (("_reconstruct", _reconstruct), ("scalar", _scalar))},
    **{f"numpy.{core}.numeric._frombuffer": _frombuffer for core in ("core", "_core")},
    **{f"{module}.{name}": _bytes for module in ("builtins", "__builtin__") for name in ("bytes", "bytearray")},
}  # fmt: skip

REFUSED = {  # instructions: what they make
    **dict.fromkeys((pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX), "an instance of a class"),
    **dict.fromkeys((pickle.EXT1, pickle.EXT2, pickle.EXT4), "a registered class"),
    **dict.fromkeys((pickle.PERSID, pickle.BINPERSID), "an object kept elsewhere"),
    **dict.fromkeys((pickle.NEXT_BUFFER, pickle.READONLY_BUFFER), "a buffer kept elsewhere"),
    **dict.fromkeys((pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET), "a set"),
}


class _Unpickler(pickle._Unpickler):
    """Python's unpickler written in Python, with other instructions for what must be checked.

    The one written in C takes memory for sizes, and for numbers of objects, that a file only claims.
    """

    stack: list[Any]  # these two are the base class's, undocumented
    pop_mark: Callable[[], list[Any]]

    def __init__(self, source: _Source) -> None:
        super().__init__(source)  # type: ignore[arg-type]  # large reads are memoryviews
        self.read, self.readline = source.read, source.readline
        self.handlers: dict[int, Any] = {**self.dispatch, **HANDLERS}
        size = len(source.view)
        self.max_steps, self.max_made = FREE_STEPS + size // BYTES_PER_STEP, FREE_BYTES + size * BYTES_PER_BYTE
        self.made = 0  # bytes

    def load(self) -> Any:
        self.metastack: list[list[Any]] = []
        self.stack = []
        self.append = self.stack.append
        try:
            for _ in range(self.max_steps):
                code = self.read(1)
                if code in REFUSED:
                    raise RefusedError(REFUSED[bytes(code)])
                self.handlers[code[0]](self)
            raise RefusedError(f"more objects than its size allows, {self.max_steps:,}")
        except pickle._Stop as stop:  # type: ignore[attr-defined]
            return stop.value

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in ALLOWED:
            raise RefusedError(f"{module}.{name}".encode("unicode_escape").decode())
        return ALLOWED[f"{module}.{name}"]

    def _decode_string(self, value: bytes | memoryview) -> str | bytes | memoryview:
        return str(value, "latin1") if len(value) < LARGE else value

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Array | _Dtype):
            raise RefusedError(f"a {type(self.stack[-1]).__name__} with attributes of its own")
        self.stack[-1].set_state(state)
        self._count(self.stack[-1])

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self.stack[-1](*arguments)
        self._count(self.stack[-1])

    def _count(self, made: Any) -> None:
        """Of one text that is in the file once, a hundred arrays may be made."""
        array = getattr(made, "array", None)
        self.made += sys.getsizeof(made) if array is None else array.nbytes
        if self.made > self.max_made:
            raise RefusedError("objects of many times its size")

    def load_frame(self) -> None:
        self.read(8)  # the size of what follows, which only helps to read ahead

    def load_bytearray8(self) -> None:
        self.append(self.read(int.from_bytes(self.read(8), "little")))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _set_items(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        _set_items(self.stack[-1], items)

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        _set_items(self.stack[-1], items)


HANDLERS: dict[int, Callable[[_Unpickler], None]] = {
    pickle.BUILD[0]: _Unpickler.load_build,
    pickle.REDUCE[0]: _Unpickler.load_reduce,
    pickle.FRAME[0]: _Unpickler.load_frame,
    pickle.BYTEARRAY8[0]: _Unpickler.load_bytearray8,
    pickle.SETITEM[0]: _Unpickler.load_setitem,
    pickle.SETITEMS[0]: _Unpickler.load_setitems,
    pickle.DICT[0]: _Unpickler.load_dict,
}


def _set_items(target: dict[Any, Any], items: list[Any]) -> None:
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int | float | bytes):  # to hash nested tuples may take years
            raise RefusedError(f"a dict with a {type(key).__name__} as key")
        target[key] = value


def _finished(value: Any) -> Any:
    """`value` with arrays in the place of their stand-ins; whatever a data set has no use for is refused."""
    root = [value]
    todo: list[list[Any] | dict[Any, Any]] = [root]
    seen = set()
    while todo:
        box = todo.pop()
        if id(box) not in seen:
            seen.add(id(box))  # a list may hold itself, or another one many times
            for key, item in enumerate(box) if isinstance(box, list) else list(box.items()):
                if isinstance(item, _Array):
                    box[key] = item.array
                elif isinstance(item, list | dict):
                    todo.append(item)
                elif item is not None and not isinstance(item, str | bytes | memoryview | int | float):
                    raise RefusedError(f"a {type(item).__name__}")
    return root[0]
