"""Model families. Importing this package, the registry or the flavors imports no torch."""
