"""The coordinator's processes: SuperLink, reverse proxy and their supervisor."""
