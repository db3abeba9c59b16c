"""The queue of log lines: no caller waits for the reader, dropped lines are counted, no line is torn."""

import os
import select
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic

import pytest

from proxy.telemetry.log_writer import MAX_LINES, LogWriter
from serving import wait_until

WAIT_S = 10.0


class Pipe:
    """A pipe that is only read when a test calls `read`."""

    def __init__(self, flags: int = 0) -> None:
        self.reader, self.writer = os.pipe2(flags)

    def read(self) -> bytes:
        assert select.select([self.reader], [], [], WAIT_S)[0], "nothing arrives"
        return os.read(self.reader, 2**20)

    def lines_until(self, end: bytes) -> list[bytes]:
        """Reads lines up to one that ends with `end`."""
        text = b""
        while not text.endswith(end + b"\n"):
            text += self.read()
        return text.splitlines()

    @property
    def is_full(self) -> bool:
        return not select.select([], [self.writer], [], 0)[1]

    def close_reader(self) -> None:
        os.close(self.reader)
        self.reader = -1

    def close(self) -> None:
        """Its writer may run on for a while, and must not write into the next file with the same descriptor."""
        if self.reader >= 0:
            os.close(self.reader)
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), self.writer)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    opened = Pipe()
    yield opened
    opened.close()


def writing_to(fd: int) -> LogWriter[str]:
    return LogWriter(fd, str.encode, "{} missing\n".format)


def stalled(pipe: Pipe) -> tuple[LogWriter[str], int]:
    """Returns a writer that waits for the reader of a full pipe, and the number of lines it got."""
    writer = writing_to(pipe.writer)
    count = 0
    while not pipe.is_full:
        for _ in range(1000):
            writer.write(f"{count}\n")
            count += 1
        wait_until(lambda: pipe.is_full or writer._idle)
    return writer, count


def test_a_single_line_is_written_at_once(pipe: Pipe) -> None:
    writer = writing_to(pipe.writer)
    took_s = []
    for _ in range(5):
        began = monotonic()
        writer.write("alone\n")
        assert pipe.read() == b"alone\n"
        took_s.append(monotonic() - began)
    assert min(took_s) < 0.1


def test_lines_are_written_whole_in_order_and_in_batches() -> None:
    packets = Pipe(os.O_DIRECT)  # one read returns the bytes of one write
    writer = writing_to(packets.writer)
    given = [f"{number} {'x' * (number % 300)}\n".encode() for number in range(2000)]
    for line in given:
        writer.write(line)
    came: list[bytes] = []
    while sum(map(len, came)) < sum(map(len, given)):
        came.append(packets.read())
    packets.close()
    assert b"".join(came) == b"".join(given)
    assert {packet[-1:] for packet in came} == {b"\n"}
    assert max(map(len, came)) <= select.PIPE_BUF
    assert len(came) < len(given) / 10


def test_a_line_longer_than_a_batch_is_written_on_its_own(pipe: Pipe) -> None:
    writer = writing_to(pipe.writer)
    for line in ("before\n", "x" * 10_000 + "\n", "after\n"):
        writer.write(line)
    assert pipe.lines_until(b"after") == [b"before", b"x" * 10_000, b"after"]


def test_lines_that_do_not_fit_are_dropped_counted_and_replaced_by_one_line(pipe: Pipe) -> None:
    writer, count = stalled(pipe)
    began = monotonic()
    for number in range(count, count + 3 * MAX_LINES):
        writer.write(f"{number}\n")
    assert monotonic() - began < WAIT_S, "write never blocks"
    assert len(writer._queue) <= MAX_LINES
    before = pipe.lines_until(b" missing")
    writer.write("end\n")
    assert pipe.lines_until(b"end") == [b"end"], "one line says so"
    dropped = writer.take_dropped()
    assert before.pop() == f"{dropped} missing".encode()
    assert before == [b"%d" % number for number in range(len(before))]
    assert len(before) + dropped == count + 3 * MAX_LINES
    assert dropped > MAX_LINES
    assert writer.take_dropped() == 0


def test_each_gap_has_its_own_line(pipe: Pipe) -> None:
    writer = writing_to(pipe.writer)
    for gap in range(3):
        while not (lost := writer.take_dropped()):
            for _ in range(1000):
                writer.write(f"gap {gap}\n")
        *lines, last = pipe.lines_until(b" missing")
        lost += writer.take_dropped()
        assert last == f"{lost} missing".encode()
        assert set(lines) == {f"gap {gap}".encode()}


def test_with_many_threads_every_lost_line_is_counted(pipe: Pipe) -> None:
    writer, count = stalled(pipe)
    names = range(4)

    def write(name: int) -> None:
        for number in range(MAX_LINES):
            writer.write(f"{name}-{number}\n")

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, names))
    *lines, last = pipe.lines_until(b" missing")
    dropped = writer.take_dropped()
    assert last == f"{dropped} missing".encode()
    assert len(lines) + dropped == count + len(names) * MAX_LINES
    for name in names:
        own = [line for line in lines if line.startswith(f"{name}-".encode())]
        assert own == [f"{name}-{number}".encode() for number in range(len(own))]


