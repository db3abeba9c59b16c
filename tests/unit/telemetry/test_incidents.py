"""What is said of a trouble: enough to see it, and never a line a request."""

from proxy.telemetry.incidents import MAX_REASONS, IncidentLog


def test_it_is_said_once_and_so_is_its_end() -> None:
    troubles = IncidentLog()
    assert [troubles.begins("way", "late", now) for now in range(3)] == [True, False, False]
    assert [troubles.ends("way", now) for now in range(3, 6)] == [True, False, False]
    assert troubles.begins("way", "late", 6)


def test_reasons_that_take_turns_are_said_once_each() -> None:
    troubles = IncidentLog()
    said = [troubles.begins("way", reason, 0) for reason in ["late", "torn"] * 3]
    assert said == [True, True, False, False, False, False]


def test_reasons_without_end_are_not() -> None:
    troubles = IncidentLog()
    assert sum(troubles.begins("way", f"reason {number}", 0) for number in range(100)) == MAX_REASONS


def test_parts_have_troubles_of_their_own() -> None:
    troubles = IncidentLog(quiet_s=10)
    assert troubles.begins("one", "late", 0)
    assert troubles.ends("one", 1)
    assert troubles.begins("other", "late", 2)
    assert not troubles.ends("third", 3)


def test_what_comes_and_goes_is_said_seldom() -> None:
    troubles = IncidentLog(quiet_s=10)
    said = [(troubles.begins("way", "late", now), troubles.ends("way", now + 0.5)) for now in range(100)]
    assert said.count((True, True)) == 10
    assert said.count((False, False)) == 90


def test_what_comes_back_and_stays_is_said_when_the_quiet_is_over() -> None:
    troubles = IncidentLog(quiet_s=10)
    assert troubles.begins("way", "late", 0)
    assert troubles.ends("way", 1)
    assert [now for now in range(2, 20) if troubles.begins("way", "late", now)] == [11]
    assert troubles.ends("way", 20)
