"""Certificates, signed requests and the endpoints of the coordinator."""
