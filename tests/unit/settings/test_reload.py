"""What a reload changes: settings outside of it keep their values, and are named."""

import logging
from pathlib import Path

import pytest

from configs import CANARY, MINIMAL, Read
from proxy.settings.loader import Source
from proxy.settings.reload import MAX_NAMED, Reloader, differences, merged


def test_what_is_learned_is_reloaded_and_when_it_answers_is_not(read: Read) -> None:
    old = read(MINIMAL)
    cache = '[cache]\nlearn = "use"\nnever_learn = ["steps"]\nlearn_from = 200\naudit_one_in = 50\n'
    new = read(f"{MINIMAL}infer = false\n{cache}")
    reloaded = merged(old, new)
    assert (reloaded.cache.learn, reloaded.cache.never_learn) == ("use", ("steps",))
    assert reloaded.teams["design"].infer is False
    assert differences(reloaded, new) == ["cache.learn_from", "cache.audit_one_in"]


def test_the_origins_of_pages_are_reloaded_and_the_rest_of_the_server_is_not(read: Read) -> None:
    server = '[server]\nport = 9000\ncors_origins = ["https://tools.example.com"]\n'
    new = read(MINIMAL + server)
    reloaded = merged(read(MINIMAL), new)
    assert reloaded.server.cors_origins == ("https://tools.example.com",)
    assert differences(reloaded, new) == ["server.port"]


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        (MINIMAL, "nothing"),
        (f'{MINIMAL}infer = false\n[cache]\nlearn = "use"\n', "cache.learn, teams.design.infer"),
        (MINIMAL.replace(CANARY, "rn-other"), "accounts.default.api_key"),
    ],
)
def test_the_log_names_what_has_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, changed: str
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(MINIMAL)
    source = Source(config, {}, {})
    reloader = Reloader(source, source.load())
    config.write_text(text)
    with caplog.at_level(logging.INFO):
        reloader.reload()
    assert caplog.messages == [f"settings reloaded; changed: {changed}; teams: 1"]


def test_the_log_counts_changes_beyond_the_first_few(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tmp_path / "config.toml"
    config.write_text(MINIMAL)
    source = Source(config, {}, {})
    reloader = Reloader(source, source.load())
    config.write_text(MINIMAL + f'[teams.video]\ntokens = ["sha256:{"7" * 64}"]\n')
    with caplog.at_level(logging.INFO):
        reloader.reload()
    (message,) = caplog.messages
    assert message.count("teams.video.") == MAX_NAMED
    assert message.endswith(", and 1 more; teams: 2")
