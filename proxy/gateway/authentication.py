"""Checks the token of a request. Called before the body is read: bodies of unknown clients are never read."""

from proxy.auth import Access, Team
from proxy.gateway.request import ClientRequest, Trace
from proxy.problems import Code, Problem


def authenticate(request: ClientRequest, trace: Trace, access: Access) -> Team | Problem:
    """The team of the request's token."""
    credential = access.credential(request.token)
    if isinstance(credential, Problem):
        return credential
    trace.record_credential(credential)
    team = credential.team
    if team.disabled:
        detail = f"The team {team.id!r} is disabled: ask the gateway's operator to enable it."
        return Problem(Code.TEAM_DISABLED, detail)
    return team


def refuse_unless_admin(request: ClientRequest, trace: Trace, access: Access) -> Problem | None:
    """None if the request has an admin token."""
    if access.is_admin(request.token):
        return None
    if access.is_viewer(request.token):
        return Problem(Code.FORBIDDEN, "This needs an admin token; you sent a viewer token, which only reads.")
    credential = access.credential(request.token)
    if isinstance(credential, Problem):
        return credential
    trace.record_credential(credential)
    return Problem(Code.FORBIDDEN, "This needs an admin token; you sent a team's token.")
