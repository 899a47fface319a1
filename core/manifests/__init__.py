"""Manifests: the records that seed.json, expert.json, generalist.json and run.json hold."""
