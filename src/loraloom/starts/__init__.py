"""Where an adapter's A starts, and what keeps it there."""
