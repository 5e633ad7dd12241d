"""The example for transformers runs, as a reader of the README would run it."""

import runpy
from pathlib import Path

from petalnode.blocking import open_blocking
from petalnode.options import NodeOptions

EXAMPLE = Path(__file__).parents[2] / "examples" / "hf_generate.py"


def test_generating_alone_and_through_another_node_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    main = runpy.run_path(str(EXAMPLE))["main"]
    alone = main()
    assert alone[0].startswith("def read_file(path):\n")
    assert alone[1].startswith("import os\nimport ")
    with open_blocking("demo", NodeOptions(host="127.0.0.1", blocks=(0, 8))) as node:
        assert main(node.value.invite) == alone
