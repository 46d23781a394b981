"""What the benchmarks share: their rows, the networks they measure, their command lines and Markdown."""
