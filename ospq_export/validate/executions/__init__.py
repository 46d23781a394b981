"""Executions of a network: what runs, where, and on which file."""
