"""Merging: maths on the logits of members, alone."""
