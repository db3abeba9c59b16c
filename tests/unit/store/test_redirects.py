"""What the log says about errors that tests with real servers do not meet each time."""

import pytest
from redis.exceptions import ConnectionError as NotConnectedError

from proxy.store.redirects import describe

VERIFY = "Error 1 connecting to redis:6379. [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: "


@pytest.mark.parametrize(
    ("text", "described"),
    [
        (
            "Error while reading from redis:6379 : (1, '[SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED] alert')",
            "the server requires a client certificate (%s): set store.cert_file and store.key_file",
        ),
        (
            VERIFY + "Hostname mismatch, certificate is not valid for 'redis'. (_ssl.c:1006)",
            "the server's certificate is for another host (%s): use a host in the URL that the certificate names",
        ),
        (
            VERIFY + "certificate has expired (_ssl.c:1006)",
            "the server's certificate has expired (%s): renew it",
        ),
    ],
)
def test_an_error_says_what_is_wrong_and_what_to_do(text: str, described: str) -> None:
    assert describe(NotConnectedError(f"{text}.")) == described % text
