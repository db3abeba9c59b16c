"""Which failures are logged: enough to see an incident, and never a line per request."""

from proxy.telemetry.incidents import MAX_REASONS, IncidentLog


def test_the_start_and_the_end_of_an_incident_are_logged_once() -> None:
    incidents = IncidentLog()
    assert [incidents.opened("store_proxy", "late", now) for now in range(3)] == [True, False, False]
    assert [incidents.closed("store_proxy", now) for now in range(3, 6)] == [True, False, False]
    assert incidents.opened("store_proxy", "late", 6)


def test_reasons_that_alternate_are_logged_once_each() -> None:
    incidents = IncidentLog()
    said = [incidents.opened("store_proxy", reason, 0) for reason in ["late", "torn"] * 3]
    assert said == [True, True, False, False, False, False]


def test_the_number_of_logged_reasons_is_limited() -> None:
    incidents = IncidentLog()
    assert sum(incidents.opened("store_proxy", f"reason {number}", 0) for number in range(100)) == MAX_REASONS


def test_each_part_has_its_own_incident() -> None:
    incidents = IncidentLog(quiet_s=10)
    assert incidents.opened("one", "late", 0)
    assert incidents.closed("one", 1)
    assert incidents.opened("other", "late", 2)
    assert not incidents.closed("third", 3)


def test_an_incident_that_comes_and_goes_is_logged_rarely() -> None:
    incidents = IncidentLog(quiet_s=10)
    said = [
        (incidents.opened("store_proxy", "late", now), incidents.closed("store_proxy", now + 0.5)) for now in range(100)
    ]
    assert said.count((True, True)) == 10
    assert said.count((False, False)) == 90


def test_an_incident_that_comes_back_and_lasts_is_logged_after_the_quiet_time() -> None:
    incidents = IncidentLog(quiet_s=10)
    assert incidents.opened("store_proxy", "late", 0)
    assert incidents.closed("store_proxy", 1)
    assert [now for now in range(2, 20) if incidents.opened("store_proxy", "late", now)] == [11]
    assert incidents.closed("store_proxy", 20)
