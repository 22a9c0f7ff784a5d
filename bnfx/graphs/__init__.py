"""From a model to a graph, to train or to fold, and what is known of the graph."""
