"""The three services in one process on embedded engines, and the command line."""
