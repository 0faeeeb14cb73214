"""Reports on runs, of what their folders hold."""
