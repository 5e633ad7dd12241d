"""The examples run, as a reader of the README would run them."""

import runpy
from pathlib import Path

from petalnode.models.checkpoint import open_checkpoint
from petalnode.models.tuning.peft_files import load_adapter

EXAMPLES = Path(__file__).parents[2] / "examples"


async def test_embedding(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    text = await runpy.run_path(str(EXAMPLES / "embed.py"))["main"]()
    assert text
    assert capsys.readouterr().out == text + "\n"


async def test_tuning_a_prompt(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    before, after = await runpy.run_path(str(EXAMPLES / "tune_prompt.py"))["main"]()
    assert "given" not in before
    assert "given" in after
    assert "step 40: loss" in capsys.readouterr().out


async def test_tuning_lora(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    losses = await runpy.run_path(str(EXAMPLES / "tune_lora.py"))["main"](str(tmp_path / "out"))
    assert losses[-1] < 0.5 * losses[0]
    adapter = load_adapter(tmp_path / "out", open_checkpoint("demo").config)
    assert adapter.kind == "lora"
