"""The examples run, as a reader of the README would run them."""

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


async def test_embedding(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    text = await runpy.run_path(str(EXAMPLES / "embed.py"))["main"]()
    assert text
    assert capsys.readouterr().out == text + "\n"
