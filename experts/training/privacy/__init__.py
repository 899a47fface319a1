"""Training with differential privacy: noise, accounting, per-example gradients."""
