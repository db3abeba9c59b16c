"""Connections to upstream in small pools."""

import asyncio

import httpx2
import pytest

from proxy.lanes import MAX_LANE_CONNECTIONS, Lanes

FULL = MAX_LANE_CONNECTIONS


def lanes(max_connections: int) -> tuple[Lanes, list[int]]:
    """Lanes, and how many connections each may have."""
    sizes: list[int] = []

    def make(size: int) -> httpx2.AsyncHTTPTransport:
        sizes.append(size)
        return httpx2.AsyncHTTPTransport(verify=False, trust_env=False)

    return Lanes(max_connections, make), sizes


@pytest.mark.parametrize(
    ("max_connections", "sizes"), [(1, [1]), (FULL, [FULL]), (FULL + 1, [FULL, 1]), (3 * FULL, [FULL] * 3)]
)
def test_all_connections_are_there_in_lanes(max_connections: int, sizes: list[int]) -> None:
    assert lanes(max_connections)[1] == sizes


def test_one_lane_is_filled_after_the_other_and_then_the_freest_has_the_queue() -> None:
    road, _ = lanes(FULL + 2)
    entered = [road.one() for _ in range(FULL + 4)]
    taken = [lane.__enter__() for lane in entered]
    first, second = taken[0], taken[FULL]
    assert taken == [first] * FULL + [second] * 2 + [first, second]
    entered[0].__exit__(None, None, None)
    entered[1].__exit__(None, None, None)
    with road.one() as transport:
        assert transport is first, "there is room in it again"
    for lane in entered[2:]:
        lane.__exit__(None, None, None)


def test_an_exchange_that_fails_leaves_its_place() -> None:
    road, _ = lanes(1)
    for _ in range(3):
        with pytest.raises(httpx2.ConnectError), road.one():
            raise httpx2.ConnectError("nobody is there")
    assert [lane.room for lane in road._lanes] == [1]
    asyncio.run(road.close())
