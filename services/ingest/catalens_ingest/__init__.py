"""Product events come in over HTTP and go onto the log."""
