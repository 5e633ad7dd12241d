"""Sessions: what a node does for its own user."""
