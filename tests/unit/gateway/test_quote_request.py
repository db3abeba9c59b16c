import json
from itertools import product
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cache.canonical import canonicalise
from proxy.gateway.quote_request import (
    MAX_QUANTITY,
    MAX_QUESTION_BYTES,
    MAX_VARIANTS,
    Line,
    QuoteRequest,
    Variant,
    read_quote,
)
from proxy.problems import BadRequest, Code

ITEMS = [{"model": "Flux", "prompt": {"positive": "a cat"}, "loras": [{"weight": 1}]}, {"style": "ink", "steps": 30}]


def read(document: Any) -> QuoteRequest:
    return read_quote(document if isinstance(document, bytes) else orjson.dumps(document))


def variants(document: Any) -> list[Variant]:
    return list(read(document).variants())


def grid(base: Any, vary: Any, **options: Any) -> list[Variant]:
    return variants({"base": base, "vary": vary, **options})


def refusal(document: Any) -> str:
    with pytest.raises(BadRequest) as refused:
        variants(document)
    assert refused.value.problem.code is Code.INVALID_BODY
    return refused.value.problem.detail


def labelled(*bodies: Any) -> dict[str, Any]:
    return {"variants": [{"label": f"v{number}", "body": body} for number, body in enumerate(bodies)]}


