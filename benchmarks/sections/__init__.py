"""The sections, in the order in which they run. Each module has ``run(quick) -> Result``."""

ALL = (
    "steps",
    "large",
    "clients",
    "start",
    "promises",
    "wire",
    "isolation",
    "link",
    "stall",
    "drain",
    "ablation",
    "blocks",
    "routing",
    "placement",
    "gossip",
    "loading",
    "perplexity",
    "training",
    "tuning",
)
LONG = {"promises", "wire", "blocks", "placement", "loading", "perplexity", "training", "tuning"}
QUICK = tuple(name for name in ALL if name not in LONG)
"""What a quick run is without names: the others can be run by themselves."""
CHECKS = ("parity",)
"""No timings: run by name alone, and each writes its tables into a document of its own."""
