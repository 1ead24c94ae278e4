"""Pickles from elsewhere: data come out as Python's own reader gives them, and nothing is ever run."""

import pickle
import struct
import sys
import time
import tracemalloc
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocess import pickles
from preprocess.pickles import loads, read_pickle, release
from tests.made_archives import left_in, mapped
from utils.errors import UserError

PROTOCOLS = range(6)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
)


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"


class Attack:
    """Unpickled by Python's own reader, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def refused(data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        loads(data, "a.pickle")


# ---------------------------------------------------------------- what is good


@pytest.mark.parametrize("folder", ["metaoptnet_pickles_small", "metaoptnet_pickles_small_py2"])
def test_real_pickles_of_both_pythons_come_out_as_pythons_own_reader_gives_them(shared: Path, folder: str) -> None:
    for path in sorted((shared / "data" / folder).iterdir()):
        ours = read_pickle(path)
        with path.open("rb") as file:
            theirs = pickle.load(file, encoding="latin1")
        np.testing.assert_array_equal(ours["data"], theirs["data"])
        assert ours["labels"] == theirs["labels"] and ours.keys() == theirs.keys() == {"data", "labels"}


@given(PLAIN, st.sampled_from(PROTOCOLS))
def test_plain_data_come_out_of_every_protocol_as_they_went_in(data: Any, protocol: int) -> None:
    assert loads(pickle.dumps(data, protocol), "x") == data


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.uint8).reshape(2, 3, 4), np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(9)[::2], np.zeros((0, 84, 84, 3), np.uint8), np.array(7), np.arange(3, dtype=">i4"),
        np.array([True, False]), np.array(["n01", "n0234"]), np.array([b"ab"]), np.arange(9000, dtype=np.float32),
    ],
    ids=str,
)  # fmt: skip
def test_arrays_come_out_of_every_protocol_as_they_went_in(array: np.ndarray, protocol: int) -> None:
    for core in (b"numpy.core", b"numpy._core"):  # numpy 1 and 2
        data = pickle.dumps(array, protocol)
        if protocol < 4:  # names are lines then, and may change their length
            data = data.replace(b"numpy._core", b"numpy.core").replace(b"numpy.core", core)
        ours = loads(data, "x")
        np.testing.assert_array_equal(ours, array)
        assert ours.dtype == array.dtype and ours.shape == array.shape


def test_numbers_and_bytes_of_numpy_become_pythons(tmp_path: Path) -> None:
    held = loads(pickle.dumps([np.int64(4), np.float32(0.5), np.bool_(True), bytearray(b"ab")]), "x")
    assert held == [4, 0.5, True, b"ab"] and [type(item) for item in held] == [int, float, bool, bytes]


def test_python_2s_strings_become_text_and_its_arrays_their_bytes() -> None:
    name = b"U\x04\xe9t\xe9s"  # SHORT_BINSTRING, Latin-1
    assert loads(b"\x80\x02}" + name + b"K\x01s.", "x") == {"étés": 1}
    array = ARRAY + b"(I1\n(I2\ntcnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\n"  # protocol 0,
    array += b"S'\\xfe\\x01'\ntb."  # the default there
    np.testing.assert_array_equal(loads(array, "x"), np.array([254, 1], np.uint8))


def test_large_arrays_stay_in_the_file_and_cannot_be_changed(tmp_path: Path) -> None:
    images = np.random.RandomState(0).randint(0, 256, (20, 2**20)).astype(np.uint8)
    (tmp_path / "x.pickle").write_bytes(pickle.dumps({"data": images, "more": [row.copy() for row in images]}, 4))
    tracemalloc.start()
    held = read_pickle(tmp_path / "x.pickle")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert not held["data"].flags.writeable
    release(held["data"][3])
    np.testing.assert_array_equal(held["data"], images)
    np.testing.assert_array_equal(held["more"][7], images[7])


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_pickle_that_would_run_something_is_refused_and_does_not(tmp_path: Path, protocol: int) -> None:
    data = pickle.dumps({"data": [Attack(tmp_path / "made")]}, protocol)
    (tmp_path / "x.pickle").write_bytes(data)
    with pytest.raises(
        UserError, match=r"x\.pickle holds (pathlib|\w+\.getattr)\S*\. It may hold nothing but"
    ) as error:
        read_pickle(tmp_path / "x.pickle")
    assert str(tmp_path / "x.pickle") in str(error.value) and not (tmp_path / "made").exists()
    pickle.loads(data)
    assert (tmp_path / "made").exists()  # it does work


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("held", "named"),
    [
        (np.array([{}], dtype=object), "Python objects"), (np.zeros(2, [("a", "i4")]), "of type 'V4'"),
        (np.array(["2020"], "M8[D]"), "of type 'M8'"), (np.ma.zeros(3), "numpy.ma.core"),
        (OrderedDict(), "OrderedDict"),
        (np.float64, "numpy.float64"), ({1, 2}, "set"), (frozenset([1]), "set"), ((1, 2), "a tuple"), (1j, "complex"),
        ({(1, (2, 3)): 4}, "a dict with a tuple as key"), (len, "builtin.*len"), ([np.dtype("u1")], "a _Dtype"),
        (np.ndarray, "a |numpy.ndarray"), (range(3), "range"), (Path("/"), "pathlib"), (UserError("x"), "UserError"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_anything_but_data_is_refused_by_name(held: object, named: str, protocol: int) -> None:
    if held is np.ndarray:
        assert loads(pickle.dumps(held, protocol), "x") == "numpy.ndarray"  # only its name
    else:
        refused(pickle.dumps([held], protocol), f"a.pickle holds .*{named}")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"cposix\nsystem\n(S'true'\ntR.", "holds posix.system"),
        (b"c__builtin__\neval\n(S'1'\ntR.", "holds __builtin__.eval"),
        (b"(S'true'\niposix\nsystem\n.", "an instance of a class"),
        (b"(cnumpy\ndtype\nS'u1'\no.", "an instance of a class"),
        (b"\x80\x02cnumpy\ndtype\n(S'u1'\nt\x81.", "an instance of a class"),
        (b"P1\n.", "kept elsewhere"), (b"\x82\x01.", "a registered class"), (b"\x97.", "kept elsewhere"),
        (b"c_codecs\nencode\n(S'a'\nS'rot13'\ntR.", "encoding 'rot13'"),
        (b"cnumpy\ndtype\n}S'x'\nI1\nsb.", "a type with attributes"), (b"]}b.", "attributes of its own"),
        (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I999999999999\ntS'b'\ntR.", "unusual kind"),
        (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\n(I0\ntS'b'\ntR.", "unusual kind"),
        (b"cnumpy\ndtype\n(S'O'\ntR.", "Python objects"), (b"cnumpy\ndtype\n(S'S99999999999'\ntR.", "S99999999999"),
    ],
)  # fmt: skip
def test_instructions_that_data_do_not_need_are_refused(data: bytes, message: str) -> None:
    refused(data, message)


# ---------------------------------------------------------------- sizes and damage


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"few.",  # bytes
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"few.",  # a bytearray
        b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"few.",  # text
        b"\x80\x02T" + struct.pack("<i", 2**31 - 1) + b"few.",  # Python 2's text
        b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"\x8e" + struct.pack("<Q", 2**40) + b"N.",  # in a frame
        b"c__builtin__\nbytearray\n(I1099511627776\ntR.",  # as many zeros
        b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"1.",  # a number
        ARRAY + b"(I1\n(I1099511627776\ntcnumpy\ndtype\n(S'u1'\nI0\nI1\ntRI00\nS'few'\ntb.",  # an array
    ],
)
def test_sizes_that_the_file_cannot_have_take_no_memory(data: bytes) -> None:
    tracemalloc.start()
    refused(data, "damaged or not a pickle .*(bytes announced, but only|cannot reshape|TypeError)")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_high_number_of_an_object_takes_no_memory() -> None:
    tracemalloc.start()  # Python's own reader would make a table of 34 GB for it
    assert loads(b"\x80\x02]r\xff\xff\xff\x7f.", "x") == []
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_lists_that_hold_one_another_many_times_are_read_quickly() -> None:
    nested: list[Any] = []
    for _ in range(60):  # 10 to the power of 60 if each were looked at
        nested = [nested] * 10
    loop: list[Any] = []
    loop.append(loop)
    start = time.perf_counter()
    loads(pickle.dumps([nested, loop]), "x")
    deep: list[Any] = []
    for _ in range(50_000):
        deep = [deep]
    loads(b"]" * 50_000 + b"a" * 49_999 + b".", "x")  # nor does depth matter
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("step", [b"]", b"\x94", b"\x85", b"(", b"2"], ids=["list", "memo", "tuple", "mark", "copy"])
def test_a_small_file_of_millions_of_objects_is_refused(step: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "FREE_STEPS", 2**14)
    tracemalloc.start()
    refused(b"\x80\x02N" + step * 2**19 + b".", "holds more objects than its size allows")
    assert tracemalloc.get_traced_memory()[1] < 4e6  # 250 bytes a step
    tracemalloc.stop()


TEXT = b"\x80\x03X" + struct.pack("<I", 2**20) + b"t" * 2**20 + b"q\x00"  # 1 MiB, as number 0 of the memo
DATA = b"\x80\x03B" + struct.pack("<I", 39996) + b"t\0\0\0" * 9999 + b"q\x00"  # 9999 letters of 4 bytes


@pytest.mark.parametrize(
    "data",
    [
        TEXT + b"](" + b"c_codecs\nencode\n(h\x00X\x06\0\0\0latin1tR" * 100 + b"e.",
        TEXT + b"](" + b"c__builtin__\nbytes\nh\x00\x85R" * 100 + b"e.",
        TEXT + b"](" + (ARRAY + b"(I1\n(I1048576\ntcnumpy\ndtype\n(S'u1'\ntRI00\nh\x00tb") * 100 + b"e.",
        DATA + b"](" + b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'U9999'\ntRh\x00tR" * 5000 + b"e.",
    ],
    ids=["text encoded", "bytes of text", "arrays of text", "texts of an array"],
)
def test_one_text_made_into_bytes_many_times_is_refused(data: bytes) -> None:
    tracemalloc.start()
    refused(data, "holds objects of many times its size")
    assert tracemalloc.get_traced_memory()[1] < 30e6
    tracemalloc.stop()


def test_large_data_in_the_place_of_arguments_take_no_memory() -> None:
    data = b"\x80\x03c_codecs\nencode\nB" + struct.pack("<I", 2**23) + bytes(2**23) + b"R."
    tracemalloc.start()
    refused(data, "damaged or not a pickle .*tuple")
    assert tracemalloc.get_traced_memory()[1] < 2**20  # as many numbers would take 64 MiB
    tracemalloc.stop()


def test_bytes_that_are_asked_for_many_times_are_the_same_bytes() -> None:
    held = loads(DATA + b"](" + b"c__builtin__\nbytes\nh\x00\x85R" * 10 + b"e.", "x")
    assert len(held) == 10 and all(len(item) == 39996 for item in held)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reading_a_large_file_gives_back_its_memory_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "RELEASE", 2**20)
    (tmp_path / "x.pickle").write_bytes(pickle.dumps([bytes([i % 256]) * 5000 for i in range(8000)], 4))
    before = mapped()
    held = read_pickle(tmp_path / "x.pickle")
    assert mapped() - before < 2**13  # of 40 MB
    assert all(item[0] == i % 256 for i, item in enumerate(held))
    assert mapped() - before > 2**14
    release(held[0])
    assert mapped() - before < 2**13


@pytest.mark.parametrize("cut", [1, 20, 200, 2000])
def test_a_pickle_that_ends_early_is_called_damaged(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "x.pickle"
    path.write_bytes(pickle.dumps({"data": np.zeros((10, 32, 32, 3), np.uint8), "labels": [1] * 10})[:-cut])
    with pytest.raises(UserError, match=r"x\.pickle is damaged or not a pickle .*Fetch it again"):
        read_pickle(path)


def test_files_that_are_no_pickles_say_what_they_are(tmp_path: Path) -> None:
    for content, message in ((b"", "is empty"), (b"<html>Virus scan</html>", "is a web page"), (b"hello", "damaged")):
        (tmp_path / "x.pickle").write_bytes(content)
        with pytest.raises(UserError, match=rf"x\.pickle {message}|x\.pickle is {message}"):
            read_pickle(tmp_path / "x.pickle")
    assert left_in(tmp_path) == []


@given(st.binary(max_size=200))
def test_no_bytes_at_all_raise_anything_but_a_user_error(data: bytes) -> None:
    try:
        loads(data, "x")
    except UserError as error:
        assert "x " in str(error)
