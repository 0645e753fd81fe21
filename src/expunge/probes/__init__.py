"""Linear probes: where in a model a manner such as toxicity can be read off, layer by layer."""
