"""The sections, in the order in which they run. Each module has ``run(quick) -> Result``."""

ALL = ("steps", "large", "clients", "start", "wire", "isolation", "link", "blocks")
