"""Plans of training: memory, time, traffic and cost of each method, from a model's shape and the hardware."""
