"""What a reload changes: settings outside of it keep their values, and are named."""

from configs import MINIMAL, Read
from proxy.settings.reload import differences, merged


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
