"""Who is in the swarm and which way to go: pure logic on the standard library, no I/O."""
