"""The sections, in the order in which they run. Each module has ``run(quick) -> Result``."""

ALL = ("steps", "large", "clients", "start", "wire", "isolation", "link", "blocks")
QUICK = tuple(name for name in ALL if name not in ("wire", "blocks"))
"""What a quick run is without names: the two others are scripts that can be run by themselves."""
