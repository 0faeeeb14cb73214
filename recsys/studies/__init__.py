"""Studies: questions that only several runs answer together."""
