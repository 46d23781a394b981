"""What a slice is optimised for."""
