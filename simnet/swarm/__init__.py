"""The swarm simulator: thousands of nodes that run the real ``routing`` code on modelled links."""
