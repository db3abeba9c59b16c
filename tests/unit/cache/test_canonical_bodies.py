"""Canonical bodies: invalid bodies, valid ones at the limits, and generated ones compared with a strict parser."""

import re
from random import Random
from string import hexdigits

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bodies import BODIES, Body, respell
from canonical_model import MAX, MIN, strict_reading
from examples import examples
from json_values import chances
from proxy.cache.canonical import canonicalise
from proxy.problems import BadRequest, Code, Problem

SAMPLE = '[{"prompt":{"positive":"caf\\u00e9 \\ud83d\\ude00 ö"},"seed":-12.50e+1,"n":[true,false,null,{}]}]'.encode()


def check_refusal(problem: Problem) -> None:
    assert problem.code is Code.INVALID_BODY
    assert re.fullmatch(r"The (body|item at index \d+) .{10,200}\.", problem.detail)
    assert problem.detail.isprintable()


def canonical_of(raw: bytes) -> bytes | None:
    """The canonical bytes of `raw`; None if it is refused with a correct problem. Anything else fails the test."""
    try:
        canonical = canonicalise(raw)
    except BadRequest as refusal:
        check_refusal(refusal.problem)
        return None
    assert canonicalise(canonical) == canonical
    return canonical


# --- invalid bodies, and valid ones at the limits --------------------------------------------------------------


def nested_arrays(depth: int) -> bytes:
    """A body with `depth` levels, including its own array and the item in it."""
    return b'[{"a":' + b"[" * (depth - 2) + b"]" * (depth - 2) + b"}]"


def nested_objects(depth: int) -> bytes:
    return b"[" + b'{"a":' * (depth - 1) + b"0" + b"}" * (depth - 1) + b"]"


def with_number(number: str) -> bytes:
    return b'[{"a":%s}]' % number.encode()


@pytest.mark.parametrize("raw", [b"", b" ", b" \t\r\n"])
def test_an_empty_body_is_named_as_such(raw: bytes) -> None:
    with pytest.raises(BadRequest, match="The body is empty: send a JSON array"):
        canonicalise(raw)


