"""`Cache-Control` of requests: the examples of RFC 9111, all spellings, and what is not a directive."""

from time import perf_counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cache.prices import Balance, Lookup, Price, StoredPrice
from proxy.gateway.freshness import MAX_SECONDS, Directives, Serve, StaleLimits, choose, parse_directives
from proxy.problems import BadRequest, Code

NOTHING = Directives()
NO_CACHE, NO_STORE, SILENT = Directives(no_cache=True), Directives(no_store=True), Directives(only_if_cached=True)

READ = {
    # RFC 9111 §5.2.1
    "max-age=10": Directives(max_age_s=10),
    "max-stale=10": NOTHING,
    "min-fresh=20": NOTHING,
    "no-cache": NO_CACHE,
    "no-store": NO_STORE,
    "no-transform": NOTHING,
    "only-if-cached": SILENT,
    # as browsers and clients send them
    "max-age=0": Directives(max_age_s=0),
    "no-cache, no-store, max-age=0, must-revalidate": Directives(no_cache=True, no_store=True, max_age_s=0),
    "max-age=60, only-if-cached": Directives(only_if_cached=True, max_age_s=60),
    "max-age=60,only-if-cached": Directives(only_if_cached=True, max_age_s=60),
    "only-if-cached, max-stale=60": SILENT,
    "private, community=UCI": NOTHING,  # §5.2.3
    # case, space, empty members (RFC 9110 §5.6.1)
    "No-Cache, NO-STORE, Only-If-Cached, MAX-AGE=7": Directives(
        no_cache=True, no_store=True, only_if_cached=True, max_age_s=7
    ),
    "": NOTHING,
    " ": NOTHING,
    ",": NOTHING,
    ", ,,no-cache, ,": NO_CACHE,
    "\tno-cache\t,\tno-store ": Directives(no_cache=True, no_store=True),
    " max-age=5 ": Directives(max_age_s=5),
    "max-age = 5": Directives(max_age_s=5),
    # quoted strings: both forms are accepted, and a comma in a string separates nothing
    'max-age="5"': Directives(max_age_s=5),
    'max-age="5", no-store': Directives(no_store=True, max_age_s=5),
    'no-cache="x, y"': NO_CACHE,
    'no-cache="x, y", max-age=5': Directives(no_cache=True, max_age_s=5),
    'no-cache="no-store, only-if-cached"': NO_CACHE,
    'x="no-cache, no-store"': NOTHING,
    'x="no-cache, no-store", only-if-cached': SILENT,
    r'x="a\", no-cache, \"b", no-store': NO_STORE,
    r'x="a\\", no-cache': NO_CACHE,
    'x="max-age=y, z"': NOTHING,
    '"no-cache"': NOTHING,
    '"a, no-cache, b"': NOTHING,
    'x="': NOTHING,
    'x="no end, no-cache': NOTHING,
    'no-store, x="no end, no-cache': NO_STORE,
    'x="no end\\': NOTHING,
    # arguments that are ignored
    "no-cache=": NO_CACHE,
    "no-cache=0": NO_CACHE,
    "no-store=false": NO_STORE,
    "only-if-cached=x=y": SILENT,
    # other directives, and what only looks like a directive
    "no-cachet": NOTHING,
    "xno-cache": NOTHING,
    "no-cache-please": NOTHING,
    "no cache": NOTHING,
    "no_cache": NOTHING,
    "no-cache;no-store": NOTHING,
    "s-maxage=5": NOTHING,
    "x-max-age=y": NOTHING,
    "max-ages=y": NOTHING,
    "=": NOTHING,
    "=no-cache": NOTHING,
    "x=no-cache": NOTHING,
    "\xa0no-cache": NOTHING,  # not white space in HTTP
    "n\xf6-cache": NOTHING,
    # the first of repeated directives counts (RFC 9111 §4.2.1)
    "max-age=5, max-age=9": Directives(max_age_s=5),
    "max-age=9, max-age=5": Directives(max_age_s=9),
    "max-age=9, Max-Age=x": Directives(max_age_s=9),
    "no-cache, no-cache": NO_CACHE,
    # numbers (RFC 9111 §1.2.2)
    "max-age=007": Directives(max_age_s=7),
    "max-age=" + "0" * 50: Directives(max_age_s=0),
    "max-age=" + "0" * 50 + "5": Directives(max_age_s=5),
    "max-age=2147483647": Directives(max_age_s=2**31 - 1),
    "max-age=2147483648": Directives(max_age_s=2**31),
    "max-age=2147483649": Directives(max_age_s=2**31),
    "max-age=10000000000": Directives(max_age_s=2**31),
    "max-age=" + "1" + "0" * 60: Directives(max_age_s=2**31),
    "max-age=" + "9" * 5000: Directives(max_age_s=2**31),
}