class TestVariants:
    def test_they_are_canonical_and_in_order(self) -> None:
        assert variants(labelled([{"b": 1.0, "a": "\u00e9"}], ITEMS)) == [
            Variant("v0", '[{"a":"é","b":1}]'.encode()),
            Variant("v1", canonicalise(orjson.dumps(ITEMS))),
        ]

    def test_the_largest_number_of_them(self) -> None:
        assert len(variants(labelled(*[[{}]] * MAX_VARIANTS))) == MAX_VARIANTS

    @pytest.mark.parametrize(
        ("document", "says"),
        [
            ([{}], "The body is an array, as for an estimate. Send {"),
            ("text", "Send {"),
            ({}, "Send {"),
            ({**labelled([{}]), "vary": {}}, "Send {"),
            (
                {**labelled([{}]), "qantity": 3},
                "an unknown member 'qantity': it can have breakdown, quantity, variants.",
            ),
            ({"base": [{}], "vary": {"a": [1]}, "label": "a"}, "it can have base, breakdown, quantity, vary."),
            ({"variants": []}, "variants must be an array of 1 to 64 objects with label and body."),
            ({"variants": {"a": [{}]}}, "variants must be an array of 1 to 64 objects"),
            (labelled(*[[{}]] * 65), "The quote has 65 variants, and at most 64 are allowed: send several quotes."),
            ({"variants": [{"label": "a"}]}, 'The variant at index 0 must be an object like {"label":"a","body":[…]}.'),
            ({"variants": [[{}]]}, "The variant at index 0 must be an object"),
            (
                {"variants": [{"label": "", "body": [{}]}]},
                "The label at index 0 must be a string of 1 to 200 characters.",
            ),
            ({"variants": [{"label": 7, "body": [{}]}]}, "The label at index 0 must be a string"),
            (
                {"variants": [{"label": "a", "body": [{}]}, {"label": "a", "body": [{"steps": 1}]}]},
                "Two variants have the label 'a': give each its own.",
            ),
            (
                labelled([{}], {"model": "Flux"}),
                "Variant 'v1': The body must be a JSON array of one or more generation",
            ),
            (labelled([]), "Variant 'v0': The body must be a JSON array"),
            (labelled([3]), "Variant 'v0': The item at index 0 is not a generation object (a JSON object)."),
            (labelled(None), "Variant 'v0': The body must be"),
            (b'{"variants":[{"label":"a","body":[{"steps":NaN}]}]}', "The body is not valid JSON:"),
            (b'{"variants":[{"label":"a","body":[{"steps":1e400}]}]}', "The body is not valid JSON:"),
            (b"\xff", "The body is not valid JSON: it is not UTF-8 from byte 0 on."),
            ({**labelled([{}]), "breakdown": "all"}, 'breakdown must be "items" (each item alone) or "members"'),
            ({**labelled([{}]), "breakdown": ["items"]}, "breakdown must be"),
            *(
                ({**labelled([{}]), "quantity": quantity}, f"quantity must be a whole number from 1 to {MAX_QUANTITY}.")
                for quantity in (0, -1, 1.5, 2.0, True, "3", MAX_QUANTITY + 1)
            ),
        ],
    )
    def test_what_is_wrong_is_said(self, document: Any, says: str) -> None:
        assert says in refusal(document)

    def test_bodies_that_are_too_large_together(self) -> None:
        large = [{"prompt": "x" * (MAX_QUESTION_BYTES // 4)}]
        assert len(variants(labelled(*[large] * 3))) == 3
        assert refusal(labelled(*[large] * 4)) == (
            f"The bodies of this quote's questions have more than {MAX_QUESTION_BYTES} bytes together: send fewer "
            "variants, or leave out the breakdown."
        )
        assert "bytes together" in refusal({**labelled(large, large), "breakdown": "items"})

    def test_options(self) -> None:
        quote = read({**labelled([{}]), "quantity": 12, "breakdown": "members"})
        assert (quote.quantity, quote.breakdown) == (12, "members")
        plain = read({**labelled([{}]), "quantity": None, "breakdown": None})
        assert (plain.quantity, plain.breakdown) == (None, None)


class TestGrid:
    def test_every_combination_the_last_path_fastest(self) -> None:
        made = grid([{"steps": 1}], {"quality": ["Regular", "Plus"], "steps": [20, 30]})
        assert [variant.label for variant in made] == [
            *("quality=Regular, steps=20", "quality=Regular, steps=30"),
            *("quality=Plus, steps=20", "quality=Plus, steps=30"),
        ]
        assert made[1].canonical == b'[{"quality":"Regular","steps":30}]'
        assert made[1].changes == [
            {"path": "quality", "value": "Regular", "added": True},
            {"path": "steps", "value": 30},
        ]

    def test_a_path_is_set_wherever_its_parent_exists(self) -> None:
        (made,) = grid(ITEMS, {"prompt.negative": ["dogs"], "loras.0.weight": [0.5], "batch_size": [2]})
        assert orjson.loads(made.canonical) == [
            {
                "model": "Flux",
                "prompt": {"positive": "a cat", "negative": "dogs"},
                "loras": [{"weight": 0.5}],
                "batch_size": 2,
            },
            {"style": "ink", "steps": 30, "batch_size": 2},
        ]
        assert made.label == "prompt.negative=dogs, loras.0.weight=0.5, batch_size=2"
        assert [change.get("added", False) for change in made.changes] == [True, False, True]

    def test_a_member_that_one_item_has_is_added_to_the_others(self) -> None:
        (made,) = grid(ITEMS, {"steps": [1]})
        assert made.changes == [{"path": "steps", "value": 1, "added": True}]

    def test_an_element_can_be_replaced_but_not_added(self) -> None:
        (made,) = grid([{"loras": [1, 2]}], {"loras.1": [None]})
        assert made.canonical == b'[{"loras":[1,null]}]'
        assert made.changes == [{"path": "loras.1", "value": None}]
        assert "no item of base has its parent, 'loras'" in refusal(
            {"base": [{"loras": [1]}], "vary": {"loras.1": [3]}}
        )

    def test_an_earlier_path_can_bring_the_parent(self) -> None:
        (made,) = grid([{}], {"prompt": [{"positive": "a"}], "prompt.positive": ["b"]})
        assert made.canonical == b'[{"prompt":{"positive":"b"}}]'

    def test_values_are_labelled_as_json(self) -> None:
        made = grid([{}], {"a": ["x", 1, 1.5, True, None, {"b": [2]}]})
        assert [variant.label for variant in made] == ["a=x", "a=1", "a=1.5", "a=true", "a=null", 'a={"b":[2]}']

    @pytest.mark.parametrize(
        ("base", "vary", "says"),
        [
            (
                [{}],
                {"a": list(range(9)), "b": list(range(8))},
                "The grid makes 72 variants, and at most 64 are allowed",
            ),
            ([{}], {str(n): list(range(9)) for n in range(99)}, "variants, and at most 64 are allowed"),
            ([{}], {}, 'vary must be an object of paths and their values, such as {"quality":["Regular","Plus"]}.'),
            ([{}], None, "vary must be an object"),
            ([{}], [["a", 1]], "vary must be an object"),
            ([{}], {"a": []}, "vary must have an array of one or more values for 'a'."),
            ([{}], {"a": 3}, "vary must have an array of one or more values for 'a'."),
            ([{}], {"": [1]}, "vary has the path '': a path is a member's name, or several with dots between them."),
            ([{}], {"a..b": [1]}, "vary has the path 'a..b'"),
            (
                [{}],
                {"a": [20, 20]},
                "vary has a value of 'a' twice, and so two variants with one label: leave one out.",
            ),
            ([{}], {"a": ["20", 20]}, "vary has a value of 'a' twice"),
            (
                [{"a": 1}, {"a": "text"}],
                {"a.b": [1]},
                "vary sets 'a.b', but no item of base has its parent, 'a': add it to base, or correct the path.",
            ),
            (ITEMS, {"prompt.positive.x.y": [1]}, "no item of base has its parent, 'prompt.positive.x'"),
            (ITEMS, {"loras.1.weight": [1]}, "no item of base has its parent, 'loras.1'"),
            (ITEMS, {"loras.first.weight": [1]}, "no item of base has its parent, 'loras.first'"),
            (ITEMS, {f"loras.{'9' * 5000}.weight": [1]}, "no item of base has its parent"),
            ({"model": "Flux"}, {"steps": [1]}, "base: The body must be a JSON array"),
            (None, {"steps": [1]}, "base: The body must be"),
            ([], {"steps": [1]}, "base: The body must be"),
            ([{}] * 40_000, {"a": ["x" * 200]}, "bytes together"),
        ],
    )
    def test_what_is_wrong_is_said(self, base: Any, vary: Any, says: str) -> None:
        assert says in refusal({"base": base, "vary": vary})

    def test_a_value_that_is_too_deep(self) -> None:
        deep: Any = 1
        for _ in range(40):
            deep = [deep]
        assert refusal({"base": [{}], "vary": {"a": [deep]}}).startswith("Variant 'a=[[[")

    @given(
        st.dictionaries(
            st.sampled_from(["a", "b", "c.d"]),
            st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True),
            min_size=1,
        )
    )
    def test_it_is_the_product_of_its_values(self, vary: dict[str, list[int]]) -> None:
        made = grid([{"c": {}}], vary)
        expected = []
        for values in product(*vary.values()):
            item: dict[str, Any] = {"c": {}}
            for path, value in zip(vary, values, strict=True):
                (item["c"] if path == "c.d" else item)[path[-1]] = value
            expected.append([item])
        assert [orjson.loads(variant.canonical) for variant in made] == expected
        assert len({variant.label for variant in made}) == len(made)


class TestLines:
    def test_each_item_alone(self) -> None:
        (variant,) = variants({**labelled(ITEMS), "breakdown": "items"})
        assert variant.lines == [
            Line(0, canonicalise(orjson.dumps(ITEMS[:1]))),
            Line(1, canonicalise(orjson.dumps(ITEMS[1:]))),
        ]

    def test_a_body_of_one_item_asks_nothing_more(self) -> None:
        (variant,) = variants({**labelled([{"b": 1, "a": 2}]), "breakdown": "items"})
        assert [line.canonical for line in variant.lines] == [variant.canonical]

    def test_the_body_without_each_member(self) -> None:
        body = [{"style": "ink", "model": "Flux", "steps": 30}, {"model": "Flux", "steps": 20, "segment": None}]
        (variant,) = variants({**labelled(body), "breakdown": "members"})
        assert variant.lines == [
            Line("model", b'[{"steps":30,"style":"ink"},{"segment":null,"steps":20}]', mode_changes=True),
            Line("segment", b'[{"model":"Flux","steps":30,"style":"ink"},{"model":"Flux","steps":20}]'),
            Line("steps", b'[{"model":"Flux","style":"ink"},{"model":"Flux","segment":null}]'),
            Line(
                "style", b'[{"model":"Flux","steps":30},{"model":"Flux","segment":null,"steps":20}]', mode_changes=True
            ),
        ]

    def test_a_body_without_members(self) -> None:
        (variant,) = variants({**labelled([{}]), "breakdown": "members"})
        assert variant.lines == []

    def test_many_members_are_refused_before_they_are_asked(self) -> None:
        assert "bytes together" in refusal({**labelled([{str(n): n for n in range(2000)}]), "breakdown": "members"})

    @given(
        st.lists(st.dictionaries(st.sampled_from("abc"), st.floats(0, 9) | st.text(max_size=2)), min_size=1, max_size=3)
    )
    def test_lines_are_canonical(self, body: list[dict[str, Any]]) -> None:
        for breakdown in ("items", "members"):
            (variant,) = variants({**labelled(body), "breakdown": breakdown})
            for line in variant.lines:
                assert canonicalise(line.canonical) == line.canonical
                if isinstance(line.part, str):
                    without = [{name: item[name] for name in item if name != line.part} for item in body]
                    assert canonicalise(json.dumps(without).encode()) == line.canonical
