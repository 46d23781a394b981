"""What a network's outputs mean, and how two executions of it are compared.

Imports nothing of ours but errors.
"""
