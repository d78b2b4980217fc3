"""A connection, told from its beginning to its end: whose it is, which way it goes, who lets it in, and why.

`explain_connection` puts together what the pure decisions say at each place that a connection passes: routing at the
client's node, routing at the far node, policy there, and the same again behind a waypoint or a gateway. It does no I/O
and decides nothing itself, so it says what nodes do that have the same picture of the mesh.
"""

from hbone.explain._connection import explain_connection, explain_plain_connection
from hbone.explain._values import Arrival, ConnectionExplanation, Outcome, Way

__all__ = [
    "Arrival",
    "ConnectionExplanation",
    "Outcome",
    "Way",
    "explain_connection",
    "explain_plain_connection",
]
