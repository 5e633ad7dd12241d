"""Serving: what a node does for the sessions of others."""
