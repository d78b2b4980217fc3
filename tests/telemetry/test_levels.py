"""Log levels: what can be written, what it means, and that loggers obey it."""

from __future__ import annotations

import io
import logging
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbone.telemetry import AccessLog, LogControl, LogLevel, LogLevels
from hbone.telemetry._levels import level_name, scope_of

if TYPE_CHECKING:
    from collections.abc import Iterator

LEVEL = st.sampled_from(list(LogLevel))
SCOPE = st.lists(st.sampled_from(["access", "proxy", "inbound", "a-b", "x1"]), min_size=1, max_size=3).map("::".join)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", "info"),
        ("info", "info"),
        (" DEBUG ", "debug"),
        ("warning", "warn"),
        ("off", "off"),
        ("info,access=debug", "info,access=debug"),
        ("access=debug,warn", "warn,access=debug"),
        ("access:debug", "info,access=debug"),
        ("proxy::outbound:trace", "info,proxy::outbound=trace"),
        ("info,access=debug,proxy::outbound=trace", "info,access=debug,proxy::outbound=trace"),
        ("proxy.outbound=trace", "info,proxy::outbound=trace"),
        ("hbone::proxy=debug", "info,proxy=debug"),
        ("ztunnel::proxy=debug", "info,proxy=debug"),
        ("hbone=debug", "debug"),
        ("ztunnel:debug", "debug"),
        ("hbone.admin._server=error", "info,admin::server=error"),
        ("a=debug,a=error", "info,a=error"),
        (",info,,", "info"),
    ],
)
def test_what_can_be_written(text: str, shown: str) -> None:
    levels = LogLevels.parse(text)
    assert str(levels) == shown
    assert LogLevels.parse(shown) == levels


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("loud", "'loud' is no log level; write a level (off, error, warn, info, debug, trace) or SCOPE=LEVEL"),
        ("access", "'access' is no log level; write a level (off, error, warn, info, debug, trace) or SCOPE=LEVEL"),
        ("proxy::outbound", "'proxy::outbound' is no log level"),
        ("access=loud", "'access=loud': 'loud' is no log level; the levels are off, error, warn, info, debug, trace"),
        ("access=", "'access=': '' is no log level"),
        ("=debug", "'=debug': not the name of a scope"),
        (":debug", "':debug': not the name of a scope"),
        ("a=b=debug", "'a=b=debug': not the name of a scope"),
        ("a::::b=debug", "not the name of a scope"),
        ("a b=debug", "not the name of a scope"),
        ("proxy[span{id=1}]=debug", "not the name of a scope"),
        ("a::b::c::d::e::f::g=debug", "not the name of a scope"),
        ("info;debug", "'info;debug' is no log level"),
        (",".join(f"s{n}=debug" for n in range(65)), "levels for more than 64 scopes"),
        ("x" * 100_000, "is no log level"),
    ],
)
def test_what_cannot(text: str, why: str) -> None:
    with pytest.raises(ValueError) as caught:
        LogLevels.parse(text)
    assert why in str(caught.value)
    assert len(str(caught.value)) < 300


@given(text=st.text(alphabet="ab=:,. _\n\u00e9", max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        levels = LogLevels.parse(text)
    except ValueError:
        return
    assert LogLevels.parse(str(levels)) == levels


@given(default=LEVEL, said=st.dictionaries(SCOPE, LEVEL, max_size=5))
def test_what_is_shown_is_read_back(default: LogLevel, said: dict[str, LogLevel]) -> None:
    levels = LogLevels(default, tuple(sorted(said.items())))
    assert LogLevels.parse(str(levels)) == levels


def test_the_longest_scope_counts() -> None:
    levels = LogLevels.parse("warn,proxy=debug,proxy::outbound=trace,access=off")
    for scope, level in [
        ("proxy", "DEBUG"),
        ("proxy::inbound", "DEBUG"),
        ("proxy::outbound", "TRACE"),
        ("proxy::outbound::x", "TRACE"),
        ("proxyish", "WARN"),
        ("admin", "WARN"),
        ("access", "OFF"),
        ("", "WARN"),
    ]:
        assert levels.level_of(scope) is LogLevel[level], scope


def test_names() -> None:
    assert scope_of("hbone.proxy.outbound") == "hbone::proxy::outbound"
    assert scope_of("hbone.admin._server") == "hbone::admin::server"
    assert scope_of("hbone") == "hbone"
    assert scope_of("_") == "_"
    assert [level_name(number) for number in (1, 5, 10, 19, 20, 30, 40, 50, 99)] == [
        *("trace", "trace", "debug", "debug", "info", "warn", "error", "error", "error")
    ]


# -- in force ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def access_log() -> AccessLog:
    return AccessLog(io.BytesIO())


@pytest.fixture
def control(access_log: AccessLog) -> Iterator[LogControl]:
    control = LogControl(LogLevels.parse("warn,admin::server=debug"), access_log=access_log)
    yield control
    control.close()


def enabled(name: str) -> str:
    return level_name(logging.getLogger(name).getEffectiveLevel())


def test_loggers_and_access_log_obey(control: LogControl, access_log: AccessLog) -> None:
    assert enabled("hbone.proxy.outbound") == "warn"
    assert enabled("hbone.admin._server") == "debug"
    assert access_log.level == LogLevel.WARN
    control.add("proxy::outbound=trace,access:debug")
    assert str(control.levels) == "warn,access=debug,admin::server=debug,proxy::outbound=trace"
    assert enabled("hbone.proxy.outbound") == "trace"
    assert enabled("hbone.proxy.outbound.more") == "trace"
    assert enabled("hbone.proxy.inbound") == "warn"
    assert access_log.level == LogLevel.DEBUG
    control.add("error")
    assert enabled("hbone.proxy.inbound") == "error"
    assert enabled("hbone.proxy.outbound") == "trace"
    control.reset("access=off")
    assert str(control.levels) == "warn,access=off,admin::server=debug"
    assert enabled("hbone.proxy.outbound") == "warn"
    assert access_log.level == LogLevel.OFF
    control.reset()
    assert str(control.levels) == "warn,admin::server=debug"


def test_what_is_wrong_changes_nothing(control: LogControl, access_log: AccessLog) -> None:
    for change in (control.add, control.reset):
        with pytest.raises(ValueError, match="no log level"):
            change("proxy=debug,access=loud")
        assert str(control.levels) == "warn,admin::server=debug"
        assert enabled("hbone.proxy") == "warn"
        assert access_log.level == LogLevel.WARN


def test_off_is_off(control: LogControl) -> None:
    control.add("off")
    assert not logging.getLogger("hbone.proxy").isEnabledFor(logging.CRITICAL)


def test_afterwards_all_is_as_before() -> None:
    logger = logging.getLogger("hbone.test_levels")
    logger.setLevel(logging.ERROR)
    before = logging.getLogger("hbone").level
    control = LogControl(LogLevels.parse("debug,test_levels=trace"))
    assert enabled("hbone.test_levels") == "trace"
    control.add("test_levels=info")
    control.close()
    assert logger.level == logging.ERROR
    assert logging.getLogger("hbone").level == before
    logger.setLevel(logging.NOTSET)
