"""Who is in the swarm and which way to go: pure logic, standard library and numpy, no I/O."""
