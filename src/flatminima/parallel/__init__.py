"""Several processes: what they exchange, and models whose parameters they share."""
