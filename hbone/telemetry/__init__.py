"""Observers: the access log and the metrics of a process.

Told what happens, never asked: nothing here changes what a tunnel does. The core functions take plain values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hbone.telemetry._access_log import (
    AccessLog,
    AccessPattern,
    AccessRecord,
    Direction,
    LogFormat,
    format_json,
    format_plain,
)
from hbone.telemetry._cause import failure_cause, reset_in_words, response_flag
from hbone.telemetry._labels import LogNames, TrafficLabels, labels_for, log_names
from hbone.telemetry._levels import LogControl, LogLevel, LogLevels
from hbone.telemetry._observer import MetricsObserver
from hbone.telemetry._oplog import LogHandler, log_to

if TYPE_CHECKING:
    from hbone.telemetry._metrics import CertificateSummary, Metrics, OpenConnection
else:

    def __getattr__(name: str) -> object:
        # prometheus-client brings an HTTP server along, 2 MB that a proxy without metrics has no use for.
        if name in ("CertificateSummary", "Metrics", "OpenConnection"):
            from hbone.telemetry import _metrics

            return getattr(_metrics, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AccessLog",
    "AccessPattern",
    "AccessRecord",
    "CertificateSummary",
    "Direction",
    "LogControl",
    "LogFormat",
    "LogHandler",
    "LogLevel",
    "LogLevels",
    "LogNames",
    "Metrics",
    "MetricsObserver",
    "OpenConnection",
    "TrafficLabels",
    "failure_cause",
    "format_json",
    "format_plain",
    "labels_for",
    "log_names",
    "log_to",
    "reset_in_words",
    "response_flag",
]
