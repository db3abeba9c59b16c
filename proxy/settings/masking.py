"""Secrets, which are masked wherever they are shown."""

from urllib.parse import urlsplit

from pydantic import Secret

MASK = "**********"


class SecretUrl(Secret[str]):
    """A URL that may contain a password, which is masked when it is shown."""

    def _display(self) -> str:
        return masked_url(self.get_secret_value())


class SecretText(Secret[str]):
    """A key or password, which is masked when it is shown."""

    def _display(self) -> str:
        return MASK


def masked_url(url: str) -> str:
    """`url` with masks for what may be secret: password, user name without one, fragment, and query except for `db`."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return MASK
    credentials, at, location = parts.netloc.rpartition("@")
    user, colon, _ = credentials.partition(":")
    masked = f"{user}:{MASK}" if colon else MASK
    query = "&".join(map(_masked_member, parts.query.split("&"))) if parts.query else ""
    tail = f"?{query}" * bool(query) + f"#{MASK}" * bool(parts.fragment)
    return f"{parts.scheme}://{masked if at else ''}{at}{location}{parts.path}{tail}"


def _masked_member(member: str) -> str:
    name, equals, value = member.partition("=")
    return member if name == "db" and value.isdigit() else f"{name}={MASK}" if equals else MASK
