"""Number formats: how values become codes and codes values, one module for each kind.

Imports nothing of ours but errors.
"""
