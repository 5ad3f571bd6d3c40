"""Says how far two trajectories are apart, and how far they may be."""
