"""Tests against a real S3 server on loopback (see swift_server.py)."""
