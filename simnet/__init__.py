"""Simulation: real nodes on a simulated network (``world``); swarms of thousands (``swarm``)."""
