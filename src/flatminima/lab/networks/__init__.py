"""The paper's networks, other people's, and checkpoints of both."""