REFUSED = {
    "nothing": b"",
    "white space only": b" \t\r\n",
    "an empty array": b"[]",
    "an object": b"{}",
    "a number": b"7",
    "a string": b'"x"',
    "an empty string": b'""',
    "null": b"null",
    "an array of a number": b"[1]",
    "an array of null": b"[null]",
    "an array of an array": b"[[]]",
    "an object and a number": b"[{},1]",
    "an object in an object": b'{"a":[{}]}',
    "NaN": with_number("NaN"),
    "Infinity": with_number("Infinity"),
    "-Infinity": with_number("-Infinity"),
    "NaN as an item": b"[NaN]",
    "1e400": with_number("1e400"),
    "-1e400": with_number("-1e400"),
    "1e400, hidden": b'[{"a":1e400,"a":1}]',
    "2**64": with_number(str(2**64)),
    "2**64 in an inner array": b'[{"a":[[18446744073709551616]]}]',
    "2**64 as a double": with_number("18446744073709551616.0"),
    "2**64 - 1 as a double, which is 2**64": with_number("18446744073709551615.0"),
    "-2**63 - 1": with_number(str(-(2**63) - 1)),
    "-2**63 - 1 in a body with a string": b'[{"\\"a":"\\\\","b":[0,-9223372036854775809]}]',
    "-2**63 - 1 after one that is hidden": b'[{"a":-9223372036854775809,"a":-9223372036854775809}]',
    "-2**63 - 1024, the last that a double takes for -2**63": with_number(str(-(2**63) - 1024)),
    "-2**63 - 1025": with_number(str(-(2**63) - 1025)),
    "-2**63 - 2048 as a double": with_number("-9223372036854777856.0"),
    "1e19 is below 2**64, 1e20 is not": with_number("1e20"),
    "400 digits": with_number("9" * 400),
    "5000 digits": with_number("9" * 5000),
    "5000 digits, hidden": b'[{"a":' + b"9" * 5000 + b',"a":1}]',
    "300 digits": with_number("9" * 300),
    "1.7e308": with_number("1.7e308"),
    "a high surrogate alone": rb'[{"a":"\ud800"}]',
    "a low surrogate alone": rb'[{"a":"\udc00"}]',
    "two high surrogates": rb'[{"a":"\ud83d\ud83d"}]',
    "surrogates the wrong way round": rb'[{"a":"\ude00\ud83d"}]',
    "a surrogate alone in a name": rb'[{"\ud800":1}]',
    "a surrogate alone, hidden": rb'[{"a":"\ud800","a":1}]',
    "a raw surrogate": b'[{"a":"\xed\xa0\x80"}]',
    "a raw pair of surrogates (CESU-8)": b'[{"a":"\xed\xa0\xbd\xed\xb8\x80"}]',
    "Latin-1": '[{"a":"é"}]'.encode("latin-1"),
    "an overlong form": b'[{"a":"\xc0\xaf"}]',
    "beyond Unicode": b'[{"a":"\xf4\x90\x80\x80"}]',
    "half a character": b'[{"a":"\xe2\x82"}]',
    "a byte order mark": b"\xef\xbb\xbf[{}]",
    "UTF-16": "[{}]".encode("utf-16"),
    "UTF-16, little-endian": "[{}]".encode("utf-16-le"),
    "UTF-32": "[{}]".encode("utf-32"),
    "100,000 brackets": b"[" * 100_000,
    "100,000 brackets, closed": b"[" * 100_000 + b"]" * 100_000,
    "100,000 objects": b'[{"a":' * 100_000,
    "50,000 brackets in a member": nested_arrays(50_000),
    "33 levels of arrays": nested_arrays(33),
    "33 levels of objects": nested_objects(33),
    "800 levels": nested_objects(800),
    "something after it": b"[{}] x",
    "a second body": b"[{}][{}]",
    "NUL after it": b"[{}]\0",
    "NUL in a string": b'[{"a":"\0"}]',
    "a line feed in a string": b'[{"a":"\n"}]',
    "a tab in a string": b'[{"a":"\t"}]',
    "U+001F in a name": b'[{"\x1f":1}]',
    "a vertical tab before it": b"\x0b[{}]",
    "a no-break space before it": "\u00a0[{}]".encode(),
    "single quotes": b"[{'a':1}]",
    "no quotes": b"[{a:1}]",
    "a comment": b"[{}/* */]",
    "a line comment": b"[{}] // so",
    "a comma after the last item": b"[{},]",
    "a comma after the last member": b'[{"a":1,}]',
    "two commas": b'[{"a":1,,"b":2}]',
    "no comma": b"[{}{}]",
    "no colon": b'[{"a" 1}]',
    "no value": b'[{"a":}]',
    "no name": b"[{:1}]",
    "a number for a name": b"[{1:1}]",
    "an unknown escape": rb'[{"a":"\x41"}]',
    "a short escape": rb'[{"a":"\u41"}]',
    "an escape of other letters": rb'[{"a":"\u00g0"}]',
    "a leading zero": with_number("01"),
    "a leading zero behind a sign": with_number("-01"),
    "a plus": with_number("+1"),
    "a sign alone": with_number("-"),
    "no digit before the point": with_number(".5"),
    "no digit after the point": with_number("1."),
    "no digit in the exponent": with_number("1e"),
    "hexadecimal": with_number("0x10"),
    "other digits": with_number("\u0661"),
    "a capital": with_number("True"),
    "Python's None": with_number("None"),
    "undefined": with_number("undefined"),
}

