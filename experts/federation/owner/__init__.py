"""The side that holds private text and trains on it."""
