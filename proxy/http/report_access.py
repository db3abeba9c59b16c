"""Access to reports: of all teams for viewers and admins, else of the token's own team."""

from proxy.auth import Access, Credential
from proxy.gateway.request import Trace
from proxy.problems import Problem


def reader_of(token: str | None, trace: Trace, access: Access) -> Credential | Problem | None:
    """The credential of a team's token, also if the team is disabled; None for a viewer or admin token.

    A `Problem` if the token is unknown.
    """
    if access.is_admin(token) or access.is_viewer(token):
        return None
    credential = access.credential(token)
    if not isinstance(credential, Problem):
        trace.record_credential(credential)
    return credential
