"""Who may connect to whom: pure decisions over the policies of the mesh."""

from hbone.rbac._authorizer import Authorizer
from hbone.rbac._evaluate import authorize
from hbone.rbac._values import DryRunMatch, Flow, HasPolicies, Verdict

__all__ = ["Authorizer", "DryRunMatch", "Flow", "HasPolicies", "Verdict", "authorize"]
