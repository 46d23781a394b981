"""What the process runs on: other processes, threads, processor, memory, room on the disk.

Imports nothing of ours but errors.
"""