MALFORMED = [
    "max-age",
    "max-age=",
    "max-age= ",
    'max-age=""',
    'max-age="',
    'max-age="5',
    'max-age=5"',
    'max-age=""5""',
    'max-age="5"5',
    'max-age=" 5"',
    'max-age="5, 6"',
    "max-age='5'",
    "max-age=-1",
    "max-age=+1",
    "max-age=1.5",
    "max-age=1e3",
    "max-age=0x5",
    "max-age=1_000",
    "max-age=5 6",
    "max-age=5;x",
    "max-age==5",
    "max-age=5=5",
    "max-age=soon",
    "max-age=\xb2",
    "max-age=5\xa0",
    "max-age=\u0661",
    "MAX-AGE=x",
    "max-age,no-cache",
    "max-age=x, max-age=5",
    "no-store, max-age=x",
    "max-age=" + "9" * 5000 + "x",
]


@pytest.mark.parametrize(("value", "directives"), READ.items(), ids=[value[:40] for value in READ])
def test_a_header_is_parsed(value: str, directives: Directives) -> None:
    assert parse_directives(value) == directives


@pytest.mark.parametrize("value", MALFORMED, ids=[value[:40] for value in MALFORMED])
def test_a_max_age_that_is_not_a_number_is_refused(value: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_directives(value)
    assert caught.value.problem.code is Code.INVALID_REQUEST
    assert "max-age must be a whole number" in caught.value.problem.detail


@pytest.mark.parametrize(
    ("directives", "age_s", "accepted"),
    [
        (NOTHING, 1e9, True),
        (Directives(max_age_s=0), 0.0, True),
        (Directives(max_age_s=0), 0.001, False),
        (Directives(max_age_s=5), 5.0, True),
        (Directives(max_age_s=5), 5.001, False),
    ],
)
def test_ages_up_to_max_age_are_accepted(directives: Directives, age_s: float, accepted: bool) -> None:  # noqa: FBT001 -- a row of a table
    stored = StoredPrice(Price(b"5", b""), age_s, 1.0, b"")
    choice = choose(Lookup(stored, Balance(b"20", 0.0), 1), directives, StaleLimits(0, 0))
    assert isinstance(choice, Serve) is accepted


def test_no_cache_and_no_store_bypass_the_cache() -> None:
    assert [directives.bypasses_cache for directives in (NOTHING, SILENT, NO_CACHE, NO_STORE)] == [
        False,
        False,
        True,
        True,
    ]
    assert not Directives(max_age_s=0).bypasses_cache


def spelled(name: str) -> st.SearchStrategy[str]:
    return st.lists(st.booleans(), min_size=len(name), max_size=len(name)).map(
        lambda capitals: "".join(c.upper() if capital else c for c, capital in zip(name, capitals, strict=True))
    )


quoted = st.text(st.sampled_from('no-cache,max-age=x "\\'), max_size=12).map(
    lambda text: '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
)
others = st.builds("{}={}".format, st.sampled_from(["x", "max-stale", "community", "no-cachet"]), quoted)
spaces = st.text(" \t", max_size=2)


@given(
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.none() | st.integers(0, 2**40),
    st.lists(others | st.just("") | st.just("no-transform"), max_size=4),
    st.data(),
)
def test_any_spelling_is_parsed(
    no_cache: bool,  # noqa: FBT001 -- hypothesis passes them by position
    no_store: bool,  # noqa: FBT001
    silent: bool,  # noqa: FBT001
    max_age_s: int | None,
    ignored: list[str],
    data: st.DataObject,
) -> None:
    flags = {"no-cache": no_cache, "no-store": no_store, "only-if-cached": silent}
    members = [data.draw(spelled(name)) for name, wanted in flags.items() if wanted] + ignored
    if max_age_s is not None:
        number = data.draw(st.sampled_from(["{}", "0{}", '"{}"'])).format(max_age_s)
        members.append(data.draw(spelled("max-age")) + "=" + number)
    spaced = [data.draw(spaces) + member + data.draw(spaces) for member in data.draw(st.permutations(members))]
    expected = Directives(no_cache, no_store, silent, None if max_age_s is None else min(max_age_s, MAX_SECONDS))
    assert parse_directives(",".join(spaced)) == expected


@given(st.lists(st.sampled_from(list(READ) + MALFORMED), max_size=3), st.text(max_size=20))
def test_any_text_is_parsed_or_refused(values: list[str], more: str) -> None:
    """Repeated headers are joined by commas (RFC 9110 §5.3)."""
    try:
        directives = parse_directives(", ".join([*values, more]))
    except BadRequest:
        directives = NOTHING
    assert directives.max_age_s is None or 0 <= directives.max_age_s <= MAX_SECONDS


@pytest.mark.parametrize("piece", ['"', '\\"', '="\\', ",", "a=", '"",', " ", "0"])
def test_a_long_header_is_parsed_quickly(piece: str) -> None:
    started = perf_counter()
    parse_directives(f"x{piece * 60_000}")
    assert perf_counter() - started < 1
