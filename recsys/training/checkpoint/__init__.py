"""Checkpoints: whole or not there, of any number of ranks and any plan, written while training goes on."""
