"""Integer codes of two executions, quantizer by quantizer."""
