"""The simulated network and the swarm simulator: to come with the swarm issue."""
