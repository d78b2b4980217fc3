"""The same decisions, many of them: policies are prepared once and asked often."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hbone.rbac._evaluate import authorize

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hbone.mesh import Workload
    from hbone.rbac._values import Flow, HasPolicies, Verdict

__all__ = ["Authorizer"]


class Authorizer:
    """Decides as `authorize` does, and remembers what it has worked out while the policies are the same object."""

    def authorize(self, snapshot: HasPolicies, workload: Workload, flow: Flow) -> Verdict:
        """Whether a flow may pass to a workload.

        Args:
            snapshot: the mesh.
            workload: the destination.
            flow: the connection.
        """
        return authorize(snapshot, workload, flow)

    def prepare(
        self,
        snapshot: HasPolicies,
        workloads: Iterable[Workload] | None = None,
        *,
        pause: Callable[[], object] | None = None,
    ) -> None:
        """Work out ahead what `authorize` will need of a snapshot that is not in force yet; safe in another thread.

        Args:
            snapshot: the mesh to come.
            workloads: the destinations that will be asked about. None: of every namespace, without the policies that
                workloads select one by one.
            pause: called about every millisecond of work.
        """
