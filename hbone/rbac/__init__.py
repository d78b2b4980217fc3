"""Who may connect to whom: pure decisions over the policies of the mesh.

`authorize` decides once, `Authorizer` often, `explain_verdict` with all its reasons; they never differ.
"""

from hbone.rbac._authorizer import Authorizer
from hbone.rbac._evaluate import PolicySet, authorize, policies_for
from hbone.rbac._explain import (
    Change,
    ChangeKind,
    ClauseFinding,
    Explanation,
    FieldFinding,
    MatchFinding,
    PolicyFinding,
    RuleFinding,
    explain_verdict,
)
from hbone.rbac._values import DryRunMatch, Flow, HasPolicies, PolicyFailed, Verdict

__all__ = [
    "Authorizer",
    "Change",
    "ChangeKind",
    "ClauseFinding",
    "DryRunMatch",
    "Explanation",
    "FieldFinding",
    "Flow",
    "HasPolicies",
    "MatchFinding",
    "PolicyFailed",
    "PolicyFinding",
    "PolicySet",
    "RuleFinding",
    "Verdict",
    "authorize",
    "explain_verdict",
    "policies_for",
]
