"""Training through a swarm: what is the client's own, through blocks that are not."""
