"""The owner: holds private text, trains on it and signs deliveries."""