def test_flush_waits_for_the_last_line_but_not_for_a_reader_that_has_stalled(pipe: Pipe) -> None:
    writer = writing_to(pipe.writer)
    for number in range(1000):
        writer.write(f"{number}\n")
    writer.flush(WAIT_S)
    assert pipe.read() == b"".join(b"%d\n" % number for number in range(1000))
    writer, _ = stalled(pipe)
    began = monotonic()
    writer.flush(0.1)
    assert 0.1 <= monotonic() - began < WAIT_S / 2


def test_a_closed_pipe_is_not_retried_for_each_line(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = []
    write = os.write

    def noted(fd: int, data: bytes) -> int:
        writes.append(fd)
        return write(fd, data)

    monkeypatch.setattr(os, "write", noted)
    writer = writing_to(pipe.writer)
    pipe.close_reader()
    writer.write("first\n")
    writer.flush(WAIT_S)
    for _ in range(1000):
        writer.write("another\n")
    writer.flush(WAIT_S)
    assert writes.count(pipe.writer) == 1
    assert writer.take_dropped() == 1001


def test_nothing_is_lost_if_another_process_makes_the_pipe_non_blocking(pipe: Pipe) -> None:
    os.set_blocking(pipe.writer, False)
    writer, count = stalled(pipe)
    writer.write("end\n")
    assert pipe.lines_until(b"end") == [*(b"%d" % number for number in range(count)), b"end"]
    assert writer.take_dropped() == 0


def test_a_line_that_cannot_be_encoded_drops_only_itself(pipe: Pipe) -> None:
    writer = writing_to(pipe.writer)
    for line in ("before\n", "\ud800\n"):
        writer.write(line)
    assert pipe.lines_until(b"1 missing") == [b"before", b"1 missing"]
    writer.write("after\n")
    assert pipe.lines_until(b"after") == [b"after"]
    assert writer.take_dropped() == 1


FULL_DISK = """
import os, resource, sys, time
from proxy.telemetry.log_writer import LogWriter
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
writer = LogWriter(fd, str.encode, "{} missing\\n".format)
resource.setrlimit(resource.RLIMIT_FSIZE, (25, resource.RLIM_INFINITY))
for number in range(10):
    writer.write(f"line {number}\\n")
writer.flush(10)
assert writer.take_dropped() == 7
writer.write("lost too\\n")
writer.flush(10)
assert os.fstat(fd).st_size == 25
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
while os.fstat(fd).st_size == 25:
    time.sleep(0.01)
writer.write("there is room\\n")
writer.flush(10)
"""
"""A file that takes 25 bytes, and later more, simulates a disk that is full for a while."""


def run(program: str, *args: object) -> None:
    subprocess.run([sys.executable, "-c", program, *map(str, args)], check=True, timeout=60)


def test_after_a_full_disk_has_room_again_writing_goes_on_in_a_new_line(tmp_path: Path) -> None:
    run(FULL_DISK, tmp_path / "log")
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines == ["line 0", "line 1", "line 2", "line", "8 missing", "there is room"]


SHARED = """
import sys
from proxy.telemetry.log_writer import LogWriter
writer = LogWriter(1, str.encode, "{} missing\\n".format)
for number in range(5000):
    writer.write(sys.argv[1] * (number % 300) + f" {sys.argv[1]}{number}\\n")
writer.flush(30)
"""


def test_processes_that_share_a_pipe_do_not_tear_each_others_lines(pipe: Pipe) -> None:
    names = "abc"
    started = [subprocess.Popen([sys.executable, "-c", SHARED, name], stdout=pipe.writer) for name in names]
    text = b""
    while text.count(b"\n") < 5000 * len(names):
        text += pipe.read()
    assert [process.wait() for process in started] == [0] * len(names)
    lines = text.decode().splitlines()
    for name in names:
        own = [line for line in lines if f" {name}" in line]
        assert own == [name * (number % 300) + f" {name}{number}" for number in range(5000)]


INTERRUPTED = """
import signal
from proxy.telemetry.log_writer import LogWriter
writer = LogWriter(1, str.encode, "{} missing\\n".format)
signal.signal(signal.SIGALRM, lambda *_: writer.write("interrupts\\n"))
signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
for number in range(20_000):
    writer.write("written\\n")
    if number % 1000 == 0:
        writer.flush(30)
signal.setitimer(signal.ITIMER_REAL, 0)
writer.flush(30)
"""


def test_a_signal_handler_or_finalizer_may_log_while_its_thread_logs() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], check=True, timeout=60, stdout=subprocess.PIPE, text=True
    )
    lines = done.stdout.splitlines()
    assert lines.count("written") == 20_000
    assert lines.count("interrupts") > 0
    assert set(lines) == {"written", "interrupts"}
