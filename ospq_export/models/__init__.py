"""Networks: built by timm from a description, with weights from checked files.

Imports world and errors; knows nothing of images, graphs or run directories.
"""