READ = {
    "white space around it": (b" \t\r\n[ {\n} ]\n", b"[{}]"),
    "2**64 - 1": (with_number(str(MAX)), with_number(str(MAX))),
    "-2**63": (with_number(str(MIN)), with_number(str(MIN))),
    "-2**63 as a double": (with_number("-9223372036854775808.0"), with_number(str(MIN))),
    "-2**63 with an exponent": (with_number("-9223372036854775808e0"), with_number(str(MIN))),
    "-2**63 from below, as a double": (with_number("-9223372036854775809.0"), with_number(str(MIN))),
    "-2**63 from below, with an exponent": (with_number("-9223372036854775809E0"), with_number(str(MIN))),
    "-2**63 - 1 in a string": (b'[{"a":"-9223372036854775809"}]', b'[{"a":"-9223372036854775809"}]'),
    "-2**63 - 1 behind a quote": (rb'[{"a":"\",-9223372036854775809,\\"}]', rb'[{"a":"\",-9223372036854775809,\\"}]'),
    "-2**63 - 1 as an exponent": (with_number("1e-9223372036854775809"), with_number("0")),
    "-2**63 - 1, hidden": (b'[{"a":-9223372036854775809,"a":1}]', b'[{"a":1}]'),
    "2**64, hidden": (b'[{"a":18446744073709551616,"a":1}]', b'[{"a":1}]'),
    "1e19": (with_number("1e19"), with_number("10000000000000000000")),
    "2**53 + 1": (with_number("9007199254740993"), with_number("9007199254740993")),
    "2**53 + 1 as a double": (with_number("9007199254740993.0"), with_number("9007199254740992")),
    "300 digits that an exponent takes back": (with_number("1" + "0" * 300 + "e-300"), with_number("1")),
    "an underflow": (with_number("-1e-400"), with_number("0")),
    "the smallest double": (with_number("4.94e-324"), with_number("5e-324")),
    "-0": (with_number("-0"), with_number("0")),
    "-0.0": (with_number("-0.0"), with_number("0")),
    "0 with a vast exponent": (with_number("0e99999999999999999999"), with_number("0")),
    "0.1 at length": (with_number("0.1000000000000000055511151231257827"), with_number("0.1")),
    "1e-5": (with_number("1e-5"), with_number("0.00001")),
    "1e-6": (with_number("0.000001"), with_number("1e-6")),
    "32 levels of arrays": (nested_arrays(32), nested_arrays(32)),
    "32 levels of objects": (nested_objects(32), nested_objects(32)),
    "the last of three": (b'[{"a":1,"b":0,"a":2,"\\u0061":3}]', b'[{"a":3,"b":0}]'),
    "an object hidden by another": (b'[{"a":{"b":1},"a":{"c":2}}]', b'[{"a":{"c":2}}]'),
    "names by code point": (
        '[{"\U0001f600":1,"\uffff":2,"é":3,"z":4,"Z":5,"":6}]'.encode(),
        '[{"":6,"Z":5,"z":4,"é":3,"\uffff":2,"\U0001f600":1}]'.encode(),
    ),
    "escapes": (
        rb'[{"a":"\u0022\u005c\/\u0008\u000c\u000a\u000d\u0009\u001f\u007f\u2028"}]',
        rb'[{"a":"\"\\/\b\f\n\r\t\u001f' + "\x7f\u2028".encode() + b'"}]',
    ),
    "NUL, escaped": (rb'[{"\u0000":"\u0000"}]', rb'[{"\u0000":"\u0000"}]'),
    "a pair of surrogates": (rb'[{"a":"\uD83D\uDE00"}]', '[{"a":"😀"}]'.encode()),
}


@pytest.mark.parametrize("raw", REFUSED.values(), ids=REFUSED)
def test_an_invalid_body_is_refused(raw: bytes) -> None:
    assert canonical_of(raw) is None
    assert strict_reading(raw) is None


@pytest.mark.parametrize(("raw", "canonical"), READ.values(), ids=READ)
def test_a_valid_body_is_canonicalised(raw: bytes, canonical: bytes) -> None:
    assert canonical_of(raw) == canonical
    assert strict_reading(raw) == canonical


def test_a_truncated_body_is_refused_wherever_it_ends() -> None:
    assert canonical_of(SAMPLE) == strict_reading(SAMPLE) is not None
    assert [end for end in range(len(SAMPLE)) if canonical_of(SAMPLE[:end]) is not None] == []


