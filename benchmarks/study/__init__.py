"""The study: what the constraint keeps, what it costs, and how the alternatives do on the same work."""
