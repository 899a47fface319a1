"""The side that hands out seeds and collects experts."""
