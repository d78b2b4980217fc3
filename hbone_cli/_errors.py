"""Every way to fail: an exit code for each cause, and one line that says what, where and what to do."""

from __future__ import annotations

import errno
import signal
import socket
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Final

import click

__all__ = [
    "EXIT_CODES_HELP",
    "BrokenTunnel",
    "CannotListen",
    "ExitCode",
    "Failure",
    "Interrupted",
    "NoSession",
    "NoTunnel",
    "explain",
]


class ExitCode(IntEnum):
    """What a script can tell apart. Those who were ended by a signal add its number to 128."""

    def __new__(cls, value: int, words: str) -> ExitCode:
        member = int.__new__(cls, value)
        member._value_ = value
        member.__doc__ = words
        return member

    OK = 0, "all went well; a proxy that was told to stop has drained"
    BUG = 1, "a fault in hbone itself"
    USAGE = 2, "an option or argument cannot be used as it is"
    CERTIFICATE = 3, "a certificate, key, root or CA is missing or of no use"
    LISTEN = 4, "cannot listen: the port is taken, needs a privilege, or the address is not ours"
    CONNECT = 5, "no TCP connection to the next hop: refused, unreachable, timed out, unknown name"
    PEER_IDENTITY = 6, "the next hop proved another identity than we expect"
    OUR_IDENTITY = 7, "the next hop refuses our certificate or identity"
    PROTOCOL = 8, "the next hop does not do TLS 1.3 and HTTP/2 as it should, or its certificate is of no use"
    DENIED = 9, "the peer's policy does not allow us this tunnel (status 401)"
    BAD_TARGET = 10, "the peer does not serve this target (status 400)"
    UNREACHABLE = 11, "the peer cannot reach the target (status 503)"
    REFUSED = 12, "no tunnel for another reason: another status, no answer, the peer is going away"
    BROKEN = 13, "the tunnel, or what it is connected to here, broke under way"
    CONFIG = 14, "the configuration, the environment or the mesh file cannot be used; each fault has its line"
    NO_ROUTE = 15, "the mesh has no way to the target"


EXIT_CODES_HELP: Final = (
    "\b\nExit codes:\n"
    + "".join(f"  {code.value:>3}  {code.__doc__}\n" for code in ExitCode)
    + "  128+n  ended by signal n: 130 for Ctrl-C"
)


class CannotListen(Exception):
    """A way in could not be opened.

    Attributes:
        what: the option that asked for it.
        where: address and port.
    """

    def __init__(self, what: str, where: str, problem: OSError) -> None:
        super().__init__(what, where)
        self.what = what
        self.where = where
        self.problem = problem


class NoSession(Exception):
    """There is no session with the next hop; the cause says why.

    Attributes:
        where: the next hop.
    """

    def __init__(self, where: str) -> None:
        super().__init__(where)
        self.where = where


class NoTunnel(Exception):
    """The session stands, but there is no tunnel on it; the cause says why."""


class BrokenTunnel(Exception):
    """The tunnel was there, and broke."""


class Interrupted(Exception):
    """Somebody told us to stop.

    Attributes:
        number: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One way to fail, ready to print.

    Attributes:
        kind: a word for scripts.
        code: the exit code.
        message: one line.
        facts: more for scripts.
        bug: whether it is our own fault.
        more: further lines, when several things are wrong at once.
    """

    kind: str
    code: int
    message: str
    facts: dict[str, str] = field(default_factory=dict)
    bug: bool = False
    more: tuple[str, ...] = ()

    @property
    def lines(self) -> tuple[str, ...]:
        """All of it, for people."""
        return (self.message, *self.more)


_LISTEN_HINTS: Final = {
    errno.EADDRINUSE: "the port is taken; choose another one, or find who has it with: ss -ltnp",
    errno.EACCES: "ports below 1024 need a privilege; choose a higher one, or give the process CAP_NET_BIND_SERVICE",
    errno.EADDRNOTAVAIL: "the address is not one of this machine; choose one that is, or 0.0.0.0 for all",
}


def explain(error: BaseException) -> Failure:
    """The failure that an exception stands for. Pure."""
    while isinstance(error, BaseExceptionGroup):  # of a nursery: the first is the cause, the others follow from it
        error = error.exceptions[0]
    match error:
        case click.UsageError():
            return _failure("usage", ExitCode.USAGE, _usage(error))
        case click.ClickException():
            return _failure("usage", ExitCode.USAGE, error.format_message())
        case click.Abort() | KeyboardInterrupt():
            return _interrupted(signal.SIGINT)
        case Interrupted():
            return _interrupted(error.number)
        case CannotListen():
            return _cannot_listen(error)
    return _explain_hbone(error) or _failure(
        "bug",
        ExitCode.BUG,
        f"internal error: {type(error).__name__}: {error}; this should not happen: please report it, with -v",
        bug=True,
    )