@pytest.mark.parametrize("depth", [33, 900, 1000, 1015])
def test_the_depth_of_a_repeated_member_that_is_dropped_does_not_count(depth: int) -> None:
    """Not even where a body is parsed twice because an integer may be too small."""
    hidden = nested_arrays(depth)[2:-2]
    assert canonical_of(b'[{%s,"a":-9223372036854775808}]' % hidden) == with_number(str(MIN))
    assert canonical_of(b'[{%s,"a":-9223372036854775809}]' % hidden) is None


def test_an_unfinished_string_is_refused_quickly() -> None:
    """A scan that starts again at each of its quotes would take hours for this body."""
    assert canonical_of(b'[{"a":-92233720368547,"b":"' + b'\\"' * 130_000) is None


def test_refusals_name_the_error() -> None:
    def detail(raw: bytes) -> str:
        with pytest.raises(BadRequest) as caught:
            canonicalise(raw)
        return caught.value.problem.detail

    assert "not valid JSON" in detail(b"[{]")
    assert "it is not UTF-8 from byte 7 on" in detail(b'[{"a":"\xff"}]')
    assert "array of one or more" in detail(b"[]")
    assert "beyond 64 bits" in detail(with_number(str(2**64)))
    assert "beyond 64 bits" in detail(with_number(str(MIN - 1)))
    assert "deeper than 32" in detail(nested_objects(33))


@pytest.mark.parametrize(
    "item", [b"7", b"null", b"[]", b'"x"', b'{"a":[18446744073709551616]}', nested_arrays(33)[1:-1]]
)
def test_an_invalid_item_is_named_by_its_index(item: bytes) -> None:
    for raw, index in ((b"[%s]", 0), (b"[{},{},%s]", 2), (b"[{},%s,null]", 1)):
        with pytest.raises(BadRequest, match=f"^The item at index {index} ") as caught:
            canonicalise(raw % item)
        check_refusal(caught.value.problem)


# --- generated bodies ---------------------------------------------------------------------------------------------


def check_against_strict_parser(raw: bytes) -> None:
    assert canonical_of(raw) == strict_reading(raw)


@given(st.binary(max_size=40) | st.binary(max_size=20).map(lambda inside: b'[{"a":"' + inside + b'"}]'))
def test_bytes_are_parsed_like_the_strict_parser_does(raw: bytes) -> None:
    check_against_strict_parser(raw)


tokens = (
    st.sampled_from('[]{},:"\\0-e \n\ufeff')
    | st.sampled_from(['"a"', '"\\u0061"', '"\\ud83d\\ude00"', '"\\ud83d"', "true", "null", "NaN"])
    | st.sampled_from(["1", "7.0", ".5", "1e400", str(MAX), str(MAX + 1), str(MIN), str(MIN - 1)])
)


@examples(3)
@given(st.lists(tokens, max_size=12).map("".join))
def test_tokens_are_parsed_like_the_strict_parser_does(text: str) -> None:
    check_against_strict_parser(text.encode())
    check_against_strict_parser(b'[{"a":' + text.encode() + b"}]")


number_texts = st.from_regex(
    r"-?(0|[1-9][0-9]{0,25}|18446744073709[0-9]{6}|92233720368547[0-9]{5})(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,3})?",
    fullmatch=True,
)


@examples(5)
@given(number_texts)
@example("-9223372036854776832")
def test_numbers_are_parsed_like_the_strict_parser_does(number: str) -> None:
    check_against_strict_parser(with_number(number))


@examples(10)
@given(st.sampled_from(BODIES), chances, st.integers(1, 3))
def test_damaged_bodies_are_parsed_like_the_strict_parser_does(body: Body, random: Random, times: int) -> None:
    raw = bytearray(respell(body.items, random))
    for _ in range(times):
        start = random.randrange(len(raw) + 1)
        end = min(len(raw), start + random.choice([0, 1, 1, 2, 30]))
        raw[start:end] = random.choice(
            [
                b"",
                random.randbytes(1),
                raw[start:end] * 2,
                random.choices(b'[]{},:"\\0123456789.eE-+ \n' + hexdigits.encode()),
            ]
        )
    check_against_strict_parser(bytes(raw))
