"""The one representation of a network that all stages share: captured ATen graph, cut points, quantizers, graph.json.

Imports formats and errors; knows nothing of files of a run or of a stage.
"""
