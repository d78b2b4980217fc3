"""Observers: the access log and the metrics of a process.

Told what happens, never asked: nothing here changes what a tunnel does. The core functions take plain values.
"""

from __future__ import annotations

from hbone.telemetry._access_log import AccessLog, AccessRecord, Direction, LogFormat, format_json, format_plain
from hbone.telemetry._metrics import Metrics, OpenConnection, failure_cause, response_flag
from hbone.telemetry._observer import MetricsObserver

__all__ = [
    "AccessLog",
    "AccessRecord",
    "Direction",
    "LogFormat",
    "Metrics",
    "MetricsObserver",
    "OpenConnection",
    "failure_cause",
    "format_json",
    "format_plain",
    "response_flag",
]
