"""The holder of the current snapshot: who is told of a change, in which order, whatever others do."""

from __future__ import annotations

import pytest
from support.meshes import workload

from hbone.mesh import MeshSnapshot, MeshState

ONE, TWO, THREE = (MeshSnapshot.build([workload(uid)]) for uid in "abc")


def test_it_begins_empty_or_with_what_is_given() -> None:
    assert dict(MeshState().snapshot.workloads) == {}
    assert MeshState(ONE).snapshot is ONE


def test_subscribers_hear_of_each_change_once() -> None:
    state = MeshState(ONE)
    heard: list[tuple[str, MeshSnapshot, MeshSnapshot]] = []
    state.subscribe(lambda old, new: heard.append(("first", old, new)))
    unsubscribe = state.subscribe(lambda old, new: heard.append(("second", old, new)))
    state.replace(TWO)
    assert state.snapshot is TWO
    assert heard == [("first", ONE, TWO), ("second", ONE, TWO)]
    state.replace(TWO)
    assert len(heard) == 2
    unsubscribe()
    unsubscribe()
    state.replace(ONE)
    assert heard[2:] == [("first", TWO, ONE)]


def test_the_same_function_may_subscribe_twice() -> None:
    state = MeshState(ONE)
    heard: list[MeshSnapshot] = []

    def hear(_old: MeshSnapshot, new: MeshSnapshot) -> None:
        heard.append(new)

    unsubscribe = state.subscribe(hear)
    state.subscribe(hear)
    unsubscribe()
    unsubscribe()
    state.replace(TWO)
    assert heard == [TWO]


def test_who_fails_stops_nobody_else() -> None:
    state = MeshState(ONE)
    heard: list[MeshSnapshot] = []

    def fail(_old: MeshSnapshot, _new: MeshSnapshot) -> None:
        raise KeyError("mine")

    state.subscribe(fail)
    state.subscribe(lambda _old, new: heard.append(new))
    state.subscribe(fail)
    with pytest.raises(ExceptionGroup) as caught:
        state.replace(TWO)
    assert [type(each) for each in caught.value.exceptions] == [KeyError, KeyError]
    assert state.snapshot is TWO
    assert heard == [TWO]
    with pytest.raises(ExceptionGroup):
        state.replace(THREE)
    assert heard == [TWO, THREE]


def test_a_change_from_within_a_change_is_told_after_it() -> None:
    state = MeshState(ONE)
    heard: list[tuple[str, MeshSnapshot, MeshSnapshot]] = []

    def go_on(old: MeshSnapshot, new: MeshSnapshot) -> None:
        heard.append(("first", old, new))
        if new is TWO:
            state.replace(THREE)
            assert state.snapshot is THREE

    state.subscribe(go_on)
    state.subscribe(lambda old, new: heard.append(("second", old, new)))
    state.replace(TWO)
    assert heard == [("first", ONE, TWO), ("second", ONE, TWO), ("first", TWO, THREE), ("second", TWO, THREE)]


def test_who_leaves_during_a_change_is_not_told_any_more() -> None:
    state = MeshState(ONE)
    heard: list[str] = []
    state.subscribe(lambda _old, _new: leave())
    leave = state.subscribe(lambda _old, _new: heard.append("gone"))
    state.subscribe(lambda _old, _new: heard.append("still there"))
    state.replace(TWO)
    assert heard == ["still there"]


def test_who_comes_during_a_change_hears_of_the_next() -> None:
    state = MeshState(ONE)
    heard: list[MeshSnapshot] = []

    def bring_another(_old: MeshSnapshot, new: MeshSnapshot) -> None:
        if new is TWO:
            state.subscribe(lambda _old, new: heard.append(new))

    state.subscribe(bring_another)
    state.replace(TWO)
    assert heard == []
    state.replace(THREE)
    assert heard == [THREE]


def test_an_interrupt_passes_and_leaves_nothing_untold() -> None:
    state = MeshState(ONE)
    heard: list[tuple[MeshSnapshot, MeshSnapshot]] = []
    interrupts = [KeyboardInterrupt()]

    def interrupt(_old: MeshSnapshot, new: MeshSnapshot) -> None:
        if new is TWO:
            state.replace(THREE)
        if interrupts:
            raise interrupts.pop()

    state.subscribe(interrupt)
    state.subscribe(lambda old, new: heard.append((old, new)))
    with pytest.raises(KeyboardInterrupt):
        state.replace(TWO)
    assert state.snapshot is THREE
    state.replace(ONE)
    assert heard == [(TWO, THREE), (THREE, ONE)]
