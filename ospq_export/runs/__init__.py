"""The run directory: names and hashes of its files, its manifest, its tensors, and a finished run as an object."""
