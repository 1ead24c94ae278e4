"""Archives are fetched whole or not at all, over real sockets: what breaks goes on, what is wrong is refused."""

import hashlib
import json
import os
import resource
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path

import pytest

from preprocess import cifar100, fetching
from preprocess.preprocess import declared, main
from preprocess.sources import DataSet, Source
from utils.errors import UserError
from utils.names import KNOWN

ROOT = Path(__file__).resolve().parent.parent
CONTENT = bytes(range(256)) * 4000  # 1 MB
MD5 = hashlib.md5(CONTENT).hexdigest()
Fault = Callable[["Answer", bytes, int], None]


class Answer(BaseHTTPRequestHandler):
    """Each request is answered by the next of the server's faults; where none is left, as a good server does."""

    server: "Server"

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append((self.path, wanted))
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
        elif self.server.faults:
            self.server.faults.pop(0)(self, content, int(wanted[6:-1]) if wanted else 0)
        else:
            self.send(content, int(wanted[6:-1]) if wanted else 0)

    def send(self, content: bytes, start: int = 0, upto: int | None = None, kind: str = "application/zip") -> None:
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(content[start:upto])

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = {"/x.zip": CONTENT}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str | None]] = []
        self.scheme = "http"
        self.release = threading.Event()  # of answers that stall
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def url(self, path: str = "/x.zip") -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_port}{path}"

    def handle_error(self, *_: object) -> None:
        pass  # clients go away on purpose


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(fetching, "PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setenv("no_proxy", "*")
    made = Server()
    yield made
    made.release.set()
    made.shutdown()


def cut_after(upto: int, with_ranges: bool = True) -> Fault:
    """Close the connection in the middle, `upto` bytes from the file's beginning."""
    return lambda answer, content, start: answer.send(content, start if with_ranges else 0, upto)


def stall_after(upto: int) -> Fault:
    def stall(answer: Answer, content: bytes, start: int) -> None:
        answer.send(content, start, upto)
        answer.wfile.flush()
        answer.server.release.wait(30)

    return stall


def status(code: int, **headers: str) -> Fault:
    def refuse(answer: Answer, *_: object) -> None:
        answer.send_response(code)
        for name, value in headers.items():
            answer.send_header(name.replace("_", "-"), value)
        answer.send_header("Content-Length", "0")
        answer.end_headers()

    return refuse


def without_ranges(answer: Answer, content: bytes, start: int) -> None:
    answer.send(content)


def without_length(answer: Answer, content: bytes, start: int) -> None:
    answer.send_response(200)
    answer.end_headers()
    answer.wfile.write(content)


def get(server: Server, folder: Path, md5: str = MD5, *addresses: str) -> bytes:
    """Fetch x.zip into the folder and return what is there then."""
    source = Source(("x.zip",), "", lambda _: (), {"x.zip": md5}, {"x.zip": addresses or (server.url(),)})
    fetching.fetch_file(source, folder / "x.zip")
    return (folder / "x.zip").read_bytes()


def part_of(folder: Path) -> Path:
    return folder / fetching.FOLDER / "x.zip.part"


# ---------------------------------------------------------------- transfers that break


def test_a_file_is_fetched_once_and_nothing_but_the_lock_is_left(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert get(server, tmp_path) == CONTENT == get(server, tmp_path)
    assert server.requests == [("/x.zip", None)]
    assert [path.name for path in (tmp_path / fetching.FOLDER).iterdir()] == [".lock"]
    assert f"fetching x.zip, 1.0 MB, from {server.url()}" in capsys.readouterr().out


def test_a_broken_transfer_goes_on_where_it_ended(server: Server, tmp_path: Path) -> None:
    server.faults = [cut_after(300_000), cut_after(700_000)]
    assert get(server, tmp_path) == CONTENT
    assert [wanted for _, wanted in server.requests] == [None, "bytes=300000-", "bytes=700000-"]


def test_where_the_server_has_no_ranges_it_starts_anew(server: Server, tmp_path: Path) -> None:
    server.faults = [cut_after(300_000), without_ranges]
    assert get(server, tmp_path) == CONTENT
    assert [wanted for _, wanted in server.requests] == [None, "bytes=300000-"]


def test_a_server_that_always_breaks_off_at_one_place_is_given_up(server: Server, tmp_path: Path) -> None:
    server.faults = [cut_after(300_000, with_ranges=False)] * 9
    with pytest.raises(UserError, match=r"ended after 0\.3 of 1\.0 MB, after 4 tries; the first 0\.3 MB are kept"):
        get(server, tmp_path)
    assert len(server.requests) == 4 and not (tmp_path / "x.zip").exists()


def test_each_step_forward_starts_the_count_of_tries_anew(server: Server, tmp_path: Path) -> None:
    server.faults = [cut_after(100_000 * k) for k in range(1, 9)]
    assert get(server, tmp_path) == CONTENT and len(server.requests) == 9


def test_a_stalled_transfer_ends_in_time_and_its_part_is_kept(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "TIMEOUT", 0.3)
    server.faults = [stall_after(500_000)] * 9
    with pytest.raises(UserError, match=r"no data came for .* s, after 4 tries; the first 0\.5 MB are kept in .*part"):
        get(server, tmp_path)
    assert part_of(tmp_path).read_bytes() == CONTENT[:500_000]
    server.faults = []
    assert get(server, tmp_path) == CONTENT and server.requests[-1] == ("/x.zip", "bytes=500000-")


@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_busy_server_is_tried_again_after_a_pause(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(fetching, "PAUSES", (1.0, 5.0, 20.0))
    server.faults = [status(code), status(code, Retry_After="7"), status(code, Retry_After="100000")]
    assert get(server, tmp_path) == CONTENT
    assert pauses == [1, 7, fetching.MAX_PAUSE]
    server.faults, pauses[:] = [status(code)] * 9, []
    (tmp_path / "x.zip").unlink()
    with pytest.raises(UserError, match=f"the server answers {code} .*, after 4 tries. Run the same command"):
        get(server, tmp_path)
    assert pauses == [1, 5, 20]


def test_a_missing_page_is_named_at_once(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"/gone\.zip answers 404 Not Found"):
        get(server, tmp_path, MD5, server.url("/gone.zip"))
    assert len(server.requests) == 1


def test_a_server_that_is_not_there_is_named(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Connection refused.*, after 4 tries. Run the same command"):
        get(server, tmp_path, MD5, "http://127.0.0.1:9/x.zip")


def test_the_next_address_is_taken_where_one_fails_and_goes_on_with_the_part(server: Server, tmp_path: Path) -> None:
    server.files["/mirror.zip"] = CONTENT
    server.faults = [cut_after(300_000)] + [status(503)] * 4
    assert get(server, tmp_path, MD5, server.url(), server.url("/mirror.zip")) == CONTENT
    assert server.requests[-1] == ("/mirror.zip", "bytes=300000-")


# ---------------------------------------------------------------- wrong contents


@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/zip"])
def test_a_web_page_in_the_place_of_a_file_is_refused(server: Server, tmp_path: Path, kind: str) -> None:
    page = b"<!DOCTYPE html><title>Virus scan warning</title>"
    server.faults = [lambda answer, *_: answer.send(page, kind=kind)]
    with pytest.raises(UserError, match="web page"):
        get(server, tmp_path)
    assert not (tmp_path / "x.zip").exists() and not part_of(tmp_path).exists()


def test_a_web_page_does_not_cost_what_was_fetched_before(server: Server, tmp_path: Path) -> None:
    server.faults = [cut_after(300_000), lambda answer, *_: answer.send(b"<html>maintenance", kind="text/html")]
    with pytest.raises(UserError, match="sent a web page"):
        get(server, tmp_path)
    assert part_of(tmp_path).read_bytes() == CONTENT[:300_000]


def test_a_file_of_other_contents_is_refused_and_removed(server: Server, tmp_path: Path) -> None:
    server.files["/x.zip"] = CONTENT[:-1] + b"!"
    with pytest.raises(UserError, match=f"has the md5 .*, not {MD5}: it is not the published file and was removed"):
        get(server, tmp_path)
    assert not (tmp_path / "x.zip").exists() and not part_of(tmp_path).exists()
    assert len(server.requests) == 1


@pytest.mark.parametrize("size", [10, len(CONTENT), len(CONTENT) + 10])
def test_a_part_of_another_file_is_thrown_away(server: Server, tmp_path: Path, size: int) -> None:
    part_of(tmp_path).parent.mkdir()
    part_of(tmp_path).write_bytes(b"?" * size)
    assert get(server, tmp_path) == CONTENT
    assert server.requests == [("/x.zip", f"bytes={size}-"), ("/x.zip", None)]


def test_a_part_that_is_whole_already_is_taken(server: Server, tmp_path: Path) -> None:
    part_of(tmp_path).parent.mkdir()
    part_of(tmp_path).write_bytes(CONTENT)
    assert get(server, tmp_path) == CONTENT
    assert server.requests == [("/x.zip", f"bytes={len(CONTENT)}-")]  # answered by 416


def test_other_bytes_than_those_wanted_are_refused(server: Server, tmp_path: Path) -> None:
    def shifted(answer: Answer, content: bytes, start: int) -> None:
        answer.send(content, start + 1)

    server.faults = [cut_after(300_000), shifted]
    with pytest.raises(UserError, match="sent other bytes than those from 300000 on"):
        get(server, tmp_path)


# ---------------------------------------------------------------- redirects


@pytest.fixture
def encrypted(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A second server, with https and a certificate that is trusted during the test."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("openssl cannot make a certificate here")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    made = Server()
    made.socket = context.wrap_socket(made.socket, server_side=True)
    made.scheme = "https"
    yield made
    made.shutdown()


def test_a_redirect_to_another_host_is_followed_with_its_range(
    server: Server, encrypted: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = f"https://127.0.0.1:{encrypted.server_port}/moved.zip"
    encrypted.files["/moved.zip"] = CONTENT
    encrypted.faults = [cut_after(300_000)]
    server.faults = [status(302, Location=other)] * 2
    assert get(server, tmp_path) == CONTENT
    assert encrypted.requests == [("/moved.zip", None), ("/moved.zip", "bytes=300000-")]
    assert f"from {other}, from 0.3 MB on" in capsys.readouterr().out


def test_a_redirect_from_https_to_http_is_refused(server: Server, encrypted: Server, tmp_path: Path) -> None:
    encrypted.faults = [status(301, Location=server.url())]
    with pytest.raises(UserError, match=r"leads to http://.*, where nothing is encrypted: not followed"):
        get(encrypted, tmp_path)
    assert server.requests == [] and not (tmp_path / "x.zip").exists()


def test_a_certificate_that_nobody_vouches_for_is_refused(
    encrypted: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(UserError, match="CERTIFICATE_VERIFY_FAILED"):
        get(encrypted, tmp_path)
    assert encrypted.requests == []


# ---------------------------------------------------------------- disks and processes

PROGRAM = """
import resource, sys
from pathlib import Path
from preprocess import fetching
from preprocess.sources import Source
from utils import entry, progress
progress.set_up_logging()
address, md5, folder, limit = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
source = Source(("x.zip",), "", None, {"x.zip": md5}, {"x.zip": (address,)})
sys.exit(entry.run(lambda: fetching.fetch_file(source, Path(folder, "x.zip"))))
"""


def start(server: Server, folder: Path, limit: int = 0) -> subprocess.Popen[str]:
    """Fetch x.zip in a process of its own, which may write files of `limit` bytes only."""
    command = [sys.executable, "-c", PROGRAM, server.url(), MD5, str(folder), str(limit)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, env={**os.environ, "no_proxy": "*"})


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_disk_that_refuses_to_write_more_is_named_and_the_part_is_kept(server: Server, tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    process = start(server, tmp_path, limit=400_000)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in error
    assert f"cannot write {part_of(tmp_path)}: " in error and "File too large" in error and "continues" in error
    assert CONTENT.startswith(part_of(tmp_path).read_bytes())
    assert get(server, tmp_path) == CONTENT
    assert server.requests[-1][1] is not None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 400 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_too_small_is_named_before_the_transfer(server: Server, small_disk: Path) -> None:
    with pytest.raises(UserError, match=r"x\.zip takes 1\.0 MB more, of which 0\.4 MB are free in .*--dataset_dir"):
        get(server, small_disk)
    assert not part_of(small_disk).exists()


def test_a_disk_that_fills_up_meanwhile_is_named_and_the_part_is_kept(server: Server, small_disk: Path) -> None:
    server.faults = [without_length]
    with pytest.raises(UserError, match=r"cannot write .*No space left on device.*continues where this one ended"):
        get(server, small_disk)
    kept = part_of(small_disk).read_bytes()
    assert kept and CONTENT.startswith(kept)
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    assert get(server, small_disk) == CONTENT and server.requests[-1][1] == f"bytes={len(kept)}-"


def test_a_killed_process_leaves_a_part_and_the_next_one_goes_on(server: Server, tmp_path: Path) -> None:
    server.faults = [stall_after(600_000)]
    process = start(server, tmp_path)
    wait_for(lambda: part_of(tmp_path).exists() and part_of(tmp_path).stat().st_size == 600_000)
    process.kill()
    process.communicate()
    assert not (tmp_path / "x.zip").exists()
    assert get(server, tmp_path) == CONTENT
    assert [wanted for _, wanted in server.requests] == [None, "bytes=600000-"]


def test_two_processes_that_fetch_one_file_transfer_it_once(server: Server, tmp_path: Path) -> None:
    server.faults = [stall_after(600_000)]
    first = start(server, tmp_path)
    wait_for(lambda: part_of(tmp_path).exists())
    second = start(server, tmp_path)
    assert second.stdout is not None
    assert f"waiting for process {first.pid} on " in second.stdout.readline()
    first.kill()
    first.communicate()
    _, error = second.communicate(timeout=60)
    assert (second.returncode, error) == (0, "")
    assert (tmp_path / "x.zip").read_bytes() == CONTENT
    third = start(server, tmp_path)
    assert third.wait(60) == 0 and len(server.requests) == 2


# ---------------------------------------------------------------- from --download to the ready data set


def listing(server: Server, name: str, content: bytes) -> str:
    """Have the server offer a file as Zenodo does; return its address."""
    md5 = hashlib.md5(content).hexdigest()
    files = [{"key": "other.txt", "size": 1, "checksum": "md5:" + "0" * 32}]
    files.append({"key": name, "size": len(content), "checksum": f"md5:{md5}"})
    server.files |= {"/api/records/12": json.dumps({"files": files}).encode(), f"/records/12/files/{name}": content}
    return server.url(f"/records/12/files/{name}")


def test_one_command_fetches_and_prepares_cifar_fs_and_only_where_it_is_wanted(
    shared: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (shared / "data" / "cifar_fs_small.zip").read_bytes()
    address = listing(server, "cifar100.zip", content)
    found = declared("CIFAR_FS")
    sources = (found.sources[0]._replace(addresses={"cifar100.zip": (address,)}), found.sources[1])
    monkeypatch.setattr(cifar100, "DATA_SETS", (found._replace(sources=sources),))
    command = ["--datasets", "CIFAR-FS", "--dataset_dir", str(tmp_path)]
    assert main(command) == 2 and server.requests == []
    assert f"--datasets CIFAR_FS --dataset_dir {tmp_path} --download\n" in capsys.readouterr().err
    server.faults = [status(503), lambda answer, content, start: answer.send(content), cut_after(1_000_000)]
    assert main([*command, "--download"]) == 0
    assert "CIFAR_FS is ready: train 8 classes" in capsys.readouterr().out
    assert (tmp_path / "cifar100.zip").read_bytes() == content
    assert server.requests == [("/api/records/12", None)] * 2 + [
        ("/records/12/files/cifar100.zip", wanted) for wanted in (None, "bytes=1000000-")
    ]
    assert main([*command, "--download"]) == 0 and len(server.requests) == 4


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (b"<html>", "states no size and md5 of x.zip"),
        (b'{"files": []}', "states no size and md5 of x.zip"),
        (b"[1]", "states no size and md5 of x.zip"),
        (b'{"files": [{"key": "x.zip", "size": "?", "checksum": "md5:' + MD5.encode() + b'"}]}', "states no size"),
        (b'{"files": [{"key": "x.zip", "size": 9, "checksum": "sha1:00"}]}', "states no size and md5 of x.zip"),
        (
            b'{"files": [{"key": "x.zip", "size": 9, "checksum": "md5:' + MD5.encode() + b'"}]}',
            "1,024,000 bytes, not 9",
        ),
    ],
)
def test_a_record_that_is_no_list_or_lists_another_file_is_named(
    server: Server, tmp_path: Path, listed: bytes, message: str
) -> None:
    address = listing(server, "x.zip", CONTENT)
    server.files["/api/records/12"] = listed
    with pytest.raises(UserError, match=message):
        get(server, tmp_path, "", address)
    assert not (tmp_path / "x.zip").exists()


def a_data_set(*sources: tuple[str, tuple[str, ...]]) -> DataSet:
    declare = partial(Source, origin="", pictures=lambda _: ())
    made = [
        declare((file,), md5={file: MD5}, addresses={file: addresses} if addresses else {})
        for file, addresses in sources
    ]
    return DataSet("x", tuple(made))


def test_the_next_form_is_fetched_where_one_fails_and_all_reasons_are_stated(server: Server, tmp_path: Path) -> None:
    forms = [("by_hand.zip", ()), ("a.zip", (server.url("/a"),)), ("x.zip", (server.url("/x.zip"),))]
    fetching.fetch(a_data_set(*forms), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [fetching.FOLDER, "x.zip"]
    server.requests.clear()
    fetching.fetch(a_data_set(*forms), tmp_path)  # one form is there
    (tmp_path / "x.zip").unlink()
    (tmp_path / "a.zip").symlink_to("nowhere")  # the error about it comes from elsewhere
    fetching.fetch(a_data_set(*forms), tmp_path)
    assert server.requests == []
    (tmp_path / "a.zip").unlink()
    with pytest.raises(UserError, match=r"(?s)x could not be fetched\..*/a answers 404.*/b answers 404"):
        fetching.fetch(a_data_set(forms[1], ("b.zip", (server.url("/b"),))), tmp_path)


def test_download_and_from_folder_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--datasets", "x", "--download", "--from_folder", str(tmp_path), "--split", "0.6", "0.2", "0.2"]
    assert main(command) == 2
    assert "leave one of them out" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in KNOWN if not declared(name).is_built_in])
def test_every_published_data_set_can_be_fetched_encrypted_and_checked(name: str) -> None:
    sources = [source for source in declared(name).sources if source.addresses]
    assert sources
    for source in sources:
        assert set(source.addresses) == set(source.needs)
        for file, addresses in source.addresses.items():
            for address in addresses:
                assert address.startswith("https://")
                assert file in source.md5 or fetching.RECORD.fullmatch(address)  # its md5 is known, or listed there


def test_the_document_names_every_address() -> None:
    document = (ROOT / "docs" / "data.md").read_text()
    modules = {known.module for known in KNOWN.values()}
    for data_set in (found for module in modules for found in import_module(f"preprocess.{module}").DATA_SETS):
        for address in {each for source in data_set.sources for found in source.addresses.values() for each in found}:
            assert address.rpartition("/")[0] in document
