"""Machinery that several tests share."""
