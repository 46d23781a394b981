"""Networks: built by timm from a description, with weights from checked files."""
