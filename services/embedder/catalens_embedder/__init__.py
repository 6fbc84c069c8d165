"""Product events come off the log, pictures and texts become vectors, vectors go into the index."""
