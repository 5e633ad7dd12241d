"""What blocks are built from: linear layers, norms, attention, feed-forwards, experts."""
