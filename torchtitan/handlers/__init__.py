"""Model handlers: changes to a model between its construction and its parallelisation."""
