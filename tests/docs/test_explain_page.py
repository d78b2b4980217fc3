"""The page about `hbone explain`: its commands say what it says that they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from hbone_cli import cli

HOWTO = Path(__file__).parents[2] / "docs" / "howto"
BLOCKS = re.findall(r"```console\n(.*?)```", (HOWTO / "explain.md").read_text("utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0].partition("--from ")[2])
def test_what_the_page_shows(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NETWORK", "LOCAL_XDS", "LOCAL_XDS_PATH", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(HOWTO / "examples")
    said, code = [], 0
    for line in block.splitlines():
        if line == "$ echo $?":
            said += [line, str(code)]
        elif line.startswith("$ hbone "):
            result = CliRunner().invoke(cli, line.split()[2:])
            code = result.exit_code
            said += [line, result.output.rstrip("\n")]
    assert "\n".join(said) == block.rstrip("\n")


def test_there_are_examples() -> None:
    assert len(BLOCKS) >= 6