def _explain_hbone(error: BaseException) -> Failure | None:
    # What is not about a tunnel must not load the library.
    import hbone
    from hbone.errors import ConfigError, ListenFailed, MeshConfigError
    from hbone.telemetry import failure_cause

    match error:
        case ConfigError() | MeshConfigError():
            return _several([_failure("config", ExitCode.CONFIG, str(fault)) for fault in error.faults])
        case ListenFailed():
            return _several([_cannot_listen(CannotListen(*problem)) for problem in error.problems])

    no_tunnel = isinstance(error, NoTunnel)
    broken = isinstance(error, BrokenTunnel)
    where = f" {error.where}" if isinstance(error, NoSession) else ""
    wrapped = isinstance(error, NoSession | NoTunnel | BrokenTunnel) and error.__cause__ is not None
    cause: BaseException | None = error.__cause__ if wrapped else error
    text = str(cause) or type(cause).__name__
    if broken:
        return _failure("broken", ExitCode.BROKEN, f"tunnel broken: {text}")
    match cause:
        case hbone.InvalidCertificate() | hbone.CertificateUnavailable():
            return _failure("certificate", ExitCode.CERTIFICATE, f"certificate: {text}")
        case hbone.InvalidIdentity() | hbone.InvalidAddress():
            return _failure("usage", ExitCode.USAGE, f"{text}")
        case hbone.PeerIdentityMismatch():
            return _failure(
                "peer-identity",
                ExitCode.PEER_IDENTITY,
                f"wrong peer{where and ' at' + where}: {text}; if that is who you want, say so with --expect",
                presented=cause.presented,
            )
        case hbone.IdentityRefused():
            return _failure("our-identity", ExitCode.OUR_IDENTITY, f"refused{where and ' by' + where}: {text}")
        case hbone.PolicyDenied():
            kind, code, advice = "denied", ExitCode.DENIED, "ask its operator to allow our identity"
        case hbone.BadTarget():
            kind, code, advice = "bad-target", ExitCode.BAD_TARGET, "check the target, and that this is its node"
        case hbone.Unreachable():
            kind, code, advice = "unreachable", ExitCode.UNREACHABLE, "is the application up, and at that port?"
        case hbone.TunnelRefused():
            kind, code, advice = "refused", ExitCode.REFUSED, "the peer's log says why"
        case hbone.StreamRefused():
            return _failure("refused", ExitCode.REFUSED, f"no tunnel: {text}; try again, or another next hop")
        case hbone.SessionClosed() | hbone.TunnelReset() if no_tunnel:
            return _failure("broken", ExitCode.BROKEN, f"no tunnel: {text}; try again")
        case hbone.ConnectFailed() if no_tunnel:
            return _failure("refused", ExitCode.REFUSED, f"no tunnel: {text}; the peer's log may say why")
        case hbone.ConnectFailed() if isinstance(cause.__cause__, socket.gaierror):
            return _failure("connect", ExitCode.CONNECT, f"cannot connect: {text}; check the name, or use an address")
        case hbone.ConnectFailed() if failure_cause(cause) in ("network", "timeout"):
            text = f"cannot connect: {text}; is the node up, and is that its HBONE port?"
            return _failure("connect", ExitCode.CONNECT, text)
        case hbone.ConnectFailed() | hbone.ProtocolError():
            text = f"no session{where and ' with' + where}: {text}; is that its HBONE port, and is it of our mesh?"
            return _failure("protocol", ExitCode.PROTOCOL, text)
        case hbone.HboneError():
            return _failure("refused", ExitCode.REFUSED, f"no tunnel: {text}")
        case _:
            return None
    return _failure(kind, code, f"no tunnel: {text}; {advice}", status=str(cause.status))


def _failure(kind: str, code: int, message: str, *, bug: bool = False, **facts: str) -> Failure:
    return Failure(kind=kind, code=code, message=" ".join(message.split()), facts=facts, bug=bug)


def _several(failures: list[Failure]) -> Failure:
    """One failure of several that are alike."""
    first, *others = failures
    return replace(first, more=tuple(other.message for other in others))


def _interrupted(number: int) -> Failure:
    if number == signal.SIGPIPE:
        return _failure("interrupted", 128 + number, "standard output: nobody reads it any more")
    return _failure("interrupted", 128 + number, f"interrupted by {signal.Signals(number).name}")


def _usage(error: click.UsageError) -> str:
    message = error.format_message()
    if not message.endswith("..."):
        message = message.removesuffix(".")
    return f"{message}; see: {error.ctx.command_path} --help" if error.ctx is not None else message


def _cannot_listen(error: CannotListen) -> Failure:
    problem = error.problem
    # Ours say more than the number does.
    why = problem.strerror if problem.strerror and problem.errno else str(problem)
    hint = _LISTEN_HINTS.get(problem.errno or 0)
    text = f"cannot listen on {error.where} ({error.what}): {(why or 'no reason given').lower()}"
    return _failure("listen", ExitCode.LISTEN, f"{text}; {hint}" if hint else text, address=error.where)
