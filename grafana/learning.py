"""The row of *Gateway* about learned prices: what they answer, and how often RenderNet contradicts them."""

from grafana_foundation_sdk.models import dashboard

from board import Row
from panels import AMOUNT, GREEN, ORANGE, PER_SECOND, RED, SHARE, SHORT, About, Line, Look, chart, number
from promql import ESTIMATE, PRICED, REQUESTS, TEAM, increase, rate, share
from tables import Column, grid

INFERENCES = "estimate_proxy_inferences_total"
AUDITS = "estimate_proxy_inference_audits_total"
SUSPECT = "estimate_proxy_suspect_answers_total"


def learning() -> Row:
    return Row(
        "What has the price book learned?",
        (inferred_share(), suspect_answers(), inferences(), audits(), by_account()),
    )


def inferred_share() -> dashboard.Panel:
    reads = (
        "The share of inferred prices among all estimates of the selected teams that were answered with a price in the"
        " time range. 0 unless `cache.learn` is `use`."
    )
    about = About("Inferred answers", reads, SHARE, 4)
    answered = increase("", REQUESTS, ESTIMATE, TEAM, PRICED)
    return number(about, share(increase("", REQUESTS, ESTIMATE, TEAM, 'outcome="inferred"'), answered))


def suspect_answers() -> dashboard.Panel:
    reads = (
        "Inferred answers in the time range that may have been wrong: those between the last test that agreed and a"
        " contradiction. The log and `estimate-proxy learned` say when."
    )
    about = About("Suspect answers", reads, AMOUNT, 4)
    return number(about, increase("", SUSPECT), steps=((None, GREEN), (1, RED)), decimals=0)


def inferences() -> dashboard.Panel:
    reads = (
        "`answered`: the client got it. `right` and `wrong`: RenderNet was asked, and its answer compared with what"
        " would have been inferred; with `cache.learn` at `observe` these two say what `use` would do."
    )
    about = About("Inferred prices, by result", reads, PER_SECOND, 8)
    colours = {"answered": GREEN, "right": "light-green", "wrong": RED}
    return chart(about, Line(rate("result", INFERENCES), "{{result}}"), look=Look(stacked=True, colours=colours))


def audits() -> dashboard.Panel:
    reads = (
        "Inferred answers that were compared with RenderNet in the background, an hour. `list-moved`: all prices of the"
        " account are learned again. `contradicted`: a member counts that had been left out."
    )
    about = About("Inferred answers checked, by result", reads, SHORT, 8)
    colours = {"same": GREEN, "list-moved": ORANGE, "contradicted": RED}
    return chart(
        about,
        Line(f"{rate('result', AUDITS)} * 3600", "{{result}}"),
        look=Look(stacked=True, bars=True, colours=colours),
    )


def by_account() -> dashboard.Panel:
    reads = (
        "In the time range: what was answered or would have been, how often RenderNet's own answer differed, and"
        " how many answers a contradiction puts in doubt."
    )
    return grid(
        About("Inferred prices, by account", reads, AMOUNT, 24),
        Column(title="Account", label="account"),
        Column(title="Answered", expr=increase("account", INFERENCES, 'result="answered"'), decimals=0),
        Column(title="Right, not answered", expr=increase("account", INFERENCES, 'result="right"'), decimals=0),
        Column(title="Wrong, not answered", expr=increase("account", INFERENCES, 'result="wrong"'), decimals=0),
        Column(title="Checked and same", expr=increase("account", AUDITS, 'result="same"'), decimals=0),
        Column(title="List moved", expr=increase("account", AUDITS, 'result="list-moved"'), decimals=0),
        Column(title="Contradicted", expr=increase("account", AUDITS, 'result="contradicted"'), decimals=0),
        Column(title="Suspect answers", expr=increase("account", SUSPECT), decimals=0),
        most="Answered",
    )
