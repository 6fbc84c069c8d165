"""Searches come in over HTTP and ranked products go out."""
